"""Who may judge: an endpoint that speaks OpenAI's protocol, a local model, or a recording.

Each takes a conversation (``[{"role", "content"}, ...]``) and returns the reply as text.

- `EndpointJudge` posts to ``BASE/chat/completions``. Busy and failing servers are tried again, a
  bounded number of times with growing pauses; anything else that goes wrong is an error at once.
- `LocalJudge` runs a causal language model, or LongVILA itself, greedily.
- `Recording` gives the replies of an earlier run, and fails where that had none.

Nothing here reads scores; `longvila.evaluation.judge` does.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from longvila.errors import CheckpointError, LongVILAError
from longvila.evaluation.answers import digest, read_lines

Message = Mapping[str, str]
_BUSY = (408, 409, 425, 429, 500, 502, 503, 504)


class JudgeError(LongVILAError, RuntimeError):
    """A judge could not be asked."""


class Judge(Protocol):
    """Replies to conversations."""

    name: str

    def reply(self, messages: Sequence[Message]) -> str:
        """Return the reply to a conversation."""
        ...


class EndpointJudge:
    """A judge behind OpenAI's protocol.

    Args:
        base: Address up to and with the version: ``http://localhost:8000/v1``.
        model: Name of the model there.
        key: Sent as a bearer token, if there is one.
        attempts: Tries of one request.
        timeout_s: Time for one try.
        new_tokens: Longest reply.
        pause: Waits so many seconds.
    """

    def __init__(
        self,
        base: str,
        model: str,
        *,
        key: str | None = None,
        attempts: int = 5,
        timeout_s: float = 120.0,
        new_tokens: int = 64,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        if not base.startswith(("http://", "https://")):
            raise ValueError(f"an endpoint is an http or https address, got {base!r}")
        self.url = base.rstrip("/") + "/chat/completions"
        self.name, self.model = f"{model} at {base}", model
        self.key, self.attempts, self.timeout_s = key, attempts, timeout_s
        self.new_tokens, self.pause = new_tokens, pause

    def reply(self, messages: Sequence[Message]) -> str:
        """Ask the endpoint.

        Args:
            messages: The conversation.

        Raises:
            JudgeError: If it refuses, keeps failing, or answers in another form.
        """
        body = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "temperature": 0,
            "max_tokens": self.new_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        fault: Exception | None = None
        for attempt in range(self.attempts):
            if attempt:
                self.pause(min(60.0, 2.0**attempt))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                    return self._text(answer.read())
            except urllib.error.HTTPError as error:
                with error:
                    said = error.read(500).decode(errors="replace")
                if error.code not in _BUSY:
                    raise JudgeError(f"{self.url} answered {error.code}: {said}") from error
                fault = JudgeError(f"{error.code}: {said}")
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                fault = error
        raise JudgeError(f"{self.url} failed {self.attempts} times, last: {fault}") from fault

    def _text(self, body: bytes) -> str:
        try:
            text = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as fault:
            shown = body[:300].decode(errors="replace")
            raise JudgeError(f"{self.url} answered in another form: {shown}") from fault
        if not isinstance(text, str):
            raise JudgeError(f"{self.url} answered without a text")
        return text


class LocalJudge:
    """A judge that runs here.

    Args:
        model: A model with ``generate``, in evaluation mode.
        tokenizer: Its tokenizer, with a chat template.
        name: What records call it.
        new_tokens: Longest reply.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, *, new_tokens: int = 64) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.new_tokens = new_tokens

    @classmethod
    def load(cls, checkpoint: str, *, device: str = "cpu", dtype: str = "auto") -> LocalJudge:
        """Load a language model, or LongVILA, whose frames are left out.

        Args:
            checkpoint: Folder or hub id.
            device: Where it runs.
            dtype: Its precision, as torch names it; auto is that of its files.

        Raises:
            CheckpointError: If there is no such checkpoint.
        """
        import torch
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForImageTextToText,
            AutoTokenizer,
        )

        from longvila.model.configuration_longvila import LongVILAConfig

        kind: Any = dtype if dtype == "auto" else getattr(torch, dtype)
        try:
            config = AutoConfig.from_pretrained(checkpoint)
            own = isinstance(config, LongVILAConfig)
            loader: Any = AutoModelForImageTextToText if own else AutoModelForCausalLM
            model = loader.from_pretrained(checkpoint, dtype=kind)
            tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        except OSError as fault:
            raise CheckpointError(f"{checkpoint}: {fault}") from fault
        model.eval()
        model.to(device)
        return cls(model, tokenizer, checkpoint)

    def reply(self, messages: Sequence[Message]) -> str:
        """Ask the model.

        Args:
            messages: The conversation.
        """
        import torch
        from transformers import GenerationConfig

        ids = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"].to(self.model.device)
        given = self.model.generation_config.eos_token_id
        stops = set(given) if isinstance(given, list | tuple) else {given}
        stops = {stop for stop in (*stops, self.tokenizer.eos_token_id) if stop is not None}
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.new_tokens,
            eos_token_id=sorted(stops),
            pad_token_id=min(stops),
        )
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config
            )
        text: str = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return text


class Recording:
    """The replies that another judge gave.

    Args:
        file: Records of a judged run (``judged.jsonl``).

    Raises:
        FileNotFoundError: If there is none.
    """

    def __init__(self, file: Path) -> None:
        if not file.exists():
            raise FileNotFoundError(f"there is no recording {file}")
        self._replies: dict[str, str] = {}
        names = set()
        for record in read_lines(file):
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
