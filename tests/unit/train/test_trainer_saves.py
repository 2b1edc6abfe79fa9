"""What a Trainer leaves behind: checkpoints it goes on from to the bit, losses of evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_cases import Rows, fresh_model, row, whole
from trainer_cases import ROWS, join, losses, make, norms
from transformers import AutoModelForImageTextToText, TrainerCallback

from longvila.errors import CheckpointError
from longvila.sp.mesh import build_mesh
from longvila.testing import Rank
from longvila.testing.ranks import run_ranks
from longvila.testing.tiny import tiny_processor
from longvila.train.step import count_batch

STEPS = 4


def run(rank: Rank | None, folder: str, *, resume: bool, loader: bool, **options: Any) -> Any:
    """Train for STEPS steps, or go on with what was saved after half of them."""
    join(rank)
    torch.manual_seed(0)
    rows: Any = [row(seed) for seed in range(3 * ROWS)]  # four steps are more than an epoch
    if loader:
        mesh = build_mesh(options.get("seq_parallel_size", -1))
        rows = Rows(mesh, dtype=torch.float32)
    trainer = make(
        rank,
        folder,
        rows=rows,
        steps=STEPS,
        train_sampling_strategy="random",
        save_strategy="steps",
        save_steps=STEPS // 2,
        lr_scheduler_type="linear",
        **options,
    )
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}" if resume else None)
    return {"weights": whole(trainer.model), "losses": losses(trainer), "norms": norms(trainer)}


def both(rank: Rank | None, folder: str, **options: Any) -> None:
    straight = run(rank, folder, resume=False, **options)
    again = run(rank, folder, resume=True, **options)
    assert again["losses"] == straight["losses"] and again["norms"] == straight["norms"]
    for name, value in straight["weights"].items():
        np.testing.assert_array_equal(again["weights"][name], value, err_msg=name)


def each_way(rank: Rank | None, folder: str) -> None:
    sp = {} if rank is None else {"seq_parallel_size": 2}
    both(rank, f"{folder}/samples", loader=False, **sp)
    both(rank, f"{folder}/loader", loader=True, offload_optimizer=True)
    # Dropout draws from the generators that are saved.
    both(rank, f"{folder}/lora", loader=False, lora_enable=True, lora_r=2, lora_dropout=0.5, **sp)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:Could not find a config file in.*:UserWarning")
def test_resuming_is_exact(tmp_path: Path) -> None:
    each_way(None, str(tmp_path))


def test_resuming_is_exact_over_ranks(tmp_path: Path) -> None:
    run_ranks(each_way, 2, str(tmp_path))


def test_a_checkpoint_without_the_loaders_state_is_refused(tmp_path: Path) -> None:
    run(None, str(tmp_path), resume=False, loader=False)
    with pytest.raises(CheckpointError, match="does not say where the data ended"):
        run(None, str(tmp_path), resume=True, loader=True)


def gone_on(rank: Rank, folder: str) -> list[float]:
    losses: list[float] = run(rank, folder, resume=True, loader=True)["losses"]
    return losses


def test_data_go_on_over_more_groups_than_before(tmp_path: Path) -> None:
    straight = run(None, str(tmp_path), resume=False, loader=True)["losses"]
    for each in run_ranks(gone_on, 2, str(tmp_path)):
        assert each == pytest.approx(straight, rel=1e-5)


# ---- evaluation ------------------------------------------------------------------------------

HELD_OUT = 3  # over two groups, one of them has a row less


def evaluated(rank: Rank | None, folder: str, **options: Any) -> dict[str, float]:
    held_out = [row(seed) for seed in range(50, 50 + HELD_OUT)]
    trainer = make(rank, folder, eval_dataset=held_out, steps=1, **options)
    seen = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < seen["eval_loss"]
    return seen


def each_evaluation(rank: Rank, folder: str) -> list[float]:
    layouts: list[dict[str, Any]] = [{}, {"seq_parallel_size": 2}]
    return [evaluated(rank, folder, **layout)["eval_loss"] for layout in layouts]


def test_the_loss_of_evaluation_is_that_of_one_process(tmp_path: Path) -> None:
    model, total, targets = fresh_model(), 0.0, 0
    for seed in range(50, 50 + HELD_OUT):
        batch = row(seed)
        count = count_batch(batch).targets
        lengths = batch.pop("document_lengths")
        starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
        with torch.no_grad():
            # One document at a time, by the model's own forward and loss.
            for number, (start, length) in enumerate(zip(starts.tolist(), lengths, strict=True)):
                total += _alone(model, batch, start, length, number)
        targets += count
    expected = total / targets
    one = evaluated(None, str(tmp_path))
    assert one["eval_loss"] == pytest.approx(expected, rel=1e-5)
    for result in run_ranks(each_evaluation, 2, str(tmp_path)):
        assert result == pytest.approx([expected] * 2, rel=1e-5)


def _alone(model: Any, batch: dict[str, Any], start: int, length: int, number: int) -> float:
    """Sum of the losses of one document of a row."""
    part = slice(start, start + length)
    ids, labels = batch["input_ids"][:, part], batch["labels"][:, part].clone()
    labels[:, 0] = -100
    count = int((labels != -100).sum())
    if not count:
        return 0.0
    inputs: dict[str, Any] = {"input_ids": ids, "labels": labels}
    placeholders = ids == model.config.video_token_id
    if placeholders.any():
        before = int((batch["input_ids"][:, :start] == model.config.video_token_id).sum())
        per_frame = int((batch["input_ids"] == model.config.video_token_id).sum()) // int(
            batch["video_num_frames"].sum()
        )
        first, frames = before // per_frame, int(placeholders.sum()) // per_frame
        inputs["pixel_values_videos"] = batch["pixel_values_videos"][first : first + frames]
        inputs["video_num_frames"] = torch.tensor([frames])
    return float(model(**inputs).loss) * count


# ---- what stays the Trainer's ----------------------------------------------------------------


class Seen(TrainerCallback):
    """Counts what it is called for."""

    def __init__(self) -> None:
        self.steps, self.substeps, self.saves, self.model = 0, 0, 0, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model = kwargs["model"]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.substeps += 1

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.saves += 1


def test_callbacks_and_saved_models_are_ordinary(tmp_path: Path) -> None:
    seen = Seen()
    trainer = make(
        None,
        tmp_path,
        steps=2,
        callbacks=[seen],
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        processing_class=tiny_processor(),
        include_num_input_tokens_seen="all",
    )
    trainer.train()
    assert (seen.steps, seen.substeps, seen.saves) == (2, 2 * (ROWS - 1), 2)
    assert seen.model is trainer.model
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    tokens = sum(row(seed)["input_ids"].numel() for seed in range(2 * ROWS))
    assert trainer.state.num_input_tokens_seen == tokens
    trainer.save_model()
    config = json.loads((tmp_path / "config.json").read_text())
    assert "longvila_sp" not in json.dumps(config)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for name, value in whole(trainer.model).items():
        np.testing.assert_array_equal(whole(again)[name], value, err_msg=name)
    assert (tmp_path / "processor_config.json").is_file()


def counted(rank: Rank, folder: str) -> tuple[int, int, float]:
    trainer = make(rank, folder, steps=1, seq_parallel_size=2, include_num_input_tokens_seen="all")
    trainer.train()
    batch = trainer.get_total_train_batch_size(trainer.args)
    return trainer.state.num_input_tokens_seen, batch, trainer.state.total_flos


def test_a_group_of_ranks_is_one_device(tmp_path: Path) -> None:
    one = make(None, tmp_path, steps=1, include_num_input_tokens_seen="all")
    one.train()
    expected = (one.state.num_input_tokens_seen, ROWS, one.state.total_flos)
    for tokens, batch, operations in run_ranks(counted, 2, str(tmp_path)):
        assert (tokens, batch) == expected[:2]
        assert operations == pytest.approx(expected[2], rel=0.01)
