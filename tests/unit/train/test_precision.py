"""bfloat16 compute over float32 shards: what has which type, and that it stays near float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from train_cases import fresh_model, row

from longvila.errors import LongVILAError
from longvila.memory.offload import Offload
from longvila.parallel import apply
from longvila.sp.mesh import build_mesh
from longvila.testing import Rank, ranks
from longvila.train import loop, run
from longvila.train.stages import Optimizer, Parallel, Rates, get_stage
from longvila.train.step import build_optimizer, train_step

RATES = Rates(vision_tower=1e-3, projector=1e-3, language_model=1e-3)


def _stage(**parallel: Any) -> Any:
    return replace(get_stage("sft"), parallel=Parallel(**parallel))


@ranks(2)
def test_shards_gradients_and_states_are_float32_and_layers_bfloat16(rank: Rank) -> None:
    """The default of every stage, through the step that stages run."""
    mesh = build_mesh(2, num_heads=4, num_kv_heads=2)
    seen: dict[str, set[torch.dtype]] = {"weight": set(), "input": set(), "reduced": set()}
    reduce_scatter = dist.reduce_scatter_tensor

    def watched(output: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen["reduced"].add(source.dtype)
        return reduce_scatter(output, source, *args, **kwargs)

    results = {}
    for compute in ("bfloat16", "float32"):
        model = run.put_on_mesh(fresh_model().train(), mesh, _stage(compute=compute))
        optimizer = build_optimizer(model, RATES, Optimizer(max_steps=1))
        if compute == "bfloat16":
            layer = model.model.language_model.layers[0].mlp.gate_proj

            def look(module: Any, args: Any) -> None:
                seen["weight"].add(module.weight.dtype)
                seen["input"].add(args[0].dtype)

            layer.register_forward_pre_hook(look)
            kept: set[torch.dtype] = set()

            def note(optimizer: Any, args: Any, kwargs: Any, kept: set[torch.dtype] = kept) -> None:
                kept.update(p.grad.dtype for p in optimizer.param_groups[0]["params"])

            finish = optimizer.register_step_pre_hook(note)
            dist.reduce_scatter_tensor = watched
        try:
            results[compute] = train_step(model, [row(1)], optimizer, mesh)
        finally:
            dist.reduce_scatter_tensor = reduce_scatter
        if compute == "bfloat16":
            finish.remove()
            assert kept == {torch.float32}
            assert all(isinstance(p, DTensor) for p in model.parameters())
            assert {p.dtype for p in model.parameters()} == {torch.float32}
            states = {v.dtype for s in optimizer.state.values() for v in s.values()}
            assert states == {torch.float32}
    assert seen["weight"] == seen["input"] == {torch.bfloat16}
    assert seen["reduced"] <= {torch.float32}
    narrow, wide = results["bfloat16"], results["float32"]
    assert 0 < abs(narrow.loss - wide.loss) < 2e-2 * wide.loss
    assert abs(narrow.gradient_norm - wide.gradient_norm) < 5e-2 * wide.gradient_norm


def test_settings_of_a_stage_reach_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[apply.ParallelPlan] = []
    monkeypatch.setattr(run, "parallelize", lambda model, mesh, plan: given.append(plan) or model)
    run.put_on_mesh(fresh_model(), build_mesh(1, num_heads=4, num_kv_heads=2), _stage())
    run.put_on_mesh(
        fresh_model(),
        build_mesh(1, num_heads=4, num_kv_heads=2),
        _stage(
            plain_layers=3, offload_gib=0.5, offload_keep_last=2, mlp_tile_rows=8, compile=True,
            activation_checkpointing=False,
        ),
    )  # fmt: skip
    off, on = given
    assert off == apply.ParallelPlan(two_stage=True), "nothing of it is on by default"
    assert (on.plain_layers, on.mlp_tile_rows, on.compile_modules) == (3, 8, True)
    assert not on.activation_checkpointing
    assert isinstance(on.offload, Offload)
    assert (on.offload.budget_bytes, on.offload.keep_last) == (2**29, 2)


def test_a_stage_that_would_not_fit_is_refused_before_its_first_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        asked.append((args[2], args[3].tokens, kwargs["optimizer"]))
        raise LongVILAError("too large")

    monkeypatch.setattr(loop.budget, "check", refuse)
    stage = get_stage("sft")
    mesh = build_mesh(1, num_heads=4, num_kv_heads=2)
    with pytest.raises(LongVILAError, match="too large"):
        loop.run_stage(fresh_model(), mesh, None, stage, tmp_path)  # type: ignore[arg-type]
    ((settings, tokens, optimizer),) = asked
    assert settings is stage.parallel and tokens == stage.data.max_tokens
    assert isinstance(optimizer, torch.optim.AdamW)
    assert not list(tmp_path.iterdir())
