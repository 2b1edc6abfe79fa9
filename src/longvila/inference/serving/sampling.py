"""From logits to the next token, and from tokens to text that can be sent already.

Greedy, or temperature, top-k and top-p in transformers' order, each request with a generator of its
own, so that a seed gives the same answer whoever else is served. A repetition penalty in the
model's generation configuration is kept; its other settings that would change logits are refused
when the server starts, since they would be ignored.

Text leaves when it is certain: characters whose bytes have not all come wait, and so does what may
become a stop sequence. Cost of a token: decoding the tokens that wait, and those sent last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from longvila.model.generation_longvila import ids_in_table

#: Below it, logits divided by it overflow, and the likeliest token is what is meant.
LEAST_TEMPERATURE = 1e-3
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
#: Settings of a generation configuration that change logits, and what leaves them alone.
_OTHERS: dict[str, tuple[Any, ...]] = {
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "bad_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "sequence_bias": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
}


@dataclass(frozen=True)
class Sampling:
    """How a request wants its tokens.

    Attributes:
        max_new_tokens: Most tokens.
        temperature: Zero takes the likeliest token.
        top_p: Probability mass sampled from.
        top_k: Tokens sampled from; zero for all.
        seed: Of the generator.
        stop: Texts before which the answer ends.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()


def check_generation_config(config: Any) -> None:
    """Refuse a model whose generation configuration asks for what is not done here.

    Raises:
        ValueError: Naming the setting.
    """
    for name, neutral in _OTHERS.items():
        value = getattr(config, name, None)
        if value and value not in neutral:
            raise ValueError(
                f"the model's generation_config sets {name}={value!r}, which the server does not "
                "do; remove it from generation_config.json, or use longvila ask"
            )


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer."""
    given = model.generation_config.eos_token_id
    stops = set(given) if isinstance(given, list | tuple) else {given}
    return frozenset(int(t) for t in (*stops, tokenizer.eos_token_id) if t is not None)


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        wanted: How.
        config: The model's generation configuration.
        device: Where logits are.
    """

    def __init__(self, wanted: Sampling, config: Any, device: torch.device) -> None:
        self.greedy = wanted.temperature < LEAST_TEMPERATURE
        self.processors = LogitsProcessorList()
        penalty = getattr(config, "repetition_penalty", None)
        if penalty is not None and penalty != 1.0:
            self.processors.append(RepetitionPenaltyLogitsProcessor(float(penalty)))
        if not self.greedy:
            if wanted.temperature != 1.0:
                self.processors.append(TemperatureLogitsWarper(float(wanted.temperature)))
            if wanted.top_k:
                self.processors.append(TopKLogitsWarper(wanted.top_k))
            if wanted.top_p < 1.0:
                self.processors.append(TopPLogitsWarper(float(wanted.top_p)))
        self.generator = torch.Generator(device)
        if wanted.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(wanted.seed)

    def choose(self, logits: Tensor, ids: Tensor) -> int:
        """Choose the next token.

        Args:
            logits: ``(1, V)`` of the last token.
            ids: ``(1, S)`` tokens so far.

        Returns:
            The token.
        """
        known = ids_in_table(ids, logits.shape[-1])  # placeholders of media have no score
        scores = self.processors(known, logits.float().clone())  # type: ignore[arg-type]
        if self.greedy:
            return int(scores.argmax(-1))
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))


class TextStream:
    """The text of a growing answer.

    Args:
        tokenizer: Decodes tokens.
        stop: Texts before which the answer ends.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.stopped = False
        self._sent: list[int] = []
        self._waiting: list[int] = []
        self._held = ""

    def push(self, token: int) -> str:
        """Take a token; return the text that is certain now."""
        self._waiting.append(token)
        text = self._decode()
        if not text or text.endswith(_UNKNOWN):
            return ""
        self._sent, self._waiting = self._waiting, []
        return self._release(text)

    def finish(self) -> str:
        """Return what was held back."""
        if self.stopped:
            return ""
        text = self._release(self._decode() if self._waiting else "")
        self._waiting = []
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _decode(self) -> str:
        # Some tokenizers drop the space that a text begins with: decoded behind the last piece.
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before = self.tokenizer.decode(self._sent, **options)
        whole: str = self.tokenizer.decode([*self._sent, *self._waiting], **options)
        return whole[len(before) :]

    def _release(self, text: str) -> str:
        text, self._held = self._held + text, ""
        found = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        for length in range(max(map(len, self.stop), default=1) - 1, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stop):
                self._held = text[-length:]
                return text[:-length]
        return text
