"""Forks that begin with a part of a cache only, without holding on to the rest of it.

A cache that was cut shares its buffers by views. The buffer that the cut goes through may be large,
and would live as long as the few tokens of it that are left; so what is a small part of a buffer is
copied out of it. Buffers that are shared whole, or for the most part, stay shared.
"""

from __future__ import annotations

from torch import Tensor

from longvila.inference.cache import ShardedCache


def fork_first(cache: ShardedCache, tokens: int | None = None) -> ShardedCache:
    """Return a cache that begins like another one.

    Args:
        cache: Stays usable; what it holds is shared from now on.
        tokens: How many of its tokens; None for all.

    Raises:
        ValueError: If the cache does not hold so many.

    Comm: None.

    Memory: At most half of the buffer that the cut goes through.
    """
    length = cache.get_seq_length()
    if tokens is not None and not 0 <= tokens <= length:
        raise ValueError(f"the cache holds {length} tokens, a fork cannot begin with {tokens}")
    other = cache.fork()
    surplus = 0 if tokens is None else length - tokens
    if surplus:
        other.crop(-surplus)
        for layer in other.shards:
            layer.segments = [(_own(keys), _own(values)) for keys, values in layer.segments]
    return other


def _own(part: Tensor) -> Tensor:
    used = part.numel() * part.element_size()
    return part.clone() if 2 * used < part.untyped_storage().nbytes() else part
