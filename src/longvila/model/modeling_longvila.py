"""The LongVILA model in Hugging Face form: vision tower, projector, language model.

The forward pass is three calls, each usable alone (sequence parallelism puts communication between
them):

1. `LongVILAModel.encode_media`: frames through the tower and the projector, ``vision_batch_size``
   at a time, to packed rows and the row count of each item. `get_image_features` and
   `get_video_features` are the same call with the names and the output that transformers expects.
2. `LongVILAModel.fuse`: rows written over their placeholders in the embedded text.
3. The language model.

Placeholders are never looked up in the embedding table, which may have fewer rows than the
tokenizer has ids. A placeholder without features and features without a placeholder are errors.

Memory of the first step in training: with gradient checkpointing each micro-batch of frames is one
checkpoint, so the pixels and the rows are kept and the activations of one micro-batch at a time are
recomputed. The tower's own checkpointing per layer is left off then; it would recompute twice
and keep one hidden state a layer for all frames. A frozen tower runs once, without a graph, and its
features are kept: they are far smaller than its activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput, can_return_tuple

from longvila.model.configuration_longvila import LongVILAConfig
from longvila.model.conversation import check_targets
from longvila.model.fusion import MediaFeatures, pack_features, pool_video, scatter_rows
from longvila.model.generation_longvila import DEFAULT_MAX_NEW_TOKENS, LongVILAGenerationMixin
from longvila.model.packed import keep_apart, without_first
from longvila.model.projector import LongVILAProjector
from longvila.model.vila.loading import VilaLoading
from longvila.model.vision_tower import build_tower, tower_features, unused_weight_patterns

_LOSS_KEYS = ("num_items_in_batch", "shift_labels", "ignore_index")
_MODALITIES = ("image", "video")


@dataclass
class LongVILAModelOutputWithPast(BaseModelOutputWithPast):
    """Output of the base model.

    Args:
        image_hidden_states: Rows of all images, shape (N, M).
        video_hidden_states: Rows of all videos, shape (N, M).
    """

    image_hidden_states: Tensor | None = None
    video_hidden_states: Tensor | None = None


@dataclass
class LongVILACausalLMOutputWithPast(ModelOutput):
    """Output of the model with its head.

    Args:
        loss: Mean loss over the labels (or their sum over ``num_items_in_batch``).
        logits: Scores of the kept positions, shape (B, kept, V).
        past_key_values: The cache.
        hidden_states: Hidden states of the language model where asked for.
        attentions: Attention weights of the language model where asked for.
        image_hidden_states: Rows of all images, shape (N, M).
        video_hidden_states: Rows of all videos, shape (N, M).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    video_hidden_states: Tensor | None = None


def _refuse_scaled_logits(text_config: Any) -> None:
    """A head that does more than a matrix product cannot be rebuilt from the base model."""
    for name, neutral in (
        ("final_logit_softcapping", None),
        ("logits_scaling", 1.0),
        ("logit_scale", 1.0),
    ):
        value = getattr(text_config, name, neutral)
        if value is not None and value != neutral:
            raise ValueError(
                f"the language model {text_config.model_type!r} transforms its logits "
                f"({name}={value}); LongVILA's head is a plain linear layer and would be wrong"
            )


class LongVILAPreTrainedModel(VilaLoading, PreTrainedModel):
    """What the base model and the model with a head share."""

    config: LongVILAConfig
    config_class = LongVILAConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _no_split_modules = ["LongVILAProjector"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, **kwargs: Any
    ) -> None:
        super()._set_gradient_checkpointing(enable=enable, **kwargs)
        for module in self.modules():
            if isinstance(module, LongVILAModel):
                for layer in module.vision_tower.modules():
                    if hasattr(layer, "gradient_checkpointing"):
                        layer.gradient_checkpointing = False  # type: ignore[assignment]


class LongVILAModel(LongVILAPreTrainedModel):
    """Vision tower, projector and language model, without a head.

    Args:
        config: What the three are.
    """

    def __init__(self, config: LongVILAConfig) -> None:
        super().__init__(config)
        self.vision_tower = build_tower(config)
        self.multi_modal_projector = LongVILAProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.gradient_checkpointing = False
        self._keys_to_ignore_on_load_unexpected = unused_weight_patterns(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding table of the language model."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding table of the language model."""
        self.language_model.set_input_embeddings(value)

    # ---- media to rows

    def _project(self, features: Tensor) -> Tensor:
        """Features (F, P, C) to rows (F, N, M), in the projector's own precision."""
        # Quantised matrices are bytes; what is beside them says what a layer computes in.
        kinds = (p.dtype for p in self.multi_modal_projector.parameters())
        wide = (kind for kind in kinds if kind.is_floating_point and kind.itemsize > 1)
        return self.multi_modal_projector(features.to(next(wide, features.dtype)))

    def _features(self, pixel_values: Tensor) -> Tensor:
        return tower_features(self.vision_tower, pixel_values, self.config)

    def _encode_frames(self, pixel_values: Tensor) -> Tensor:
        """One micro-batch of frames (F, 3, h, w) to rows (F, N, M)."""
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if any(p.requires_grad for p in self.vision_tower.parameters()):
            if recompute:
                return checkpoint(
                    lambda pixels: self._project(self._features(pixels)),
                    pixel_values,
                    use_reentrant=False,
                )
            return self._project(self._features(pixel_values))
        with torch.no_grad():
            features = self._features(pixel_values)
        if recompute:
            return checkpoint(self._project, features, use_reentrant=False)
        return self._project(features)

    def encode_media(
        self,
        pixel_values: Tensor,
        frames_per_item: Sequence[int] | Tensor | None = None,
        *,
        kind: str = "video",
    ) -> MediaFeatures:
        """Encode images or videos to packed rows.

        Args:
            pixel_values: Normalised frames (or tiles) of all items one after the other, shape
                (F, 3, height, width).
            frames_per_item: Frames of each item. None means that each frame is an image of its own,
                or that all frames are one video.
            kind: ``image`` or ``video``; only videos are pooled over time.

        Returns:
            Rows of all items (N, M) and the count of each item.

        Raises:
            TypeError: If the pixels are levels.
            ValueError: If shapes or counts do not fit each other or the tower.
        """
        if kind not in _MODALITIES:
            raise ValueError(f"kind must be one of {_MODALITIES}, got {kind!r}")
        frame = (getattr(self.config.vision_config, "num_channels", 3), *self.config.image_size)
        if tuple(pixel_values.shape[1:]) != frame:
            raise ValueError(
                f"{kind} pixels must have shape (frames, {', '.join(map(str, frame))}), got "
                f"{tuple(pixel_values.shape)}"
            )
        if not pixel_values.is_floating_point():
            raise TypeError(
                f"{kind} pixels must be normalised, as the processor makes them, got "
                f"{pixel_values.dtype}"
            )
        total = pixel_values.shape[0]
        if frames_per_item is None:
            frames = [1] * total if kind == "image" else [total]
        else:
            frames = [int(n) for n in torch.as_tensor(frames_per_item).flatten().tolist()]
        if sum(frames) != total or min(frames, default=0) < 0:
            raise ValueError(
                f"{kind} frames per item {frames} add up to {sum(frames)}, but pixels hold {total} "
                "frames"
            )
        size = self.config.vision_batch_size or max(total, 1)
        rows = [self._encode_frames(chunk) for chunk in pixel_values.split(size)]
        packed = rows[0] if len(rows) == 1 else torch.cat(rows)
        tokens = packed.shape[1]
        if kind == "video" and self.config.pool_sizes:
            pooled = [
                pool_video(
                    video,
                    self.config.frame_grid,
                    self.config.pool_sizes,
                    column=self.config.token_order == "column",
                )
                for video in packed.split(frames)
            ]
            return MediaFeatures(torch.cat(pooled), [p.shape[0] for p in pooled])
        return MediaFeatures(packed.flatten(0, 1), [n * tokens for n in frames])

    def get_image_features(
        self, pixel_values: Tensor, image_num_tiles: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: Normalised tiles of all images, shape (tiles, 3, height, width).
            image_num_tiles: Tiles of each image; None means one each.
            **kwargs: Accepted for the callers in transformers; not used.

        Returns:
            An output whose ``pooler_output`` is a list with the (rows, M) of each image.
        """
        items: Any = self.encode_media(pixel_values, image_num_tiles, kind="image").split()
        return BaseModelOutputWithPooling(pooler_output=items)

    def get_video_features(
        self, pixel_values_videos: Tensor, video_num_frames: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode videos.

        Args:
            pixel_values_videos: Normalised frames of all videos, shape (frames, 3, height, width).
            video_num_frames: Frames of each video; None means that there is one video.
            **kwargs: Accepted for the callers in transformers; not used.

        Returns:
            An output whose ``pooler_output`` is a list with the (rows, M) of each video.
        """
        items: Any = self.encode_media(pixel_values_videos, video_num_frames, kind="video").split()
        return BaseModelOutputWithPooling(pooler_output=items)

    # ---- text and rows to embeddings

    def embed_tokens(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Look up text tokens; placeholders get an arbitrary row that `fuse` overwrites.

        Args:
            input_ids: Token ids, shape (B, S).
            attention_mask: Mask of the same tokens, shape (B, S); padding gets an arbitrary row as
                well, since its id may lie beyond the table.

        Returns:
            Embeddings, shape (B, S, M).
        """
        table = self.get_input_embeddings()
        skip = (input_ids == self.config.image_token_id) | (input_ids == self.config.video_token_id)
        if isinstance(attention_mask, Tensor) and attention_mask.shape == input_ids.shape:
            skip = skip | (attention_mask == 0)
        pad = getattr(self.config.text_config, "pad_token_id", None)
        rows = getattr(table, "num_embeddings", None)
        if pad is not None and rows is not None and pad >= rows:
            skip = skip | (input_ids == pad)
        return table(input_ids.masked_fill(skip, 0))

    def fuse(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor,
        image_rows: Tensor | None = None,
        video_rows: Tensor | None = None,
    ) -> Tensor:
        """Write rows over their placeholders.

        Args:
            input_ids: Token ids, shape (B, S).
            inputs_embeds: Embeddings of the same sequence, shape (B, S, M).
            image_rows: Rows of all images, shape (N, M), None if there are none.
            video_rows: Rows of all videos, shape (N, M), None if there are none.

        Returns:
            New embeddings, shape (B, S, M).

        Raises:
            ValueError: If placeholders and rows do not agree in number.
        """
        for kind, rows in (("image", image_rows), ("video", video_rows)):
            token_id = getattr(self.config, f"{kind}_token_id")
            # One token is a step of generation: it has no media and must not wait for the device.
            if rows is None and input_ids.shape[-1] == 1:
                continue
            if rows is None:
                rows = inputs_embeds.new_zeros(0, inputs_embeds.shape[-1])
            inputs_embeds = scatter_rows(input_ids, inputs_embeds, rows, token_id, kind=kind)
        return inputs_embeds

    def fused_embeds(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        *,
        image_num_tiles: Tensor | None = None,
        video_num_frames: Tensor | None = None,
        attention_mask: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Do everything that comes before the language model.

        Args:
            input_ids: Token ids, shape (B, S).
            pixel_values: Tiles of all images.
            pixel_values_videos: Frames of all videos.
            image_num_tiles: Tiles of each image.
            video_num_frames: Frames of each video.
            attention_mask: Mask, shape (B, S).
            mm_encoder_outputs: Outputs of `get_image_features` ("image") and `get_video_features`
                ("video") in place of pixels.

        Returns:
            Embeddings (B, S, M), and the rows of each kind of medium that was there.

        Raises:
            ValueError: If a medium comes both as pixels and encoded, or counts do not agree.
        """
        given = {k: v for k, v in (mm_encoder_outputs or {}).items() if v is not None}
        rows: dict[str, Tensor] = {}
        for kind, pixels, counts in (
            ("image", pixel_values, image_num_tiles),
            ("video", pixel_values_videos, video_num_frames),
        ):
            if pixels is not None and kind in given:
                raise ValueError(f"{kind} came both as pixels and in mm_encoder_outputs")
            if pixels is not None:
                rows[kind] = self.encode_media(pixels, counts, kind=kind).rows
            elif kind in given:
                rows[kind] = pack_features(given[kind].pooler_output)
        embeds = self.embed_tokens(input_ids, attention_mask)
        return self.fuse(input_ids, embeds, rows.get("image"), rows.get("video")), rows

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        image_num_tiles: Tensor | None = None,
        video_num_frames: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> LongVILAModelOutputWithPast:
        """Run the model up to the last hidden state.

        Args:
            input_ids: Token ids with expanded placeholders, shape (B, S).
            pixel_values: Tiles of all images, shape (tiles, 3, height, width).
            pixel_values_videos: Frames of all videos, shape (frames, 3, height, width).
            attention_mask: Mask, shape (B, S), or whatever the language model takes.
            position_ids: Positions, shape (B, S). Where they restart, a document begins.
            past_key_values: Cache to read and extend.
            inputs_embeds: Fused embeddings in place of ids and media, shape (B, S, M).
            image_num_tiles: Tiles of each image.
            video_num_frames: Frames of each video.
            mm_encoder_outputs: Encoded media in place of pixels.
            **kwargs: ``document_lengths``, tokens of the documents that a row packs; the rest is
                handed to the language model.

        Returns:
            The language model's output and the media rows.

        Raises:
            ValueError: If not exactly one of ids and embeddings is given, or media do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        rows: dict[str, Tensor] = {}
        if input_ids is not None:
            inputs_embeds, rows = self.fused_embeds(
                input_ids,
                pixel_values,
                pixel_values_videos,
                image_num_tiles=image_num_tiles,
                video_num_frames=video_num_frames,
                attention_mask=attention_mask,
                mm_encoder_outputs=mm_encoder_outputs,
            )
        elif pixel_values is not None or pixel_values_videos is not None or mm_encoder_outputs:
            raise ValueError(
                "inputs_embeds already hold the media: without input_ids there are no placeholders "
                "to fill; use fused_embeds to make inputs_embeds"
            )
        assert inputs_embeds is not None
        if past_key_values is None and not torch.compiler.is_compiling():
            position_ids, attention_mask = keep_apart(
                inputs_embeds, position_ids, attention_mask, kwargs
            )
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            return_dict=True,
            **kwargs,
        )
        return LongVILAModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=getattr(outputs, "past_key_values", None),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=rows.get("image"),
            video_hidden_states=rows.get("video"),
        )


class LongVILAForConditionalGeneration(LongVILAPreTrainedModel, LongVILAGenerationMixin):
    """LongVILA with its language-model head.

    Args:
        config: What the parts are.
    """

    _tied_weights_keys = {  # noqa: RUF012
        "lm_head.weight": "model.language_model.embed_tokens.weight"
    }
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: LongVILAConfig) -> None:
        super().__init__(config)
        _refuse_scaled_logits(config.text_config)
        self.model = LongVILAModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        # The table has another name in some language models.
        table = self.model.get_input_embeddings()
        names = [n for n, module in self.model.named_modules() if module is table]
        self._tied_weights_keys = {"lm_head.weight": f"model.{names[0]}.weight"}
        self.post_init()
        if self.generation_config.max_new_tokens is None:
            self.generation_config.max_new_tokens = DEFAULT_MAX_NEW_TOKENS

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding table of the language model."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding table of the language model."""
        self.model.set_input_embeddings(value)

    def encode_media(self, *args: Any, **kwargs: Any) -> MediaFeatures:
        """See :meth:`LongVILAModel.encode_media`."""
        return self.model.encode_media(*args, **kwargs)

    def fuse(self, *args: Any, **kwargs: Any) -> Tensor:
        """See :meth:`LongVILAModel.fuse`."""
        return self.model.fuse(*args, **kwargs)

    def get_image_features(
        self, pixel_values: Tensor, image_num_tiles: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """See :meth:`LongVILAModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_num_tiles, **kwargs)

    def get_video_features(
        self, pixel_values_videos: Tensor, video_num_frames: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """See :meth:`LongVILAModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, video_num_frames, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        image_num_tiles: Tensor | None = None,
        video_num_frames: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> LongVILACausalLMOutputWithPast:
        """Run the model and its head; what is not listed is as for :meth:`LongVILAModel.forward`.

        Args:
            labels: Targets at their own positions (shifted here), -100 for none, as at
                placeholders of media; shape (B, S).
            logits_to_keep: How many last positions (0: all), or which, get logits.
            **kwargs: ``shift_labels`` (targets already shifted), ``num_items_in_batch`` and
                ``ignore_index`` go to the loss, the rest to the language model.

        Returns:
            Loss where there are labels, logits, cache and media rows.

        Raises:
            ValueError: As the base model's forward, or if placeholders that have no row in the head
                are targets.
        """
        loss_kwargs = {k: kwargs.pop(k) for k in _LOSS_KEYS if kwargs.get(k) is not None}
        rows = self.config.text_config.vocab_size
        beyond = max(self.config.image_token_id, self.config.video_token_id) >= rows
        if labels is not None and beyond and not torch.compiler.is_compiling():
            check_targets(labels, rows, ignore_index=loss_kwargs.get("ignore_index", -100))
        documents = kwargs.get("document_lengths")
        if labels is not None and documents is not None:
            index = loss_kwargs.get("ignore_index", -100)
            labels = without_first(labels, documents, ignore_index=index)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_num_tiles=image_num_tiles,
            video_num_frames=video_num_frames,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **{k: v for k, v in kwargs.items() if k not in _LOSS_KEYS and k != "return_dict"},
        )
        hidden = outputs.last_hidden_state
        if isinstance(logits_to_keep, int):
            kept = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        else:
            kept = hidden[:, logits_to_keep]
        logits = self.lm_head(kept)
        loss = None
        if labels is not None or "shift_labels" in loss_kwargs:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.text_config.vocab_size,
                **loss_kwargs,
            )
        return LongVILACausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            video_hidden_states=outputs.video_hidden_states,
        )


AutoModel.register(LongVILAConfig, LongVILAModel, exist_ok=True)
for _auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto.register(LongVILAConfig, LongVILAForConditionalGeneration, exist_ok=True)
