"""A prompt read over ranks a chunk at a time gives the tokens of one process.

Chunks are far smaller than the prompt, so that media, positions in 3-D and deepstack rows cross
chunks and ranks; rows that a later chunk needs wait on the rank that encoded them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from longvila.errors import RankError
from longvila.inference import store
from longvila.inference.engine import Engine
from longvila.inference.frames import MissingFrames, TensorFrames, VideoFrames
from longvila.inference.paging import Pager
from longvila.inference.prompts import LongVILAPrompts
from longvila.inference.session import Session
from longvila.inference.store import StoreError
from longvila.media.synthetic import clip
from longvila.sp.mesh import build_mesh
from longvila.testing import Rank
from longvila.testing.ranks import run_ranks
from longvila.testing.tiny import tiny_inputs, tiny_model, tiny_processor

from .family_cases import CASES

NEW = 4
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


def longvila(**overrides: Any) -> tuple[Any, dict[str, Any]]:
    model = tiny_model(dtype=torch.float64, vision_batch_size=2, **overrides)
    model.generation_config.eos_token_id = None
    return model, tiny_inputs(model.config, videos=(5, 3), images=1, dtype=torch.float64)


def family(name: str, batch: str = "mixed") -> tuple[Any, dict[str, Any]]:
    """The first sample of a batch, with its own media only."""
    model = CASES[name].model(torch.float64).eval()
    model.generation_config.eos_token_id = None
    whole = CASES[name].batches[batch](torch.float64)
    ids = whole["input_ids"][0][whole["attention_mask"][0].bool()]
    return model, first_sample(name, whole, ids)


def first_sample(name: str, batch: dict[str, Any], ids: torch.Tensor) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": ids[None], "attention_mask": torch.ones(1, len(ids))}
    inputs["attention_mask"] = inputs["attention_mask"].long()
    if name.startswith("qwen"):
        for pixels, grid in (
            ("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")
        ):  # fmt: skip
            inputs[grid] = batch[grid][:1]
            inputs[pixels] = batch[pixels][: int(inputs[grid].prod())]
        inputs["mm_token_type_ids"] = batch["mm_token_type_ids"][:1, : len(ids)]
        if "second_per_grid_ts" in batch:
            inputs["second_per_grid_ts"] = batch["second_per_grid_ts"][:1]
    elif name == "llava_onevision":
        for key in ("pixel_values", "image_sizes", "pixel_values_videos"):
            inputs[key] = batch[key][:1]
    else:
        inputs["pixel_values"] = batch["pixel_values"][:7]
    return inputs


CELLS: dict[str, Any] = {
    "longvila": longvila,
    "pooled": lambda: longvila(pool_sizes=[[2, 1, 1], [1, 3, 3]]),
    **{name: (lambda name=name: family(name)) for name in CASES},
}


QUESTION = torch.tensor([[7, 11, 5]])


def oracle(name: str) -> list[list[list[int]]]:
    """What one process says behind the prompt, and behind a question."""
    model, inputs = CELLS[name]()
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], QUESTION], 1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    if "mm_token_type_ids" in longer:
        types = longer["mm_token_type_ids"]
        longer["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(QUESTION)], 1)
    return [model.generate(**each, **GREEDY).tolist() for each in (inputs, longer)]


def check(rank: Rank, names: list[str]) -> None:
    world = dist.get_world_size()
    mesh = build_mesh(world, world, "zigzag_ring_varlen")
    # Ranks share the oracles and tell each other.
    everyones: list[Any] = [None] * world
    dist.all_gather_object(everyones, {name: oracle(name) for name in names[rank.rank :: world]})
    expected = {name: said for each in everyones for name, said in each.items()}
    for name in names:
        try:
            check_cell(mesh, name, expected[name])
        except Exception as error:
            raise AssertionError(f"[{name}] {type(error).__name__}: {error}") from error


def check_cell(mesh: Any, name: str, expected: list[list[list[int]]]) -> None:
    model, inputs = CELLS[name]()
    question = QUESTION
    tokens = inputs["input_ids"].shape[1]
    for chunk in (7, 1000):
        with Engine(model, mesh, chunk_tokens=chunk, decode_graphs="uncaptured") as engine:
            film = engine.prefill(inputs)
            assert film.get_seq_length() == tokens == sum(film.held)
            if chunk == 7 and mesh.sp_size > 1:
                assert max(film.held) - min(film.held) <= 2 * mesh.sp_size
            found = engine.generate(engine.fork(film), question, **GREEDY)
            assert found.tolist() == expected[1], f"chunks of {chunk}, a question behind"
            alone = engine.generate(engine.fork(film), question[:, :1], **GREEDY)
            together = engine.generate_many(film, [question[0], question[0, :1]], **GREEDY)
            both = [found[0, tokens + 3 :].tolist(), alone[0, tokens + 1 :].tolist()]
            assert [row.tolist() for row in together] == both, "two questions at once"
            if len(set(inputs["input_ids"][0, -2:].tolist())) == 2:
                found = engine.generate(engine.fork(film), **GREEDY)
                assert found.tolist() == expected[0], f"chunks of {chunk}"
            if "pixel_values_videos" in inputs and name == "longvila":
                check_sources(engine, inputs, expected[0])


def check_stored(rank: Rank, folder: str) -> None:
    """Chunks are paged to the host of each rank; any number of ranks reads what two wrote."""
    model, inputs = longvila()
    question = torch.tensor([[7, 11, 5]])
    with Engine(model) as alone:
        expected = alone.generate(alone.prefill(inputs), question, **GREEDY).tolist()
    world = dist.get_world_size()
    mesh = build_mesh(world, world, "zigzag_ring_varlen")
    pager = Pager(torch.device("cpu"), 0, block_tokens=8)
    with Engine(model, mesh, chunk_tokens=7, kv_offload=pager) as engine:
        film = engine.prefill(inputs)
        assert film.host_bytes > 0
        assert engine.generate(engine.fork(film), question, **GREEDY).tolist() == expected
        engine.save(film, folder, {"film": 1})
        if world > 1:
            loaded = engine.load(folder, {"film": 1})
            assert loaded.host_bytes > 0 and sum(loaded.held) == film.get_seq_length()
            assert engine.generate(loaded, question, **GREEDY).tolist() == expected
    dist.barrier()
    with Engine(model) as alone:
        loaded = alone.load(folder, {"film": 1})
        assert alone.generate(loaded, question, **GREEDY).tolist() == expected
    dist.barrier()
    if rank.rank == 0:
        with Engine(model) as alone:
            alone.save(alone.prefill(inputs), folder, overwrite=True)
    dist.barrier()
    with Engine(model, mesh) as engine:
        assert engine.generate(engine.load(folder), question, **GREEDY).tolist() == expected
        dist.barrier()
        if rank.rank == 0:  # the last token's sums, which the last rank alone reads
            (file,) = Path(folder).glob("*.safetensors")
            header = int.from_bytes(file.read_bytes()[:8], "little")
            names = json.loads(file.read_bytes()[8 : 8 + header])
            content = bytearray(file.read_bytes())
            content[8 + header + names["sums.0"]["data_offsets"][1] - 1] ^= 1
            file.write_bytes(content)
        dist.barrier()
        with pytest.raises(StoreError, match="is damaged: 1 of its"):
            engine.load(folder)


def store_alone(rank: Rank, folder: str) -> None:
    """What one rank alone cannot write or read is said on all of them, and nobody waits."""
    model, inputs = longvila()
    with Engine(model, build_mesh(2, 2, "zigzag_ring_varlen")) as engine:
        film = engine.prefill(inputs)
        write = store._write_tensors
        if rank.rank == 1:
            store._write_tensors = full_disk
        with pytest.raises(StoreError, match="the disk of one is full"):
            engine.save(film, folder)
        store._write_tensors = write
        assert store.begins_stored(folder)
        # A folder that cannot be made, and an index that cannot be written.
        below = Path(folder).parent / "file"
        below.touch()
        elsewhere = below / "index" if rank.rank == 1 else Path(folder)
        with pytest.raises(StoreError if rank.rank == 0 else OSError, match="Not a directory"):
            engine.save(film, elsewhere)
        if rank.rank == 0:
            (Path(folder) / f"{store.INDEX}.part").mkdir()
        with pytest.raises(OSError if rank.rank == 0 else StoreError, match="Is a directory"):
            engine.save(film, folder)
        if rank.rank == 0:
            (Path(folder) / f"{store.INDEX}.part").rmdir()
        engine.save(film, folder)
        dist.barrier()
        if rank.rank == 1:  # the name of a tensor that the last rank alone reads
            file = Path(folder) / "cache-00001-of-00002.safetensors"
            content = file.read_bytes()
            file.write_bytes(content.replace(b"keys.1", b"keys.9", 1))
        dist.barrier()
        with pytest.raises(StoreError, match=r"damaged \(.*keys.1.*make it again"):
            engine.load(folder)
        engine.save(film, folder, overwrite=True)
        assert engine.load(folder).get_seq_length() == film.get_seq_length()


def full_disk(path: Path, tensors: Any) -> int:
    raise StoreError("the disk of one is full")


def test_what_one_rank_cannot_store_or_load_is_an_error_of_all(tmp_path: Path) -> None:
    run_ranks(store_alone, 2, str(tmp_path / "index"), timeout_s=90)


def test_stored_and_paged_over_ranks(tmp_path: Path) -> None:
    run_ranks(check_stored, 2, str(tmp_path / "index"))


def check_sources(engine: Engine, inputs: dict[str, Any], expected: list[list[int]]) -> None:
    """Sources are asked for this rank's frames alone; a prompt may follow another."""

    class Watched(TensorFrames):
        asked = 0

        def stream(self, ranges: Any, *, batch: Any) -> Any:
            self.asked += sum(stop - start for start, stop in ranges)
            return super().stream(ranges, batch=batch)

    source = Watched(inputs["pixel_values_videos"])
    streamed = {**inputs, "pixel_values_videos": source}
    assert engine.generate(streamed, **GREEDY).tolist() == expected
    asked = torch.tensor(source.asked)
    if engine.num_ranks > 1:
        dist.all_reduce(asked, group=engine.mesh.sp_group)  # type: ignore[union-attr]
        assert source.asked < source.num_frames
    assert int(asked) == source.num_frames
    twice = engine.prefill(inputs, onto=engine.prefill(inputs))
    with_both = engine.decode(twice, torch.tensor([[9]]))
    single = engine.decode(engine.prefill(streamed, onto=engine.prefill(streamed)),
                           torch.tensor([[9]]))  # fmt: skip
    torch.testing.assert_close(with_both, single)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_tokens_equal_one_process(world: int) -> None:
    run_ranks(check, world, list(CELLS), timeout_s=280)


# ---- sessions --------------------------------------------------------------------------------


def converse(rank: Rank, film: str) -> None:
    model = tiny_model(3)
    processor = tiny_processor(model.config)
    alone = Session(model, processor)
    expected = [
        alone.ask("One?", [alone.load_video(film, num_frames=7)], max_new_tokens=6).token_ids,
        alone.ask("Two?", [alone.load_video(film, num_frames=3)], max_new_tokens=6).token_ids,
    ]
    alone.close()
    mesh = build_mesh(2, 2, "zigzag_ring_varlen")
    session = Session(Engine(model, mesh, chunk_tokens=16), processor)
    found = [
        session.ask("One?", [session.load_video(film, num_frames=7)], max_new_tokens=6).token_ids,
        session.ask("Two?", [session.load_video(film, num_frames=3)], max_new_tokens=6).token_ids,
    ]
    assert found == expected


def fail_alone(rank: Rank, film: str) -> None:
    model = tiny_model(3)
    mesh = build_mesh(2, 2, "zigzag_ring_varlen")
    with Engine(model, mesh, chunk_tokens=16) as engine:
        prompts = LongVILAPrompts(model, tiny_processor(model.config), engine.family)
        medium = prompts.load_video(film, num_frames=8)
        source: VideoFrames = medium.pixels
        batch = tiny_inputs(model.config, videos=(8,))
        broken = {**batch, "pixel_values_videos": source}
        if rank.rank == 1:
            source.to_pixels = lambda frames: 1 / 0  # type: ignore[assignment,return-value]
        other = {"input_ids": torch.full((1, 90), 5 + rank.rank)}
        with pytest.raises(ValueError, match="different prompts"):
            engine.prefill(other)
        kind = ZeroDivisionError if rank.rank == 1 else RankError
        with pytest.raises(kind, match="division by zero"):
            engine.prefill(broken)
        source.to_pixels = prompts._pixels
        if rank.rank == 1:
            source.indices = np.asarray([*source.indices[:-1], 39])
            source._decode = lambda asked: (_ for _ in ()).throw(  # type: ignore[method-assign]
                MissingFrames("film.mp4", [39])
            )
        with pytest.raises(MissingFrames, match="39"):
            engine.prefill(broken)


def stop_alone(rank: Rank, film: str) -> None:
    """A caller's progress that raises stops the reading on all ranks, and spoils nothing."""
    model = tiny_model(3)
    engine = Engine(model, build_mesh(2, 2, "zigzag_ring_varlen"), chunk_tokens=16)
    session = Session(engine, tiny_processor(model.config))

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "read" and done >= min(total, 40):
            raise InterruptedError(f"enough at {done}")

    expected = session.ask("One?", [session.load_video(film, num_frames=7)]).token_ids
    session.clear()
    kind = InterruptedError if rank.rank == 1 else RankError
    # A prompt that is dealt over the ranks, and one of few tokens behind it, which all read.
    for media in ([session.load_video(film, num_frames=7)], []):
        session.progress = stop if rank.rank == 1 else None
        with pytest.raises(kind, match="enough at"):
            session.ask("One?", media)
        session.progress = None
        if media:
            assert session.ask("One?", media).token_ids == expected
    assert len(session.messages) == 2
    session.ask("Two?")


@pytest.mark.parametrize("check_film", [converse, fail_alone, stop_alone])
def test_sessions_over_ranks(check_film: Any, tmp_path: Path) -> None:
    film = clip(tmp_path / "film.mp4", 40)
    run_ranks(check_film, 2, str(film))
