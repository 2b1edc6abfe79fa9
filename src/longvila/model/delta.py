"""What training changed, in a small file: whole tensors, and low-rank updates of the rest.

A delta is one safetensors file. A key that is a parameter's name replaces it (projector, norms).
``NAME.lora_A`` (r, in) and ``NAME.lora_B`` (out, r) belong together and mean that
``lora_B @ lora_A`` is added to ``NAME``; any scale is inside ``lora_B``. Its metadata says which
model it was trained on (``init``: the arguments of ``longvila init``, as JSON) so that the base
can be assembled again from its sources.

Stored in eight bits, a matrix has a scale beside it (``KEY.scale``): one for each row, and for
``lora_B`` one for each column, whose sizes fall off with the rank's components. That halves the
file, and errs by less than a hundredth of what a row holds.

A model that was trained in several stages, each with an adapter of its own, ends as plain weights.
`difference` finds the delta between two such models: a sum of low-rank updates has low rank again,
and what a smaller rank leaves over is told. ``context`` in the metadata is the rotary base and the
context that the text model was given; ``video_processor`` is how the model wants videos sampled.

Applying merges the updates into the weights in float32, after which nothing of PEFT is needed and
nothing is slower. Not done: undoing a merge; several deltas at once (apply them in order).

Dimensions: r rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longvila.errors import CheckpointError

FORMAT = "longvila-delta-1"
#: Metadata that is JSON.
DECODED = ("init", "context", "video_processor")
_A, _B, _SCALE = ".lora_A", ".lora_B", ".scale"


def collect_delta(model: nn.Module) -> dict[str, Tensor]:
    """Collect what is trainable in a model, PEFT's low-rank layers included.

    Args:
        model: A model whose frozen parameters do not require gradients; PEFT adapters may have been
            injected into it.

    Returns:
        Float32 tensors on the CPU under the names a delta uses.

    Raises:
        CheckpointError: If nothing is trainable.
    """
    scales = {
        name: module.scaling["default"]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "scaling")
    }
    out: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        value = parameter.detach().float().cpu()
        for part in (_A, _B):
            tail = f"{part}.default.weight"
            if name.endswith(tail):
                module = name[: -len(tail)]
                name = f"{module}.weight{part}"
                if part == _B:
                    value = value * scales[module]
        out[name.replace(".base_layer.", ".")] = value
    if not out:
        raise CheckpointError("the model has no trainable parameter; nothing to save")
    return out


def difference(
    base: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    *,
    rank: int | Callable[[str], int | None],
) -> tuple[dict[str, Tensor], float]:
    """Find what turns one model's weights into another's.

    Args:
        base: Weights by name.
        trained: Weights of the same model after training.
        rank: Rank of the updates of matrices, or what gives it by name; None stores a matrix whole,
            and so is one that is smaller than its update.

    Returns:
        A delta, and the largest share of a matrix's change (in Frobenius norm) that it leaves out.

    Raises:
        CheckpointError: If names or shapes differ, or nothing changed.
    """
    if set(base) != set(trained):
        odd = sorted(set(base) ^ set(trained))
        raise CheckpointError(f"the models have different weights: {', '.join(odd[:5])}")
    out: dict[str, Tensor] = {}
    left_out = 0.0
    for name, before in base.items():
        after = trained[name]
        if before.shape != after.shape:
            raise CheckpointError(f"{name} is {tuple(before.shape)} and {tuple(after.shape)}")
        change = after.float() - before.float()
        if not change.any():
            continue
        wanted = rank(name) if callable(rank) else rank
        if change.ndim != 2 or wanted is None or wanted * sum(change.shape) >= change.numel():
            out[name] = after.float()
            continue
        out[name + _A], out[name + _B], over = _lowered(change, wanted)
        left_out = max(left_out, over)
    if not out:
        raise CheckpointError("the two models have the same weights; there is no delta")
    return out, left_out


def _lowered(change: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best update of a rank, balanced between its halves, and the share that it leaves out.

    Eigenvectors of the smaller side's products, in float64, are a small part of what a singular
    value decomposition costs a GPU, and as good: what is lost is below float32's rounding.
    """
    wide = change.double()
    if wide.shape[0] > wide.shape[1]:
        high, low, over = _lowered(change.T, rank)
        return low.T, high.T, over
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    values, u = values.flip(0)[:rank].clamp_min(0), vectors.flip(1)[:, :rank]
    # Directions below rounding are none; they must not be divided by.
    values = torch.where(values > values[0] * 1e-14, values, 0.0)
    root = values.sqrt().sqrt()
    inverse = torch.where(root > 0, 1 / root, 0.0)
    low, high = inverse[:, None] * (u.T @ wide), u * root
    over = float((wide - high @ low).norm() / wide.norm())
    return low.float(), high.float(), over


def save_delta(
    delta: dict[str, Tensor], path: Path, *, init: dict[str, Any], dtype: torch.dtype, **notes: str
) -> None:
    """Write a delta.

    Args:
        delta: What `collect_delta` gave.
        path: The file to make.
        init: Arguments that assemble the model it belongs to.
        dtype: Type of the stored numbers; int8 keeps vectors in float16.
        **notes: Further texts for the metadata.
    """
    metadata = {"format": FORMAT, "init": json.dumps(init), **notes}
    stored: dict[str, Tensor] = {}
    for key, value in delta.items():
        stored.update(_in_eight_bits(key, value) if dtype == torch.int8 else {key: value.to(dtype)})
    save_file({k: v.contiguous() for k, v in stored.items()}, path, metadata=metadata)


def _in_eight_bits(key: str, value: Tensor) -> dict[str, Tensor]:
    if value.ndim < 2:
        return {key: value.half()}
    over = (0,) if key.endswith(_B) else tuple(range(1, value.ndim))
    scale = value.float().abs().amax(over, keepdim=True) / 127
    # What is all zero stays so, with any scale.
    scale = torch.where(scale > 0, scale, 1.0)
    return {key: (value.float() / scale).round().to(torch.int8), key + _SCALE: scale}


def read_delta(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a delta.

    Args:
        path: The file.

    Returns:
        Float32 tensors under the names that `save_delta` was given.

    Raises:
        CheckpointError: If a tensor in eight bits has no scale.
    """
    out: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        found = {key: file.get_tensor(key) for key in sorted(file.keys())}
    whole = {key for key, value in found.items() if value.dtype == torch.int8}
    for key, value in found.items():
        if key.removesuffix(_SCALE) in whole and key.endswith(_SCALE):
            continue
        out[key] = value.float()
        if key in whole:
            if key + _SCALE not in found:
                raise CheckpointError(f"{path.name} has {key} in eight bits without its scale")
            out[key] *= found[key + _SCALE]
    return out


def read_delta_metadata(path: Path) -> dict[str, Any]:
    """Read what a delta says of itself.

    Args:
        path: The file.

    Returns:
        Its metadata, what is JSON decoded.

    Raises:
        CheckpointError: If the file is no delta, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = dict(file.metadata() or {})
    except SafetensorError as fault:
        raise CheckpointError(
            f"{path} is damaged or cut off ({fault}); fetch or copy it again"
        ) from fault
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no {FORMAT} file (format {metadata.get('format')!r}); "
            "recipes/smol/run.py writes them"
        )
    for key in DECODED:
        if key in metadata:
            metadata[key] = json.loads(metadata[key])
    return metadata


@torch.no_grad()
def apply_delta(model: nn.Module, path: Path) -> dict[str, Any]:
    """Merge a delta into a model.

    Args:
        model: The model it was trained on.
        path: The delta.

    Returns:
        Its metadata.

    Raises:
        CheckpointError: If a name or a shape does not fit the model.
    """
    metadata = read_delta_metadata(path)
    parameters = dict(model.named_parameters())
    delta = read_delta(path)
    for key, value in delta.items():
        name = key.removesuffix(_A).removesuffix(_B)
        if name not in parameters:
            raise CheckpointError(f"{path.name} changes {name}, which the model does not have")
        target = parameters[name]
        if key.endswith(_B):
            if name + _A not in delta:
                raise CheckpointError(f"{path.name} has {key} without {name + _A}")
            continue
        if key.endswith(_A):
            if name + _B not in delta:
                raise CheckpointError(f"{path.name} has {key} without {name + _B}")
            value = delta[name + _B] @ value
        if value.shape != target.shape:
            raise CheckpointError(
                f"{path.name}: {name} has shape {tuple(value.shape)}, the model's is "
                f"{tuple(target.shape)}; was it assembled with init {metadata['init']}?"
            )
        value = value.to(target.device)
        target.copy_(target.float() + value if key.endswith(_A) else value)
    if "context" in metadata:
        _set_context(model, metadata["context"])
    return metadata


def _set_context(model: Any, context: Mapping[str, Any]) -> None:
    """Give the text model a rotary base and a context; its angles are computed anew.

    ``rope_parameters`` holds what else there is to say where angles are scaled too.
    """
    config = model.config.get_text_config()
    scaled = context.get("rope_parameters", {})
    config.rope_parameters = {
        **config.rope_parameters, **scaled, "rope_theta": context["rope_theta"],
    }  # fmt: skip
    config.max_position_embeddings = context["max_position_embeddings"]
    text = model.model.language_model
    text.rotary_emb = type(text.rotary_emb)(config=config).to(text.embed_tokens.weight.device)
