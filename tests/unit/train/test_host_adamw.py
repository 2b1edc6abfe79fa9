"""AdamW with moments on the host is torch's AdamW, bit for bit, saved and resumed too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from train_cases import fresh_model, put_on_mesh, row, whole

from longvila.testing import Rank, ranks
from longvila.train import checkpoint
from longvila.train.host_adamw import HostAdamW
from longvila.train.stages import Optimizer, Rates
from longvila.train.step import build_optimizer, train_step


def _steps(optimizer: torch.optim.Optimizer, model: nn.Module, count: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 70), nn.LayerNorm(70), nn.Linear(70, 3))


@pytest.mark.parametrize("fused", [True, False])
def test_the_update_is_adamws(fused: bool) -> None:
    """Pieces that do not divide a parameter, small parameters, two rates, decay."""
    ours, theirs = _model(), _model()
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "fused": fused}

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        first, *rest = model.parameters()
        return [{"params": [first], "weight_decay": 0.1}, {"params": rest, "lr": 1e-3}]

    host = HostAdamW(groups(ours), piece=64, small=10, **options)
    plain = torch.optim.AdamW(groups(theirs), **options)
    _steps(host, ours, 3)
    _steps(plain, theirs, 3)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(host.state[a][name], plain.state[b][name]), name


def test_states_go_in_and_out_as_adamws() -> None:
    ours, theirs = _model(), _model()
    plain = torch.optim.AdamW(theirs.parameters(), lr=1e-2, fused=True)
    _steps(plain, theirs, 2)
    ours.load_state_dict(theirs.state_dict())
    host = HostAdamW(ours.parameters(), lr=1e-2, piece=128, small=1)
    host.load_state_dict(copy.deepcopy(plain.state_dict()))
    _steps(plain, theirs, 2, seed=1)
    _steps(host, ours, 2, seed=1)
    again = _model()
    again.load_state_dict(ours.state_dict())
    back = torch.optim.AdamW(again.parameters(), lr=1e-2, fused=True)
    back.load_state_dict(copy.deepcopy(host.state_dict()))
    for optimizer, model in ((plain, theirs), (host, ours), (back, again)):
        _steps(optimizer, model, 1, seed=2)
    for a, b, c in zip(ours.parameters(), theirs.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    model = _model()
    host = HostAdamW(model.parameters(), lr=1e-2, small=1)
    before = [p.detach().clone() for p in model.parameters()]
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    host.step()
    changed = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert changed == [True] + [False] * (len(before) - 1)
    assert [float(host.state[p]["step"]) for p in model.parameters()] == [float(c) for c in changed]


def test_errors() -> None:
    with pytest.raises(ValueError, match="third moment"):
        HostAdamW(_model().parameters(), amsgrad=True)
    with pytest.raises(ValueError, match="multiple of 64 elements, got 100"):
        HostAdamW(_model().parameters(), piece=100)
    mixed = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3).double())]
    with pytest.raises(ValueError, match="parameters of one dtype"):
        HostAdamW(mixed)


@ranks(2)
def test_over_shards_it_is_the_same_step(rank: Rank) -> None:
    """Through the training step, with FSDP's shards."""
    results = []
    for offload in (False, True):
        model, mesh = put_on_mesh(fresh_model(), sp=2)
        settings = Optimizer(max_steps=2, offload=offload)
        rates = Rates(vision_tower=1e-3, projector=1e-3, language_model=1e-3)
        optimizer = build_optimizer(model, rates, settings)
        assert isinstance(optimizer, HostAdamW) == offload
        if isinstance(optimizer, HostAdamW):
            optimizer.piece = 64
        for seed in (1, 2):
            train_step(model, [row(seed)], optimizer, mesh, clip_norm=1.0)
        results.append(whole(model))
    for name, value in results[0].items():
        assert (results[1][name] == value).all(), name


@ranks(2)
def test_a_save_is_adamws_whichever_wrote_it(rank: Rank, tmp_path: Path) -> None:
    """A run may put its moments on the host, or take them back, when it goes on."""
    rates = Rates(vision_tower=1e-3, projector=1e-3, language_model=1e-3)

    def begin(offload: bool) -> tuple[Any, Any, torch.optim.Optimizer]:
        model, mesh = put_on_mesh(fresh_model(), sp=2)
        return model, mesh, build_optimizer(model, rates, Optimizer(max_steps=2, offload=offload))

    model, mesh, optimizer = begin(True)
    train_step(model, [row(1)], optimizer, mesh)
    checkpoint.save(tmp_path, 1, model, optimizer, run={}, data={}, keep=1)
    train_step(model, [row(2)], optimizer, mesh)
    expected = whole(model)
    (save,) = checkpoint.find_saves(tmp_path)
    for offload in (False, True):
        model, mesh, optimizer = begin(offload)
        checkpoint.load(save, model, optimizer, seed=0)
        train_step(model, [row(2)], optimizer, mesh)
        for name, value in whole(model).items():
            assert (expected[name] == value).all(), (offload, name)
