"""The table of rates, and result files laid over it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longvila.memory.operations import Load, training_operations
from longvila.memory.rates import GPUS, find_gpu, with_results, with_rows
from longvila.memory.sizes import PlanError, preset

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def test_names() -> None:
    assert find_gpu("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    with pytest.raises(PlanError, match="no rates of 'v100'"):
        find_gpu("v100")


@pytest.mark.parametrize("name", sorted(GPUS))
def test_every_number_has_a_source(name: str) -> None:
    gpu = GPUS[name]
    assert set(gpu.sources) == {
        "matrices", "attention", "tower", "memory_rate", "links", "host_rate"
    }  # fmt: skip
    assert all(gpu.sources.values())
    assert gpu.attention_rates("flash")[1] is None


def test_the_table_is_what_the_result_file_says() -> None:
    """No typing error stands between the measurement and the plan."""
    content = json.loads((RESULTS / "2026-11-22_attention_2xh200.json").read_text())
    for row in content["rows"]:
        name = row["method"].removeprefix("ideal_")
        if row["kind"] == "ideal" and row["tokens"] == 131072 and name != row["method"]:
            forward, backward = GPUS["h200"].attention[name]
            assert forward == pytest.approx(1e12 * row["metrics"]["forward_tflops_per_gpu"])
            assert backward == pytest.approx(1e12 * row["metrics"]["backward_tflops_per_gpu"])
    links = max(content["links"], key=lambda each: each["message_mib"])
    assert GPUS["h200"].all_to_all == pytest.approx(1e9 * links["all_to_all_gb_per_s"])
    assert GPUS["h200"].gather == pytest.approx(1e9 * links["all_gather_gb_per_s"])
    assert GPUS["h200"].ring == pytest.approx(1e9 * links["ring_gb_per_s"])


def test_rates_of_the_memory_benchmark_are_in_the_table() -> None:
    content = json.loads((RESULTS / "2026-11-22_memory_plan_1xh200.json").read_text())
    gpu = GPUS["h200"]
    measured = with_rows(gpu, content["rows"], "file")
    assert measured.matrices == pytest.approx(gpu.matrices)
    assert measured.memory_rate == pytest.approx(gpu.memory_rate)
    assert measured.host_rate == pytest.approx(gpu.host_rate)
    balance = json.loads((RESULTS / "2026-11-22_vision_balance_2xh200.json").read_text())
    (ours,) = (r for r in balance["rows"] if r["method"] == "tower/longvila_exchange")
    load = Load(tokens=1024 * 197, frames=1024)
    counts = training_operations(preset("7B"), load, checkpointing=True, keep_attention=True)
    operations = sum(
        each[part]
        for each in (counts.forward, counts.backward, counts.recompute)
        for part in ("tower", "projector")
    )
    rate = operations / 2 / (ours["metrics"]["total_ms"] / 1e3)
    assert gpu.tower == pytest.approx(rate, rel=1e-3)


def test_a_stand_in_is_named() -> None:
    rates, note = GPUS["a100"].attention_rates("fa4")
    assert rates == GPUS["a100"].attention["flash"]
    assert note is not None and "fa4 on A100" in note


def test_results_of_ones_own_machine(tmp_path: Path) -> None:
    gpu = with_results(GPUS["h100"], [RESULTS / "2026-11-22_attention_2xh200.json"])
    # the longest length of each kernel
    assert gpu.attention["fa4"][0] == pytest.approx(682.39e12)
    assert gpu.attention["fa3"] == GPUS["h100"].attention["fa3"]
    assert gpu.sources["attention"].endswith("attention_2xh200.json")
    file = tmp_path / "own.json"
    rows = [
        {
            "method": "rate/matrices",
            "metrics": {"forward_tflops_per_gpu": 700.0, "backward_tflops_per_gpu": 650.0},
        },
        {"method": "rate/device_memory", "metrics": {"gb_per_s": 4000.0}},
        {
            "method": "rate/host",
            "metrics": {"to_host_gb_per_s": 55.0, "from_host_gb_per_s": 51.0},
        },
    ]
    file.write_text(json.dumps({"benchmark": "memory_plan", "rows": rows}))
    own = with_results(gpu, [file])
    assert own.matrices == (7e14, 6.5e14)
    assert (own.memory_rate, own.host_rate) == (4e12, 51e9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"benchmark": "needle", "rows": []}, "a result of 'needle'"),
        ({"benchmark": "memory_plan", "rows": []}, "no rows rate/"),
        ({"benchmark": "attention", "rows": []}, "no rows ideal_"),
    ],
)
def test_files_without_rates_are_named(
    tmp_path: Path, content: dict[str, object], message: str
) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=message):
        with_results(GPUS["h200"], [file])
    file.write_text("{")
    for path in (file, tmp_path, tmp_path / "gone.json"):
        with pytest.raises(PlanError, match=r"expected a result file .*; got "):
            with_results(GPUS["h200"], [path])
