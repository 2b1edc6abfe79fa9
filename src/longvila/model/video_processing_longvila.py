"""Videos to pixel values: sampled, decoded, resized and normalised without torchvision.

1. Files (paths, addresses, bytes, folders of frames) are sampled: evenly with the ends included, by
   frames per second, or at given frames; only what is sampled is decoded. Videos that are decoded
   already (arrays, lists of pictures) are taken as they are unless sampling is asked for.
2. Frames are brought to the tower's size while decoding (``resize``, and ``dynamic``, which does
   not tile frames) or padded first (``pad``).
3. Frames of all videos are packed one after the other; ``video_num_frames`` counts those of each.

A video that is partly unreadable gives the frames that can be read, and so may give fewer than
asked; the count always says what is there.

transformers' own base class for video processors cannot be constructed without torchvision; this
one derives from the base of image processors, which can.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.utils.hub import cached_file

from longvila.media.video import SampledVideo, read_frames
from longvila.model.configuration_longvila import LongVILAConfig
from longvila.model.image_processing_longvila import PixelProcessor, flatten

_FILE = "video_preprocessor_config.json"


def _is_picture(item: Any) -> bool:
    return isinstance(item, Image.Image) or (hasattr(item, "ndim") and item.ndim == 3)


def _is_decoded(video: Any) -> bool:
    return hasattr(video, "ndim") or (
        isinstance(video, list | tuple) and bool(video) and all(_is_picture(v) for v in video)
    )


def list_videos(videos: Any) -> list[Any]:
    """Return the single videos of whatever a caller gave.

    Args:
        videos: One video, a list of videos, or a list (one entry a sample) of lists of videos. A
            list of pictures is one video.

    Returns:
        One entry for each video: a path, address, bytes, array or list of frames.
    """
    if not isinstance(videos, list | tuple) or _is_decoded(videos):
        return [videos]
    flat: list[Any] = []
    for item in videos:
        if isinstance(item, list | tuple) and not _is_decoded(item):
            flat += item
        else:
            flat.append(item)
    return flat


class LongVILAVideoProcessor(PixelProcessor):
    """Turns videos into frames of pixel values.

    Args:
        num_frames: Frames sampled from a video; with ``fps``, at most so many.
        fps: Frames sampled per second of video; 0 or None samples ``num_frames`` evenly.
        short: What a video with fewer frames gives, ``repeat`` or ``all``.
        **kwargs: As for `PixelProcessor`.
    """

    model_input_names = ["pixel_values_videos", "video_num_frames"]  # noqa: RUF012

    def __init__(
        self,
        num_frames: int = 8,
        fps: float | None = None,
        short: Literal["repeat", "all"] = "repeat",
        **kwargs: Any,
    ) -> None:
        kwargs.pop("video_processor_type", None)
        super().__init__(**kwargs)
        self.num_frames, self.fps = int(num_frames), fps or None
        self.short: Literal["repeat", "all"] = short

    def sample(
        self,
        video: Any,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        indices: Sequence[int] | None = None,
        timestamps_s: Sequence[float] | None = None,
        do_sample_frames: bool | None = None,
        **options: Any,
    ) -> SampledVideo:
        """Sample and decode one video.

        Args:
            video: A path, address, bytes, folder of frames, array or list of frames.
            num_frames: Frames to sample; with ``fps``, at most so many.
            fps: Frames per second to sample.
            indices: Frames to take instead.
            timestamps_s: Frames on screen at these seconds instead.
            do_sample_frames: Whether to sample at all; None samples files, and decoded videos only
                if a number or a rate is given.
            **options: Handed to `longvila.media.video.read_frames`.

        Returns:
            Frames with their indices and times, at the tower's size unless they are padded later.

        Raises:
            longvila.errors.VideoError: If the video gives no frame.
        """
        if isinstance(video, SampledVideo):
            return video
        asked = num_frames is not None or fps is not None
        if do_sample_frames is None:
            do_sample_frames = asked or not _is_decoded(video)
        if self.image_aspect_ratio != "pad":
            options.setdefault("size", self.height_width)
        if indices is not None or timestamps_s is not None:
            return read_frames(video, indices=indices, timestamps_s=timestamps_s, **options)
        if not do_sample_frames:
            if not _is_decoded(video):
                raise ValueError(
                    "do_sample_frames=False needs decoded frames; a file would be decoded whole. "
                    "Give num_frames, fps or indices"
                )
            return read_frames(video, indices=range(len(video)), **options)
        if not asked:
            num_frames, fps = self.num_frames, self.fps
        return read_frames(video, num_frames=num_frames, fps=fps, short=self.short, **options)

    def _sample_by_clock(self, video: Any, facts: Any, options: dict[str, Any]) -> SampledVideo:
        """Sample a video by what transformers' metadata say of it where it has no clock itself."""
        known = facts if isinstance(facts, dict) else vars(facts) if facts is not None else {}
        rate, numbers = known.get("fps"), known.get("frames_indices")
        if not rate or not _is_decoded(video):
            return self.sample(video, **options)
        sampled = self.sample(video, **{"frame_rate": rate, **options})
        if numbers is None:
            return sampled
        times_s = np.asarray(numbers, dtype=np.float64)[sampled.indices] / rate
        return dataclasses.replace(sampled, timestamps_s=times_s)

    def frame_levels(self, video: SampledVideo) -> np.ndarray:
        """Return sampled frames at the tower's size, uint8, shape (F, height, width, 3)."""
        return self.sized(video.frames)

    def sized(self, frames: np.ndarray) -> np.ndarray:
        """Return frames ``(F, H, W, 3)`` of any size at the tower's, uint8."""
        if tuple(frames.shape[1:3]) != self.height_width:
            frames = np.stack([np.asarray(self.square(Image.fromarray(f))) for f in frames])
        return frames

    def frame_pixels(self, video: SampledVideo) -> Tensor:
        """Return the pixel values of sampled frames, shape (F, 3, height, width)."""
        return self.pixels(self.frame_levels(video))

    def __call__(  # type: ignore[override]
        self,
        videos: Any,
        *,
        return_tensors: Any = "pt",
        return_metadata: bool = False,
        video_metadata: Any = None,
        **options: Any,
    ) -> BatchFeature:
        """Process videos.

        Args:
            videos: What `list_videos` takes; a video may be a `SampledVideo` already.
            return_tensors: Type of the tensors.
            return_metadata: Whether to add ``video_metadata``, the `SampledVideo` of each video.
            video_metadata: Of each video, transformers' ``VideoMetadata`` or a dict like it. Its
                ``fps`` and ``frames_indices`` are the clock of videos that are decoded already.
            **options: As for `sample`.

        Returns:
            ``pixel_values_videos`` (frames, 3, height, width) and ``video_num_frames`` (videos,).

        Raises:
            ValueError: If there are metadata, but not of each video.
        """
        for key in ("device", "input_data_format", "data_format"):
            options.pop(key, None)
        listed = list_videos(videos)
        facts = flatten(video_metadata) if video_metadata is not None else [None] * len(listed)
        if len(facts) != len(listed):
            raise ValueError(f"there are {len(facts)} video_metadata for {len(listed)} videos")
        sampled = [
            self._sample_by_clock(video, each, options)
            for video, each in zip(listed, facts, strict=True)
        ]
        data: dict[str, Any] = {
            "pixel_values_videos": torch.cat([self.frame_pixels(video) for video in sampled]),
            "video_num_frames": [len(video.frames) for video in sampled],
        }
        features = BatchFeature(data, tensor_type=return_tensors)
        if return_metadata:
            features["video_metadata"] = sampled
        return features

    preprocess = __call__

    # ---- files

    def to_dict(self) -> dict[str, Any]:
        """Return what a file needs to make this processor again."""
        values = super().to_dict()
        values.pop("image_processor_type", None)
        return {**values, "video_processor_type": type(self).__name__}

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write this processor alone.

        Args:
            save_directory: Folder to write to; made if missing.
            push_to_hub: Not supported for this part alone: push the whole processor.
            **kwargs: Not used.

        Returns:
            The file written.
        """
        if push_to_hub:
            raise ValueError("push the whole processor, which contains the video processor")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _FILE).write_text(self.to_json_string())
        return [str(folder / _FILE)]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> LongVILAVideoProcessor:
        """Read the video part of a saved processor, or one saved alone.

        Args:
            pretrained_model_name_or_path: A folder or a model id.
            **kwargs: Values that override the file's; the options of a download are recognised.

        Returns:
            The video processor.

        Raises:
            OSError: If there is neither file.
        """
        names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        hub = {k: kwargs.pop(k) for k in (*names, "subfolder") if k in kwargs}
        for name, key in (("processor_config.json", "video_processor"), (_FILE, None)):
            file = cached_file(
                pretrained_model_name_or_path,
                name,
                _raise_exceptions_for_missing_entries=False,
                **hub,
            )
            if file is None:
                continue
            values = json.loads(Path(file).read_text())
            values = values.get(key) if key else values
            if values is not None:
                known = {k: v for k, v in kwargs.items() if k in values}
                return cls(**{**values, **known})
        raise OSError(f"{pretrained_model_name_or_path} has no video processor")


AutoVideoProcessor.register(LongVILAConfig, LongVILAVideoProcessor, exist_ok=True)
