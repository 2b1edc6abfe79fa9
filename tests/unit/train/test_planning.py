"""Meshes and switches: the first that fits is taken, in the order that is written down."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longvila.memory.estimate import training_peak
from longvila.memory.operations import Load
from longvila.memory.rates import GIB, GPUS
from longvila.memory.settings import Ranks, Settings
from longvila.memory.sizes import ModelSize, PlanError, preset
from longvila.memory.timing import Links
from longvila.sp.mesh import plan_mesh
from longvila.train.planning import Planner, advice, ranks_of

SEVEN = preset("7B")
TEXT = ModelSize(name="8B", text=preset("8B").text)


def video(frames: int) -> Load:
    return Load.of_video(SEVEN, frames, text_tokens=512, targets=512)


def test_a_short_row_needs_nothing() -> None:
    plan = Planner(SEVEN, GPUS["h200"]).plan(Load(tokens=4096, targets=512), 8)
    assert plan.fits and plan.ranks.sp == 1 and plan.ranks.dp == 8
    assert [each.name for each in plan.attempts] == ["nothing"]
    assert plan.settings.checkpointing is False
    assert plan.time is not None and plan.time.seconds == plan.attempts[0].seconds


def test_the_fewest_ranks_that_hold_a_row_share_it() -> None:
    planner = Planner(SEVEN, GPUS["h200"])
    plan = planner.plan(video(1024), 8)
    assert plan.fits and 1 < plan.ranks.sp < 8
    fewer = planner.plan_if_simple(video(1024), 8, plan.ranks.sp // 2)
    assert fewer is None
    asked = planner.plan(video(1024), 8, seq_parallel_size=8)
    assert asked.ranks.sp == 8 and asked.peak.bytes < plan.peak.bytes + 30 * GIB


def test_the_ladder_in_order() -> None:
    """Each switch is on top of those before it, and less memory with each."""
    planner = Planner(SEVEN, GPUS["h200"], host_bytes=256 * GIB)
    plan = planner.plan(Load(tokens=2**19 + 2**17, targets=512), 2)
    names = [each.name for each in plan.attempts]
    assert names == ["nothing", "checkpoints that keep attention", "tiled MLP", "offload"]
    peaks = [each.peak.bytes for each in plan.attempts]
    assert peaks == sorted(peaks, reverse=True)
    assert [each.fits for each in plan.attempts] == [False, False, False, True]
    assert plan.fits
    # The smallest budget that does: 4 GiB less would not.
    less = replace(plan.settings, offload_bytes=plan.settings.offload_bytes - 4 * int(GIB))
    assert training_peak(SEVEN, plan.load, ranks=plan.ranks, settings=less).bytes > planner.limit
    lines = advice(plan.attempts)
    assert len(lines) == 3
    assert "parallel.mlp_tile_rows=8192" in lines[1] and lines[1].endswith("does not fit")
    assert "parallel.offload_gib=" in lines[2] and lines[2].endswith("fits")


def test_moments_go_to_the_host_last_and_then_more_gpus() -> None:
    planner = Planner(SEVEN, GPUS["h200"], host_bytes=128 * GIB)
    plan = planner.plan(video(2048), 1)
    assert plan.attempts[-1].name == "moments on the host"
    assert not plan.fits
    assert plan.enough_gpus == 2
    assert Planner(SEVEN, GPUS["h200"], host_bytes=128 * GIB).plan(video(2048), 2).fits
    roomy = Planner(SEVEN, GPUS["h200"], host_bytes=512 * GIB).plan(video(2048), 1)
    assert roomy.fits
    # What waits on the host is counted there.
    tight = Planner(SEVEN, GPUS["h200"], host_bytes=16 * GIB).plan(video(2048), 1)
    assert all(each.peak.host_bytes <= 16 * GIB for each in tight.attempts)


def test_fewer_frames_where_the_tower_is_the_peak() -> None:
    size = SEVEN.with_frames_per_call(None)
    load = Load.of_video(size, 160, text_tokens=64, targets=64)
    plan = Planner(size, GPUS["h200"], limit_bytes=175 * GIB).plan(load, 1)
    assert "fewer frames at once" in [each.name for each in plan.attempts]
    assert plan.size.tower is not None and plan.size.tower.frames_per_call == 8
    assert plan.fits
    # Other families have no such setting.
    fixed = replace(size, tower=replace(size.tower, adjustable=False))
    other = Planner(fixed, GPUS["h200"], limit_bytes=175 * GIB).plan(load, 1)
    assert "fewer frames at once" not in [each.name for each in other.attempts]


def test_the_cluster_of_the_paper() -> None:
    """2M tokens on 256 GPUs: two axes, and no layer runs again."""
    planner = Planner(TEXT, GPUS["a100"], base=Settings(backend="flash"))
    plan = planner.plan(Load(tokens=2**21, targets=2**21), 256, seq_parallel_size=256)
    assert plan.fits and not plan.settings.checkpointing
    assert plan.ranks.ring > 1 and plan.ranks.world == 256
    assert plan.ranks.kv_exchange == "p2p"
    assert any("crosses nodes" in reason for reason in plan.reasons)
    only = Ranks(dp=8, ulysses=32, per_node=8)
    assert not planner.ladder(plan.load, only)[0].fits


def test_the_librarys_mesh_stands_unless_another_is_clearly_faster() -> None:
    load = Load(tokens=578_000, targets=578_000)
    base = Settings(backend="flash")
    planner = Planner(TEXT, GPUS["h100"], base=base)
    chosen, found = planner.meshes(load, 64, 64, base)
    own = plan_mesh(64, 64, num_heads=32, num_kv_heads=8, ranks_per_node=8)
    assert (chosen.ranks.ring, chosen.ranks.ulysses) == (own.ring_size, own.ulysses_size)
    assert chosen.ranks == ranks_of(own)
    seconds = [each.seconds for each in found]
    assert seconds == sorted(seconds)
    assert {each.ranks.ulysses for each in found} == {1, 2, 4, 8, 16, 32}, "never above the heads"
    # Heads inside a node lose to the ring where the node's own links are the slow ones.
    slow = replace(GPUS["h100"], all_to_all=1e9)
    other, _ = Planner(TEXT, slow, base=base).meshes(load, 64, 64, base)
    assert other.ranks.ulysses < 8
    fast = Planner(TEXT, GPUS["h100"], base=base, links=Links(rate=1e9)).meshes(load, 64, 64, base)
    assert fast[0].ranks.ulysses >= 8


def test_numbers_that_do_not_divide() -> None:
    planner = Planner(SEVEN, GPUS["h200"], per_node=8)
    with pytest.raises(PlanError, match="no whole number of nodes of 8"):
        planner.plan(video(8), 12)
    with pytest.raises(PlanError, match="do not divide 4 GPUs"):
        planner.plan(video(8), 4, seq_parallel_size=3)
    with pytest.raises(PlanError, match="a device or the bytes"):
        Planner(SEVEN, None)
    with pytest.raises(PlanError, match="whose rates are known"):
        Planner(SEVEN, None, limit_bytes=GIB).prompt(video(8), 1)


def test_prompts() -> None:
    planner = Planner(SEVEN, GPUS["h200"])
    plan = planner.prompt(video(1024), 2)
    assert plan.fits and plan.ranks.sp == 2 and plan.enough_gpus is None
    small = Planner(SEVEN, GPUS["h200"], limit_bytes=24 * GIB).prompt(video(2048), 1)
    assert not small.fits and small.enough_gpus is not None and small.enough_gpus > 1


def test_without_rates_nothing_is_timed() -> None:
    attempts = Planner(SEVEN, None, limit_bytes=GIB).ladder(video(8), Ranks())
    assert all(each.seconds != each.seconds for each in attempts)
    assert not attempts[-1].fits
