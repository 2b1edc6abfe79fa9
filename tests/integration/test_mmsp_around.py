"""What people put around a parallelized model, or into it: wrappers, compilers, unequal inputs."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from longvila.parallel.apply import ParallelPlan, parallelize, reduce_gradients
from longvila.parallel.plan import plan_media
from longvila.sp.attention import sp_attention
from longvila.sp.context import make_context
from longvila.sp.mesh import build_mesh
from longvila.testing import Rank, ranks
from longvila.testing.asserts import assert_close
from longvila.testing.tiny import TINY_VIDEO_ID, tiny_model

PLAN = ParallelPlan(fsdp=False)


def one_frame(seed: int = 1) -> dict[str, Any]:
    """A sample whose only frame is encoded by one rank of two."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(250, (20,), generator=generator)
    ids = torch.cat([text[:5], torch.full((9,), TINY_VIDEO_ID), text[5:]])[None]
    return {
        "input_ids": ids, "labels": ids.masked_fill(ids == TINY_VIDEO_ID, -100),
        "pixel_values_videos": torch.randn(1, 3, 20, 20, generator=generator).double(),
        "video_num_frames": torch.tensor([1]),
    }  # fmt: skip


def trained(batch: dict[str, Any]) -> nn.Module:
    """The plain model after a backward pass."""
    model = tiny_model(dtype=torch.float64).train()
    model(**batch).loss.backward()
    return model


def assert_same_gradients(model: nn.Module, reference: nn.Module) -> None:
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        if not name.endswith("k_proj.bias"):  # rounding around zero
            # The plain model's loss is in float32.
            assert_close(ours.grad, theirs.grad, name=name, tolerance=1e-6)


@ranks(2)
def test_ddp_needs_no_option(rank: Rank) -> None:
    """A rank without frames runs the tower too: DDP's second step would fail, and others hang."""
    batch = one_frame()
    model = tiny_model(dtype=torch.float64).train()
    wrapped = DistributedDataParallel(parallelize(model, build_mesh(2), PLAN))
    for _ in range(2):
        wrapped.zero_grad()
        wrapped(**batch).loss.backward()
    assert_same_gradients(model, trained(batch))


@ranks(2)
def test_groups_that_ranks_gather_unequally_are_refused(rank: Rank) -> None:
    """Also where the encoder has no gradient: it is gathered whenever it runs, on one rank here."""
    mesh, batch = build_mesh(2), one_frame()
    for frozen in (True, False):
        model = parallelize(tiny_model(dtype=torch.float64).train(), mesh, PLAN)
        model.model.vision_tower.requires_grad_(not frozen)
        model.model.multi_modal_projector.requires_grad_(not frozen)
        fully_shard(model.model.vision_tower, mesh=mesh.dp_sp_mesh)
        with pytest.raises(ValueError, match="is an FSDP group of its own"):
            if frozen:
                model(**batch)
            else:
                with torch.no_grad():
                    model(**batch)
    model = parallelize(tiny_model(dtype=torch.float64).train(), mesh, PLAN)
    fully_shard(model.lm_head, mesh=mesh.dp_sp_mesh)
    with pytest.raises(ValueError, match="language-model head is an FSDP group of its own"):
        model(**batch)


@ranks(2)
def test_an_error_while_encoding_reaches_every_rank(rank: Rank) -> None:
    """A picture of a wrong size is seen by the rank that encodes it; others would wait for rows."""
    batch = one_frame()
    model = parallelize(tiny_model(dtype=torch.float64).train(), build_mesh(2), PLAN)
    wrong = {**batch, "pixel_values_videos": torch.zeros(1, 3, 7, 7).double()}
    mine = plan_media(model.config, 2, {"video": [1]}).local("video", rank.rank)
    error, message = RuntimeError, "another rank .* could not encode its frames"
    if mine.stop > mine.start:
        error, message = ValueError, r"must have shape \(frames, 3, 20, 20\)"
    with pytest.raises(error, match=message):
        model(**wrong)
    model(**batch).loss.backward()
    reduce_gradients(model)
    assert_same_gradients(model, trained(batch))


@ranks(2)
def test_targets_counted_by_each_group_alone_are_refused(rank: Rank) -> None:
    """Data parallelism: a group that passes its own count would weigh its sample by it."""
    batch = one_frame(seed=rank.rank)
    model = parallelize(tiny_model().double().train(), build_mesh(), replace(PLAN, two_stage=True))
    with pytest.raises(ValueError, match="num_items_in_batch must be the same on all ranks"):
        model(**batch, num_items_in_batch=19 + rank.rank)
    model(**batch, num_items_in_batch=39)


class _StoppedError(Exception):
    """What a loop might catch."""


@ranks(2)
@pytest.mark.parametrize("fsdp", [False, True])
def test_a_step_after_a_backward_pass_that_raised(rank: Rank, fsdp: bool) -> None:
    """FSDP leaves it half reduced, and the next gradients would be wrong: refused. Else exact."""
    batch = one_frame()
    model = tiny_model(dtype=torch.float64).train()
    exact = {"parameter_dtype": None, "compute_dtype": None, "reduce_dtype": None}
    parallelize(model, build_mesh(2), ParallelPlan(fsdp=fsdp, **exact))

    def stop(*_: Any) -> None:
        raise _StoppedError

    handle = model.model.language_model.layers[0].mlp.register_full_backward_hook(stop)
    with pytest.raises(_StoppedError):
        model(**batch).loss.backward()
    handle.remove()
    model.zero_grad()
    if fsdp:
        with pytest.raises(RuntimeError, match="did not come to its end"):
            model(**batch)
        return
    for _ in range(2):
        model.zero_grad()
        model(**batch).loss.backward()
    reduce_gradients(model)
    assert_same_gradients(model, trained(batch))


@ranks(2)
def test_all_that_ranks_must_share_is_compared(rank: Rank) -> None:
    """Other labels would train on a mixture unnoticed, another mask would exchange other sizes."""
    batch = one_frame()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    model = parallelize(tiny_model(dtype=torch.float64).train(), build_mesh(2), PLAN)
    for name, value in (("labels", 7), ("attention_mask", 0)):
        other = dict(batch)
        if rank.rank == 1:
            other[name] = batch[name].clone()
            other[name][0, -1] = value
        with pytest.raises(ValueError, match=rf"got different batches \(in {name};"):
            model(**other)
    documents = {"document_lengths": [10, 19] if rank.rank else [9, 20]}
    with pytest.raises(ValueError, match=r"got different batches \(in frames or documents;"):
        model(**batch, **documents)


@ranks(2)
def test_compilers_around_a_model_stay_out(rank: Rank) -> None:
    """Traced, a step takes minutes and then waits for a message for ever."""
    batch = one_frame()
    reference, mesh = trained(batch), build_mesh(2)
    for part in ("model", "layers"):
        model = parallelize(tiny_model(dtype=torch.float64).train(), mesh, PLAN)
        for module in [model] if part == "model" else model.model.language_model.layers:
            module.compile(backend="aot_eager")
        model(**batch).loss.backward()
        reduce_gradients(model)
        assert_same_gradients(model, reference)


@ranks(2)
def test_attention_inside_a_compiled_function(rank: Rank) -> None:
    context = make_context(build_mesh(2, 1), [19, 6])

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sp_attention(2 * q, k, v, context).square().sum()

    torch.manual_seed(rank.rank)
    inputs = [torch.randn(1, context.num_local_tokens, heads, 8) for heads in (4, 2, 2)]
    grads = []
    for call in (function, torch.compile(function, backend="aot_eager")):
        leaves = [each.clone().requires_grad_() for each in inputs]
        call(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs)


@ranks(2)
def test_a_copy_is_refused_before_it_runs_the_originals_weights(rank: Rank) -> None:
    model = tiny_model(dtype=torch.float64).train()
    twin = copy.deepcopy(model)
    mesh = build_mesh(2)
    parallelize(model, mesh, PLAN)
    with pytest.raises(TypeError, match="copy the model before"):
        copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        parallelize(twin, mesh, PLAN)
        assert model(**one_frame()).loss != twin(**one_frame()).loss


@ranks(3)
def test_several_passes_before_one_backward(rank: Rank) -> None:
    """Two models, three samples, one of them text alone; three ranks, two tokens in one sample."""
    text = {"input_ids": torch.arange(2)[None], "labels": torch.arange(2)[None]}
    batches = [one_frame(1), text, one_frame(2)]
    models, references = (
        [tiny_model(seed, dtype=torch.float64).train() for seed in range(2)] for _ in range(2)
    )
    sum(each(**batch).loss for each in references for batch in batches).backward()
    for model, ring in zip(models, (1, 3), strict=True):
        parallelize(model, build_mesh(3, ring), PLAN)
    losses = [model(**batch).loss for model in models for batch in batches]
    sum(losses).backward()
    everyone: list[Any] = [None] * 3
    dist.all_gather_object(everyone, [loss.item() for loss in losses])
    assert everyone[0] == everyone[1] == everyone[2]
    for model, reference in zip(models, references, strict=True):
        reduce_gradients(model)
        assert_same_gradients(model, reference)
