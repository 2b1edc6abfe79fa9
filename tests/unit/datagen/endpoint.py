"""A chat endpoint on this machine that answers as it is told, and a model that describes numbers.

The model reads the number that each synthetic frame carries out of the JPEG it is sent, so a
caption says which frames were shown.
"""

from __future__ import annotations

import base64
import io
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from longvila.media.synthetic import read_number


@dataclass
class Says:
    """One answer of the endpoint."""

    text: Any = "Something is shown on the screen."
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    wait_s: float = 0.0
    trickle_s: float = 0.0
    finish: str = "stop"

    def bytes(self) -> bytes:
        if self.body is not None:
            return self.body
        choice = {"message": {"content": self.text}, "finish_reason": self.finish}
        usage = {"prompt_tokens": 10, "completion_tokens": 3}
        return json.dumps({"choices": [choice], "usage": usage}).encode()


class Endpoint:
    """The endpoint; `script` gets a request's body and says what comes back."""

    def __init__(self) -> None:
        self.script: Callable[[dict[str, Any]], Says] = lambda body: Says()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.headers.append(dict(self.headers))
                self.send_error(405)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append({"path": self.path, **body})
                outer.headers.append(dict(self.headers))
                says = outer.script(body)
                time.sleep(says.wait_s)
                data = says.bytes()
                try:
                    self.send_response(says.status)
                    for name, value in says.headers.items():
                        self.send_header(name, value)
                    if not {"Content-Length", "Transfer-Encoding"} & set(says.headers):
                        self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    size = 1 if says.trickle_s else len(data) or 1
                    for start in range(0, len(data), size):
                        self.wfile.write(data[start : start + size])
                        time.sleep(says.trickle_s)
                except ConnectionError:
                    self.close_connection = True  # a client that did not wait

            def log_message(self, *arguments: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))

    def __enter__(self) -> Endpoint:
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def text_of(body: dict[str, Any]) -> str:
    """The text of a request's last message."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def numbers_of(body: dict[str, Any]) -> list[int | None]:
    """The numbers on the pictures of a request."""
    content = body["messages"][-1]["content"]
    found = []
    for part in content if isinstance(content, list) else ():
        if part["type"] == "image_url":
            data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
            found.append(read_number(np.asarray(Image.open(io.BytesIO(data)))))
    return found


def kind_of(body: dict[str, Any]) -> str:
    """Which of the package's prompts a request was made of."""
    begins = {
        "These ": "caption",
        "A video of": "compose",
        "A long video": "merge",
        "Below are": "blind",
    }
    text = text_of(body)
    kind = next(name for start, name in begins.items() if text.startswith(start))
    if kind == "compose" and "Write questions about this video" in text:
        return "questions"
    return "judge" if kind == "blind" and "Right answer:" in text else kind


QUESTIONS = [
    ("spatial", "Where does the large number stand in the picture?", "In the middle."),
    ("temporal", "What number comes after the one that is shown first?", "The next higher one."),
    ("temporal", "Which number comes after the one shown first?", "A higher one."),
    ("object", "What does the caption mention?", "A number."),
    ("action", "What happens to the number as time goes by?", "It grows."),
]


def describe(body: dict[str, Any]) -> Says:
    """A model that does well: captions say numbers, the fifth question is too easy."""
    kind, text = kind_of(body), text_of(body)
    if kind == "caption":
        numbers = " ".join(str(n) for n in numbers_of(body))
        return Says(f"The numbers on the screen are {numbers} in this order.")
    if kind in ("compose", "merge"):
        shown = re.findall(r"are ([\d ]+) in", text)
        return Says(f"The video counts through the numbers {' '.join(shown)} from start to end.")
    if kind == "questions":
        made = [
            {"type": type_, "question": question, "answer": answer, "parts": [1]}
            for type_, question, answer in QUESTIONS
        ]
        return Says("```json\n" + json.dumps(made) + "\n```")
    number = len(re.findall(r"^\d+\. ", text, re.MULTILINE))
    if kind == "blind":
        return Says(json.dumps(["unknown"] * (number - 1) + ["It gets larger."]))
    return Says(json.dumps([True] * number))
