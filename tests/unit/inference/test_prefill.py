"""Rows come in the order of their placeholders, encoded no earlier and no more than needed."""

from __future__ import annotations

import pytest
import torch

from longvila.inference.engine import Engine
from longvila.inference.prefill import RowStream, open_streams, prefill_ranks
from longvila.parallel.families import LONGVILA

from .cases import language_model, video_model, video_prompt

VIDEO = LONGVILA.media[1]


@pytest.mark.parametrize("pieces", [1, 3, 8])
@pytest.mark.parametrize("step", [1, 10, 1000])
@pytest.mark.parametrize("pool_sizes", [None, [[2, 1, 1], [1, 3, 3]]])
def test_rows_are_those_of_encoding_all_at_once(
    pool_sizes: list | None, step: int, pieces: int
) -> None:
    model = video_model(pool_sizes=pool_sizes)
    counts = [5, 3]
    pixels = video_prompt(model, videos=(5, 3))["pixel_values_videos"]
    with torch.no_grad():
        expected = model.model.encode_media(pixels, counts, kind="video").rows
        stream = RowStream(model, VIDEO, iter(pixels.split(pieces)), counts)
        stops = [*range(step, len(expected), step), len(expected)]
        rows = torch.cat([stream.take(stop) for stop in stops])
    torch.testing.assert_close(rows, expected)


def test_no_more_than_a_micro_batch_is_encoded_ahead() -> None:
    model = video_model()  # two frames a call, nine rows a frame
    pixels = video_prompt(model, videos=(8,))["pixel_values_videos"]
    encoded: list[int] = []
    model.model.multi_modal_projector.register_forward_hook(
        lambda module, args, output: encoded.append(args[0].shape[0])
    )
    stream = RowStream(model, VIDEO, pixels, [8])
    for stop, frames in [(1, 2), (18, 2), (19, 4), (72, 8)]:
        stream.take(stop)
        assert sum(encoded) == frames
    assert set(encoded) == {2}
    assert sum(rows.shape[0] for rows in stream._rows) == 0


def test_memory_of_a_prefill_does_not_grow_with_the_prompt_but_for_the_cache() -> None:
    model = language_model()
    longest: list[int] = []
    model.model.register_forward_hook(
        lambda module, args, kwargs, output: longest.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    heads: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(
        lambda module, args, output: heads.append(tuple(output.shape))
    )
    with Engine(model, chunk_tokens=16) as engine:
        cache = engine.prefill({"input_ids": torch.ones(1, 100, dtype=torch.long)})
    assert longest == [16] * 6 + [4]
    assert heads == [(1, 61)]
    layer = cache.shards[0]
    assert layer.keys.shape[1] == 100 and not layer.segments


def test_media_that_do_not_match_the_prompt_are_refused() -> None:
    model = video_model()
    inputs = video_prompt(model, videos=(3,))
    ids = inputs["input_ids"][0]
    with pytest.raises(ValueError, match="27 video placeholders but the video media give 0 rows"):
        open_streams(model, LONGVILA, ids, {})
    with pytest.raises(ValueError, match="in pieces need video_num_frames"):
        open_streams(model, LONGVILA, ids, {"pixel_values_videos": iter([])})
    stream = RowStream(model, VIDEO, inputs["pixel_values_videos"][:2], [3])
    with pytest.raises(ValueError, match="frames end 1 before those that video_num_frames"):
        stream.take(27)


def test_ranks_refuse_pixels_in_pieces() -> None:
    class TwoStage:
        family = LONGVILA

    with pytest.raises(ValueError, match="local_pixel_values_videos"):
        prefill_ranks(
            TwoStage(), None, torch.ones(1, 3), {"pixel_values_videos": iter([])}  # type: ignore[arg-type]
        )  # fmt: skip
