"""The page in a real Chromium: a video is dropped, its frames are seen, times in answers seek."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.waiting import wait_until

BROWSER = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
        if (found := shutil.which(name))
    ),
    None,
)
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH to show the page in"),
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None, reason="playwright is not installed"
    ),
]


def load_cases() -> ModuleType:
    """The helper of the unit tests, which is no package."""
    name = "serving_cases"
    if name not in sys.modules:
        file = Path(__file__).parents[1] / "unit" / "serving" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


cases = load_cases()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("page")
    with cases.running(
        folder, page=True, access=cases.Access(), new_tokens=100, ends=True
    ) as server:
        yield server


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from longvila.media import synthetic

    path = tmp_path_factory.mktemp("film") / "film.mp4"
    synthetic.clip(path, num_frames=48, fps=8, width=160, height=96)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(120_000)
    faults: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda fault: faults.append(str(fault)))
    page.on(
        "console",
        lambda line: (
            faults.append(line.text)
            if line.type == "error"
            and "status of 4" not in line.text
            and "DISCONNECTED" not in line.text
            else None
        ),
    )
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{server.url}/")
    page.get_by_text("tiny", exact=True).wait_for()
    yield page
    assert not faults
    elsewhere = [u for u in asked if not u.startswith((server.url, "blob:", "data:"))]
    assert not elsewhere, f"the page loads from elsewhere: {elsewhere}"
    context.close()


DROP = """async ([name, encoded]) => {
  const bytes = Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type: "video/mp4" }));
  const options = { bubbles: true, cancelable: true, dataTransfer: transfer };
  const place = document.getElementById("drop");
  place.dispatchEvent(new DragEvent("dragover", options));
  place.dispatchEvent(new DragEvent("drop", options));
}"""


def drop(page: Any, film: Path) -> None:
    page.evaluate(DROP, [film.name, cases.data_uri(film).partition(",")[2]])
    page.locator("#sheet li").first.wait_for()


def say(server: Any, monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
    """Let the model say these, one answer after the other."""
    from longvila.inference.serving import scheduler

    tokenizer = server.processor.tokenizer
    waiting = [
        [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for text in answers
    ]

    class Scripted:
        def __init__(self, *arguments: Any) -> None:
            self.tokens = iter(waiting.pop(0))

        def choose(self, logits: Any, ids: Any) -> int:
            return next(self.tokens)

    monkeypatch.setattr(scheduler, "Sampler", Scripted)


def ask(page: Any, text: str) -> str:
    count = page.locator("#messages .assistant").count()
    page.get_by_label("Question").fill(text)
    page.get_by_role("button", name="Ask").click()
    page.wait_for_function(
        "n => document.querySelectorAll('#messages .assistant').length === n"
        " && document.getElementById('stop').hidden", arg=count + 1,
    )  # fmt: skip
    return str(page.locator("#messages .assistant").last.inner_text())


def test_frames_are_shown_with_their_times_and_seek(page: Any, film: Path) -> None:
    drop(page, film)
    frames = page.locator("#sheet button")
    assert frames.count() == 8
    times = [float(frames.nth(n).get_attribute("data-time")) for n in range(8)]
    assert times == sorted(times) and times[0] == 0 and 5.5 < times[-1] < 6
    assert frames.nth(4).inner_text() == f"00:0{int(times[4])}"
    shown = page.evaluate(
        "() => [...document.querySelectorAll('#sheet img')].map((i) => i.naturalWidth)"
    )
    assert min(shown) > 0, "a frame is no picture"
    frames.nth(4).click()
    page.wait_for_function("t => document.getElementById('player').currentTime === t", arg=times[4])
    page.locator("#sheet button.now").wait_for()
    assert page.locator("#sheet button.now").get_attribute("data-time") == str(times[4])
    assert "8 frames of 00:06" in page.locator("#status").inner_text()


def test_frames_are_sampled_as_asked(page: Any, film: Path) -> None:
    drop(page, film)
    page.get_by_label("Frames", exact=True).fill("5")
    page.get_by_role("button", name="Sample").click()
    page.wait_for_function("() => document.querySelectorAll('#sheet li').length === 5")
    page.get_by_label("Frames", exact=True).fill("500")
    page.get_by_role("button", name="Sample").click()
    page.get_by_text("ask for fewer").wait_for()
    assert "wrong" in page.locator("#status").get_attribute("class")


def test_times_in_answers_seek_the_player(
    page: Any, server: Any, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "It starts at 00:03, again at 4.5 s; not 99:99, 09:00 or <b>this</b>."
    say(server, monkeypatch, text, "Yes.")
    drop(page, film)
    assert ask(page, "When?") == text
    assert page.locator("#messages b").count() == 0
    times = page.locator("button.time")
    assert times.all_inner_texts() == ["00:03", "4.5 s"]
    for number, expected in enumerate((3.0, 4.5)):
        times.nth(number).click()
        page.wait_for_function(
            "t => Math.abs(document.getElementById('player').currentTime - t) < 0.01", arg=expected
        )
    before = server.server.metrics.value("reused_tokens_total")
    assert ask(page, "Sure?") == "Yes."
    assert page.locator("#messages li").count() == 4
    assert server.server.metrics.value("reused_tokens_total") - before > 8 * 9
    page.get_by_role("button", name="New conversation").click()
    assert page.locator("#messages li").count() == 0


def test_the_answer_is_the_model_s(page: Any, server: Any, film: Path) -> None:
    drop(page, film)
    page.get_by_label("Frames", exact=True).fill("6")
    page.get_by_role("button", name="Sample").click()
    page.wait_for_function("() => document.querySelectorAll('#sheet li').length === 6")
    content = [{"type": "video", "video": str(film)}, {"type": "text", "text": "Who?"}]
    expected = server.direct(
        [{"role": "user", "content": content}], max_new_tokens=100, num_frames=6
    )
    ask(page, "Who?")
    said = page.evaluate("() => turns.at(-1).content")
    assert said == expected


def test_a_file_that_is_no_video_and_questions_without_one(
    page: Any, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = tmp_path / "notes.mp4"
    wrong.write_text("#EXTM3U\nfile:///etc/passwd\n")
    page.locator("#file").set_input_files(str(wrong))
    page.get_by_text("not a video that is read here").wait_for()
    page.reload()
    say(server, monkeypatch, "Hello.", "")
    assert ask(page, "Hello?") == "Hello."
    ask(page, "And?")
    assert "empty" in page.locator("#messages .assistant").last.get_attribute("class")


def test_an_answer_is_stopped(
    page: Any, server: Any, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(server, monkeypatch, "on and " * 200)
    decode = server.engine.decode
    monkeypatch.setattr(server.engine, "decode", lambda *a: (time.sleep(0.2), decode(*a))[1])
    monkeypatch.setattr(
        server.server.scheduler, "settings", replace(server.server.settings, new_tokens=250)
    )
    drop(page, film)
    page.get_by_label("Question").fill("Go on")
    page.get_by_label("Question").press("Enter")
    page.wait_for_function(
        "() => document.querySelector('#messages .assistant')?.textContent.length > 10"
    )
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Ask").wait_for()
    assert "cut" in page.locator("#messages .assistant").get_attribute("class")
    scheduler = server.server.scheduler
    wait_until(lambda: not any(scheduler.counts().values()), scheduler.counts)


def test_an_answer_that_is_stopped_before_it_began_leaves_the_question(
    page: Any, server: Any, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, held = server.engine.prefill, threading.Event()
    monkeypatch.setattr(
        server.engine, "prefill", lambda *a, **k: (held.wait(60), prefill(*a, **k))[1]
    )
    drop(page, film)
    question = page.get_by_label("Question")
    question.fill("Which?")
    # The Enter of an input method takes a word, and sends nothing.
    question.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    assert page.locator("#messages li").count() == 0
    question.press("Enter")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_function("() => document.getElementById('question').value === 'Which?'")
    assert page.locator("#messages li").count() == 0
    assert page.locator("#progress").inner_text() == ""
    # Another sampling is another conversation: the answer under way goes with the old one.
    question.press("Enter")
    page.get_by_label("Frames", exact=True).fill("3")
    page.get_by_role("button", name="Sample").click()
    page.wait_for_function("() => document.querySelectorAll('#sheet li').length === 3")
    page.wait_for_function("() => document.getElementById('stop').hidden", timeout=20_000)
    held.set()


def test_a_video_that_could_not_be_sent_is_said_to_be_so(page: Any, film: Path) -> None:
    page.context.set_offline(True)
    page.evaluate(DROP, [film.name, cases.data_uri(film).partition(",")[2]])
    page.locator("#status", has_text="the server cannot be reached").wait_for()
    page.context.set_offline(False)
    page.get_by_label("Question").fill("Who?")
    page.get_by_label("Question").press("Enter")
    page.get_by_text("was not sent; choose it again").wait_for()


def test_an_upload_that_is_gone_is_sent_again(
    page: Any, server: Any, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(server, monkeypatch, "Still there.")
    drop(page, film)
    uploads = server.server.uploads
    with uploads._lock:
        for key in list(uploads._files):
            del uploads._files[key]
            (uploads.folder / key).unlink()
    assert ask(page, "Still there?") == "Still there."
    assert len(uploads._files) == 1


def test_a_key_is_asked_for(browser: Any, tmp_path: Path, film: Path) -> None:
    with cases.running(tmp_path, page=True, keys=("open",)) as locked:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{locked.url}/")
        page.get_by_text("the key is missing or wrong").wait_for()
        page.get_by_label("Key").fill("open")
        page.get_by_role("button", name="Use").click()
        page.get_by_text("tiny", exact=True).wait_for()
        drop(page, film)
        context.close()
