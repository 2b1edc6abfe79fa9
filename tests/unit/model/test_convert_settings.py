"""Settings there and back, and every decision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.fixtures.upstream_case import case_names, index, write_checkpoint

from longvila.errors import CheckpointError
from longvila.model.configuration_longvila import LongVILAConfig
from longvila.model.vila.layout import open_checkpoint
from longvila.model.vila.settings import (
    decide_token_order,
    read_settings,
    write_part,
    write_settings,
)

SEPARATED = "tsp_separators"
ENCODERS = "llava.model.encoders."


def settings(tmp_path: Path, case: str = "even_row", **changes: Any) -> dict[str, Any]:
    folder = write_checkpoint(case, tmp_path / "checkpoint", **changes)
    return read_settings(open_checkpoint(folder), folder="checkpoint").values


@pytest.mark.parametrize(
    ("config", "projector", "folder", "want"),
    [
        ({"transformers_version": "4.36.2"}, "mlp_downsample", "x", "column"),
        ({"transformers_version": "4.46.0"}, "mlp_downsample", "x", "row"),
        ({"transformers_version": "4.46.0"}, "mlp_downsample", "VILA1.5-3b", "row"),
        ({}, "mlp_downsample", "VILA1.5-3b", "column"),
        ({}, "mlp_downsample", "Llama-3-LongVILA-8B-512Frames", "column"),
        ({}, "mlp_downsample", "qwen2-7b-longvila-1M", "row"),
        ({"transformers_version": "4.36.2"}, "mlp_downsample_2x2_fix", "VILA1.5-3b", "row"),
        ({"transformers_version": "4.36.2"}, "mlp_downsample_3x3_fix", "x", "row"),
    ],
)
def test_token_order_needs_positive_evidence(
    config: dict[str, Any], projector: str, folder: str, want: str
) -> None:
    order, reason = decide_token_order(config, projector, folder)
    assert order == want and reason
    for asked in ("row", "column"):
        assert decide_token_order(config, projector, folder, asked) == (asked, "as asked")
    with pytest.raises(CheckpointError, match="row or column"):
        decide_token_order(config, projector, folder, "diagonal")


def test_missing_encoder_keys_prove_nothing(tmp_path: Path) -> None:
    config = index()["cases"]["even_row"]["config"]
    assert "video_encoder" not in config and config["transformers_version"] == "4.46.0"
    assert settings(tmp_path)["token_order"] == "row"


@pytest.mark.parametrize("as_text", [True, False])
def test_encoders_as_text_and_as_dict(tmp_path: Path, as_text: bool) -> None:
    encoder = {
        "_target_": ENCODERS + "TSPVideoEncoder",
        "pool_sizes": [[8, 1, 1], [2, 2, 2]],
        "sep_tokens": "--",
    }
    values = settings(tmp_path, video_encoder=json.dumps(encoder) if as_text else encoder)
    assert values["pool_sizes"] == [[8, 1, 1], [2, 2, 2]]
    assert values["pool_separator"] == "--" and values["frame_separator"] == "\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"s2": True}, "asks for s2"),
        ({"dynamic_s2": True}, "asks for dynamic_s2"),
        ({"ps3": True}, "asks for ps3"),
        ({"video_encoder": "{"}, "no JSON object"),
        ({"video_encoder": {"pool_sizes": []}}, "no _target_"),
        ({"video_encoder": {"_target_": ENCODERS + "OtherVideoEncoder"}}, "'OtherVideoEncoder'"),
        ({"video_encoder": {"_target_": ENCODERS + "BasicVideoEncoder", "x": 1}}, r"\['x'\]"),
        (
            {"image_encoder": {"_target_": ENCODERS + "BasicImageEncoder", "end_tokens": ""}},
            "one separator for both",
        ),
        ({"mm_vision_select_feature": "cls"}, "'cls' is not known"),
        ({"vision_resolution": 448}, "vision_resolution 448.* a tower of 56 pixels"),
        ({"image_aspect_ratio": "dynamic", "video_max_tiles": 4}, "video_max_tiles 4"),
    ],
)
def test_what_the_model_does_not_do_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        settings(tmp_path, **changes)


def test_start_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'picture:' before each frame"):
        settings(tmp_path, SEPARATED)


def test_incomplete_parts_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint("even_row", tmp_path / "a")
    (folder / "mm_projector" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no mm_projector_type"):
        read_settings(open_checkpoint(folder), folder="a")
    folder = write_checkpoint("even_row", tmp_path / "b")
    config = json.loads((folder / "llm" / "config.json").read_text())
    (folder / "llm" / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"a": 1}})
    )
    with pytest.raises(CheckpointError, match="quantised"):
        read_settings(open_checkpoint(folder), folder="b")
    (folder / "llm" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no model_type"):
        read_settings(open_checkpoint(folder), folder="b")


def test_fps_is_ignored_as_at_release_and_said(tmp_path: Path) -> None:
    folder = write_checkpoint("even_row", tmp_path / "a", fps=2.0, num_video_frames=256)
    read = read_settings(open_checkpoint(folder), folder="a")
    assert read.values["video_fps"] == 0.0 and read.values["num_video_frames"] == 256
    assert any("fps 2.0 is ignored" in note for note in read.notes)


def test_unknown_aspect_is_the_processor_s_own(tmp_path: Path) -> None:
    folder = write_checkpoint("even_row", tmp_path / "a", image_aspect_ratio="anyres")
    read = read_settings(open_checkpoint(folder), folder="a")
    assert read.values["image_aspect_ratio"] == "resize"
    assert any("'anyres' becomes 'resize'" in note for note in read.notes)


def test_the_projector_s_name_in_the_released_script(tmp_path: Path) -> None:
    folder = write_checkpoint("even_row", tmp_path / "a")
    config = {"mm_projector_type": "mlp_downsample_fix", "model_type": "v2l_projector"}
    (folder / "mm_projector" / "config.json").write_text(json.dumps(config))
    read = read_settings(open_checkpoint(folder), folder="a")
    assert read.values["projector_type"] == "mlp_downsample_2x2_fix"


def test_rope_and_context_are_carried(tmp_path: Path) -> None:
    values = settings(tmp_path, "odd_fix_dynamic")
    config = LongVILAConfig(image_token_id=1, video_token_id=2, **values)
    assert config.text_config.rope_parameters["rope_theta"] == 3580165449.0
    assert config.context_length == 1048576
    assert config.text_config.tie_word_embeddings and config.tie_word_embeddings


def config_of(tmp_path: Path, case: str) -> tuple[LongVILAConfig, Path]:
    folder = write_checkpoint(case, tmp_path / case)
    values = read_settings(open_checkpoint(folder), folder=case).values
    return LongVILAConfig(image_token_id=1, video_token_id=2, **values), folder


@pytest.mark.parametrize("case", [c for c in case_names() if c != SEPARATED])
def test_the_way_back_keeps_the_original_s_spelling(tmp_path: Path, case: str) -> None:
    config, folder = config_of(tmp_path, case)
    origin = json.loads((folder / "config.json").read_text())
    kept = {k: v for k, v in origin.items() if k not in ("_name_or_path", "resume_path")}
    assert write_settings(config, origin) == kept
    for part, values in (("llm", config.text_config), ("vision_tower", config.vision_config)):
        before = json.loads((folder / part / "config.json").read_text())
        want = {k: v for k, v in before.items() if k != "_name_or_path"}
        assert write_part(values, before, "float32") == want


def test_changed_values_go_back_changed(tmp_path: Path) -> None:
    config, folder = config_of(tmp_path, "even_row")
    origin = json.loads((folder / "config.json").read_text())
    config.pool_sizes, config.num_video_frames = [[4, 1, 1]], 64
    config.text_config.rope_parameters["rope_theta"] = 5e8
    config.text_config.max_position_embeddings = 999
    back = write_settings(config, origin)
    encoder = json.loads(back["video_encoder"])
    assert encoder["_target_"] == ENCODERS + "TSPVideoEncoder"
    assert encoder["pool_sizes"] == [[4, 1, 1]] and back["num_video_frames"] == 64
    assert back["max_tiles"] == origin["max_tiles"] and back["time_token_format"] == "<t{t}>"
    llm = json.loads((folder / "llm" / "config.json").read_text())
    part = write_part(config.text_config, llm, "float32")
    assert part["rope_theta"] == 5e8 and part["max_position_embeddings"] == 999
    assert part["architectures"] == ["Qwen2ForCausalLM"] and "rope_parameters" not in part


@pytest.mark.parametrize("case", [c for c in case_names() if c != SEPARATED])
def test_written_anew_they_mean_the_same(tmp_path: Path, case: str) -> None:
    config, folder = config_of(tmp_path, case)
    fresh = write_settings(config, None)
    parts = {
        "llm": write_part(config.text_config, None, "float32"),
        "vision_tower": write_part(config.vision_config, None, "float32"),
    }
    for part, content in parts.items():
        stored = json.loads((folder / part / "config.json").read_text())
        assert content["architectures"] == stored["architectures"]
        assert content.get("rope_theta") == stored.get("rope_theta")
        (folder / part / "config.json").write_text(json.dumps(content))
        fresh[f"{part}_cfg"] = content
    (folder / "config.json").write_text(json.dumps(fresh))
    values = read_settings(open_checkpoint(folder), folder="x").values
    again = LongVILAConfig(image_token_id=1, video_token_id=2, **values).to_dict()
    assert again == config.to_dict()


def test_an_order_the_original_never_had_is_refused(tmp_path: Path) -> None:
    config, _ = config_of(tmp_path, "projector_mlp_downsample_3x3_fix")
    config.token_order = "column"
    with pytest.raises(CheckpointError, match="no column-major mlp_downsample_3x3_fix"):
        write_settings(config, None)
