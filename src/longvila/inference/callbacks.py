"""What a caller gives ``generate`` over ranks: a streamer, criteria, processors.

Each rank calls its own. One that raises alone, stops alone or chooses another token would leave
the others waiting in the next step. So an error is kept until the ranks tell each other, which they
do after every token, together with what the criteria say and which tokens were chosen; then all of
them raise, the one that failed its own error, the others one that names it.

Where no rank was given any of these, which they tell each other first, nothing more is exchanged.

Letters: B rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from longvila.errors import RankError
from longvila.inference.cache import ShardedCache
from longvila.inference.together import raise_first

#: What ranks choose tokens by, so that all of them must be given it.
_COMMON = ("stopping_criteria", "logits_processor", "prefix_allowed_tokens_fn")


class Callbacks:
    """A caller's streamer, criteria and processors in one call of ``generate``.

    Args:
        given: Options of ``generate``; the same on every rank, but for ``streamer``.
        ids: ``(B, T)`` tokens to be read first, which must be the same as well.
        cache: Whose ranks.
        device: Of tensors that ranks exchange.

    Attributes:
        options: What to give ``generate`` in their place.

    Raises:
        ValueError: On all ranks, if some were given other ids, or other numbers of criteria or
            processors.

    Comm: One all-reduce of 14 integers; on one process none, and the options stay as they are.
    """

    def __init__(
        self,
        given: Mapping[str, Any],
        ids: Tensor | None,
        cache: ShardedCache,
        device: torch.device,
    ) -> None:
        self.cache, self.device = cache, device
        self.options = dict(given)
        self._fault: tuple[str, Exception] | None = None
        self._active = False
        if cache.num_ranks == 1:
            return
        streamer, *common = (given.get(name) for name in ("streamer", *_COMMON))
        counts = [int(streamer is not None), *map(_count, common)]
        flat = torch.empty(0, dtype=torch.int64) if ids is None else ids.flatten().cpu().long()
        places = torch.arange(1, flat.numel() + 1) % 1_000_003
        sums = [0 if ids is None else len(ids), flat.numel(), int((flat * places).sum())]
        own = torch.tensor([*counts, *sums])
        told = self._most(torch.cat([own, -own]))
        if any(most != -least for most, least in zip(told[4:7], told[11:], strict=True)):
            raise ValueError(
                f"the ranks were given different ids, of which rank {cache.rank} has {sums[1]} in "
                f"{sums[0]} rows: give all of them the same, from the first rank if they are drawn"
            )
        for name, mine, most, least in zip(_COMMON, counts[1:], told[1:4], told[8:11], strict=True):
            if most != -least:
                raise ValueError(
                    f"{name} must be given on every rank alike, since each chooses its tokens by "
                    f"it: {mine} on this rank, from {-least} to {most} on all"
                )
        self._active = any(told[:4])
        if not self._active:
            return
        criteria, processors, allowed = common
        # Every rank has one, so that all refuse what generate refuses to do with a streamer.
        self.options["streamer"] = _Streamer(self, streamer) if told[0] else None
        self.options["stopping_criteria"] = StoppingCriteriaList([_Told(self, criteria or [])])
        if processors:
            # Those of transformers stay what they are: they take the place of one of their type.
            self.options["logits_processor"] = LogitsProcessorList(
                each if type(each).__module__.startswith("transformers.") else _Guarded(self, each)
                for each in processors
            )
        if allowed is not None:
            self.options["prefix_allowed_tokens_fn"] = functools.partial(
                self.call, _COMMON[2], allowed, [0]
            )

    def call(
        self, name: str, work: Callable[..., Any], instead: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Do something of the caller's, and keep its error for `tell`; nothing after an error.

        Args:
            name: What it is.
            work: The function.
            instead: What is returned if it failed.
            *args: Of the function.
            **kwargs: Of the function.
        """
        if self._fault is None:
            try:
                return work(*args, **kwargs)
            except Exception as error:  # raised on every rank by tell
                self._fault = name, error
        return instead

    def tell(self, tokens: Tensor, done: Tensor) -> Tensor:
        """Exchange what the ranks know after a token.

        Args:
            tokens: ``(B,)`` the newest.
            done: ``(B,)`` what this rank's criteria say.

        Returns:
            ``(B,)`` what those of the first rank say.

        Raises:
            RankError: If another rank failed, or ranks chose different tokens.
            Exception: What the caller's streamer, criterion or processor raised on this rank.

        Comm: One all-reduce of ``3 B + 1`` integers; if a rank failed, one all-gather of errors.
        """
        rows = len(tokens)
        flags = done.long() if self.cache.rank == 0 else torch.zeros_like(tokens)
        failed = tokens.new_full((1,), self._fault is not None)
        told = self._most(torch.cat([failed, tokens, -tokens, flags]))
        if told[0]:
            self._raise()
        most, least = told[1 : rows + 1], told[rows + 1 : 2 * rows + 1]
        if any(a != -b for a, b in zip(most, least, strict=True)):
            raise RankError(
                f"the ranks chose different tokens, from {[-b for b in least]} to {most}: logits "
                "processors and other options of generate must do the same on every rank"
            )
        return torch.tensor(told[-rows:], dtype=torch.bool, device=tokens.device)

    def end(self) -> None:
        """Raise on every rank if one failed after the last token, as a streamer may in its end.

        Raises:
            RankError: If another rank failed.
            Exception: What was raised on this rank.

        Comm: As `tell`, one integer; none if no rank was given anything.
        """
        if self._active and self._most(torch.tensor([self._fault is not None]))[0]:
            self._raise()

    def _most(self, numbers: Tensor) -> list[int]:
        numbers = numbers.to(self.device, torch.int64)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self.cache.group)
        found: list[int] = numbers.tolist()
        return found

    def _raise(self) -> None:
        name, error = self._fault or ("", None)
        said = None if error is None else f" failed in its {name}: {type(error).__name__}: {error}"
        raise_first(error, said, self.cache.group)


def _count(given: Any) -> int:
    return len(given) if hasattr(given, "__len__") else int(given is not None)


class _Streamer(BaseStreamer):
    """A caller's streamer, or none."""

    def __init__(self, callbacks: Callbacks, streamer: Any) -> None:
        self.callbacks, self.streamer = callbacks, streamer

    def put(self, value: Tensor) -> None:
        """Hand tokens on."""
        if self.streamer is not None:
            self.callbacks.call("streamer", self.streamer.put, None, value)

    def end(self) -> None:
        """Say that there are no more."""
        if self.streamer is not None:
            self.callbacks.call("streamer", self.streamer.end, None)


class _Guarded(LogitsProcessor):
    """A caller's processor."""

    def __init__(self, callbacks: Callbacks, processor: Any) -> None:
        self.callbacks, self.processor = callbacks, processor

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Return its scores."""
        found: Tensor = self.callbacks.call(
            "logits_processor", self.processor, scores, input_ids, scores
        )
        return found


class _Told(StoppingCriteria):
    """A caller's criteria, decided on one rank for all; where ranks tell each other."""

    def __init__(self, callbacks: Callbacks, criteria: Sequence[Any]) -> None:
        self.callbacks, self.criteria = callbacks, criteria
        for each in criteria:
            # generate fills up rows that ended if it sees this.
            if hasattr(each, "eos_token_id"):
                self.eos_token_id = each.eos_token_id

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Return which rows have ended."""
        running = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        done = self.callbacks.call(
            "stopping_criteria", self._ask, running, running, input_ids, scores, **kwargs
        )
        return self.callbacks.tell(input_ids[:, -1], done)

    def _ask(self, running: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for each in self.criteria:
            done = torch.as_tensor(each(*args, **kwargs), device=running.device)
            running = running | done.expand_as(running)
        return running
