"""A stand-in for an endpoint that speaks OpenAI's chat completions, on the loopback interface.

    with judge_stand_in(reply) as server:
        read_judge("openai:m", {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": KEY}, cache)

`reply` gets the number of the request, from 0, and what was sent, and returns what is to be answered.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-no-key-at-all"
MARKS = {"grammar": 7, "creativity": 5, "consistency": 6.5, "age_group": "6-7"}


@dataclass(frozen=True)
class Reply:
    """content: what the model says; None closes the connection without a word."""

    content: str | None = json.dumps(MARKS)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # instead of a completion with the content
    seconds: float = 0.0  # before answering
    seconds_per_byte: float = 0.0

    def encode(self) -> bytes:
        if self.body is not None:
            return self.body
        return json.dumps({"choices": [{"message": {"role": "assistant", "content": self.content}}]}).encode()


class JudgeServer(ThreadingHTTPServer):
    """Keeps what was asked, in the order of arrival."""

    daemon_threads = True

    def __init__(self, reply: Callable[[int, dict[str, Any]], Reply]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply = reply
        self.lock = threading.Lock()
        self.released = threading.Event()
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @property
    def asked(self) -> list[str]:
        """What the user's messages held."""
        return [body["messages"][-1]["content"] for _, _, body in self.requests]


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append((self.path, dict(self.headers), body))
        reply = self.server.reply(number, body)
        self.server.released.wait(reply.seconds)
        if reply.content is None:
            return
        with contextlib.suppress(ConnectionError):  # the asker did not wait
            if reply.seconds_per_byte:
                for byte in b"HTTP/1.0 200 OK\r\n\r\n" + reply.encode():
                    self.wfile.write(bytes([byte]))
                    if self.server.released.wait(reply.seconds_per_byte):
                        break
                return
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def judge_stand_in(
    reply: Callable[[int, dict[str, Any]], Reply] = lambda number, body: Reply(),
) -> Iterator[JudgeServer]:
    """Yields the server, which answers until the block ends."""
    server = JudgeServer(reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
