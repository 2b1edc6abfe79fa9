"""What a file is by its first bytes, before any decoder sees it.

Decoders understand formats that are no media but lists of places to read from (playlists,
manifests, session descriptions). Such a text would make a server open files and addresses that the
client has no right to. So only containers with a signature of their own, at its own place, are let
through; everything else is refused unopened.
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from longvila.inference.serving.errors import RequestError
from longvila.inference.serving.settings import Limits

_HEAD_BYTES = 1024
#: Boxes that an ISO base media file may begin with.
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp")
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def video_format(head: bytes) -> str | None:
    """Name the container of a video by its first bytes; None if it is none that is read."""
    if head[4:8] in _BOXES:
        return "mp4"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    if head.startswith(b"OggS"):
        return "ogg"
    if head.startswith(b"FLV\x01"):
        return "flv"
    if head.startswith(_ASF):
        return "asf"
    if head.startswith((b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3")):
        return "mpeg"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if len(head) > 192 and (head[0] == head[188] == 0x47 or head[4] == head[196] == 0x47):
        return "mpegts"
    return None


def read_head(source: Path | bytes) -> bytes:
    """Return the first bytes of a file or of a file's bytes."""
    if isinstance(source, bytes):
        return source[:_HEAD_BYTES]
    with source.open("rb") as file:
        return file.read(_HEAD_BYTES)


def check_video(source: Path | bytes, name: str, limits: Limits) -> None:
    """Refuse what is no video, or too large a one, before frames are decoded.

    Args:
        source: A file or its bytes.
        name: What the client called it.
        limits: Bounds on pixels and duration.

    Raises:
        RequestError: If it is refused.
    """
    head = read_head(source)
    if video_format(head) is None:
        raise RequestError(
            f"{name}: not a video that is read here; send mp4, mov, mkv, webm, avi, mpeg, ts, flv, "
            "wmv, ogg or gif (a playlist or a page about a video is none)",
            code="invalid_media",
        )
    import av

    from longvila.media._pyav import open_container

    try:
        with open_container(
            io.BytesIO(source) if isinstance(source, bytes) else str(source)
        ) as container:
            contexts = [stream.codec_context for stream in container.streams.video]
            # None where there is no decoder; reading says so if it is that stream.
            sizes = [(each.width, each.height) for each in contexts if each is not None]
            seconds = (container.duration or 0) / av.time_base
    except (av.FFmpegError, OSError) as fault:
        reason = getattr(fault, "strerror", None) or type(fault).__name__
        raise RequestError(
            f"{name}: cannot be opened as a video ({reason}); was its copying finished?",
            code="invalid_media",
        ) from fault
    for width, height in sizes:
        check_pixels(width, height, name, limits)
    check_duration(seconds, name, limits)


def check_duration(seconds: float, name: str, limits: Limits) -> None:
    """Refuse a video that is too long."""
    if seconds > limits.duration_s:
        raise RequestError(
            f"{name}: {seconds:.0f} s long, at most {limits.duration_s:.0f} s are taken; "
            "send a shorter cut",
            code="video_too_long",
        )


def check_pixels(width: int, height: int, name: str, limits: Limits) -> None:
    """Refuse frames or pictures that are too large."""
    if width * height > limits.pixels:
        raise RequestError(
            f"{name}: {width} x {height} pixels, at most {limits.pixels} in all are taken; "
            "scale it down",
            code="picture_too_large",
        )


def open_picture(source: Path | bytes, name: str, limits: Limits) -> Image.Image:
    """Open a picture of a plain format and of a bounded size.

    Args:
        source: A file or its bytes.
        name: What the client called it.
        limits: The bound on pixels.

    Returns:
        The picture, loaded.

    Raises:
        RequestError: If it is refused.
    """
    data = source if isinstance(source, bytes) else source.read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=_PICTURES) as picture:
            check_pixels(*picture.size, name, limits)
            picture.load()
            return picture.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as fault:
        raise RequestError(
            f"{name}: cannot be read as a picture; send {', '.join(_PICTURES)}",
            code="invalid_media",
        ) from fault
