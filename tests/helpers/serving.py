"""Web server of a directory in a thread, with faults on request, and a reader of it.

Imports no torch, since reading processes import this module.
"""

import hashlib
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from gptlab.data.shards.remote import RemoteFolder
from gptlab.data.shards.streams import TokenStream


class Served(ThreadingHTTPServer):
    """Server of a directory at ``url``.

    Attributes:
        requests: Number of requests of each file.
        faults: Faults of the next requests of each file: an HTTP status, "cut" (closes the connection after half of the
            file), "wrong" (flips a bit of the last byte), "other" (flips a bit of another byte in every request) or
            "short" (omits the last byte).
        held: Files whose second half is not sent before ``gate`` is set.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.url = folder, f"http://127.0.0.1:{self.server_port}/data"
        self.requests: Counter[str] = Counter()
        self.faults: dict[str, Iterator[int | str]] = defaultdict(lambda: iter(()))
        self.held: set[str] = set()
        self.gate = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: Served

    def do_GET(self) -> None:
        name = self.path.removeprefix("/data/")
        self.server.requests[name] += 1
        fault, path = next(self.server.faults[name], None), self.server.folder / name
        if isinstance(fault, int) or not path.is_file():
            self.send_error(fault if isinstance(fault, int) else 404)
            return
        data = bytearray(path.read_bytes())
        if fault in ("wrong", "other"):
            data[-1 if fault == "wrong" else -self.server.requests[name]] ^= 1
        if fault == "short":
            data.pop()
        half = len(data) // 2
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:half])
        if name in self.server.held:
            self.wfile.flush()
            self.server.gate.wait(30)
        if fault != "cut":
            self.wfile.write(data[half:])

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


@contextmanager
def served(folder: Path) -> Iterator[Served]:
    with Served(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.gate.set()
            server.shutdown()
            thread.join()


def read_all(url, cache, together, results) -> None:
    """Puts the hash of the train split into ``results``, after waiting for the other readers."""
    store = RemoteFolder(url, cache, 1e9)
    stream = TokenStream(store, store.manifest, "train")
    together.wait()
    results.put(hashlib.sha256(stream.read([0], len(stream))[0].tobytes()).hexdigest())
