"""The two-stage forward of MM-SP on a Hugging Face model: frames dealt, then tokens dealt.

    host     documents, layout, who encodes what, where rows go     plan_step
    stage 1  each rank encodes its own frames                      tower + projector
             one all-to-all-v takes each row to its token's owner  exchange_rows
    stage 2  each rank embeds its own tokens, puts the rows in place
             the text model runs on local tokens                    attention over all ranks
             head and cross-entropy in tiles, on rows with a target
             one all-reduce makes the global mean                   global_mean

The plan follows from what every rank of the sequence-parallel group has: the ids, the mask, the
documents and the number of frames of each item. Pixels are not part of it, so a rank needs only its
own: give all of them (``pixel_values_videos``; each rank slices) or only the rank's
(``local_pixel_values_videos``, decoded by a loader that asked `plan_media`).

Memory: no rank holds the fused sequence. Frames go through the tower in micro-batches that are
recomputed in backward, so activations do not grow with the number of frames; rows are S/R.

Ranks without frames join the row exchange with empty tensors and need not run the tower. The one
exception are parameters whose gradients are combined *during* backward by hooks (FSDP, DDP): there
all ranks must produce a gradient for the same parameters, so a rank without frames encodes one
blank unit and uses none of its rows, which gives exact zeros. The unit is skipped where no rank of
the whole world has frames, so that a step without media leaves the tower untouched, as on one GPU.

A call without labels is not a training step: it takes the model's own forward, on this rank alone
(generation, evaluation of single prompts). Ask for ``output_logits=True`` to get this rank's logits
of a sequence-parallel pass.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from longvila.log import log_once
from longvila.memory.cross_entropy import tiled_cross_entropy
from longvila.model.conversation import check_targets
from longvila.parallel.encode import encode_recomputed
from longvila.parallel.families import Family, MediaKind
from longvila.parallel.hf_attention import NAME, SPStep, check_calls, lowered, sentinel_mask
from longvila.parallel.plan import StepPlan, plan_step
from longvila.parallel.plan import plan_media as plan_media
from longvila.parallel.sharding import refuse_late_parameters
from longvila.sp.loss import (
    IGNORE_INDEX,
    GradientReduction,
    check_num_items,
    count_targets,
    global_mean,
)
from longvila.sp.mesh import SPMesh
from longvila.sp.tokens import shift_labels
from longvila.sp.vision import exchange_rows, place_rows


@dataclass
class SPCausalLMOutput(ModelOutput):
    """Output of a sequence-parallel pass.

    Attributes:
        loss: Mean over all targets of all ranks, the same on every rank.
        logits: ``(1, L, V)`` of this rank's tokens, where asked for.
        token_indices: ``(L,)`` where those tokens stand in the flattened ``(B * columns)`` batch;
            -1 for filler.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    token_indices: Tensor | None = None


# ---- the forward -----------------------------------------------------------------------------

_OWN = ("shift_labels", "num_items_in_batch", "document_lengths", "output_logits")
#: Arguments of a model's own forward that mean nothing to a training step, if left at these.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_cache": (None, False),
    "return_dict": (None, True),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "logits_to_keep": (0,),
}
#: Inputs of a token each that the ranks of a group must share.
_SHARED = ("input_ids", "attention_mask", "position_ids", "labels", "shift_labels")


def _checksum(values: Tensor | None, device: torch.device) -> Tensor:
    """A number that depends on values and their places; -1 for None."""
    if values is None:
        return torch.tensor(-1, device=device)
    flat = values.to(device, torch.int64).flatten()
    places = torch.arange(1, flat.numel() + 1, device=device) % 1_000_003
    return (flat * places).sum() + flat.numel()


@dataclass(frozen=True)
class TwoStageOptions:
    """How the two-stage forward runs.

    Attributes:
        head_chunks: Parts in which attention exchanges and computes heads.
        loss_tile_rows: Rows of the head and the cross-entropy computed at once.
        gradient_reduction: How parameter gradients are combined over all ranks afterwards.
        encode_on_every_rank: Whether a rank without frames encodes a blank unit; needed where
            gradients are combined by hooks during backward. None for where FSDP or DDP is found.
        recompute_media: Whether the encoder runs again in backward, a micro-batch at a time.
        checked_steps: For how many steps the ranks of a sequence-parallel group compare checksums
            of their batches, to catch a sampler that deals them different samples.
    """

    head_chunks: int
    loss_tile_rows: int
    gradient_reduction: GradientReduction
    encode_on_every_rank: bool | None
    recompute_media: bool
    checked_steps: int


class TwoStageForward:
    """A model's forward over a sequence-parallel mesh; see the module's text.

    Args:
        model: The model whose forward this replaces.
        family: Where its parts are.
        mesh: The mesh.
        options: How to run.
        original: The model's own forward, for calls that are no training step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        mesh: SPMesh,
        options: TwoStageOptions,
        original: Callable[..., Any],
    ) -> None:
        self.model, self.family, self.mesh, self.options = model, family, mesh, options
        self.original = original
        self.signature = inspect.signature(original)
        self.steps = 0
        self.encodes = False
        self.in_backward = False
        self.losses = 0
        self.last_plan: StepPlan | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a training step over the mesh, or anything else on this rank alone."""
        own = {name: kwargs.pop(name) for name in _OWN if name in kwargs}
        for kind in self.family.media:
            if f"local_{kind.pixels}" in kwargs:
                own[f"local_{kind.pixels}"] = kwargs.pop(f"local_{kind.pixels}")
        bound = self.signature.bind_partial(*args, **kwargs)
        given = dict(bound.arguments)
        for parameter in self.signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        training = given.get("labels") is not None or own.get("shift_labels") is not None
        if not training and not own.get("output_logits"):
            if any(name.startswith("local_") for name in own):
                raise ValueError(
                    "a rank's own pixels came without labels; only a sequence-parallel pass can "
                    "use them: give labels or output_logits=True"
                )
            passed = {k: v for k, v in own.items() if k != "output_logits" and v is not None}
            return self.original(*args, **kwargs, **passed)
        return self._run(given, own)

    # ---- inputs

    def _read(self, given: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        """Check the arguments of a step and return those that are not None."""
        batch = {k: v for k, v in {**given, **own}.items() if v is not None}
        known = {"input_ids", "labels", "attention_mask", "position_ids", *_OWN, *_NEUTRAL}
        known |= set(self.family.inputs)
        for kind in self.family.media:
            known |= {kind.pixels, kind.counts, f"local_{kind.pixels}"}
        unknown = sorted(set(batch) - known)
        if unknown:
            raise ValueError(
                f"a sequence-parallel step does not take {unknown}; it starts from input_ids and "
                f"pixels and takes {sorted(known)}"
            )
        for name, neutral in _NEUTRAL.items():
            value = batch.get(name)
            if isinstance(value, Tensor) or value not in (None, *neutral):
                raise ValueError(f"a sequence-parallel step cannot serve {name}={value!r}")
        if "input_ids" not in batch or batch["input_ids"].dim() != 2:
            shape = tuple(batch["input_ids"].shape) if "input_ids" in batch else None
            raise ValueError(f"input_ids must be (B, columns), got {shape}")
        for name in ("shift_labels", "labels"):
            if name in batch and batch[name].shape != batch["input_ids"].shape:
                raise ValueError(
                    f"{name} must have the shape of input_ids, {tuple(batch['input_ids'].shape)}, "
                    f"got {tuple(batch[name].shape)}"
                )
        return self.family.prepare(self.model.config, batch)

    def _counts(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """What describes each item, by kind, from counts or from the shape of the pixels."""
        counts: dict[str, list[Any]] = {}
        for kind in self.family.media:
            if kind.counts in batch:
                items = torch.atleast_1d(torch.as_tensor(batch[kind.counts])).tolist()
                counts[kind.name] = [tuple(n) if isinstance(n, list) else n for n in items]
            elif kind.pixels in batch:
                counts[kind.name] = kind.default_counts(batch[kind.pixels].shape[0])
            elif f"local_{kind.pixels}" in batch:
                raise ValueError(
                    f"local_{kind.pixels} needs {kind.counts}, the frames of all items: a rank's "
                    "own pixels do not tell what the other ranks have"
                )
        return counts

    def _check_same_batch(self, batch: dict[str, Any], counts: dict[str, list[Any]]) -> None:
        """All ranks of a group must plan for the same batch, or the exchanges do not match."""
        self.steps += 1
        if self.steps > self.options.checked_steps or self.mesh.sp_size == 1:
            return
        shared = {name: batch.get(name) for name in _SHARED}
        items = [torch.tensor(counts[name], dtype=torch.int64) for name in sorted(counts)]
        items.append(torch.as_tensor(batch.get("document_lengths", -1)))
        separated = [torch.cat([torch.tensor([-1]), each.flatten()]) for each in items]
        shared["frames or documents"] = torch.cat(separated)
        device = self.model.get_output_embeddings().weight.device
        sums = [_checksum(values, device) for values in shared.values()]
        both = torch.stack([*sums, *(-each for each in sums)])
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.mesh.sp_group)
        highest, lowest = both.view(2, -1).tolist()
        differ = [name for name, a, b in zip(shared, highest, lowest, strict=True) if a != -b]
        if differ:
            raise ValueError(
                f"the ranks of a sequence-parallel group got different batches (in "
                f"{', '.join(differ)}; this is dp rank {self.mesh.dp_rank}, sp rank "
                f"{self.mesh.sp_rank}, input_ids {tuple(batch['input_ids'].shape)}, frames "
                f"{counts}); the sampler must deal by dp rank, not by global rank"
            )

    # ---- stages

    def _run(self, given: dict[str, Any], own: dict[str, Any]) -> SPCausalLMOutput:
        self._check_backward_ended()
        refuse_late_parameters(self.family.layers(self.model))
        batch = self._read(given, own)
        plan, hidden = self.hidden_states(batch)
        output = self._finish(plan, batch, hidden)
        for result in (output.loss, output.logits):
            if result is not None and result.requires_grad:
                result.register_hook(self._backward_begins)
        return output

    def _backward_begins(self, gradient: Tensor) -> None:
        self.in_backward = True
        # Called at the end of a backward pass, but not of one that raises.
        ended = functools.partial(setattr, self, "in_backward", False)
        torch.autograd.Variable._execution_engine.queue_callback(ended)

    def _check_backward_ended(self) -> None:
        # FSDP's root group is then gathered, beside the optimiser's shards, and never reduced.
        if not self.in_backward or torch._C._current_graph_task_id() != -1:
            return
        if any(isinstance(module, FSDPModule) for module in self.model.modules()):
            raise RuntimeError(
                "the backward pass of an earlier step did not come to its end, and FSDP keeps "
                "parts of it that would spoil later steps: begin again from the last save"
            )
        self.in_backward = False

    def hidden_states(
        self, batch: dict[str, Any], *, open_cache: Callable[[StepPlan], Any] | None = None
    ) -> tuple[StepPlan, Tensor]:
        """Run both stages up to the last hidden state of this rank's tokens.

        Args:
            batch: Arguments of a step that are not None: ids, mask, pixels and counts.
            open_cache: Given the plan, returns the transformers cache that the layers write their
                keys and values of local tokens to; None to keep none.

        Returns:
            The plan, and ``(L, M)`` hidden states in the order of the layout.

        Raises:
            ValueError: If ranks have different batches, media do not fit the ids, or the text model
                does not attend over all ranks.

        Comm: One all-to-all-v of media rows; a layer's is that of `sp_attention`.
        """
        text = self.family.text_model(self.model)
        if text.config._attn_implementation != NAME:
            check_calls(
                0,
                expected=text.config.num_hidden_layers,
                implementation=text.config._attn_implementation,
            )
        counts = self._counts(batch)
        self._check_same_batch(batch, counts)
        positions = self.family.position_ids(self.model, batch)
        if positions is None:
            positions = batch.get("position_ids")
        ordinary = positions
        if positions is not None and positions.dim() == 3:
            ordinary = positions[0] if positions.shape[0] == 4 else None
            positions = positions[-3:]
        plan = plan_step(
            self.model.config,
            self.mesh,
            batch["input_ids"],
            counts=counts,
            attention_mask=batch.get("attention_mask"),
            position_ids=ordinary,
            document_lengths=batch.get("document_lengths"),
            head_chunks=self.options.head_chunks,
        )
        self.last_plan = plan
        layout, rank = plan.context.layout, self.mesh.sp_rank
        device = self.model.get_output_embeddings().weight.device
        local_ids = layout.shard(plan.input_ids, rank).to(device)
        embeds = self.family.embed(self.model, local_ids)
        text_inputs: dict[str, Any] = {}
        rows = self._media_rows(plan, batch, embeds)
        if rows is not None:
            assert plan.exchange is not None
            exchange = plan.exchange.to(device)
            rows, text_inputs = self.family.text_inputs(rows, exchange.destination, embeds)
            embeds = place_rows(embeds, rows, exchange)
        if open_cache is not None:
            text_inputs["past_key_values"] = open_cache(plan)
        step = SPStep(plan.context)
        hidden = text(
            inputs_embeds=embeds[None],
            attention_mask=sentinel_mask(device),
            position_ids=self._local_positions(plan, positions).to(device),
            use_cache=open_cache is not None,
            sp_context=step,
            **text_inputs,
        ).last_hidden_state[0]
        check_calls(
            step.calls,
            expected=text.config.num_hidden_layers,
            implementation=text.config._attn_implementation,
        )
        return plan, hidden

    def _local_positions(self, plan: StepPlan, positions: Tensor | None) -> Tensor:
        """``(1, L)`` positions of local tokens, or ``(3, 1, L)`` for rotary embeddings in 3-D."""
        layout, rank = plan.context.layout, self.mesh.sp_rank
        if positions is None or positions.dim() == 2:
            return layout.shard(plan.packed.position_ids, rank)[None]
        flat = torch.stack([plan.packed.take(each, filler=0) for each in positions])
        return layout.shard(flat, rank, dim=1)[:, None]

    def _media_rows(self, plan: StepPlan, batch: dict[str, Any], embeds: Tensor) -> Tensor | None:
        """Stage 1: encode this rank's frames, send the rows, return what its tokens need."""
        if self.steps <= self.options.checked_steps:
            self._check_groups()
        trainable = any(p.requires_grad for p in self.family.media_parameters(self.model))
        differentiable = trainable and torch.is_grad_enabled()
        has_media = plan.media.frames.num_units > 0
        run_tower = has_media
        blank = differentiable and self._encodes_on_every_rank()
        if blank:
            run_tower = self._media_anywhere(has_media, embeds.device)
        if not run_tower or plan.exchange is None:
            return None
        try:
            encoded = self._encode_local(plan, batch)
        except Exception:
            self._tell_failure(True, embeds.device)
            raise
        self._tell_failure(False, embeds.device)
        if not encoded and blank:
            kind = self.family.media[0]
            pixels, shapes = kind.blank(self.model)
            # No row of it is used, so the encoder's gradients are there, and zero.
            encoded = [self._encode_units(kind, pixels, (pixels.shape[0],), shapes)[:0]]
        width = embeds.shape[-1] * self.family.row_multiple(self.model.config)
        rows = torch.cat(encoded) if encoded else embeds.new_empty(0, width)
        return exchange_rows(
            rows.to(embeds.dtype),
            plan.exchange.to(embeds.device),
            group=self.mesh.sp_group,
            differentiable=differentiable,
        )

    def _check_groups(self) -> None:
        """Refuse FSDP groups that ranks would gather a different number of times."""
        for part in self.family.vision_modules(self.model):
            for name, module in part.named_modules():
                if isinstance(module, FSDPModule):
                    raise ValueError(
                        f"{'.'.join(filter(None, (type(part).__name__, name)))} is an FSDP group "
                        "of its own; ranks call the encoder as often as they have frames, so its "
                        "gathers would not match between ranks. Leave the encoder in the root "
                        "group: wrap the text layers and the model only, as "
                        "parallelize(fsdp=True) does"
                    )

    def _tell_failure(self, failed: bool, device: torch.device) -> None:
        """Raise if another rank failed and will not send its rows; until all succeeded once.

        Pictures of a wrong size or type show in the first step, and only where they are encoded.
        """
        if self.mesh.sp_size == 1 or self.encodes:
            return
        flag = torch.tensor(int(failed), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.mesh.sp_group)
        self.encodes = not bool(flag.item())
        if not (failed or self.encodes):
            raise RuntimeError(
                "another rank of the sequence-parallel group could not encode its frames; its "
                f"error says why ({self.mesh.describe_rank()} could)"
            )

    def _encodes_on_every_rank(self) -> bool:
        if self.options.encode_on_every_rank is not None:
            return self.options.encode_on_every_rank
        # Not public; without it the option has to be set.
        around = getattr(DistributedDataParallel, "_get_active_ddp_module", lambda: None)
        in_ddp = around() is not None
        return in_ddp or any(isinstance(module, FSDPModule) for module in self.model.modules())

    def _media_anywhere(self, here: bool, device: torch.device) -> bool:
        """Whether any rank of the world has media in this step; asks only if this one has none."""
        if self.mesh.dp_size == 1:
            return here
        flag = torch.tensor(float(here), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.mesh.dp_sp_group)
        return here or bool(flag.item())

    def _encode_local(self, plan: StepPlan, batch: dict[str, Any]) -> list[Tensor]:
        """Rows of this rank's frames, kind by kind in the order of the plan."""
        parameter = self.model.get_output_embeddings().weight
        encoded: list[Tensor] = []
        for kind in self.family.media:
            if kind.name not in plan.media.units:
                continue
            local = plan.media.local(kind.name, self.mesh.sp_rank)
            number = local.stop - local.start
            own, whole = batch.get(f"local_{kind.pixels}"), batch.get(kind.pixels)
            total = sum(plan.media.units[kind.name].frames)
            if own is not None and own.shape[0] != number:
                raise ValueError(
                    f"local_{kind.pixels} has {own.shape[0]} frames, but the plan deals frames "
                    f"{local.start} to {local.stop} to sp rank {self.mesh.sp_rank}"
                )
            if own is None and (0 if whole is None else whole.shape[0]) != total:
                raise ValueError(
                    f"{kind.pixels} has {0 if whole is None else whole.shape[0]} frames, but "
                    f"{kind.counts} adds up to {total}"
                )
            if number == 0:
                continue
            if own is not None:
                pixels: Tensor = own
            else:
                assert whole is not None
                pixels = whole[local.start : local.stop]
            pixels = pixels.to(parameter.device)
            encoded.append(self._encode_units(kind, pixels, local.unit_frames, local.unit_shapes))
        return encoded

    def _encode_units(
        self,
        kind: MediaKind,
        pixels: Tensor,
        unit_frames: Sequence[int],
        unit_shapes: Sequence[Any],
    ) -> Tensor:
        encode = functools.partial(kind.encode, self.model)
        modules = self.family.vision_modules(self.model)
        trained = [p for p in self.family.media_parameters(self.model) if p.requires_grad]
        if not self.options.recompute_media:
            return encode(pixels, unit_shapes)
        encode_all = functools.partial(
            encode_recomputed,
            encode,
            pixels,
            unit_frames,
            frames_per_call=kind.frames_per_call(self.model.config),
            unit_shapes=unit_shapes,
        )
        if any(p.requires_grad for p in modules[0].parameters()):
            return encode_all(parameters=trained)
        # A frozen tower has no graph and should not run twice; its features are kept.
        before = self.family.checkpoint_media(self.model, True)
        try:
            return encode_all(parameters=())
        finally:
            self.family.checkpoint_media(self.model, before)

    def _finish(self, plan: StepPlan, batch: dict[str, Any], hidden: Tensor) -> SPCausalLMOutput:
        """Loss over all ranks, and this rank's logits where asked for."""
        layout, rank = plan.context.layout, self.mesh.sp_rank
        head = self.model.get_output_embeddings()
        if isinstance(head.weight, DTensor):
            raise ValueError(
                "the language-model head is an FSDP group of its own, but the tiled loss reads its "
                "weight from outside: leave it in the root group"
            )
        loss = logits = None
        targets = self._targets(plan, batch)
        if targets is not None and "_loss_function" in vars(self.model):
            # Where transformers keeps what a caller set.
            raise ValueError(
                "the model was given a loss_function, but a sequence-parallel step has the tiled "
                "cross-entropy alone: ask for output_logits=True, and apply it as the guide says"
            )
        if targets is not None:
            check_targets(targets, head.weight.shape[0])
            items, everyone = batch.get("num_items_in_batch"), self.mesh.dp_sp_group
            self.losses += 1
            if self.losses <= self.options.checked_steps:
                check_num_items(items, group=everyone, device=hidden.device)
            on_host = layout.shard(targets, rank)
            # Known on the host, so that the device is not asked how many rows have a target.
            target_rows = (on_host != IGNORE_INDEX).nonzero().flatten()
            local = on_host.to(hidden.device)
            local_sum = tiled_cross_entropy(
                lowered(hidden),
                head.weight,
                local,
                tile_rows=self.options.loss_tile_rows,
                bias=head.bias,
                target_rows=target_rows.to(hidden.device),
            )
            loss = global_mean(
                local_sum,
                count_targets(local),
                group=everyone,
                gradient_reduction=self.options.gradient_reduction,
                num_items=items,
            )
        if batch.get("output_logits"):
            logits = head(hidden[None])  # no view: hooks on a view would be lost in place
        return SPCausalLMOutput(
            loss=loss, logits=logits, token_indices=layout.shard(plan.packed.indices, rank)
        )

    def _targets(self, plan: StepPlan, batch: dict[str, Any]) -> Tensor | None:
        """``(S,)`` targets of the whole packed sequence, shifted before anything is cut."""
        shifted = "shift_labels" in batch
        given = batch.get("shift_labels" if shifted else "labels")
        if given is None:
            return None
        labels = plan.packed.take(given, filler=IGNORE_INDEX)
        if self.steps <= self.options.checked_steps and "attention_mask" in batch:
            real, counted = batch["attention_mask"].cpu() != 0, given.cpu() != IGNORE_INDEX
            if not shifted:
                real, counted = real[:, 1:] & real[:, :-1], counted[:, 1:]
            if bool((counted & ~real).any()):
                log_once(
                    __name__,
                    logging.WARNING,
                    "what padding predicts, or is predicted to be, is no target of a "
                    "sequence-parallel step; the model's own forward counts it: set labels at "
                    f"padding, and of the token behind it, to {IGNORE_INDEX}",
                )
        return labels if shifted else shift_labels(labels, plan.packed.lengths)


def gather_logits(output: SPCausalLMOutput, shape: tuple[int, int], mesh: SPMesh) -> Tensor:
    """Return the logits of the whole batch on every rank; for tests and small evaluations.

    Args:
        output: What this rank's pass returned, with logits.
        shape: ``(B, columns)`` of the batch.
        mesh: The mesh.

    Returns:
        ``(B, columns, V)`` without gradient; zero at padding.

    Raises:
        ValueError: If the output has no logits.

    Comm: One all-gather of objects over the sequence-parallel group.
    """
    if output.logits is None or output.token_indices is None:
        raise ValueError("the output has no logits: call the model with output_logits=True")
    parts: list[Any] = [(output.token_indices.cpu(), output.logits[0].detach().cpu())]
    if mesh.sp_group is not None:
        mine, parts = parts[0], [None] * mesh.sp_size
        dist.all_gather_object(parts, mine, group=mesh.sp_group)
    whole = output.logits.new_zeros(shape[0] * shape[1], output.logits.shape[-1])
    for indices, logits in parts:
        real = indices >= 0
        whole[indices[real].to(whole.device)] = logits[real].to(whole.device)
    return whole.view(*shape, -1)
