"""Bytes that one text layer leaves for its backward pass, a local token at a time.

With c bytes a value; read off autograd's saved tensors, and counted again by the tests:

    checkpoint       c M + c H D + 4 H         layer input, attention's kept out and lse
    norm             (4 + c + c) M             float32 copy, normalised, scaled: each of two norms
    attention        c (H + 2 K) D             q, k, v after the rotary embedding; out as above
    MLP              4 c I                     gate, its activation, up, their product

It knows layers as transformers writes them for Llama and Qwen: norms in float32, a gated MLP.

Letters: M model dim, I MLP dim, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from longvila.memory.sizes import TextSize

#: Scratch of attention's backward kernel, in bytes a token: of a query head, of a kv head, each a
#: channel, and of a query head alone. fa4: float32 dq, dk, dv and two rows of statistics. cuDNN and
#: flash: float32 dq, and dk, dv once a query head. cpu: k, v and dk, dv once a query
#: head, and a float32 sum.
#: Source: extra_gib of ``ideal_*`` in benchmarks/results/2026-11-22_attention_2xh200.json, minus
#: out, lse, dq, dk, dv: 2.146 GiB at 131072 tokens of 14 / 2 heads for fa4 (2.146 by this rule),
#: 2.765 and 2.764 for cuDNN and flash (2.764).
SCRATCH: dict[str, tuple[float, float, float]] = {
    "fa4": (4.0, 8.0, 8.0),
    "fa3": (4.0, 8.0, 8.0),
    "cudnn": (8.0, 0.0, 8.0),
    "flash": (8.0, 0.0, 8.0),
    "cpu": (8.0, 4.0, 0.0),
}

#: Float32 tensors of the hidden states' size that an RMSNorm's backward makes.
NORM_PRODUCTS = 5
#: Tensors of the MLP's width that it saves, eager and compiled (gate and up; the rest is cheap to
#: compute again), and those at the widest point of its backward, which is the same: measured in
#: benchmarks/results/2026-11-22_memory_plan_1xh200.json, "text 64K, compiled".
MLP_SAVED = {False: 4.0, True: 2.0}
MLP_WIDEST = {False: 6.0, True: 6.0}


def norm_bytes(text: TextSize, c: int, *, input_counts: bool, compiled: bool = False) -> float:
    """Saved by an RMSNorm as transformers writes it, or compiled, a token.

    In float32 the cast is the input itself, which a checkpoint or a residual may hold already.
    Compiled, the input is kept as it is and the rest is computed again.
    """
    if compiled:
        return c * (1.0 + input_counts) * text.width
    if c == 4:
        return (8.0 + 4.0 * input_counts) * text.width
    return (4.0 + 2 * c) * text.width


def qk_norm_bytes(text: TextSize, c: int) -> float:
    """Saved by the norms of queries and keys, a token."""
    heads = (text.heads + text.kv_heads) * text.head_dim
    return (4.0 + c) * heads if text.qk_norm else 0.0


def qkv_bytes(text: TextSize, c: int) -> float:
    """Queries, keys and values, a token."""
    return float(c * (text.heads + 2 * text.kv_heads) * text.head_dim)


def out_bytes(text: TextSize, c: int) -> float:
    """Attention's output and the float32 logarithm of its sum, a token."""
    return float(c * text.heads * text.head_dim + 4 * text.heads)


def exchanged_kv_heads(text: TextSize, ulysses: int) -> float:
    """Return kv heads a token carries to all Ulysses ranks, counted once for each it goes to."""
    if ulysses == 1:
        return float(text.kv_heads)
    group = text.heads // text.kv_heads
    total = 0
    for rank in range(ulysses):
        start, stop = (rank * text.heads // ulysses, (rank + 1) * text.heads // ulysses)
        if stop > start:
            total += (stop - 1) // group + 1 - start // group
    return float(total)


def layer_activation_bytes(
    text: TextSize, *, compute_bytes: int, ulysses: int = 1, compiled: bool = False
) -> float:
    """Bytes that autograd keeps of one layer and local token without checkpointing.

    Args:
        text: The model.
        compute_bytes: c.
        ulysses: Ulysses degree; above one, what was exchanged is kept in place of q, k, v,
            and out twice.
        compiled: Whether norms and MLPs are compiled.

    Memory: ``(16 M + c (2 H + 2 K) D + 4 H + 4 c I)`` for c = 2.

    Source: Counted by saved-tensor hooks in tests/unit/memory/test_estimate.py.
    """
    c = compute_bytes
    total = 2 * norm_bytes(text, c, input_counts=True, compiled=compiled)
    total += qk_norm_bytes(text, c) + qkv_bytes(text, c) + out_bytes(text, c)
    total += MLP_SAVED[compiled] * c * text.mlp_width
    if ulysses > 1:
        more = exchanged_kv_heads(text, ulysses) - text.kv_heads
        total += c * text.heads * text.head_dim + 2 * c * more * text.head_dim
    return total


def checkpoint_bytes(text: TextSize, *, compute_bytes: int, keep_attention: bool) -> float:
    """Bytes that a checkpointed layer keeps a local token: its input, attention's out and lse."""
    kept = out_bytes(text, compute_bytes) if keep_attention else 0.0
    return compute_bytes * text.width + kept
