"""Every benchmark: the paper's frames, the original's names, and what a document means."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from longvila.evaluation.presets import (
    PRESETS,
    TASKS_FOLDER,
    DocumentError,
    duration_group,
    find_preset,
    preset_of_task,
)

DOCS: dict[str, tuple[dict[str, Any], str | None, str, str]] = {
    # name: document, right answer, letters, video
    "videomme": (
        {
            "options": ["A. x", "B. y", "C. z", "D. w"],
            "answer": "C",
            "videoID": "v",
            "duration": "long",
            "task_type": "OCR",
        },
        "C",
        "ABCD",
        "v",
    ),
    "vnbench": (
        {
            "options": ["1", "2", "3", "4"],
            "gt_option": "B",
            "video": "v.mp4",
            "question": "q",
            "type": "cnt_edit1",
            "length": 30,
        },
        "B",
        "ABCD",
        "v.mp4",
    ),
    "activitynetqa": ({"answer": "yes", "video_name": "v", "type": 3}, "yes", "", "v"),
    "egoschema_test": ({"option": ["A. x"] * 5, "video_idx": "v"}, None, "ABCDE", "v"),
    "egoschema": ({"option": ["A. x"] * 5, "video_idx": "v", "answer": "4"}, "E", "ABCDE", "v"),
    "eventbench": ({"candidates": ["x", "y", "z"], "answer": "y", "video": "v"}, "B", "ABC", "v"),
    "longvideobench_val_v": (
        {
            "option0": "x",
            "option1": "y",
            "option2": "N/A",
            "correct_choice": 1,
            "video_path": "v",
            "duration_group": 600,
        },
        "B",
        "AB",
        "v",
    ),
    "perceptiontest_val_mc": (
        {"options": ["x", "y", "z"], "answer_id": "2", "video_name": "v"},
        "C",
        "ABC",
        "v",
    ),
    "mvbench": ({"candidates": ["x", "y"], "answer": "x", "video": "v"}, "A", "AB", "v"),
    "nextqa_mc_test": (
        {**{f"a{i}": "x" for i in range(5)}, "answer": 3, "video": 7},
        "D",
        "ABCDE",
        "7",
    ),
    "mlvu": ({"answer": "D", "video_name": "v", "task_type": "count"}, "D", "ABCD", "v"),
    "lvbench": ({"answer": "A", "video_path": "v", "type": ["x", "y"]}, "A", "ABCD", "v"),
    "needle": (
        {"haystack": "h", "needle": "n", "frames": 8, "depth": 0.5, "answer": "A car"},
        "A car",
        "",
        "h n 8 0.5",
    ),
}
DOCS["videomme_w_subtitle"] = DOCS["videomme"]
for part in ("gen", "temporal", "consistency"):
    DOCS[f"videochatgpt_{part}"] = ({"answer": "A man", "video_name": "v"}, "A man", "", "v")


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_a_document_says_what_is_right(preset: Any) -> None:
    doc, answer, letters, video = DOCS[preset.name]
    sample = preset.sample(doc)
    assert (sample.answer, sample.letters, sample.video) == (answer, letters, video)
    if preset.kind in ("open", "submission"):
        assert preset.grade(sample, "A").correct is None
        return
    assert answer is not None
    assert preset.grade(sample, answer).correct is True
    assert preset.grade(sample, "").correct is False
    assert preset.grade(sample, "").parsed is None
    if letters:
        assert preset.grade(sample, "I do not know").parsed is None
        wrong = next(letter for letter in letters if letter != answer)
        assert preset.grade(sample, f"{wrong}.").correct is False


def test_words_are_compared_as_words() -> None:
    preset = find_preset("needle")
    sample = preset.sample(DOCS["needle"][0])
    assert preset.grade(sample, " the CAR.").correct is True
    assert preset.grade(sample, "a red car").correct is False


def test_frames_of_the_paper_and_names_of_the_original() -> None:
    frames = {preset.name: preset.frames for preset in PRESETS}
    assert frames["videomme"] == frames["videomme_w_subtitle"] == 256
    assert frames["vnbench"] == 128
    more = ("mlvu", "lvbench", "needle")
    paper = [p for p in PRESETS if p.name not in more and not p.name.startswith("videochatgpt")]
    assert sorted(p.frames for p in paper) == [32] * 8 + [128] + [256] * 2
    for alias, name in {
        "lmms-videomme-256": "videomme",
        "lmms-videomme_w_subtitle-256": "videomme_w_subtitle",
        "vnbench_val": "vnbench",
        "lmms-activitynetqa": "activitynetqa",
        "egoschema_val": "egoschema",
        "eventbench_val": "eventbench",
        "lmms-longvideobench_val_v": "longvideobench_val_v",
        "lmms-perceptiontest_val_mc": "perceptiontest_val_mc",
        "lmms-mvbench": "mvbench",
        "lmms-nextqa_mc_test": "nextqa_mc_test",
    }.items():
        assert find_preset(alias).name == name
    with pytest.raises(
        KeyError,
        match=r"no benchmark 'videome' \(did you mean 'videomme'\?\); there are .*nextqa_mc",
    ):
        find_preset("videome")


def test_tasks_that_guess_judge_or_send_are_not_asked_for_their_own_score() -> None:
    silent = {p.name for p in PRESETS if not p.official}
    videochatgpt = {f"videochatgpt_{part}" for part in ("gen", "temporal", "consistency")}
    assert silent == {"activitynetqa", "egoschema_test", *videochatgpt}
    assert all(bool(p.axes) == (p.kind == "open") for p in PRESETS)


def test_the_two_askings_of_a_question_are_a_pair() -> None:
    preset = find_preset("videochatgpt_consistency")
    doc = {"answer": "A man", "video_name": "v", "question_1": "Who?", "question_2": "None"}
    other = {**doc, "question_1": "None", "question_2": "What person?"}
    assert preset.sample(doc).group == preset.sample(other).group is not None
    assert find_preset("videochatgpt_gen").sample(DOCS["videochatgpt_gen"][0]).group is None


def test_a_question_may_be_of_two_kinds() -> None:
    assert find_preset("lvbench").sample(DOCS["lvbench"][0]).category == ("x", "y")


def test_no_name_twice_and_every_task_of_ours_has_its_file() -> None:
    names = [name for preset in PRESETS for name in (preset.name, *preset.aliases)]
    assert len(names) == len(set(names))
    for preset in PRESETS:
        assert preset_of_task(preset.task) is preset
        if preset.ours:
            text = (TASKS_FOLDER / f"{preset.task}.yaml").read_text()
            file = yaml.load(text, _Tags)
            assert file["task"] == preset.task
            assert file["metadata"]["benchmark"] == preset.name
    assert preset_of_task("mvbench_action_count") is find_preset("mvbench")
    assert preset_of_task("another") is None
    assert sorted(p.stem for p in TASKS_FOLDER.glob("*.yaml")) == sorted(
        preset.task for preset in PRESETS if preset.ours
    )


class _Tags(yaml.SafeLoader):
    """Reads ``!function`` as text."""


_Tags.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def test_an_answer_that_is_no_option_is_an_error() -> None:
    doc = {**DOCS["videomme"][0], "answer": "E"}
    with pytest.raises(ValueError, match="the answer 'E' is none of the letters ABCD"):
        find_preset("videomme").sample(doc)


def test_groups_of_lengths() -> None:
    assert [duration_group(s) for s in (5, 60, 700, 4000)] == [
        "0-60 s",
        "60-180 s",
        "600-1800 s",
        "3600 s and more",
    ]


@pytest.mark.parametrize(
    ("name", "doc"),
    [
        ("vnbench", {"options": ["a", "b"], "gt_option": "D", "video": "v", "question": "q"}),
        ("eventbench", {"candidates": ["a", "b"], "answer": "c", "video": "v"}),
        ("videomme", {"options": ["a"]}),
        ("nextqa_mc_test", {"a0": "x"}),
    ],
)
def test_a_question_of_another_form_is_named(name: str, doc: dict[str, Any]) -> None:
    with pytest.raises(DocumentError, match=rf"{name}: a question is not of the benchmark's form"):
        find_preset(name).read(doc)
