"""The model of the benchmarks has the published shape, and options make it smaller."""

from __future__ import annotations

import argparse

import torch
from benchmarks._model import (
    add_text_options,
    add_tower_options,
    draw,
    model_config,
    rows_per_frame,
)

from longvila.memory.sizes import preset
from longvila.model.modeling_longvila import LongVILAForConditionalGeneration
from longvila.parallel.sizes import size_of

TINY = (
    "--image-size 28 --width 16 --mlp-width 24 --vision-layers 2 --vision-heads 2 --model-dim 32 "
    "--text-mlp 48 --heads 4 --kv-heads 2 --vocab 96"
)


def options(argv: str, **defaults: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_tower_options(parser)
    add_text_options(parser, **defaults)
    return parser.parse_args(argv.split())


def test_without_options_it_has_the_size_that_plans_call_7b() -> None:
    with torch.device("meta"):
        model = LongVILAForConditionalGeneration(model_config(options("")))
    assert size_of(model).text == preset("7B").text
    assert rows_per_frame(options("")) == 196


def test_a_script_has_defaults_of_its_own_and_options_win() -> None:
    assert model_config(options(TINY, layers=3)).text_config.num_hidden_layers == 3
    config = model_config(options(f"{TINY} --layers 2", layers=3), vision_batch_size=5)
    assert config.text_config.layer_types == ["full_attention"] * 2
    assert (config.vision_batch_size, config.video_token_id) == (5, 95)


def test_weights_are_drawn_alike_in_the_type_asked_for() -> None:
    config = model_config(options(f"{TINY} --layers 2"))
    first, second = (
        draw(lambda: LongVILAForConditionalGeneration(config), torch.device("cpu"), "bfloat16")
        for _ in range(2)
    )
    assert torch.get_default_dtype() == torch.float32
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert one.dtype == torch.bfloat16
        assert torch.equal(one, other)
