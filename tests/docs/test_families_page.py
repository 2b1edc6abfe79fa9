"""The table of families on its page: every known family and verb, no claim without a test."""

from __future__ import annotations

import re
from pathlib import Path

from longvila.cli.main import verbs
from longvila.parallel.families import CAUSAL_LM, FAMILIES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guides" / "families.md"
INTEGRATION = ROOT / "tests" / "integration"
#: Where each column is run for the families that are not ours.
SHOWN_BY = {
    "parallelize": ("test_families_parity.py", "CASES"),
    "LongVILATrainer": ("test_trainer_families.py", "PROCESSORS|CASES"),
    "train": ("test_train_families.py", "PROCESSORS"),
    "ask": ("test_family_verbs.py", "def conversation"),
    "serve": ("test_family_verbs.py", "def test_serve"),
    "eval": ("test_family_verbs.py", "def test_the_verb_runs_a_benchmark"),
    "needle": ("test_family_verbs.py", "def test_needle"),
    "bench": ("test_family_verbs.py", "def test_bench"),
    "plan": ("test_family_verbs.py", "def test_plan"),
}


def table() -> list[list[str]]:
    found = re.search(r"<!-- families -->\n(.*?)<!-- /families -->", PAGE.read_text("utf-8"), re.S)
    assert found is not None
    lines = found[1].strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_family_and_every_verb_is_there() -> None:
    header, _, *rows = table()
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    known = [name for family in FAMILIES for name in family.model_types]
    assert sorted(named) == sorted(known)
    columns = [re.findall(r"`(\w+)`", cell) for cell in header[1:]]
    for name in (name for each in columns[1:] for name in each):
        assert name in verbs(), name
    for names in columns:
        for name in set(names) & set(SHOWN_BY):
            file, what = SHOWN_BY[name]
            assert re.search(what, (INTEGRATION / file).read_text("utf-8")), (name, file)


def test_language_models_are_refused_where_something_is_shown() -> None:
    header, _, *rows = table()
    (text,) = [row for row in rows if f"`{CAUSAL_LM.model_types[0]}`" in row[0]]
    cells = dict(zip(header, text, strict=True))
    assert [cells[name] for name in ("`ask`, `index`", "`serve`", "`eval`")] == ["no"] * 3
    assert cells["`needle`, `bench`"] == "no" and cells["`plan`"] == "yes"
    refused = (INTEGRATION / "test_family_verbs.py").read_text("utf-8")
    assert 'parametrize("verb", ["ask", "serve", "needle", "bench"])' in refused
