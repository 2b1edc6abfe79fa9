"""The small recipe's pictures: their names, and splits that stay."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

RECIPE = Path(__file__).parents[3] / "recipes" / "smol"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(RECIPE))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in ("pictures", "prepare"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("A great blue heron.", "great blue heron"),
        ("An iguana.", "iguana"),
        ("The Sun.", "sun"),
        ("Remember to flush the toilet!", None),
        ("The letter a.", None),
        ("A US 25 cent piece ($.25) called a quarter.", None),
    ],
)
def test_stamp_names(recipe: Any, caption: str, name: str | None) -> None:
    assert recipe("pictures").stamp_name(caption) == name


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (0x1F981, "lion"),
        (0x1F3BA, "trumpet"),
        (0x1F346, "eggplant"),
        (0x1F600, None),
        (0x2648, None),
    ],
)
def test_emoji_names(recipe: Any, code: int, name: str | None) -> None:
    assert recipe("pictures").emoji_name(code) == name


def test_split_is_stable_under_additions(recipe: Any) -> None:
    module = recipe("pictures")
    some = [module.Picture(f"stamps/{i}", Path("x"), f"name{i % 7}") for i in range(60)]
    more = [*some, *(module.Picture(f"stamps/n{i}", Path("x"), f"name{i % 7}") for i in range(9))]
    before = {p.id: part for part, ps in module.split(some).items() for p in ps}
    after = {p.id: part for part, ps in module.split(more).items() for p in ps}
    assert all(after[key] == part for key, part in before.items())


def test_committed_splits_are_disjoint() -> None:
    def read(name: str) -> list[list[str]]:
        lines = (RECIPE / "splits" / f"{name}.tsv").read_text().splitlines()
        return [line.split("\t") for line in lines]

    rows = {name: read(name) for name in ("train", "b", "c", "copy")}
    ids = [row[1] for part in rows.values() for row in part]
    assert len(ids) == len(set(ids)) > 4000
    assert {row[0] for row in rows["c"]} - {row[0] for row in rows["train"]}
    assert {row[0] for row in rows["b"]} <= {row[0] for row in rows["train"]}


def test_pictures_stay_in_the_parts_that_the_lists_say(recipe: Any, tmp_path: Path) -> None:
    module = recipe("prepare")
    (tmp_path / "copy.tsv").write_text("older man\tfluent/1f474\n", encoding="utf-8")
    (tmp_path / "train.tsv").write_text("box\tnoto/1f4e6\nbox\ttwitter/1f4e6\n", encoding="utf-8")
    index = [
        {"id": "fluent/1f474", "split": "c"},
        {"id": "noto/1f4e6", "split": "train"},
        {"id": "stamps/new.png", "split": "b"},
    ]
    assert module.keep_lists(index, tmp_path) == 1
    assert [entry["split"] for entry in index] == ["copy", "train", "b"]
