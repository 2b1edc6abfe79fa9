"""`longvila train` on other people's models: two ranks and one see the same losses.

Each family's tiny checkpoint goes through context extension, then long-video fine-tuning, on real
files; the result loads with the family's own classes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).parent))
from family_files import PROCESSORS, needs_torchvision, save_family
from stage_files import SMALL, write_data

from longvila.testing import Rank
from longvila.testing.asserts import assert_close
from longvila.testing.ranks import run_ranks
from longvila.train.run import Job, train
from longvila.train.settings import override
from longvila.train.stages import Stage, StageError, get_stage

RANKS = ("one", "two")
CHAIN: dict[str, tuple[str, ...]] = {
    "extend-64k": ("rows_per_step=2", "warmup_steps=1"),
    "long-sft-256": ("samples_per_step=3", "num_frames=6"),
}


def small(name: str, *more: str) -> Stage:
    # Two families write a line for every frame.
    return override(get_stage(name), [*SMALL, *CHAIN[name], *more])


def run_families(
    _: Rank, files: str, out: str, names: tuple[str, ...], sp: int
) -> dict[str, list[float]]:
    found = {}
    for family in names:
        model = Path(files) / family
        for name in CHAIN:
            stage = small(name, f"seq_parallel_size={sp}")
            data = Path(files) / ("texts.yaml" if family == "qwen3" else "data.yaml")
            output = Path(out) / family / name
            progress = train(Job(stage=stage, model=str(model), data=data, output=output))
            assert progress is not None
            found[f"{family} {name}"] = progress.losses
            model = output
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    write_data(folder)
    listed = (folder / "data.yaml").read_text()
    (folder / "texts.yaml").write_text(listed.replace("sft-256: clips", "sft-256: texts"))
    return folder


def same_on_two_ranks(files: Path, out: Path, names: tuple[str, ...]) -> None:
    for name in names:
        save_family(name, files / name)
    one = run_ranks(run_families, 1, str(files), str(out / "one"), names, 1, timeout_s=280)[0]
    two = run_ranks(run_families, 2, str(files), str(out / "two"), names, 2, timeout_s=280)
    assert len(one) == 2 * len(names)
    for losses in two:
        for name, each in one.items():
            assert len(each) == 2 and losses[name] == pytest.approx(each, rel=1e-5), name
    for name in names:
        before = load_file(files / name / "model.safetensors")
        mine, theirs = (
            load_file(out / ranks / name / "long-sft-256" / "model.safetensors") for ranks in RANKS
        )
        assert set(mine) == set(theirs) == set(before)
        for key, value in mine.items():
            assert_close(theirs[key], value, name=f"{name}: {key}", tolerance=2e-5)
        lines = [
            [json.loads(line) for line in file.read_text().splitlines()]
            for file in (out / ranks / name / "long-sft-256" / "metrics.jsonl" for ranks in RANKS)
        ]
        for seen in ("documents", "tokens", "targets", "frames"):
            assert [line[seen] for line in lines[0]] == [line[seen] for line in lines[1]], seen
        assert (lines[0][0]["frames"] > 0) == (name != "qwen3")
        # What a forward does not reach (a mask token, layers after the features) stays.
        same = {key for key in mine if torch.equal(mine[key], before[key])}
        assert not any("self_attn" in key and "vision" not in key for key in same)
        vision = {key for key in mine if "vis" in key}
        assert len(vision & same) < 0.35 * max(len(vision), 1), sorted(vision & same)


def test_other_vision_language_models(files: Path, tmp_path: Path) -> None:
    needs_torchvision()
    names = tuple(sorted(PROCESSORS))
    same_on_two_ranks(files, tmp_path, names)
    for name in names:
        last = tmp_path / "two" / name / "long-sft-256"
        model = AutoModelForImageTextToText.from_pretrained(last)
        config = model.config.get_text_config()
        assert model.config.model_type == name
        assert config.rope_parameters["rope_theta"] == 15_300_000.0
        assert config.max_position_embeddings == 131072
        processor = AutoProcessor.from_pretrained(last)
        assert type(processor) is type(PROCESSORS[name]())
        assert processor.tokenizer.model_max_length == 131072


def test_language_models(files: Path, tmp_path: Path) -> None:
    same_on_two_ranks(files, tmp_path, ("qwen3",))
    last = tmp_path / "two" / "qwen3" / "long-sft-256"
    model = AutoModelForCausalLM.from_pretrained(last)
    assert model.config.max_position_embeddings == 131072
    with pytest.raises(StageError, match=r"rates\.projector tune nothing: Qwen3ForCausalLM has no"):
        stage = override(get_stage("align"), [*SMALL, "samples_per_step=2"])
        job = Job(stage=stage, model=str(last), data=files / "data.yaml", output=tmp_path / "no")
        train(job)
    with pytest.raises(StageError, match="the original's layout, which knows no Qwen3ForCausalLM"):
        stage = small("long-sft-256", "saving.vila=true")
        job = Job(stage=stage, model=str(last), data=files / "data.yaml", output=tmp_path / "no")
        train(job)
