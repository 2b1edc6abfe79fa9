"""Parts: who owns which parameter, adapters that tune what they say, and their merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_cases import fresh_model, put_on_mesh, row, whole

from longvila.errors import CheckpointError
from longvila.testing import Rank
from longvila.testing.ranks import run_ranks
from longvila.testing.tiny import tiny_model
from longvila.train.parts import (
    PARTS,
    base_model,
    export_state,
    merge_adapter,
    named_parts,
    save_plain,
    set_context,
    tune,
)
from longvila.train.stages import Adapter, Context, Optimizer, Rates, StageError
from longvila.train.step import build_optimizer, train_step

ADAPTER = Adapter(rank=2, alpha=4)
LANGUAGE = Rates(language_model=1e-2)


def tuned(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_every_parameter_has_one_part() -> None:
    model = fresh_model()
    parts = named_parts(model)
    names = [name for part in parts.values() for name, _ in part]
    assert sorted(names) == sorted(dict(model.named_parameters())) and tuple(parts) == PARTS
    assert all("vision_tower" in name for name, _ in parts["vision_tower"])
    assert all("multi_modal_projector" in name for name, _ in parts["projector"])


@pytest.mark.parametrize("part", PARTS)
def test_a_part_without_a_rate_is_frozen(part: str) -> None:
    model = fresh_model()
    assert tune(model, Rates(**{part: 1.0})) is model
    assert tuned(model) == {name for name, _ in named_parts(model)[part]}


def test_an_adapter_tunes_what_it_says_and_nothing_else() -> None:
    model = fresh_model()
    wrapped = tune(model, Rates(language_model=1.0, projector=1.0), ADAPTER)
    names = tuned(wrapped)
    low = {name for name in names if ".lora_" in name}
    # Two layers, four projections, two factors: in the language model and nowhere else.
    assert len(low) == 16 and all("language_model" in name for name in low)
    text = {n for n in names - low if "language_model" in n}
    assert sum("norm" in name for name in text) == 5
    assert sum("embed_tokens" in name for name in text) == 1 and len(text) == 6
    rest = names - low - text
    assert rest and all("multi_modal_projector" in name for name in rest)
    assert base_model(wrapped) is model


def test_embeddings_and_norms_really_change() -> None:
    wrapped = tune(fresh_model(), LANGUAGE, ADAPTER)
    model, mesh = put_on_mesh(wrapped, fsdp=False)
    before = whole(model)
    optimizer = build_optimizer(model, LANGUAGE, Optimizer())
    for seed in (1, 2):
        train_step(model, [row(seed)], optimizer, mesh)
    changed = {n for n, value in whole(model).items() if not np.array_equal(value, before[n])}
    assert changed == tuned(model)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Adapter(targets=("q_proj", "qproj")), r"names \['qproj'\], which no linear layer"),
        (Adapter(targets=()), "no linear layer|target"),
    ],
)
def test_names_that_find_nothing_are_errors(adapter: Adapter, message: str) -> None:
    with pytest.raises((StageError, ValueError), match=message):
        tune(fresh_model(), LANGUAGE, adapter)


def test_the_head_can_be_tuned_too() -> None:
    wrapped = tune(fresh_model(), LANGUAGE, Adapter(also_tune=("head",)))
    assert {n for n in tuned(wrapped) if ".lora_" not in n} == {"base_model.model.lm_head.weight"}


def adapted(rank: Rank | None) -> dict[str, Any]:
    """Train an adapter for a step; the merged weights, and what PEFT merges itself."""
    torch.manual_seed(0)
    wrapped = tune(fresh_model(), LANGUAGE, ADAPTER)
    model, mesh = put_on_mesh(wrapped, fsdp=rank is not None)
    optimizer = build_optimizer(model, LANGUAGE, Optimizer(eps=1e-4))
    train_step(model, [row(1), row(2)][mesh.dp_rank :: mesh.dp_size], optimizer, mesh)
    state = export_state(model, ADAPTER, torch.float32)
    out: dict[str, Any] = {"ours": {name: value.numpy() for name, value in state.items()}}
    if rank is None:
        peft: Any = model
        out["peft"] = {n: p.detach().numpy() for n, p in peft.merge_and_unload().named_parameters()}
    return out


def test_merging_gives_the_plain_model() -> None:
    both = adapted(None)
    plain = dict(fresh_model().named_parameters())
    assert set(both["ours"]) == set(both["peft"]) == set(plain)
    for name, value in both["peft"].items():
        np.testing.assert_allclose(both["ours"][name], value, atol=1e-6)
    moved = both["ours"]["model.language_model.layers.0.self_attn.q_proj.weight"]
    assert not np.array_equal(
        moved, plain["model.language_model.layers.0.self_attn.q_proj.weight"].detach().numpy()
    )
    sharded = run_ranks(adapted, 2)
    assert sharded[1]["ours"] == {}
    for name, value in both["ours"].items():
        np.testing.assert_allclose(sharded[0]["ours"][name], value, atol=1e-5)


def test_an_adapter_without_a_weight_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="no weight beside"):
        merge_adapter({"x.lora_A.default.weight": torch.zeros(2, 3)}, ADAPTER)


def test_a_new_context_reaches_config_and_rotary_embedding() -> None:
    model = tiny_model()
    text = model.model.language_model
    before = text.rotary_emb.inv_freq.clone()
    set_context(model, Context(rope_theta=15_300_000.0, max_position_embeddings=131072))
    assert model.config.text_config.rope_parameters["rope_theta"] == 15_300_000.0
    assert model.config.context_length == 131072
    assert not torch.equal(text.rotary_emb.inv_freq, before)
    dim = 2 * before.numel()
    expected = 15_300_000.0 ** (-torch.arange(0, dim, 2).float() / dim)
    torch.testing.assert_close(text.rotary_emb.inv_freq, expected)
    with pytest.raises(StageError, match="context is 131072 already"):
        set_context(model, Context(rope_theta=1e7, max_position_embeddings=65536))
    text.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(StageError, match="rescaled by rope_type 'linear'"):
        set_context(model, Context(rope_theta=1e7, max_position_embeddings=2**20))


def test_yarn_leaves_pairs_that_turned_often_and_slows_down_the_others() -> None:
    model = tiny_model()
    text = model.model.language_model
    length, base = text.config.max_position_embeddings, 1e6
    pairs = text.rotary_emb.inv_freq.numel()
    before = base ** (-torch.arange(pairs).float() / pairs)
    context = Context(rope_theta=base, max_position_embeddings=18 * length, yarn_factor=18)
    set_context(model, context)
    after = text.rotary_emb.inv_freq
    turns = before * length / (2 * torch.pi)
    torch.testing.assert_close(after[turns > 40], before[turns > 40])
    torch.testing.assert_close(after[turns < 0.5], before[turns < 0.5] / 18)
    assert (turns > 40).any() and (turns < 0.5).any()
    assert model.config.context_length == 18 * length
    with pytest.raises(ValueError, match=r"yarn_factor must be at least 1, got 0\.5"):
        Context(rope_theta=base, max_position_embeddings=length, yarn_factor=0.5)


def test_a_plain_model_keeps_its_settings_of_generation(tmp_path: Path) -> None:
    model = fresh_model()
    # Sampling without do_sample is common on the hub, and older releases refuse to save it.
    model.generation_config.update(eos_token_id=[3, 4], max_new_tokens=77, temperature=0.9)
    save_plain(model, export_state(model, None, torch.float32), tmp_path)
    found = type(model).from_pretrained(tmp_path).generation_config
    assert (found.eos_token_id, found.max_new_tokens, found.temperature) == ([3, 4], 77, 0.9)


def test_adapters_in_the_tower_are_merged_too() -> None:
    rates = Rates(vision_tower=1e-3, projector=1e-3, language_model=1e-3)
    adapter = Adapter(rank=2, alpha=4, also_tune=("norms",), tower_targets=("fc1", "q_proj"))
    model, mesh = put_on_mesh(tune(fresh_model(), rates, adapter), fsdp=False)
    tower = {name for name in tuned(model) if "vision_tower" in name}
    assert tower and all(".lora_" in name for name in tower)
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in tower} == {"fc1", "q_proj"}
    train_step(model, [row(1)], build_optimizer(model, rates, Optimizer()), mesh)
    merged = export_state(model, adapter, torch.float32)
    plain = dict(fresh_model().named_parameters())
    assert set(merged) == set(plain)
    moved = {n for n in plain if "vision_tower" in n and not torch.equal(merged[n], plain[n])}
    assert moved and all(n.endswith(("fc1.weight", "q_proj.weight")) for n in moved)


def test_a_name_that_the_tower_has_not_is_an_error() -> None:
    rates = Rates(vision_tower=1e-3, language_model=1e-3)
    with pytest.raises(StageError, match="tower_targets names"):
        tune(fresh_model(), rates, Adapter(tower_targets=("gate_proj",)))
