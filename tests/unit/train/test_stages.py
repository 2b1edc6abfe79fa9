"""The stages: the published numbers, the mended mistakes, and what contradicts itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longvila.ops.rope import STAGES as CONTEXTS
from longvila.train.settings import SettingsError, override
from longvila.train.stages import (
    STAGES,
    Adapter,
    Data,
    Optimizer,
    Rates,
    Stage,
    StageError,
    choose_seq_parallel_size,
    get_stage,
    shortened,
)


def test_the_names() -> None:
    assert list(STAGES) == [
        "align", "pretrain", "sft", "extend-64k", "extend-256k", "extend-512k", "extend-1m",
        "long-sft-256", "long-sft-512", "long-sft-1024", "long-sft-2048",
    ]  # fmt: skip
    for stage in STAGES.values():
        assert stage.base is None or stage.base in STAGES


@pytest.mark.parametrize(
    ("name", "rates", "samples", "length", "epochs"),
    [
        ("align", (None, 1e-3, None), 2048, 4096, 1),
        ("pretrain", (None, 5e-5, 5e-5), 1024, 4096, 1),
        ("sft", (1e-4, 1e-4, 1e-4), 1024, 4096, 1),
        ("long-sft-256", (2e-5, 2e-5, 2e-5), 146, 131072, 6),
        ("long-sft-512", (5e-5, 5e-5, 5e-5), 73, 262144, 6),
        ("long-sft-1024", (5e-5, 5e-5, 5e-5), 37, 262144, 6),
        ("long-sft-2048", (5e-5, 5e-5, 5e-5), 37, 524288, 6),
    ],
)
def test_published_numbers(
    name: str, rates: tuple[float | None, ...], samples: int, length: int, epochs: int
) -> None:
    stage = get_stage(name)
    mine = (stage.rates.vision_tower, stage.rates.projector, stage.rates.language_model)
    assert mine == rates and stage.adapter is None and stage.context is None
    assert (stage.data.samples_per_step, stage.data.max_tokens) == (samples, length)
    assert (stage.optimizer.epochs, stage.optimizer.schedule) == (epochs, "cosine")
    assert (stage.optimizer.warmup_ratio, stage.optimizer.weight_decay) == (0.03, 0.0)


@pytest.mark.parametrize(
    ("name", "steps", "rows", "save_every"),
    [("64k", 40, 4, 40), ("256k", 80, 16, 40), ("512k", 80, 16, 40), ("1m", 50, 4, 10)],
)
def test_context_extension(name: str, steps: int, rows: int, save_every: int) -> None:
    stage = get_stage(f"extend-{name}")
    known = next(each for each in CONTEXTS if each.name == name)
    assert stage.context is not None and stage.adapter == Adapter(rank=8, alpha=16)
    assert stage.context.rope_theta == known.rope_theta
    assert stage.context.max_position_embeddings == known.max_position_embeddings
    assert stage.data.max_tokens == known.train_tokens
    assert (stage.optimizer.max_steps, stage.data.rows_per_step) == (steps, rows)
    assert (stage.optimizer.warmup_steps, stage.saving.every) == (2, save_every)
    assert stage.adapter.also_tune == ("embeddings", "norms")
    assert (stage.rates.vision_tower, stage.rates.projector) == (None, None)


def test_every_stage_follows_one_whose_context_covers_its_rows() -> None:
    for stage in STAGES.values():
        if not stage.name.startswith("long-sft"):
            continue
        assert stage.base is not None
        context = get_stage(stage.base).context
        assert context is not None
        assert context.max_position_embeddings >= stage.data.max_tokens


@pytest.mark.parametrize(
    ("name", "world", "expected"),
    [
        ("sft", 8, 1),
        ("extend-64k", 1, 1), ("extend-64k", 2, 2), ("extend-64k", 8, 2), ("extend-64k", 32, 8),
        ("extend-256k", 8, 8), ("extend-1m", 8, 8), ("extend-1m", 64, 32),
        ("long-sft-256", 8, 4), ("long-sft-2048", 64, 16), ("long-sft-2048", 4, 4),
    ],
)  # fmt: skip
def test_the_degree_is_chosen_from_the_length(name: str, world: int, expected: int) -> None:
    assert choose_seq_parallel_size(get_stage(name), world) == expected


def test_degrees_that_cannot_be() -> None:
    stage = get_stage("extend-64k")
    fixed = replace(stage, parallel=replace(stage.parallel, seq_parallel_size=3))
    with pytest.raises(StageError, match="3, which does not divide 8 ranks"):
        choose_seq_parallel_size(fixed, 8)
    fixed = replace(stage, parallel=replace(stage.parallel, seq_parallel_size=1))
    with pytest.raises(StageError, match="rows_per_step is 4, which 8 data-parallel groups"):
        choose_seq_parallel_size(fixed, 8)


def test_contradictions() -> None:
    data = Data(rows_per_step=1)
    with pytest.raises(StageError, match="did you mean 'extend-64k'"):
        get_stage("extend64k")
    with pytest.raises(ValueError, match="every part is frozen"):
        Rates()
    with pytest.raises(ValueError, match="above zero, or null"):
        Rates(projector=0.0)
    with pytest.raises(ValueError, match="adapter lives in the language model"):
        Stage(name="x", rates=Rates(projector=1.0), adapter=Adapter(), data=data)
    with pytest.raises(ValueError, match="either samples_per_step or rows_per_step"):
        Data()
    with pytest.raises(ValueError, match="either samples_per_step or rows_per_step"):
        Data(samples_per_step=3, rows_per_step=3)
    with pytest.raises(ValueError, match="one must end a stage"):
        Optimizer(epochs=None)
    with pytest.raises(ValueError, match="warmup_steps needs max_steps"):
        Optimizer(warmup_steps=2)


@pytest.mark.parametrize(
    "setting",
    [
        "rates.projector=nan", "adapter.rank=0", "adapter.dropout=1", "context.rope_theta=0",
        "max_tokens=1", "max_sample_tokens=0", "max_documents=0", "num_frames=0", "window=0",
        "threads=0", "workers=-1", "prefetch=-1", "fps=0", "epochs=0", "max_steps=0",
        "warmup_steps=-1", "weight_decay=-1", "eps=nan", "tokens_per_rank=0", "mlp_tile_rows=0",
        "head_chunks=0", "loss_tile_rows=0", "plain_layers=-1", "offload_gib=-1",
    ],
)  # fmt: skip
def test_numbers_that_no_run_can_have_are_refused_before_it(setting: str) -> None:
    name, _, value = setting.partition("=")
    with pytest.raises(SettingsError, match=rf"{name.rpartition('.')[2]} must be|rates must be"):
        override(get_stage("extend-64k"), [f"{name}={value}"])


def test_a_shortened_stage_keeps_its_warm_up_inside() -> None:
    short = shortened(get_stage("extend-1m"), max_steps=1)
    assert (short.optimizer.max_steps, short.optimizer.warmup_steps) == (1, 1)
    assert short.data == get_stage("extend-1m").data
