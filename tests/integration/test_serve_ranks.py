"""A server over two ranks under a crowd of clients: one process's answers, and nothing left behind.

The clients are those of the load test of one process; the ranks are processes over gloo. The first
one serves, the other follows; what follows must have dropped what the first one dropped.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.waiting import wait_until

from longvila.inference.cache import ShardedCache
from longvila.inference.engine import Engine
from longvila.inference.leading import Leader, control_group, follow
from longvila.sp import build_mesh
from longvila.testing import Rank
from longvila.testing.ranks import run_ranks
from longvila.testing.tiny import tiny_model

SECONDS = 5.0


def load_crowd() -> ModuleType:
    """The load test of one process, which is no package."""
    name = "serve_load"
    if name not in sys.modules:
        file = Path(__file__).with_name("test_serve_load.py")
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def held_too_long(load: ModuleType, server: Any) -> int:
    return int(load.alive(ShardedCache)) - len(server.server.scheduler.prefix)


def serve(rank: Rank, folder: str) -> None:
    mesh = build_mesh(rank.world_size, num_heads=4, num_kv_heads=2, device_type="cpu")
    group = control_group()
    if rank.rank:
        engine = Engine(tiny_model(), mesh)
        follow(engine, group)
        gc.collect()
        left = sum(type(each) is ShardedCache for each in gc.get_objects())
        assert left == 0, f"{left} caches are held by the follower"
        return
    load = load_crowd()
    sizes = {"kv_bytes": 1 << 20, "media_cache_bytes": 100 << 10}

    def lead(engine: Any) -> Leader:
        return Leader(engine, group)

    limits = load.replace(load.cases.LIMITS, waiting=2 * load.CLIENTS)
    with load.cases.running(Path(folder), lead=lead, mesh=mesh, limits=limits, **sizes) as server:
        (Path(folder) / "secret.mp4").write_bytes(b"secret")
        (server.root / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + b"x" * 500)
        known = load.scripts(server, Path(folder))
        tasks = len(asyncio.all_tasks(server.loop))
        crowd = load.Crowd(server, known, time.monotonic() + SECONDS)
        asyncio.run(crowd.run())
        load.wait_for_quiet(server, tasks)
        assert not crowd.seen.wrong, crowd.seen.wrong[:3]
        assert {"talk", "stream", "spoil", "leave"} <= set(crowd.seen.right)
        metrics = server.server.metrics
        assert metrics.value("requests_total", outcome="failed") == 0
        assert metrics.value("reused_tokens_total") > 0
        # The model's thread lets go of the last request in its own time.
        wait_until(
            lambda: (gc.collect(), held_too_long(load, server) == 0)[1],
            lambda: f"{held_too_long(load, server)} caches are held of requests that have ended",
        )


def test_fifty_clients_of_two_ranks(tmp_path: Path) -> None:
    run_ranks(serve, 2, str(tmp_path), timeout_s=280)
