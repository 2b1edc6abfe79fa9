"""Qwen-VL grids: units encoded apart, positions of packed samples, costs, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import vision_utils

sys.path.insert(0, str(Path(__file__).parents[2] / "integration"))
from family_cases import CASES, QWEN2_5_VL, QWEN3_VL, Case

from longvila.parallel.families import qwen_vl
from longvila.parallel.plan import plan_media
from longvila.testing.asserts import assert_close

BOTH = pytest.mark.parametrize("case", [QWEN2_5_VL, QWEN3_VL], ids=["2.5", "3"])
VIDEO = qwen_vl.QWEN3_VL.media[1]


@BOTH
def test_steps_encoded_apart_are_the_items_encoded_whole(case: Case) -> None:
    model = case.model(torch.float64)
    batch = case.batches["mixed"](torch.float64)
    pixels, grids = batch["pixel_values_videos"], batch["video_grid_thw"]
    whole = model.model.get_video_features(pixels, grids, return_dict=True).pooler_output
    units = VIDEO.units(model.config, [tuple(grid) for grid in grids.tolist()])
    assert sum(units.frames) == pixels.shape[0] and units.unit_shapes[0] == (1, 4, 4)
    assert len(units.frames) == 3 + 2 and units.rows == (4, 4, 4, 15, 15)
    parts = pixels.split(list(units.frames))
    shapes = [[shape] for shape in units.unit_shapes]
    rows = torch.cat([VIDEO.encode(model, *each) for each in zip(parts, shapes, strict=True)])
    width = model.config.text_config.hidden_size
    assert_close(rows[:, :width], torch.cat(whole))
    family = qwen_vl.QWEN2_5_VL if case is QWEN2_5_VL else qwen_vl.QWEN3_VL
    assert rows.shape[1] == width * family.row_multiple(model.config)


@BOTH
def test_a_tower_is_told_what_it_would_ask_the_device(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = case.model(torch.float32)
    visual = model.model.visual
    pixels, shapes = torch.randn(2 * 16 + 48, 96), [(1, 4, 4), (1, 6, 8), (1, 4, 4)]
    grid = torch.tensor(shapes)
    expected = model.model.get_image_features(pixels, grid, return_dict=True).pooler_output
    # Every keyword is taken, and none reaches the layers, which would take any.
    reached: list[dict[str, Any]] = []
    visual.blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: reached.append(kwargs), with_kwargs=True
    )
    qwen_vl._places.cache_clear()
    rows = [VIDEO.encode(model, pixels, shapes) for _ in range(2)]
    info = qwen_vl._places.cache_info()
    assert (info.misses, info.hits) == (1, 1)
    names = {"hidden_states", "cu_seqlens", "max_seqlen", "position_embeddings"}
    assert all(set(kwargs) <= names for kwargs in reached)
    width = model.config.text_config.hidden_size
    assert torch.equal(rows[0][:, :width], torch.cat(expected))
    assert torch.equal(rows[0], rows[1])
    places = qwen_vl._places(tuple(shapes), pixels.device, *qwen_vl._tower_numbers(visual))
    assert places["max_seqlen"] == 48 and places.get("max_window_seqlen", 16) == 16
    # What the tower would compute is not computed.
    for name in vars(sys.modules[type(visual).__module__]):
        if name.startswith("get_vision_"):
            monkeypatch.setattr(sys.modules[type(visual).__module__], name, _only_given(name))
    VIDEO.encode(model, pixels, shapes)


def _only_given(name: str) -> Any:
    """The function of transformers, failing where it reads the grid."""
    original = getattr(vision_utils, name)

    def given(grid: torch.Tensor, *args: Any, **options: Any) -> Any:
        return original(None, *args, **options)

    return given


@BOTH
def test_places_made_without_gradients_serve_passes_with_them(case: Case) -> None:
    model = case.model(torch.float32)
    pixels, shapes = torch.randn(32, 96), [(1, 4, 4)] * 2
    qwen_vl._places.cache_clear()
    with torch.inference_mode():
        VIDEO.encode(model, pixels, shapes)
    VIDEO.encode(model, pixels, shapes).sum().backward()
    assert qwen_vl._places.cache_info().hits == 1


@BOTH
def test_positions_are_those_of_the_model(case: Case) -> None:
    model = case.model(torch.float32)
    batch = case.batches["mixed"](torch.float32)
    names = (
        "input_ids", "mm_token_type_ids", "attention_mask", "image_grid_thw", "video_grid_thw",
        "second_per_grid_ts",
    )  # fmt: skip
    expected, _ = model.model.get_rope_index(**{k: batch[k] for k in names if k in batch})
    found = qwen_vl._position_ids(model, batch)
    assert torch.equal(found, expected)
    del batch["mm_token_type_ids"]  # the ids say the same
    assert torch.equal(qwen_vl._position_ids(model, batch), expected)


@BOTH
def test_packed_samples_have_the_positions_of_padded_ones(case: Case) -> None:
    model = case.model(torch.float32)
    batch = case.batches["mixed"](torch.float32)
    expected = qwen_vl._position_ids(model, batch)
    assert expected is not None
    kept = batch["attention_mask"].bool()
    packed: dict[str, Any] = {k: v for k, v in batch.items() if k != "attention_mask"}
    packed |= {k: batch[k][kept][None] for k in ("input_ids", "mm_token_type_ids")}
    packed["document_lengths"] = kept.sum(1).tolist()
    found = qwen_vl._position_ids(model, packed)
    assert torch.equal(found[:, 0], expected[:, kept])


@BOTH
def test_ordinary_positions_beside_media_are_refused(case: Case) -> None:
    model = case.model(torch.float32)
    batch = case.batches["short"](torch.float32)
    columns = batch["input_ids"].shape[1]
    with pytest.raises(ValueError, match="have no height and width"):
        qwen_vl._position_ids(model, batch | {"position_ids": torch.arange(columns)[None]})
    given = torch.zeros(4, 1, columns)
    assert qwen_vl._position_ids(model, batch | {"position_ids": given}) is given
    with pytest.raises(ValueError, match="give image_grid_thw"):
        VIDEO.default_counts(16)


def test_windows_make_large_frames_cheaper() -> None:
    windowed, full = QWEN2_5_VL.config(), QWEN2_5_VL.config()
    full.vision_config.fullatt_block_indexes = [0, 1, 2]
    small, large = ((1, 2, 2),), ((1, 64, 64),)
    cost = VIDEO.units(windowed, small).costs[0]
    assert cost == VIDEO.units(full, small).costs[0] == 4 * (2 * 3 * 4 + 3 * (64 + 3 * 24))
    assert VIDEO.units(windowed, large).costs[0] < VIDEO.units(full, large).costs[0] / 2


def test_a_long_video_is_dealt_by_cost() -> None:
    config = QWEN3_VL.config()
    plan = plan_media(config, 4, {"image": [(1, 16, 16)], "video": [(40, 8, 8), (5, 16, 8)]})
    assert plan.frames.num_units == 46 and plan.frames.balance > 0.9
    first = plan.local("video", 1)
    assert first.unit_shapes == ((1, 8, 8),) * len(first.unit_frames)
    assert first.stop - first.start == 64 * len(first.unit_frames)


@BOTH
def test_a_blank_unit_can_be_encoded(case: Case) -> None:
    model = case.model(torch.float32)
    pixels, shapes = VIDEO.blank(model)
    assert VIDEO.encode(model, pixels, shapes).shape[0] == 1


def test_every_case_has_a_family() -> None:
    assert set(CASES) == {"qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl"}
