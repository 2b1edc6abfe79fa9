"""A stored prompt gives the same tokens, and is refused for anything else."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longvila.errors import VideoError
from longvila.inference import store
from longvila.inference.engine import Engine
from longvila.inference.session import Session
from longvila.inference.store import (
    StoreError,
    differences,
    file_key,
    is_stored,
    model_key,
    read_index,
)
from longvila.media.synthetic import clip
from longvila.testing.tiny import tiny_model, tiny_processor

from .cases import greedy, language_model, prompt


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip(tmp_path_factory.mktemp("store") / "film.mp4", 40)


def test_a_stored_prompt_goes_on_as_if_it_had_just_been_read(tmp_path: Path) -> None:
    model, inputs = language_model(), prompt(50)
    question = prompt(4, seed=1)["input_ids"]
    expected = greedy(model, {"input_ids": torch.cat([inputs["input_ids"], question], 1)}, 6)
    with Engine(model, chunk_tokens=16) as engine:
        film = engine.prefill(inputs)
        engine.decode(film, question[:, :2])  # a prefix of several segments
        folder = engine.save(engine.fork(film), tmp_path / "index", {"what": [1, "a"]})
        again = engine.load(folder, {"what": [1, "a"]})
        assert again.get_seq_length() == 52 and torch.equal(again.input_ids, film.input_ids)
        torch.testing.assert_close(again.logits, film.logits)
        again.crop(-2)
        out = engine.generate(again, question, max_new_tokens=6, do_sample=False)
    assert out[0].tolist() == expected
    assert read_index(folder)["intervals"] == [[[0, 52]]]


def test_files_are_ordinary_safetensors(tmp_path: Path) -> None:
    model = language_model().to(torch.bfloat16)
    with Engine(model) as engine:
        cache = engine.prefill(prompt(30))
        engine.save(cache, tmp_path)
        (file,) = tmp_path.glob("*.safetensors")
        tensors = load_file(file)
        keys = cache.shards[1].parts()[0][0][0]
    assert torch.equal(tensors["keys.1"], keys) and keys.dtype == torch.bfloat16
    assert tensors["input_ids"].tolist() == cache.input_ids[0].tolist()
    layers = {f"{name}.{layer}" for name in ("keys", "values", "sums") for layer in (0, 1)}
    assert set(tensors) == {"input_ids", "logits"} | layers
    assert read_index(tmp_path)["bytes"] == [file.stat().st_size]


def test_every_difference_is_named(tmp_path: Path) -> None:
    model = language_model()
    with Engine(model) as engine:
        engine.save(engine.prefill(prompt(9)), tmp_path, {"frames": 8, "file": {"bytes": 3}})
        with pytest.raises(StoreError, match=r"file\.bytes: 3 there, 4 here; frames: 8 there, 9"):
            engine.load(tmp_path, {"frames": 9, "file": {"bytes": 4}})
        engine.load(tmp_path, {"file": None})  # not there any more: not compared
        with pytest.raises(StoreError, match="holds a stored prompt already"):
            engine.save(engine.prefill(prompt(9)), tmp_path)
        engine.save(engine.prefill(prompt(5)), tmp_path, overwrite=True)
        assert engine.load(tmp_path).get_seq_length() == 5
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight += 0.1
    with Engine(model) as engine, pytest.raises(StoreError, match=r"model\.weights: "):
        engine.load(tmp_path)
    wider = language_model(heads=4, kv_heads=2)
    with Engine(wider) as engine, pytest.raises(StoreError, match=r"model\.configuration: "):
        engine.load(tmp_path)


def test_a_key_is_compared_as_json_gives_it_back(tmp_path: Path) -> None:
    with Engine(language_model()) as engine:
        engine.save(engine.prefill(prompt(5)), tmp_path, {"size": (1, 2), "frames": {7: "a"}})
        engine.load(tmp_path, {"size": (1, 2), "frames": {7: "a"}})
        with pytest.raises(StoreError, match=r'frames\.7: "a" there, "b" here'):
            engine.load(tmp_path, {"frames": {7: "b"}})


def test_what_is_not_whole_is_refused(tmp_path: Path) -> None:
    with Engine(language_model()) as engine:
        with pytest.raises(StoreError, match=r"has no index\.json"):
            engine.load(tmp_path / "nothing")
        folder = engine.save(engine.prefill(prompt(9)), tmp_path / "index")
        (file,) = folder.glob("*.safetensors")
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        with pytest.raises(StoreError, match=f"{len(whole) - 1} bytes instead of {len(whole)}"):
            engine.load(folder)
        file.write_bytes(whole)
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps({**index, "format": 99}))
        with pytest.raises(StoreError, match="format 99"):
            engine.load(folder)
        for foreign in ("[]", "no JSON", ""):
            (folder / "index.json").write_text(foreign)
            with pytest.raises(StoreError, match=r"its index\.json is another's"):
                engine.load(folder)
        (folder / "index.json").unlink()
        assert not is_stored(folder)
        with pytest.raises(StoreError, match="not written to the end"):
            engine.load(folder)
        rows = engine.prefill(prompt(9))
        engine.decode(rows, torch.ones(2, 1, dtype=torch.long))
        with pytest.raises(ValueError, match="cache of one row"):
            engine.save(rows, tmp_path / "rows")


def test_a_model_is_told_by_its_weights_and_a_file_by_its_content(
    film: Path, tmp_path: Path
) -> None:
    assert model_key(language_model()) == model_key(language_model())
    assert model_key(tiny_model(0)) != model_key(tiny_model(1))
    half = model_key(language_model().to(torch.bfloat16))
    assert half["dtype"] == "bfloat16" and half["type"] == "qwen2"
    copy = tmp_path / "copy.mp4"
    shutil.copy(film, copy)
    assert file_key(film) == file_key(str(copy)) == file_key(f"file://{copy}")
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    assert list(differences(file_key(film), file_key(copy), "film")) != []
    assert file_key("data:video/mp4;base64," + "A" * 5000) is None
    assert file_key("https://host/film.mp4") is None


def test_a_folder_is_told_by_what_its_pictures_show(tmp_path: Path) -> None:
    for name in ("1.bmp", "2.bmp"):
        (tmp_path / name).write_bytes(bytes(100_000))
    before = file_key(tmp_path)
    assert before == file_key(str(tmp_path))
    (tmp_path / "2.bmp").write_bytes(bytes(50_000) + b"1" + bytes(49_999))
    assert list(differences(before, file_key(tmp_path), "film")) != []


def test_a_session_recalls_what_another_watched(film: Path, tmp_path: Path) -> None:
    model = tiny_model(2)
    processor = tiny_processor(model.config)
    with Engine(model, chunk_tokens=32) as engine:
        first = Session(engine, processor)
        video = first.load_video(film, num_frames=6)
        with pytest.raises(ValueError, match="only what was watched"):
            first.save(tmp_path / "index")
        watching = first.watch([video])
        first.save(tmp_path / "index", note={"by": "test"})
        expected = [first.ask(text, max_new_tokens=6) for text in ("What?", "And then?")]
        second = Session(engine, processor)
        (recalled,) = second.load(tmp_path / "index")
        assert recalled.frames == 6 and recalled.timestamps_s == video.timestamps_s
        found = [second.ask(text, max_new_tokens=6) for text in ("What?", "And then?")]
        assert [a.token_ids for a in found] == [a.token_ids for a in expected]
        assert found[0].timings.cached_tokens == watching.prompt_tokens
        # The frames are gone: a prompt that begins otherwise cannot be read.
        second.load(tmp_path / "index")
        second._cached = [0, *second._cached[1:]]
        with pytest.raises(VideoError, match="index the video again"):
            second.ask("What?")


def test_a_changed_file_is_noticed_and_a_lost_one_is_not_needed(film: Path, tmp_path: Path) -> None:
    model = tiny_model(2)
    processor = tiny_processor(model.config)
    copy = Path(shutil.copy(film, tmp_path / "film.mp4"))
    session: Any = Session(model, processor)
    session.watch([session.load_video(str(copy), num_frames=3)])
    session.save(tmp_path / "index")
    clip(copy, 40, first_number=500)
    with pytest.raises(StoreError, match=r"media\[0\]\.file"):
        session.load(tmp_path / "index")
    copy.unlink()
    session.load(tmp_path / "index")
    assert session.ask("What?", max_new_tokens=3).timings.new_tokens > 0


def test_a_damaged_one_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with Engine(language_model()) as engine:
        folder = engine.save(engine.prefill(prompt(9)), tmp_path / "index", {"frames": (1, 2.5)})
        (file,) = folder.glob("*.safetensors")
        content = file.read_bytes()
        file.write_bytes(content[:20] + b"\xff" + content[21:])
        with pytest.raises(StoreError, match=r"index is damaged \(.*\); make it again"):
            engine.load(folder, {})
        file.write_bytes(content)
        written = json.loads((folder / "index.json").read_text())
        for changed in ({"tokens": 10**9}, {"intervals": []}, {"bytes": 5}, {}):
            entries = {**written, "extra": {"a": 1}, **changed}
            (folder / "index.json").write_text(json.dumps(entries))
            with pytest.raises(StoreError, match=r"index\.json is damaged or was changed"):
                engine.load(folder, {})
        del written["check"]  # as an older version wrote it
        (folder / "index.json").write_text(json.dumps(written))
        assert engine.load(folder, {}).get_seq_length() == 9
        del written["key"]
        (folder / "index.json").write_text(json.dumps(written))
        with pytest.raises(StoreError, match=r"index\.json is damaged or was changed"):
            engine.load(folder, {})


@pytest.mark.parametrize("name", ["keys.0", "values.1", "sums.1", "input_ids", "logits"])
def test_a_bit_that_flips_is_found(tmp_path: Path, name: str) -> None:
    with Engine(language_model().to(torch.bfloat16)) as engine:
        engine.save(engine.prefill(prompt(30)), tmp_path)
        (file,) = tmp_path.glob("*.safetensors")
        whole = file.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        first, last = json.loads(whole[8:header])[name]["data_offsets"]
        for place, bit in ((first, 0), ((first + last) // 2, 6), (last - 1, 7)):
            content = bytearray(whole)
            content[header + place] ^= 1 << bit
            file.write_bytes(content)
            with pytest.raises(StoreError, match=r"is damaged: .*copy it again, or make it again"):
                engine.load(tmp_path)


def test_prompts_of_older_versions_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(language_model()) as engine:
        cache = engine.prefill(prompt(30))
        write = store._write_tensors
        monkeypatch.setattr(
            store, "_write_tensors", lambda p, t: write(p, [x for x in t if "sums" not in x[0]])
        )
        engine.save(cache, tmp_path)
        index = json.loads((tmp_path / "index.json").read_text())
        del index["digests"], index["check"]
        (tmp_path / "index.json").write_text(json.dumps(index))
        torch.testing.assert_close(engine.load(tmp_path).logits, cache.logits)


def test_a_disk_that_is_full_is_said_with_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "_write_rows", full)
    with Engine(language_model()) as engine:
        cache = engine.prefill(prompt(9))
        with pytest.raises(StoreError, match=r"index cannot be written \(No space .* are needed"):
            engine.save(cache, tmp_path / "index", {})
    assert not any((tmp_path / "index").iterdir())
