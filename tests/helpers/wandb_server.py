"""As much of a W&B server as a run, its resume and `wandb sync` ask for, on this machine.

It keeps what it is sent as W&B does: the lines of a run's history by their offsets, so that what is sent again under
the same offset replaces, and what is sent after it adds.
"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef" * 2 + "00c0ffee"  # as long as W&B's
HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"


class Run:
    """What a server knows of one run."""

    def __init__(self) -> None:
        self.lines: dict[str, dict[int, str]] = {}  # of each file of the stream, by offset
        self.config: dict[str, Any] = {}
        self.exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows, in the order in which they were sent."""
        return [json.loads(line) for _, line in sorted(self.lines.get(HISTORY, {}).items())]

    def take(self, request: dict[str, Any]) -> None:
        """Keep what came through the stream of the run."""
        for name, part in (request.get("files") or {}).items():
            kept = self.lines.setdefault(name, {})
            kept.update(enumerate(part["content"], part["offset"]))
        if request.get("complete"):
            self.exit_code = request["exitcode"]

    def status(self) -> dict[str, Any]:
        """What a run that is resumed asks for."""
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
    """Serves until it dies or hangs.

    Attributes:
        runs: By their ids.
        artifacts: The name of each that was announced, and its aliases; their files are not asked for.
        connections: How many there were, whatever was asked.
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
        """What leads W&B's client here."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": KEY}

    def verify_request(self, *_: Any) -> bool:
        """Count a connection."""
        self.connections += 1
        return True

    def handle_error(self, *_: Any) -> None:
        """Stay silent when a client has left."""

    def die(self) -> None:
        """Refuse every connection from now on."""
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        """Answer a query, or take a piece of a run's stream."""
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
        """Take a file, and forget it."""
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
            case "":  # whether an artifact is there already
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
        """Stay silent."""
