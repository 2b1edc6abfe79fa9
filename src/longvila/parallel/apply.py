"""Sequence parallelism, checkpointing and FSDP put on a model from outside.

    mesh = build_mesh(seq_parallel_size=8, num_heads=28, num_kv_heads=4)
    model = parallelize(model, mesh)
    model(**batch).loss.backward()          # any optimiser, any loop

`parallelize` does, in this order:

1. **Attention**: the text model alone is told to use ``longvila_sp``; a vision tower keeps its own,
   but one that attends in units does so in one call (`longvila.parallel.tower_attention`). Matrix
   products of an unlucky shape get a better one (`longvila.parallel.products`).
2. **Forward**: this one model object gets the two-stage forward (`longvila.parallel.mmsp`) as an
   attribute of the instance. Calls, hooks and wrappers all go through ``model(...)``, which looks
   there first; the class, other models and transformers itself are untouched, the model's type,
   parameter names and ``state_dict`` stay what they were, and deleting the attribute undoes it. A
   wrapper module would rename every parameter and hide ``generate``, ``config`` and
   ``save_pretrained``; a subclass would change the type that checkpoints and adapters look at.
3. **Memory**: each text layer is recomputed in backward, its attention is not
   (`longvila.memory.checkpoint`); frames are recomputed micro-batch by micro-batch. The last
   ``plain_layers``, or all where checkpointing is off, keep what their backward needs, on the host
   where there is an offload. MLPs run in tiles, and they, norms and projections through
   ``torch.compile``, where the plan says so; both are attributes of the instances, as the forward
   is. The compiled MLP of a layer that is recomputed ends before its last projection, whose product
   the second run then leaves out. In towers that attend in units, norms without a kernel of their
   own and gated MLPs are compiled, and attention but for the packed call.
4. **FSDP2**: each text layer is one group over all ranks (data and sequence parallel alike), and
   everything else (embedding, norm, head, tower, projector) is the root group, which stays gathered
   for the step. So ranks may call the tower as often as they have frames, and the head's weight is
   there for the tiled loss. Cost of the root group: its parameters once in the compute type and its
   gradients, on every rank. With ``fsdp=False`` nothing is wrapped: a trainer does it, or gradients
   are combined by `reduce_gradients`.

With ``seq_parallel_size`` -1 or 1 the mesh is off and steps 1 and 2 are left out, so that the plain
path stays bit for bit what it is; ``two_stage=True`` asks for it anyway (the tiled loss and the
global token mean are of use on one GPU and in plain data parallelism).

It does not move the model to a device, build an optimiser or clip gradients.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from longvila.memory.checkpoint import checkpoint, store
from longvila.memory.offload import Offload
from longvila.memory.tiled import linear_unless_unwanted, tiled_apply
from longvila.parallel.families import Family, base_model, find_family
from longvila.parallel.hf_attention import NAME, cut_compiled_layers_here
from longvila.parallel.mmsp import TwoStageForward, TwoStageOptions
from longvila.parallel.plan import StepPlan
from longvila.parallel.products import align_mlps
from longvila.parallel.sharding import shard, sharded_modules
from longvila.parallel.tower_attention import UNIT_TOWER, compile_around_units
from longvila.sp.loss import GradientReduction
from longvila.sp.mesh import SPMesh

_STATE = "_longvila_parallel"
_NO_COPY = (
    "a copy of a parallelized model would run the original's forward: copy the model before, or "
    "unparallelize it, and parallelize both"
)
#: Gradients that are combined in one all-reduce; a model has hundreds, most of them small.
_BUCKET_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """How a model is put on a mesh.

    Attributes:
        fsdp: Whether parameters are sharded over all ranks here; False where a trainer wraps.
        fsdp_replicate: Whether parameters are sharded within each sequence-parallel group only and
            replicated over the data-parallel axis (HSDP, for several nodes).
        parameter_dtype: Type of the sharded parameters; None leaves what the model has.
        compute_dtype: Type that parameters are gathered in; None for that of the shards.
        reduce_dtype: Type that gradients are reduced in; None for the compute type.
        keep_gathered: Whether layers stay gathered from forward to backward: every parameter is
            gathered and cast once a step instead of twice (and once for each micro-batch of
            frames), and the whole model stands in memory in the compute type.
        activation_checkpointing: Whether text layers and frames are recomputed in backward.
        plain_layers: Text layers, the last ones, that are not recomputed: the backward pass wants
            them first, and each saves its products for its memory.
        offload: Host memory in which checkpoints, and what plain layers save, wait for the backward
            pass; None for none.
        mlp_tile_rows: Tokens whose MLP is computed at once; None for all.
        compile_modules: Whether norms, MLPs and what surrounds attention (rotary embedding) in the
            text model and in towers that attend in units go through ``torch.compile``, which joins
            what is not a matrix product into few passes over memory. Rounds differently.
        pad_mlps: Whether MLPs whose inner width is no multiple of 16 bytes run on padded copies of
            their weights; True pads everywhere, None on CUDA with the two-stage forward.
        head_chunks: Parts in which attention exchanges and computes heads, so that one part travels
            while another is computed.
        loss_tile_rows: Rows of head and cross-entropy computed at once.
        gradient_reduction: How gradients are combined over ranks after backward; FSDP and DDP
            take the mean.
        encode_on_every_rank: Whether ranks without frames run the tower on a blank unit; None for
            where FSDP or DDP is found.
        two_stage: Whether the two-stage forward replaces the model's; None for where the mesh has
            sequence parallelism.
        checked_steps: Steps in which ranks compare checksums of their batches.
    """

    fsdp: bool = True
    fsdp_replicate: bool = False
    parameter_dtype: torch.dtype | None = torch.float32
    compute_dtype: torch.dtype | None = torch.bfloat16
    reduce_dtype: torch.dtype | None = torch.float32
    keep_gathered: bool = False
    activation_checkpointing: bool = True
    plain_layers: int = 0
    offload: Offload | None = None
    mlp_tile_rows: int | None = None
    compile_modules: bool = False
    pad_mlps: bool | None = None
    head_chunks: int = 1
    loss_tile_rows: int = 4096
    gradient_reduction: GradientReduction = "mean"
    encode_on_every_rank: bool | None = None
    two_stage: bool | None = None
    checked_steps: int = 8


@dataclass
class _State:
    """What was done to a model, so that it can be undone."""

    family: Family
    mesh: SPMesh
    plan: ParallelPlan
    undo: list[Callable[[], object]]
    two_stage: TwoStageForward | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _State:
        if self.two_stage is not None or self.plan.pad_mlps:
            raise TypeError(_NO_COPY)
        # Undoing the copy is about the copy's modules, which the memo has.
        return _State(self.family, self.mesh, self.plan, copy.deepcopy(self.undo, memo))


def is_parallelized(model: nn.Module) -> bool:
    """Return whether `parallelize` was applied to a model."""
    return _STATE in vars(base_model(model))


def _state_of(model: nn.Module) -> _State:
    base = base_model(model)
    if not is_parallelized(model):
        raise ValueError(f"{type(base).__name__} was not parallelized")
    state: _State = vars(base)[_STATE]
    return state


def last_step_plan(model: nn.Module) -> StepPlan | None:
    """Return the plan of the last sequence-parallel step, for logs: who encoded and held what.

    Raises:
        ValueError: If the model was not parallelized.
    """
    two_stage = _state_of(model).two_stage
    return None if two_stage is None else two_stage.last_plan


def parallelize(model: nn.Module, mesh: SPMesh, plan: ParallelPlan | None = None) -> nn.Module:
    """Put a model on a mesh, in place, and return it.

    Args:
        model: A model of a known family with its head, or PEFT around one.
        mesh: From `longvila.sp.mesh.build_mesh`.
        plan: What to apply.

    Returns:
        The same object.

    Raises:
        TypeError: If the model is of no known family, or the mesh is another library's.
        ValueError: If it was put on a mesh before, is wrapped already, or its configuration asks
            for what sequence parallelism lacks.

    Comm: With FSDP that of ``fully_shard``; else none.
    """
    plan = plan or ParallelPlan()
    base = base_model(model)
    if not isinstance(mesh, SPMesh):
        raise TypeError(
            f"mesh must come from longvila.sp.mesh.build_mesh, got {type(mesh).__name__}"
        )
    if is_parallelized(model):
        raise ValueError(f"{type(base).__name__} was parallelized before; undo with unparallelize")
    if plan.fsdp and (wrapped := sharded_modules(model)):
        raise ValueError(
            f"{len(wrapped)} modules are sharded by FSDP already ({wrapped[0] or 'the model'}, ...)"
            "; pass fsdp=False and leave wrapping to whoever did it"
        )
    family = find_family(base)
    state = _State(family, mesh, plan, [])
    two_stage = mesh.sp_size > 1 if plan.two_stage is None else plan.two_stage
    if mesh.sp_size > 1 and not two_stage:
        raise ValueError(
            f"the mesh has {mesh.sp_size} sequence-parallel ranks, which only the two-stage "
            "forward uses; two_stage=False needs seq_parallel_size 1"
        )
    vars(base)[_STATE] = state
    try:
        if two_stage:
            _set_attention(base, state)
            _set_forward(base, state)
        if two_stage if plan.pad_mlps is None else plan.pad_mlps:
            # Before compilers and tiles, which go around it.
            state.undo.append(align_mlps([base], always=plan.pad_mlps is True))
        _set_modules(base, state)
        _set_checkpointing(base, state)
        if plan.fsdp and mesh.dp_sp_mesh is not None:
            shard(model, list(family.layers(base)), mesh, plan)
    except BaseException:
        if not sharded_modules(model):  # else its own refusal would hide the error
            unparallelize(model)
        raise
    return model


def unparallelize(model: nn.Module) -> nn.Module:
    """Give a model back its own attention, forward and checkpointing, and return it.

    Raises:
        ValueError: If it was not parallelized, or FSDP shards it (that cannot be taken back).
    """
    state = _state_of(model)
    if sharded_modules(model):
        raise ValueError(
            "FSDP cannot be taken back; gather the state dict and load it into a fresh model"
        )
    del vars(base_model(model))[_STATE]
    while state.undo:
        state.undo.pop()()
    return model


# ---- 1. attention, 2. forward ----------------------------------------------------------------


def _set_attention(base: PreTrainedModel, state: _State) -> None:
    for tower in state.family.unit_towers(base):
        state.undo += [change(tower) for change in UNIT_TOWER]
    cut_compiled_layers_here()
    text = state.family.text_model(base)
    before = text.config._attn_implementation
    text.set_attn_implementation(NAME)
    state.undo.append(lambda: text.set_attn_implementation(before))
    if text.config._attn_implementation != NAME:
        raise ValueError(
            f"{type(text).__name__} did not take attention {NAME!r} (it says "
            f"{text.config._attn_implementation!r}); it does not use the attention interface"
        )


def _set_forward(base: PreTrainedModel, state: _State) -> None:
    plan = state.plan
    original = base.forward
    options = TwoStageOptions(
        head_chunks=plan.head_chunks,
        loss_tile_rows=plan.loss_tile_rows,
        gradient_reduction=plan.gradient_reduction,
        encode_on_every_rank=plan.encode_on_every_rank,
        recompute_media=plan.activation_checkpointing,
        checked_steps=plan.checked_steps,
    )
    two_stage = TwoStageForward(base, state.family, state.mesh, options, original)
    state.two_stage = two_stage

    # wraps: whoever inspects the signature (Trainer drops unknown columns) sees the original one.
    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return two_stage(*args, **kwargs)

    # Who compiles the model as a whole would have plans and messages traced.
    _override(base, torch.compiler.disable(forward), state)


# ---- 3. memory -------------------------------------------------------------------------------


def _set_modules(base: PreTrainedModel, state: _State) -> None:
    """Compile norms and MLPs of the text model, and cut MLPs into tiles."""
    plan, mlps = state.plan, _mlps(base, state)
    if plan.mlp_tile_rows is not None:
        for mlp in mlps:
            _spare_last(mlp, state)
    if plan.compile_modules:
        for module in state.family.text_model(base).modules():
            if _is_norm(module) or _is_attention(module):
                _override(module, _Compiled(module.forward), state)
        for tower in state.family.unit_towers(base):
            for module, forward in compile_around_units(tower):
                # Micro-batches differ, by pass and by picture; the compiler keeps few graphs.
                _override(module, _Compiled(forward, dynamic=True), state)
        plain = _plain_from(plan, len(list(state.family.layers(base))))
        for index, layer in enumerate(state.family.layers(base)):
            own = getattr(layer, "mlp", None)
            if not isinstance(own, nn.Module):
                continue
            if index < plain or plan.mlp_tile_rows is not None:
                _compile_but_last(own, state)
            else:
                _override(own, _Compiled(_as_one_graph(own.forward)), state)
    if plan.mlp_tile_rows is not None:
        if plan.mlp_tile_rows < 1:
            raise ValueError(f"mlp_tile_rows must be at least 1, got {plan.mlp_tile_rows}")
        if not mlps:
            name = type(next(iter(state.family.layers(base)))).__name__
            raise ValueError(f"{name} has no module 'mlp' to cut; pass mlp_tile_rows=None")
        for mlp in mlps:
            _override(mlp, _Tiled(mlp, mlp.forward, plan.mlp_tile_rows), state)


def _plain_from(plan: ParallelPlan, layers: int) -> int:
    """The first layer that is not recomputed."""
    return layers - plan.plain_layers if plan.activation_checkpointing else 0


def _compile_but_last(mlp: nn.Module, state: _State) -> None:
    """Compile an MLP up to its last projection.

    When a layer runs again for its backward pass, nobody wants its result, and torch's checkpoint
    ends that run where the last tensor is saved: at the input of the last projection, whose product
    is then left out; a tile that runs again leaves it out by itself. Inside a compiled graph it
    would be computed.
    """
    last = _last_projection(mlp)
    if last is not None:
        _override(last, torch.compiler.disable(last.forward), state)
    _override(mlp, _Compiled(mlp.forward), state)


def _last_projection(mlp: nn.Module) -> nn.Module | None:
    projections = [child for child in mlp.children() if any(True for _ in child.parameters())]
    return projections[-1] if projections else None


def _spare_last(mlp: nn.Module, state: _State) -> None:
    """Let tiles that run again leave out an MLP's last product, where it is a plain linear map."""
    last = _last_projection(mlp)
    if type(last) is nn.Linear and "forward" not in vars(last):
        _override(last, functools.partial(_linear, last), state)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    # Read at the call: a sharding wrapper gathers and swaps parameters around it.
    return linear_unless_unwanted(x, module.weight, module.bias)


def _as_one_graph(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    # Code of its own: the compiler finds graphs by a function's code, and would take one that
    # ends before the last projection for this module, too.
    def whole(x: Tensor) -> Tensor:
        return forward(x)

    return whole


def _mlps(base: PreTrainedModel, state: _State) -> list[nn.Module]:
    found = (getattr(layer, "mlp", None) for layer in state.family.layers(base))
    return [mlp for mlp in found if isinstance(mlp, nn.Module)]


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm") and not any(module.children())


def _is_attention(module: nn.Module) -> bool:
    # What calls the attention interface: compiled up to that call and behind it.
    return type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx")


def _override(module: nn.Module, forward: Callable[..., Any], state: _State) -> None:
    state.undo.append(functools.partial(_restore, module, "forward", vars(module).get("forward")))
    vars(module)["forward"] = forward


class _Compiled:
    """A forward through ``torch.compile`` that saves no product of what it saves anyway.

    Left to itself the compiler keeps an MLP's gated product beside gate and up, a quarter of what a
    layer saves, though multiplying again costs next to nothing.

    Args:
        forward: What to compile.
        dynamic: Whether sizes are taken to vary from the first call on; None for once they do.
    """

    def __init__(self, forward: Callable[..., Any], *, dynamic: bool | None = None) -> None:
        from torch._functorch import config  # the compiler, which few need

        self.forward, self.config = torch.compile(forward, dynamic=dynamic), config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Read when a graph is cut into forward and backward, that is inside a first call.
        with self.config.patch(aggressive_recomputation=True):
            return self.forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Compiled:
        raise TypeError(_NO_COPY)


class _Tiled:
    """An MLP's forward, a few rows at a time; with one tile it is the forward itself."""

    def __init__(self, mlp: nn.Module, forward: Callable[[Tensor], Tensor], rows: int) -> None:
        self.mlp, self.forward, self.rows = mlp, forward, rows

    def __call__(self, x: Tensor) -> Tensor:
        # Read at the call: a sharding wrapper gathers and swaps parameters around it.
        parameters = list(self.mlp.parameters())
        return tiled_apply(self.forward, x, tile_rows=self.rows, parameters=parameters)


class _InBackward:
    """True where there will be a backward pass.

    Layers that are to be recomputed drop the cache, also where a model in training mode generates.
    """

    def __bool__(self) -> bool:
        return torch.is_grad_enabled()


def _set_checkpointing(base: PreTrainedModel, state: _State) -> None:
    plan, layers = state.plan, list(state.family.layers(base))
    if not 0 <= plan.plain_layers <= len(layers):
        raise ValueError(f"plain_layers must be 0 to {len(layers)}, got {plan.plain_layers}")
    first_plain = _plain_from(plan, len(layers))
    for index, layer in enumerate(layers):
        if index < first_plain:
            run: Callable[..., Any] = functools.partial(checkpoint, offload=plan.offload)
        elif plan.offload is not None:
            run = functools.partial(store, offload=plan.offload, parameters=layer.parameters)
        else:
            continue
        if not isinstance(layer, GradientCheckpointingLayer):
            raise ValueError(
                f"{type(layer).__name__} cannot be checkpointed or offloaded (it is no "
                "GradientCheckpointingLayer); pass activation_checkpointing=False, offload=None"
            )
        names = {"gradient_checkpointing": _InBackward(), "_gradient_checkpointing_func": run}
        for name, value in names.items():
            state.undo.append(functools.partial(_restore, layer, name, vars(layer).get(name)))
            setattr(layer, name, value)


def _restore(module: nn.Module, name: str, before: Any) -> None:
    """Set an instance attribute back, or remove it where the class's own stood."""
    if before is None:
        vars(module).pop(name)
    else:
        setattr(module, name, before)


# ---- gradients without a wrapper -------------------------------------------------------------


def reduce_gradients(model: nn.Module) -> None:
    """Combine parameter gradients over all ranks, for loops without FSDP or DDP.

    A parameter that has a gradient on some rank gets one on every rank; one that has none anywhere
    keeps None, as on one GPU. Call it once, after the last backward of a step.

    Args:
        model: A model that was parallelized with ``fsdp=False``.

    Raises:
        ValueError: If the model was not parallelized, or FSDP shards it and so combines them.

    Comm: One all-reduce of a flag a parameter, and of every gradient, in buckets.

    Memory: One bucket beside the gradients; a gradient that fills one alone is reduced in place.
    """
    state = _state_of(model)
    if sharded_modules(model):
        raise ValueError(
            "FSDP combines gradients during backward; reduce_gradients would repeat it"
        )
    group = state.mesh.dp_sp_group
    if group is None:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        return
    flags = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    flags = flags.to(parameters[0].device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
    ranks = dist.get_world_size(group)
    gradients = []
    for parameter, used in zip(parameters, flags.tolist(), strict=True):
        if used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        together = bucket[0] if len(bucket) == 1 else torch.cat([x.flatten() for x in bucket])
        dist.all_reduce(together, group=group)
        if state.plan.gradient_reduction == "mean":
            together /= ranks
        if len(bucket) > 1:
            parts = together.split([x.numel() for x in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cut a list where the type or the device changes, and where a bucket is full."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        alike = bucket and (bucket[0].dtype, bucket[0].device) == (gradient.dtype, gradient.device)
        if bucket and (not alike or size + gradient.nbytes > _BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket
