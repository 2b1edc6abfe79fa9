"""`longvila data long-sft` and `review`: a local captioner, an endpoint that writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "datagen"))

from endpoint import Endpoint, Says, describe, kind_of, text_of

from longvila.cli.main import main
from longvila.media.synthetic import clip
from longvila.testing.tiny import tiny_model, tiny_processor


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as served:
        served.script = describe
        yield served


def talking_model(folder: Path) -> Path:
    """A tiny model that says "Ab." whatever it sees: each token's follower is in its embedding."""
    model, processor = tiny_model(), tiny_processor()
    layers = model.model.language_model.layers
    said = processor.tokenizer("\nAb.", add_special_tokens=False)["input_ids"]
    said.append(processor.tokenizer.eos_token_id)
    with torch.no_grad():
        for layer in layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for place, (token, following) in enumerate(pairwise(said)):
            model.get_input_embeddings().weight[token] = 0
            model.get_input_embeddings().weight[token, place] = 1
            model.lm_head.weight[following, place] = 100
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_folder_of_videos_becomes_a_dataset(
    endpoint: Endpoint, tmp_path: Path, capsys: Any
) -> None:
    model = talking_model(tmp_path / "model")
    (tmp_path / "videos").mkdir()
    clip(tmp_path / "videos" / "one.mp4", 8, fps=2)
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"none")
    out = tmp_path / "made"
    command = [
        "data", "long-sft", str(tmp_path / "videos"), "--output", str(out),
        "--captioner.model", str(model), "--captioner.device", "cpu",
        "--writer.endpoint", endpoint.url, "--writer.model", "name", "--writer.tries", "1",
        "--segment.by", "length", "--segment.length-s", "2", "--segment.min-s", "1",
        "--caption.frames", "2", "--caption.min-words", "1", "--caption.max-new-tokens", "20",
        "--question.kinds", "spatial", "temporal", "object", "action", "--workers", "2",
    ]  # fmt: skip
    assert main(command) == 3
    printed = capsys.readouterr()
    assert "videos     2, 1 of them whole" in printed.out
    assert "captions   2 of segments, 1 of videos" in printed.out
    assert "questions  2 kept; dropped: 1 duplicate, 1 source, 1 blind; 0 rej" in printed.out
    assert "segments of broken: " in printed.out and "captions: 2 of 2" in printed.err
    # The local model saw the segments, the endpoint read what it said.
    assert {kind_of(body) for body in endpoint.bodies} == {
        "compose", "questions", "blind", "judge",
    }  # fmt: skip
    captions = [json.loads(x)["caption"] for x in (out / "captions.jsonl").read_text().splitlines()]
    assert captions == ["Ab.", "Ab."]
    assert all(" ".join(caption.split()) in text_of(endpoint.bodies[0]) for caption in captions)
    assert main(["data", "review", str(out), "--once"]) == 0
    assert "review.html; 2 samples, 0 items rejected" in capsys.readouterr().out
    (tmp_path / "videos" / "broken.mp4").unlink()
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["waiting"] == []
    made = "{adapter: longvila-sft, path: made/dataset.jsonl, media_dir: videos}"
    (tmp_path / "sets.yaml").write_text(f"datasets: {{made: {made}}}")
    assert main(["data", "inspect", str(tmp_path / "sets.yaml"), "--model", str(model)]) == 0
    assert "made: 2 records, 2 looked at" in capsys.readouterr().out


def test_wrong_use_says_why(endpoint: Endpoint, tmp_path: Path, capsys: Any) -> None:
    command = ["data", "long-sft", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(command) == 1
    assert "say who describes segments" in capsys.readouterr().err
    assert main([*command, "--captioner.model", "x", "--captioner.endpoint", endpoint.url]) == 1
    assert "no video (" in capsys.readouterr().err
    assert main(["data", "review", str(tmp_path)]) == 1
    assert "no folder of `longvila data long-sft`" in capsys.readouterr().err


def test_a_run_that_ends_early_says_so(endpoint: Endpoint, tmp_path: Path, capsys: Any) -> None:
    clip(tmp_path / "one.mp4", 8, fps=2)
    endpoint.script = lambda body: Says(status=401, body=b"who are you")
    command = ["data", "long-sft", str(tmp_path / "one.mp4"), "--output", str(tmp_path / "out")]
    command += ["--captioner.model", "x", "--captioner.endpoint", endpoint.url]
    assert main([*command, "--give-up-after", "1"]) == 1
    assert "status 401: who are you" in capsys.readouterr().err
