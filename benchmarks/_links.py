"""How fast the ranks' links are: all-to-all, all-gather and a ring hop, by message size.

Rates are bytes a rank sends to the other ranks over the time of a call, in GB/s (10^9), so that
the three are comparable: an all-to-all of N bytes on R ranks sends N (R-1)/R, an all-gather of N
bytes a rank sends N (R-1), a ring hop N.

Where groups of ranks pose as hosts, the links inside them and those across (ranks of equal place
in their hosts) are measured too, all groups at once, as the axes of a 2-D mesh use them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from benchmarks._cluster import Cluster, timed_ms

MEBI = 2**20


def measure_links(cluster: Cluster, sizes_mib: tuple[int, ...] = (16, 256)) -> list[dict[str, Any]]:
    """Rates among all ranks, and inside and across hosts, for each message size a rank."""
    if cluster.world_size == 1:
        return []
    groups = {"all ranks": list(range(cluster.world_size))}
    places: dict[str, dist.ProcessGroup | None] = {"all ranks": dist.group.WORLD}
    if 1 < cluster.hosts < cluster.world_size:
        near = torch.arange(cluster.world_size).view(cluster.hosts, -1)
        for name, ranks in (("inside a host", near), ("across hosts", near.T)):
            places[name], _ = dist.new_subgroups_by_enumeration(ranks.tolist())
            groups[name] = dist.get_process_group_ranks(places[name])
    return [
        {"between": name, **_rates(cluster, groups[name], place, size)}
        for name, place in places.items()
        for size in sizes_mib
    ]


def _rates(
    cluster: Cluster, members: list[int], group: dist.ProcessGroup | None, size: int
) -> dict[str, float]:
    """Rates of one group (and of all others like it at the same time)."""
    ranks, place = len(members), members.index(cluster.rank)
    count = size * MEBI // 2 // ranks * ranks
    sent = torch.randn(count, device=cluster.device).to(torch.bfloat16)
    received = torch.empty_like(sent)
    gathered = torch.empty(count * ranks, dtype=sent.dtype, device=sent.device)

    def all_to_all() -> None:
        dist.all_to_all_single(received, sent, group=group)

    def all_gather() -> None:
        dist.all_gather_into_tensor(gathered, sent, group=group)

    def ring() -> None:
        ahead, behind = members[(place + 1) % ranks], members[place - 1]
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, ahead, group),
                dist.P2POp(dist.irecv, received, behind, group),
            ]
        )
        for work in works:
            work.wait()

    row: dict[str, float] = {"message_mib": float(size)}
    shares = {"all_to_all": (ranks - 1) / ranks, "all_gather": ranks - 1.0, "ring": 1.0}
    for name, call in (("all_to_all", all_to_all), ("all_gather", all_gather), ("ring", ring)):
        call()
        first_ms = timed_ms(cluster, call, calls=1)
        calls = int(max(1, min(20, 400 / max(first_ms, 1e-3))))
        ms = timed_ms(cluster, call, calls=calls)
        row[f"{name}_gb_per_s"] = round(count * 2 * shares[name] / ms / 1e6, 2)
    return row
