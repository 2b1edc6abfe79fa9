"""Who may judge: whoever can be asked (`longvila.inference.caller`), or a recording.

Each takes a conversation (``[{"role", "content"}, ...]``) and returns the reply as text.

- `CallerJudge` asks an endpoint that speaks OpenAI's protocol, or a model of this process.
- `Recording` gives the replies of an earlier run, and fails where that had none.

Nothing here reads scores; `longvila.evaluation.judge` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from longvila.errors import LongVILAError
from longvila.evaluation.answers import digest, read_lines
from longvila.inference.caller import Caller, EmptyAnswer, Prompt

Message = Mapping[str, str]


class JudgeError(LongVILAError, RuntimeError):
    """A judge could not be asked."""


class Judge(Protocol):
    """Replies to conversations."""

    name: str

    def reply(self, messages: Sequence[Message]) -> str:
        """Return the reply to a conversation."""
        ...


class CallerJudge:
    """A judge that is asked as any model is.

    Args:
        caller: Who is asked.
        new_tokens: Longest reply.
    """

    def __init__(self, caller: Caller, *, new_tokens: int = 64) -> None:
        self.caller, self.name, self.new_tokens = caller, caller.name, new_tokens

    def reply(self, messages: Sequence[Message]) -> str:
        """Ask.

        Args:
            messages: What the judge is told (``system``, if anything), then turns that end with
                the user's.

        Returns:
            The reply; empty if the judge was asked and said nothing, which is no grade.

        Raises:
            CallError: If it could not be asked.
        """
        said = [message["content"] for message in messages if message["role"] != "system"]
        told = [message["content"] for message in messages if message["role"] == "system"]
        *before, text = said
        turns = tuple(zip(before[::2], before[1::2], strict=True))
        prompt = Prompt(
            text, system="\n\n".join(told) or None, max_new_tokens=self.new_tokens, turns=turns
        )
        try:
            # Half a character cannot be kept on disk.
            return self.caller(prompt).text.encode(errors="replace").decode()
        except EmptyAnswer:
            return ""


class Recording:
    """The replies that another judge gave.

    Args:
        file: Records of a judged run (``judged.jsonl``).

    Raises:
        FileNotFoundError: If there is none.
        JudgeError: If it holds something else.
    """

    def __init__(self, file: Path) -> None:
        if not file.exists():
            raise FileNotFoundError(f"there is no recording {file}")
        self._replies: dict[str, str] = {}
        names = set()
        for record in read_lines(file):
            if not {"judge", "exchanges"} <= set(record):
                raise JudgeError(f"{file} is no recording of a judge (judged.jsonl)")
            names.add(record["judge"])
            for exchange in record["exchanges"]:
                self._replies[exchange["asked"]] = exchange["reply"]
        self.file = file
        #: Records of a replay name the judge whose replies they are.
        self.name = ", ".join(sorted(names))

    def reply(self, messages: Sequence[Message]) -> str:
        """Return what was replied to a conversation.

        Args:
            messages: The conversation.

        Raises:
            JudgeError: If the recording does not have it.
        """
        key = digest([dict(message) for message in messages])
        if key not in self._replies:
            raise JudgeError(f"{self.file} has no reply to: {messages[-1]['content'][:300]}")
        return self._replies[key]
