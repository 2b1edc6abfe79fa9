"""`longvila init` writes a model that loads, and prints its tokens per frame."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from longvila.cli.init import main
from longvila.errors import CheckpointError
from longvila.model.modeling_longvila import LongVILAForConditionalGeneration
from longvila.testing.tiny import tiny_tokenizer


def test_init(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(media_tokens=False)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    text = Qwen2Config(
        vocab_size=len(tokenizer), num_hidden_layers=1, num_key_value_heads=1,
        max_position_embeddings=200, **small,
    )  # fmt: skip
    Qwen2ForCausalLM(text).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    vision = SiglipVisionConfig(image_size=16, patch_size=4, num_hidden_layers=2, **small)
    SiglipVisionModel(vision).save_pretrained(tmp_path / "vision")
    out = tmp_path / "out"
    arguments = ["--llm", str(tmp_path / "llm"), "--vision", str(tmp_path / "vision")]
    arguments += ["--projector", "mlp_downsample", "--image-size", "24", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "24 x 24 pixels -> 3 x 3 = 9 tokens a frame, 10 with its newline" in printed
    assert "room for about 20 frames" in printed
    model = LongVILAForConditionalGeneration.from_pretrained(out)
    assert model.config.image_size == (24, 24)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        main(arguments)

    llm, vision = tmp_path / "llm", tmp_path / "vision"
    (tmp_path / "file").touch()
    for arguments, wrong in (
        (["--llm", str(vision), "--vision", str(vision)], "is no language model"),
        (["--llm", str(out), "--vision", str(vision)], "is no language model.*'longvila'"),
        (["--llm", str(llm), "--vision", str(llm)], "is no vision tower: qwen2 has no image_size"),
        (["--llm", str(llm), "--vision", str(out)], "no pair of encoders.*'longvila'"),
        (["--llm", f"{llm}s", "--vision", str(vision)], "--llm .*there is no such folder"),
        (["--llm", str(llm), "--vision", f"{vision}s"], "--vision .*there is no such folder"),
    ):
        with pytest.raises(CheckpointError, match=wrong):
            main([*arguments, str(tmp_path / "other")])
    arguments = ["--llm", str(llm), "--vision", str(vision), str(tmp_path / "other")]
    for more, wrong in (
        (["--image-size", "0"], "no multiple of the patch 4; try 4"),
        (["--image-size", "-8"], "no multiple of the patch 4; try 4"),
        (["--projector", "mlp_downsample_0x0"], "unknown projector_type"),
        (["--projector", "mlp0x_gelu"], "unknown projector_type"),
    ):
        with pytest.raises(ValueError, match=wrong):
            main([*arguments, *more])
    assert not (tmp_path / "other").exists()
    with pytest.raises(CheckpointError, match="is a file; give a folder"):
        main([*arguments[:-1], str(tmp_path / "file")])
