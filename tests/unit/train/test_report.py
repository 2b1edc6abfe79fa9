"""Plans as text and as JSON say the same."""

from __future__ import annotations

import json

import pytest

from longvila.memory.operations import Load
from longvila.memory.rates import GIB, GPUS
from longvila.memory.sizes import preset
from longvila.train.planning import Planner
from longvila.train.report import plan_as_dict, prompt_as_dict, show_plan, show_prompt

SEVEN = preset("7B")


def test_a_plan_that_fits() -> None:
    load = Load.of_video(SEVEN, 2048, text_tokens=512, targets=512)
    plan = Planner(SEVEN, GPUS["h200"]).plan(load, 4)
    text = show_plan(plan)
    for part in ("403,968 tokens", "on 4 x H200", "ulysses 4", "fits: torch can have 138.3 GiB"):
        assert part in text
    assert "switch on: parallel.seq_parallel_size=4" in text
    values = json.loads(json.dumps(plan_as_dict(plan)))
    assert values["fits"] is True
    assert values["peak"]["bytes"] == pytest.approx(sum(values["peak"]["parts"].values()))
    assert values["time"]["seconds"] == pytest.approx(sum(values["time"]["parts"].values()))
    assert values["switch_on"][0] == "parallel.seq_parallel_size=4"
    assert max(values["peak"]["moments"].values()) == pytest.approx(values["peak"]["bytes"])
    assert values["sources"]["attention"].endswith("131072 tokens")


def test_a_plan_that_does_not() -> None:
    load = Load.of_video(SEVEN, 2048, text_tokens=512, targets=512)
    plan = Planner(SEVEN, GPUS["h100"]).plan(load, 1)
    text = show_plan(plan)
    assert "DOES NOT FIT" in text and f"use {plan.enough_gpus} GPUs" in text
    assert plan_as_dict(plan)["switch_on"] == []
    hopeless = Planner(SEVEN, GPUS["h100"], limit_bytes=GIB).plan(load, 1)
    assert "no number of GPUs" in show_plan(hopeless)


def test_switches_are_settings_of_a_stage() -> None:
    """What a plan says to switch on can be given to longvila train --set."""
    from longvila.train.settings import override
    from longvila.train.stages import get_stage

    load = Load(tokens=2**20, targets=512)
    plan = Planner(SEVEN, GPUS["h200"], host_bytes=512 * GIB).plan(load, 2)
    assert plan.fits
    switches = plan_as_dict(plan)["switch_on"]
    stage = override(get_stage("extend-1m"), switches)
    assert stage.parallel.seq_parallel_size == 2
    assert stage.parallel.mlp_tile_rows == plan.settings.mlp_tile_rows is not None
    assert stage.parallel.offload_gib == plan.settings.offload_bytes / GIB > 0


def test_prompts() -> None:
    load = Load.of_video(SEVEN, 1024, text_tokens=64, targets=0)
    plan = Planner(SEVEN, GPUS["h200"]).prompt(load, 1)
    text = show_prompt(plan)
    assert "time to the first token" in text and "each further token: at least" in text
    values = json.loads(json.dumps(prompt_as_dict(plan)))
    assert values["time"]["first_token_seconds"] == pytest.approx(plan.time.seconds)
    small = Planner(SEVEN, GPUS["h200"], limit_bytes=20 * GIB).prompt(load, 1)
    assert "use " in show_prompt(small).splitlines()[-1]
