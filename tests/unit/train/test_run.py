"""Ranks that were started wrongly say so at once, and do not train or wait."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from longvila.errors import LongVILAError
from longvila.testing import Rank, ranks
from longvila.train.run import Job, joined, train
from longvila.train.stages import StageError, get_stage

_WORDS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MEETING = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"RANK": "0"}, "RANK is set, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "set, MASTER_PORT not"),
        ({"RANK": "2", "WORLD_SIZE": "2", **_MEETING}, "RANK is 2, but WORLD_SIZE 2"),
        ({"RANK": "", "WORLD_SIZE": "2", **_MEETING}, "RANK=: expected a number"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x", **_MEETING}, "LOCAL_RANK=x: expected"),
    ],
)
def test_what_a_launcher_says_wrongly(
    words: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in _WORDS:
        monkeypatch.delenv(name, raising=False)
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LongVILAError, match=message), joined():
        raise AssertionError("joined")


def test_a_port_that_another_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for name, value in words.items():
            monkeypatch.setenv(name, value)
        match = f"rank 0 cannot meet the others at localhost:{port}"
        with pytest.raises(LongVILAError, match=match), joined():
            raise AssertionError("joined")


@ranks(2)
def test_ranks_with_different_settings_are_refused(rank: Rank) -> None:
    """Shards of one model would be trained at different rates."""
    stage = get_stage("sft")
    if rank.rank == 1:
        stage = replace(stage, rates=replace(stage.rates, projector=0.5), seed=7)
    job = Job(stage=stage, model="nowhere", data=Path("data.yaml"), output=Path("nothing"))
    rate = get_stage("sft").rates.projector
    message = f"rates.projector is {rate} on rank 0, 0.5; seed is [0-9]+ on rank 0, 7 on rank 1"
    with pytest.raises(StageError, match=message):
        train(job)
