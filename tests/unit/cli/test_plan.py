"""`longvila plan` from presets, folders and stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from longvila.cli.main import main as command
from longvila.cli.plan import main
from longvila.testing.tiny import save_tiny
from longvila.train.parts import tune
from longvila.train.stages import get_stage

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def values(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict:
    assert main([*arguments, "--json"]) == status
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "7B", "--frames", "2048", "--gpus", "4"]) == 0
    text = capsys.readouterr().out
    assert "row: 403,968 tokens, 2,048 frames, 512 targets" in text
    assert "tried in order:" in text


def test_a_cluster_that_is_not_at_hand(capsys: pytest.CaptureFixture[str]) -> None:
    found = values(
        capsys, "--model", "8B", "--tokens", "578000", "--gpus", "64", "--gpu", "h100",
        "--backend", "flash", "--per-node", "8", "--link-gbps", "400",
        "--seq-parallel-size", "64",
    )  # fmt: skip
    assert found["ranks"]["ring"] == 8 and found["ranks"]["ulysses"] == 8
    assert found["time"]["seconds"] == pytest.approx(16.9, rel=0.25)
    assert found["settings"]["checkpointing"] is False


def test_a_stage_says_what_is_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    extend = values(capsys, "--model", "7B", "--stage", "extend-512k", "--gpus", "8")
    assert extend["load"]["tokens"] == 2**19 and extend["load"]["frames"] == 0
    # rank 8 on q, k, v, o, and embeddings and norms in full
    adapters = 28 * 8 * ((3584 + 3584) * 2 + (3584 + 512) * 2)
    beside = 152064 * 3584 + 3584 * 57
    assert extend["tuned_parameters"] == adapters + beside
    align = values(capsys, "--model", "7B", "--stage", "align", "--gpus", "1")
    assert align["tuned_parameters"] == 29376512
    long = values(capsys, "--model", "7B", "--stage", "long-sft-256", "--gpus", "4")
    assert long["load"]["frames"] == 256 and long["load"]["tokens"] == 2**17


def test_norms_of_queries_and_keys_are_tuned_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Qwen3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    pytest.importorskip("peft")
    planned = values(capsys, "--model", str(tmp_path), "--stage", "extend-64k", "--gpus", "1")
    stage = get_stage("extend-64k")
    model = tune(Qwen3ForCausalLM(config), stage.rates, stage.adapter)
    tuned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert planned["tuned_parameters"] == tuned


def test_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", "7B", "--frames", "1024", "--gpus", "4"]
    eager, compiled = values(capsys, *given), values(capsys, *given, "--compiled")
    assert compiled["time"]["parts"]["elementwise"] < 0.6 * eager["time"]["parts"]["elementwise"]
    assert "parallel.compile=true" in compiled["switch_on"]


def test_too_few_gpus_is_a_status_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    found = values(capsys, "--model", "7B", "--frames", "2048", "--gpus", "1", status=3)
    assert found["fits"] is False and found["enough_gpus"] == 2


def test_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(save_tiny(tmp_path / "tiny"))
    found = values(capsys, "--model", folder, "--frames", "4", "--gpus", "1")
    assert found["model"]["name"] == "tiny"
    assert found["load"]["tokens"] == 4 * 10 + 512
    prompt = values(capsys, "--model", folder, "--frames", "4", "--gpus", "2", "--inference")
    assert prompt["ranks"]["sp"] == 2 and prompt["fits"] is True


def test_rates_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", "7B", "--frames", "256", "--gpus", "2", "--gpu", "h100"]
    before = values(capsys, *given, "--backend", "flash")
    file = str(RESULTS / "2026-11-22_attention_2xh200.json")
    after = values(capsys, *given, "--backend", "flash", "--rates", file)
    assert after["sources"]["attention"] == file
    assert after["time"]["parts"]["attention"] > before["time"]["parts"]["attention"]
    small = values(capsys, *given, "--memory-gib", "20", status=3)
    assert small["limit_bytes"] < 20 * 2**30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "7B", "--gpus", "1"], "give --frames, --tokens or --stage"),
        (["--model", "9B", "--frames", "8", "--gpus", "1"], "there is no preset '9B'"),
        (
            ["--model", "7B", "--frames", "8", "--tokens", "100", "--gpus", "1"],
            "8 frames have 1,576 tokens, the row 100",
        ),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["plan", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        "--per-node 0", "--link-gbps 0", "--links-per-node 0", "--memory-gib -3",
        "--chunk-tokens 0", "--host-gib -1", "--frame-side 0", "--seq-parallel-size 4 --inference",
    ],
)  # fmt: skip
def test_numbers_that_no_machine_has(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = ["--model", "7B", "--frames", "8", "--gpus", "16"]
    assert command(["plan", *row, *given.split()]) == 1
    name = given.split()[0]
    assert f"longvila plan: {name} " in capsys.readouterr().err
