"""The routes, seen by OpenAI's own client: answers are the engine's, and errors say what to do."""

from __future__ import annotations

import base64
import gzip
import http.client
import io
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from tests.waiting import wait_until

from longvila.inference.serving import app
from longvila.inference.serving.media import Wanted

from .serving_cases import LIMITS, Running, ask, clip, data_uri, running


def video(path: Path, text: str) -> dict[str, Any]:
    """The message that `ask` sends, as the processor takes it."""
    return {
        "role": "user",
        "content": [{"type": "video", "video": str(path)}, {"type": "text", "text": text}],
    }


def call(
    running: Running, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    host = running.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=120)
    try:
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


# ---- right answers


def test_a_file_below_the_root_is_answered_about_as_the_engine_does(
    served: Running, client: openai.OpenAI
) -> None:
    expected = served.direct(
        [video(served.root / "a.mp4", "What?")], max_new_tokens=20, num_frames=8
    )
    answer = client.chat.completions.create(
        model="tiny", messages=[ask("What?", "a.mp4")], max_tokens=20
    )
    assert answer.choices[0].message.content == expected != ""
    assert answer.usage is not None and answer.usage.prompt_tokens > 8 * 9
    assert answer.model_extra is not None
    (seen,) = answer.model_extra["longvila"]["media"]
    assert seen["frames"] == 8 and seen["timestamps_s"] == sorted(seen["timestamps_s"])


def test_a_stream_holds_the_same_text_and_says_how_it_ended(
    served: Running, client: openai.OpenAI
) -> None:
    messages = [ask("And now?", "b.mp4")]
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5)
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=5,
            stream=True, stream_options={"include_usage": True},
        )
    )  # fmt: skip
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert whole.usage is not None and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize(
    ("options", "kwargs"),
    [
        ({"num_frames": 5}, {"num_frames": 5}),
        ({"fps": 2.0}, {"fps": 2.0}),
        ({"fps": 4.0, "num_frames": 3}, {"fps": 4.0, "num_frames": 3}),
    ],
)
@pytest.mark.parametrize("where", ["request", "part"])
def test_each_request_says_how_frames_are_sampled(
    served: Running,
    client: openai.OpenAI,
    options: dict[str, Any],
    kwargs: dict[str, Any],
    where: str,
) -> None:
    inner, outer = (options, {}) if where == "part" else ({}, options)
    expected = served.direct([video(served.root / "c.mp4", "?")], max_new_tokens=8, **kwargs)
    answer = client.chat.completions.create(
        model="tiny", messages=[ask("?", "c.mp4", **inner)], max_tokens=8, extra_body=outer
    )
    assert answer.choices[0].message.content == expected


def test_data_uris_and_pictures(served: Running, client: openai.OpenAI, tmp_path: Path) -> None:
    path = clip(tmp_path / "elsewhere.mp4", seed=4)
    pixels = np.random.default_rng(3).integers(0, 255, (30, 40, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    picture = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "video_url", "video_url": {"url": data_uri(path)}},
        {"type": "text", "text": "Which?"},
    ]
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": content}], max_tokens=10
    )
    plain = [
        {"type": "image", "image": Image.fromarray(pixels)},
        {"type": "video", "video": str(path)},
        {"type": "text", "text": "Which?"},
    ]
    expected = served.direct([{"role": "user", "content": plain}], max_new_tokens=10, num_frames=8)
    assert answer.choices[0].message.content == expected


def test_turns_reuse_what_was_read_and_change_no_word(
    served: Running, client: openai.OpenAI
) -> None:
    messages: list[Any] = [ask("First?", "b.mp4", num_frames=6)]
    direct = [video(served.root / "b.mp4", "First?")]
    cached = []
    for question in ("Second?", "Third?", None):
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=9)
        expected = served.direct(direct, max_new_tokens=9, num_frames=6)
        message = answer.choices[0].message
        assert message.content == expected
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
        # The client's own object goes back, with all its empty fields.
        messages += [message, {"role": "user", "content": question}]
        direct += [
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": question},
        ]
    assert cached[1] is not None and cached[1] > 6 * 9, cached
    assert cached[2] is not None and cached[2] > cached[1], cached


def test_stop_sequences_and_seeds(client: openai.OpenAI) -> None:
    def create(**options: Any) -> str:
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Say something."}], **options
        )
        return answer.choices[0].message.content or ""

    sampled = create(temperature=1.0, top_p=0.9, seed=7, max_tokens=40)
    assert sampled == create(temperature=1.0, top_p=0.9, seed=7, max_tokens=40)
    assert sampled != create(temperature=1.0, top_p=0.9, seed=8, max_tokens=40)
    stop = sampled[3:5]
    cut = create(temperature=1.0, top_p=0.9, seed=7, max_tokens=40, stop=[stop, "never"])
    assert cut == sampled[: sampled.index(stop)]


def test_an_answer_that_asks_for_no_length_keeps_the_limit(tmp_path: Path) -> None:
    body = json.dumps({"model": "tiny", "messages": [ask("Hello")]}).encode()
    with running(tmp_path, limits=replace(LIMITS, new_tokens=3)) as server:
        answer = call(server, "POST", "/v1/chat/completions", body, Content_Type="application/json")
        assert json.loads(answer[2])["usage"]["completion_tokens"] == 3


def test_the_model_may_end_its_answer(tmp_path: Path) -> None:
    messages: list[Any] = [{"role": "user", "content": "What?"}]
    with (
        running(tmp_path, ends=True) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
    ):
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=250)
        assert answer.choices[0].message.content == server.direct(messages, max_new_tokens=250)
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None and answer.usage.completion_tokens < 250


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "longvila"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("large")


# ---- refusals say what to change


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"model": "gpt"}, 404, "this server has 'tiny'"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}, 400, "question"),
        ({"max_tokens": 100_000}, 400, "at most 256"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"n": 2}, 400, "n is not done"),
        ({"tools": [{"type": "function"}]}, 400, "tools is not done"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"invented": 1}, 400, "invented"),
        ({"temperature": 3}, 400, "temperature"),
        ({"stop": [""]}, 400, "must not be empty"),
        ({"stop": "x" * 257}, 400, "nor longer than 256"),
        ({"fps": 1e9}, 400, "fps"),
        ({"model": "m" * 100_000}, 404, "mmm...'"),
        ({"m" * 100_000: 1}, 400, "no such field"),
        ({"messages": [ask("?", "a.mp4", num_frames=10**15)]}, 400, "ask for fewer"),
        ({"messages": [ask("?", "a.mp4", fps=1000.0)]}, 400, "ask for fewer"),
        ({"messages": [{"role": "user", "content": "y" * 30_000}]}, 400, "at most 20000"),
        ({"messages": [ask("?", "a.mp4", num_frames=65)]}, 400, "ask for fewer"),
        ({"messages": [ask("?", "a.mp4", fps=1000.0), ask("?", "c.mp4", num_frames=64)]}, 400,
         "are left"),
        ({"messages": [ask("?", "a.mp4", num_frames=0)]}, 400, "num_frames"),
        ({"messages": [ask("?", *["a.mp4"] * 5)]}, 400, "send fewer"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, 400, "context is 4096"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, 400, "NUL"),
        ({"messages": [{"role": "robot", "content": "a"}]}, 400, "messages.0.role"),
        ({"messages": [ask("?", "nothing.mp4")]}, 403, "not a file"),
        ({"messages": [ask("?", "../root/a.mp4")]}, 403, "not a file"),
        ({"messages": [ask("?", "http://example.org/a.mp4")]}, 403, "data: URI"),
        ({"messages": [ask("?", "ftp://example.org/a.mp4")]}, 400, "addresses"),
        ({"messages": [ask("?", "upload:nothing")]}, 404, "send the file again"),
        ({"messages": [ask("?", "data:video/mp4;base64,!!!!")]}, 400, "base64"),
        ({"messages": [ask("?", "data:video/mp4;base64,aGVsbG8=")]}, 400, "not a video"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_and_how(
    client: openai.OpenAI,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    status: int,
    says: str,
    stream: bool,
) -> None:
    # A stream that begins before the fault is found can only tell of it inside.
    monkeypatch.setattr(app, "_SILENCE_S", 120.0)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "stream": stream}
    with pytest.raises(openai.APIStatusError) as caught:
        client.post("/chat/completions", body=body | change, cast_to=object)
    assert caught.value.status_code == status
    assert says in caught.value.message and len(caught.value.message) < 400, caught.value.message


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 1e-40}, {"temperature": 2.0, "top_p": 1e-9}, {"top_k": 10**9, "seed": -1},
        {"fps": 1e-300}, {"stop": ["x"] * 4}, {"max_tokens": 1}, {"temperature": 0, "top_p": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_odd_but_right(client: openai.OpenAI, change: dict[str, Any]) -> None:
    body = {"model": "tiny", "messages": [ask("?", "a.mp4")], "max_tokens": 4, **change}
    assert client.post("/chat/completions", body=body, cast_to=object)


def test_bodies_together_are_bounded(tmp_path: Path) -> None:
    with (
        running(tmp_path, limits=replace(LIMITS, held_bytes=50_000)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
    ):
        long: list[Any] = [{"role": "user", "content": "Hello", "name": "n" * 60_000}]
        with pytest.raises(openai.InternalServerError, match="holds too many") as caught:
            client.chat.completions.create(model="tiny", messages=long)
        assert caught.value.response.headers["retry-after"]
        for stream in (False, True):
            answer = client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=2,
                stream=stream,
            )  # fmt: skip
            if stream:
                assert list(answer)
    # A stream gives back only after its last bytes, which its reader may see first.
    assert server.server.bodies.taken == 0


def test_a_request_that_is_too_large_or_no_json(served: Running) -> None:
    path = "/v1/chat/completions"
    large = b"{" + b" " * (1 << 20)
    status, _, body = call(served, "POST", path, large, Content_Type="application/json")
    assert status == 413 and b"smaller" in body
    status, _, body = call(served, "POST", path, b"{no", Content_Type="application/json")
    assert status == 400 and b"JSON" in body
    # A form of another page needs no permission to send text.
    status, _, body = call(served, "POST", path, b"{}", Content_Type="text/plain")
    assert status == 415


def test_a_compressed_body_is_refused_by_name(served: Running) -> None:
    body, headers = gzip.compress(b"{}"), {"Content_Type": "application/json"}
    for method, path in (("POST", "/v1/chat/completions"), ("PUT", "/v1/uploads")):
        status, _, answer = call(served, method, path, body, Content_Encoding="gzip", **headers)
        assert status == 415 and b"Content-Encoding gzip" in answer


def test_heads_of_what_can_be_got(served: Running) -> None:
    for path in ("/health", "/v1/models", "/metrics"):
        status, headers, body = call(served, "HEAD", path)
        assert status == 200 and body == b"" and int(headers["content-length"]) > 0
    assert call(served, "HEAD", "/v1/uploads")[0] == 405


def test_a_fault_of_the_server_is_told_in_the_same_form(
    served: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(served.server, "_card", lambda: 1 / 0)
    status, _, body = call(served, "GET", "/v1/models")
    assert status == 500 and json.loads(body)["error"]["code"] == "internal"
    assert "ZeroDivisionError" in caplog.text
    count = served.server.metrics.value("http_responses_total", path="/v1/models", status="500")
    assert count == 1


def test_a_body_without_a_length_is_counted(served: Running) -> None:
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=120)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    for _ in range(20):
        connection.send(b"%x\r\n" % (1 << 16) + b" " * (1 << 16) + b"\r\n")
    connection.send(b"0\r\n\r\n")
    assert connection.getresponse().status == 413
    connection.close()


def test_a_stranger_s_host_name_gets_nothing(served: Running) -> None:
    status, _, body = call(served, "GET", "/v1/models", Host="evil.example")
    assert status == 421 and b"host" in body
    assert call(served, "GET", "/v1/models", Host="localhost:1234")[0] == 200


def test_routes_that_do_not_exist_answer_in_the_same_form(served: Running) -> None:
    status, headers, body = call(served, "GET", "/v1/nothing")
    assert status == 404 and json.loads(body)["error"]["code"] == "no_such_route"
    assert headers["x-content-type-options"] == "nosniff"
    # No page here, and no schema pages that load scripts from elsewhere.
    assert {call(served, "GET", path)[0] for path in ("/", "/docs", "/openapi.json")} == {404}


def test_health_and_metrics(served: Running, client: openai.OpenAI) -> None:
    assert call(served, "GET", "/health")[::2] == (200, b'{"status":"ok"}')
    before = served.server.metrics.value("new_tokens_total")
    client.chat.completions.create(model="tiny", messages=[ask("?", "a.mp4")], max_tokens=3)
    status, headers, body = call(served, "GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = dict(line.rsplit(" ", 1) for line in body.decode().splitlines() if line[0] != "#")
    assert 1 <= float(lines["longvila_new_tokens_total"]) - before <= 3
    assert float(lines['longvila_kv_bytes{of="kept"}']) > 0
    assert lines['longvila_requests{state="active"}'] == "0"


# ---- uploads and frames


def test_a_file_is_uploaded_and_asked_about(served: Running, client: openai.OpenAI) -> None:
    path = served.root / "c.mp4"
    status, _, body = call(served, "PUT", "/v1/uploads", path.read_bytes())
    assert status == 200
    url = json.loads(body)["url"]
    answers = [
        client.chat.completions.create(model="tiny", messages=[ask("Who?", u)], max_tokens=8)
        for u in (url, "c.mp4")
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    # The same pixels: what was read for the one is used for the other.
    usage = answers[1].usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1
    assert call(served, "PUT", "/v1/uploads", b"")[0] == 400
    assert call(served, "PUT", "/v1/uploads", b"x" * (2 << 20))[0] == 413
    assert not list(served.server.uploads.folder.glob("part-*"))


def test_uploads_that_the_system_has_tidied_away(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4")
    with running(tmp_path) as server:
        url = json.loads(call(server, "PUT", "/v1/uploads", path.read_bytes())[2])["url"]
        shutil.rmtree(server.server.uploads.folder)
        body = json.dumps({"model": "tiny", "messages": [ask("?", url)]}).encode()
        answer = call(server, "POST", "/v1/chat/completions", body, Content_Type="application/json")
        assert answer[0] == 404 and b"send the file again" in answer[2]
        status, _, answer = call(server, "PUT", "/v1/uploads", b"more")
        assert status == 507 and b"no room" in answer and not server.server.uploads.incoming.taken


def test_thumbnails_of_a_very_tall_video_are_small(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = served.server.loader.load(Wanted("video", "a.mp4", 2))
    assert found.video is not None
    tall = replace(found.video, metadata=replace(found.video.metadata, width=16, height=64_000))
    monkeypatch.setattr(served.server.loader, "load", lambda *a, **k: replace(found, video=tall))
    sizes, resize = [], Image.Image.resize

    def noted(picture: Any, size: Any) -> Any:
        sizes.append(size)
        return resize(picture, size)

    monkeypatch.setattr(Image.Image, "resize", noted)
    body = json.dumps({"url": "a.mp4"}).encode()
    status, _, answer = call(served, "POST", "/v1/frames", body, Content_Type="application/json")
    assert status == 200 and len(json.loads(answer)["frames"]) == 2
    assert sizes == [[1, 120]] * 2


def test_the_frames_that_the_model_sees(served: Running) -> None:
    body = json.dumps({"url": "b.mp4", "num_frames": 5}).encode()
    status, _, answer = call(served, "POST", "/v1/frames", body, Content_Type="application/json")
    found = json.loads(answer)
    assert status == 200 and found["num_frames"] == len(found["frames"]) == 5
    times = [frame["time_s"] for frame in found["frames"]]
    assert times == sorted(times) and 0 < times[-1] < found["duration_s"]
    data = base64.b64decode(found["frames"][0]["image"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).format == "JPEG"
    for wrong in (
        {},
        [],
        {"url": 1},
        {"url": "b.mp4", "num_frames": 0},
        {"url": "b.mp4", "fps": -1},
    ):
        body = json.dumps(wrong).encode()
        assert call(served, "POST", "/v1/frames", body, Content_Type="application/json")[0] == 400
    for body, says in (
        (b'{"url": "b.mp4", "frames": 5}', b"frames: there is no such field"),
        (b'{"url":' * 100_000, b"recursion limit"),
    ):
        status, _, answer = call(
            served, "POST", "/v1/frames", body, Content_Type="application/json"
        )
        assert status == 400 and says in answer


@pytest.mark.parametrize(
    ("part", "where"),
    [
        ({"type": "text"}, "messages.0.content.0.text"),
        (
            {"type": "video_url", "video_url": {"url": "a.mp4", "fps": -1}},
            "messages.0.content.0.video_url.fps",
        ),
        ({"type": "video_url", "video_url": "a.mp4", "fps": -1}, "messages.0.content.0.fps"),
        ({"type": "sound"}, "messages.0.content.0"),
    ],
    ids=str,
)
def test_the_field_that_is_wrong_is_named_as_it_is_sent(
    served: Running, part: dict[str, Any], where: str
) -> None:
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": [part]}]})
    answer = call(
        served, "POST", "/v1/chat/completions", body.encode(), Content_Type="application/json"
    )
    error = json.loads(answer[2])["error"]
    assert answer[0] == 400 and error["param"] == where and error["message"].startswith(where)


# ---- clients that leave, and keys


def test_a_client_that_leaves_is_not_served_on(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, decode = served.server.scheduler, served.engine.decode
    # The answers would take a minute.
    monkeypatch.setattr(served.engine, "decode", lambda *a: (time.sleep(0.2), decode(*a))[1])
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="tiny", messages=[ask("Go on and on.", "a.mp4")], max_tokens=256,
            temperature=1.0, seed=1, stream=True,
        )  # fmt: skip
        next(iter(stream))
        stream.close()
        body = {
            "model": "tiny", "messages": [{"role": "user", "content": "On."}],
            "max_tokens": 256, "temperature": 1.0, "seed": 2,
        }  # fmt: skip
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.05).post("/chat/completions", body=body, cast_to=object)
    before = served.server.metrics.value("new_tokens_total")
    wait_until(lambda: not any(scheduler.counts().values()), scheduler.counts)
    assert served.server.metrics.value("new_tokens_total") - before < 200
    assert served.server.metrics.value("requests_total", outcome="cancelled") >= 1


def test_a_server_that_ends_tells_whoever_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    body = {
        "model": "tiny", "messages": [{"role": "user", "content": "Go on."}], "max_tokens": 256,
    }  # fmt: skip
    with ThreadPoolExecutor(2) as pool, running(tmp_path) as server:
        scheduler, decode = server.server.scheduler, server.engine.decode
        monkeypatch.setattr(server.engine, "decode", lambda *a: (time.sleep(0.2), decode(*a))[1])
        answers = [
            pool.submit(
                call, server, "POST", "/v1/chat/completions",
                json.dumps({**body, "stream": stream}).encode(), Content_Type="application/json",
            )
            for stream in (False, True)
        ]  # fmt: skip
        wait_until(lambda: scheduler.counts()["active"] == 2, scheduler.counts)
        begun = {"path": "/v1/chat/completions", "status": "200"}
        wait_until(
            lambda: server.server.metrics.value("http_responses_total", **begun) == 1,
            "the stream has begun",
        )
    (status, headers, whole), (_, _, stream) = (answer.result() for answer in answers)
    assert status == 503 and b"going down" in whole and headers["retry-after"]
    *_, last = stream.decode().split("\n\n")[:-1]
    assert "going down" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert not [record for record in caplog.records if record.exc_info]


def test_keys_are_asked_for(tmp_path: Path) -> None:
    with running(tmp_path, keys=("right", "other", "schl\u00fcssel")) as server:
        messages: list[Any] = [{"role": "user", "content": "Hello"}]
        for key, good in (("right", True), ("other", True), ("wrong", False)):
            headers = {"Authorization": f"Bearer {key}"}
            with openai.OpenAI(
                base_url=f"{server.url}/v1", api_key="x", max_retries=0, default_headers=headers
            ) as client:
                if good:
                    assert client.chat.completions.create(model="tiny", messages=messages)
                    continue
                with pytest.raises(openai.AuthenticationError, match="Bearer KEY"):
                    client.chat.completions.create(model="tiny", messages=messages)
        assert call(server, "GET", "/metrics")[0] == 401
        umlaut = "Bearer schl\u00fcssel".encode().decode("latin-1")  # as curl sends it
        assert call(server, "GET", "/v1/models", Authorization=umlaut)[0] == 200
        assert call(server, "GET", "/health")[0] == 200


def test_full_queues_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = replace(LIMITS, waiting=1, per_client=2, active=1)
    with (
        running(tmp_path, limits=limits) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
    ):
        messages: list[Any] = [{"role": "user", "content": "Hello"}]

        def start(key: str) -> Any:
            return client.with_options(api_key=key).chat.completions.create(
                model="tiny", messages=messages, max_tokens=256, temperature=2.0, stream=True
            )

        scheduler, decode, over = server.server.scheduler, server.engine.decode, threading.Event()
        # No answer ends before the test does.
        monkeypatch.setattr(server.engine, "decode", lambda *a: (over.wait(100), decode(*a))[1])
        try:
            streams = [start("a")]
            wait_until(lambda: scheduler.counts()["active"] == 1, scheduler.counts)
            streams.append(start("a"))
            with pytest.raises(openai.RateLimitError, match="2 requests under way") as caught:
                start("a")
            assert caught.value.response.headers["retry-after"]
            with pytest.raises(openai.RateLimitError, match="1 requests are waiting"):
                start("b")
            for stream in streams:
                stream.close()
        finally:
            over.set()
