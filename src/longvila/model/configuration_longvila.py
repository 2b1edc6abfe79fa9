"""What a LongVILA model is made of, as one Hugging Face configuration.

A model is a vision tower, a projector and a causal language model; the first and the last are any
models that ``AutoModel`` can build, named by their own configurations. Everything derived (the
patch grid, the tokens of a frame, the rows of a video after temporal pooling, the context) is
arithmetic on those files and lives here, so that the processor, the model and a converter
agree by construction.

Nothing is looked up by model name: image size, patch size, vocabulary rows and media token ids are
data. Media token ids may lie beyond the embedding table, since placeholders are never looked up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from longvila.errors import CheckpointError
from longvila.model.auto import load_models
from longvila.model.vila.layout import is_vila

_NAMED_PROJECTORS: dict[str, int] = {
    "identity": 1,
    "linear": 1,
    "mlp_downsample": 2,
    "mlp_downsample_2x2_fix": 2,
    "mlp_downsample_3x3_fix": 3,
    "mlp_downsample_3x3_s2": 3,
    "mlp_downsample_3x3_s2_new": 3,
}
_MLP = re.compile(r"mlp([1-9]\d*)x_gelu")
_SQUARE = re.compile(r"mlp_downsample_([1-9]\d*)x\1")


def downsample_factor(projector_type: str) -> int:
    """Return how many patches along one side a projector joins into a token.

    Args:
        projector_type: A name listed in :mod:`longvila.model.projector`.

    Returns:
        The side of the block of patches that becomes one token.

    Raises:
        ValueError: If no projector has this name.
    """
    if projector_type in _NAMED_PROJECTORS:
        return _NAMED_PROJECTORS[projector_type]
    if _MLP.fullmatch(projector_type):
        return 1
    if square := _SQUARE.fullmatch(projector_type):
        return int(square.group(1))
    raise ValueError(
        f"unknown projector_type {projector_type!r}; expected one of "
        f"{', '.join(sorted(_NAMED_PROJECTORS))}, mlp<n>x_gelu or mlp_downsample_<n>x<n>"
    )


def projector_depth(projector_type: str) -> int | None:
    """Return the number of linear layers of an ``mlp<n>x_gelu`` projector, None for others."""
    match = _MLP.fullmatch(projector_type)
    return int(match.group(1)) if match else None


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)


def _sub_config(value: dict[str, Any] | PreTrainedConfig | None, model_type: str) -> Any:
    if isinstance(value, PreTrainedConfig):
        return value
    values = dict(value or {})
    name = values.pop("model_type", model_type)
    if name not in CONFIG_MAPPING:
        raise ValueError(f"model type {name!r} is not known to this version of transformers")
    return CONFIG_MAPPING[name](**values)


class LongVILAConfig(PreTrainedConfig):
    """Configuration of a LongVILA model.

    Args:
        vision_config: Configuration (or its dict) of the vision tower.
        text_config: Configuration (or its dict) of the language model.
        projector_type: Name of the projector; see :mod:`longvila.model.projector`.
        token_order: Order in which a downsampling projector emits the tokens of a frame, ``row``
            or ``column`` (the latter for weights trained before the order was changed upstream).
        image_token_id: Placeholder of image tokens.
        video_token_id: Placeholder of video tokens.
        vision_feature_layer: Which hidden state of the tower is the feature; 0 is the embedding,
            -1 the output of the last layer.
        vision_feature_select: ``full`` keeps every token of the tower, ``patch`` drops the first
            (class) token.
        vision_batch_size: Frames that go through the tower at once; None is all.
        pool_sizes: Temporal-spatial pooling of videos: a list of ``[frames, height, width]`` block
            sizes in tokens. Each gives one pooled copy of the video; the copies follow each other.
            None leaves videos as they are.
        pool_separator: Text after each pooled copy.
        frame_separator: Text after each frame (or tile), "" for none.
        image_aspect_ratio: How images meet the square input: ``resize``, ``pad`` or ``dynamic``.
        min_tiles: Least tiles of a ``dynamic`` image.
        max_tiles: Most tiles of a ``dynamic`` image.
        num_video_frames: Frames sampled from a video unless the caller says otherwise.
        video_fps: Frames per second sampled instead of a fixed number; 0 is off.
        initializer_range: Standard deviation for a projector made from nothing.
        tie_word_embeddings: Whether the head shares the embedding table.

    Source: the key names of upstream's config.json and what its code makes of them; the converter
    maps one to the other.
    """

    model_type = "longvila"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig, "vision_config": AutoConfig}

    vision_config: Any = None
    text_config: Any = None
    projector_type: str = "mlp_downsample"
    token_order: str = "row"
    image_token_id: int = 151649
    video_token_id: int = 151650
    vision_feature_layer: int = -2
    vision_feature_select: str = "full"
    vision_batch_size: int | None = 32
    pool_sizes: list | None = None
    pool_separator: str = ""
    frame_separator: str = "\n"
    image_aspect_ratio: str = "resize"
    min_tiles: int = 1
    max_tiles: int = 12
    num_video_frames: int = 8
    video_fps: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> LongVILAConfig:
        """Read a configuration; see transformers for the arguments.

        Raises:
            CheckpointError: If a folder is in the original's layout, whose keys mean other things.
        """
        if is_vila(pretrained_model_name_or_path):
            raise CheckpointError(
                f"{pretrained_model_name_or_path} is in the original's layout: take `config` of "
                "LongVILAForConditionalGeneration.from_pretrained, or run `longvila convert`"
            )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration of what a file holds; see transformers for the arguments.

        Raises:
            ValueError: If it says nothing of a part, which would then have the default's size.
        """
        for part in ("text_config", "vision_config"):
            if config_dict.get(part) is None:
                raise ValueError(
                    f"a LongVILA config.json needs {part}, which says how large that part of the "
                    "model is; this one has none"
                )
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        load_models()
        self.vision_config = _sub_config(self.vision_config, "siglip_vision_model")
        self.text_config = _sub_config(self.text_config, "qwen2")
        # Checkpoints say this in the language model's own configuration.
        self.tie_word_embeddings = bool(
            self.tie_word_embeddings or getattr(self.text_config, "tie_word_embeddings", False)
        )
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        downsample_factor(self.projector_type)
        for name, allowed in (
            ("token_order", ("row", "column")),
            ("vision_feature_select", ("full", "patch")),
            ("image_aspect_ratio", ("resize", "pad", "dynamic")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.vision_batch_size is not None and self.vision_batch_size < 1:
            raise ValueError(f"vision_batch_size must be positive, got {self.vision_batch_size}")
        if self.image_token_id == self.video_token_id:
            raise ValueError(
                "image_token_id and video_token_id must differ (features are put in place by id), "
                f"both are {self.image_token_id}"
            )
        for size in self.pool_sizes or []:
            if len(size) != 3 or any(int(n) < 1 for n in size):
                raise ValueError(
                    f"pool_sizes must be a list of [frames, height, width], got {size}"
                )
        self.num_vision_layers  # noqa: B018  (raises if the layer does not exist)

    # ---- the tower

    @property
    def num_vision_layers(self) -> int:
        """Layers of the tower that have to run to get the feature.

        Raises:
            ValueError: If the tower has no hidden state of that index.
        """
        depth = int(self.vision_config.num_hidden_layers)
        layer = self.vision_feature_layer
        used = layer if layer >= 0 else depth + 1 + layer
        if not 0 <= used <= depth:
            raise ValueError(
                f"vision_feature_layer {layer} does not exist: the tower has hidden states "
                f"0 to {depth} (or -{depth + 1} to -1)"
            )
        return used

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of what the tower reads."""
        return _pair(self.vision_config.image_size)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Patches of a frame as (height, width)."""
        (height, width), (ph, pw) = self.image_size, _pair(self.vision_config.patch_size)
        return height // ph, width // pw

    # ---- tokens

    @property
    def frame_grid(self) -> tuple[int, int]:
        """Tokens of a frame as (height, width), after the projector."""
        factor = downsample_factor(self.projector_type)
        height, width = self.patch_grid
        return -(-height // factor), -(-width // factor)

    @property
    def tokens_per_frame(self) -> int:
        """Visual tokens of one image or frame, without its separator."""
        return math.prod(self.frame_grid)

    def video_segments(self, num_frames: int) -> list[tuple[int, int]]:
        """Return how a video of some frames is laid out.

        Args:
            num_frames: Frames that go through the tower.

        Returns:
            One pair ``(frames, tokens of each)`` for every pool size, or one pair without pooling.
        """
        return video_segments(num_frames, self.frame_grid, self.pool_sizes)

    def video_rows(self, num_frames: int) -> int:
        """Return the visual tokens of a video of some frames, without separators."""
        return sum(frames * tokens for frames, tokens in self.video_segments(num_frames))

    # ---- the language model

    @property
    def context_length(self) -> int | None:
        """Longest sequence the language model's positions are made for, None if it does not say."""
        limit = getattr(self.text_config, "max_position_embeddings", None)
        if limit is None:
            return None
        rope = getattr(self.text_config, "rope_parameters", None) or {}
        if rope.get("rope_type") in ("linear", "dynamic", "yarn") and rope.get("factor"):
            base = rope.get("original_max_position_embeddings") or limit
            limit = max(limit, int(base * rope["factor"]))
        return int(limit)


def video_segments(
    num_frames: int,
    frame_grid: tuple[int, int],
    pool_sizes: Sequence[Sequence[int]] | None,
) -> list[tuple[int, int]]:
    """Return frames and tokens per frame of each pooled copy of a video.

    Args:
        num_frames: Frames before pooling.
        frame_grid: Tokens of a frame as (height, width).
        pool_sizes: Block sizes as ``[frames, height, width]``, None for no pooling.

    Returns:
        A pair ``(frames, tokens of each)`` for each pool size, or one without pooling.
    """
    if not pool_sizes:
        return [(num_frames, math.prod(frame_grid))]
    return [
        (-(-num_frames // t), -(-frame_grid[0] // h) * -(-frame_grid[1] // w))
        for t, h, w in pool_sizes
    ]


AutoConfig.register("longvila", LongVILAConfig, exist_ok=True)
