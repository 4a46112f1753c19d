"""A web server of a folder, in a thread, that does to a request what the next of its faults says; and a reader of it.

Imports no torch: processes that read start with this.
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
    """A folder behind ``url``.

    Attributes:
        requests: How often each file was asked for.
        faults: Of each file, what happens to its next requests: a status, "cut" (the connection, after half of it),
            "wrong" (a bit), "other" (a bit of the others, every time another) or "short" (a byte less than there is).
        held: Files whose second half is not sent before ``gate`` is open.
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
        """Say nothing."""


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
    """Put the hash of all of train, read at the same time as others read it."""
    store = RemoteFolder(url, cache, 1e9)
    stream = TokenStream(store, store.manifest, "train")
    together.wait()
    results.put(hashlib.sha256(stream.read([0], len(stream))[0].tobytes()).hexdigest())
