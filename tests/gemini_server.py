"""A Gemini endpoint on the loopback interface: answers as scripted, remembers what it was asked."""

import json
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def answer(
    text: str | None, *, reason: str | None = "STOP", thought: str | None = None, usage: tuple[int, ...] = ()
) -> dict[str, Any]:
    """The JSON of a response with one candidate; `usage`: tokens of the prompt, the text and, if any, the thoughts."""
    parts = [{"text": thought, "thought": True}] if thought else []
    parts += [] if text is None else [{"text": text}]
    candidate = {"content": {"role": "model", "parts": parts}} | ({"finishReason": reason} if reason else {})
    counts = dict(zip(("promptTokenCount", "candidatesTokenCount", "thoughtsTokenCount"), usage, strict=False))
    return {"candidates": [candidate]} | ({"usageMetadata": counts} if usage else {})


def failure(code: int, message: str) -> tuple[int, dict[str, Any]]:
    """A status code with the JSON that Google's services send along."""
    return code, {"error": {"code": code, "message": message, "status": "FAILED"}}


@dataclass(frozen=True)
class Paced:
    """An item that is begun after `stall` seconds and sent in `pieces`, with `pause` seconds between them.

    With `until` it is begun when that event is set.
    """

    item: Any
    stall: float = 0.0
    pieces: int = 1
    pause: float = 0.0
    until: threading.Event | None = None


class GeminiServer(ThreadingHTTPServer):
    """Plays `script`, one item per request; its last item is repeated.

    An item is a dict (sent as 200), (status, dict), bytes (sent as they are), a list of dicts (the events of a stream),
    None (never answers), a function from the request's body to one of these, or any of them `Paced`. `:countTokens` always
    answers with the words of what it was sent.
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
        if ":countTokens" in self.path:
            words = sum(len(part["text"].split()) for content in body["contents"] for part in content["parts"])
            self._send(200, "application/json", [json.dumps({"totalTokens": words}).encode()])
            return
        self.server.requests.append({"path": self.path, "headers": dict(self.headers), "body": body})
        item = self.server.script[min(len(self.server.requests), len(self.server.script)) - 1]
        paced = item if isinstance(item, Paced) else Paced(item)
        if paced.item is None:
            self.server.over.wait()
            return
        self.server.over.wait(paced.stall)
        if paced.until is not None:
            paced.until.wait(60)
        item = paced.item(body) if callable(paced.item) else paced.item
        status, content = item if isinstance(item, tuple) else (200, item)
        streams = ":streamGenerateContent" in self.path and status == 200
        if isinstance(content, bytes):
            data = content
        elif streams:
            events = content if isinstance(content, list) else [content]
            data = b"".join(b"data: %s\r\n\r\n" % json.dumps(event).encode() for event in events)
        else:
            data = json.dumps(content).encode()
        size = max(1, -(-len(data) // paced.pieces))
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        self._send(status, "text/event-stream" if streams else "application/json", pieces, pause=paced.pause)

    def _send(self, status: int, kind: str, pieces: list[bytes], *, pause: float = 0.0) -> None:
        with suppress(ConnectionError):  # the client has given up
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(sum(map(len, pieces))))
            self.end_headers()
            for piece in pieces:
                self.wfile.write(piece)
                self.server.over.wait(pause)

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
