"""Generation with images and videos, the same in every supported version of transformers.

1. A prompt that, with the tokens asked for, does not fit the context is refused before anything is
   computed, and the number of new tokens always has a limit.
2. Media are encoded once, before the first step; pixels never reach transformers' loop. Older
   versions would repeat packed frames frame by frame for beams and pair them with the wrong prompt.
3. For beams and several return sequences each prompt is repeated together with its own rows.
4. After the step that used them, features are not passed again.
5. Processors of logits that look scores up by the ids of the prompt, and assistants that are
   language models alone, see placeholders beyond the vocabulary as another token of their prompt.

``prefill_chunk_size`` with media is refused where transformers would give wrong tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor
from transformers.generation import (
    AssistedCandidateGenerator,
    NoRepeatNGramLogitsProcessor,
    PromptLookupCandidateGenerator,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from longvila.errors import ContextLengthError
from longvila.model import _compat
from longvila.model.fusion import pack_features

#: Tokens generated at most where neither the call nor the checkpoint says.
DEFAULT_MAX_NEW_TOKENS = 512


def ids_in_table(input_ids: Tensor, rows: int) -> Tensor:
    """Replace ids beyond a vocabulary by the first other one of their prompt.

    Args:
        input_ids: Token ids, shape (B, S).
        rows: Size of the vocabulary.

    Returns:
        Ids below it, shape (B, S). What is looked up by them was looked up for their prompt anyway.
    """
    inside = input_ids < rows
    first = input_ids.gather(1, inside.long().argmax(1, keepdim=True))
    return torch.where(inside, input_ids, first.clamp(max=rows - 1))


class _InTable(LogitsProcessor):
    """A processor of logits that never sees an id without a score."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return self.processor(ids_in_table(input_ids, scores.shape[-1]), scores)


class _LookupInTable:
    """Candidates from a prompt in which placeholders are another token, and so are none."""

    def __init__(self, generator: Any, rows: int) -> None:
        self.generator, self.rows = generator, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        found, scores = self.generator.get_candidates(ids_in_table(input_ids, self.rows), **kwargs)
        return torch.cat([input_ids, found[:, input_ids.shape[1] :]], dim=1), scores


class LongVILAGenerationMixin(GenerationMixin):
    """What ``generate`` needs to know about packed media."""

    config: Any
    model: Any
    generation_config: Any

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Generate text; see transformers' ``GenerationMixin.generate`` for the arguments.

        Media are encoded once before the first step. Nothing is computed for a prompt that, with
        the tokens asked for, does not fit the context.

        Args:
            inputs: Token ids with expanded placeholders, if not given by name.
            generation_config: Options of generation. A ``max_length`` there or by name holds where
                the call does not say ``max_new_tokens``.
            *args: Passed on.
            **kwargs: Passed on; pixels or ``mm_encoder_outputs`` and all options of generation.

        Returns:
            Token ids, or the output object that the options ask for.

        Raises:
            ContextLengthError: If the prompt and the new tokens exceed the context.
            ValueError: If ``prefill_chunk_size`` is asked for with media where transformers cannot
                chunk them, or the prompt has ``max_length`` tokens already.
        """
        generation_config = self._limit(kwargs.get("input_ids", inputs), generation_config, kwargs)
        has_media = any(
            kwargs.get(name) is not None
            for name in ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")
        )
        if has_media and not _compat.chunks_media_prefill():
            chunk = kwargs.get("prefill_chunk_size")
            if chunk is None:
                chunk = (generation_config or self.generation_config).prefill_chunk_size
            if chunk is not None:
                raise ValueError(
                    "this version of transformers gives wrong tokens for prefill_chunk_size with "
                    "images or videos (5.23 is the first that is right); leave it out, or fill a "
                    "cache chunk by chunk from fused_embeds"
                )
        if has_media:
            with torch.no_grad():
                self._encode_once(kwargs)
        parent: Any = super()
        return parent.generate(inputs, generation_config, *args, **kwargs)

    def _encode_once(self, kwargs: dict[str, Any]) -> None:
        """Replace pixels among the arguments of generate by their features."""
        encoded = dict(kwargs.pop("mm_encoder_outputs", None) or {})
        for kind, pixels_name, counts_name in (
            ("image", "pixel_values", "image_num_tiles"),
            ("video", "pixel_values_videos", "video_num_frames"),
        ):
            pixels, counts = kwargs.pop(pixels_name, None), kwargs.pop(counts_name, None)
            if pixels is None:
                continue
            if encoded.get(kind) is not None:
                raise ValueError(f"{kind} came both as pixels and in mm_encoder_outputs")
            encode = getattr(self.model, f"get_{kind}_features")
            encoded[kind] = encode(pixels.to(self.model.vision_tower.device), counts)
        kwargs["mm_encoder_outputs"] = encoded

    def _limit(
        self,
        prompt: Tensor | None,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
    ) -> GenerationConfig | None:
        """Refuse what exceeds the context, and count ``max_length`` in new tokens.

        Checkpoints limit new tokens, and transformers would let that limit outdo ``max_length``.
        """
        given = [t for t in (prompt, kwargs.get("inputs_embeds")) if t is not None]
        if not given:
            return generation_config
        length = max(t.shape[1] for t in given)
        if length == 0:
            raise ValueError("the prompt is empty: give at least one token to go on from")
        limit = self.config.context_length
        if limit is not None and length > limit:
            raise ContextLengthError(
                f"the prompt has {length} tokens, the model's context is {limit} "
                f"({self.config.tokens_per_frame} tokens a frame): use fewer frames, or a model "
                "whose context was extended"
            )
        asked = generation_config or GenerationConfig()
        total, new = kwargs.get("max_length"), kwargs.get("max_new_tokens")
        if new is None and total is not None:
            new = kwargs["max_new_tokens"] = kwargs.pop("max_length") - length
        elif new is None and asked.max_new_tokens is None and asked.max_length is not None:
            total, new = asked.max_length, asked.max_length - length
            generation_config = copy.deepcopy(asked)
            generation_config.max_length, generation_config.max_new_tokens = None, new
        elif new is None:
            new = asked.max_new_tokens or self.generation_config.max_new_tokens
        if total is not None and new is not None and new < 1:
            raise ValueError(
                f"the prompt has {length} tokens, max_length is {total}: nothing to do"
            )
        if limit is not None and new is not None and length + new > limit:
            raise ContextLengthError(
                f"a prompt of {length} tokens and {new} new ones exceed the model's context of "
                f"{limit}: max_new_tokens can be at most {limit - length} here"
            )
        return generation_config

    def _get_logits_processor(
        self, generation_config: Any, *args: Any, encoder_input_ids: Any = None, **kwargs: Any
    ) -> Any:
        """Keep ids without a score from the processors that look scores up by id."""
        rows = self.config.get_text_config().vocab_size
        # Of embeddings, this is what transformers passes for the ids.
        if encoder_input_ids is not None and encoder_input_ids.ndim == 2:
            encoder_input_ids = ids_in_table(encoder_input_ids, rows)
        parent: Any = super()
        processors = parent._get_logits_processor(
            generation_config, *args, encoder_input_ids=encoder_input_ids, **kwargs
        )
        by_id = (RepetitionPenaltyLogitsProcessor, NoRepeatNGramLogitsProcessor)
        return type(processors)(_InTable(p) if isinstance(p, by_id) else p for p in processors)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """Keep placeholders from the lookup in the prompt, and from assistants without sight."""
        parent: Any = super()
        found = parent._get_candidate_generator(*args, **kwargs)
        rows = min(
            self.config.get_text_config().vocab_size,
            self.config.image_token_id,
            self.config.video_token_id,
        )
        # The table of a language model that helps has no row for them either.
        blind = type(found) is AssistedCandidateGenerator and not hasattr(
            found.assistant_model.config, "vision_config"
        )
        if blind:
            found.assistant_kwargs.pop("mm_encoder_outputs", None)
        lookup = isinstance(found, PromptLookupCandidateGenerator)
        return _LookupInTable(found, rows) if lookup or blind else found

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Drop encoded media after the step that used them; see ``GenerationMixin``.

        Args:
            input_ids: All tokens so far.
            inputs_embeds: Embeddings of the prompt in place of ids, for the first step.
            **kwargs: Passed on.

        Returns:
            Arguments of the forward pass.
        """
        parent: Any = super()
        model_inputs = parent.prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        ids, encoded = model_inputs.get("input_ids"), kwargs.get("mm_encoder_outputs")
        # An assistant's first step is told to be none, and is the whole prompt all the same.
        whole = ids is not None and ids.shape[1] == input_ids.shape[1]
        if whole and encoded is not None:
            model_inputs["mm_encoder_outputs"] = encoded
        elif ids is None or not kwargs.get("is_first_iteration", False):
            model_inputs.pop("mm_encoder_outputs", None)
        return model_inputs

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat each prompt, and the features of its media in its own order."""
        encoded = model_kwargs.pop("mm_encoder_outputs", None)
        if encoded and input_ids is not None and expand_size > 1:
            encoded = {
                kind: self._expand_features(kind, output, input_ids, expand_size)
                for kind, output in encoded.items()
                if output is not None
            }
        parent: Any = super()
        input_ids, model_kwargs = parent._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        if encoded is not None:
            model_kwargs["mm_encoder_outputs"] = encoded
        return input_ids, model_kwargs

    def _expand_features(
        self, kind: str, output: BaseModelOutputWithPooling, input_ids: Tensor, times: int
    ) -> BaseModelOutputWithPooling:
        rows = pack_features(output.pooler_output)
        wanted = (input_ids == getattr(self.config, f"{kind}_token_id")).sum(-1).tolist()
        if sum(wanted) != rows.shape[0]:
            raise ValueError(
                f"input_ids have {sum(wanted)} {kind} placeholders but the {kind} features have "
                f"{rows.shape[0]} rows"
            )
        repeated: Any = [sample for sample in rows.split(wanted) for _ in range(times)]
        return BaseModelOutputWithPooling(pooler_output=repeated)
