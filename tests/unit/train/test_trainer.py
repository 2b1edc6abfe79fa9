"""The Trainer: the same steps on any mesh, and the same as the plain loop's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.data import IterableDataset
from train_cases import assert_same, fresh_model, put_on_mesh, row, whole
from trainer_cases import ROWS, losses, make, trained
from transformers import TrainingArguments

from longvila.data.collate import Collator
from longvila.data.encode import Encoder
from longvila.data.loader import PackedLoader
from longvila.data.mixture import Mixture
from longvila.data.sample import Media, Sample, Turn
from longvila.media.synthetic import clip
from longvila.testing import Rank
from longvila.testing.ranks import run_ranks
from longvila.testing.tiny import tiny_processor, tiny_tokenizer
from longvila.train.arguments import LongVILATrainingArguments
from longvila.train.budget import OverBudget
from longvila.train.parts import named_parts
from longvila.train.stages import Optimizer, Rates, StageError
from longvila.train.step import build_optimizer, train_step
from longvila.train.trainer import LongVILATrainer

RATE = 1e-2
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"dp 2": {}, "sp 2": {"seq_parallel_size": 2}},
    4: {
        "ring 2 x ulysses 2": {"seq_parallel_size": 4, "seq_parallel_ring_size": 2},
        "dp 2 x ring 2": {"seq_parallel_size": 2, "seq_parallel_ring_size": 2},
    },
}


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """Five steps of the plain loop, on one process."""
    model, mesh = put_on_mesh(fresh_model(), fsdp=False)
    rates = Rates(vision_tower=RATE, projector=RATE, language_model=RATE)
    optimizer = build_optimizer(model, rates, Optimizer(weight_decay=0.1, eps=1e-4))
    results = [
        train_step(
            model,
            [row(seed) for seed in range(ROWS * step, ROWS * (step + 1))],
            optimizer,
            mesh,
            clip_norm=0.5,
        )
        for step in range(5)
    ]
    return {
        "losses": [result.loss for result in results],
        "norms": [result.gradient_norm for result in results],
        "weights": whole(model),
    }


def assert_equal_runs(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(actual["losses"], expected["losses"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual["norms"], expected["norms"], rtol=1e-4, atol=1e-6)
    assert_same(actual["weights"], expected["weights"], tolerance=1e-4)


def test_one_process_equals_the_plain_loop(plain: dict[str, Any], tmp_path: Path) -> None:
    assert max(plain["norms"]) > 0.5  # clipping is at work
    assert_equal_runs(trained(None, str(tmp_path)), plain)


def each_layout(rank: Rank, folder: str) -> dict[str, dict[str, Any]]:
    layouts = LAYOUTS[rank.world_size]
    return {name: trained(rank, folder, **options) for name, options in layouts.items()}


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_mesh_equals_the_plain_loop(ranks: int, plain: dict[str, Any], tmp_path: Path) -> None:
    for results in run_ranks(each_layout, ranks, str(tmp_path)):
        for result in results.values():
            assert_equal_runs(result, plain)


# ---- datasets --------------------------------------------------------------------------------


class Stream(IterableDataset[dict[str, Any]]):
    """Rows that come one after the other."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row(seed) for seed in range(ROWS * 2))


def streamed(rank: Rank, folder: str) -> list[dict[str, Any]]:
    layouts: list[dict[str, Any]] = [{}, {"seq_parallel_size": 2}]
    return [trained(rank, folder, rows=Stream(), steps=2, **layout) for layout in layouts]


def grouped(rank: Rank, folder: str) -> list[int]:
    """Tokens of the rows of two epochs that a rank draws, ordered by length and by chance."""
    trainer = make(
        rank, folder, seq_parallel_size=2, train_sampling_strategy="group_by_length",
        rows=[{name: row(seed)[name][0] for name in ("input_ids", "labels")} for seed in (0, 3, 6)],
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    torch.manual_seed(rank.rank)  # as if dropout had drawn from the generators
    return [b["input_ids"].numel() for _ in range(2) for b in trainer.get_train_dataloader()]


def test_other_datasets_and_orders(tmp_path: Path) -> None:
    one = trained(None, str(tmp_path), steps=2)
    for results in run_ranks(streamed, 2, str(tmp_path)):
        for result in results:
            assert_equal_runs(result, one)
    first, second = run_ranks(grouped, 2, str(tmp_path))
    assert first == second and len(first) == 6


def test_a_run_that_cannot_fit_is_refused(tmp_path: Path) -> None:
    trainer = make(None, tmp_path, steps=1)
    assert trainer._memory_checked  # there is no GPU
    trainer._memory_checked = False
    little = mock.patch("longvila.train.budget.host_bytes", lambda: 1000.0)
    with little, pytest.raises(OverBudget, match="GiB"):
        trainer.train()
    again = make(None, tmp_path, steps=1)
    again._memory_checked = False
    again.train()
    assert again._memory_checked and len(losses(again)) == 1


# ---- rates, collators, refusals --------------------------------------------------------------


def test_parts_have_rates_of_their_own(tmp_path: Path) -> None:
    rates = {"vision_tower_lr": 1e-4, "mm_projector_lr": 3e-3}
    trainer = make(None, tmp_path, steps=1, **rates)
    trainer.train()
    group_of = {id(p): group for group in trainer.optimizer.param_groups for p in group["params"]}
    matrices = set()
    for part, named in named_parts(trainer.model).items():
        rate = {"vision_tower": 1e-4, "projector": 3e-3, "language_model": RATE}[part]
        for name, parameter in named:
            group = group_of[id(parameter)]
            assert group["lr"] == rate, name
            if group["weight_decay"]:
                matrices.add(parameter.ndim)
    assert matrices == {2, 4}  # no vector decays; the patch embedding is a convolution


def test_memory_options_change_no_step(plain: dict[str, Any], tmp_path: Path) -> None:
    options = {"offload_optimizer": True, "plain_layers": 1, "mlp_tile_rows": 16}
    assert_equal_runs(trained(None, str(tmp_path), **options), plain)
    whole_layers = trained(None, str(tmp_path), recompute_layers=False)
    assert_equal_runs(whole_layers, plain)


def in_bf16(rank: Rank | None, folder: str) -> dict[str, Any]:
    model, seen = fresh_model(), set()
    layer = model.model.language_model.layers[0].self_attn
    layer.v_proj.register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    size = -1 if rank is None else rank.world_size
    result = trained(rank, folder, model=model, steps=3, bf16=True, seq_parallel_size=size)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    return result


def test_bf16_computes_narrow_and_updates_wide(plain: dict[str, Any], tmp_path: Path) -> None:
    for result in [in_bf16(None, str(tmp_path)), *run_ranks(in_bf16, 2, str(tmp_path))]:
        assert result["losses"] == pytest.approx(plain["losses"][:3], rel=5e-3)
        assert result["norms"] == pytest.approx(plain["norms"][:3], rel=2e-2)


def test_parts_are_frozen(tmp_path: Path) -> None:
    trainer = make(None, tmp_path, steps=1, tune_language_model=False, tune_vision_tower=False)
    before = whole(trainer.model)
    trainer.train()
    changed = {n for n, v in whole(trainer.model).items() if (v != before[n]).any()}
    assert changed == {name for name, _ in named_parts(trainer.model)["projector"]}


def text_alone(rank: Rank | None, folder: str) -> dict[str, Any]:
    """Rows of text where only the projector is trained: some steps train nothing."""
    rows = [row(0), row(3), row(6), row(9), row(1), row(2), row(0), row(4)]
    options = {} if rank is None else {"seq_parallel_size": 1}
    return trained(rank, folder, rows=rows, steps=2, tune_language_model=False,
                   tune_vision_tower=False, weight_decay=0.0, **options)  # fmt: skip


def test_rows_that_depend_on_nothing_tuned(tmp_path: Path) -> None:
    one = text_alone(None, str(tmp_path))
    assert one["norms"][0] == 0 and one["norms"][1] > 0
    for other in run_ranks(text_alone, 2, str(tmp_path)):
        assert_equal_runs(other, one)


def test_a_step_without_targets_changes_nothing(tmp_path: Path) -> None:
    rows = [row(seed) for seed in range(2 * ROWS)]
    for each in rows[ROWS:]:
        each["labels"] = torch.full_like(each["labels"], -100)
    one = trained(None, str(tmp_path), rows=rows[:ROWS], steps=1)
    two = trained(None, str(tmp_path), rows=rows, steps=2)
    assert two["losses"] == [one["losses"][0], 0.0]
    assert_same(two["weights"], one["weights"])


def drawn_apart(rank: Rank, folder: str) -> float:
    """New weights that every rank drew by itself."""
    torch.manual_seed(rank.rank)
    model = fresh_model()
    torch.nn.init.normal_(model.model.multi_modal_projector.layers[1].weight)
    trainer = make(rank, folder, model=model, steps=1)
    return float(trainer.model.model.multi_modal_projector.layers[1].weight.detach().sum())


def test_ranks_begin_with_the_same_weights(tmp_path: Path) -> None:
    first, second = run_ranks(drawn_apart, 2, str(tmp_path))
    assert first == second


def with_files(rank: Rank | None, folder: str, clips: list[str]) -> dict[str, Any]:
    """Samples from video files; a rank decodes the frames that it encodes."""
    processor = tiny_processor(num_frames=4)
    samples = [
        Sample(
            str(number),
            "clips",
            (
                Turn("user", (Media("video", clip, num_frames=3 + number), "What?")),
                Turn("assistant", (f"Number {number}.",)),
            ),
        )
        for number, clip in enumerate(clips)
    ]
    size = -1 if rank is None else rank.world_size
    trainer = make(
        rank, folder, rows=samples, steps=2, seq_parallel_size=size,
        data_collator=Collator(processor, Encoder(processor, 4096)),
        per_device_train_batch_size=2, gradient_accumulation_steps=1,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    pixels = [batch[name].shape[0] for name in batch if name.endswith("pixel_values_videos")]
    return {"losses": losses(trainer), "frames": pixels, "names": sorted(batch)}


class Clips(list[Sample]):
    name = "clips"


def test_what_workers_decode_is_finished_for_the_model(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4", 12)
    video = Media("video", str(tmp_path / "a.mp4"))
    turns = Turn("user", (video, "What?")), Turn("assistant", ("It counts.",))
    samples = [Sample(str(n), "clips", turns) for n in range(4)]
    processor = tiny_processor(num_frames=2)

    def seen(workers: int) -> list[float]:
        loader = PackedLoader(
            Mixture([Clips(samples)]), Encoder(processor, 200), Collator(processor),
            workers=workers, epochs=1, window=2,
        )  # fmt: skip
        trainer = make(None, tmp_path / str(workers), rows=loader, eval_dataset=loader, steps=1)
        trainer.train()
        return [*losses(trainer), trainer.evaluate()["eval_loss"]]

    assert seen(1) == seen(0)


def test_a_rank_decodes_only_its_own_frames(tmp_path: Path) -> None:
    clips = [str(clip(tmp_path / f"{number}.mp4", 12)) for number in range(4)]
    one = with_files(None, str(tmp_path), clips)
    assert one["frames"] == [7] and "pixel_values_videos" in one["names"]
    both = run_ranks(with_files, 2, str(tmp_path), clips)
    assert sum(each["frames"][0] for each in both) == 7
    for each in both:
        assert "local_pixel_values_videos" in each["names"]
        assert each["losses"] == pytest.approx(one["losses"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_metrics": lambda prediction: {}}, "no rank has whole logits"),
        ({"compute_loss_func": lambda *args: 0}, "computed in tiles"),
        ({"model_init": fresh_model}, "put on the mesh once"),
    ],
)
def test_what_no_rank_can_do_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    args = LongVILATrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=message):
        LongVILATrainer(None, args, **options)


def test_other_arguments_and_missing_parts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args must be LongVILATrainingArguments"):
        LongVILATrainer(fresh_model(), TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(StageError, match="which tune_language_model freezes"):
        make(None, tmp_path, steps=1, lora_enable=True, tune_language_model=False)
    trainer = make(None, tmp_path, steps=1, rows=[{"input_ids": torch.ones(1, 4).long()}] * ROWS)
    with pytest.raises(ValueError, match="a batch has no labels"):
        trainer.train()
