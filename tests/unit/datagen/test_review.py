"""The review page: what it shows, what it refuses, and what a rejection does to the dataset."""

from __future__ import annotations

import html.parser
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from endpoint import Endpoint, Says, describe, kind_of
from test_long_sft import lines, make

from longvila.datagen.review import save_decisions, server, write_page
from longvila.errors import LongVILAError

HOSTILE = '</script><script>alert(1)</script> @KEY@ & "quotes" are shown on the screen.'


def hostile(body: dict[str, Any]) -> Says:
    """Every description tries to break out of the page."""
    return Says(HOSTILE) if kind_of(body) in ("caption", "compose") else describe(body)


@pytest.fixture
def run(endpoint: Endpoint, videos: Path, tmp_path: Path) -> Path:
    endpoint.script = hostile
    make(endpoint, tmp_path, videos)
    return tmp_path


class Page(html.parser.HTMLParser):
    """Tags, texts and items of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.items: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.items += [value for name, value in attrs if name == "data-item"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_everything_and_runs_nothing_of_it(run: Path) -> None:
    page = Page(write_page(run).read_text())
    assert page.tags.count("script") == 1 and page.tags.count("img") == 6
    assert page.tags.count("section") == 2 and page.text.count(HOSTILE) == 6 + 2
    assert "2 of 2 captioned videos, 2 in all" in page.text
    assert "rests on 1" in page.text and "answered unseen" in page.text
    assert len(page.items) == len(set(page.items)) == 2 * (1 + 2)
    assert "more/second/summary" in page.items


def test_a_large_set_is_shown_in_part(run: Path) -> None:
    page = Page(write_page(run, most_videos=1).read_text())
    assert page.tags.count("section") == 1 and "1 of 2 captioned videos" in page.text


def test_a_video_that_is_gone_is_shown_without_pictures(
    endpoint: Endpoint, videos: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.mp4"
    copy.write_bytes((videos / "first.mp4").read_bytes())
    endpoint.script = describe
    make(endpoint, tmp_path / "out", copy)
    copy.unlink()
    page = Page(write_page(tmp_path / "out").read_text())
    assert "img" not in page.tags and "The numbers on the screen are 4 7" in page.text


@pytest.fixture
def served(run: Path) -> Iterator[tuple[str, str]]:
    """The address of a server, and its key."""
    with server(run) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        address = f"http://127.0.0.1:{serving.server_port}"
        with urllib.request.urlopen(address, timeout=120) as answer:
            page = answer.read().decode()
        key = json.loads(page.partition("const key = ")[2].partition(";")[0])
        yield address, key
        serving.shutdown()
        thread.join()


def post(address: str, key: str, decisions: Any) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        f"{address}/decisions", json.dumps(decisions).encode(), {"X-Review-Key": key}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as fault:
        with fault:
            return fault.code, json.load(fault)


def test_a_rejection_is_written_down_and_leaves_the_dataset(
    run: Path, served: tuple[str, str]
) -> None:
    address, key = served
    with urllib.request.urlopen(f"{address}/", timeout=120) as answer:
        items = Page(answer.read().decode()).items
    rejected = [items[0], items[1]]
    status, said = post(address, key, {items[0]: "reject", items[1]: "reject", items[2]: "accept"})
    assert status == 200 and said["rejected"] == 2 and said["questions"] == 3
    assert json.loads((run / "decisions.json").read_text())[rejected[0]] == "reject"
    made = lines(run / "dataset.jsonl")
    assert [m["id"] for m in made] == [
        "first-questions", "more/second-caption", "more/second-questions",
    ]  # fmt: skip
    assert len(made[0]["conversations"]) == 2
    # The page that is written next knows.
    assert '": "reject"' in write_page(run).read_text()
    status, said = post(address, key, {})
    assert status == 200 and said["samples"] == 4


def test_a_page_that_is_loaded_again_knows_what_was_decided(
    run: Path, served: tuple[str, str]
) -> None:
    address, key = served
    assert post(address, key, {"first/summary": "reject"})[0] == 200
    with urllib.request.urlopen(f"{address}/", timeout=120) as answer:
        page = answer.read().decode()
    assert 'const decisions = {"first/summary": "reject"};' in page and Page(page).items


def test_decisions_on_a_video_that_was_left_out_stay_and_stop_nothing(
    run: Path, endpoint: Endpoint, videos: Path
) -> None:
    save_decisions(run, {"more/second/summary": "reject"})
    make(endpoint, run, videos / "first.mp4")
    counts = save_decisions(run, {"more/second/summary": "reject", "first/summary": "reject"})
    assert counts["captions"] == 0 and counts["rejected"] == 1
    make(endpoint, run, videos)
    assert [each["id"] for each in lines(run / "dataset.jsonl")] == [
        "first-questions", "more/second-questions",
    ]  # fmt: skip


def test_decisions_that_come_together_are_all_taken(run: Path, served: tuple[str, str]) -> None:
    address, key = served
    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(lambda _: post(address, key, {"first/summary": "reject"}), range(8)))
    assert [status for status, _ in said] == [200] * 8


def test_another_site_cannot_read_the_page_under_its_own_name(served: tuple[str, str]) -> None:
    address, key = served
    for path, data in (("", None), ("decisions", b"{}")):
        headers = {"Host": "elsewhere.example:8017", "X-Review-Key": key}
        request = urllib.request.Request(f"{address}/{path}", data, headers)
        with pytest.raises(urllib.error.HTTPError, match="403") as refused:
            urllib.request.urlopen(request, timeout=120)
        refused.value.close()


def test_only_the_page_may_write_and_only_decisions(run: Path, served: tuple[str, str]) -> None:
    address, key = served
    before = (run / "dataset.jsonl").read_bytes()
    assert post(address, "", {"first/summary": "reject"})[0] == 403
    assert post(address, key + "x", {"first/summary": "reject"})[0] == 403
    assert post(address, key, {"first/summary": "maybe"})[0] == 400
    status, said = post(address, key, {"nothing/summary": "reject"})
    assert status == 400 and "not there" in said["fault"]
    with pytest.raises(urllib.error.HTTPError, match="404") as refused:
        urllib.request.urlopen(f"{address}/../settings.json", timeout=120)
    refused.value.close()
    assert not (run / "decisions.json").exists() and (run / "dataset.jsonl").read_bytes() == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LongVILAError, match="no folder of"):
        write_page(tmp_path)
    with pytest.raises(LongVILAError, match="no folder of"):
        save_decisions(tmp_path, {})
