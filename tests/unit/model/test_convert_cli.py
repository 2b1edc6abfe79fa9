"""The command: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.fixtures.upstream_case import write_checkpoint

from longvila.cli.convert import parse_size
from longvila.cli.main import main
from longvila.errors import CheckpointError


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint("odd_fix_dynamic", tmp_path / "a")
    arguments = ["--max-shard-size", "50KB", "--dtype", "bfloat16", "--token-order", "row"]
    assert main(["convert", str(source), str(tmp_path / "b"), *arguments]) == 0
    said = capsys.readouterr().out
    assert "token order: row (as asked)" in said and f"wrote {tmp_path / 'b'}" in said
    assert "9 tokens a frame" in said and "context 1048576" in said and "'<|im_end|>'" in said
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 2
    assert main(["convert", str(tmp_path / "b"), str(tmp_path / "c"), "--to", "vila"]) == 0
    assert f"wrote {tmp_path / 'c'}" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "b"), str(tmp_path / "d")]) == 1
    assert "is in Hugging Face form already" in capsys.readouterr().err
    assert json.loads((tmp_path / "c" / "config.json").read_text())["model_type"] == "llava_llama"
    stored = load_file(tmp_path / "c" / "mm_projector" / "model.safetensors")
    assert all(str(tensor.dtype) == "torch.bfloat16" for tensor in stored.values())


def test_a_dry_run_shows_everything_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint("qwen_column", tmp_path / "a")
    assert main(["convert", str(source), "--dry-run"]) == 0
    lines = capsys.readouterr().out
    for line in (
        "llm/model.layers.{0..1}.self_attn.q_proj.weight  [32x32] float32 x2\n"
        "    -> model.language_model.layers.{0..1}.self_attn.q_proj.weight\n",
        "vision_tower/vision_model.embeddings.patch_embedding.weight  [24x3x14x14] float32\n"
        "    -> model.vision_tower.embeddings.patch_embedding.weight\n",
        "mm_projector/layers.2.weight  [32x96] float32\n"
        "    -> model.multi_modal_projector.layers.2.weight\n",
        "token order: column (written by transformers 4.36.2, from before",
        "308 embedding rows, 308 tokens; <image> is 306, <vila/video> is 307",
        "(kept, not used)",
    ):
        assert line in lines
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    assert main(["convert", str(source), str(tmp_path / "b")]) == 0
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "b"), "--to", "vila", "--dry-run"]) == 0
    assert "vision_tower/vision_model.post_layernorm.bias  [24] float32" in capsys.readouterr().out


def test_errors_are_one_line_and_a_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint("dynamic_s2", tmp_path / "a")
    assert main(["convert", str(source), str(tmp_path / "b")]) == 1
    assert "longvila convert: config.json asks for dynamic_s2" in capsys.readouterr().err
    assert main(["convert", "Some-Org/longvila", "x"]) == 1
    assert "hf download Some-Org/longvila --local-dir DIR" in capsys.readouterr().err
    assert main(["convert", str(source)]) == 1
    assert "give a destination, or --dry-run" in capsys.readouterr().err
    assert main(["convert", str(source), "x", "--to", "vila", "--dtype", "float32"]) == 1
    assert "--dtype cannot be combined with --to vila" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("200 mb", 2 * 10**8), ("1.5K", 1500), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "GB", "5TB", "-1GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(CheckpointError, match="is not a size"):
        parse_size(text)
