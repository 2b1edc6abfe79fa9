"""Prompts have the processor's ids, and slices cut no frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.fixtures.upstream_case import write_checkpoint

from longvila.inference.engine import Engine
from longvila.inference.serving.access import Gate
from longvila.inference.serving.media import MediaLoader, Wanted
from longvila.inference.serving.prompt import Prompt, build_prompt, common_prefix
from longvila.inference.serving.settings import Access
from longvila.inference.serving.uploads import Uploads
from longvila.model.processing_longvila import LongVILAProcessor
from longvila.testing import tiny

from .serving_cases import LIMITS, clip

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "times": {"timestamps": True},
    "no separator": {"frame_separator": ""},
    "pooled": {"pool_sizes": [[1, 1, 1], [2, 1, 1]], "pool_separator": "\n"},
    "tiled": {"image_aspect_ratio": "dynamic", "min_tiles": 1, "max_tiles": 4},
}


def build(root: Path, layout: str, *, texts: tuple[str, ...] = ("A?", "B?")) -> tuple[Any, ...]:
    """A conversation with an image and two videos, as a prompt here and from the processor."""
    options = dict(LAYOUTS[layout])
    model_options = {k: v for k, v in options.items() if k.startswith("pool")}
    config = tiny.tiny_config(**model_options)
    processor = tiny.tiny_processor(config, **options)
    gate = Gate(Access(roots=(root,)), LIMITS, Uploads(1))
    loader = MediaLoader(processor, gate, LIMITS, frames=None, cache_bytes=1 << 20)
    paths = [clip(root / f"{n}.mp4", seed=n) for n in range(2)]
    pixels = np.random.default_rng(0).integers(0, 255, (25, 60, 3), np.uint8)
    Image.fromarray(pixels).save(root / "p.png")
    wanted = [
        Wanted("image", "p.png", tiled=True),
        Wanted("video", "0.mp4", num_frames=5),
        Wanted("video", "1.mp4", num_frames=5),
    ]
    media = [loader.load(one) for one in wanted]
    sources = [str(root / "p.png"), str(paths[0]), str(paths[1])]
    items = [
        {"type": one.kind, one.kind: source} for one, source in zip(wanted, sources, strict=True)
    ]
    messages = [
        {"role": "user", "content": [*items[:2], {"type": "text", "text": texts[0]}]},
        {"role": "assistant", "content": "Yes.\n"},
        {"role": "user", "content": [items[2], {"type": "text", "text": texts[1]}]},
    ]
    expected = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt", processor_kwargs={"num_frames": 5},
    )  # fmt: skip
    return build_prompt(processor, messages, media), expected, loader, config


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_and_pixels_are_the_processor_s(tmp_path: Path, layout: str) -> None:
    prompt, expected, loader, _ = build(tmp_path, layout)
    assert prompt.ids.tolist() == expected["input_ids"][0].tolist()
    inputs = prompt.inputs(0, len(prompt), loader)
    for name in ("pixel_values", "pixel_values_videos", "video_num_frames", "image_num_tiles"):
        assert torch.equal(inputs[name], expected[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 10, 40])
def test_slices_are_read_as_the_whole(tmp_path: Path, layout: str, tokens: int) -> None:
    prompt, expected, loader, config = build(tmp_path, layout)
    start, parts = 0, []
    with Engine(tiny.tiny_model(config=config)) as engine:
        whole = engine.prefill(dict(expected))
        cache = None
        while start < len(prompt):
            end = prompt.slice_end(start, tokens)
            assert end > start and prompt.cut_before(end) == end
            parts.append(prompt.inputs(start, end, loader))
            cache = engine.prefill(parts[-1], **({} if cache is None else {"onto": cache}))
            start = end
        assert cache is not None and cache.logits is not None and whole.logits is not None
        torch.testing.assert_close(cache.logits, whole.logits, rtol=1e-3, atol=1e-4)
    frames = sum(int(part.get("video_num_frames", torch.zeros(1)).sum()) for part in parts)
    assert frames == 10 and len(parts) > 1


def test_keys_tell_media_apart_and_words_do_not_hide_it(tmp_path: Path) -> None:
    prompt, _, loader, _ = build(tmp_path, "plain")
    media = prompt.keys < 0
    assert media.sum() == 9 * (1 + 10) and len(np.unique(prompt.keys[media])) == 11
    assert (prompt.keys[~media] == prompt.ids[~media]).all()
    other, *_ = build(tmp_path, "plain", texts=("A?", "C?"))
    assert not np.array_equal(other.keys[media], prompt.keys[media]), "another process' secret"
    same = build_prompt(loader.processor, [{"role": "user", "content": "x"}], [])
    assert (same.keys >= 0).all() and not same.blocks


def test_pooled_videos_differ_wherever_one_frame_does(tmp_path: Path) -> None:
    prompt, _, loader, _ = build(tmp_path, "pooled")
    blocks = [block for block in prompt.blocks if prompt.media[block.medium].kind == "video"]
    assert len(blocks) == 2
    first = prompt.keys[blocks[0].start]
    longer = loader.load(Wanted("video", "0.mp4", num_frames=6))
    assert longer.whole != first == prompt.media[1].whole


def test_a_common_prefix_is_counted() -> None:
    a = np.array([1, 2, -5, -5, 3])
    for b, length in (([1, 2, -5, -5, 3], 5), ([1, 2, -5, -6, 3], 3), ([2], 0), ([], 0), ([1], 1)):
        assert common_prefix(a, np.array(b, dtype=np.int64)) == length


def test_slices_of_text_end_where_they_are_told(tmp_path: Path) -> None:
    text = Prompt(np.arange(10), np.arange(10), (), ())
    assert text.slice_end(3, 4) == 7 and text.slice_end(8, 4) == 10


def test_a_begin_token_is_written_once(tmp_path: Path) -> None:
    """By the template; this tokenizer would add another one by itself."""
    processor = LongVILAProcessor.from_pretrained(
        write_checkpoint("llama3_row", tmp_path / "llama3"), conversation="llama_3"
    )
    messages = [{"role": "user", "content": "What?"}]
    expected = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert build_prompt(processor, messages, []).ids.tolist() == expected["input_ids"][0]
