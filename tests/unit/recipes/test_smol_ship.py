"""What ships is what was trained: a fresh default model is base plus delta, to the bit."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from longvila.cli import ask
from longvila.media.synthetic import clip
from longvila.model.assemble import assemble
from longvila.model.delta import apply_delta, difference, read_delta_metadata, save_delta
from longvila.model.modeling_longvila import LongVILAForConditionalGeneration
from longvila.model.processing_longvila import LongVILAProcessor
from longvila.packaged import PackagedError, default_model
from longvila.testing.tiny import tiny_tokenizer

RECIPE = Path(__file__).parents[3] / "recipes" / "smol"
CONTEXT = {"rope_theta": 70240051.0, "max_position_embeddings": 147456}


@pytest.fixture
def ship(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(RECIPE))
    yield importlib.import_module("ship")
    sys.modules.pop("ship", None)


@pytest.fixture
def init(tmp_path: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(media_tokens=False)
    text = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(text).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        image_size=16, patch_size=4,
    )  # fmt: skip
    SiglipVisionModel(vision).save_pretrained(tmp_path / "vision")
    return {
        "llm": str(tmp_path / "llm"), "vision": str(tmp_path / "vision"),
        "projector": "mlp_downsample", "image_size": 16, "vision_feature_layer": -2,
    }  # fmt: skip


def _base(init: dict[str, Any]) -> Any:
    model, _ = assemble(
        init["llm"], init["vision"], projector_type=init["projector"], image_size=16,
        vision_feature_layer=-2, timestamps=True,
    )  # fmt: skip
    return model


def _trained(init: dict[str, Any], path: Path, **notes: str) -> Path:
    """A delta of low-rank updates and whole tensors, as a run writes it."""
    model = _base(init)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "projector" in name or name.endswith("norm.weight"):
                parameter += 0.1 * torch.randn_like(parameter)
            elif "language_model.layers" in name and parameter.ndim == 2:
                parameter += (
                    0.1 * torch.randn(len(parameter), 2) @ torch.randn(2, parameter.shape[1])
                )
    delta, _ = difference(
        before, model.state_dict(), rank=lambda name: None if "embed" in name else 3
    )
    save_delta(delta, path, init=init, dtype=torch.float16, **notes)
    return path


def test_a_fresh_default_model_is_base_plus_delta(
    ship: Any,
    init: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = _trained(init, tmp_path / "run.safetensors", context=json.dumps(CONTEXT))
    shipped = tmp_path / "shipped.safetensors"
    found = ship.ship_delta(source, shipped, num_frames=7)
    assert found["size_mb"] == shipped.stat().st_size / 1e6
    stored = load_file(shipped)
    kinds = {v.dtype for k, v in stored.items() if v.ndim > 1 and not k.endswith(".scale")}
    assert kinds == {torch.int8}
    # The run's file has room for a rank of three; these updates have two.
    updates = {k: v for k, v in stored.items() if "language" in k and k.endswith(".lora_A")}
    assert {len(v) for v in updates.values()} == {2}
    assert 0 < found["rounding_mean"] <= found["rounding_max"] < 0.02
    assert read_delta_metadata(shipped)["context"] == CONTEXT

    folder = default_model(cache=tmp_path / "cache", delta=shipped)
    model = LongVILAForConditionalGeneration.from_pretrained(folder)
    wanted = _base(init)
    apply_delta(wanted, shipped)
    state = model.state_dict()
    assert set(state) == set(wanted.state_dict())
    for name, value in wanted.state_dict().items():
        assert torch.equal(state[name], value), name
    assert model.config.context_length == CONTEXT["max_position_embeddings"]
    assert model.config.get_text_config().rope_parameters["rope_theta"] == CONTEXT["rope_theta"]
    ids = torch.tensor([[3, 9, 27, 81]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, wanted.eval()(input_ids=ids).logits)

    processor = LongVILAProcessor.from_pretrained(folder)
    video = processor.video_processor
    assert (video.short, video.fps, video.num_frames) == (ship.VIDEO["short"], ship.VIDEO["fps"], 7)
    assert processor.tokenizer.model_max_length == CONTEXT["max_position_embeddings"]

    # ``longvila ask`` without --model sees a frame a second.
    monkeypatch.setattr(ask, "default_model", lambda: folder)
    film = clip(tmp_path / "film.mp4", 24 * 6, height=32, width=64)
    assert ask.main([str(film), "What is it?", "--json", "--max-new-tokens", "1"]) == 0
    (medium,) = json.loads(capsys.readouterr().out)["media"]
    assert medium["timestamps_s"] == pytest.approx(range(6), abs=0.05)


def test_a_delta_without_context_leaves_videos_as_they_were(
    init: dict[str, Any], tmp_path: Path
) -> None:
    source = _trained(init, tmp_path / "old.safetensors")
    folder = default_model(cache=tmp_path / "cache", delta=source)
    video = LongVILAProcessor.from_pretrained(folder).video_processor
    assert (video.short, video.fps, video.num_frames) == ("repeat", None, 8)
    config = LongVILAForConditionalGeneration.from_pretrained(folder).config
    assert config.context_length == _base(init).config.context_length


def test_a_delta_that_is_too_large_is_refused(
    ship: Any, init: dict[str, Any], tmp_path: Path
) -> None:
    source = _trained(init, tmp_path / "run.safetensors")
    with pytest.raises(ValueError, match=r"needs 0\.0 MB in eight bits, and 0\.001 MB are allowed"):
        ship.ship_delta(source, tmp_path / "out.safetensors", limit_mb=0.001)
    assert not list(tmp_path.glob("*out.safetensors"))


def test_what_the_recipe_writes_is_small_enough(ship: Any) -> None:
    ranks = importlib.import_module("run").RANKS
    sys.modules.pop("run", None)
    # SmolLM2-135M: four projections of width 576 (or 192) and three to or from 1536, 30 layers.
    text = 30 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    # Ten layers of DINOv2-small, width 384; and the projector, whole.
    tower = 10 * (4 * 2 * 384 + 2 * (384 + 1536))
    size = ranks["model.language_model."] * text + ranks["model.vision_tower."] * tower + 3_900_000
    assert 0.8 * ship.LIMIT_MB < size / 1e6 < ship.LIMIT_MB


def test_an_unknown_setting_of_videos_is_an_error(init: dict[str, Any], tmp_path: Path) -> None:
    source = _trained(init, tmp_path / "x.safetensors", video_processor='{"speed": 2}')
    with pytest.raises(PackagedError, match="sets speed, which video processors do not have"):
        default_model(cache=tmp_path / "cache", delta=source)
