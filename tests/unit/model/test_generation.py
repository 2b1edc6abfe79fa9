"""Generation: the same tokens by every road, one encoding of the media, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, Qwen2ForCausalLM

from longvila.errors import ContextLengthError
from longvila.model import _compat
from longvila.model.generation_longvila import DEFAULT_MAX_NEW_TOKENS, ids_in_table
from longvila.testing.tiny import tiny_inputs, tiny_model

NEW = 8
TEXT = ["qwen2", "llama", "gpt_neox"]


def setup(text: str = "qwen2", **options: Any) -> tuple[Any, dict[str, Any]]:
    model = tiny_model(text=text)
    model.generation_config.eos_token_id = None  # always NEW tokens
    return model, tiny_inputs(model.config, **options)


def by_hand(model: Any, batch: dict[str, Any], new: int = NEW) -> Tensor:
    """Greedy decoding without cache or generate: the whole forward pass for each token."""
    ids, out = batch["input_ids"], dict(batch)
    for _ in range(new):
        out["input_ids"] = ids
        out["attention_mask"] = torch.ones_like(ids)
        ids = torch.cat([ids, model(**out).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("media", [{"videos": (3,)}, {"videos": (2, 1), "images": 2}])
def test_greedy_equals_forward_passes(text: str, media: dict[str, Any]) -> None:
    model, batch = setup(text, **media)
    expected = by_hand(model, batch)
    assert len(set(expected[0, -NEW:].tolist())) > 2
    assert torch.equal(model.generate(**batch, max_new_tokens=NEW, do_sample=False), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_cache_kinds(cache: str | None) -> None:
    model, batch = setup()
    options: dict[str, Any] = (
        {"use_cache": False} if cache is None else {"cache_implementation": cache}
    )
    if cache == "static":
        options["disable_compile"] = True
    out = model.generate(**batch, max_new_tokens=NEW, do_sample=False, **options)
    assert torch.equal(out, by_hand(model, batch))


def test_media_are_encoded_once() -> None:
    model, batch = setup(videos=(3, 2), images=1)
    calls: list[str] = []
    encode = model.model.encode_media

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["kind"])
        return encode(*args, **kwargs)

    model.model.encode_media = spy
    model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    assert sorted(calls) == ["image", "video"]


def test_encoded_media_in_place_of_pixels() -> None:
    model, batch = setup(videos=(3, 2), images=1)
    expected = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    encoded = {
        "video": model.get_video_features(batch["pixel_values_videos"], batch["video_num_frames"]),
        "image": model.get_image_features(batch["pixel_values"]),
    }
    text = {k: batch[k] for k in ("input_ids", "attention_mask")}
    assert torch.equal(model(**text, mm_encoder_outputs=encoded).logits, model(**batch).logits)
    out = model.generate(**text, mm_encoder_outputs=encoded, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out, expected)
    # One of the two as pixels, the other encoded; and the same features a second time.
    mixed = {**text, "pixel_values": batch["pixel_values"]}
    out = model.generate(
        **mixed,
        mm_encoder_outputs={"video": encoded["video"]},
        max_new_tokens=NEW,
        do_sample=False,
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize("text", TEXT)
def test_beams_of_a_batch_equal_beams_of_each(text: str) -> None:
    """Packed frames must follow their own prompt when prompts are repeated."""
    model = tiny_model(text=text)
    model.generation_config.eos_token_id = None
    samples = [
        tiny_inputs(model.config, videos=(2,), seed=5),
        tiny_inputs(model.config, videos=(2,), seed=6),
    ]
    batch = {k: torch.cat([s[k] for s in samples]) for k in samples[0]}
    options = {"max_new_tokens": NEW, "num_beams": 3, "do_sample": False}
    together = model.generate(**batch, **options)
    for row, sample in enumerate(samples):
        assert torch.equal(model.generate(**sample, **options)[0], together[row])


def test_beams_equal_those_of_the_plain_language_model() -> None:
    """An independent road: transformers' own causal model, given the fused embeddings."""
    model, batch = setup(videos=(3, 2))
    plain = Qwen2ForCausalLM(model.config.text_config).eval()
    plain.model.load_state_dict(model.model.language_model.state_dict())
    plain.lm_head.load_state_dict(model.lm_head.state_dict())
    plain.generation_config.eos_token_id = None
    embeds, _ = model.model.fused_embeds(
        batch["input_ids"],
        pixel_values_videos=batch["pixel_values_videos"],
        video_num_frames=batch["video_num_frames"],
    )
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 4}
    expected = plain.generate(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], **options
    )
    assert torch.equal(model.generate(**batch, **options)[:, -NEW:], expected)


def test_several_return_sequences() -> None:
    model, batch = setup(videos=(3, 2), images=1)
    torch.manual_seed(0)
    out = model.generate(**batch, max_new_tokens=4, do_sample=True, num_return_sequences=3)
    assert out.shape == (3, batch["input_ids"].shape[1] + 4)


def test_from_embeddings() -> None:
    model, batch = setup(videos=(3,))
    embeds, _ = model.model.fused_embeds(
        batch["input_ids"], pixel_values_videos=batch["pixel_values_videos"]
    )
    out = model.generate(
        inputs_embeds=embeds,
        attention_mask=batch["attention_mask"],
        max_new_tokens=NEW,
        do_sample=False,
    )
    assert torch.equal(out, by_hand(model, batch)[:, -NEW:])


@pytest.mark.parametrize("chunk", [7, 16])
def test_prefill_in_chunks_by_hand(chunk: int) -> None:
    """The road that works in every version: fill a cache from fused embeddings, then generate."""
    model, batch = setup(videos=(5,))
    embeds, _ = model.model.fused_embeds(
        batch["input_ids"], pixel_values_videos=batch["pixel_values_videos"]
    )
    cache = DynamicCache(config=model.config.get_text_config())
    for part in embeds[:, :-1].split(chunk, dim=1):
        model(inputs_embeds=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    out = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=False,
    )
    assert torch.equal(out, by_hand(model, batch))


def test_prefill_chunk_size_is_exact_or_refused() -> None:
    model, batch = setup(videos=(3, 2), images=1)
    options = {"max_new_tokens": NEW, "do_sample": False, "prefill_chunk_size": 16}
    if _compat.chunks_media_prefill():
        assert torch.equal(model.generate(**batch, **options), by_hand(model, batch))
    else:
        with pytest.raises(ValueError, match="wrong tokens for prefill_chunk_size"):
            model.generate(**batch, **options)
        with pytest.raises(ValueError, match="wrong tokens for prefill_chunk_size"):
            model.generate(**batch, generation_config=GenerationConfig(prefill_chunk_size=16))


def test_text_only_prompts() -> None:
    model, batch = setup(videos=())
    out = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out, by_hand(model, batch))


# ---- limits


def test_generation_is_capped() -> None:
    model, batch = setup(videos=(1,))
    assert model.generation_config.max_new_tokens == DEFAULT_MAX_NEW_TOKENS
    model.generation_config.max_new_tokens = 5
    assert model.generate(**batch).shape[1] == batch["input_ids"].shape[1] + 5


def test_a_prompt_beyond_the_context_is_refused_before_any_work() -> None:
    model = tiny_model(text_config={"max_position_embeddings": 40})
    batch = tiny_inputs(model.config, videos=(5,))
    length = batch["input_ids"].shape[1]

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("computed something")

    model.model.encode_media = fail
    model.model.language_model.forward = fail
    with pytest.raises(ContextLengthError, match=f"{length} tokens, the model's context is 40"):
        model.generate(**batch)


@pytest.mark.parametrize("how", ["argument", "length", "model", "config"])
def test_new_tokens_beyond_the_context(how: str) -> None:
    model = tiny_model(text_config={"max_position_embeddings": 80})
    batch = tiny_inputs(model.config, videos=(2,))
    room = 80 - batch["input_ids"].shape[1]
    assert 0 < room < DEFAULT_MAX_NEW_TOKENS
    kwargs: dict[str, Any] = {}
    if how == "argument":
        kwargs["max_new_tokens"] = room + 1
    elif how == "length":
        kwargs["max_length"] = 81
    elif how == "config":
        kwargs["generation_config"] = GenerationConfig(max_new_tokens=room + 1)
    with pytest.raises(ContextLengthError, match=f"can be at most {room} here"):
        model.generate(**batch, **kwargs)
    out = model.generate(**batch, max_new_tokens=room, do_sample=False, eos_token_id=None)
    assert out.shape[1] <= 80


@pytest.mark.parametrize("how", ["argument", "config", "position"])
def test_max_length_holds_though_checkpoints_limit_new_tokens(how: str) -> None:
    model, batch = setup(videos=(1,))
    length = batch["input_ids"].shape[1]
    assert model.generation_config.max_new_tokens == DEFAULT_MAX_NEW_TOKENS
    config = GenerationConfig(max_length=length + 3)
    if how == "position":
        out = model.generate(batch.pop("input_ids"), config, **batch)
    elif how == "config":
        out = model.generate(**batch, generation_config=config)
    else:
        out = model.generate(**batch, max_length=length + 3)
    assert out.shape[1] == length + 3
    assert config.max_length == length + 3 and config.max_new_tokens is None


def test_a_prompt_of_max_length_already() -> None:
    model, batch = setup(videos=(1,))
    length = batch["input_ids"].shape[1]
    with pytest.raises(ValueError, match=f"{length} tokens, max_length is {length}"):
        model.generate(**batch, max_length=length)


def test_ids_beyond_the_table_become_another_of_their_prompt() -> None:
    ids = torch.tensor([[9, 3, 8, 4], [1, 9, 9, 2], [9, 9, 9, 9]])
    expected = [[3, 3, 3, 4], [1, 1, 1, 2], [7, 7, 7, 7]]
    assert ids_in_table(ids, 8).tolist() == expected


@pytest.mark.parametrize(
    "option",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"encoder_repetition_penalty": 1.5},
        {"encoder_no_repeat_ngram_size": 2},
    ],
)
def test_processors_by_id_with_placeholders_beyond_the_table(option: dict[str, Any]) -> None:
    # The same model with rows for its placeholders, which are never the best token.
    model, batch = setup(videos=(2,), images=1)
    assert model.config.image_token_id >= model.lm_head.weight.shape[0]
    out = model.generate(**batch, max_new_tokens=NEW, do_sample=False, **option)
    whole, _ = setup()
    whole.resize_token_embeddings(model.config.video_token_id + 1, mean_resizing=False)
    whole.lm_head.weight.data[model.lm_head.weight.shape[0] :] = 0
    assert torch.equal(out, whole.generate(**batch, max_new_tokens=NEW, do_sample=False, **option))


def test_candidates_looked_up_in_the_prompt() -> None:
    model, batch = setup(videos=(2,), images=1)
    expected = by_hand(model, batch, 3 * NEW)
    out = model.generate(
        **batch, max_new_tokens=3 * NEW, do_sample=False, prompt_lookup_num_tokens=3
    )
    assert torch.equal(out, expected)


def test_an_assistant_sees_the_media_too() -> None:
    model, batch = setup(videos=(2,), images=1)
    assistant = tiny_model(seed=3)
    seen: list[int] = []
    fuse = assistant.model.fuse

    def counted(ids: Tensor, embeds: Tensor, images: Any = None, videos: Any = None) -> Tensor:
        seen.append(0 if videos is None else len(videos))
        return fuse(ids, embeds, images, videos)

    assistant.model.fuse = counted
    out = model.generate(**batch, max_new_tokens=NEW, do_sample=False, assistant_model=assistant)
    assert torch.equal(out, by_hand(model, batch))
    assert seen[0] == 18 and set(seen[1:]) == {0}


def test_an_assistant_may_be_a_language_model() -> None:
    model, batch = setup(videos=(2,), images=1)
    assistant = Qwen2ForCausalLM(model.config.text_config).eval()
    out = model.generate(**batch, max_new_tokens=NEW, do_sample=False, assistant_model=assistant)
    assert torch.equal(out, by_hand(model, batch))


def test_a_medium_given_twice() -> None:
    model, batch = setup()
    encoded = {"video": model.get_video_features(batch["pixel_values_videos"])}
    with pytest.raises(ValueError, match="both as pixels and in mm_encoder_outputs"):
        model.generate(**batch, mm_encoder_outputs=encoded, max_new_tokens=2)


def test_expanding_needs_matching_rows() -> None:
    model, batch = setup()
    encoded = {"video": model.get_video_features(batch["pixel_values_videos"][:2])}
    with pytest.raises(ValueError, match="27 video placeholders but the video features have 18"):
        model.generate(
            input_ids=batch["input_ids"], mm_encoder_outputs=encoded, num_beams=2, max_new_tokens=2
        )
