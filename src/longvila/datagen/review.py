"""A page to look at what was made, accept or reject it, and write that down.

1. `write_page` makes one HTML file that needs nothing else: of each video its segments with a
   picture and a caption, the long caption, the questions with the parts they rest on, and what the
   filters dropped and why. A large set is shown in part, spread evenly over it.
2. Each long caption and question has two buttons. Served by `server`, the page saves decisions to
   ``decisions.json`` at once, and the dataset is written anew without what was rejected. Opened as
   a file, it offers the same file for download.

The server listens on this machine only, writes that one file only, answers to this machine's own
name only, and takes what comes with the page's own key, so that no other site can read or write
through the reader's browser.

Cost: a picture of about 4 KB a segment; one pass of the decoder over each video that is shown.
"""

from __future__ import annotations

import base64
import html
import json
import re
import secrets
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

from longvila.datagen.caption import clock, segment_pictures
from longvila.datagen.dataset import (
    Video,
    captions_of,
    check_decisions,
    item_of,
    opened,
    read_decisions,
    write_dataset,
)
from longvila.datagen.journal import Journal, write_whole
from longvila.datagen.qa import Question
from longvila.errors import LongVILAError
from longvila.inference.caller import as_jpeg
from longvila.log import get_logger
from longvila.media.sampling import uniform_indices

_LOG = get_logger(__name__)
_LARGEST_BODY = 16 * 2**20
_SIDE = 160


def write_page(output: Path, *, most_videos: int = 50, key: str = "") -> Path:
    """Write ``review.html`` of a run.

    Args:
        output: The run's folder.
        most_videos: Videos shown.
        key: What a server wants to be sent with decisions; empty for none.

    Returns:
        The file.

    Raises:
        LongVILAError: If the folder is none of a run's.
    """
    file = output / "review.html"
    write_whole(file, _filled(_content(output, most_videos), read_decisions(output), key))
    return file


def _content(output: Path, most_videos: int) -> dict[str, str]:
    """What a page shows of a run, but decisions, which change while it is looked at."""
    with opened(output) as (videos, journals, _):
        ready = [video for video in videos if captions_of(video, journals) is not None]
        chosen = ready
        if len(ready) > most_videos:
            chosen = [ready[i] for i in uniform_indices(len(ready), most_videos)]
        parts = [_video(video, journals) for video in chosen]
    facts = f"{len(chosen)} of {len(ready)} captioned videos, {len(videos)} in all"
    return {"@FACTS@": html.escape(facts), "@VIDEOS@": "\n".join(parts)}


def _filled(content: Mapping[str, str], decisions: Mapping[str, str], key: str) -> str:
    page = resources.files("longvila.datagen").joinpath("review.html").read_text(encoding="utf-8")
    filled = {
        **content,
        # No "</script>" of a caption may end the script.
        "@DECISIONS@": json.dumps(decisions).replace("<", "\\u003c"),
        "@KEY@": json.dumps(key),
    }
    # In one go: what is filled in may itself look like a place to fill in.
    return re.sub("|".join(filled), lambda found: filled[found[0]], page)


def _video(video: Video, journals: Mapping[str, Journal]) -> str:
    cut = journals["segments"][video.id]
    bounds = cut["bounds_s"]
    captions = captions_of(video, journals) or []
    pictures = _pictures(video, bounds)
    out = [
        f'<section><h2>{html.escape(video.id)}</h2><p class="facts">{clock(cut["duration_s"])}, '
        f"{cut['width']} x {cut['height']}, {cut['fps']:.3g} frames a second, "
        f"{len(captions)} segments</p><ol class='parts'>"
    ]
    for number, caption in enumerate(captions):
        span = f"{clock(bounds[number])} to {clock(bounds[number + 1])}"
        out.append(
            f"<li>{pictures.get(number, '')}<b>{number + 1}</b> <time>{span}</time> "
            f"{html.escape(caption)}</li>"
        )
    out.append("</ol>")
    if video.id in journals["summaries"]:
        summary = html.escape(journals["summaries"][video.id]["summary"])
        out.append(_item(item_of(video.id, None), f"<p>{summary}</p>", "Long caption"))
    if video.id in journals["kept"]:
        kept = journals["kept"][video.id]
        for values in kept["kept"]:
            question = Question.of(values)
            out.append(_item(item_of(video.id, question), _question(question), question.type))
        if kept["dropped"]:
            rows = "".join(
                f"<li><b>{html.escape(each['reason'])}</b> ({html.escape(each['detail'])}): "
                f"{html.escape(each['question'])} <i>{html.escape(each['answer'])}</i></li>"
                for each in kept["dropped"]
            )
            number = len(kept["dropped"])
            out.append(f"<details><summary>Dropped: {number}</summary><ul>{rows}</ul></details>")
    else:
        out.append("<p class='facts'>Not finished yet: nothing of it is in the dataset.</p>")
    return "\n".join([*out, "</section>"])


def _question(question: Question) -> str:
    numbers = ", ".join(str(n) for n in question.parts)
    return (
        f"<p><b>{html.escape(question.question)}</b></p><p>{html.escape(question.answer)}</p>"
        f"<p class='facts'>rests on {numbers}</p>"
    )


def _item(item: str, body: str, title: str) -> str:
    return (
        f'<div class="item" data-item="{html.escape(item, quote=True)}"><span class="kind">'
        f"{html.escape(title)}</span>{body}"
        '<button data-say="accept">Accept</button><button data-say="reject">Reject</button></div>'
    )


def _pictures(video: Video, bounds: Sequence[float]) -> dict[int, str]:
    """An image element of the middle of each segment; a video that is gone has none."""
    found = {}
    try:
        for number, frames in segment_pictures(
            video.path, bounds, range(len(bounds) - 1), frames=1, side=_SIDE
        ):
            for frame in frames[:1]:
                data = base64.b64encode(as_jpeg(frame, longest_side=_SIDE, quality=70)).decode()
                found[number] = f'<img alt="" src="data:image/jpeg;base64,{data}">'
    except (LongVILAError, OSError) as fault:
        _LOG.warning("no pictures of %s: %s", video.id, fault)
    return found


def save_decisions(output: Path, decisions: Mapping[str, str]) -> dict[str, int]:
    """Write decisions down, and the dataset anew.

    Returns:
        What the dataset holds now.

    Raises:
        LongVILAError: If they are no decisions, or on what the run has not.
    """
    with opened(output) as (videos, journals, how):
        known = {item_of(v.id, None) for v in videos}
        for video in videos:
            if video.id in journals["kept"]:
                kept = journals["kept"][video.id]["kept"]
                known |= {item_of(video.id, Question.of(each)) for each in kept}
        # What was decided on a video that this run leaves out stays decided.
        known |= set(read_decisions(output))
        strange = sorted(set(check_decisions(decisions, "decisions")) - known)
        if strange:
            raise LongVILAError(f"decisions on what is not there: {strange[:3]}")
        text = json.dumps(dict(sorted(decisions.items())), indent=1) + "\n"
        write_whole(output / "decisions.json", text)
        return dict(write_dataset(output, videos, journals, **how))


def server(output: Path, *, port: int = 0, most_videos: int = 50) -> ThreadingHTTPServer:
    """Make a server of the review page; the caller runs and closes it.

    Args:
        output: The run's folder.
        port: Where it listens on this machine; 0 for any that is free.
        most_videos: Videos shown.

    Returns:
        The server; ``server_port`` says where it listens.
    """
    key = secrets.token_urlsafe(16)
    content = _content(output, most_videos)
    one_at_a_time = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self._asked_by_name():
                return
            if self.path not in ("/", "/review.html"):
                self._say(404, {"fault": "there is only the page"})
                return
            # A page that is loaded again sends all decisions anew, so it must know those there are.
            try:
                page = _filled(content, read_decisions(output), key)
            except LongVILAError as fault:
                self._say(500, {"fault": str(fault)})
                return
            self._send(200, "text/html; charset=utf-8", page.encode())

        def do_POST(self) -> None:
            if not self._asked_by_name():
                return
            digits = self.headers.get("Content-Length") or "0"
            length = int(digits) if digits.isdecimal() else _LARGEST_BODY + 1
            if self.path != "/decisions" or length > _LARGEST_BODY:
                self._say(404, {"fault": "decisions are posted to /decisions"})
                return
            body = self.rfile.read(length)
            sent = (self.headers.get("X-Review-Key") or "").encode(errors="replace")
            if not secrets.compare_digest(sent, key.encode()):
                self._say(403, {"fault": "the page of another server; load it again"})
                return
            try:
                decisions = json.loads(body)
                with one_at_a_time:
                    counts = save_decisions(output, decisions)
                self._say(200, counts)
            except (LongVILAError, ValueError) as fault:
                self._say(400, {"fault": str(fault)})

        def _asked_by_name(self) -> bool:
            """Whether it is asked for by this machine's own name, and not as another site."""
            name = (self.headers.get("Host") or "").rpartition(":")[0]
            if name not in ("127.0.0.1", "localhost"):
                self._say(403, {"fault": "the page is at 127.0.0.1 only"})
            return name in ("127.0.0.1", "localhost")

        def _say(self, status: int, values: Mapping[str, Any]) -> None:
            self._send(status, "application/json", json.dumps(values).encode())

        def _send(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            _LOG.debug(format, *arguments)

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)
