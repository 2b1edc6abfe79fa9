"""What an operator decides: how much one request may ask for, and what it may reach.

Every limit exists because something else would be unbounded: memory, time, or the wait of others.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """Bounds on requests and on what is under way.

    Attributes:
        body_bytes: Of a request's body, base64 media counted in.
        held_bytes: Of all bodies that have come or are coming, until they are answered.
        text_chars: Characters of all text of a conversation.
        upload_bytes: Of one uploaded file.
        stored_bytes: Of all uploaded files together; the oldest go first.
        media_items: Images and videos of one conversation.
        media_bytes: Of one file or download.
        frames: Frames of all videos of a conversation.
        duration_s: Of one video.
        pixels: Of one picture or frame before it is resized.
        decoded_bytes: Of a video's frames, for models that take them in their own size.
        prompt_tokens: Of a prompt; None for what the model's context holds.
        new_tokens: Of an answer.
        active: Requests that hold a key-value cache at once; one client's are half of them at most.
        preparing: Requests whose media are decoded at once; likewise.
        waiting: Requests that have not begun to be read.
        per_client: Requests of one client, waiting or not.
        wait_s: Most seconds before the model begins with a request.
        media_s: Most seconds to fetch and decode one request's media.
        body_s: Most seconds to send a body.
        write_s: Most seconds that a client may leave an answer unread.
    """

    body_bytes: int = 256 << 20
    held_bytes: int = 2 << 30
    text_chars: int = 8 << 20
    upload_bytes: int = 4 << 30
    stored_bytes: int = 16 << 30
    media_items: int = 16
    media_bytes: int = 8 << 30
    frames: int = 2048
    duration_s: float = 6 * 3600.0
    pixels: int = 8192 * 4320
    decoded_bytes: int = 16 << 30
    prompt_tokens: int | None = None
    new_tokens: int = 4096
    active: int = 16
    preparing: int = 4
    waiting: int = 64
    per_client: int = 16
    wait_s: float = 900.0
    media_s: float = 600.0
    body_s: float = 120.0
    write_s: float = 60.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None and not value > 0:
                raise ValueError(f"limit {one.name} must be positive, got {value!r}")


@dataclass(frozen=True)
class Access:
    """What media a request may name beside those it carries.

    Attributes:
        roots: Folders whose files may be read; none for no files.
        http: Whether http(s) addresses are fetched.
        networks: Networks such as ``10.1.0.0/16`` that may be fetched from although they are not
            public.
        ports: Ports of public hosts that are contacted.
        redirects: Redirects that are followed.
    """

    roots: tuple[Path, ...] = ()
    http: bool = False
    networks: tuple[str, ...] = ()
    ports: tuple[int, ...] = (80, 443)
    redirects: int = 5


@dataclass(frozen=True)
class Settings:
    """Everything about a server but its model.

    Attributes:
        name: What the model is called in requests.
        limits: Bounds.
        access: What may be reached.
        keys: Keys of which a client must present one; none lets everybody in.
        hosts: Names that requests may be addressed to; none for any. It keeps a page of a stranger
            from reaching a local server under a name of its own.
        frames: Frames sampled where a request does not say; None as the processor says.
        new_tokens: Longest answer where a request does not say.
        temperature: Of sampling where a request does not say.
        kv_bytes: Keys and values of everything under way and everything kept.
        media_cache_bytes: Decoded frames that are kept.
        slice_tokens: Tokens of a prompt read before others have their turn.
        page: Whether the page is served.
    """

    name: str = "longvila"
    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Access)
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    frames: int | None = None
    new_tokens: int = 512
    temperature: float = 0.0
    kv_bytes: int = 2 << 30
    media_cache_bytes: int = 1 << 30
    slice_tokens: int = 4096
    page: bool = False
