"""generate over ranks gives the tokens of one process: every layout, uneven lengths, no tokens.

The oracle is the model with its own cache and attention, in one process: ranks share the models and
prompts, tell each other, and each compares every token. Logits are compared between ranks to the
bit: a single different argmax would leave ranks waiting for each other.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StoppingCriteria,
)

from longvila.inference.engine import Engine
from longvila.parallel.apply import ParallelPlan, parallelize
from longvila.sp.mesh import SPMesh, build_mesh
from longvila.testing import Rank
from longvila.testing.ranks import run_ranks
from longvila.testing.tiny import tiny_inputs, tiny_model

NEW = 5


class Cell(NamedTuple):
    """One mesh, model and prompt."""

    mesh: tuple[int, int]
    layout: str
    model: str
    tokens: int


MESHES = {
    1: [(1, 1)],
    2: [(2, 1), (1, 2)],
    4: [(4, 1), (2, 2), (1, 4)],
    8: [(4, 2), (2, 4), (8, 1)],
}
LAYOUTS = ("ring_varlen p2p", "zigzag_ring_varlen p2p", "zigzag_ring_varlen gather")


def cells(world: int) -> list[Cell]:
    """Every layout on every mesh, each with a long and a very short prompt and all models."""
    found = []
    for mesh in MESHES[world]:
        for number, layout in enumerate(LAYOUTS if mesh[0] > 1 else LAYOUTS[:1]):
            found.append(Cell(mesh, layout, "video", 0))
            # Shorter than the number of ranks: some have no token at first.
            found.append(Cell(mesh, layout, ("qwen2", "llama")[number % 2], (37, 3, 50)[number]))
        found.append(Cell(mesh, LAYOUTS[0], "llama", 2))
    return found


def covering(world: int) -> list[Cell]:
    """All cells of few ranks. Of eight: every layout on every mesh, with video and text in turn."""
    found = cells(world)
    if world < 8:
        return found
    kept = [cell for cell in found if cell.tokens != 2 or cell.mesh == (8, 1)]
    return [
        cell
        for cell in kept
        if cell.tokens == 2
        or (cell.model == "video")
        == ((MESHES[8].index(cell.mesh) + LAYOUTS.index(cell.layout)) % 2 == 0)
    ]


QUESTION = ((7, 11, 5, 23),)


class Expected(NamedTuple):
    """What one process gives: tokens behind the prompt and behind a question, and logits."""

    alone: list[list[int]]
    longer: list[list[int]]
    logits: Tensor


def told(rank: Rank, chosen: list[Cell]) -> dict[tuple[str, int], Expected]:
    """The oracles of all models and prompts: ranks share the work and tell each other."""
    pairs = list(dict.fromkeys((cell.model, cell.tokens) for cell in chosen))
    mine = {}
    for pair in pairs[rank.rank :: rank.world_size]:
        model, inputs = build(*pair)
        longer = with_question(inputs, torch.tensor(QUESTION))
        mine[pair] = Expected(
            oracle(model, inputs), oracle(model, longer), model(**inputs).logits[:, -1].detach()
        )
    everyones: list[Any] = [None] * rank.world_size
    dist.all_gather_object(everyones, mine)
    return {pair: expected for each in everyones for pair, expected in each.items()}


def with_question(inputs: dict[str, Any], question: Tensor) -> dict[str, Any]:
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], question], 1)}
    if "attention_mask" in longer:
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    return longer


@functools.cache
def new_mesh(mesh: tuple[int, int], layout: str) -> SPMesh:
    ring, ulysses = mesh
    ring_type, exchange = layout.split()
    return build_mesh(
        ring * ulysses, ring, ring_type, ulysses_size=ulysses, kv_exchange=exchange  # type: ignore[arg-type]
    )  # fmt: skip


def build(name: str, tokens: int) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(3)
    if name == "video":
        model = tiny_model(
            dtype=torch.float64, vision_batch_size=2,
            text_config={"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48,
                         "head_dim": 8},
        )  # fmt: skip
        model.generation_config.eos_token_id = None
        return model, tiny_inputs(model.config, videos=(3, 2), images=1, dtype=torch.float64)
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[name]
    config = config_class(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=61, max_position_embeddings=512, eos_token_id=None,
        bos_token_id=None, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    model = model_class(config).double().eval()
    return model, {"input_ids": torch.randint(1, 61, (1, tokens))}


def same_everywhere(x: Tensor, name: str) -> None:
    """Fail unless all ranks hold the same bits."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    for rank, part in enumerate(parts):
        assert torch.equal(part, x), f"{name} of rank {rank} differs"


def oracle(model: Any, inputs: dict[str, Any], **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(**inputs, **options).tolist()


class FirstRankStops(StoppingCriteria):
    """Ranks disagree; that of the first rank counts."""

    def __init__(self, rank: int, length: int) -> None:
        self.rank, self.length = rank, length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        return input_ids.shape[1] >= (self.length if self.rank == 0 else 1)


def check_cell(rank: Rank, cell: Cell, expected: Expected, *, deep: bool) -> None:
    model, inputs = build(cell.model, cell.tokens)
    mesh = new_mesh(cell.mesh, cell.layout)
    length = inputs["input_ids"].shape[1]
    greedy = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    if deep:
        parallelize(model, mesh, ParallelPlan(fsdp=False, activation_checkpointing=False))
    # Steps of fixed shapes on some cells, segments viewed as chunks on the others.
    fixed = deep or cell.model == "llama"
    options: dict[str, Any] = {"decode_graphs": "uncaptured"} if fixed else {"split_tokens": 4}
    with Engine(model, mesh, **options) as engine:
        film = engine.prefill(inputs)
        assert film.get_seq_length() == sum(film.held) == length
        torch.testing.assert_close(film.logits, expected.logits)
        same_everywhere(film.logits, "logits of the prompt")
        turn = engine.fork(film)
        out = engine.generate(turn, torch.tensor(QUESTION), **greedy)
        assert out.tolist() == expected.longer, "a question behind the prompt"
        held = [shard.num_local_tokens for shard in turn.shards]
        assert held == [turn.held[mesh.sp_rank]] * len(held)
        assert max(turn.held) - min(turn.held) <= max(max(film.held) - min(film.held), 4)
        special = check_deep(rank, engine, film) if deep else None
        # Generation without a question takes the last token back, wherever it lies.
        assert engine.generate(film, **greedy).tolist() == expected.alone, "the prompt alone"
        assert film.get_seq_length() == length + NEW - 1
    if special is not None and rank.rank == 0:  # the others hold the same tokens
        check_against_one_process(model, inputs, *special)


SAMPLED = {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0, "pad_token_id": 0}


def check_deep(rank: Rank, engine: Engine, film: Any) -> tuple[Tensor, Tensor]:
    """What needs to be shown on one mesh a world only; returns sampled tokens and beams."""
    question = torch.tensor([[7, 11]])
    logits = engine.decode(engine.fork(film), question)
    same_everywhere(logits, "logits of a step")
    torch.manual_seed(1000 + rank.rank)  # ranks' own generators differ
    drawn = engine.generate(engine.fork(film), question, **SAMPLED)
    same_everywhere(drawn, "sampled tokens")
    seeded = engine.generate(engine.fork(film), question, seed=4, **SAMPLED)
    same_everywhere(seeded, "tokens sampled with a seed")
    # That the model samples may be said by its own configuration alone.
    engine.model.generation_config.do_sample = True
    given = GenerationConfig(max_new_tokens=8, temperature=2.0, pad_token_id=0)
    drawn = engine.generate(engine.fork(film), question, generation_config=given)
    same_everywhere(drawn, "tokens sampled as the model says")
    engine.model.generation_config.do_sample = None
    stopped = engine.generate(
        engine.fork(film), max_new_tokens=20, do_sample=False, pad_token_id=0,
        stopping_criteria=[FirstRankStops(rank.rank, film.get_seq_length() + 3)],
    )  # fmt: skip
    assert stopped.shape[1] == film.get_seq_length() + 3
    beams = engine.generate(
        film, question, max_new_tokens=4, do_sample=False, num_beams=3, pad_token_id=0
    )
    same_everywhere(beams, "beams")
    # A rank whose cache cannot be read by address takes the general way among others that can.
    mode, engine.static.mode = engine.static.mode, "off" if rank.rank == 0 else "uncaptured"
    mixed = engine.decode(engine.fork(film), question)
    engine.static.mode = mode
    same_everywhere(mixed, "logits of a step in two ways")
    torch.testing.assert_close(mixed, logits)
    if engine.num_ranks > 1:
        with pytest.raises(ValueError, match="max_time"):
            engine.generate(film, max_time=1.0)
    return seeded, beams


def check_against_one_process(
    model: Any, inputs: dict[str, Any], seeded: Tensor, beams: Tensor
) -> None:
    """The same seed gives one process the same tokens; beams are those of transformers."""
    question = torch.tensor([[7, 11]])
    local = with_question(inputs, question)
    assert beams.tolist() == oracle(model, local, max_new_tokens=4, num_beams=3)
    with Engine(model) as single:
        again = single.generate(single.prefill(inputs), question, seed=4, **SAMPLED)
    assert again.tolist() == seeded.tolist(), "tokens sampled with a seed"


def check_cells(rank: Rank, chosen: list[Cell]) -> None:
    expected = told(rank, chosen)
    for number, cell in enumerate(chosen):
        try:
            check_cell(rank, cell, expected[cell.model, cell.tokens], deep=number < 2)
        except Exception as error:
            raise AssertionError(f"[{cell}] {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("world", MESHES)
def test_tokens_equal_one_process(world: int) -> None:
    run_ranks(check_cells, world, covering(world), timeout_s=280)


@pytest.mark.slow
def test_tokens_equal_one_process_in_every_cell_of_eight_ranks() -> None:
    run_ranks(check_cells, 8, cells(8), timeout_s=280)
