"""Memory and time of reading a long prompt and answering it, on a rank.

One process reads in chunks, each over the cache of the chunks before it; several deal each chunk,
and queries visit the keys of all (`longvila.inference.prefill`, `longvila.inference.ranks`).
Moments:

    tower     weights, the cache, the rows of a micro-batch's frames, its activations
    layers    weights, the cache, the widest point of a layer: three tensors of its MLP's width, or
              q, k, v and partial results, on several ranks those of the whole chunk
    answer    weights, the cache, the logits of a position

The model is whole on every rank, in the type it was loaded in. Decoding a token reads the weights
and this rank's cache once, whatever else it does; that bound is what is given.

What it does not count: several prompts at once, copies of a tail that grows.

Letters: S tokens, L tokens of a rank in a chunk, C those of all R ranks, M model dim, I MLP dim, H
query heads, K kv heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from longvila.memory.estimate import LIBRARY_BYTES, Peak
from longvila.memory.operations import Load, forward_operations
from longvila.memory.rates import Gpu
from longvila.memory.settings import Ranks
from longvila.memory.sizes import ModelSize, TextSize
from longvila.memory.timing import Links, elementwise_bytes


@dataclass(frozen=True, kw_only=True)
class PromptTime:
    """Seconds until the first token, and of each one after it.

    Attributes:
        parts: Seconds of reading, by part.
        per_token: Seconds of a further token, at least.
        operations: Operations of reading, over all ranks.
        notes: Where a rate stands in for another.
    """

    parts: Mapping[str, float]
    per_token: float
    operations: float
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Seconds until the first token."""
        return sum(self.parts.values())


def cache_bytes(size: ModelSize, tokens: int, *, compute_bytes: int = 2) -> float:
    """Bytes of keys and values: ``2 * layers * K * D * c`` a token."""
    text = size.text
    return 2.0 * text.layers * text.kv_heads * text.head_dim * compute_bytes * tokens


def prompt_peak(
    size: ModelSize,
    load: Load,
    *,
    ranks: Ranks | None = None,
    chunk_tokens: int = 8192,
    compute_bytes: int = 2,
    offload_bytes: int = 0,
    library_bytes: float = LIBRARY_BYTES,
) -> Peak:
    """Predict the most memory that a rank needs to read a prompt and answer.

    Args:
        size: The model.
        load: The prompt; its targets are not looked at.
        ranks: How it is dealt; one rank if None.
        chunk_tokens: Tokens of a rank that are read at once.
        compute_bytes: Bytes of a weight and of an activation.
        offload_bytes: Host memory of a rank that older parts of the cache may take.
        library_bytes: What libraries keep allocated on the device.

    Returns:
        The moments.
    """
    ranks = ranks or Ranks()
    text, tower, c = size.text, size.tower, compute_bytes
    local = ranks.local_tokens(load.tokens)
    rows = min(chunk_tokens, local)
    cache = cache_bytes(size, local, compute_bytes=c)
    host = min(float(offload_bytes), cache)
    base = {
        "parameters": float(c * size.parameters),
        "keys and values": cache - host,
        "workspaces of libraries": library_bytes,
    }
    moments: dict[str, dict[str, float]] = {}
    frames = ranks.local_frames(load.frames) if tower is not None else 0
    media = 0.0
    if tower is not None and frames:
        call = min(tower.frames_per_call or frames, frames)
        held = call
        if ranks.sp > 1:
            # Rows of all frames of a chunk exist before they are exchanged.
            held = min(frames, max(call, -(-rows // max(tower.tokens, 1))))
        media = float(c * held * tower.rows * text.width)
        wide = c * tower.patches * (2.0 * tower.mlp_width + 3.0 * tower.width)
        moments["tower"] = {
            **base,
            "tower": call * wide,
            "media rows": 2 * media,
            "pixels": float(c * call * tower.pixels),
        }
    hidden = rows * text.width
    mlp = c * (3.0 * text.mlp_width * rows + 2 * hidden)
    norm = (2 * 4.0 + c) * hidden
    moments["layers"] = {
        **base,
        "hidden states": float(3 * c * hidden),
        "one layer": max(mlp, norm, _attention_bytes(text, rows, ranks.sp, c)),
        "media rows": media,
    }
    moments["answer"] = {**base, "logits": 4.0 * text.vocabulary}
    return Peak(moments=moments, host_bytes=host)


def _attention_bytes(text: TextSize, rows: int, ranks: int, c: int) -> float:
    """The widest point of a layer's attention over a long past.

    Args:
        text: The text model.
        rows: L.
        ranks: R.
        c: Bytes of an activation.
    """
    heads, kv = text.heads * text.head_dim, 2 * text.kv_heads * text.head_dim
    own = c * rows * (heads + kv)
    if ranks == 1:
        # Results over the past and over the chunk itself, and both merged, in float32.
        return own + rows * heads * (2 * c + 2 * 4.0)
    chunk = rows * ranks
    return (
        own
        + c * (rows + chunk) * (heads + kv)  # packed, and gathered
        + chunk * heads * (c + 4.0)  # queries that visit, and their results
        + chunk * 2 * 4.0 * (heads + text.heads)  # results and lse on their way, and arrived
        + (chunk + 2 * rows) * heads * 4.0  # weighted, added up, divided
    )


def prompt_time(
    size: ModelSize,
    load: Load,
    *,
    gpu: Gpu,
    ranks: Ranks | None = None,
    backend: str = "fa4",
    compute_bytes: int = 2,
    links: Links | None = None,
) -> PromptTime:
    """Predict the seconds of reading a prompt, and of each token after it.

    Args:
        size: The model.
        load: The prompt.
        gpu: The device's rates.
        ranks: How it is dealt; one rank if None.
        backend: Attention's back end.
        compute_bytes: Bytes of a weight and of an activation.
        links: Links between nodes.
    """
    ranks, links = ranks or Ranks(), links or Links()
    text, sp = size.text, ranks.sp
    counts = forward_operations(size, load, head_rows=1)
    kernel, note = gpu.attention_rates(backend)
    local = ranks.local_tokens(load.tokens)
    forward, _ = elementwise_bytes(text, compute_bytes)
    # A chunk's q, k, v go to everyone, partial results of its queries come back.
    gathered = compute_bytes * text.head_dim * (text.heads + 2 * text.kv_heads)
    visited = 4.0 * text.heads * (text.head_dim + 1)
    moved = text.layers * local * (sp - 1) * (gathered + visited)
    across = sp > ranks.per_node
    parts = {
        "tower and projector": (counts["tower"] + counts["projector"]) / gpu.tower / sp,
        "text matrices": counts["text_matrices"] / gpu.matrices[0] / sp,
        "attention": counts["attention"] / kernel[0] / sp,
        "elementwise": forward * local * text.layers / gpu.memory_rate,
        "queries sent": moved / (links.rate if across else gpu.all_to_all),
    }
    read = float(compute_bytes * size.text.parameters)
    read += cache_bytes(size, local, compute_bytes=compute_bytes)
    return PromptTime(
        parts=parts,
        per_token=read / gpu.memory_rate,
        operations=sum(counts.values()),
        notes=() if note is None else (note,),
    )
