"""Conversations with models whose processor is transformers' own.

Such a processor says what a medium becomes in the prompt, and wants its pictures to say so. So
frames are decoded when a video is loaded and stay in memory, as uint8, and every turn hands all of
them to the processor; what the cache holds already is not encoded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longvila.inference.frames import MissingFrames, TensorFrames
from longvila.inference.prompts import (
    Item,
    Medium,
    Message,
    Progress,
    Rendered,
    said,
    write_turns,
)
from longvila.inference.sight import FamilySampler
from longvila.media.video import SampledVideo
from longvila.parallel.families import Family


class FamilyPrompts:
    """Prompts of another family's processor, which needs the decoded pictures.

    Args:
        model: The model.
        processor: What AutoProcessor gives for it.
        family: Its family.
    """

    def __init__(self, model: Any, processor: Any, family: Family) -> None:
        self.model, self.processor, self.family = model, processor, family
        self.sampler = FamilySampler(processor)
        self.progress: Progress | None = None

    def load_video(
        self,
        source: Any,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        **options: Any,
    ) -> Medium:
        """Sample and decode a video; see `longvila.inference.session.Session.load_video`."""
        video = self.sampler.sample(
            source, num_frames=num_frames, fps=fps,
            progress=None if self.progress is None else self._decoded, **options,
        )  # fmt: skip
        medium = decoded_medium(video)
        # By number, whatever they were chosen by: `recall` decodes the same ones.
        medium.sampling = {"indices": video.indices.tolist()}
        self._count(medium)
        return medium

    def _decoded(self, done: int, total: int) -> None:
        assert self.progress is not None
        self.progress("decode", done, total)

    def load_image(self, source: Any, *, tiled: bool = True) -> Medium:
        """Load an image; the processor decides about tiles."""
        from longvila.media.image import load_image

        name = str(source) if isinstance(source, str) else f"<{type(source).__name__}>"
        medium = decoded_medium(load_image(source), name)
        self._count(medium)
        return medium

    def leave_out(self, medium: Medium, missing: Sequence[int]) -> None:
        """Refuse: what cannot be decoded was left out when the video was loaded."""
        raise MissingFrames(medium.name, missing)

    def _count(self, medium: Medium) -> None:
        rendered = self.render([said("user", "", [medium])], [medium])
        medium.tokens = sum(item.rows for items in rendered.items.values() for item in items)

    def recall(self, described: dict[str, Any]) -> Medium:
        """Decode a medium of a stored prompt again: the processor says what it becomes."""
        if described["kind"] == "image":
            return self.load_image(described["name"])
        return self.load_video(described["name"], **described["sampling"])

    def render(self, messages: list[Message], media: Sequence[Medium]) -> Rendered:
        """Write a conversation with its media; see `LongVILAPrompts.render`."""
        text = write_turns(self.processor, messages)
        images = [medium.pixels for medium in media if medium.kind == "image"]
        videos = [medium.pixels for medium in media if medium.kind == "video"]
        given: dict[str, Any] = {"text": [text], "return_tensors": "pt"}
        if images:
            given["images"] = images
        if videos:
            given["videos"] = [list(video.frames) for video in videos]
            given["do_sample_frames"] = False
            given["video_metadata"] = [_metadata(video) for video in videos]
        out = dict(self.processor(**given))
        out.pop("attention_mask", None)
        config = self.model.config
        batch = self.family.prepare(config, out)
        positions = self.family.position_ids(self.model, batch)
        items: dict[str, list[Item]] = {}
        for kind in self.family.media:
            pixels = batch.get(kind.pixels)
            if pixels is None:
                continue
            shapes = batch.get(kind.counts)
            listed = kind.default_counts(pixels.shape[0]) if shapes is None else shapes.tolist()
            listed = [tuple(shape) if isinstance(shape, list) else shape for shape in listed]
            start = 0
            for shape in listed:
                units = kind.units(config, [shape])
                stop = start + sum(units.frames)
                source = TensorFrames(pixels[start:stop].to(self.model.dtype))
                items.setdefault(kind.name, []).append(Item(shape, units.slots.numel(), source))
                start = stop
        ids = batch["input_ids"][0].tolist()
        return Rendered(ids, items, None if positions is None else positions[-3:, 0])


def decoded_medium(decoded: Any, name: str = "") -> Medium:
    """Return a medium of frames or of a picture that is decoded already.

    Args:
        decoded: A `SampledVideo`, or a PIL image.
        name: What to call a picture.
    """
    if not isinstance(decoded, SampledVideo):
        return Medium("image", name, "", 1, 0, pixels=decoded)
    return Medium(
        "video", decoded.metadata.name, "", len(decoded.frames), 0, decoded.timestamps_s.tolist(),
        decoded.missing, pixels=decoded,
    )  # fmt: skip


def _metadata(video: Any) -> dict[str, Any]:
    """What transformers' processors want to know of frames that were sampled before."""
    found = video.metadata
    return {
        "total_num_frames": found.num_frames,
        "fps": found.fps,
        "frames_indices": video.indices.tolist(),
        "duration": found.duration_s,
        "height": found.height,
        "width": found.width,
        "video_backend": found.backend,
    }
