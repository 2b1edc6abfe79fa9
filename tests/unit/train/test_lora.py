"""Adapters: what is tuned beside them is saved, loaded by PEFT alone, and merged on export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_cases import fresh_model, whole
from trainer_cases import make, trained
from transformers import AutoModelForImageTextToText

from longvila.errors import CheckpointError
from longvila.testing import Rank
from longvila.testing.ranks import run_ranks
from longvila.testing.tiny import tiny_model
from longvila.train.lora import adapter_of, complete_adapter, load_in_full, tuned_in_full
from longvila.train.parts import tune
from longvila.train.stages import Adapter, Rates, StageError

pytestmark = [
    # PEFT asks transformers by a name that is on its way out, and the hub for a model without name.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in.*:UserWarning"),
]
LORA: dict[str, Any] = {"lora_enable": True, "lora_r": 2, "lora_alpha": 4}


def logits(model: Any) -> torch.Tensor:
    """Of a fixed text, in evaluation."""
    with torch.no_grad():
        out: torch.Tensor = model.eval()(input_ids=torch.arange(5, 25)[None]).logits
    return out


def fit(folder: Path, **options: Any) -> Any:
    trainer = make(None, folder, steps=2, **{**LORA, **options})
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied head"])
def test_peft_alone_loads_what_was_trained(tied: bool, tmp_path: Path) -> None:
    from peft import PeftModel

    def fresh() -> Any:
        return tiny_model(seed=3, tie_word_embeddings=tied) if tied else fresh_model()

    trainer = fit(tmp_path, model=fresh(), tune_vision_tower=False)
    expected = logits(trainer.model)
    assert not torch.allclose(expected, logits(fresh()), atol=1e-3)
    loaded = PeftModel.from_pretrained(fresh(), tmp_path)
    torch.testing.assert_close(logits(loaded), expected)
    projector = "base_model.model.model.multi_modal_projector.layers.2"
    changed = dict(trainer.model.named_parameters())[f"{projector}.weight"]
    if tied:
        embeddings, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
        assert embeddings.weight.data_ptr() == head.weight.data_ptr()
    copy = loaded.get_submodule(projector).modules_to_save["default"].weight
    assert torch.equal(changed, copy)


def test_a_whole_tower_is_saved_once(tmp_path: Path) -> None:
    from peft import PeftModel

    trainer = fit(tmp_path)  # the tower is tuned, with parameters on modules that have children
    expected = {n: p for n, p in trainer.model.named_parameters() if ".lora_" not in n}
    loaded = PeftModel.from_pretrained(fresh_model(), tmp_path)
    plain = loaded.merge_and_unload()
    merged = dict(plain.named_parameters())
    for name, value in expected.items():
        if ".base_layer." not in name:
            other = merged[name.removeprefix("base_model.model.")]
            torch.testing.assert_close(other, value, msg=name)


def exported(rank: Rank | None, folder: str) -> dict[str, np.ndarray]:
    options = {} if rank is None else {"seq_parallel_size": 2}
    trainer = make(rank, folder, steps=2, **LORA, **options)
    trainer.train()
    trainer.export_model(f"{folder}/plain", dtype=torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(f"{folder}/plain")
    if rank is None:
        torch.testing.assert_close(logits(model), logits(trainer.model), atol=1e-4, rtol=1e-4)
    return whole(model)


def test_exported_models_are_plain_and_the_same_on_any_mesh(tmp_path: Path) -> None:
    one = exported(None, str(tmp_path / "one"))
    before = whole(fresh_model())
    assert one.keys() == before.keys()
    text = [name for name in before if "language_model" in name]
    changed = {name for name in text if not np.array_equal(one[name], before[name])}
    kept = {name for name in text if ".mlp." in name or "_proj.bias" in name}
    assert changed == set(text) - kept
    for other in run_ranks(exported, 2, str(tmp_path / "two")):
        for name, value in one.items():
            np.testing.assert_allclose(other[name], value, atol=1e-4, err_msg=name)


def test_rates_of_adapters_are_those_of_the_language_model(tmp_path: Path) -> None:
    trainer = make(
        None, tmp_path, steps=1, **LORA, language_model_lr=1e-3, mm_projector_lr=1e-4,
        tune_vision_tower=False,
    )  # fmt: skip
    optimizer = trainer.create_optimizer()
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in rate_of
        else:
            assert rate_of[id(parameter)] == (1e-4 if "projector" in name else 1e-3), name


def wrapped(**options: Any) -> Any:
    return tune(fresh_model(), Rates(language_model=1.0), Adapter(rank=2, **options))


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = wrapped()
    with pytest.raises(CheckpointError, match="to complete"):
        complete_adapter(tmp_path, model, model.state_dict())
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="lacks 6 parameters that are tuned beside"):
        load_in_full(model, tmp_path)
    other = wrapped()
    with torch.no_grad():
        for parameter in tuned_in_full(model).values():
            parameter += 1
    complete_adapter(tmp_path, model, model.state_dict())
    assert sorted(load_in_full(other, tmp_path)) == sorted(tuned_in_full(model))
    for name, parameter in tuned_in_full(model).items():
        assert torch.equal(dict(other.named_parameters())[name], parameter)


def test_only_plain_lora_is_merged() -> None:
    from peft import LoraConfig, get_peft_model

    assert adapter_of(fresh_model()) is None
    assert adapter_of(wrapped()) == Adapter(rank=2)
    config = LoraConfig(r=2, use_rslora=True, target_modules=["q_proj"])
    with pytest.raises(StageError, match="this one has use_rslora"):
        adapter_of(get_peft_model(fresh_model(), config))


def test_adapters_of_the_users_own(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"])
    model = get_peft_model(fresh_model(), config)
    trainer = make(None, tmp_path, model=model, steps=1)
    before = whole(trainer.model)
    trainer.train()
    changed = {n for n, v in whole(trainer.model).items() if not np.array_equal(v, before[n])}
    assert changed and all(".lora_" in name for name in changed)
    with pytest.raises(StageError, match="comes with adapters of PEFT already"):
        make(None, tmp_path, model=get_peft_model(fresh_model(), config), **LORA)


def test_adapters_train_alike_on_any_mesh(tmp_path: Path) -> None:
    one = trained(None, str(tmp_path), steps=3, **LORA)
    for other in run_ranks(trained, 2, str(tmp_path), steps=3, seq_parallel_size=2, **LORA):
        torch.testing.assert_close(other["losses"], one["losses"], rtol=1e-5, atol=1e-6)
        for name, value in one["weights"].items():
            np.testing.assert_allclose(other["weights"][name], value, atol=1e-4, err_msg=name)


def test_a_folded_update_is_the_same_update(tmp_path: Path) -> None:
    adapter = Adapter(rank=3, alpha=6, targets=("q_proj", "down_proj"), also_tune=("norms",))
    found = []
    for folded in (False, True):
        torch.manual_seed(0)
        model = tune(fresh_model(), Rates(language_model=1e-3), replace(adapter, folded=folded))
        with torch.no_grad():  # B begins as zero
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.copy_(torch.randn_like(parameter))
        ids = torch.arange(5, 25)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        tuned = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append((logits(model), tuned))
    (plain, gradients), (folded_logits, folded_gradients) = found
    torch.testing.assert_close(folded_logits, plain, rtol=1e-4, atol=1e-4)
    assert any(".lora_A." in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(folded_gradients[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_folded_layers_have_no_dropout() -> None:
    with pytest.raises(StageError, match=r"adapter\.dropout"):
        tune(fresh_model(), Rates(language_model=1e-3), Adapter(folded=True, dropout=0.1))
