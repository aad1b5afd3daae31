"""A Gemini endpoint on the loopback interface: answers as scripted, remembers what it was asked."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def answer(text: str | None, *, reason: str = "STOP", thought: str | None = None) -> dict[str, Any]:
    """The JSON of a response with one candidate."""
    parts = [{"text": thought, "thought": True}] if thought else []
    parts += [] if text is None else [{"text": text}]
    return {"candidates": [{"content": {"role": "model", "parts": parts}, "finishReason": reason}]}


def failure(code: int, message: str) -> tuple[int, dict[str, Any]]:
    """A status code with the JSON that Google's services send along."""
    return code, {"error": {"code": code, "message": message, "status": "FAILED"}}


class GeminiServer(ThreadingHTTPServer):
    """Plays `script`, one item per request; its last item is repeated.

    An item is a dict (sent as 200), (status, dict), bytes (sent as they are), or None (never answers).
    """

    daemon_threads = True

    def __init__(self, script: list[Any]) -> None:
        super().__init__(("127.0.0.1", 0), _Endpoint)
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Endpoint(BaseHTTPRequestHandler):
    server: GeminiServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append({"path": self.path, "headers": dict(self.headers), "body": body})
        item = self.server.script[min(len(self.server.requests), len(self.server.script)) - 1]
        if item is None:
            self.server.over.wait()
            return
        status, content = item if isinstance(item, tuple) else (200, item)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def gemini_server(*script: Any):
    """Run a `GeminiServer` for the length of the block."""
    server = GeminiServer(list(script))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
