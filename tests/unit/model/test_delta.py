"""A delta changes exactly what was trained, and merging equals running with the adapters."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longvila.errors import CheckpointError
from longvila.model.delta import (
    FORMAT,
    apply_delta,
    collect_delta,
    difference,
    read_delta,
    read_delta_metadata,
    save_delta,
)
from longvila.testing.tiny import TINY_VIDEO_ID, tiny_model

INIT = {"llm": "x", "projector": "mlp_downsample"}


def _inputs() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, *[TINY_VIDEO_ID] * 9, 7, 8]])
    pixels = torch.randn(1, 3, 20, 20, generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "pixel_values_videos": pixels}


def test_merged_equals_adapters(tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny_model(0).requires_grad_(False)
    config = LoraConfig(r=3, lora_alpha=12, target_modules=r".*language_model.*q_proj|.*fc1")
    inject_adapter_in_model(config, model)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            trained = "lora_" in name or "projector" in name or "language_model.norm" in name
            parameter.requires_grad_(trained)
            if trained:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    delta = collect_delta(model)
    assert not any("base_layer" in name or "default" in name for name in delta)
    save_delta(delta, tmp_path / "d.safetensors", init=INIT, dtype=torch.float32, steps="7")
    fresh = tiny_model(0)
    before = fresh(**_inputs()).logits
    metadata = apply_delta(fresh, tmp_path / "d.safetensors")
    assert (metadata["init"], metadata["steps"]) == (INIT, "7")
    with torch.no_grad():
        wanted, got = model.eval()(**_inputs()).logits, fresh(**_inputs()).logits
    assert (got - wanted).norm() / wanted.norm() < 1e-5
    assert (got - before).norm() / wanted.norm() > 1e-2


def test_untouched_weights_stay(tmp_path: Path) -> None:
    model = tiny_model(0).requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    delta = collect_delta(model)
    assert all(name.startswith("model.multi_modal_projector.") for name in delta)
    save_delta(delta, tmp_path / "d.safetensors", init=INIT, dtype=torch.float16)
    other = tiny_model(3)
    kept = {n: p.clone() for n, p in other.named_parameters() if n not in delta}
    apply_delta(other, tmp_path / "d.safetensors")
    parameters = dict(other.named_parameters())
    assert all(torch.equal(parameters[n], p) for n, p in kept.items())
    for name, value in delta.items():
        torch.testing.assert_close(parameters[name], value.half().float())


def test_frozen_model_has_no_delta() -> None:
    with pytest.raises(CheckpointError, match="no trainable parameter"):
        collect_delta(tiny_model(0).requires_grad_(False))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.nothing": torch.zeros(2)}, "changes model.nothing, which the model does not have"),
        ({"lm_head.weight": torch.zeros(2, 2)}, "lm_head.weight has shape (2, 2)"),
        ({"lm_head.weight.lora_A": torch.zeros(2, 32)}, "without lm_head.weight.lora_B"),
        ({"lm_head.weight.lora_B": torch.zeros(2, 32)}, "without lm_head.weight.lora_A"),
    ],
)
def test_misfits_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    save_delta(tensors, tmp_path / "d.safetensors", init=INIT, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        apply_delta(tiny_model(0), tmp_path / "d.safetensors")


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="is no longvila-delta-1 file"):
        read_delta_metadata(tmp_path / "x.safetensors")


def test_difference_of_two_models(tmp_path: Path) -> None:
    base, trained = tiny_model(seed=0), tiny_model(seed=0)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if name.endswith("q_proj.weight") and "language_model" in name:
                left = torch.randn(parameter.shape[0], 2) @ torch.randn(2, parameter.shape[1])
                parameter += 0.1 * left
            elif name.endswith("input_layernorm.weight") or "multi_modal_projector" in name:
                parameter += 0.1
    after = trained.state_dict()

    def rank(name: str) -> int | None:
        return None if "projector" in name else 3

    delta, left_out = difference(before, after, rank=rank)
    assert left_out < 1e-5
    assert all(name.endswith((".lora_A", ".lora_B")) for name in delta if "q_proj" in name)
    context = {"rope_theta": 5e6, "max_position_embeddings": 131072}
    file = tmp_path / "delta.safetensors"
    save_delta(delta, file, init={}, dtype=torch.float32, context=json.dumps(context))
    angles = base.model.language_model.rotary_emb.inv_freq.clone()
    apply_delta(base, file)
    for name, value in base.state_dict().items():
        torch.testing.assert_close(value, after[name], atol=1e-5, rtol=1e-5)
    assert base.config.context_length == 131072
    assert base.config.get_text_config().rope_parameters["rope_theta"] == 5e6
    slowed = base.model.language_model.rotary_emb.inv_freq.clone()
    assert not torch.equal(slowed, angles)
    # Scaled angles come with it.
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16384}
    scaled = json.dumps({**context, "rope_parameters": yarn})
    save_delta(delta, file, init={}, dtype=torch.float32, context=scaled)
    other = tiny_model(seed=0)
    apply_delta(other, file)
    torch.testing.assert_close(other.model.language_model.rotary_emb.inv_freq[0], slowed[0])
    assert other.model.language_model.rotary_emb.inv_freq[-1] < 0.5 * slowed[-1]
    # A rank that is too small is told.
    _, left_out = difference(before, after, rank=lambda name: None if "projector" in name else 1)
    assert 0.05 < left_out < 1


def test_difference_of_equal_or_other_models() -> None:
    state = tiny_model(seed=0).state_dict()
    with pytest.raises(CheckpointError, match="same weights"):
        difference(state, state, rank=2)
    with pytest.raises(CheckpointError, match="different weights"):
        difference(state, {}, rank=2)


def test_eight_bits_keep_small_components_and_vectors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    # Columns of B fall off by a factor of a thousand; a scale for each keeps the last ones.
    falling = torch.logspace(0, -3, 4)
    delta = {
        "lm_head.weight.lora_A": torch.randn(4, 32),
        "lm_head.weight.lora_B": torch.randn(90, 4) * falling,
        "model.language_model.norm.weight": torch.randn(32),
        "model.multi_modal_projector.zero": torch.zeros(3, 5),
    }
    file = tmp_path / "d.safetensors"
    save_delta(delta, file, init=INIT, dtype=torch.int8)
    back = read_delta(file)
    assert set(back) == set(delta)
    for key, value in delta.items():
        assert back[key].dtype == torch.float32
        assert (back[key] - value).norm() <= 0.01 * value.norm()
    small = "lm_head.weight.lora_B"
    assert (back[small][:, 3] - delta[small][:, 3]).norm() < 0.01 * delta[small][:, 3].norm()
    save_file({"x": torch.zeros(2, 2, dtype=torch.int8)}, file, metadata={"format": FORMAT})
    with pytest.raises(CheckpointError, match="has x in eight bits without its scale"):
        read_delta(file)


def test_a_file_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged or cut off"):
        apply_delta(tiny_model(0), path)
