"""A language model with weights set by hand, which reads a needle's name off its row.

One layer, one head that matters. Every text token asks for needles, needle rows answer, values are
the needle's number, the head turns it into a letter, and a letter is followed by the end of the
turn. Rotary embeddings leave the pair of dims that is used as good as unturned. So the answer is
right if and only if the needle's row is in the cache that the question is read over. A blind one
has no values, and always says the first letter.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from longvila.parallel.families import Family
from longvila.parallel.families.longvila import LONGVILA
from longvila.testing.tiny import tiny_model, tiny_tokenizer

from .cases import COLOURS

LETTERS = "ABCDEFGH"
_IS_NEEDLE, _ASKS, _SAID, _FILM, _ANSWER = 8, 9, 10, 11, 16


def seer(*, blind: bool = False) -> Any:
    model = tiny_model(
        vision_config={"image_size": 4}, projector_type="linear", vision_feature_layer=-1,
        text_config={
            "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "rope_theta": 1e8, "max_position_embeddings": 16384,
        },
    )  # fmt: skip
    text, tokenizer = model.model.language_model, tiny_tokenizer()
    letters = [tokenizer(letter)["input_ids"][0] for letter in LETTERS]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        for name, parameter in text.named_parameters():
            parameter.fill_(float("norm" in name))
        model.lm_head.weight.zero_()
        text.embed_tokens.weight[:, _ASKS] = 1
        text.embed_tokens.weight[letters, _SAID] = 1
        attention = text.layers[0].self_attn
        slow = attention.head_dim - 1
        attention.q_proj.weight[slow, _ASKS] = 3
        attention.k_proj.weight[slow, _IS_NEEDLE] = 3
        for number, letter in enumerate(letters):
            if not blind:
                attention.v_proj.weight[number, number] = 1
            attention.o_proj.weight[_ANSWER + number, number] = 1
            model.lm_head.weight[letter, _ANSWER + number] = 10
        model.lm_head.weight[letters[0], _ASKS] = 0.1
        model.lm_head.weight[end, _SAID] = 1000
    return model


def colour_family() -> Family:
    """Rows by colour: a needle's number, or film."""
    colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 127.5 - 1

    def encode(model: Any, pixels: Tensor, shapes: Any) -> Tensor:
        off = (pixels.mean((2, 3))[:, None] - colours[None]).abs().amax(-1)
        rows = torch.zeros(len(pixels), 64)
        for row, distance in zip(rows, off, strict=True):
            best = int(distance.argmin())
            if distance[best] < 0.1:
                row[best] = row[_IS_NEEDLE] = 1
            else:
                row[_FILM] = 1
        return rows

    media = tuple(
        dataclasses.replace(kind, encode=encode) if kind.name == "video" else kind
        for kind in LONGVILA.media
    )
    return dataclasses.replace(LONGVILA, media=media)
