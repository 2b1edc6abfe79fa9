"""A checkpoint that is not whole, or not there, is refused in a sentence that names what lacks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from longvila.errors import CheckpointError
from longvila.model.opening import open_checkpoint
from longvila.testing.tiny import save_tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refused(source: Any) -> str:
    with pytest.raises(CheckpointError) as found:
        open_checkpoint(str(source), device="cpu", label="--model")
    message = str(found.value)
    assert message.startswith(f"--model {source}: ")
    return message


def test_a_whole_one_opens_in_evaluation_mode(whole: Path) -> None:
    model, processor = open_checkpoint(str(whole), device="cpu", dtype="bfloat16")
    assert not model.training
    assert str(model.dtype) == "torch.bfloat16"
    assert processor.tokenizer is not None


def test_tensors_that_lack_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[3]
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"1 tensor has no weights in the files: {name}" in refused(folder)


def test_tensors_of_another_shape_are_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(config))
    assert "another shape than config.json says" in (message := refused(folder))
    assert "mlp.down_proj.weight (32, 48), not (32, 56)" in message


def test_a_file_cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "damaged or cut off" in refused(folder)


def test_a_name_that_is_no_checkpoint_is_refused_first(tmp_path: Path) -> None:
    assert "there is no config.json in this folder" in refused(tmp_path)


def test_a_model_of_another_kind_is_named_without_the_list_of_all(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    message = refused(folder)
    assert "BertConfig" in message
    assert "Model type should be one of" not in message


@pytest.mark.parametrize(
    ("part", "entry", "value", "says"),
    [
        ("text_config", "hidden_size", "32", "expected int, got str"),
        ("text_config", "hidden_act", "foo", "KeyError: 'foo'"),
    ],
)
def test_a_wrong_value_in_a_configuration(
    folder: Path, part: str, entry: str, value: Any, says: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[part][entry] = value
    (folder / "config.json").write_text(json.dumps(config))
    message = refused(folder)
    assert says in message and "is one of its .json files damaged" in message


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_part_without_a_size_is_not_taken_for_the_largest(folder: Path, part: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[f"{part}_"] = config.pop(part)
    (folder / "config.json").write_text(json.dumps(config))
    assert f"config.json needs {part}, which says how large" in refused(folder)
    with pytest.raises(ValueError, match=f"needs {part}"):
        AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_a_json_file_cut_off(folder: Path, name: str) -> None:
    text = (folder / name).read_text()
    (folder / name).write_text(text[: len(text) // 2])
    assert "one of its .json files is damaged or cut off" in refused(folder)
