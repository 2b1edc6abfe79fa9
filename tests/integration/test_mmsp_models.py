"""parallelize in a plain PyTorch loop: an optimiser step, language models, generation, FSDP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from longvila.inference.engine import Engine
from longvila.parallel.apply import ParallelPlan, last_step_plan, parallelize, reduce_gradients
from longvila.parallel.mmsp import gather_logits
from longvila.parallel.plan import plan_media
from longvila.sp.mesh import build_mesh
from longvila.testing import Rank, ranks
from longvila.testing.asserts import assert_close, relative_error
from longvila.testing.tiny import TINY_VIDEO_ID, tiny_config, tiny_inputs, tiny_model

EXACT = {"parameter_dtype": None, "compute_dtype": None, "reduce_dtype": None}


def video_batch(
    seed: int, *, frames: int = 3, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """One sample with one video and an answer of eight tokens."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(250, (30,), generator=generator)
    ids = torch.cat([text[:5], torch.full((9 * frames,), TINY_VIDEO_ID), text[5:]])[None]
    labels = ids.clone()
    labels[:, :-8] = -100
    pixels = torch.randn(frames, 3, 20, 20, generator=generator, dtype=dtype)
    return {
        "input_ids": ids, "labels": labels, "pixel_values_videos": pixels,
        "video_num_frames": torch.tensor([frames]),
    }  # fmt: skip


def summed_loss(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
    """Oracle: plain forward, cross-entropy in the model's own precision."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    targets = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].flatten()
    scores = model(**inputs).logits.flatten(0, 1)
    return F.cross_entropy(scores, targets, reduction="sum"), int((targets != -100).sum())


def step_by_one_process(model: nn.Module, batches: list[dict[str, Any]], lr: float) -> Tensor:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    parts = [summed_loss(model, batch) for batch in batches]
    loss = sum(part for part, _ in parts) / sum(count for _, count in parts)
    loss.backward()
    optimizer.step()
    return loss.detach()


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


# ---- one optimiser step ----------------------------------------------------------------------


@ranks(8)
@pytest.mark.parametrize("fsdp", [False, True], ids=["replicated", "fsdp2"])
def test_one_optimiser_step_equals_one_process(rank: Rank, fsdp: bool) -> None:
    """dp 2 x ring 2 x ulysses 2; the second sample is longer and has more frames."""
    batches = [video_batch(1, frames=2), video_batch(2, frames=5)]
    reference = tiny_model(dtype=torch.float64).train()
    expected = step_by_one_process(reference, batches, lr=1e-3)

    model = tiny_model(dtype=torch.float64).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mesh = build_mesh(4, 2, ulysses_size=2)
    parallelize(model, mesh, ParallelPlan(fsdp=fsdp, **EXACT))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = model(**batches[mesh.dp_rank]).loss
    loss.backward()
    if not fsdp:
        reduce_gradients(model)
    optimizer.step()

    assert_close(loss.detach(), expected, name="loss")
    for (name, parameter), wanted in zip(
        model.named_parameters(), reference.parameters(), strict=True
    ):
        if "vision_tower" in name and name.endswith("k_proj.bias"):
            continue  # its gradient is rounding around zero, of which Adam takes the sign
        assert not torch.equal(full(parameter).detach(), before[name]), f"{name} did not move"
        assert_close(full(parameter), wanted, name=name, tolerance=1e-9)


@ranks(2)
def test_a_raw_loop_is_three_lines_and_learns(rank: Rank) -> None:
    """fp32 shards, bf16 compute, fp32 reduction: the defaults. The loss of all ranks agrees."""
    model = tiny_model().train()
    batch = video_batch(3, dtype=torch.float32)
    mesh = build_mesh(2, num_heads=4, num_kv_heads=2)
    model = parallelize(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert loss.dtype == torch.float32
    everyone = [torch.zeros(6) for _ in range(2)]
    torch.distributed.all_gather(everyone, torch.tensor(losses))
    assert all(torch.equal(other, everyone[0]) for other in everyone)


@ranks(2)
def test_bf16_stays_near_float32(rank: Rank) -> None:
    batch = video_batch(4, dtype=torch.float32)
    expected, count = summed_loss(tiny_model().train(), batch)
    model = parallelize(tiny_model().train(), build_mesh(2, 2))
    loss = model(**batch).loss.detach()
    assert relative_error(loss, expected.detach() / count) < 2e-2


@ranks(2)
def test_accumulated_micro_batches_equal_one_large_batch(rank: Rank) -> None:
    """num_items_in_batch is the step's count, as Trainer passes it."""
    batches = [video_batch(5, frames=2), video_batch(6, frames=3)]
    batches[1]["labels"][:, :-2] = -100
    reference = tiny_model(dtype=torch.float64).train()
    parts = [summed_loss(reference, batch) for batch in batches]
    count = sum(n for _, n in parts)
    (sum(part for part, _ in parts) / count).backward()
    model = tiny_model(dtype=torch.float64).train()
    parallelize(model, build_mesh(2, 1, ulysses_size=2), ParallelPlan(fsdp=False, **EXACT))
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=torch.tensor(count)).loss
        loss.backward()
        total += loss.item()
    reduce_gradients(model)
    assert total == pytest.approx(sum(p.item() for p, _ in parts) / count, rel=1e-10)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        if not name.endswith("k_proj.bias"):
            assert_close(p.grad, q.grad, name=name, tolerance=1e-9)


# ---- plain language models -------------------------------------------------------------------

LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3")


def language_model(model_type: str, **overrides: Any) -> nn.Module:
    values: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if model_type == "mistral":
        values["sliding_window"] = None
    config = CONFIG_MAPPING[model_type](**{**values, **overrides})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).double().train()


@ranks(4)
def test_causal_language_models_need_nothing_of_their_own(rank: Rank) -> None:
    ids = torch.randint(97, (2, 21), generator=torch.Generator().manual_seed(7))
    batch = {"input_ids": ids, "labels": ids}
    for number, model_type in enumerate(LANGUAGE_MODELS):
        tied = number % 2 == 0
        reference = language_model(model_type, tie_word_embeddings=tied)
        expected, count = summed_loss(reference, batch)
        (expected / count).backward()
        model = language_model(model_type, tie_word_embeddings=tied)
        mesh = build_mesh(4, 2, ulysses_size=2)
        parallelize(model, mesh, ParallelPlan(fsdp=tied, **EXACT))
        output = model(**batch, output_logits=True)
        output.loss.backward()
        if not tied:
            reduce_gradients(model)
        assert_close(output.loss.detach(), expected.detach() / count, name=f"{model_type} loss")
        logits = gather_logits(output, (2, 21), mesh)
        assert_close(logits, reference(input_ids=ids).logits, name=model_type, tolerance=1e-9)
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert_close(full(p.grad), q.grad, name=f"{model_type} {name}", tolerance=1e-9)


# ---- everything that is no training step -----------------------------------------------------


@ranks(2)
def test_generation_on_a_parallelised_model_is_that_of_the_plain_one(rank: Rank) -> None:
    """Left padding included: without a context the registered attention has SDPA's masks."""
    batch = video_batch(8, dtype=torch.float32)
    ids = torch.cat([torch.full((1, 4), 256), batch["input_ids"]], dim=1)
    mask = (torch.arange(ids.shape[1]) >= 4).long()[None]
    inputs = {
        "input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False,
        "pixel_values_videos": batch["pixel_values_videos"],
        "video_num_frames": batch["video_num_frames"],
    }  # fmt: skip
    expected = tiny_model().generate(**inputs)
    model = parallelize(tiny_model(), build_mesh(2, 1, ulysses_size=2), ParallelPlan(fsdp=False))
    assert torch.equal(model.generate(**inputs), expected)


@ranks(2)
@pytest.mark.parametrize("adapters", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("shared", [False, True], ids=["data", "sequence"])
def test_generation_on_a_sharded_model_is_that_of_the_plain_one(
    rank: Rank, shared: bool, adapters: bool
) -> None:
    """Before any training step; ranks with data of their own stop at different tokens."""

    def make() -> Any:
        model = tiny_model()
        model.generation_config.eos_token_id = None
        if not adapters:
            return model
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
        return get_peft_model(model, config).eval()

    plain = make()
    mesh = build_mesh(2, 2) if shared else build_mesh(-1)
    model = parallelize(make(), mesh, ParallelPlan(compute_dtype=None))
    inputs = tiny_inputs(tiny_config(), videos=(2,) if shared else (2,) * rank.rank)
    options: dict[str, Any] = {"max_new_tokens": 3 if shared else 2 + 3 * rank.rank}
    with pytest.raises(ValueError, match="needs whole weights"):
        Engine(getattr(model, "get_base_model", lambda: model)(), mesh if shared else None)
    for beams in (1, 2):
        given = {**inputs, **options, "do_sample": False, "num_beams": beams}
        assert torch.equal(model.generate(**given), plain.generate(**given))
    batch = video_batch(2, dtype=torch.float32)
    expected = plain(**batch).loss.detach()
    model.train()
    assert_close(model(**batch).loss.detach(), expected, name="loss after", tolerance=1e-5)


@ranks(2)
def test_a_loader_may_decode_only_its_own_frames(rank: Rank) -> None:
    """The same loss from the rank's own frames as from all of them, and both numbers in errors."""
    mesh = build_mesh(2, 2)
    plan = ParallelPlan(fsdp=False, **EXACT)
    model = parallelize(tiny_model(dtype=torch.float64).train(), mesh, plan)
    batch = video_batch(9, frames=5)
    expected = model(**batch).loss.detach()
    pixels = batch.pop("pixel_values_videos")
    media = plan_media(model.config, mesh.sp_size, {"video": [5]})
    mine = media.local("video", mesh.sp_rank)
    assert 2 <= mine.stop - mine.start <= 3
    local = pixels[mine.start : mine.stop]
    assert torch.equal(model(**batch, local_pixel_values_videos=local).loss, expected)
    with pytest.raises(ValueError, match=rf"has 1 frames, but the plan deals frames {mine.start}"):
        model(**batch, local_pixel_values_videos=local[:1])
    counts = batch.pop("video_num_frames")
    with pytest.raises(ValueError, match="needs video_num_frames"):
        model(**batch, local_pixel_values_videos=local)
    with pytest.raises(ValueError, match="came without labels"):
        model(batch["input_ids"], local_pixel_values_videos=local, video_num_frames=counts)


@ranks(2)
def test_temporal_pooling_groups_stay_together(rank: Rank) -> None:
    """Two pooled copies of each video; a unit of six frames serves strides 2 and 3."""
    config = {"pool_sizes": [[2, 1, 1], [3, 3, 3]]}
    reference = tiny_model(dtype=torch.float64, **config).train()
    frames = [13, 5]
    rows = [reference.config.video_rows(n) for n in frames]
    generator = torch.Generator().manual_seed(11)
    text = torch.randint(250, (12,), generator=generator)
    video = [torch.full((n,), TINY_VIDEO_ID) for n in rows]
    ids = torch.cat([text[:2], video[0], text[2:5], video[1], text[5:]])[None]
    batch = {
        "input_ids": ids, "labels": ids.masked_fill(ids == TINY_VIDEO_ID, -100),
        "pixel_values_videos": torch.randn(18, 3, 20, 20, generator=generator).double(),
        "video_num_frames": torch.tensor(frames),
    }  # fmt: skip
    expected, count = summed_loss(reference, batch)
    (expected / count).backward()
    model = tiny_model(dtype=torch.float64, **config).train()
    parallelize(model, build_mesh(2, 2), ParallelPlan(fsdp=False, **EXACT))
    loss = model(**batch).loss
    loss.backward()
    reduce_gradients(model)
    assert_close(loss.detach(), expected.detach() / count)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        if not name.endswith("k_proj.bias"):
            assert_close(p.grad, q.grad, name=name, tolerance=1e-9)


@ranks(2)
def test_a_frozen_tower_needs_no_backward_exchange(rank: Rank) -> None:
    for trained in ("language_model", "multi_modal_projector"):
        reference, model = (tiny_model(dtype=torch.float64).train() for _ in range(2))
        for each in (reference, model):
            for name, parameter in each.named_parameters():
                parameter.requires_grad_(trained in name)
        batch = video_batch(12, frames=1)
        expected, count = summed_loss(reference, batch)
        (expected / count).backward()
        parallelize(model, build_mesh(2, 1, ulysses_size=2), ParallelPlan(fsdp=False, **EXACT))
        model(**batch).loss.backward()
        reduce_gradients(model)
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if q.grad is not None:
                assert_close(p.grad, q.grad, name=name, tolerance=1e-9)


@ranks(2)
def test_off_is_the_plain_path_bit_for_bit(rank: Rank) -> None:
    """seq_parallel_size -1 and 1 leave forward and attention alone, on a mesh of two dp ranks."""
    batch = video_batch(13, dtype=torch.float32)
    plain = tiny_model().train()
    expected = plain(**batch)
    expected.loss.backward()
    for size in (-1, 1):
        model = tiny_model().train()
        plan = ParallelPlan(fsdp=False, activation_checkpointing=False)
        assert parallelize(model, build_mesh(size), plan) is model
        assert "forward" not in vars(model)
        output = model(**batch)
        output.loss.backward()
        assert type(output) is type(expected) and torch.equal(output.logits, expected.logits)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)


# ---- FSDP ------------------------------------------------------------------------------------


@ranks(4)
def test_nothing_is_wrapped_twice(rank: Rank) -> None:
    """Text layers and the model are groups, once each; parameters are sharded once, names kept."""
    model = tiny_model().train()
    names = [name for name, _ in model.named_parameters()]
    mesh = build_mesh(2, 2)
    parallelize(model, mesh)
    layers = model.model.language_model.layers
    wrapped = {id(module) for module in model.modules() if isinstance(module, FSDPModule)}
    assert wrapped == {id(model), *map(id, layers)}
    assert [name for name, _ in model.named_parameters()] == names
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor) and not isinstance(parameter.to_local(), DTensor)
        assert parameter.device_mesh.size() == 4
    with pytest.raises(ValueError, match="parallelized before"):
        parallelize(model, mesh)
    del vars(model)["_longvila_parallel"]
    with pytest.raises(ValueError, match="sharded by FSDP already"):
        parallelize(model, mesh)


@ranks(4)
def test_replicated_shards_equal_one_process(rank: Rank) -> None:
    """HSDP: shards within a sequence-parallel group, replicas over data parallel."""
    batches = [video_batch(1, frames=2), video_batch(2, frames=3)]
    reference = tiny_model(dtype=torch.float64).train()
    expected = step_by_one_process(reference, batches, lr=1e-3)
    model = tiny_model(dtype=torch.float64).train()
    mesh = build_mesh(2, 2)
    parallelize(model, mesh, ParallelPlan(fsdp_replicate=True, **EXACT))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = model(**batches[mesh.dp_rank]).loss
    loss.backward()
    optimizer.step()
    assert_close(loss.detach(), expected)
    assert next(model.parameters()).device_mesh.shape == (2, 2)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        if not name.endswith("k_proj.bias"):
            assert_close(full(p), q, name=name, tolerance=1e-9)


@ranks(4)
def test_a_data_parallel_rank_without_media_joins_the_tower(rank: Rank) -> None:
    """FSDP reduces in backward: every rank needs the same gradients, or the collectives differ."""
    text = {"input_ids": torch.arange(12)[None], "labels": torch.arange(12)[None]}
    reference = tiny_model(dtype=torch.float64).train()
    expected = step_by_one_process(reference, [video_batch(14, frames=1), text], lr=1e-3)
    model = tiny_model(dtype=torch.float64).train()
    mesh = build_mesh(2, 2)
    parallelize(model, mesh, ParallelPlan(**EXACT))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = model(**(text if mesh.dp_rank else video_batch(14, frames=1))).loss
    loss.backward()
    optimizer.step()
    assert_close(loss.detach(), expected)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        if not name.endswith("k_proj.bias"):
            assert_close(full(p), q, name=name, tolerance=1e-9)


@ranks(4)
def test_ddp_may_wrap_where_every_rank_encodes(rank: Rank) -> None:
    """One frame on two ranks, none on the other data-parallel rank: DDP waits for every hook."""
    text = {"input_ids": torch.arange(12)[None], "labels": torch.arange(12)[None]}
    reference = tiny_model(dtype=torch.float64).train()
    parts = [summed_loss(reference, batch) for batch in (video_batch(14, frames=1), text)]
    expected = sum(part for part, _ in parts) / sum(count for _, count in parts)
    expected.backward()
    model = tiny_model(dtype=torch.float64).train()
    mesh = build_mesh(2, 2)
    plan = ParallelPlan(fsdp=False, encode_on_every_rank=True, **EXACT)
    wrapped = DistributedDataParallel(parallelize(model, mesh, plan))
    for _ in range(2):  # the second call would fail if the first had left a hook waiting
        wrapped.zero_grad()
        loss = wrapped(**(text if mesh.dp_rank else video_batch(14, frames=1))).loss
        loss.backward()
    assert_close(loss.detach(), expected.detach())
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        if not name.endswith("k_proj.bias"):
            assert_close(p.grad, q.grad, name=name, tolerance=1e-9)


@ranks(2)
def test_an_encoder_sharded_layer_by_layer_is_refused(rank: Rank) -> None:
    """As a trainer's automatic wrapping may do; ranks with other numbers of frames would hang."""
    mesh = build_mesh(2, 2)
    model = parallelize(tiny_model().train(), mesh, ParallelPlan(fsdp=False))
    fully_shard(model.model.vision_tower.encoder.layers[0], mesh=mesh.dp_sp_mesh)
    with pytest.raises(ValueError, match=r"encoder\.layers\.0 is an FSDP group of its own"):
        model(**video_batch(1, dtype=torch.float32))


@ranks(2)
def test_a_step_without_media_leaves_the_tower_without_gradients(rank: Rank) -> None:
    """As on one GPU, where an optimiser then does not decay it."""
    model = tiny_model(dtype=torch.float64).train()
    parallelize(model, build_mesh(2, 2), ParallelPlan(**EXACT))
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is None for p in model.model.vision_tower.parameters())
    assert all(p.grad is None for p in model.model.multi_modal_projector.parameters())
    assert model.lm_head.weight.grad is not None


@ranks(2)
def test_heads_in_chunks_change_nothing(rank: Rank) -> None:
    batch = video_batch(16)
    mesh = build_mesh(2, 1, ulysses_size=2)
    losses = []
    for chunks in (1, 2):
        model = tiny_model(dtype=torch.float64).train()
        parallelize(model, mesh, ParallelPlan(fsdp=False, head_chunks=chunks, **EXACT))
        assert last_step_plan(model) is None
        losses.append(model(**batch).loss.detach())
        plan = last_step_plan(model)
        assert plan is not None and plan.context.head_chunks == chunks
        assert plan.media.frames.describe() == "3 units over 2 ranks [2, 1], 75%"
    assert_close(losses[1], losses[0])


@ranks(2)
def test_a_trained_tower_runs_twice_and_a_frozen_one_once(rank: Rank) -> None:
    """Recomputation pays for the activations of a trained tower; a frozen one has none."""
    batch = video_batch(15, frames=4, dtype=torch.float32)
    mesh = build_mesh(2, 2)
    for frozen, runs in ((False, 2), (True, 1)):
        model = tiny_model(vision_batch_size=1).train()
        model.model.vision_tower.requires_grad_(not frozen)
        parallelize(model, mesh, ParallelPlan(fsdp=False))
        calls = []
        model.model.vision_tower.register_forward_hook(lambda *_, seen=calls: seen.append(1))
        model(**batch).loss.backward()
        assert len(calls) == 2 * runs, "two frames a rank, one at a time"
        assert not model.model.gradient_checkpointing
