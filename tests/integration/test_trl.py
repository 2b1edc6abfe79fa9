"""TRL's SFTTrainer over a mesh: text that it prepares itself, and videos through our collator."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from longvila.data.collate import Collator
from longvila.data.encode import Encoder
from longvila.data.sample import Media, Sample, Turn
from longvila.media.synthetic import clip
from longvila.testing import Rank
from longvila.testing.ranks import run_ranks
from longvila.testing.tiny import tiny_model, tiny_processor, tiny_tokenizer

pytest.importorskip("trl", reason="trl is not installed (pip install trl)")


class Rows(Collator):
    """Rows of a dataset to samples."""

    def __call__(self, items: Any) -> dict[str, Any]:
        samples = [
            Sample(
                row["video"],
                "clips",
                (
                    Turn("user", (Media("video", row["video"]), row["question"])),
                    Turn("assistant", (row["answer"],)),
                ),
            )
            for row in items
        ]
        return super().__call__(samples)


def train(rank: Rank | None, folder: str, kind: str, clips: list[str]) -> list[float]:
    """Losses of an SFTTrainer over the ranks of the test."""
    if rank is not None:
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = os.environ["HF_HUB_OFFLINE"] = "1"
        values = {"RANK": rank.rank, "LOCAL_RANK": rank.rank, "WORLD_SIZE": rank.world_size}
        os.environ.update({name: str(value) for name, value in values.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what trl and its dependencies say when imported
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
        from trl_recipe import Arguments, MeshSFTTrainer
    settings: dict[str, Any] = {
        "seq_parallel_size": -1 if rank is None else rank.world_size,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "adam_epsilon": 1e-4,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }
    processor = tiny_processor(num_frames=4)
    options: dict[str, Any]
    if kind in ("text", "stock", "unpacked"):
        texts = [f"{'word ' * (3 + n)}." for n in range(8)]
        settings |= {"packing": kind == "text", "max_length": 40}
        options = {
            "train_dataset": Dataset.from_dict({"text": texts}),
            "processing_class": tiny_tokenizer(),
        }
    else:
        rows = [
            {"video": path, "question": "What?", "answer": f"Number {number}."}
            for number, path in enumerate(clips)
        ]
        settings |= {"dataset_kwargs": {"skip_prepare_dataset": True}}
        options = {
            "train_dataset": Dataset.from_list(rows),
            "processing_class": processor,
            "data_collator": Rows(processor, Encoder(processor, 4096)),
        }
    if kind == "stock":
        del settings["seq_parallel_size"]
        names = ("activation_checkpointing", "gradient_checkpointing")
        settings[next(n for n in names if n in SFTConfig.__dataclass_fields__)] = False
        trainer = SFTTrainer(tiny_model(seed=3), SFTConfig(folder, **settings), **options)
    else:
        trainer = MeshSFTTrainer(tiny_model(seed=3), Arguments(folder, **settings), **options)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")


@pytest.mark.parametrize("kind", ["text", "video"])
def test_sft_over_two_ranks_equals_one(kind: str, tmp_path: Path) -> None:
    clips = [str(clip(tmp_path / f"{number}.mp4", 12)) for number in range(4)]
    one = train(None, str(tmp_path), kind, clips)
    assert len(one) == 2 and one[1] < one[0]
    for other in run_ranks(train, 2, str(tmp_path), kind, clips):
        assert other == pytest.approx(one, rel=1e-5)


def test_steps_are_those_of_trl(tmp_path: Path) -> None:
    stock = train(None, str(tmp_path), "stock", [])
    assert train(None, str(tmp_path), "unpacked", []) == pytest.approx(stock, rel=1e-5)


def test_a_loss_that_would_be_passed_over_is_refused(tmp_path: Path) -> None:
    """TRL's other losses, and trainers with a loss of their own: none may train on another."""
    from trl import DPOTrainer
    from trl_recipe import Arguments

    from longvila.train.trainer import MeshTrainer

    with pytest.raises(ValueError, match="loss_type 'dft'"):
        Arguments(str(tmp_path), use_cpu=True, bf16=False, loss_type="dft")

    class Preferences(MeshTrainer, DPOTrainer):
        pass

    with pytest.raises(ValueError, match=r"DPOTrainer.compute_loss would be passed over"):
        Preferences(tiny_model(), Arguments(str(tmp_path), use_cpu=True, bf16=False))
