"""The loader: resumed to the bit, alike on every mesh, and never stopped by a broken file."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from data_cases import Listed, text_sample, video_sample

from longvila.data.agreement import Agreement
from longvila.data.collate import Collator
from longvila.data.datasets import open_dataset
from longvila.data.encode import Encoder
from longvila.data.loader import DataError, PackedLoader
from longvila.data.mixture import Mixture
from longvila.data.sample import Sample
from longvila.media.synthetic import clip, damage, truncate
from longvila.parallel.apply import ParallelPlan, parallelize
from longvila.parallel.mmsp import plan_media
from longvila.sp.mesh import build_mesh
from longvila.testing.ranks import Rank, run_ranks
from longvila.testing.tiny import tiny_config, tiny_model, tiny_processor

BUDGET = 300


def mixture(folder: Path, videos: int = 6, texts: int = 15, seed: int = 3) -> Mixture:
    clips = [video_sample(folder / f"clip{n % 3}.mp4", n, "a" * n) for n in range(1, videos + 1)]
    words = [text_sample(n, "b" * (3 * n)) for n in range(1, texts + 1)]
    return Mixture([Listed("videos", clips), Listed("texts", words)], seed=seed)


def loader(processor: Any, order: Mixture, **options: Any) -> PackedLoader:
    return PackedLoader(
        order, Encoder(processor, BUDGET), Collator(processor), **{"window": 8, **options}
    )


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key]
        for key, value in one.items()
    )


def take(source: PackedLoader, number: int) -> list[dict[str, Any]]:
    return list(itertools.islice(source, number))


def test_an_epoch_sees_every_sample_once(processor: Any, media_dir: Path) -> None:
    order = mixture(media_dir)
    source = loader(processor, order, epochs=1)
    encoder = Encoder(processor, BUDGET)
    expected = Counter(encoder(order[p]).length for p in range(len(order)))  # type: ignore[union-attr]
    for epoch in range(2):
        batches = list(source)
        assert Counter(n for b in batches for n in b["document_lengths"]) == expected
        assert all(sum(b["document_lengths"]) <= BUDGET for b in batches)
        assert source.epoch == epoch + 1
    assert source.report.counts["documents"] == 2 * len(order)


@pytest.mark.parametrize("stop", [1, 3, 7, 12])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_resuming_is_bit_identical(
    processor: Any, media_dir: Path, stop: int, prefetch: int
) -> None:
    whole = take(loader(processor, mixture(media_dir)), 16)
    first = loader(processor, mixture(media_dir), prefetch=prefetch)
    assert all(map(same, take(first, stop), whole))
    saved = json.loads(json.dumps(first.state_dict()))
    second = loader(processor, mixture(media_dir), prefetch=2 - prefetch // 2)
    second.load_state_dict(saved)
    assert second.state_dict() == saved
    rest = take(second, 16 - stop)
    assert len(rest) == 16 - stop and all(map(same, rest, whole[stop:]))


def test_an_iteration_that_is_left_goes_on_where_it_was_left(
    processor: Any, media_dir: Path
) -> None:
    whole = take(loader(processor, mixture(media_dir)), 9)
    source = loader(processor, mixture(media_dir))
    assert all(map(same, take(source, 4) + take(source, 5), whole))


def test_rows_may_be_longer_than_documents(processor: Any, media_dir: Path) -> None:
    wide = loader(processor, mixture(media_dir), row_tokens=3 * BUDGET, epochs=1)
    lengths = [batch["document_lengths"] for batch in wide]
    assert max(map(sum, lengths)) > BUDGET
    assert all(sum(row) <= 3 * BUDGET and max(row) <= BUDGET for row in lengths)
    assert wide.state_dict()["max_tokens"] == 3 * BUDGET
    with pytest.raises(ValueError, match="do not hold documents"):
        loader(processor, mixture(media_dir), row_tokens=BUDGET - 1)


def test_states_of_other_runs_are_refused(processor: Any, media_dir: Path) -> None:
    state = loader(processor, mixture(media_dir)).state_dict()
    for other in (
        loader(processor, mixture(media_dir, seed=4)),
        loader(processor, mixture(media_dir), window=9),
        PackedLoader(mixture(media_dir), Encoder(processor, 999), Collator(processor), window=8),
        *(
            PackedLoader(
                mixture(media_dir),
                Encoder(processor, BUDGET, **changed),
                Collator(processor),
                window=8,
            )
            for changed in ({"num_frames": 2}, {"style": "plain"}, {"fps": 1.0})
        ),
    ):
        with pytest.raises(ValueError, match="the order of samples would not be"):
            other.load_state_dict(state)


def test_a_dataset_that_grew_is_named(processor: Any, media_dir: Path) -> None:
    state = loader(processor, mixture(media_dir)).state_dict()
    other = loader(processor, mixture(media_dir, texts=16))
    said = r"texts: 15 rows \(15 an epoch\) when saved, 16 rows \(16 an epoch\) now\. Restore"
    with pytest.raises(ValueError, match=said):
        other.load_state_dict(state)
    # States of older releases have the fingerprint alone: they are read, and refused without names.
    del state["order"]
    loader(processor, mixture(media_dir)).load_state_dict(state)
    with pytest.raises(ValueError, match="the mixture \\(seed, datasets, their rows and weights"):
        other.load_state_dict(state)


def test_rows_are_the_same_for_any_number_of_groups(processor: Any, media_dir: Path) -> None:
    whole = take(loader(processor, mixture(media_dir)), 12)
    for groups in (2, 4):
        dealt: list[Any] = [None] * 12
        for rank in range(groups):
            agreement = Agreement(dp_rank=rank, dp_size=groups)
            source = loader(processor, mixture(media_dir), agreement=agreement)
            dealt[rank::groups] = take(source, 12 // groups)
        assert all(map(same, dealt, whole))


def test_going_on_with_another_number_of_groups(processor: Any, media_dir: Path) -> None:
    whole = take(loader(processor, mixture(media_dir)), 8)
    sources = [
        loader(processor, mixture(media_dir), agreement=Agreement(dp_rank=r, dp_size=2))
        for r in range(2)
    ]
    for source in sources:
        take(source, 2)
    states = [source.state_dict() for source in sources]
    assert states[0]["next_position"] == states[1]["next_position"] and states[0]["rows"] == 4
    alone = loader(processor, mixture(media_dir))
    alone.load_state_dict(states[0])
    assert all(map(same, take(alone, 4), whole[4:]))


def test_epochs_end_for_all_groups_at_once(processor: Any, media_dir: Path) -> None:
    counts = []
    for rank in range(3):
        source = loader(
            processor, mixture(media_dir), epochs=1, agreement=Agreement(dp_rank=rank, dp_size=3)
        )
        counts.append(len(list(source)))
        assert source.epoch >= 1
    assert len(set(counts)) == 1


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("window", [4, 8, 64])
def test_epochs_end_and_have_the_same_rows_for_any_number_of_groups(
    processor: Any, media_dir: Path, groups: int, window: int
) -> None:
    """Also where the last rows of an epoch are filled up from the next one."""

    def order() -> Mixture:
        return Mixture(
            [Listed("texts", [text_sample(n, "b" * (9 * n)) for n in range(1, 8)])], seed=3
        )

    def epochs(source: PackedLoader) -> list[Any]:
        """Three iterations; none goes on for ever."""
        rounds = [list(itertools.islice(source, 50)) for _ in range(3)]
        assert all(0 < len(each) < 50 for each in rounds) and source.epoch >= 3
        return [batch for each in rounds for batch in each]

    dealt = [
        epochs(
            loader(
                processor, order(), window=window, epochs=1,
                agreement=Agreement(dp_rank=rank, dp_size=groups),
            )
        )
        for rank in range(groups)
    ]  # fmt: skip
    rows = [batch for each in zip(*dealt, strict=True) for batch in each]
    alone = loader(processor, order(), window=window, epochs=1)
    expected: list[Any] = []
    while len(expected) < len(rows):
        expected += list(alone)
    assert all(map(same, rows, expected))


@pytest.mark.parametrize("window", [1, 4])
def test_an_epoch_ends_though_its_last_samples_are_left_out(processor: Any, window: int) -> None:
    def order(last: set[int]) -> Mixture:
        texts = [text_sample(n, "b" * (2000 if n in last else 3)) for n in range(8)]
        return Mixture([Listed("texts", texts)], seed=3)

    last = {order(set()).place(position).row for position in (6, 7)}
    source = PackedLoader(
        order(last), Encoder(processor, BUDGET, too_long="drop"), Collator(processor),
        epochs=1, window=window,
    )  # fmt: skip
    batches = list(source)
    assert sum(len(batch["document_lengths"]) for batch in batches) == 6
    assert source.epoch == 1 and source.report.counts["too_long"] == 2
    assert sum(len(batch["document_lengths"]) for batch in source) == 6


def test_broken_files_are_left_out_counted_and_listed(
    processor: Any, media_dir: Path, tmp_path: Path
) -> None:
    clip(tmp_path / "clip0.mp4", 24)
    truncate(clip(tmp_path / "clip1.mp4", 24), 0.3)
    path = tmp_path / "out" / "report.json"
    source = loader(processor, mixture(tmp_path), epochs=1, report=path)
    report = source.report
    lengths = [n for batch in source for n in batch["document_lengths"]]
    written = json.loads(path.read_text())
    assert report.counts["broken"] == 4 and len(lengths) == 21 - 4
    assert {event["id"] for event in written["events"]} == {f"videos/v{n}" for n in (1, 2, 4, 5)}
    assert {event["found"] for event in written["events"]} == {"looking"}
    assert any("clip2.mp4: no such file" in event["reason"] for event in written["events"])
    assert written["counts"] == dict(report.counts) and written["counts"]["broken"] == 4
    groups = Agreement(dp_rank=1, dp_size=2)
    other = loader(processor, mixture(tmp_path), agreement=groups, report=path)
    assert other.report.path == tmp_path / "out" / "report.dp1.json"


def test_a_report_that_cannot_be_written_is_said_and_hides_nothing(
    processor: Any, media_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clip(tmp_path / "clip0.mp4", 24)
    (tmp_path / "file").write_text("")
    source = loader(processor, mixture(tmp_path), epochs=1, report=tmp_path / "file" / "a.json")
    assert len([n for batch in source for n in batch["document_lengths"]]) == 21 - 4
    assert "the list of what was left out cannot be written" in caplog.text


def test_lines_that_are_no_records_are_left_out(processor: Any, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ada."}]
    lines = [json.dumps({"id": str(n), "conversations": turns}) for n in range(6)]
    lines[2:2] = ['{"id": "cut', "[]"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    source = loader(processor, Mixture([open_dataset("llava", tmp_path / "rows.jsonl")]), epochs=1)
    assert sum(len(batch["document_lengths"]) for batch in source) == 6
    reasons = {event.id: event.reason for event in source.report.events}
    assert reasons.keys() == {"llava/record 2", "llava/record 3"}
    assert "expected an object, got list" in reasons["llava/record 3"]


def late(folder: Path) -> Path:
    """A clip whose index is sound and whose second half is noise."""
    return damage(clip(folder / "clip1.mp4", 96, gop=12), 0.2, 0.7)


def test_videos_that_break_while_decoding_are_replaced(processor: Any, tmp_path: Path) -> None:
    for number in (0, 2):
        clip(tmp_path / f"clip{number}.mp4", 24, first_number=100 * number)
    late(tmp_path)
    source = loader(processor, mixture(tmp_path), epochs=2)
    batches = list(source)
    events = source.report.events
    assert all(e.found == "decoding" and e.id in ("videos/v1", "videos/v4") for e in events)
    # A substitute may be the other damaged one; it is replaced in its turn.
    positions = {e.position for e in events}
    assert len(positions) == 4 <= len(events) == source.report.counts["broken"]
    last = {e.position: e.substitute for e in events}
    assert any(last.values()) and not {"videos/v1", "videos/v4"} & set(last.values())
    without = sum(name is None for name in last.values())
    assert source.report.counts["documents"] == 42 - without
    assert sum(len(b["document_lengths"]) for b in batches) == source.report.counts["documents"]
    again = list(loader(processor, mixture(tmp_path), epochs=2))
    assert all(map(same, batches, again))


def test_nothing_but_broken_files_is_an_error_not_a_loop(processor: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a whole epoch, gave no document: .*no such file"):
        missing = [video_sample(tmp_path / f"{n}.mp4", n) for n in range(3)]
        next(iter(loader(processor, Mixture([Listed("v", missing)]))))


def test_a_row_of_which_nothing_can_be_decoded_is_an_error(processor: Any, tmp_path: Path) -> None:
    late(tmp_path)
    order = Mixture([Listed("v", [video_sample(tmp_path / "clip1.mp4", n) for n in range(3)])])
    with pytest.raises(DataError, match="no document of a row can be decoded"):
        next(iter(loader(processor, order)))


def test_samples_that_are_too_long_are_counted(processor: Any, media_dir: Path) -> None:
    long = [video_sample(media_dir / "clip0.mp4", n, num_frames=24) for n in range(2)]
    order = Mixture([Listed("v", [*long, text_sample(1), text_sample(2, "w " * 400)])])
    source = loader(processor, order, epochs=1)
    list(source)
    counts = source.report.counts
    assert counts["too_long"] == 1 and counts["shortened"] == 2 and counts["frames_cut"] > 0
    assert counts["documents"] == 3


def said_of_long_samples(rank: Rank, folder: str) -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("longvila.data.loader").addHandler(handler)
    order = mixture(Path(folder), videos=2, texts=40)
    mesh = build_mesh(1, num_heads=4, num_kv_heads=2)
    source = PackedLoader(
        order, Encoder(tiny_processor(num_frames=2), 120), Collator(tiny_processor(num_frames=2)),
        agreement=Agreement.from_mesh(mesh), window=50,
    )  # fmt: skip
    take(source, 2)
    return [line for line in said if line.startswith("left out ")]


def test_what_all_ranks_leave_out_is_said_by_one(media_dir: Path) -> None:
    first, second = run_ranks(said_of_long_samples, 2, str(media_dir))
    assert len(first) > 3 and all("too_long" in line for line in first)
    assert second == []


def test_faults_of_the_data_are_not_taken_for_broken_files(processor: Any) -> None:
    class Wrong(Listed):
        def __getitem__(self, index: int) -> Sample:
            raise KeyError("no such column")

    with pytest.raises(KeyError, match="no such column"):
        next(iter(loader(processor, Mixture([Wrong("w", [text_sample()])]))))


def test_misuse_is_refused(processor: Any, media_dir: Path) -> None:
    order = mixture(media_dir)
    with pytest.raises(ValueError, match="the collator works as sp rank 0 of 1"):
        group: Any = object()
        loader(processor, order, agreement=Agreement(sp_size=2, group=group))
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        loader(processor, order, epochs=0)
    with pytest.raises(ValueError, match="window and threads"):
        loader(processor, order, window=0)
    with pytest.raises(ValueError, match="needs its process group"):
        Agreement(sp_size=2)
    with pytest.raises(ValueError, match="below sizes"):
        Agreement(dp_rank=2, dp_size=2)


# ---- several ranks ----------------------------------------------------------------------------


def spread(rank: Rank, folder: str, sp: int, number: int, hidden: str | None) -> Any:
    """Batches of one rank; one rank may see a folder in which a clip is damaged."""
    processor, config = tiny_processor(num_frames=4), tiny_config()
    mesh = build_mesh(seq_parallel_size=sp, num_heads=4, num_kv_heads=2, device_type="cpu")
    agreement = Agreement.from_mesh(mesh)
    mine = hidden if hidden is not None and rank.rank == rank.world_size - 1 else folder
    deal = functools.partial(plan_media, config, sp)
    collator = Collator(processor, sp_rank=agreement.sp_rank, sp_size=agreement.sp_size, deal=deal)
    source = PackedLoader(
        mixture(Path(mine)), Encoder(processor, BUDGET), collator, agreement=agreement, window=8
    )
    batches = take(source, number)
    dist.barrier()
    plain = [
        {k: v.numpy() if torch.is_tensor(v) else v for k, v in batch.items()} for batch in batches
    ]
    events = [(e.id, e.found, e.substitute) for e in source.report.events]
    return agreement.dp_rank, agreement.sp_rank, plain, events, source.state_dict()


@pytest.mark.parametrize("sp", [1, 2, 4])
def test_ranks_of_a_mesh_get_the_rows_of_one_process(
    processor: Any, media_dir: Path, sp: int
) -> None:
    results = run_ranks(spread, 4, str(media_dir), sp, 2 * sp, None)
    groups = 4 // sp
    whole = take(loader(processor, mixture(media_dir)), 2 * sp * groups)
    for dp_rank, _, batches, events, _ in results:
        assert not events
        for step, batch in enumerate(batches):
            expected = whole[step * groups + dp_rank]
            assert (batch["input_ids"] == expected["input_ids"].numpy()).all()
            assert batch["document_lengths"] == expected["document_lengths"]
            if sp > 1 and "pixel_values_videos" in expected:
                parts = [
                    r[2][step]["local_pixel_values_videos"] for r in results if r[0] == dp_rank
                ]
                joined = torch.cat([torch.from_numpy(part) for part in parts])
                assert torch.equal(joined, expected["pixel_values_videos"])
    states = [json.dumps(result[4]["waiting"]) for result in results]
    assert len(set(states)) == 1


def test_a_clip_that_one_rank_cannot_decode_is_replaced_on_all_of_its_group(
    processor: Any, media_dir: Path, tmp_path: Path
) -> None:
    """The fault of the original: each rank drew its own substitute, and the group hung."""
    for number in range(3):
        shutil.copy(media_dir / f"clip{number}.mp4", tmp_path)
    damage(tmp_path / "clip1.mp4", 0.3, 0.75)
    results = run_ranks(spread, 4, str(media_dir), 4, 12, str(tmp_path))
    events = [result[3] for result in results]
    assert events[0] and all(each == events[0] for each in events)
    assert {event[0] for event in events[0]} <= {"videos/v1", "videos/v4"}
    for step in range(12):
        ids = [result[2][step]["input_ids"] for result in results]
        assert all((each == ids[0]).all() for each in ids)


def losses(rank: Rank, folder: str, sp: int, steps: int) -> list[float]:
    """Losses of a model on the mesh, fed by the loader."""
    processor, config = tiny_processor(num_frames=4), tiny_config()
    mesh = build_mesh(seq_parallel_size=sp, num_heads=4, num_kv_heads=2, device_type="cpu")
    agreement = Agreement.from_mesh(mesh)
    collator = Collator(
        processor,
        sp_rank=agreement.sp_rank,
        sp_size=agreement.sp_size,
        deal=functools.partial(plan_media, config, mesh.sp_size),
    )
    source = PackedLoader(
        mixture(Path(folder)), Encoder(processor, BUDGET), collator, agreement=agreement, window=8
    )
    model = parallelize(
        tiny_model(dtype=torch.float64),
        mesh,
        ParallelPlan(fsdp=False, activation_checkpointing=False, two_stage=True),
    )
    with torch.no_grad():
        return [float(model(**batch).loss) for batch in itertools.islice(source, steps)]


def test_a_model_on_a_mesh_takes_the_batches_as_they_come(media_dir: Path) -> None:
    """The counts, the deal and the local pixels are those the two-stage forward plans with."""
    alone = run_ranks(losses, 1, str(media_dir), 1, 6)[0]
    spread_out = run_ranks(losses, 4, str(media_dir), 4, 6)
    for each in spread_out:
        assert each == pytest.approx(alone, rel=1e-6)
