"""The data verb: what it prints and how it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "integration"))
from family_files import save_family

from longvila.cli.main import main, verbs
from longvila.media.synthetic import clip
from longvila.testing.tiny import tiny_processor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_processor(num_frames=4).save_pretrained(folder)
    return folder


def test_text_is_packed_and_inspected(tmp_path: Path, checkpoint: Path, capsys: Any) -> None:
    text = tmp_path / "book.txt"
    text.write_text("word " * 300)
    out = tmp_path / "rows"
    command = ["data", "pack-text", str(text), "--tokenizer", str(checkpoint), "--length", "256"]
    assert main([*command, "--output", str(out)]) == 0
    printed = capsys.readouterr()
    assert "rows       5 of 256 tokens in 1 shards" in printed.out
    assert "5 rows, 1 documents, 1,501 tokens" in printed.err
    assert main(["data", "inspect", str(out)]) == 0
    assert capsys.readouterr().out == printed.out
    assert main(["data", "inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["progress"]["rows"] == 5
    shard = str(out / "rows-00000.parquet")
    assert main(["data", "inspect", shard, "--adapter", "tokens", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["tokens"]
    assert facts["tokens"] == 1280 and facts["histogram"] == {"256": [5, 1280]}


def test_clips_are_counted_in_tokens_and_broken_ones_named(
    tmp_path: Path, checkpoint: Path, capsys: Any
) -> None:
    clip(tmp_path / "good.mp4", 12)
    rows = [{"video_id": name, "q": "What?", "a": "This."} for name in ("good", "gone")]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    command = ["data", "inspect", str(file), "--adapter", "video-chatgpt"]
    assert main([*command, "--media-dir", str(tmp_path), "--model", str(checkpoint)]) == 0
    printed = capsys.readouterr().out
    assert "video-chatgpt: 2 records, 2 looked at" in printed
    assert "broken           1" in printed and "gone.mp4: no such file" in printed
    assert main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["video-chatgpt"]
    assert facts["videos"] == 2 and facts["turns"] == 4 and not facts["histogram"]
    listed = tmp_path / "data.yaml"
    listed.write_text("datasets: {mine: {adapter: video-chatgpt, path: rows.json}}")
    assert main(["data", "inspect", str(listed), "--samples", "1"]) == 0
    assert "mine: 2 records, 1 looked at" in capsys.readouterr().out


def test_lines_that_are_no_records_are_counted_and_named(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": \n{"q": "Why?", "a": "So."}\n')
    assert main(["data", "inspect", str(tmp_path / "a.jsonl"), "--adapter", "llava"]) == 0
    printed = capsys.readouterr().out
    assert "broken           1" in printed and "turns            2" in printed
    assert "left out: " in printed and "record 0 at byte 0" in printed


def test_all_records_that_do_not_fit_are_named_not_only_the_first(
    tmp_path: Path, capsys: Any
) -> None:
    rows = [{"q": "Why?", "a": answer} for answer in ("So.", "", None, *[""] * 10)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    command = ["data", "inspect", str(tmp_path / "a.json"), "--adapter", "llava"]
    assert main(command) == 1
    printed = capsys.readouterr()
    assert "do not fit       12" in printed.out and "turns            2" in printed.out
    assert "stops training: llava, record 1: llava/1: the assistant says nothing" in printed.out
    assert "stops training: llava, record 2: has a message whose text is None" in printed.out
    assert "stops training: 2 more; --json lists all" in printed.out
    assert "12 records do not fit their adapter, and training would stop" in printed.err
    assert main([*command, "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["llava"]["misfits"]) == 12


def test_pictures_that_cannot_be_opened_are_named(
    tmp_path: Path, checkpoint: Path, capsys: Any
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:-30])
    rows = [
        {"image": f"{name}.png", "q": "What?", "a": "This."} for name in ("good", "gone", "torn")
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    command = ["data", "inspect", str(tmp_path / "a.json"), "--adapter", "llava", "--media-dir"]
    assert main([*command, str(tmp_path), "--model", str(checkpoint)]) == 0
    printed = capsys.readouterr().out
    assert "broken           2" in printed
    assert "gone.png: no such file" in printed and "torn.png: is no picture" in printed


def test_tokens_of_other_models_are_counted(tmp_path: Path, capsys: Any) -> None:
    save_family("qwen3", tmp_path / "qwen3")
    rows = [
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = ["data", "inspect", str(tmp_path / "rows.json"), "--adapter", "llava", "--json"]
    assert main([*command, "--model", str(tmp_path / "qwen3")]) == 0
    facts = json.loads(capsys.readouterr().out)["llava"]
    # Three letters or signs and the token that ends the turn.
    assert facts["targets"] == 4 and facts["tokens"] > 20


def test_adapters_are_listed_with_what_was_checked(capsys: Any) -> None:
    assert main(["data", "adapters"]) == 0
    printed = capsys.readouterr().out
    assert "shot2story" in printed and "schema not checked at its source" in printed


def test_wrong_use_says_why(tmp_path: Path, capsys: Any) -> None:
    assert main(["data"]) == 2
    assert "pack-text" in capsys.readouterr().err
    assert main(["data", "--help"]) == 0 and "inspect" in capsys.readouterr().out
    (tmp_path / "x.json").write_text("[]")
    assert main(["data", "inspect", str(tmp_path / "x.json")]) == 1
    assert "say how to read" in capsys.readouterr().err
    assert main(["data", "inspect", str(tmp_path / "none.json"), "--adapter", "llava"]) == 1
    assert "no such file" in capsys.readouterr().err
    assert main(["data", "inspect", "x.json", "--adapter", "llava", "--samples", "-1"]) == 1
    assert "--samples must not be below 0" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text("{}")
    assert main(["data", "inspect", str(tmp_path)]) == 1
    assert "not made by pack-text" in capsys.readouterr().err
    assert "Pack text into long rows" in verbs()["data"]
