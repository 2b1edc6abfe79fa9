"""The global mean against one process that sees every target."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from longvila.sp.loss import check_num_items, count_targets, global_mean
from longvila.testing import Rank, ranks
from longvila.testing.asserts import assert_close

VOCAB, WIDTH = 7, 5


def batch(tokens: int, active: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head weight and targets of which only ``active`` rows count."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.full((tokens,), -100)
    targets[active] = torch.randint(VOCAB, (len(active),), generator=generator)
    return hidden, weight, targets


def summed(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(hidden @ weight.T, targets, reduction="sum", ignore_index=-100)


ACTIVE = {
    "spread": [0, 3, 4, 9, 15, 17, 22],
    "last rank only": [23],
    "first rank only": [0, 1, 2],
    "none": [],
}


@ranks(1, 2, 4, 8)
def test_value_and_gradient_are_those_of_one_process(rank: Rank) -> None:
    for name, active in ACTIVE.items():
        for reduction in ("mean", "sum"):
            _check(rank, f"{name}, {reduction}", active, reduction)


def _check(rank: Rank, name: str, active: list[int], reduction: str) -> None:
    hidden, weight, targets = batch(24, active)
    oracle = weight.clone().requires_grad_()
    expected = summed(hidden, oracle, targets) / max(len(active), 1)
    expected.backward()

    mine = slice(*(24 * r // rank.world_size for r in (rank.rank, rank.rank + 1)))
    local = weight.clone().requires_grad_()
    loss = global_mean(
        summed(hidden[mine], local, targets[mine]),
        count_targets(targets[mine]),
        group=dist.group.WORLD,
        gradient_reduction=reduction,
    )
    assert_close(loss, expected, name=f"{name}: loss")
    loss.backward()
    dist.all_reduce(local.grad)
    if reduction == "mean":
        local.grad /= rank.world_size
    assert_close(local.grad, oracle.grad, name=f"{name}: gradient of the head")


@ranks(2)
def test_accumulated_micro_batches_divide_by_the_steps_targets(rank: Rank) -> None:
    """Two micro-batches with 6 and 1 targets: the mean of their means would be wrong."""
    micro = [batch(8, [0, 1, 2, 5, 6, 7]), batch(8, [4])]
    weight = micro[0][1]
    oracle = weight.clone().requires_grad_()
    (sum(summed(h, oracle, t) for h, _, t in micro) / 7).backward()
    local = weight.clone().requires_grad_()
    total = 0.0
    mine = slice(4 * rank.rank, 4 * rank.rank + 4)
    for number, (hidden, _, targets) in enumerate(micro):
        loss = global_mean(
            summed(hidden[mine], local, targets[mine]),
            count_targets(targets[mine]),
            group=dist.group.WORLD,
            gradient_reduction="mean",
            num_items=7 if number else torch.tensor([7]),
        )
        loss.backward()
        total += loss.item()
    dist.all_reduce(local.grad)
    assert_close(local.grad / 2, oracle.grad)
    expected = sum(summed(h, weight, t).item() for h, _, t in micro) / 7
    assert math.isclose(total, expected, rel_tol=1e-12)


@ranks(2)
def test_a_mean_of_local_means_is_nan_where_a_rank_has_no_target(rank: Rank) -> None:
    """What the original did: a mean loss a rank, weighted by the rank's share of the targets."""
    hidden, weight, targets = batch(8, [5, 6])
    mine = slice(4 * rank.rank, 4 * rank.rank + 4)
    count = count_targets(targets[mine])
    theirs = F.cross_entropy(hidden[mine] @ weight.T, targets[mine]) * count / 2
    dist.all_reduce(theirs)
    assert math.isnan(theirs)
    ours = global_mean(
        summed(hidden[mine], weight, targets[mine]), count,
        group=dist.group.WORLD, gradient_reduction="mean",
    )  # fmt: skip
    assert_close(ours, summed(hidden, weight, targets) / 2)


def test_counts_beyond_single_precision_stay_exact() -> None:
    count = torch.tensor(2**24 + 1)
    local = torch.tensor(float(2**24 + 1), dtype=torch.float64)
    loss = global_mean(local, count, group=None, gradient_reduction="mean")
    assert float(loss) == 1.0


def test_one_process_keeps_dtype_and_gradient() -> None:
    local = torch.tensor(6.0, requires_grad=True)
    loss = global_mean(local, torch.tensor(4), group=None, gradient_reduction="mean")
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == 1.5
    assert local.grad.item() == 0.25
    options: dict = {"group": None, "gradient_reduction": "mean"}
    assert global_mean(local, torch.tensor(4), num_items=8.0, **options).item() == 0.75


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_reduction": "avg"}, "how the parameter gradients will be combined"),
        ({"gradient_reduction": "sum", "num_items": -1}, "must not be negative, got -1"),
        ({"gradient_reduction": "sum", "num_items": torch.tensor([1, 2])}, r"one number, got.*2"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        global_mean(torch.tensor(1.0), torch.tensor(1), group=None, **options)


def test_a_vector_of_losses_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be scalars, got shapes \(2,\)"):
        global_mean(torch.ones(2), torch.tensor(1), group=None, gradient_reduction="sum")


@ranks(2)
def test_ranks_that_divide_by_different_numbers_are_refused(rank: Rank) -> None:
    """Each would weigh its targets by its own count, and nothing else would show it."""
    options: dict = {"group": dist.group.WORLD, "device": torch.device("cpu")}
    for mine in (12 + rank.rank, None if rank.rank else 12):
        with pytest.raises(ValueError, match=r"the same on all ranks.* got (12 to 13|none to 12)"):
            check_num_items(mine, **options)
    check_num_items(torch.tensor(12) if rank.rank else 12.0, **options)
    check_num_items(None, **options)
