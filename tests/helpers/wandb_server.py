"""Local stand-in for a W&B server, sufficient for a run, its resume and `wandb sync`.

Like W&B, it stores the lines of a run's history by offset: a line that is sent again at the same offset replaces the
earlier one.
"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef" * 2 + "00c0ffee"  # of the length of W&B's keys
HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"


class Run:
    """Data of one run on the server."""

    def __init__(self) -> None:
        self.lines: dict[str, dict[int, str]] = {}  # lines of each file of the stream, by offset
        self.config: dict[str, Any] = {}
        self.exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """Rows in the order of their offsets."""
        return [json.loads(line) for _, line in sorted(self.lines.get(HISTORY, {}).items())]

    def take(self, request: dict[str, Any]) -> None:
        """Stores a request to the stream of the run."""
        for name, part in (request.get("files") or {}).items():
            kept = self.lines.setdefault(name, {})
            kept.update(enumerate(part["content"], part["offset"]))
        if request.get("complete"):
            self.exit_code = request["exitcode"]

    def status(self) -> dict[str, Any]:
        """Returns the response to a run that is resumed."""
        history = self.lines.get(HISTORY, {})
        tail = json.dumps([history[max(history)]] if history else [])
        return {
            "id": "id",
            "name": "name",
            "summaryMetrics": self.lines.get(SUMMARY, {}).get(0, "{}"),
            "historyLineCount": len(history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": tail,
            "eventsTail": "[]",
            "config": json.dumps(self.config),
            "tags": [],
            "notes": None,
            "wandbConfig": '{"t": 1}',
        }


class Server(ThreadingHTTPServer):
    """Server that can hang or shut down on request.

    Attributes:
        runs: Runs by ID.
        artifacts: Name and aliases of each created artifact; their files are not requested.
        connections: Number of connections.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, runs: dict[str, Run] | None = None, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.runs = {} if runs is None else runs
        self.artifacts: list[tuple[str, set[str]]] = []
        self.hangs = False
        self.connections = 0
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that direct W&B's client to this server."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": KEY}

    def verify_request(self, *_: Any) -> bool:
        """Counts a connection."""
        self.connections += 1
        return True

    def handle_error(self, *_: Any) -> None:
        """Ignores clients that have disconnected."""

    def die(self) -> None:
        """Shuts down: connections are refused from now on."""
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        """Responds to a query, or stores a part of a run's stream."""
        body = self._body()
        if self.path == "/graphql":
            request = json.loads(body)
            self._answer({"data": self._query(request["operationName"], request.get("variables") or {})})
        elif self.path.endswith("/file_stream"):  # /files/<entity>/<project>/<id>/file_stream
            self.server.runs[self.path.split("/")[-2]].take(json.loads(body))
            self._answer({})
        else:
            self._answer({}, status=404)  # the client's telemetry

    def do_PUT(self) -> None:
        """Accepts a file and discards it."""
        self._body()
        self._answer({})

    def _query(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "id", "name": "gptlab", "entity": {"id": "id", "name": "someone"}}
        match name:
            case "RunResumeStatus":
                run = self.server.runs.get(variables["name"])
                return {"model": project | {"bucket": run and run.status()}}
            case "UpsertBucket":
                inserted = variables["name"] not in self.server.runs
                run = self.server.runs.setdefault(variables["name"], Run())
                run.config = json.loads(variables["config"] or "null") or run.config
                count = len(run.history)
                bucket = {"id": "id", "name": variables["name"], "project": project, "historyLineCount": count}
                return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
            case "CreateArtifact":
                new = variables["input"]
                aliases = {alias["alias"] for alias in new["aliases"] or ()}
                self.server.artifacts.append((new["artifactCollectionName"], aliases))
                sequence = {"id": "id", "latestArtifact": {"id": "id", "versionIndex": 0}}
                return {
                    "createArtifact": {"artifact": {"id": "id", "state": "COMMITTED", "artifactSequence": sequence}}
                }
            case "":  # whether an artifact exists
                return {"project": {"artifact": None}}
            case "CreateRunFiles":
                host = self.headers["Host"]
                files = [{"name": name, "uploadUrl": f"http://{host}/upload"} for name in variables["files"]]
                return {"createRunFiles": {"runID": "id", "uploadHeaders": [], "files": files}}
        return {"serverInfo": {"features": []}, "viewer": {"id": "id", "entity": "someone", "flags": "{}"}}

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        while self.server.hangs:
            time.sleep(0.1)
        return body

    def _answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Logs nothing."""
