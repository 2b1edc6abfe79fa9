"""The processor: conversations and media to the model's inputs.

1. The chat template writes one placeholder for each image or video, where it stands in the message.
2. Images become tiles, videos become sampled frames (`image_processing_longvila`,
   `video_processing_longvila`).
3. Each placeholder is expanded in the text: a frame (or tile) is ``tokens_per_frame`` placeholders
   and then the separator, a newline by default; what follows in the text follows directly. The
   separator is ordinary text, but tokenised apart from what follows: a newline before another one
   must not become the token of two. Optional before each frame: its time.
4. The text is tokenised, prompts padded on the left.

Labels are exact spans: the template marks what the assistant says, marks are character ranges, they
move with the expansion, and a token is a target if it starts inside one or reaches into it (as a
word with the space before it). Newlines inside an answer and the token that ends the turn are
targets, what the template writes around them is not.

Layouts: ``frame_separator=""`` is that of needle-in-a-haystack evaluation. ``timestamps`` (ours, no
published weights were trained with it) writes ``mm:ss `` before each frame.

It does not cut prompts: a prompt longer than the context is for the model to refuse, since cutting
placeholders would misplace features.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.auto.processing_auto import AutoProcessor
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.processing_utils import MultiModalData, ProcessorMixin, TextKwargs
from transformers.utils.chat_template_utils import (
    _get_template_variables as template_variables,
)
from transformers.utils.chat_template_utils import render_jinja_template

from longvila.log import log_once
from longvila.media.video import SampledVideo
from longvila.model.configuration_longvila import LongVILAConfig, video_segments
from longvila.model.conversation import (
    build_labels,
    list_prompts,
    media_of,
    move_spans,
    normalise_conversation,
)
from longvila.model.image_processing_longvila import LongVILAImageProcessor, flatten
from longvila.model.pieces import CUT, tokenize_pieces
from longvila.model.video_processing_longvila import LongVILAVideoProcessor, list_videos
from longvila.model.vila.loading import VilaProcessorLoading

IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<vila/video>"
_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
_GROUPS = ("text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs", "common_kwargs")
_SAMPLING = ("num_frames", "fps", "indices", "do_sample_frames", "overflow", "video_metadata")
_READING = ("backend", "threads", "progress", "limits", "allow_http", "frame_rate")
_VIDEO_OPTIONS = frozenset((*_SAMPLING, *_READING))
_OUR_OPTIONS = frozenset(("timestamps", "frame_separator", "tile_images"))
_TEXT_OPTIONS = frozenset(TextKwargs.__annotations__)
_TEMPLATE_OPTIONS = frozenset(inspect.signature(ProcessorMixin.apply_chat_template).parameters)


def default_chat_template() -> str:
    """Return the chat template of Qwen2-based models, with media placeholders."""
    return _TEMPLATE.read_text(encoding="utf-8")


def add_media_tokens(tokenizer: Any) -> tuple[int, int]:
    """Make sure that a tokenizer knows the media placeholders; ids that exist are kept.

    Args:
        tokenizer: A fast tokenizer; changed in place.

    Returns:
        Ids of the image and the video placeholder.
    """
    known = tokenizer.get_vocab()
    missing = [token for token in (IMAGE_TOKEN, VIDEO_TOKEN) if token not in known]
    if missing:
        # add_tokens keeps the other special tokens, where add_special_tokens may replace the list.
        tokenizer.add_tokens(missing, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, VIDEO_TOKEN])
    return ids[0], ids[1]


def clock(seconds: float) -> str:
    """Return a time as minutes and seconds, ``mm:ss``, rounded down."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes:02d}:{rest:02d}"


class LongVILAProcessor(VilaProcessorLoading, ProcessorMixin):  # type: ignore[misc]
    """Processor of LongVILA models.

    Args:
        image_processor: Makes tiles of images.
        tokenizer: A fast tokenizer that knows both placeholders.
        video_processor: Makes frames of videos.
        chat_template: Jinja template of conversations; None is the one shipped here.
        frame_grid: Tokens of a frame as (height, width).
        pool_sizes: Temporal-spatial pooling of videos, as in the configuration.
        pool_separator: Text after each pooled copy of a video.
        frame_separator: Text after each frame or tile.
        timestamps: Whether to write each frame's time before it.
        system_prompt: System turn of conversations that have none; None leaves it to the template.
        image_token: Placeholder of images.
        video_token: Placeholder of videos.

    Raises:
        ValueError: If the tokenizer does not know a placeholder.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        video_processor: Any,
        chat_template: str | dict[str, str] | None = None,
        frame_grid: Sequence[int] = (14, 14),
        pool_sizes: Sequence[Sequence[int]] | None = None,
        pool_separator: str = "",
        frame_separator: str = "\n",
        timestamps: bool = False,
        system_prompt: str | None = None,
        image_token: str = IMAGE_TOKEN,
        video_token: str = VIDEO_TOKEN,
    ) -> None:
        vocabulary = tokenizer.get_vocab()
        for token in (image_token, video_token):
            if token not in vocabulary:
                raise ValueError(
                    f"the tokenizer has no token {token!r}; add it with "
                    "longvila.model.processing_longvila.add_media_tokens"
                )
        self.image_token, self.video_token = image_token, video_token
        self.image_token_id = vocabulary[image_token]
        self.video_token_id = vocabulary[video_token]
        self.frame_grid = [int(n) for n in frame_grid]
        self.pool_sizes = [list(size) for size in pool_sizes] if pool_sizes else None
        self.pool_separator, self.frame_separator = pool_separator, frame_separator
        self.timestamps = timestamps
        self.system_prompt = system_prompt
        super().__init__(
            image_processor,
            tokenizer,
            video_processor,
            chat_template=default_chat_template() if chat_template is None else chat_template,
        )

    @classmethod
    def from_config(
        cls, config: LongVILAConfig, tokenizer: Any, **overrides: Any
    ) -> LongVILAProcessor:
        """Build the processor that fits a model.

        Args:
            config: The model's configuration.
            tokenizer: Its tokenizer, with the placeholders at the configuration's ids.
            **overrides: Arguments of the processor, and of the image and the video processor.

        Returns:
            The processor.

        Raises:
            ValueError: If a placeholder has another id in the tokenizer than in the configuration.
        """
        ids = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, VIDEO_TOKEN])
        if tuple(ids) != (config.image_token_id, config.video_token_id):
            raise ValueError(
                f"the tokenizer's ids of {IMAGE_TOKEN} and {VIDEO_TOKEN} are {tuple(ids)}, the "
                f"configuration's {(config.image_token_id, config.video_token_id)}"
            )
        height, width = config.image_size
        pixels: dict[str, Any] = {
            "size": {"height": height, "width": width},
            "image_aspect_ratio": config.image_aspect_ratio,
        }
        for name in ("image_mean", "image_std", "rescale_factor", "size", "image_aspect_ratio"):
            if name in overrides:
                pixels[name] = overrides.pop(name)
        image = LongVILAImageProcessor(
            min_tiles=overrides.pop("min_tiles", config.min_tiles),
            max_tiles=overrides.pop("max_tiles", config.max_tiles),
            **pixels,
        )
        video = LongVILAVideoProcessor(
            num_frames=overrides.pop("num_frames", config.num_video_frames),
            fps=overrides.pop("fps", config.video_fps),
            short=overrides.pop("short", "repeat"),
            **pixels,
        )
        arguments: dict[str, Any] = {
            "frame_grid": config.frame_grid,
            "pool_sizes": config.pool_sizes,
            "pool_separator": config.pool_separator,
            "frame_separator": config.frame_separator,
        }
        return cls(image, tokenizer, video, **{**arguments, **overrides})

    # ---- layout

    @property
    def tokens_per_frame(self) -> int:
        """Placeholders of one image tile or unpooled frame, without the separator."""
        return self.frame_grid[0] * self.frame_grid[1]

    def image_text(self, num_tiles: int, *, separator: str, tiled: bool, cut: str = "") -> str:
        """Return what an image's placeholder becomes.

        Args:
            num_tiles: Tiles of the image.
            separator: Text after each.
            tiled: Whether it went through dynamic tiling, where upstream's prompt has one more
                newline after each tile.
            cut: Mark of the places where the text is cut for tokenising.

        Returns:
            The text.
        """
        tile = self.image_token * self.tokens_per_frame + separator + (cut if separator else "")
        tile += "\n" if tiled else ""
        return tile * num_tiles

    def video_text(
        self,
        num_frames: int,
        *,
        separator: str,
        times_s: Sequence[float] | None = None,
        cut: str = "",
    ) -> str:
        """Return what a video's placeholder becomes.

        Args:
            num_frames: Frames before pooling.
            separator: Text after each frame.
            times_s: Time of each frame in seconds, to be written before it; a pooled frame has the
                time of its first.
            cut: Mark of the places where the text is cut for tokenising.

        Returns:
            The text.
        """
        grid = (self.frame_grid[0], self.frame_grid[1])
        segments = video_segments(num_frames, grid, self.pool_sizes)
        steps = [size[0] for size in self.pool_sizes] if self.pool_sizes else [1]
        text = ""
        for (frames, tokens), step in zip(segments, steps, strict=True):
            frame = self.video_token * tokens + separator + (cut if separator else "")
            if times_s is None:
                text += frame * frames
            else:
                text += "".join(f"{clock(times_s[i * step])} {frame}" for i in range(frames))
            if self.pool_sizes and self.pool_separator:
                text += self.pool_separator + cut
        return text

    # ---- inputs

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        *,
        return_tensors: Any = None,
        return_metadata: bool = False,
        return_mm_token_type_ids: bool = False,
        return_text_replacement_offsets: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Make the model's inputs of prompts and media.

        Args:
            images: Images in the order of their placeholders, over all prompts; may be nested.
            text: One prompt or several, with one placeholder for each medium.
            videos: Videos in the order of their placeholders, over all prompts; may be nested.
            return_tensors: Type of the tensors; without it, token ids are lists.
            return_metadata: Whether to add ``video_metadata``.
            return_mm_token_type_ids: Whether to add 0 (text), 1 (image), 2 (video) for each token.
            return_text_replacement_offsets: Whether to add where placeholders were expanded.
            **kwargs: Options of the videos (``num_frames``, ``fps``, ``indices``,
                ``do_sample_frames``, ``video_metadata`` and those of reading), of the layout
                (``timestamps``, ``frame_separator``, ``tile_images``), and of the tokenizer; each
                may also stand in ``videos_kwargs``, ``images_kwargs`` or ``text_kwargs``.

        Returns:
            ``input_ids``, ``attention_mask``, and of the media that are there ``pixel_values`` with
            ``image_num_tiles``, ``pixel_values_videos`` with ``video_num_frames``.

        Raises:
            TypeError: If ``text`` is neither a string nor a list of them.
            ValueError: If placeholders and media do not agree in number, over all prompts or, where
                media come as one list a prompt, in one of them.
        """
        for group in _GROUPS:
            kwargs = {**(kwargs.pop(group, None) or {}), **kwargs}
        return_tensors = kwargs.pop("return_tensors", return_tensors)
        kwargs.pop("audio", None)
        unknown = sorted(set(kwargs) - _VIDEO_OPTIONS - _OUR_OPTIONS - _TEXT_OPTIONS)
        if unknown:
            log_once(__name__, logging.WARNING, f"options that mean nothing here: {unknown}")
        ours = {k: kwargs.pop(k) for k in list(kwargs) if k in _OUR_OPTIONS}
        video_options = {k: kwargs.pop(k) for k in list(kwargs) if k in _VIDEO_OPTIONS}
        separator = ours.get("frame_separator")
        separator = self.frame_separator if separator is None else separator
        if text is None and images is None and videos is None:
            raise ValueError("give text, images or videos")
        prompts = None if text is None else list_prompts(text)
        pictures = [] if images is None else flatten(images)
        clips = [] if videos is None else list_videos(videos)
        data: dict[str, Any] = {}
        image_texts: list[str] = []
        video_texts: list[str] = []
        if prompts is not None:
            self._check_counts(prompts, self.image_token, images, flatten, "images")
            self._check_counts(prompts, self.video_token, videos, list_videos, "videos")
        if pictures:
            alone = self._alone(prompts, len(pictures))
            if ours.get("tile_images") is not None:
                alone = [bool(ours["tile_images"])] * len(pictures)
            out = self.image_processor(pictures, dynamic=alone, return_tensors=return_tensors)
            data.update(out)
            dynamic = self.image_processor.image_aspect_ratio == "dynamic"
            for count, may_tile in zip(out["image_num_tiles"], alone, strict=True):
                image_texts.append(
                    self.image_text(
                        int(count), separator=separator, tiled=dynamic and may_tile, cut=CUT
                    )
                )
        if clips:
            # As one sample's: a clip that is a list of paths must not be listed a second time.
            out = self.video_processor(
                [clips], return_tensors=return_tensors, return_metadata=True, **video_options
            )
            sampled: list[SampledVideo] = out.pop("video_metadata")
            data.update(out)
            with_times = ours.get("timestamps")
            with_times = self.timestamps if with_times is None else with_times
            for video in sampled:
                times = video.timestamps_s.tolist() if with_times else None
                video_texts.append(
                    self.video_text(len(video.frames), separator=separator, times_s=times, cut=CUT)
                )
            if return_metadata:
                data["video_metadata"] = sampled
        if prompts is not None:
            if return_text_replacement_offsets:
                plain = [[t.replace(CUT, "") for t in ts] for ts in (image_texts, video_texts)]
                _, offsets = self.get_text_with_replacements(list(prompts), *plain)
            marked, _ = self.get_text_with_replacements(list(prompts), image_texts, video_texts)
            kwargs.setdefault("padding_side", "left")
            encoded = tokenize_pieces(
                self.tokenizer, marked, self.image_token,
                placeholders=(self.image_token, self.video_token), **kwargs,
            )  # fmt: skip
            encoded.pop("token_type_ids", None)
            if return_mm_token_type_ids:
                encoded["mm_token_type_ids"] = self.create_mm_token_type_ids(encoded["input_ids"])
            data = {**encoded, **data}
            if return_text_replacement_offsets:
                data["text_replacement_offsets"] = offsets
        features = BatchFeature()
        keep = ("video_metadata", "text_replacement_offsets")
        features.update({k: v for k, v in data.items() if k not in keep})
        features = features.convert_to_tensors(tensor_type=return_tensors)
        if prompts is not None and isinstance(features["input_ids"], Tensor):  # empty: float
            features["input_ids"] = features["input_ids"].long()
        features.update({k: data[k] for k in keep if k in data})
        return features

    @staticmethod
    def _check_counts(
        prompts: list[str], token: str, media: Any, leaves: Callable[[Any], list[Any]], name: str
    ) -> None:
        written = [prompt.count(token) for prompt in prompts]
        given = 0 if media is None else len(leaves(media))
        if sum(written) != given:
            raise ValueError(
                f"the prompts have {sum(written)} placeholders {token} but {given} {name} were "
                "given"
            )
        if not isinstance(media, list | tuple) or len(media) != len(prompts):
            return
        lists = [leaves([own]) if isinstance(own, list | tuple) else [own] for own in media]
        # A list of frames is one video, and then this is no list a prompt.
        if any(leaf is own for own, found in zip(media, lists, strict=True) for leaf in found):
            return
        for i, (count, found) in enumerate(zip(written, lists, strict=True)):
            if count != len(found):
                raise ValueError(
                    f"prompt {i} has {count} placeholders {token} but its list has {len(found)} "
                    f"{name}"
                )

    def _alone(self, prompts: list[str] | None, total: int) -> list[bool]:
        """Say of each image whether it is the only one of its prompt (videos do not matter)."""
        if prompts is None:
            return [True] * total
        alone: list[bool] = []
        for prompt in prompts:
            count = prompt.count(self.image_token)
            alone += [count == 1] * count
        return alone

    # ---- conversations

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        return_labels: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render a conversation, or several; see transformers for the other arguments.

        Args:
            conversation: Messages, or a list of conversations. Content is text or a list of
                ``{"type": "text" | "image" | "video", ...}``; OpenAI's ``image_url`` and
                ``video_url`` are understood.
            chat_template: Another template, or the name of one.
            return_labels: Whether to add ``labels``: the ids of what the assistant says, -100
                elsewhere. Implies ``tokenize`` and ``return_dict``.
            tokenize: Whether to return the model's inputs and not the text.
            return_dict: Whether the inputs come with their names.
            processor_kwargs: Options of this processor's call. They may also be given directly.
            **kwargs: Other arguments of transformers' method, and variables of the template.

        Returns:
            The text, the token ids, or all inputs.

        Raises:
            TypeError: If the conversation is no list of messages.
            ValueError: If it is empty, or media or labels cannot be had of it.
        """
        options = dict(processor_kwargs or {})
        template = self._template(chat_template)
        # What is left among kwargs, older versions of transformers take in place of the options.
        others = _TEMPLATE_OPTIONS | template_variables(template)
        direct = _VIDEO_OPTIONS | _OUR_OPTIONS
        options |= {k: kwargs.pop(k) for k in list(kwargs) if k in direct or k not in others}
        if isinstance(conversation, dict):
            raise TypeError("a conversation is a list of messages, and this is a message alone")
        conversation = normalise_conversation(conversation)
        if self.system_prompt is not None:
            kwargs.setdefault("system_prompt", self.system_prompt)
        if return_labels:
            return self._with_labels(conversation, template, options, kwargs)
        extra = {"processor_kwargs": options} if options else {}
        parent: Any = super()
        return parent.apply_chat_template(
            conversation,
            template,
            tokenize=tokenize,
            return_dict=return_dict,
            **extra,
            **kwargs,
        )

    def _template(self, chat_template: str | None) -> str | None:
        """The text of a template, which may be given by its name."""
        named = self.chat_template
        if not isinstance(named, dict):
            return chat_template or named
        if chat_template is None and "default" not in named:
            raise ValueError(
                f"the processor has several chat templates, {sorted(named)}, and none is named "
                "default: say which in chat_template"
            )
        return named.get(chat_template or "default", chat_template)

    def _with_labels(
        self, conversation: Any, template: str | None, options: dict[str, Any], kwargs: Any
    ) -> BatchFeature:
        """Inputs of finished conversations, with exact labels."""
        return_tensors = kwargs.pop("return_tensors", None) or "pt"
        batched = isinstance(conversation[0], list)
        conversations = conversation if batched else [conversation]
        with_mask = kwargs.pop("return_assistant_tokens_mask", False)
        render: Any = render_jinja_template
        prompts, spans = render(
            conversations=conversations,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **kwargs},
        )
        if not any(spans):
            raise ValueError(
                "no answer to learn from: the conversation has no assistant turn, or the chat "
                "template does not mark it with {% generation %}"
            )
        images, videos = media_of(conversations)
        options.setdefault("padding", len(conversations) > 1)
        # The template writes all special tokens itself.
        options.setdefault("add_special_tokens", False)
        features = self(
            text=prompts,
            images=images or None,
            videos=[videos] if videos else None,
            return_tensors=return_tensors,
            **{**options, "return_offsets_mapping": True, "return_text_replacement_offsets": True},
        )
        labels = build_labels(
            features["input_ids"],
            features["attention_mask"],
            features.pop("offset_mapping"),
            [
                move_spans(span, moves)
                for span, moves in zip(spans, features.pop("text_replacement_offsets"), strict=True)
            ],
        )
        features["labels"] = labels if return_tensors == "pt" else labels.numpy()
        if with_mask:
            features["assistant_masks"] = (features["labels"] != -100) * 1
        return features

    # ---- for other libraries

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        """Return the expansion of one image's placeholder, for callers that process media apart."""
        tiles = int(image_inputs["image_num_tiles"][image_idx])
        tiled = self.image_processor.image_aspect_ratio == "dynamic"
        return self.image_text(tiles, separator=self.frame_separator, tiled=tiled)

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **_: Any) -> str:
        """Return the expansion of one video's placeholder, for callers that process media apart."""
        frames = int(video_inputs["video_num_frames"][video_idx])
        return self.video_text(frames, separator=self.frame_separator)

    def _get_num_multimodal_tokens(
        self, image_sizes: Any = None, video_sizes: Any = None, **_: Any
    ) -> MultiModalData:
        """Count tokens from sizes alone; vLLM asks for this.

        Args:
            image_sizes: (height, width) of each image.
            video_sizes: (frames, height, width) of each video, after sampling.

        Returns:
            Placeholders of each image and video, and tiles of each image.
        """
        data: dict[str, Any] = {}
        if image_sizes is not None:
            tiles = [self._tiles_of(height, width) for height, width in image_sizes]
            data["num_image_patches"] = tiles
            data["num_image_tokens"] = [n * self.tokens_per_frame for n in tiles]
        if video_sizes is not None:
            grid = (self.frame_grid[0], self.frame_grid[1])
            data["num_video_tokens"] = [
                sum(n * tokens for n, tokens in video_segments(frames, grid, self.pool_sizes))
                for frames, _, _ in video_sizes
            ]
        return MultiModalData(**data)

    def _tiles_of(self, height: int, width: int) -> int:
        if self.image_processor.image_aspect_ratio != "dynamic":
            return 1
        from longvila.media.image import choose_grid

        part = self.image_processor
        columns, rows = choose_grid(
            width, height, part.size["height"], min_tiles=part.min_tiles, max_tiles=part.max_tiles
        )
        return columns * rows + (1 if columns * rows > 1 else 0)

    # ---- files and parts

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Accept our own parts, which need no torchvision; others as transformers does."""
        if isinstance(argument, LongVILAVideoProcessor | LongVILAImageProcessor):
            return type(argument)
        return super().check_argument_for_proper_class(argument_name, argument)

    @classmethod
    def _get_arguments_from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        processor_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Read the parts without the Auto class that torchvision gates."""
        return [
            LongVILAImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs),
            AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs),
            LongVILAVideoProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs),
        ]


AutoProcessor.register(LongVILAConfig, LongVILAProcessor, exist_ok=True)
