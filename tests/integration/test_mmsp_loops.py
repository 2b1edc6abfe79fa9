"""What loops of people's own do with a parallelized model: evaluate in between, freeze, save."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from longvila.parallel.apply import (
    ParallelPlan,
    is_parallelized,
    parallelize,
    reduce_gradients,
    unparallelize,
)
from longvila.parallel.families import find_family
from longvila.sp.loss import global_mean
from longvila.sp.mesh import SPMesh, build_mesh
from longvila.testing import Rank, ranks
from longvila.testing.asserts import assert_close
from longvila.testing.ranks import run_ranks
from longvila.testing.tiny import TINY_VIDEO_ID, tiny_model

EXACT = {"parameter_dtype": None, "compute_dtype": None, "reduce_dtype": None}


def plan(fsdp: bool) -> ParallelPlan:
    return ParallelPlan(fsdp=fsdp, **EXACT)


def video_batch(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(250, (20 + seed,), generator=generator)
    ids = torch.cat([text[:5], torch.full((18,), TINY_VIDEO_ID), text[5:]])[None]
    return {
        "input_ids": ids, "labels": ids.masked_fill(ids == TINY_VIDEO_ID, -100),
        "pixel_values_videos": torch.randn(2, 3, 20, 20, generator=generator).to(dtype),
        "video_num_frames": torch.tensor([2]),
    }  # fmt: skip


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def train(model: nn.Module, mesh: SPMesh | None, fsdp: bool) -> list[float]:
    """A loop that evaluates in all places, freezes a part for a step, and averages weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    average = [p.detach().clone() for p in model.parameters()]
    seen = []

    def evaluate() -> None:
        with torch.no_grad():
            seen.append(model(**video_batch(9)).loss.item())

    for step in range(4):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(step != 2 or ("embed" not in name and "vision" not in name))
        loss = model(**video_batch(step)).loss
        evaluate()
        loss.backward()
        evaluate()
        if mesh is not None and not fsdp:
            reduce_gradients(model)
        seen.append(full(nn.utils.clip_grad_norm_(model.parameters(), 0.5)).item())
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mean, parameter in zip(average, model.parameters(), strict=True):
                mean.lerp_(parameter, 0.3)
            kept = [p.detach().clone() for p in model.parameters()]
            for mean, parameter in zip(average, model.parameters(), strict=True):
                parameter.copy_(mean)
            evaluate()
            for mine, parameter in zip(kept, model.parameters(), strict=True):
                parameter.copy_(mine)
    return seen


@ranks(2)
@pytest.mark.parametrize("adapters", [False, True], ids=["all", "lora"])
@pytest.mark.parametrize("fsdp", [False, True], ids=["replicated", "fsdp2"])
def test_evaluation_leaves_training_what_it_is(rank: Rank, fsdp: bool, adapters: bool) -> None:
    """Root parameters left gathered would be frozen, averaged and clipped in place of shards."""
    models: list[Any] = [tiny_model(dtype=torch.float64).train() for _ in range(2)]
    if adapters:
        for number, model in enumerate(models):
            torch.manual_seed(0)
            adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "fc1"]))
            models[number] = adapted.double()
    reference, model = models
    expected = train(reference, None, False)
    mesh = build_mesh(2)
    found = train(parallelize(model, mesh, plan(fsdp)), mesh, fsdp)
    # The plain model's loss is in float32.
    assert found == pytest.approx(expected, rel=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert_close(full(ours), theirs, name=name, tolerance=1e-5)


def save(rank: Rank, folder: str) -> str:
    model = parallelize(tiny_model().train(), build_mesh(2))
    message = ""
    if rank.rank == 0:  # which would wait for the other forever
        with pytest.raises(ValueError, match="get_model_state_dict") as error:
            model.save_pretrained(folder)
        message = str(error.value)
        assert not Path(folder).exists()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if rank.rank == 0:
        model.save_pretrained(folder, state_dict=state)
    return message


def test_a_sharded_model_says_how_to_save_it(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    assert "state_dict=state" in run_ranks(save, 2, str(folder), timeout_s=60)[0]
    model = tiny_model()
    back = type(model).from_pretrained(folder, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@ranks(2)
def test_adapters_after_sharding_are_refused(rank: Rank) -> None:
    model: Any = parallelize(tiny_model().train(), build_mesh(2))
    late = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="get_peft_model, then parallelize"):
        late(**video_batch(1, torch.float32))


def test_undoing_a_copy_leaves_the_original() -> None:
    model = parallelize(tiny_model(), build_mesh(-1), plan(False))
    twin = unparallelize(copy.deepcopy(model))
    assert is_parallelized(model) and not is_parallelized(twin)

    def recomputed(each: Any) -> list[bool]:
        family = find_family(each)
        return ["_gradient_checkpointing_func" in vars(one) for one in family.layers(each)]

    assert all(recomputed(model)) and not any(recomputed(twin))


def test_a_copy_of_a_model_with_compiled_parts_is_refused() -> None:
    """They would compute with the original's weights."""
    model = parallelize(
        tiny_model(), build_mesh(-1), ParallelPlan(fsdp=False, compile_modules=True)
    )
    with pytest.raises(TypeError, match="copy the model before"):
        copy.deepcopy(model)


@ranks(2)
@pytest.mark.parametrize("fsdp", [False, True], ids=["replicated", "fsdp2"])
def test_a_loss_of_ones_own_on_logits(rank: Rank, fsdp: bool) -> None:
    """As the guide says: summed over local rows, made a mean over all ranks by global_mean."""
    batch = video_batch(3)
    targets = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].flatten()

    def squared(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none").square().sum()

    reference = tiny_model(dtype=torch.float64).train()
    output = reference(**batch)
    own = squared(output.logits.flatten(0, 1), targets) / (targets != -100).sum()
    (output.loss + own).backward()

    mesh = build_mesh(2)
    model = parallelize(tiny_model(dtype=torch.float64).train(), mesh, plan(fsdp))
    output = model(**batch, output_logits=True)
    real = output.token_indices >= 0
    local = targets.masked_select(targets != -100).new_full(real.shape, -100)
    local[real] = targets[output.token_indices[real]]
    ours = global_mean(
        squared(output.logits[0], local),
        (local != -100).sum(),
        group=mesh.dp_sp_group,
        gradient_reduction="mean",
    )
    (output.loss + ours).backward()
    if not fsdp:
        reduce_gradients(model)
    assert_close(ours.detach(), own.detach(), tolerance=1e-10)
    for (name, parameter), theirs in zip(
        model.named_parameters(), reference.parameters(), strict=True
    ):
        if not name.endswith("k_proj.bias"):  # rounding around zero
            assert_close(full(parameter.grad), theirs.grad, name=name, tolerance=1e-6)
