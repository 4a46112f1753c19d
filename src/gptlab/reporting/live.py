"""Serves the report on the loopback interface, with current data while runs progress."""

import errno
import hashlib
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from gptlab.errors import UserError
from gptlab.reporting.page import render_page, to_script_json
from gptlab.terminal import print_exception

ADDRESS = "127.0.0.1"
MAX_CONNECTIONS = 64  # each has a thread; further connections are closed
READ_SECONDS = 10.0  # to receive a whole request
SEND_SECONDS = 60.0  # to send a whole response
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class LiveServer(ThreadingHTTPServer):
    """Serves the page at / and its data at /data.json, on the loopback interface only.

    Args:
        gather: Returns the current document.
        port: TCP port; 0 for a free one.
        poll: Seconds between the page's requests for new data.

    Raises:
        UserError: The port is in use or not permitted.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, gather: Callable[[], dict[str, Any]], port: int, poll: float) -> None:
        self.poll = poll
        self._gather, self._turn = gather, threading.Lock()
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._deadlines: dict[socket.socket, float] = {}  # of connections whose request has not been received
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise UserError(f"port={port} {why}. Set another port, or port=0 for a free one.") from None
        # any other Host header comes from a foreign page whose host name resolves to this address (DNS rebinding)
        self.hosts = {f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")}

    def document(self) -> dict[str, Any]:
        """Returns the current document; a lock serializes concurrent requests, which read the same files."""
        with self._turn:
            return self._gather()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a thread for a connection, or closes it if there are too many."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        self._deadlines[request] = time.monotonic() + READ_SECONDS
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serves a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.received(request)
            self._places.release()

    def received(self, request: socket.socket) -> None:
        """Removes the deadline of a connection whose request has been received."""
        self._deadlines.pop(request, None)

    def service_actions(self) -> None:
        """Ends connections that are past their deadline; called several times per second."""
        for request, deadline in list(self._deadlines.items()):
            if time.monotonic() > deadline:
                with suppress(OSError):  # it has been closed
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints errors, except those of clients that closed the connection or did not receive the response."""
        if (error := sys.exception()) is not None and not isinstance(error, ConnectionError | TimeoutError):
            print_exception(type(error), error, error.__traceback__)

    @property
    def url(self) -> str:
        """URL of the page."""
        return f"http://{ADDRESS}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer
    server_version, sys_version = "gptlab", ""

    def do_GET(self) -> None:
        """Responds with the page or its data; rejects requests with a foreign Host header."""
        self.server.received(self.connection)
        self.connection.settimeout(SEND_SECONDS)
        if self.headers.get("Host") not in self.server.hosts:
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", f"This server only serves {self.server.url}\n")
            return
        try:
            match self.path:
                case "/":
                    self._answer(HTTPStatus.OK, "text/html", render_page(self.server.document(), self.server.poll))
                case "/data.json":
                    self._send_data(self.server.document())
                case _:
                    self._answer(HTTPStatus.NOT_FOUND, "text/plain", "Not found. Valid paths: / and /data.json\n")
        except UserError as error:  # e.g. the runs were removed
            self._answer(HTTPStatus.GONE, "text/plain", f"{error}\n")

    def _send_data(self, document: dict[str, Any]) -> None:
        """Sends the document, or status 304 if the client already has it, apart from ``made``."""
        same = to_script_json({**document, "made": None})
        tag = f'"{hashlib.sha256(same.encode()).hexdigest()}"'
        if self.headers.get("If-None-Match") == tag:
            self._answer(HTTPStatus.NOT_MODIFIED, "application/json", "")
        else:
            self._answer(HTTPStatus.OK, "application/json", to_script_json({**document, "poll": self.server.poll}), tag)

    def _answer(self, status: HTTPStatus, kind: str, text: str, tag: str | None = None) -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if tag is not None:
            self.send_header("ETag", tag)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        if status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Disables the log line per request."""
