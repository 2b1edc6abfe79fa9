"""One rank calls an engine, others follow: equal tokens, caches that go, errors of both kinds."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from longvila.errors import ContextLengthError
from longvila.inference.engine import Engine
from longvila.inference.leading import (
    Leader,
    RanksLostError,
    _Call,
    control_group,
    follow,
    receive,
    send,
)
from longvila.sp import build_mesh
from longvila.testing.ranks import Rank, run_ranks
from longvila.testing.tiny import tiny_inputs, tiny_model


def engines(rank: Rank) -> tuple[Engine, Any]:
    model = tiny_model(3)
    mesh = build_mesh(rank.world_size, num_heads=4, num_kv_heads=2, device_type="cpu")
    return Engine(model, mesh, chunk_tokens=16), control_group()


def converse(engine: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """A film read in two slices, a fork that begins with a part of it, and tokens behind both."""
    more = {"input_ids": torch.arange(5, 40)[None]}
    film = engine.prefill(inputs)
    turn = engine.prefill(more, onto=engine.fork(film))
    found = [film.logits, turn.logits]
    part = engine.fork(turn, tokens=film.get_seq_length() + 3)
    assert part.get_seq_length() == film.get_seq_length() + 3
    for token in (7, 8, 9):
        found.append(engine.decode(part, torch.tensor([[token]])))
        found.append(engine.decode(turn, torch.tensor([[token, token + 1]])))
    return found


def lead(rank: Rank) -> None:
    engine, group = engines(rank)
    if rank.rank:
        return follow(engine, group)
    with Engine(tiny_model(3)) as alone:
        inputs = tiny_inputs(alone.model.config, videos=(9,))
        expected = converse(alone, inputs)
    leader = Leader(engine, group)
    assert leader.num_ranks == rank.world_size
    for got, want in zip(converse(leader, inputs), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    # What is wrong with the arguments is an error of this call alone.
    cache = leader.prefill(inputs)
    engine.model.config.text_config.max_position_embeddings = 4096
    with pytest.raises(ContextLengthError):
        leader.prefill({"input_ids": torch.ones(1, 10**6, dtype=torch.int64)})
    with pytest.raises(ValueError, match="at least one token"):
        leader.decode(cache, torch.ones(1, 0, dtype=torch.int64))
    torch.testing.assert_close(leader.prefill(inputs).logits, expected[0], rtol=1e-4, atol=1e-5)
    leader.close()
    leader.close()
    return None


@pytest.mark.parametrize("world", [2, 4])
def test_followers_do_what_the_leader_does(world: int) -> None:
    run_ranks(lead, world)


def drop(rank: Rank) -> None:
    engine, group = engines(rank)
    if rank.rank:
        from longvila.inference.cache import ShardedCache

        read = engine.read
        alive = []

        def counted(*args: Any, **kwargs: Any) -> Any:
            gc.collect()
            alive.append(sum(type(each) is ShardedCache for each in gc.get_objects()))
            return read(*args, **kwargs)

        engine.read = counted  # type: ignore[method-assign]
        follow(engine, group)
        assert len(alive) == 6 and max(alive) <= 2, alive
        return
    leader = Leader(engine, group)
    for _ in range(6):
        film = leader.prefill({"input_ids": torch.arange(3, 50)[None]})
        leader.decode(leader.fork(film), torch.tensor([[5]]))
        del film
        gc.collect()
    leader.close()


def test_what_the_leader_drops_is_dropped_everywhere() -> None:
    run_ranks(drop, 2)


def lose(rank: Rank) -> None:
    engine, group = engines(rank)
    ids = {"input_ids": torch.arange(3, 50)[None]}
    if rank.rank:
        # As if its part of the step went on: a real one would wait in a collective.
        engine.decode = lambda *args: torch.zeros(1, 1)  # type: ignore[method-assign]
        return follow(engine, group)
    lost: list[int] = []
    leader = Leader(engine, group, lambda: lost.append(1))
    cache = leader.prefill(ids)

    def fail(*args: Any) -> Any:
        raise torch.OutOfMemoryError("this GPU is full")

    engine.decode = fail  # type: ignore[method-assign]
    leader.check()
    with pytest.raises(RanksLostError, match="this GPU is full"):
        leader.decode(cache, torch.tensor([[5]]))
    assert lost == [1]
    for call in (lambda: leader.prefill(ids), lambda: leader.fork(cache), leader.check):
        with pytest.raises(RanksLostError, match="this GPU is full"):
            call()
    leader.close()  # tells nobody: the others may be anywhere
    send(_Call(""), group)
    return None


def test_an_error_of_one_rank_ends_everything() -> None:
    run_ranks(lose, 2)


def things() -> list[Any]:
    """Tensors small and large, of many types, not contiguous, one twice, and nothing of one."""
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(60, 3, 7, 7, generator=generator)
    whole = torch.arange(5000)
    return [
        {"a": large, "again": large, "turned": large.transpose(0, 3), "half": large.bfloat16()},
        ("text", whole[None, ::2], whole > 9, torch.empty(0, 4), torch.tensor(3), None),
        large.double(), "x" * 100_000,
    ]  # fmt: skip


def exchange(rank: Rank) -> None:
    group = control_group()
    if rank.rank == 0:
        send(things(), group)
        send("end", group)
        return
    got, want = receive(group), things()
    flat, same = (torch.utils._pytree.tree_leaves(each) for each in (got, want))
    assert len(flat) == len(same)
    for one, other in zip(flat, same, strict=True):
        assert type(one) is type(other)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other)
        else:
            assert one == other
    assert receive(group) == "end"


def test_what_is_sent_is_what_is_received() -> None:
    run_ranks(exchange, 3, timeout_s=240)
