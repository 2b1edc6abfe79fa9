"""Qwen2.5-VL and Qwen3-VL: patches of any resolution, positions in 3-D, deepstack features.

* Pixels are patches, ``(patches, values)``; an item is a grid ``(t, h, w)`` of them. Both towers
  attend within one of the t steps only (in full or in windows), so a step is a unit: h * w patches,
  and h * w / merge**2 rows. A long video falls into many units, an image is one.
* Units go through a layer's attention in one packed call (`longvila.parallel.tower_attention`).
* Cost: full layers p * p, windowed layers p * window, everything else linear in p.
* Positions (M-RoPE) of a token depend on all media before it in its sample. Every rank makes those
  of the whole batch with the model's own function, from ids and grids, and they are cut like
  tokens. Rows that pack several samples are taken apart first, by ``document_lengths``.
* Qwen3-VL adds features of earlier vision layers to the hidden states after its first text layers.
  They are further columns of a row, so that one exchange takes a token's embedding and all of its
  deepstack features to the rank that holds it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from longvila.parallel.families.base import (
    PATCHES_PER_CALL,
    Family,
    MediaKind,
    MediaUnits,
)
from longvila.sp.tokens import pack_documents

_KINDS = {"image": 1, "video": 2}


def _cost(vision: Any, patches: int) -> int:
    """Multiply-adds of one unit over twice the tower's width."""
    layers, width = vision.depth, vision.hidden_size
    full = len(getattr(vision, "fullatt_block_indexes", range(layers)))
    window = (getattr(vision, "window_size", 0) // vision.patch_size) ** 2
    matrices = 3 if hasattr(vision, "fullatt_block_indexes") else 2
    linear = layers * (4 * width + matrices * vision.intermediate_size)
    attention = 2 * (full * patches + (layers - full) * min(window, patches))
    return int(patches * (attention + linear))


def _units(config: Any, grids: Sequence[Sequence[int]]) -> MediaUnits:
    vision = config.vision_config
    shapes = [(1, height, width) for time, height, width in grids for _ in range(time)]
    merged = vision.spatial_merge_size**2
    frames = tuple(height * width for _, height, width in shapes)
    rows = tuple(patches // merged for patches in frames)
    costs = {patches: _cost(vision, patches) for patches in set(frames)}
    return MediaUnits(
        frames, rows, tuple(costs[n] for n in frames), torch.arange(sum(rows)), tuple(shapes)
    )


def _encode(model: PreTrainedModel, pixels: Tensor, shapes: Sequence[Sequence[int]]) -> Tensor:
    visual: Any = model.model.visual
    grids = tuple(tuple(shape) for shape in shapes)
    places = _places(grids, pixels.device, *_tower_numbers(visual))
    grid = torch.tensor(grids)  # on the host, where it is read
    output = model.model.get_image_features(pixels, grid, return_dict=True, **places)
    deepstack = getattr(output, "deepstack_features", None) or []
    # Split by item or not, which differs between features and between versions of transformers.
    columns = [
        x if isinstance(x, Tensor) else torch.cat(x) for x in (output.pooler_output, *deepstack)
    ]
    return torch.cat(columns, dim=1)


def _tower_numbers(visual: Any) -> tuple[int, int | None, int, tuple[Any, ...] | None]:
    """Merge side, window side in pixels, patch side, and how learned positions are resampled."""
    windows, learned = getattr(visual, "window_size", None), None
    if hasattr(visual, "num_grid_per_side"):
        how = (visual.interpolation_mode, visual.interpolation_align_corners)
        learned = (visual.num_grid_per_side, *how)
    return visual.spatial_merge_size, windows, visual.patch_size, learned


@functools.lru_cache(maxsize=4)
def _places(
    grids: tuple[tuple[int, ...], ...],
    device: torch.device,
    merge: int,
    window_side: int | None,
    patch_side: int,
    learned: tuple[Any, ...] | None,
) -> dict[str, Any]:
    """Where patches stand, what attends together, and the longest of these: keywords of the tower.

    Left to itself the tower works them out of the grid in every call, on the device, and asks the
    device for numbers a dozen times, while it waits. All but the last micro-batch of a video have
    the same grids, and each runs twice. So they are made once, on the host.
    """
    grid = torch.tensor(grids)
    # Kept by passes that are differentiated, even if the first one was not.
    with torch.inference_mode(False):
        edges = get_vision_cu_seqlens(grid)
        found: dict[str, Any] = {
            "position_ids": get_vision_position_ids(grid, merge),
            "cu_seqlens": edges,
            "max_seqlen": int(edges.diff().max()),
        }
        if window_side is not None:
            order, windows = get_vision_window_index(grid, merge, window_side, patch_side)
            found |= {"window_index": order, "cu_window_seqlens": windows}
            found["max_window_seqlen"] = int(windows.diff().max())
        if learned is not None:
            side, mode, align_corners = learned
            indices, weights = get_vision_interpolation_indices_and_weights(
                grid, side, mode=mode, align_corners=align_corners, spatial_merge_size=merge
            )
            found |= {"interp_indices": indices, "interp_weights": weights}
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in found.items()}


def _blank(model: PreTrainedModel) -> tuple[Tensor, Sequence[Sequence[int]]]:
    vision, like = model.config.vision_config, next(model.model.visual.parameters())
    side = vision.spatial_merge_size
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return like.new_zeros(side * side, values), ((1, side, side),)


def _no_grid(total: int) -> list[Any]:
    raise ValueError(
        "patches do not tell how they are arranged: give image_grid_thw with pixel_values and "
        "video_grid_thw with pixel_values_videos"
    )


def _position_ids(model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor | None:
    """``(3, B, columns)`` positions of the whole batch; None where it has no media."""
    given = batch.get("position_ids")
    grids = {f"{kind}_grid_thw": batch.get(f"{kind}_grid_thw") for kind in _KINDS}
    if all(grid is None for grid in grids.values()):
        return None
    if given is not None:
        if given.dim() != 3:
            raise ValueError(
                f"position_ids {tuple(given.shape)} beside media have no height and width: leave "
                "them out (document_lengths tell packed samples apart), or give (3, B, columns), "
                "or (4, B, columns) with ordinary positions first"
            )
        positions: Tensor = given
        return positions
    ids = batch["input_ids"].cpu()
    types = batch.get("mm_token_type_ids")
    if types is None:  # what the processor would say
        types = torch.zeros_like(ids)
        for kind, number in _KINDS.items():
            types[ids == getattr(model.config, f"{kind}_token_id")] = number
    documents = pack_documents(
        (ids.shape[0], ids.shape[1]),
        attention_mask=batch.get("attention_mask"),
        document_lengths=batch.get("document_lengths"),
    )
    # One row a document, as the model's function wants them.
    lengths = documents.lengths
    padding = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    kept = padding.bool()
    rows = torch.zeros_like(padding), torch.zeros_like(padding)
    for row, values in zip(rows, (ids, types), strict=True):
        row[kept] = documents.take(values, filler=0).to(row.dtype)
    more: dict[str, Any] = {}
    if batch.get("second_per_grid_ts") is not None:
        more["second_per_grid_ts"] = torch.as_tensor(batch["second_per_grid_ts"]).cpu()
    positions, _ = model.model.get_rope_index(
        rows[0],
        mm_token_type_ids=rows[1],
        attention_mask=padding,
        **{name: None if grid is None else grid.cpu() for name, grid in grids.items()},
        **more,
    )
    whole = torch.zeros(3, ids.numel(), dtype=torch.int64)
    whole[:, documents.indices] = positions[:, kept]
    return whole.view(3, *ids.shape)


def _deepstack_inputs(
    rows: Tensor, places: Tensor, embeds: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """Split rows; the text model wants deepstack features in the order of the tokens."""
    tokens, width = embeds.shape
    first, *deeper = rows.split(width, dim=1)
    mask = torch.zeros(1, tokens, dtype=torch.bool, device=rows.device)
    mask[0, places] = True
    order = places.argsort()
    return first, {
        "visual_pos_masks": mask,
        "deepstack_visual_embeds": [layer.index_select(0, order) for layer in deeper],
    }


def _kind(name: str, pixels: str) -> MediaKind:
    return MediaKind(
        name, pixels, f"{name}_grid_thw",
        token_id=lambda config: getattr(config, f"{name}_token_id"),
        units=_units, encode=_encode, blank=_blank, default_counts=_no_grid,
        frames_per_call=lambda config: PATCHES_PER_CALL,
    )  # fmt: skip


_MEDIA = (_kind("image", "pixel_values"), _kind("video", "pixel_values_videos"))


def _mergers(model: PreTrainedModel) -> list[nn.Module]:
    visual: Any = model.model.visual
    return [visual.merger, *getattr(visual, "deepstack_merger_list", ())]


def _text_model(model: PreTrainedModel) -> PreTrainedModel:
    text: PreTrainedModel = model.model.language_model
    return text


def _towers(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [model.model.visual]


QWEN2_5_VL = Family(
    name="Qwen2.5-VL",
    model_types=("qwen2_5_vl",),
    text_model=_text_model,
    embed=lambda model, input_ids: model.get_input_embeddings()(input_ids),
    vision_modules=lambda model: [model.model.visual],
    media=_MEDIA,
    inputs=("mm_token_type_ids", "second_per_grid_ts"),
    position_ids=_position_ids,
    projector=_mergers,
    unit_towers=_towers,
)

QWEN3_VL = Family(
    name="Qwen3-VL",
    model_types=("qwen3_vl",),
    text_model=_text_model,
    embed=lambda model, input_ids: model.get_input_embeddings()(input_ids),
    vision_modules=lambda model: [model.model.visual],
    media=_MEDIA,
    inputs=("mm_token_type_ids",),
    position_ids=_position_ids,
    projector=_mergers,
    unit_towers=_towers,
    row_multiple=lambda config: 1 + len(config.vision_config.deepstack_visual_indexes),
    text_inputs=_deepstack_inputs,
)
