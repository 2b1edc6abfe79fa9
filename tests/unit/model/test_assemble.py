"""A model made of two parts is those two parts, with a projector drawn from its seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from longvila.errors import CheckpointError
from longvila.model.assemble import assemble, load_tower, resize_table
from longvila.model.modeling_longvila import LongVILAForConditionalGeneration
from longvila.model.processing_longvila import LongVILAProcessor
from longvila.testing.tiny import tiny_tokenizer

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


@pytest.fixture
def llm(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(media_tokens=False)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


@pytest.fixture
def vision(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    SiglipVisionModel(SiglipVisionConfig(**VISION)).save_pretrained(tmp_path / "vision")
    return tmp_path / "vision"


def test_parts_are_the_originals(llm: Path, vision: Path) -> None:
    model, processor = assemble(
        llm, vision, projector_type="mlp_downsample", vision_feature_layer=-2, timestamps=True
    )
    ids = torch.tensor([[3, 9, 27, 81]])
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = Qwen2ForCausalLM.from_pretrained(llm).eval()(ids).logits
        assert torch.equal(model(input_ids=ids).logits, wanted)
        tower = SiglipVisionModel.from_pretrained(vision).eval()
        states = tower(pixels, output_hidden_states=True).hidden_states
        torch.testing.assert_close(model.model.vision_tower(pixels).last_hidden_state, states[-2])
    assert model.config.tokens_per_frame == processor.tokens_per_frame == 4
    assert processor.timestamps
    rows = model.get_input_embeddings().num_embeddings
    assert model.config.video_token_id >= rows  # no rows were added


def test_same_seed_same_file(llm: Path, vision: Path) -> None:
    def projector(seed: int) -> torch.Tensor:
        torch.manual_seed(99 + seed)
        model, _ = assemble(llm, vision, projector_type="linear", seed=seed)
        return model.model.multi_modal_projector.layers.weight.detach()

    assert torch.equal(projector(0), projector(0))
    assert not torch.equal(projector(0), projector(1))


def test_saved_model_and_processor_load(llm: Path, vision: Path, tmp_path: Path) -> None:
    (vision / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    model, processor = assemble(llm, vision, projector_type="mlp_downsample_4x4")
    model.save_pretrained(tmp_path / "out")
    processor.save_pretrained(tmp_path / "out")
    again = LongVILAForConditionalGeneration.from_pretrained(tmp_path / "out")
    for (name, a), b in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name
    loaded = LongVILAProcessor.from_pretrained(tmp_path / "out")
    assert loaded.image_processor.image_mean == [0.1, 0.2, 0.3]
    assert loaded.video_processor.image_mean == [0.1, 0.2, 0.3]


def test_tower_of_a_pair_is_taken_out(tmp_path: Path) -> None:
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 32}  # fmt: skip
    pair = SiglipModel(SiglipConfig(vision_config=VISION, text_config=text))
    pair.save_pretrained(tmp_path / "pair")
    tower = load_tower(tmp_path / "pair", None)
    wanted = pair.vision_model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in tower.state_dict().items())


def test_picture_size_resizes_positions(vision: Path) -> None:
    tower = load_tower(vision, 24)
    assert tower.config.image_size == 24
    assert tower(torch.zeros(1, 3, 24, 24)).last_hidden_state.shape == (1, 36, 16)
    original = load_tower(vision, None).state_dict()
    for name, value in tower.state_dict().items():
        assert torch.equal(value, original[name]) == ("position" not in name), name


def test_a_resized_tower_of_half_precision_is_float32(vision: Path) -> None:
    SiglipVisionModel.from_pretrained(vision, dtype=torch.bfloat16).save_pretrained(vision)
    tower = load_tower(vision, 24)
    assert {value.dtype for value in tower.state_dict().values()} == {torch.float32}
    table = load_tower(vision, None).embeddings.position_embedding.weight
    assert torch.equal(tower.embeddings.position_embedding.weight, resize_table(table, 36))


def test_class_row_is_kept() -> None:
    table = torch.cat([torch.full((1, 3), 7.0), torch.ones(4, 3)])
    resized = resize_table(table, 10)
    assert resized.shape == (10, 3)
    assert torch.equal(resized[0], torch.full((3,), 7.0))
    torch.testing.assert_close(resized[1:], torch.ones(9, 3))


def test_size_must_fit_the_patch(vision: Path) -> None:
    with pytest.raises(ValueError, match="no multiple of the patch 4; try 20"):
        load_tower(vision, 19)


def test_missing_weights_are_named(
    llm: Path, vision: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import longvila.model.assemble as module

    tower = load_tower(vision, None)
    del tower.encoder.layers[0]
    monkeypatch.setattr(module, "load_tower", lambda source, size: tower)
    with pytest.raises(CheckpointError, match=r"has no weights for encoder\.layers"):
        assemble(llm, vision, projector_type="linear", vision_feature_layer=-1)


def test_a_head_with_a_bias_is_refused(tmp_path: Path, vision: Path) -> None:
    tokenizer = tiny_tokenizer(media_tokens=False)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = PhiConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **small)
    PhiForCausalLM(config).save_pretrained(tmp_path / "phi")
    tokenizer.save_pretrained(tmp_path / "phi")
    with pytest.raises(CheckpointError, match="its head has a bias"):
        assemble(tmp_path / "phi", vision, projector_type="linear")
