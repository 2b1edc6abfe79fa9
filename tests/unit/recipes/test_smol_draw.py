"""The drawn data of the small recipe: what is asked is what is seen, and drawing goes on."""

from __future__ import annotations

import importlib
import json
import sys
import zipfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from longvila.data.datasets import read_file
from longvila.data.encode import Encoder
from longvila.evaluation.needle_sets import load_needles
from longvila.media.video import open_video, read_frames
from longvila.testing.tiny import tiny_processor
from longvila.train.settings import overlay, override, read_yaml
from longvila.train.stages import choose_seq_parallel_size, get_stage

RECIPE = Path(__file__).parents[3] / "recipes" / "smol"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(RECIPE))
    yield importlib.import_module
    for name in ("draw", "questions", "run"):
        sys.modules.pop(name, None)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    folder = tmp_path / "prepared"
    folder.mkdir()
    pictures = []
    with zipfile.ZipFile(folder / "pictures.zip", "w") as archive:
        for number in range(30):
            file = folder / f"{number}.webp"
            # Saturated greens, which no frame of the film below has; the last mirrors the first.
            cells = np.random.default_rng(number % 29).integers(2, size=(12, 16)) * 95 + 160
            levels = np.zeros((12, 16, 3), np.uint8)
            levels[..., 1] = cells[:, ::-1] if number == 29 else cells
            picture = Image.fromarray(levels).convert("RGBA")
            picture.resize((160, 120), Image.Resampling.NEAREST).save(file, lossless=True)
            archive.write(file, file.name)
            part = "train" if number < 22 else "bc"[number % 2]
            pictures.append({"file": file.name, "id": f"x/{number}", "name": f"thing {number}",
                             "split": part, "size": [120, 160]})  # fmt: skip
    (folder / "pictures.json").write_text(json.dumps(pictures))
    frames = []
    with zipfile.ZipFile(folder / "frames.zip", "w") as archive:
        for number in range(16):
            file = folder / f"{number}.jpg"
            Image.new("RGB", (224, 224), (200, 0, 12 * number)).save(file)
            archive.write(file, file.name)
            part = "train" if number < 10 else "test"
            frames.append({"file": file.name, "clip": "film", "time_s": number, "split": part})
    (folder / "frames.json").write_text(json.dumps(frames))
    return folder


def green(frame: np.ndarray) -> bool:
    """Whether a part of a frame is the pictures' colour."""
    r, g, b = (frame[..., i].astype(int) for i in range(3))
    return int(((g > 150) & (r < 110) & (b < 110)).sum()) > 200


def test_a_picture_that_two_names_could_claim_is_no_needle(
    recipe: Any, prepared: Path, tmp_path: Path
) -> None:
    module = recipe("draw")
    store = module.open_store(prepared, tmp_path / "data")
    assert module.twins(store) == {29}, "only the copy of a trained picture under another name"
    module.draw_needles(store, tmp_path, 4, 8, seed=0)
    hidden = json.loads((tmp_path / "needles/c/needles.json").read_text())
    assert hidden
    assert "thing 29" not in {each["name"] for each in hidden}


def test_the_video_shows_what_the_answers_say(recipe: Any, prepared: Path, tmp_path: Path) -> None:
    module = recipe("draw")
    store = module.open_store(prepared, tmp_path / "data")
    names = module.Names(store)
    checked = 0
    for number in range(6):
        plan = module.video_sample(store, names, "short", number, 3)
        path = tmp_path / f"{number}.mp4"
        module.write_video(path, module.video_frames(store, plan), plan["step_s"])
        video = read_frames(str(path), num_frames=8192, short="all")
        # The processor sees every frame, at the time that the questions mean.
        expected = [k * plan["step_s"] for k in range(plan["num_frames"])]
        assert video.timestamps_s.tolist() == expected
        seen = {k for k, frame in enumerate(video.frames) if green(frame)}
        shown = plan["shown"]
        plain = {k for k, colour in enumerate(_colours(plan)) if colour is not None}
        told = {k for each in shown for k in range(each.start, each.start + each.length)}
        assert told - plain <= seen <= told | plain
        at = {recipe("questions").clock(k * plan["step_s"]): k for k in range(plan["num_frames"])}
        for question, answer in plan["pairs"]:
            time = next((t for t in at if f"at {t}?" in question), None)
            if time is not None:
                here = [e.name for e in shown if e.start <= at[time] < e.start + e.length]
                assert answer == (here[0] if here else "no picture")
                checked += 1
            elif answer in at:
                name = next(e.name for e in shown if f"the {e.name} " in question)
                assert [e.start for e in shown if e.name == name] == [at[answer]]
                checked += 1
            elif answer in ("yes", "no"):
                asked = [e.name for e in shown if f"{e.name}?" in f"{question} "
                         or f"{e.name} appear" in question]  # fmt: skip
                assert bool(asked) == (answer == "yes")
                checked += 1
    assert checked > 20


def _colours(plan: dict[str, Any]) -> list[Any]:
    return [shot.colour for shot in plan["shots"] for _ in shot.frames]


def test_long_videos_are_planned_alike_by_everybody(
    recipe: Any, prepared: Path, tmp_path: Path
) -> None:
    module = recipe("draw")
    store = module.open_store(prepared, tmp_path / "data")
    names = module.Names(store)
    plans = [module.video_sample(store, names, "long", 4, 0) for _ in range(2)]
    assert plans[0] == plans[1]
    other = module.video_sample(store, names, "long", 5, 0)
    assert other["shown"] != plans[0]["shown"]
    for kind, low, high in (("long", 64, 2048), ("longest", 3000, 6000)):
        counts = [module.video_sample(store, names, kind, k, 0)["num_frames"] for k in range(4)]
        assert all(low <= count <= high for count in counts)


def test_the_most_turns_of_a_long_video_fit_its_row(
    recipe: Any, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = recipe("draw")
    store = module.open_store(prepared, tmp_path / "data")
    asked: list[tuple[int, int]] = []

    def conversation(shown: Any, num_frames: int, *rest: Any, turns: int, **more: Any) -> Any:
        asked.append((num_frames, turns))
        return [("What is shown at 00:00?", "thing")]

    monkeypatch.setattr(module, "conversation", conversation)
    for kind in ("long", "longest"):
        yaml = read_yaml(RECIPE / "stages" / f"{kind}.yaml")
        assert yaml["data"]["max_sample_tokens"] == module.ROWS[kind]
        for number in range(40):
            module.video_sample(store, module.Names(store), kind, number, 0)
        for frames, turns in asked:
            # A few lists come after the turns that are counted.
            assert turns > 200
            assert 23 * frames + 32 * (turns + 4) + 400 <= module.ROWS[kind]
        asked.clear()


def test_drawing_goes_on_and_the_loader_reads_it(
    recipe: Any, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = recipe("draw")
    sizes = {"images": (24, 12), "short": (3, 2), "log": (3, 2), "text": (2, 1)}
    monkeypatch.setattr(module, "SIZES", sizes)
    out = tmp_path / "data"
    sets = [*sizes, "needles"]
    module.draw(prepared, out, sets, needles=5, haystack=20)
    first = {p.name: p.read_bytes() for p in out.glob("*.jsonl")}
    kinds = ("align", "pretrain", "short", "log", "text")
    assert set(first) == {f"{kind}.jsonl" for kind in kinds}
    # A part that is gone is drawn again and is the same; the others are not touched.
    (out / "short.jsonl").unlink()
    (out / "short/parts/000000.json").unlink()
    kept = (out / "short/media/00002.mp4").stat().st_mtime_ns
    module.draw(prepared, out, sets, needles=5, haystack=20)
    assert {p.name: p.read_bytes() for p in out.glob("*.jsonl")} == first
    assert (out / "short/media/00002.mp4").stat().st_mtime_ns == kept

    runner = recipe("run").Runner(
        recipe("run").arguments(["--prepared", str(prepared), "--work", str(tmp_path)])
    )
    file = read_file(runner.datasets())
    processor = tiny_processor(timestamps=True)
    chat = Encoder(processor, 1 << 20, num_frames=8192, short="all")
    for name, style in (("align", "plain"), ("pretrain", "chat"), ("short", "chat")):
        chat.style = style
        sample = file.datasets[name][0]
        document = chat(sample)
        answers = [t for t in sample.turns if t.role == "assistant"]
        targets = document.input_ids[document.labels != -100]
        text = processor.tokenizer.decode(targets)
        assert len(answers) >= 2
        assert all("".join(t.text.split()) in "".join(text.split()) for t in answers)
    with open_video(str(out / "haystack.mp4")) as reader:
        assert reader.metadata.num_frames == 20
    assert len(load_needles(out / "needles" / "a")) == 5
    assert {each.tier for each in load_needles(out / "needles" / "b")} == {"b"}


def test_text_answers_stand_in_the_text(recipe: Any, prepared: Path, tmp_path: Path) -> None:
    module = recipe("draw")
    store = module.open_store(prepared, tmp_path / "data")
    pages = ["A page of words.\n" * 400]
    records = module.draw_text(store, "text", range(4), 0, pages)
    logs = module.draw_text(store, "log", range(40), 0, pages)
    assert not any("page" in each["conversations"][0]["value"] for each in logs)
    kinds = set()
    for record in records + logs:
        turns = record["conversations"]
        text = turns[0]["value"]
        assert turns, record["id"]
        for asked, told in zip(turns[::2], turns[1::2], strict=True):
            question = asked["value"].rsplit("\n", 1)[-1]
            kinds.add(question.split()[0])
            if "written at" in question:
                time = question.split("written at ")[1].rstrip("?")
                assert f"{time} {told['value']}" in text.split("\n")
            elif "secret fruit" in question:
                name = question.split("fruit of the ")[1].rstrip("?")
                assert f"The secret fruit of the {name} is {told['value']}." in text
            else:
                name = question.removeprefix("When is ").removesuffix(" written?")
                assert f"{told['value']} {name}" in text.split("\n")
    assert {"What", "When"} <= kinds


def test_stages_are_those_of_longvila_train(recipe: Any) -> None:
    module = recipe("run")
    for part in module.TRAINING:
        path = RECIPE / "stages" / f"{part.config}.yaml"
        stage = override(overlay(get_stage(part.stage), read_yaml(path)), part.options)
        assert stage.optimizer.max_steps and stage.saving.dtype == "float32"
        if part.apart:
            # Two GPUs have a row each, whose tokens one of them holds.
            assert choose_seq_parallel_size(stage, 2) == 1 and stage.data.rows_per_step == 2
            assert stage.data.max_tokens <= stage.parallel.tokens_per_rank
        else:
            shared = override(stage, ["seq_parallel_size=0", "parallel.tokens_per_rank=73728"])
            assert choose_seq_parallel_size(shared, 2) == 2
        assert part.after == "base" or part.after in {each.name for each in module.TRAINING}


def test_each_line_of_parts_is_given_its_context_once(recipe: Any) -> None:
    parts = {part.name: part for part in recipe("run").TRAINING}
    for name, part in parts.items():
        contexts = []
        while part.after != "base":
            stage = overlay(
                get_stage(part.stage), read_yaml(RECIPE / "stages" / f"{part.config}.yaml")
            )
            if (context := override(stage, part.options).context) is not None:
                contexts.append(context)
                reach = context.max_position_embeddings
                # 6,000 frames of 16 tokens, a newline and a time of up to seven tokens.
                assert reach >= 6000 * 24
                # YaRN brings it back into what the base model was trained on, whose base stays.
                assert context.rope_theta == 1e5 and context.yarn_factor == reach / 8192
            if part.stage == "long-sft-2048":
                assert stage.data.spread_positions == 147456
            part = parts[part.after]
        assert len(contexts) == (name not in ("align", "pretrain", "sft"))


def test_what_is_drawn_ahead_is_what_the_parts_need(recipe: Any, tmp_path: Path) -> None:
    module = recipe("run")

    def sets(*parts: str) -> list[str]:
        args = module.arguments(["--prepared", "x", "--work", str(tmp_path), *parts])
        return list(module.Runner(args).sets(args.parts))

    assert sets() == ["images", "short", "needles", "long", "longest"]
    assert sets("--parts", "ablations") == ["images", "short", "log", "needles", "text", "long"]
    assert sets("--parts", "base", "draw-text", "align") == ["images", "text"]


def test_needle_depths_are_exact(recipe: Any) -> None:
    from longvila.evaluation.needle import Plan

    grid = Plan(lengths=recipe("run").LENGTHS, depth_interval=0.5).grid
    assert grid.lengths == (32, 256, 1024, 2048, 6000)
    assert grid.depths == (Fraction(0), Fraction(1, 2), Fraction(1))


def test_the_delta_has_room_for_all_that_the_stages_train(recipe: Any) -> None:
    module = recipe("run")
    main = [part for part in module.TRAINING if part.name in module.MAIN]
    stages = [
        overlay(get_stage(part.stage), read_yaml(RECIPE / "stages" / f"{part.config}.yaml"))
        for part in main
    ]
    adapters = [stage.adapter for stage in stages if stage.rates.language_model is not None]
    assert all(adapter is not None for adapter in adapters)
    for stage in stages:
        # A tower trained in full would not fit a low rank.
        assert stage.rates.vision_tower is None or (stage.adapter and stage.adapter.tower_targets)
    # After stage 3 the parts went on from the first recipe's delta, whose rank is 40.
    last = [part.name for part in main].index("sft")
    text = 40 + sum(stage.adapter.rank for stage in stages[last + 1 :] if stage.adapter)
    tower = sum(adapter.rank for adapter in adapters if adapter and adapter.tower_targets)
    # The third pass came when the file was nearly full: the weakest 22 ranks are left out.
    assert text - 22 <= module.RANKS["model.language_model."]
    assert tower <= module.RANKS["model.vision_tower."]


def test_parts_hand_over_the_trained_model_and_measure_what_is_shipped(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = recipe("run")
    work = tmp_path / "work"
    runner = module.Runner(module.arguments(["--prepared", str(tmp_path), "--work", str(work)]))
    stage, shipped = work / "stages" / "furthest", work / "models" / "furthest"
    stage.mkdir(parents=True)
    with pytest.raises(SystemExit, match="furthest has not run"):
        runner.trained("furthest")
    (stage / "config.json").touch()
    assert runner.trained("furthest") == runner.measured("furthest") == stage
    shipped.mkdir(parents=True)
    (shipped / "config.json").touch()
    runner.deltas.mkdir()
    (runner.deltas / "furthest.safetensors").touch()
    assert (runner.trained("furthest"), runner.measured("furthest")) == (stage, shipped)
    # On another machine there is the delta alone.
    (stage / "config.json").unlink()
    assert runner.trained("furthest") == shipped

    # A part that has run and has no delta yet is not trained again.
    (stage / "config.json").touch()
    written = []
    monkeypatch.setattr(runner, "write_delta", lambda *paths: written.append(paths))
    (runner.deltas / "furthest.safetensors").unlink()
    runner.run("furthest")
    assert written == [(stage, runner.deltas / "furthest.safetensors")]
