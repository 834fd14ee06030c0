"""A real HTTP server on loopback that speaks the chat-completions protocol, well or badly."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]
"""Status, headers, body."""
Answer = Callable[[dict[str, Any], int], Reply | None]
"""(request, how many came before it) -> reply; None cuts the connection."""


def completion(text: str, weights: dict[str, float] | None = None, *, more: str = "") -> Reply:
    """A chat completion; `weights` are log-probabilities at its first token, `more` its second."""
    logprobs = None
    if weights is not None:
        first = {"token": text[:1] if more else text, "logprob": -0.1, "bytes": None}
        alternatives = [{"token": t, "logprob": p, "bytes": None} for t, p in weights.items()]
        content = [{**first, "top_logprobs": alternatives}]
        if more:
            content.append({"token": more, "logprob": -0.1, "bytes": None, "top_logprobs": []})
        logprobs = {"content": content, "refusal": None}
    body = {
        "id": "chat-1",
        "object": "chat.completion",
        "created": 0,
        "model": "judge",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": text},
                "logprobs": logprobs,
            }
        ],
    }
    return 200, {}, json.dumps(body).encode()


def failure(status: int, **headers: str) -> Reply:
    """An error of the endpoint."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, named, json.dumps({"error": {"message": "no", "type": "x"}}).encode()


class Chat:
    """What the server has seen."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.most_at_once = 0


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    """Connections that wait: those beyond it are tried again after a second, not by the client."""


@contextmanager
def serve_chat(answer: Answer, *, latency: float = 0.0) -> Iterator[Chat]:
    """Serve until the context ends.

    Args:
        answer: what is replied to each request.
        latency: seconds before each reply.
    """
    lock, running = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or a reply's second packet waits for 40 ms

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                before = len(chat.requests)
                chat.requests.append({**body, "path": self.path})
                chat.keys.append(self.headers.get("Authorization", ""))
                running[0] += 1
                chat.most_at_once = max(chat.most_at_once, running[0])
            time.sleep(latency)
            reply = answer(body, before)
            with lock:
                running[0] -= 1
            if reply is None:
                self.close_connection = True
                self.connection.close()
                return
            status, headers, content = reply
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (ValueError, OSError):  # the connection was cut on purpose
                self.close_connection = True

    server = _Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    chat = Chat(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield chat
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
