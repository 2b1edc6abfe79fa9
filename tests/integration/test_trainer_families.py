"""The Trainer on unmodified models of transformers, against their own forward and a plain loop."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

sys.path.insert(0, str(Path(__file__).parent))
from family_cases import CASES, TEXT, text_only

from longvila.testing import Rank
from longvila.testing.ranks import run_ranks
from longvila.train.arguments import LongVILATrainingArguments
from longvila.train.trainer import LongVILATrainer

RATE, EPS, CLIP = 1e-3, 1e-4, 0.5
FAMILIES = [*CASES, "qwen3"]


def model_of(family: str) -> Any:
    if family in CASES:
        return CASES[family].model(torch.float32)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3"](**TEXT, head_dim=8)).train()


def batches_of(family: str) -> list[dict[str, Any]]:
    """Padded batches as a processor makes them: media of several sizes, then text alone."""
    if family not in CASES:
        return [text_only(torch.float32)] * 3
    made = [make(torch.float32) for make in CASES[family].batches.values()]
    return made[:3]


def plain(family: str) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses and parameters of the model's own forward under AdamW."""
    model = model_of(family)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, eps=EPS)
    losses = []
    for batch in batches_of(family):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach().numpy() for name, p in model.named_parameters()}


def take(items: list[dict[str, Any]]) -> dict[str, Any]:
    (item,) = items
    return item


def meshed(rank: Rank | None, family: str, folder: str) -> Any:
    """The same by a Trainer."""
    if rank is not None:
        values = {"RANK": rank.rank, "LOCAL_RANK": rank.rank, "WORLD_SIZE": rank.world_size}
        os.environ.update({name: str(value) for name, value in values.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    batches = batches_of(family)
    args = LongVILATrainingArguments(
        folder,
        seq_parallel_size=-1 if rank is None else rank.world_size,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        adam_epsilon=EPS,
        max_grad_norm=CLIP,
        max_steps=len(batches),
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
    trainer = LongVILATrainer(model_of(family), args, data_collator=take, train_dataset=batches)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, {name: p.detach().numpy() for name, p in trainer.model.named_parameters()}


def each_family(rank: Rank, folder: str) -> dict[str, Any]:
    return {family: meshed(rank, family, folder) for family in FAMILIES}


def assert_same(actual: Any, expected: Any) -> None:
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    for name, value in expected[1].items():
        np.testing.assert_allclose(actual[1][name], value, atol=2e-5, err_msg=name)


def test_one_process_takes_the_steps_of_a_plain_loop(tmp_path: Path) -> None:
    for family in FAMILIES:
        assert_same(meshed(None, family, str(tmp_path)), plain(family))


def test_two_ranks_take_the_steps_of_a_plain_loop(tmp_path: Path) -> None:
    expected = {family: plain(family) for family in FAMILIES}
    for results in run_ranks(each_family, 2, str(tmp_path)):
        for family, result in results.items():
            assert_same(result, expected[family])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_a_run_goes_on_from_checkpoints_under_other_names(tmp_path: Path, family: str) -> None:
    """These classes save their weights under older names; the best ones are found again, too."""

    def trainer(resume: bool) -> LongVILATrainer:
        args = LongVILATrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=1, learning_rate=RATE,
            train_sampling_strategy="sequential", save_strategy="steps", save_steps=1,
            report_to=[], disable_tqdm=True, eval_strategy="steps", eval_steps=1, logging_steps=1,
            load_best_model_at_end=True, metric_for_best_model="eval_loss",
            greater_is_better=True,  # the first one is, so that it has to be read
        )  # fmt: skip
        rows = batches_of(family)
        made = LongVILATrainer(
            model_of(family), args, data_collator=take, train_dataset=rows, eval_dataset=rows[:1]
        )
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        return made

    def last(made: LongVILATrainer) -> float:
        return [line["loss"] for line in made.state.log_history if "loss" in line][-1]

    whole = trainer(resume=False)
    assert str(whole.state.best_model_checkpoint).endswith("checkpoint-1")
    assert whole.evaluate()["eval_loss"] == whole.state.best_metric
    assert last(trainer(resume=True)) == last(whole)
