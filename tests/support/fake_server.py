"""A server that speaks the OpenAI protocol on this machine: a model and a judge for tests, with replies by function."""

from __future__ import annotations

import base64
import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import PIL.Image


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, reply=None, draw=None, tokens=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.draw, self.tokens = reply, draw, tokens
        self.asked: list[dict] = []
        self.refuse = 0  # how many requests to turn away first

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


def pictures(body: dict) -> list[PIL.Image.Image]:
    """The pictures of a chat request."""
    parts = [p for m in body["messages"] if isinstance(m["content"], list) for p in m["content"]]
    data = [p["image_url"]["url"].partition(",")[2] for p in parts if p["type"] == "image_url"]
    return [PIL.Image.open(io.BytesIO(base64.b64decode(d))).convert("RGB") for d in data]


def text(body: dict) -> str:
    """The last text of a chat request."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else " ".join(p["text"] for p in content if p["type"] == "text")


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *rest):
        pass

    def do_POST(self):
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refuse > 0:
            self.server.refuse -= 1
            return self._send({"error": {"message": "busy"}}, 503, {"retry-after-ms": "1"})
        if self.path.partition("?")[0].endswith("/chat/completions"):
            body = json.loads(raw)
            self.server.asked.append(body)
            reply = self.server.reply(text(body), pictures(body))
            if reply is None:
                return self._send({"error": {"message": "the filter says no"}}, 400)
            message = {"role": "assistant", "content": reply}
            choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
            if body.get("logprobs") and self.server.tokens:
                top = [{"token": t, "logprob": p, "bytes": None} for t, p in self.server.tokens(text(body)).items()]
                choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
            kind = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
            return self._send(kind | {"choices": [choice]})
        self.server.asked.append({"path": self.path, "raw": raw} if b"Content-Disposition" in raw else json.loads(raw))
        out = io.BytesIO()
        self.server.draw(self.server.asked[-1]).save(out, "PNG")
        self._send({"created": 0, "data": [{"b64_json": base64.b64encode(out.getvalue()).decode()}]})

    def _send(self, row, status=200, headers=None):
        data = json.dumps(row).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(**options):
    """A running server."""
    server = Server(**options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
