"""What is on the host is read as if it were not, in the order of the layers, through few slots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from longvila.inference.engine import Engine
from longvila.inference.paging import HostBlock, Pager, Walk

from .cases import greedy, language_model, prompt

CPU = torch.device("cpu")


def drawn(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, tokens, 2, 3, generator=generator) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("slots", [2, 3, 7])
def test_blocks_come_in_order_through_slots_that_are_reused(slots: int) -> None:
    pager = Pager(CPU, 0, block_tokens=4, slots=slots)
    layers = [drawn(n, n) for n in (10, 3, 8)]
    blocks = [pager.take_out(*layer) for layer in layers]
    assert [[b.num_tokens for b in each] for each in blocks] == [[4, 4, 2], [3], [4, 4]]
    for _ in range(2):
        walk = Walk(pager, [blocks[0], [], blocks[1], blocks[2]])
        with pytest.raises(RuntimeError, match="out of turn"):
            next(walk.layer(2))
        addresses = set()
        for number, layer in ((0, layers[0]), (1, None), (2, layers[1]), (3, layers[2])):
            found = []
            for keys, values in walk.layer(number):
                addresses.add(keys.data_ptr())
                found.append((keys.clone(), values.clone()))
            if layer is not None:
                for got, want in zip(zip(*found, strict=True), layer, strict=True):
                    assert torch.equal(torch.cat(got, 1), want)
        assert len(addresses) <= slots
    assert pager.bytes_in == 2 * pager.bytes_out


@pytest.mark.parametrize("budget", [0, 3000, 10**9])
@pytest.mark.parametrize("chunk", [7, 16, 100])
def test_paging_does_not_change_tokens(budget: int, chunk: int) -> None:
    model, inputs = language_model(), prompt(70)
    question = prompt(5, seed=1)["input_ids"]
    expected = greedy(model, {"input_ids": torch.cat([inputs["input_ids"], question], 1)}, 12)
    pager = Pager(CPU, budget, block_tokens=8)
    with Engine(model, chunk_tokens=chunk, split_tokens=3, kv_offload=pager) as engine:
        film = engine.prefill(inputs)
        turn = engine.fork(film)
        out = engine.generate(turn, question, max_new_tokens=12, do_sample=False)
        assert out[0].tolist() == expected
        again = engine.generate(film, question, max_new_tokens=12, do_sample=False)
        assert again[0].tolist() == expected
        assert film.get_seq_length() == 86 == film.shards[0].num_local_tokens
        beams = engine.generate(
            engine.prefill(inputs), question, max_new_tokens=4, num_beams=3, do_sample=False
        )
    whole = torch.cat([inputs["input_ids"], question], 1)
    assert beams.tolist() == model.generate(
        whole, max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=0
    ).tolist()  # fmt: skip
    on_device = turn.local_bytes - turn.host_bytes
    tail = sum(2 * layer.keys.numel() * 8 for layer in turn.shards if layer.keys is not None)
    assert on_device <= budget + tail
    assert (turn.host_bytes == 0) == (budget > 10**6)


def test_a_cut_reaches_into_what_is_on_the_host_and_a_shared_block_stays() -> None:
    model, inputs = language_model(), prompt(40)
    expected = greedy(model, {"input_ids": inputs["input_ids"][:, :13]}, 5)
    with Engine(model, chunk_tokens=8, kv_offload=Pager(CPU, 0, block_tokens=8)) as engine:
        film = engine.prefill(inputs)
        turn = engine.fork(film)
        turn.crop(-27)
        assert turn.get_seq_length() == 13 == turn.shards[1].num_local_tokens
        assert greedy_from(engine, turn) == expected
        assert film.shards[0].num_local_tokens == 40


def greedy_from(engine: Engine, cache: object) -> list[int]:
    return engine.generate(cache, max_new_tokens=5, do_sample=False)[0].tolist()  # type: ignore[arg-type]


def test_paged_prompts_are_stored_and_loaded_onto_the_host(tmp_path: Path) -> None:
    model, inputs = language_model(), prompt(40)
    expected = greedy(model, inputs, 5)
    with Engine(model, chunk_tokens=8, kv_offload=Pager(CPU, 0, block_tokens=8)) as engine:
        engine.save(engine.prefill(inputs), tmp_path)
        loaded = engine.load(tmp_path)
        assert [block.num_tokens for block in loaded.shards[0].paged] == [8] * 5
        assert greedy_from(engine, loaded) == expected
    with Engine(model) as engine:
        loaded = engine.load(tmp_path)
        assert loaded.host_bytes == 0 and greedy_from(engine, loaded) == expected


class _Late(Pager):
    """Copies to the host come late, as on a GPU: with the next block, or when somebody waits."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.under_way: list[tuple[torch.Tensor, torch.Tensor]] = []

    def _to_host(self, x: torch.Tensor) -> torch.Tensor:
        self.under_way.append((torch.zeros_like(x), x.clone()))
        return self.under_way[-1][0]

    def settle(self) -> None:
        while self.under_way:
            host, x = self.under_way.pop()
            host.copy_(x)

    def bring(self, block: HostBlock) -> int:
        self.settle()
        return super().bring(block)


def test_what_is_on_its_way_to_the_host_is_waited_for_before_it_is_stored(tmp_path: Path) -> None:
    model, inputs = language_model(), prompt(40)
    expected = greedy(model, inputs, 5)
    with Engine(model, chunk_tokens=8, kv_offload=_Late(CPU, 0, block_tokens=8)) as engine:
        engine.save(engine.prefill(inputs), tmp_path)
    with Engine(model) as engine:
        assert greedy_from(engine, engine.load(tmp_path)) == expected


def test_numbers_out_of_range_are_refused() -> None:
    for options in ({"budget_bytes": -1}, {"budget_bytes": 0, "slots": 1}):
        with pytest.raises(ValueError, match="slots at least 2"):
            Pager(CPU, **options)
