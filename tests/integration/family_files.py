"""Tiny checkpoints of other people's families, with processors of the families' own classes.

The configurations are those of the parity tests with a vocabulary that a tokenizer can write.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, TEXT
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from longvila.testing.tiny import tiny_tokenizer

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}@IMAGE@"
    "{% elif part['type'] == 'video' %}@VIDEO@{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def needs_torchvision() -> None:
    """Skip where the processors of other families cannot be made."""
    try:
        from torchvision.transforms.v2 import functional  # noqa: F401
    except Exception as fault:
        pytest.skip(
            "the families' video processors need a torchvision that works (`make test-torchvision` "
            f"brings one): {fault}"
        )


def tokenizer(image: str, video: str, **named: str) -> Any:
    """The tiny tokenizer with a family's tokens."""
    backend = tiny_tokenizer(media_tokens=False).backend_tokenizer
    backend.add_special_tokens(sorted(set(named.values())))
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=named,
    )  # fmt: skip
    made.chat_template = _TEMPLATE.replace("@IMAGE@", image).replace("@VIDEO@", video)
    return made


def qwen_processor(name: str) -> Any:
    import transformers

    named = {
        "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>",
        "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
    }  # fmt: skip
    words = tokenizer(
        "<|vision_start|><|image_pad|><|vision_end|>",
        "<|video_pad|>" if name == "Qwen3VL" else "<|vision_start|><|video_pad|><|vision_end|>",
        **named,
    )
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": 8 * 8, "longest_edge": 24 * 24 * (8 if name == "Qwen3VL" else 1)}
    video = "Qwen3VLVideoProcessor" if name == "Qwen3VL" else "Qwen2VLVideoProcessor"
    return getattr(transformers, f"{name}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(**sizes, size=size),
        tokenizer=words,
        video_processor=getattr(transformers, video)(
            **sizes, size=size, cap_pixels_per_frame=False
        ),
        chat_template=words.chat_template,
    )


def llava_processor() -> Any:
    import transformers

    words = tokenizer("<image>", "<video>", image_token="<image>", video_token="<video>")
    size = {"height": 12, "width": 12}
    pinpoints = [[12, 24], [24, 12], [24, 24], [12, 36]]
    return transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(
            size=size, image_grid_pinpoints=pinpoints
        ),
        tokenizer=words,
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=9, vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2", chat_template=words.chat_template,
    )  # fmt: skip


def internvl_processor() -> Any:
    import transformers

    words = tokenizer(
        "<IMG_CONTEXT>\n", "<video>\n", start_image_token="<img>", end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>", video_token="<video>",
    )  # fmt: skip
    size = {"height": 16, "width": 16}
    return transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size=size, max_patches=4),
        tokenizer=words,
        video_processor=transformers.InternVLVideoProcessor(size=size),
        image_seq_length=4, chat_template=words.chat_template,
    )  # fmt: skip


PROCESSORS: dict[str, Callable[[], Any]] = {
    "qwen2_5_vl": lambda: qwen_processor("Qwen2_5_VL"),
    "qwen3_vl": lambda: qwen_processor("Qwen3VL"),
    "llava_onevision": llava_processor,
    "internvl": internvl_processor,
}


def save_family(name: str, folder: Path) -> Path:
    """Write a tiny checkpoint of a family: model and processor."""
    if name == "qwen3":
        words = tokenizer("", "")
        config = CONFIG_MAPPING["qwen3"](**{**TEXT, "vocab_size": 280, "head_dim": 8})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        words.save_pretrained(folder)
    else:
        processor = PROCESSORS[name]()
        words = processor.tokenizer
        config = CASES[name].config()
        config.text_config.vocab_size = 280
        ids = {"image": getattr(processor, "image_token_id", None)}
        ids["video"] = words.convert_tokens_to_ids(processor.video_token)
        for kind, number in ids.items():
            for field in (f"{kind}_token_id", f"{kind}_token_index"):
                if hasattr(config, field):
                    setattr(config, field, number)
        for side in ("start", "end"):
            if hasattr(config, f"vision_{side}_token_id"):
                token = words.convert_tokens_to_ids(f"<|vision_{side}|>")
                setattr(config, f"vision_{side}_token_id", token)
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        processor.save_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder
