"""What the decode kernels must give: run on a GPU, and on a CPU in Triton's interpreter.

``TRITON_INTERPRET=1 python -m tests.unit.ops.decode_cases`` runs the small ones.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from longvila.ops.decode import (
    Tuning,
    append_tokens,
    attend_tables,
    decode_attention,
    merge_parts,
)
from longvila.ops.kv_table import KVTable
from longvila.testing.asserts import relative_error
from longvila.testing.oracles import attention_oracle

LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def draw(*shape: int, device: Any, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def agree(found: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """Compare ``out`` and ``lse (B, H, T)``; rows that see nothing must be exactly neutral."""
    out, lse = found
    assert out.shape == want[0].shape and lse.shape == want[1].shape
    nothing = want[1].isneginf()
    assert torch.equal(lse.isneginf(), nothing)
    assert (out.transpose(1, 2)[nothing] == 0).all()
    assert relative_error(out, want[0]) < LIMITS[dtype]
    if not nothing.all():
        assert relative_error(lse[~nothing], want[1][~nothing]) < LIMITS[dtype]


def dense(
    device: Any, dtype: torch.dtype, *, batch: int, new: int, tokens: int, kv_heads: int,
    group: int, dim: int, causal: bool = False, lengths: list[int] | None = None,
    shared: bool = False, scale: float | None = None, tuning: Tuning | None = None,
) -> None:  # fmt: skip
    """One call on tensors against the oracle, row by row where rows have lengths."""
    heads = kv_heads * group
    q = draw(batch, new, heads, dim, device=device, dtype=dtype)
    # A buffer with room behind the tokens, as a growing cache has it.
    rows = 1 if shared else batch
    k, v = (
        draw(rows, tokens + 3, kv_heads, dim, device=device, dtype=dtype, seed=n)[:, :tokens]
        for n in (1, 2)
    )
    valid = None if lengths is None else torch.tensor(lengths, device=device)
    found = decode_attention(
        q, k, v, lengths=valid, causal=causal, softmax_scale=scale, tuning=tuning
    )
    wide = [x.expand(batch, -1, -1, -1) for x in (k, v)]
    results = [
        attention_oracle(
            q[row : row + 1],
            *(x[row : row + 1, : tokens if lengths is None else lengths[row]] for x in wide),
            causal=causal, softmax_scale=scale,
        )
        for row in range(batch)
    ]  # fmt: skip
    outs, lses = zip(*results, strict=True)
    agree(found, (torch.cat(outs), torch.cat(lses)), dtype)


def by_table(
    device: Any, dtype: torch.dtype, *, batch: int, new: int, shared: list[int], own: list[int],
    kv_heads: int, group: int, dim: int, keeps: bool = True,
    hidden: list[tuple[int, int]] | None = None, layers: int = 2,
) -> None:  # fmt: skip
    """Append and attend over segments by address, some shared by the rows, the last one growing."""
    heads = kv_heads * group

    def segments(rows: int, sizes: list[int], seed: int) -> list[list[tuple[Tensor, Tensor]]]:
        return [
            [
                tuple(
                    draw(rows, n + 5, kv_heads, dim, device=device, dtype=dtype, seed=s)[:, :n]
                    for s in (seed + 7 * layer + number, seed + 50 + 7 * layer + number)
                )
                for number, n in enumerate(sizes)
            ]
            for layer in range(layers)
        ]  # type: ignore[return-value]

    grown = [*own[:-1], own[-1] + new] if keeps else own
    theirs, ours = segments(1, shared, 100), segments(batch, grown, 300)
    make = (layers, batch, kv_heads, dim, dtype, torch.device(device))
    table = KVTable(*make)
    table.load(ours)
    table.step(sum(grown), new if keeps else 0, hidden)
    tables = [table]
    if shared:
        common = KVTable(layers, 1, *make[2:])
        common.load(theirs)
        common.step(sum(shared), 0)
        tables.append(common)
    for layer in range(layers):
        q = draw(batch, new, heads, dim, device=device, dtype=dtype, seed=layer)
        k, v = (
            draw(batch, kv_heads, new, dim, device=device, dtype=dtype, seed=n + layer).transpose(
                1, 2
            )
            for n in (11, 12)
        )
        before = [x.clone() for pair in ours[layer] for x in pair]
        append_tokens(k, v, table, layer)
        if keeps:
            last = ours[layer][-1]
            assert torch.equal(last[0][:, -new:], k) and torch.equal(last[1][:, -new:], v)
            before[-2][:, -new:], before[-1][:, -new:] = k, v
        after = [x for pair in ours[layer] for x in pair]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        sent = attend_tables(q, tables, layer, softmax_scale=0.2, packed=True)
        out, lse = sent[..., :dim], sent[..., dim]
        rounded = attend_tables(q, tables, layer, softmax_scale=0.2)
        assert torch.equal(rounded, out.to(dtype))
        whole = []
        for which in range(2):
            past = [pair[which].expand(batch, -1, -1, -1) for pair in theirs[layer]]
            whole.append(torch.cat([*past, *(pair[which] for pair in ours[layer])], dim=1))
        outs, lses = [], []
        base = sum(shared)
        for row in range(batch):
            keep = torch.ones(whole[0].shape[1], dtype=torch.bool, device=device)
            if hidden is not None:
                keep[base + hidden[row][0] : base + hidden[row][1]] = False
            result = attention_oracle(
                q[row : row + 1], *(x[row : row + 1, keep] for x in whole),
                causal=keeps, softmax_scale=0.2,
            )  # fmt: skip
            outs.append(result[0])
            lses.append(result[1])
        agree((out, lse.transpose(1, 2)), (torch.cat(outs), torch.cat(lses)), dtype)


def merging(device: Any) -> None:
    """Packed results of several ranks, one of them without keys."""
    packed = draw(3, 2, 1, 4, 17, device=device, dtype=torch.float32)
    packed[1, ..., :16], packed[1, ..., 16] = 0, float("-inf")
    packed[:, 1, 0, 2, :16], packed[:, 1, 0, 2, 16] = 0, float("-inf")
    out, lse = merge_parts(packed[..., :16], packed[..., 16], dtype=torch.float32)
    weights = packed[..., 16].double().softmax(0).nan_to_num()
    want = (weights.unsqueeze(-1) * packed[..., :16].double()).sum(0)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), packed[..., 16].double().logsumexp(0))


def small(device: Any, dtype: torch.dtype, tuning: Tuning | None) -> None:
    """Everything once, at sizes for the interpreter."""
    base: dict[str, Any] = {"kv_heads": 2, "group": 7, "dim": 64, "tuning": tuning}
    for new, tokens in itertools.product((1, 3), (1, 5, 130)):
        dense(device, dtype, batch=2, new=new, tokens=max(tokens, new), causal=True, **base)
    dense(device, dtype, batch=3, new=1, tokens=90, lengths=[1, 90, 33], **base)
    dense(device, dtype, batch=2, new=2, tokens=90, lengths=[17, 64], causal=True, **base)
    dense(device, dtype, batch=2, new=1, tokens=40, lengths=[0, 40], **base)
    dense(device, dtype, batch=4, new=2, tokens=100, shared=True, scale=0.3, **base)
    for dim, group in ((80, 1), (16, 3), (128, 8)):
        dense(
            device,
            dtype,
            batch=1,
            new=4,
            tokens=77,
            causal=True,
            **base | {"dim": dim, "group": group},
        )
    dense(device, dtype, batch=1, new=8, tokens=30, causal=True, **base | {"group": 10})
    tables: dict[str, Any] = {"kv_heads": 2, "group": 3, "dim": 16}
    by_table(device, dtype, batch=1, new=1, shared=[], own=[40, 3, 0], **tables)
    by_table(device, dtype, batch=1, new=3, shared=[], own=[100, 64, 7], **tables)
    by_table(device, dtype, batch=3, new=1, shared=[50, 9], own=[4], **tables)
    by_table(device, dtype, batch=2, new=2, shared=[50], own=[20, 6], keeps=False, **tables)
    by_table(
        device, dtype, batch=2, new=1, shared=[30], own=[12, 5], hidden=[(0, 0), (0, 7)], **tables
    )
    merging(device)


def main() -> None:
    # The interpreter multiplies bfloat16 as if it were integers.
    for dtype in (torch.float32, torch.float16):
        small("cpu", dtype, Tuning(16, 4, 1, 2))
        print(dtype, "agrees")


if __name__ == "__main__":
    main()
