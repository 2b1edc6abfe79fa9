"""A DINOv2 backbone inside an ONNX file, as a SigLIP-shaped vision tower.

1. Named initialisers are taken as they are; the matrices of linear layers are anonymous in an
   exported graph, so each is found through the bias that is added to its product, and transposed.
2. Layer scale multiplies the output of a linear layer per channel: it is folded into that layer's
   rows and bias, which is exact.
3. The position table is resized to the new grid with bicubic interpolation, as DINOv2 itself does
   for other picture sizes.
4. SigLIP has no class token. Its position-dependent row is dropped: patches no longer see it,
   which is the one approximation here.

Pictures must be normalised with ImageNet's mean and deviation. Cost: seconds. Not done: register
tokens, the SwiGLU form of the largest DINOv2.

Dimensions: P patches, C channels.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import SiglipVisionConfig

from longvila.errors import CheckpointError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_RENAMES = (
    (r"attention\.attention\.query\.", "self_attn.q_proj."),
    (r"attention\.attention\.key\.", "self_attn.k_proj."),
    (r"attention\.attention\.value\.", "self_attn.v_proj."),
    (r"attention\.output\.dense\.", "self_attn.out_proj."),
    (r"norm([12])\.", r"layer_norm\1."),
)


def read_onnx(path: Path) -> dict[str, Tensor]:
    """Read the weights of an exported DINOv2 under their original names.

    Args:
        path: The ONNX file.

    Returns:
        Names without the prefix and their float tensors; ``embeddings.position_embeddings`` has
        shape (1, P, C), patches only.

    Raises:
        ImportError: If the ``onnx`` package is missing.
        CheckpointError: If no backbone or no position table is found.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError("reading ONNX files needs `pip install 'longvila[weights]'`") from error
    prefix = "backbone."
    graph = onnx.load(str(path)).graph
    arrays: dict[str, Any] = {entry.name: entry for entry in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(arrays[name]).copy())

    out = {name[len(prefix) :]: tensor(name) for name in arrays if name.startswith(prefix)}
    product = {
        node.output[0]: name
        for node in graph.node
        if node.op_type == "MatMul"
        for name in node.input
        if name in arrays
    }
    for node in graph.node:
        biases = [name for name in node.input if name.startswith(prefix) and name.endswith(".bias")]
        sources = [product[name] for name in node.input if name in product]
        if node.op_type == "Add" and biases and sources:
            name = biases[0][len(prefix) : -len("bias")] + "weight"
            out[name] = tensor(sources[0]).T.contiguous()
    if "embeddings.cls_token" not in out:
        raise CheckpointError(f"{path.name} holds no DINOv2 under {prefix!r}")
    channels = out["embeddings.cls_token"].shape[-1]
    if "embeddings.position_embeddings" in out:
        out["embeddings.position_embeddings"] = out["embeddings.position_embeddings"][:, 1:]
        return out
    # Exporters fold the table into two constants: the class token's row and the square of patches.
    tables = [
        name
        for name, entry in arrays.items()
        if len(entry.dims) == 3
        and entry.dims[0] == 1
        and entry.dims[2] == channels
        and entry.dims[1] > 1
        and math.isqrt(entry.dims[1]) ** 2 == entry.dims[1]
    ]
    if len(tables) != 1:
        raise CheckpointError(f"{path.name}: expected one table of positions, found {tables}")
    out["embeddings.position_embeddings"] = tensor(tables[0])
    return out


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """Resize a square table of positions.

    Args:
        table: Shape (1, P, C), P a square.
        grid: Patches along one side of the new one.

    Returns:
        Shape (grid * grid, C).
    """
    side = math.isqrt(table.shape[1])
    square = table.view(1, side, side, -1).permute(0, 3, 1, 2)
    resized = interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).reshape(grid * grid, -1).contiguous()


def to_siglip(
    state: dict[str, Tensor], *, image_size: int
) -> tuple[SiglipVisionConfig, dict[str, Tensor]]:
    """Rewrite DINOv2 weights for ``SiglipVisionModel``.

    Args:
        state: Weights under DINOv2's names, positions of patches only.
        image_size: Side of the pictures, a multiple of the patch.

    Returns:
        The tower's configuration and state dict.

    Raises:
        ValueError: If the picture is no multiple of the patch.
        CheckpointError: If a weight has no place.
    """
    patch_weight = state["embeddings.patch_embeddings.projection.weight"]
    channels, _, patch, _ = patch_weight.shape
    if image_size < 1 or image_size % patch:
        near = max(round(image_size / patch), 1) * patch
        raise ValueError(f"image size {image_size} is no multiple of the patch {patch}; try {near}")
    depth = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.layer."))
    out = {
        "embeddings.patch_embedding.weight": patch_weight,
        "embeddings.patch_embedding.bias": state["embeddings.patch_embeddings.projection.bias"],
        "embeddings.position_embedding.weight": resize_positions(
            state["embeddings.position_embeddings"], image_size // patch
        ),
        "post_layernorm.weight": state["layernorm.weight"],
        "post_layernorm.bias": state["layernorm.bias"],
    }
    for key, value in state.items():
        if not key.startswith("encoder.layer.") or "layer_scale" in key:
            continue
        _, _, index, rest = key.split(".", 3)
        scale = None
        if rest.startswith("attention.output.dense."):
            scale = state[f"encoder.layer.{index}.layer_scale1.lambda1"]
        elif rest.startswith("mlp.fc2."):
            scale = state[f"encoder.layer.{index}.layer_scale2.lambda1"]
        if scale is not None:
            value = value * (scale[:, None] if value.ndim == 2 else scale)
        for pattern, replacement in _RENAMES:
            rest = re.sub("^" + pattern, replacement, rest)
        out[f"encoder.layers.{index}.{rest}"] = value.contiguous()
    expected = 16 * depth + 5
    if len(out) != expected:
        raise CheckpointError(f"expected {expected} tensors for {depth} layers, got {len(out)}")
    config = SiglipVisionConfig(
        hidden_size=channels,
        intermediate_size=out["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=depth,
        num_attention_heads=channels // 64,  # as in every DINOv2
        image_size=image_size,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        vision_use_head=False,
        architectures=["SiglipVisionModel"],
        dtype="float32",
    )
    return config, out


def convert_dinov2(path: Path, out: Path, *, image_size: int) -> Path:
    """Write a DINOv2 ONNX file out as a ``SiglipVisionModel`` folder.

    Args:
        path: The ONNX file.
        out: The folder to make.
        image_size: Side of the pictures in pixels.

    Returns:
        ``out``.
    """
    config, state = to_siglip(read_onnx(path), image_size=image_size)
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    pixels = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    (out / "preprocessor_config.json").write_text(json.dumps(pixels, indent=1) + "\n")
    return out
