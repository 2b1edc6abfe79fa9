"""What a caller gives generate over ranks: a fault on one rank ends it on all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.stopping_criteria import EosTokenCriteria

from longvila.errors import RankError
from longvila.inference.engine import Engine
from longvila.sp.mesh import build_mesh
from longvila.testing.ranks import Rank, run_ranks

from .cases import language_model, prompt

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


class Breaks(StoppingCriteria, LogitsProcessor):
    """A streamer, criterion or processor that fails when it has been called so often."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def count(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise OSError(f"call {self.at}: disk full")


class Streamer(Breaks):
    def put(self, value: Tensor) -> None:
        self.count()

    def end(self) -> None:
        self.count()


class Criterion(Breaks):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        self.count()
        return False


class Processor(Breaks):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.count()
        return scores


class Allowed(Breaks):
    def __call__(self, row: int, ids: Tensor) -> list[int]:
        self.count()
        return list(range(61))


def options_of(name: str, at: int) -> dict[str, Any]:
    if name == "streamer":
        return {name: Streamer(at)}
    if name == "prefix_allowed_tokens_fn":
        return {name: Allowed(at)}
    return {name: [Criterion(at) if name == "stopping_criteria" else Processor(at)]}


def fail_on_one(rank: Rank, name: str) -> None:
    mesh = build_mesh(rank.world_size, num_heads=6, num_kv_heads=3)
    with Engine(language_model(), mesh) as engine:
        film = engine.prefill(prompt(20))
        expected = engine.generate(engine.fork(film), **GREEDY).tolist()
        # Eight calls of a streamer: the prompt, six tokens, the end. The others see a token each.
        for failing, at in [(0, 1), (1, 3), (1, 6)] + [(0, 7), (1, 8)] * (name == "streamer"):
            given = options_of(name, at if rank.rank == failing else -1)
            if name == "streamer" and rank.rank != failing and at != 3:
                given = {}  # a streamer may be given on one rank alone
            if rank.rank == failing:
                fault = pytest.raises(OSError, match=f"^call {at}: disk full$")
            else:
                said = f"^rank {failing} failed in its {name}: OSError: call {at}: disk full$"
                fault = pytest.raises(RankError, match=said)
            with fault:
                engine.generate(film, **GREEDY, **given)
            assert film.get_seq_length() == 20
        given = options_of(name, -1)
        assert engine.generate(film, **GREEDY, **given).tolist() == expected


@pytest.mark.parametrize(
    "name", ["streamer", "stopping_criteria", "logits_processor", "prefix_allowed_tokens_fn"]
)
def test_what_fails_on_one_rank_ends_all(name: str) -> None:
    run_ranks(fail_on_one, 2, name, timeout_s=60)


class Wants(LogitsProcessor):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = torch.zeros_like(scores)
        scores[:, self.token] = 1.0
        return scores


class StopsLater(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        return input_ids.shape[1] >= 23


def differ(rank: Rank) -> None:
    mesh, me = build_mesh(rank.world_size, num_heads=6, num_kv_heads=3), rank.rank
    model = language_model()
    with Engine(model, mesh) as engine:
        film = engine.prefill(prompt(20))
        for ids in ([[1, 2 + me]], [[1, 2]] * (1 + me), [[3] * (2 + me)]):
            with pytest.raises(ValueError, match=f"different ids, of which rank {me} has"):
                engine.generate(film, torch.tensor(ids), **GREEDY)
        on_one = {0: {}, 1: {"logits_processor": [Wants(5)]}}[me]
        with pytest.raises(ValueError, match=rf"given on every rank alike.*: {me} on this rank"):
            engine.generate(film, **GREEDY, **on_one)
        on_one = {0: {"stopping_criteria": [StopsLater()]}, 1: {}}[me]
        with pytest.raises(ValueError, match=r"stopping_criteria must .* from 0 to 1 on all"):
            engine.generate(film, **GREEDY, **on_one)
        assert film.get_seq_length() == 20
        with pytest.raises(RankError, match=r"different tokens, from \[5\] to \[6\]"):
            engine.generate(film, **GREEDY, logits_processor=[Wants(5 + me)])
        answers: Any = torch.zeros(7, dtype=torch.bool) if me == 0 else False
        fault = pytest.raises(RankError if me else RuntimeError, match="expanded size")
        with fault:
            engine.generate(film, **GREEDY, stopping_criteria=[lambda *_, **__: answers])
        # What transformers refuses with a streamer is refused by ranks without one.
        with pytest.raises(ValueError, match="streamer"):
            given = {"streamer": Streamer(-1)} if me else {}
            engine.generate(film, **GREEDY, num_beams=2, **given)
        # A row that ended is filled up, as on one process.
        rows = [torch.tensor([1, 2]), torch.tensor([3])]
        plain = engine.generate(film, rows, **GREEDY, eos_token_id=None)
        stop = int(plain[0, 23])
        ends = engine.generate(film, rows, **GREEDY, eos_token_id=stop)
        criteria = [EosTokenCriteria(stop)]
        again = engine.generate(film, rows, **GREEDY, eos_token_id=None, stopping_criteria=criteria)
        assert again.tolist() == ends.tolist() != plain.tolist()


def test_ranks_that_would_choose_different_tokens_are_told() -> None:
    run_ranks(differ, 2, timeout_s=60)
