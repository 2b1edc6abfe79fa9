"""Tables between markers: written from the newest result, and stale ones are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import render


def result(name: str, date: str, value: float, link: str | None = "NV18") -> dict:
    row = {
        "method": "ours_fa4",
        "kind": "ours",
        "tokens": 2048,
        "shape": {},
        "metrics": {"step_s": value, "speedup": 1.5, "strange_gib": 2.0},
        "samples": [],
    }
    return {
        "benchmark": name, "question": "?", "date": date, "commit": "abc", "command": "run",
        "hardware": {"gpu": "GPU", "count": 2, "link": link}, "versions": {"torch": "2"},
        "rows": [row],
    }  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    results = tmp_path / "results"
    results.mkdir()
    (tmp_path / "docs").mkdir()
    name = "video_decode"  # has no drawing of its own
    for file, content in {
        f"2026-01-02_{name}_2xgpu.json": result(name, "2026-01-02", 1.25),
        f"2026-01-01_{name}_2xgpu_z.json": result(name, "2026-01-01", 9.0, "sockets"),
    }.items():
        (results / file).write_text(json.dumps(content))
    text = "before\n<!-- bench:video_decode -->\nold\n<!-- /bench -->\nafter\n"
    (tmp_path / "README.md").write_text(text)
    (tmp_path / "docs" / "plain.md").write_text("no table\n")
    return tmp_path


def run(root: Path, *flags: str) -> int:
    return render.main([*flags, "--root", str(root), "--results", str(root / "results")])


def test_check_fails_until_rendered(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, "--check") == 1
    assert "README.md is stale" in capsys.readouterr().out
    assert "old" in (root / "README.md").read_text()
    assert run(root) == 0
    assert run(root, "--check") == 0
    text = (root / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("<!-- /bench -->\nafter\n")
    assert "| **`ours_fa4`** | 1.250 | 1.50 | 2 |" in text
    assert "**2K tokens**" in text and "commit `abc`" in text


def test_a_new_result_makes_it_stale(root: Path) -> None:
    assert run(root) == 0
    newer = result("video_decode", "2026-02-01", 1.125)
    (root / "results" / "2026-02-01_video_decode_2xgpu.json").write_text(json.dumps(newer))
    assert run(root, "--check") == 1


def test_conditions_pick_a_result(root: Path) -> None:
    folder = root / "results"
    assert "9.000" in render.render_block("video_decode link=sockets", folder)
    assert "9.000" in render.render_block("video_decode suffix=z", folder)
    with pytest.raises(ValueError, match="a result's hardware has"):
        render.render_block("video_decode colour=red", folder)


def test_a_marker_without_result_says_so_and_a_wrong_name_is_an_error(root: Path) -> None:
    readme = root / "README.md"
    readme.write_text("<!-- bench:needle -->\n<!-- /bench -->\n")
    assert run(root) == 0
    assert "Not measured yet: no result of `needle`" in readme.read_text()
    readme.write_text("<!-- bench:nedle -->\n<!-- /bench -->\n")
    with pytest.raises(ValueError, match="unknown table 'nedle'"):
        run(root)


def attention_result(link: str, ms: float) -> dict:
    content = result("attention", "2026-01-01", 1.0, link)
    row = content["rows"][0]
    row["about"] = {"kernel": "fa4", "shipped": False}
    row["metrics"] = {
        "total_ms": ms, "forward_tflops_per_gpu": 600.4, "percent_of_ideal": 97.25,
    }  # fmt: skip
    peer = {**row, "method": "peer_fa4", "kind": "peer"}
    content["rows"] = [peer, row]
    content["links"] = [
        {"message_mib": 16.0, "all_to_all_gb_per_s": 151.3, "all_gather_gb_per_s": 187.1,
         "ring_gb_per_s": 202.4}
    ]  # fmt: skip
    content["notes"] = {
        "comparisons": [
            {"tokens": 2048, "ours": "ours_fa4", "against": "best peer", "method": "peer_fa4",
             "speedup": 1.1, "verdict": "ahead"}
        ]
    }  # fmt: skip
    return content


def step_result() -> dict:
    content = result("mmsp_step", "2026-03-01", 1.0)
    content["rows"][0]["shape"] = {"frames": 6}
    content["rows"][0]["metrics"] |= {"vision_forward_s": 0.25, "check_loss_error": 1e-6}
    return content


def test_step_and_vision_tables(root: Path) -> None:
    drawn = "\n".join(render.step(step_result()))
    assert "| method | tokens | frames | step s |" in drawn and "vision forward s |" in drawn
    assert "relative: loss error 1.0e-06." in drawn
    content = result("vision_balance", "2026-03-01", 1.0)
    row = content["rows"][0]
    row["shape"] = {"frames": 8}
    content["rows"] = [
        {**row, "method": "tower/longvila_exchange", "metrics": {"frames_per_s": 99.0}},
        {**row, "method": "mixed/by_count", "kind": "peer", "metrics": {"balance_percent": 50.0}},
    ]
    drawn = "\n".join(render.vision(content))
    assert "included** (frames 8)" in drawn and "| **`longvila_exchange`** | 99 |" in drawn
    assert "balance %" in drawn and "The movement of the rows alone" not in drawn


def test_full_step_tables() -> None:
    content = result("train_step", "2026-03-01", 1.0)
    row = content["rows"][0]
    parts = ("embed", "text_forward", "loss_forward", "backward", "norm_clip", "update")
    figures = {"step_s": 2.0, "tokens_per_s_per_gpu": 512.4, "check_loss_error": 1e-6}
    figures |= {"check_gradient_norm_error": 2e-5, **{f"{part}_s": 0.25 for part in parts}}
    shape = {"check_tokens": 1024}
    ours = {**row, "kind": "ours", "method": "a", "tokens": 2048, "shape": shape,
            "metrics": figures, "samples": [2.5, 2.0]}  # fmt: skip
    lost = {**ours, "kind": "peer", "method": "b", "metrics": {}, "samples": [],
            "about": {"failed": "out of memory"}}  # fmt: skip
    content["rows"] = [lost, ours]
    content["notes"] = {
        "samples": "Two of each.",
        "comparisons": [{"tokens": 2048, "ours": "a", "peer": "c", "speedup": 1.25}],
    }
    drawn = "\n".join(render.train_step(content))
    assert "| **`a`** | 2.000 | 512 |  |  |  | 2 |\n| `b` | out of memory |" in drawn
    assert "| 2K | 0.250 | 0.250 | 0.250 | 0.250 | 0.250 | 0.250 |" in drawn
    assert "| 2K | `c` | median steps | 1.250 |" in drawn and "Two of each." in drawn
    assert drawn.endswith("at 1K tokens, relative, at most: loss 1.0e-06, gradient norm 2.0e-05.")


def test_settings_and_parts_of_a_videos_step() -> None:
    content = result("train_step", "2026-03-01", 1.0)
    parts = ("vision_forward", "text_forward", "loss_forward", "text_backward", "vision_backward")
    figures = {f"{part}_s": number / 4 for number, part in enumerate(parts, 1)}
    figures |= {"norm_clip_s": 2.0, "update_s": 3.0, "step_s": 9.0, "peak_gib": 104.04}
    about = {"recompute": True, "plain_layers": 3, "mlp_tile_rows": 512, "planned_gib": 103.1,
             "offload_used_gib": 37.5}  # fmt: skip
    content["rows"] = [{
        **content["rows"][0], "kind": "ours", "tokens": 4096, "metrics": figures, "about": about,
        "shape": {"sequence_parallel": 2, "layers": 28, "frames": 20}, "samples": [9.0],
    }]  # fmt: skip
    drawn = "\n".join(render.train_step(content))
    assert "| vision forward | text forward | loss forward | text backward | vision back" in drawn
    assert "| 4K | 0.250 | 0.500 | 0.750 | 1.000 | 1.250 | 2.000 | 3.000 |" in drawn
    assert "| 4K | 2,048 | 3 | 512 | 37.5 | 103.1 | 104.0 |" in drawn
    about["recompute"] = False
    assert "| 4K | 2,048 | 28 |" in "\n".join(render.train_step(content))


def test_parity_table() -> None:
    content = result("parity", "2026-03-01", 1.0)
    metrics = {"cells": 1320, "ran": 1300, "failed": 1, "errors_of_cells": 20,
               "float64_error": 3.25e-15}  # fmt: skip
    content["rows"] = [{
        **content["rows"][0], "method": "model, 2 ranks", "metrics": metrics,
        "shape": {"meshes": ["(1, 1)", "(2, 1)"]},
    }]  # fmt: skip
    content["notes"] = {"cells_by_commit": {"abc": 1000, "def": 300}}
    drawn = "\n".join(render.parity(content))
    assert "| model, 2 ranks | (1,1) (2,1) | 1,320 | 1,300 | 1 | 3.2e-15 |  |" in drawn
    assert "1,320 cells: 1,000 at `abc`, 300 at `def`. Errors are relative, and of 20" in drawn


def test_attention_tables(root: Path) -> None:
    folder = root / "results"
    for name, content in {
        "2026-01-01_attention_2xgpu.json": attention_result("NV18", 100.0),
        "2026-01-01_attention_2xgpu_hosts.json": attention_result("sockets", 108.0),
    }.items():
        (folder / name).write_text(json.dumps(content))
    drawn = render.render_block("attention link=NV", folder)
    assert "| **`ours_fa4`** | fa4 | 600 |" in drawn
    assert drawn.index("ours_fa4") < drawn.index("`peer_fa4`\\*")
    assert "| 2K | `ours_fa4` | best peer | `peer_fa4` | 1.100 | ahead |" in drawn
    assert "| 16 | 151.3 | 187.1 | 202.4 |" in render.render_block("links link=NV", folder)
    assert "| **`ours_fa4`** | 2K | 108.0 | 100.0 | 1.08 |" in render.render_block(
        "attention_hosts", folder
    )


def test_factorisations_of_four_ranks() -> None:
    content = attention_result("NV18", 100.0)
    row = {**content["rows"][1], "about": {"kernel": "fa4"}, "shape": {"heads": 6, "kv_heads": 2}}
    times = {"ulysses": 133.4, "2d": 104.0, "2d_crossed": 120.0, "ring": 130.0}
    content["rows"] = [
        {**row, "method": f"longvila_{way}_fa4",
         "metrics": {"total_ms": ms, "percent_of_head_bound": 99.6}}
        for way, ms in times.items()
    ]  # fmt: skip
    content["notes"]["default_mesh"] = {"6/2": "2d"}
    drawn = "\n".join(render.factorisations(content))
    assert "| 6/2 | 2K | 104.0 (100 %) | 120.0 (100 %) | 130.0 (100 %) | 133.4 (100 %) |" in drawn
    assert "| heads | tokens | 2-D ahead of ulysses by | 2-D ahead of ring by | fastest |" in drawn
    assert "| 6/2 | 2K | 1.28 | 1.25 | `2d` | `2d` | 1.000 |" in drawn
    content["links"] = [
        {"between": name, "message_mib": 16.0, "all_to_all_gb_per_s": rate,
         "all_gather_gb_per_s": rate, "ring_gb_per_s": rate}
        for name, rate in (("inside a host", 300.0), ("across hosts", 2.5))
    ]  # fmt: skip
    drawn = "\n".join(render.links(content))
    assert "| between | message MiB |" in drawn and "| across hosts | 16 | 2.5 |" in drawn


def test_loss_curves_side_by_side() -> None:
    content = result("loss_curve", "2026-03-01", 1.0)
    row = {
        **content["rows"][0], "method": "dp 4", "about": {"parameters": 280_400_000},
        "shape": {"steps": 6, "dtype": "bfloat16", "heads": 14, "kv_heads": 2},
        "metrics": {"loss_apart": 0.0, "gradient_norm_apart": 0.0},
        "samples": [{"loss": 6.0 - step, "gradient_norm": 1.0} for step in range(6)],
    }  # fmt: skip
    other = {"method": "ring 4", "metrics": {"loss_apart": 1.5e-3, "gradient_norm_apart": 0.02}}
    content["rows"] = [row, {**row, **other}]
    drawn = "\n".join(render.loss_curve(content))
    assert "| mesh | loss 1 | loss 5 | loss 6 | loss apart | gradient norm apart |" in drawn
    assert "| ring 4 | 6.0000 | 2.0000 | 1.0000 | 1.5e-03 | 2.0e-02 |" in drawn
    assert "280 million parameters, 14/2 heads, bfloat16" in drawn


def test_attention_summary() -> None:
    content = attention_result("NV18", 100.0)
    peer, ours = content["rows"]
    for row, ms, rate in ((peer, 125.0, 480.2), (ours, 100.0, 600.4)):
        row["metrics"] = {"total_ms": ms, "total_tflops_per_gpu": rate, "percent_of_ideal": 97.25}
    ideal = {**ours, "method": "ideal_fa4", "kind": "ideal"}
    content["rows"] = [ideal, peer, {**ours, "metrics": {"total_ms": 900.0}}, ours]
    drawn = render.attention_summary(content)
    assert drawn[2] == "| 2K | 600 | 600 | 97.2 |  |  | 480 `peer_fa4`\\* | 1.25 |"
    peer["about"] = {"shipped": True}
    assert "| 480 `peer_fa4` | 1.25 |" in render.attention_summary(content)[2]


def test_this_repository_is_fresh() -> None:
    stale = render.render(render.ROOT, render.RESULTS, check=True)
    assert not stale, f"run `python -m benchmarks.render`: {stale}"


def test_a_prompt_beside_the_peer_the_plan_and_what_was_left_out() -> None:
    def row(kind: str, tokens: int, **metrics: float) -> dict:
        return {"method": kind, "kind": kind, "tokens": tokens, "shape": {}, "metrics": metrics}

    rows = [
        row("peer", 9000, out_of_memory=1, peak_gib=140),
        row("ours", 600, ttft_s=2, times_peer=1.5, peak_gib=20, planned_peak_gib=21),
        row("peer", 600, ttft_s=3, out_of_memory=0, peak_gib=30),
    ]
    notes = {"first_prompt": {"tokens": 600, "first_token_s": 12.34, "again_s": 2.01}}
    left = [{"method": "ours", "reason": "9000 tokens: would end after 900 s"}]
    lines = render.prefill({"rows": rows, "notes": notes, "not_measured": left})
    assert [line.split(" | ")[1:] for line in lines[2:5]] == [
        ["600", "", "2.000", "1.50", "20.00", "21.00 |"],
        ["600", "", "3.000", "", "30.00", " |"],
        ["9,000", "", "out of memory", "", "140.00", " |"],
    ]
    assert "12.3 s to the first token; read again: 2.0 s" in lines[6]
    assert lines[8] == "Left out: ours, 9000 tokens: would end after 900 s."


def test_prompts_of_all_runs_in_one_table(tmp_path: Path) -> None:
    def write(name: str, count: int, *rows: dict) -> None:
        whole = {**result("prefill", "2026-01-01", 1.0), "rows": list(rows)}
        whole["hardware"] = {"gpu": "GPU", "count": count, "link": ""}
        whole["notes"] = {} if name in ("1xgpu_a", "1xgpu_long") else {"first_prompt": {}}
        (tmp_path / f"2026-01-01_prefill_{name}.json").write_text(json.dumps(whole))

    def row(kind: str, tokens: int, **metrics: float) -> dict:
        return {"method": kind, "kind": kind, "tokens": tokens, "metrics": metrics}

    def ours(tokens: int, seconds: float, **metrics: float) -> dict:
        more = {"planned_peak_gib": 21, "peak_gib": 20, "sampled": 0, "ttft_over_floor": 1.1}
        return row("ours", tokens, ttft_s=seconds, **{**more, **metrics})

    first = row("ours", 600, ttft_s=99, sampled=0)  # of an older run
    write("1xgpu_a", 1, first)
    peers = row("peer", 600, ttft_s=6, out_of_memory=0), row("peer", 9000, out_of_memory=1)
    write("1xgpu_peer", 1, ours(600, 3.0, times_peer=2), *peers)
    write("1xgpu_whole", 1, ours(600, 2.0), ours(9000, 50.0))
    write("2xgpu_whole", 2, ours(9000, 25.0), ours(9999, 30.0))
    write("1xgpu_long", 1, ours(9000, 51.0, sampled=1), ours(9999, 57.0, sampled=1))
    block = render.render_block("prefill_summary", tmp_path).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block[2:7]]
    assert cells == [
        ["600", "1", "3.0", "1.10", "", "6.0", "2.00", "20.0", "21.0"],
        ["9,000", "1", "50.0", "1.10", "", "out of memory", "", "20.0", "21.0"],
        ["9,000", "2", "25.0", "1.10", "2.00", "", "", "20.0", "21.0"],
        ["9,999", "1", r"57.0\*", "1.10", "", "", "", "20.0", "21.0"],
        ["9,999", "2", "30.0", "1.10", r"1.90\*", "", "", "20.0", "21.0"],
    ]
    assert block[8].startswith(r"\* added up from a sample")


def test_train_step_summary(tmp_path: Path) -> None:
    def row(kind: str, tokens: int, seconds: float, plain: int = 0, **metrics: float) -> dict:
        figures = {
            "step_s": seconds,
            "tokens_per_s_per_gpu": 1.0,
            "mfu_percent": 1.0,
            "peak_gib": 1.0,
        }
        return {
            "method": kind, "kind": kind, "tokens": tokens, "metrics": figures | metrics,
            "shape": {"layers": 4}, "about": {"plain_layers": plain},
        }  # fmt: skip

    def write(name: str, count: int, *rows: dict, speedup: float | None = None) -> None:
        whole = result("train_step", "2026-01-01", 1.0)
        whole["hardware"] = {"gpu": "GPU", "count": count, "link": ""}
        compared = [{"tokens": 65536, "peer": "peer", "speedup": speedup}] if speedup else []
        whole |= {"rows": list(rows), "notes": {"comparisons": compared}}
        (tmp_path / f"2026-01-01_train_step_{name}.json").write_text(json.dumps(whole))

    write("2xgpu_peers", 2, row("ours", 65536, 3.0), row("peer", 65536, 6.0), speedup=2.0)
    write("2xgpu_then", 2, row("ours", 65536, 2.0), row("ours", 131072, 9.0))  # had no peer
    write("2xgpu_video", 2, row("ours", 262144, 5.0, vision_forward_s=1.0))
    write("2xgpu_whole", 2, row("ours", 40960, 1.0, plain=4))  # recomputes nothing
    write("4xgpu", 4, row("ours", 131072, 4.5))
    block = render.render_block("train_step_summary", tmp_path).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block[2:6]]
    assert [(line[0].strip("*`"), *line[1:4], line[-1]) for line in cells] == [
        ("ours", "2", "64K", "3.000", ""),
        ("peer", "2", "64K", "6.000", "2.00"),
        ("ours", "2", "128K", "9.000", ""),
        ("ours", "4", "128K", "4.500", ""),
    ]
    assert "_peers`" in block[7] and "_4xgpu`" in block[7] and "video" not in block[7]
