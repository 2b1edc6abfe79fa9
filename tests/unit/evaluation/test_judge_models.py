"""Judges: anyone who can be asked, and a recording."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from longvila.evaluation.judge_models import CallerJudge, JudgeError, Recording
from longvila.inference.caller import CallError, EmptyAnswer, LocalCaller, Prompt, Reply
from longvila.testing.tiny import save_tiny


class Noting:
    """A caller that keeps what it was asked."""

    name = "noting"

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []
        self.used: Counter[str] = Counter()

    def __call__(self, prompt: Prompt) -> Reply:
        self.prompts.append(prompt)
        return Reply("fine")


def test_a_conversation_is_passed_on_whole() -> None:
    caller = Noting()
    judge = CallerJudge(caller, new_tokens=7)
    messages = [
        {"role": role, "content": text}
        for role, text in (
            ("system", "Judge."), ("user", "Well?"), ("assistant", "Four!"), ("user", "Again."),
        )
    ]  # fmt: skip
    assert judge.reply(messages) == "fine" and judge.name == "noting"
    (prompt,) = caller.prompts
    assert prompt == Prompt(
        "Again.", system="Judge.", max_new_tokens=7, turns=(("Well?", "Four!"),)
    )
    assert prompt.messages(prompt.text) == messages
    judge.reply(messages[1:2])
    assert caller.prompts[1] == Prompt("Well?", max_new_tokens=7)


def test_saying_nothing_is_a_reply_that_is_no_grade() -> None:
    class Silent(Noting):
        def __call__(self, prompt: Prompt) -> Reply:
            raise EmptyAnswer("nothing")

    assert CallerJudge(Silent()).reply([{"role": "user", "content": "Well?"}]) == ""


def test_half_a_character_does_not_end_a_run() -> None:
    class Broken(Noting):
        def __call__(self, prompt: Prompt) -> Reply:
            return Reply("fine \ud83d")

    assert CallerJudge(Broken()).reply([{"role": "user", "content": "Well?"}]) == "fine ?"


def test_a_model_of_this_process_judges_and_is_told_again(tmp_path: Path) -> None:
    save_tiny(tmp_path, seed=3)
    judge = CallerJudge(LocalCaller.load(str(tmp_path)), new_tokens=8)
    first = {"role": "user", "content": "Well?"}
    reply = judge.reply([first])
    again = [first, {"role": "assistant", "content": reply}, {"role": "user", "content": "Again."}]
    assert reply and judge.reply([first]) == reply and judge.reply(again) != reply
    with pytest.raises(CallError):
        LocalCaller.load(str(tmp_path / "none"))


def test_a_recording_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no recording"):
        Recording(tmp_path / "judged.jsonl")
    (tmp_path / "samples.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(JudgeError, match=r"samples.jsonl is no recording of a judge"):
        Recording(tmp_path / "samples.jsonl")
