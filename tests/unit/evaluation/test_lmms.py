"""The plug-in under lmms-eval: its command line, and what its harness makes of scripted models."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longvila.testing.tiny import save_tiny

from .fixture import by_question, read_jsonl, write_plugin

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed"
)
OURS = ("vnbench", "eventbench", "needle", "videomme", "videomme_w_subtitle")
SRC = Path(__file__).parents[3] / "src"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str, str]:
    """One process does all that imports lmms-eval; the tests look at what it left."""
    folder = tmp_path_factory.mktemp("lmms")
    save_tiny(folder / "model", seed=3)
    plugin = write_plugin(folder / "plugin")
    driver = Path(__file__).with_name("lmms_driver.py")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{SRC}{os.pathsep}{plugin}",
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(driver), str(folder)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    results = json.loads((folder / "results.json").read_text())
    return folder, results, done.stdout, done.stderr


@pytest.mark.parametrize("name", OURS)
def test_an_oracle_is_right_and_a_blind_model_guesses(run: Any, name: str) -> None:
    _, results, _, _ = run
    task = f"longvila_{name}_fixture"
    assert results["oracle"][task]["accuracy"] == 1.0
    assert results["oracle"][task]["unparsable"] == 0.0
    assert results["blind"][task]["accuracy"] == 0.25
    assert results["silent"][task]["accuracy"] == 0.0
    assert results["silent"][task]["unparsable"] == 1.0


def test_four_rotations_leave_nothing_to_guessing(run: Any) -> None:
    _, results, _, _ = run
    task = "longvila_vnbench_fixture"
    assert results["oracle"][task]["all_rotations"] == 1.0
    assert results["blind"][task]["all_rotations"] == 0.0


def test_their_command_line_runs_our_model(run: Any) -> None:
    folder, results, printed, _ = run
    assert "longvila_videomme_fixture" in printed and "accuracy" in printed
    (samples,) = (folder / "out").rglob("*_samples_longvila_videomme_fixture.jsonl")
    theirs = read_jsonl(samples)
    assert len(theirs) == results["questions"]
    ours = by_question(read_jsonl(folder / "log" / "group-0.jsonl"))
    assert len(ours) == 2 * results["questions"]
    for sample in theirs:
        record = ours["longvila_videomme_fixture", sample["doc_id"]]
        assert record["prompt"] == sample["input"]
        assert record["answer"] == sample["filtered_resps"]
        assert record["gold"] == sample["target"]
        assert record["parsed"] == sample["accuracy"]["parsed"]
        assert record["benchmark"] == "videomme"
        assert record["media"][0]["frames"] == [0, 4, 7, 11]
        assert len(record["media"][0]["times_s"]) == 4


def test_subtitles_on_screen_come_in_order(run: Any) -> None:
    folder, _, _, _ = run
    ours = by_question(read_jsonl(folder / "log" / "group-0.jsonl"))
    prompt = ours["longvila_videomme_w_subtitle_fixture", 0]["prompt"]
    assert prompt.startswith("This video's subtitles are listed below:\nfirst\nlast\nSelect")


def test_the_verb_writes_a_run_and_runs_again_alike(run: Any) -> None:
    folder, results, printed, _ = run
    # The fourth run went on where the second had been cut off; the fifth is other tasks.
    assert results["status"] == [0, 0, 0, 0, 0]
    for name in ("samples.jsonl", "results.json", "report.txt", "run.json"):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes(), name
    answers = [folder / name / "answers" / "group-0.jsonl" for name in ("one", "two")]
    # What was cut off is answered behind the rest: the same lines, in another order.
    assert sorted(answers[0].read_bytes().splitlines()) == sorted(
        answers[1].read_bytes().splitlines()
    )
    records = read_jsonl(folder / "one" / "samples.jsonl")
    assert len(records) == 2 * results["questions"]
    # The third run answered nothing again.
    assert len(read_jsonl(folder / "one" / "answers" / "group-0.jsonl")) == len(records)
    scores = json.loads((folder / "one" / "results.json").read_text())
    assert list(scores) == ["videomme", "videomme_w_subtitle"]
    assert scores["videomme"]["score"]["questions"] == results["questions"]
    assert scores["videomme"]["official"]["accuracy"] == scores["videomme"]["score"]["accuracy"]
    assert list(scores["videomme"]["by_duration"]) == ["short", "medium"]
    assert (folder / "one" / "report.txt").read_text() in printed
    page = (folder / "one" / "report.html").read_text()
    assert "videomme_w_subtitle" in page and "<script" not in page


def test_the_verb_answers_as_the_plug_in_does(run: Any) -> None:
    folder, _, _, _ = run
    theirs = read_jsonl(folder / "log" / "group-0.jsonl")
    ours = by_question(read_jsonl(folder / "one" / "samples.jsonl"))
    for record in theirs:
        mine = ours[record["task"].removesuffix("_fixture"), record["doc_id"]]
        assert (mine["answer"], mine["media"]) == (record["answer"], record["media"])


def test_a_folder_goes_on_with_its_settings_only(run: Any) -> None:
    _, results, _, errors = run
    assert results["other settings"] == 1
    assert "holds a run with other settings (seed was 0, is 1)" in errors


@pytest.mark.parametrize(
    "name", ["egoschema", "perceptiontest_val_mc", "mvbench", "nextqa_mc_test", "mlvu", "lvbench"]
)
def test_a_preset_means_what_their_scoring_means(run: Any, name: str) -> None:
    right, *wrong = run[1]["theirs"][name]
    assert right and not any(wrong) and wrong


def test_questions_in_a_folder_and_pictures_in_a_haystack(run: Any) -> None:
    folder, _, _, _ = run
    ours = by_question(read_jsonl(folder / "ours" / "samples.jsonl"))
    assert len(ours) == 8 + 4
    rotation = ours["longvila_vnbench", 3]
    assert rotation["gold"] == "D" and rotation["media"][0]["frames"] == [0, 2, 3]
    # Eight frames are sampled from four, as the document says; the needle is the one numbered -1.
    places = [ours["longvila_needle", i]["media"][0]["frames"].index(-1) for i in range(4)]
    assert places == [0, 2, 4, 6]
    assert all(len(ours["longvila_needle", i]["media"][0]["frames"]) == 9 for i in range(4))
    assert "all rotations right" in (folder / "ours" / "report.txt").read_text()


def test_questions_that_cannot_be_fetched_may_be_named(run: Any) -> None:
    folder, *_ = run
    (folder / "empty").mkdir()
    command = [sys.executable, "-m", "longvila", "eval", "--tasks", "vnbench", "--out", "out"]
    done = subprocess.run(
        [*command, "--model", str(folder / "model")],
        env={**os.environ, "PYTHONPATH": str(SRC), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=folder / "empty",
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    assert "cannot get the questions of vnbench" in done.stderr, done.stderr
    assert done.stderr.endswith("is named by --data vnbench=FOLDER\n")
