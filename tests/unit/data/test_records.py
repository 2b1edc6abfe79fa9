"""Records from files: random access, odd contents, broken files, other processes."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from data_cases import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from longvila.data.records import JsonArray, RecordError, TarRecords, open_records

ROWS = [{"id": i, "text": 'a "quoted" ] line\n{' + "é" * i, "list": [[i], {}]} for i in range(9)]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


def test_lines_arrays_and_parquet_give_the_same_records(tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", ROWS)
    lines.write_text(lines.read_text().replace("\n{", "\n\n{", 2))
    array = tmp_path / "b.json"
    array.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8")
    as_json = tmp_path / "c.json"
    as_json.write_text(lines.read_text())
    flat = [{"id": r["id"], "text": r["text"]} for r in ROWS]
    parquet.write_table(pa.Table.from_pylist(flat), tmp_path / "d.parquet", row_group_size=2)
    for path in (lines, array, as_json):
        records = open_records(path)
        assert list(records) == ROWS
        assert records[7] == ROWS[7] and records[0] == ROWS[0]
        with pytest.raises(IndexError, match="9"):
            records[9]
    table = open_records(tmp_path / "d.parquet")
    assert [table[i] for i in (8, 0, 5, 3, 1)] == [flat[i] for i in (8, 0, 5, 3, 1)]
    with pytest.raises(IndexError, match="9 rows"):
        table[9]


@given(st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=3), max_size=6), st.booleans())
@settings(max_examples=80, deadline=None)
def test_array_offsets_hold_for_any_content(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], escaped: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(rows, ensure_ascii=escaped), encoding="utf-8")
    assert list(JsonArray(path)) == rows


def test_nothing_of_an_array_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text('\ufeff[{"a": 1}, null, "x, y", 1.5,[2] ,{"b": "]"},true]\n', encoding="utf-8")
    records = open_records(path)
    assert len(records) == 7 and records[0] == {"a": 1} and records[5] == {"b": "]"}
    for number, kind in ((1, "NoneType"), (2, "str"), (3, "float"), (4, "list"), (6, "bool")):
        with pytest.raises(RecordError, match=f"record {number}: expected an object, got {kind}"):
            records[number]
    path.write_text('[{"a": 1}]\n[{"a": 2}]')
    with pytest.raises(ValueError, match="something comes after it"):
        open_records(path)


def test_mappings_give_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"database": {"x": {"a": 1}, "y": {"a": 2}}}))
    records = open_records(path, under="database")
    assert list(records) == [{"__key__": "x", "a": 1}, {"__key__": "y", "a": 2}]
    with pytest.raises(ValueError, match="no key 'rows'"):
        open_records(path, under="rows")
    (tmp_path / "one.json").write_text(json.dumps({"x": {"a": 1}}, indent=1))
    assert list(open_records(tmp_path / "one.json")) == [{"__key__": "x", "a": 1}]


def tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as out:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))


def test_lines_in_a_json_file_may_come_after_empty_ones(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf\r\n\r\n{"n": 1}\r\n\r\n{"n": 2}\r\n')
    records = open_records(tmp_path / "a.json")
    assert [records[i]["n"] for i in range(len(records))] == [1, 2]
    (tmp_path / "b.json").write_text('\n{"a": {"n": 1}}\n')
    assert open_records(tmp_path / "b.json")[0] == {"__key__": "a", "n": 1}


def test_tars_group_files_by_stem(tmp_path: Path) -> None:
    tar(tmp_path / "s-2.tar", {"c.txt": b"three", "c.png": b"\x89"})
    tar(tmp_path / "s-1.tar", {"x/a.jpg": b"1", "x/a.json": b'{"k": 2}', "b.seg.txt": b"two"})
    records = TarRecords(tmp_path)
    assert list(records) == [
        {"__key__": "x/a", "__shard__": "s-1.tar", ".jpg": b"1", ".json": {"k": 2}},
        {"__key__": "b", "__shard__": "s-1.tar", ".seg.txt": b"two"},
        {"__key__": "c", "__shard__": "s-2.tar", ".txt": "three", ".png": b"\x89"},
    ]
    index = {"name": "n", "wids_version": 1}
    shards = [{"url": "s-2.tar", "nsamples": 1}, {"url": "s-1.tar", "nsamples": 2}]
    (tmp_path / "wids-meta.json").write_text(json.dumps({**index, "shardlist": shards}))
    assert [r["__key__"] for r in TarRecords(tmp_path)] == ["c", "x/a", "b"]
    shards[0]["nsamples"] = 5
    (tmp_path / "wids-meta.json").write_text(json.dumps({**index, "shardlist": shards}))
    with pytest.raises(ValueError, match=r"1 records, but wids-meta.json promises 5"):
        TarRecords(tmp_path)


def test_what_macos_leaves_beside_files_is_no_record(tmp_path: Path) -> None:
    tar(tmp_path / "t.tar", {"a.jpg": b"1", "._a.jpg": b"?", "x/._b.txt": b"\xff", "x/b.txt": b"2"})
    assert [record["__key__"] for record in TarRecords(tmp_path / "t.tar")] == ["a", "x/b"]


def test_an_index_may_count_names_as_the_original_does(tmp_path: Path) -> None:
    """Its count takes folders and files without a suffix for samples; reading leaves them out."""
    with tarfile.open(tmp_path / "s.tar", "w") as out:
        folder = tarfile.TarInfo("part")
        folder.type = tarfile.DIRTYPE
        out.addfile(folder)
        for name in ("part/a.jpg", "part/a.txt", "part/b.jpg", "part/LICENCE"):
            member = tarfile.TarInfo(name)
            member.size = 1
            out.addfile(member, io.BytesIO(b"x"))
    where = str(tmp_path / "s.tar")
    for count in (2, 4):
        shards = [{"url": where, "nsamples": count}]
        (tmp_path / "wids-meta.json").write_text(json.dumps({"shardlist": shards}))
        assert [record["__key__"] for record in TarRecords(tmp_path)] == ["part/a", "part/b"]


def test_a_name_twice_in_a_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as out:
        for _ in range(2):
            member = tarfile.TarInfo("a.txt")
            out.addfile(member, io.BytesIO(b""))
    with pytest.raises(ValueError, match="there twice"):
        open_records(tmp_path / "t.tar")


def test_a_tar_that_is_cut_off_between_files_is_refused(tmp_path: Path) -> None:
    tar(tmp_path / "t.tar", {"a.txt": b"1", "b.txt": b"2"})
    content = (tmp_path / "t.tar").read_bytes()
    (tmp_path / "t.tar").write_bytes(content[: 1024 + 100])
    with pytest.raises(ValueError, match="cut off"):
        open_records(tmp_path / "t.tar")


def test_a_broken_file_in_a_tar_is_a_broken_record_and_no_other(tmp_path: Path) -> None:
    tar(tmp_path / "t.tar", {"a.json": b"{", "b.txt": b"\xff", "c.txt": b"fine"})
    records = open_records(tmp_path / "t.tar")
    for index, name in enumerate(("a.json", "b.txt")):
        with pytest.raises(RecordError, match=rf"t.tar: {name}: "):
            records[index]
    assert records[2][".txt"] == "fine"


def test_a_picture_inside_an_array_takes_no_memory_beside_itself(tmp_path: Path) -> None:
    size = 1 << 20
    (tmp_path / "a.json").write_text(json.dumps([{"picture": "A" * size, "text": '\\"]'}]))
    tracemalloc.start()
    try:
        records = open_records(tmp_path / "a.json")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(records) == 1 and records[0]["text"] == '\\"]'
    assert peak < 4 * size


def test_several_files_and_folders_are_joined(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"p{n}.jsonl", ROWS[n : n + 2]) for n in (0, 2)]
    for records in (open_records(paths), open_records(tmp_path)):
        assert [r["id"] for r in records] == [0, 1, 2, 3]
        with pytest.raises(IndexError):
            records[4]


def test_a_folder_of_json_is_read_where_there_is_nothing_else(tmp_path: Path) -> None:
    for n in (10, 9):
        (tmp_path / f"p{n}.json").write_text(json.dumps([{"id": n}]))
    (tmp_path / "manifest.json").write_text("{}")
    assert [r["id"] for r in open_records(tmp_path)] == [9, 10]
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert len(open_records(tmp_path)) == len(ROWS)


def test_hidden_files_of_a_folder_are_no_records(tmp_path: Path) -> None:
    for name in ("a.jsonl", "._a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [{"n": 1}])
    assert len(open_records(tmp_path)) == 1
    (tmp_path / "._b.jsonl.gz").write_bytes(b"?")
    assert len(open_records(tmp_path)) == 1
    (tmp_path / "tars").mkdir()
    tar(tmp_path / "tars" / "s.tar", {"a.txt": b"1"})
    (tmp_path / "tars" / "._s.tar").write_bytes(b"?")
    assert len(open_records(tmp_path / "tars")) == 1


def test_a_folder_that_is_called_as_a_file_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").mkdir()
    table = pa.Table.from_pylist([{"n": 1}])
    parquet.write_table(table, tmp_path / "train.parquet" / "part-0.parquet")
    assert list(open_records(tmp_path)) == [{"n": 1}]


def test_readers_go_to_other_processes_and_threads(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    tar(tmp_path / "t.tar", {f"{i}.txt": str(i).encode() for i in range(9)})
    parquet.write_table(pa.Table.from_pylist([{"n": i} for i in range(9)]), tmp_path / "p.parquet")
    for name in ("a.jsonl", "t.tar", "p.parquet"):
        records = open_records(tmp_path / name)
        first = records[0]
        copy = pickle.loads(pickle.dumps(records))
        assert copy[0] == first and len(copy) == 9
        with ThreadPoolExecutor(4) as pool:
            threaded = list(pool.map(copy.__getitem__, [i % 9 for i in range(90)]))
        assert threaded == [records[i % 9] for i in range(90)]


def test_threads_that_begin_together_open_a_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = open_records(write_jsonl(tmp_path / "a.jsonl", ROWS))
    opened, plain = [], os.open

    def slow(path: Any, *given: Any, **named: Any) -> int:
        if str(path).endswith("a.jsonl"):
            time.sleep(0.05)
            opened.append(path)
        return plain(path, *given, **named)

    monkeypatch.setattr(os, "open", slow)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(records.__getitem__, range(4))) == ROWS[:4]
    assert len(opened) == 1, "a descriptor that nobody closes"


def test_lists_and_dataset_objects_are_taken_as_they_are() -> None:
    assert open_records([{"a": 1}])[0] == {"a": 1}
    with pytest.raises(TypeError, match="choose one"):
        open_records({"train": []})
    with pytest.raises(TypeError, match="Streams have no index"):
        open_records(iter([]))


def test_files_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_records(tmp_path / "none.jsonl")
    for name, message in (("x.pkl", "pickles run code"), ("x.jsonl.gz", "unpack it")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=message):
            open_records(tmp_path / name)
    (tmp_path / "cut.json").write_text('[{"a": 1}, {"b"')
    with pytest.raises(ValueError, match="cut off"):
        open_records(tmp_path / "cut.json")
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match=r"record 1 at byte 9"):
        open_records(tmp_path / "bad.jsonl")[1]
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="expected an object, got list"):
        open_records(tmp_path / "list.jsonl")[0]
    (tmp_path / "number.json").write_text("3")
    with pytest.raises(ValueError, match="neither a list nor an object"):
        open_records(tmp_path / "number.json")
    for name, content, message in (
        ("half.json", b'{"a": {"b": 1},\n "c": ', "half.json: is no JSON, nor one object a line"),
        ("half.parquet", b"PAR1 and no more", r"half.parquet: Parquet"),
        ("none.tar", b"no tar" * 200, r"none.tar: .*is it a tar"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_records(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a folder without"):
        open_records(tmp_path / "empty")


def test_hugging_face_datasets_are_read_for_real(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    from PIL import Image

    from longvila.data.datasets import open_dataset, read_file

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Image.new("RGB", (8, 6), (9, 90, 9)).save(tmp_path / "a.png")
    rows = [
        {
            "id": str(n),
            "image": str(tmp_path / "a.png"),
            "conversations": [
                {"from": "human", "value": f"<image>\nQuestion {n}?"},
                {"from": "gpt", "value": "Green."},
            ],
        }
        for n in range(5)
    ]
    whole = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    whole.save_to_disk(str(tmp_path / "disk"))
    datasets.DatasetDict({"train": whole}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "parquet").mkdir()
    whole.to_parquet(str(tmp_path / "parquet" / "train-0.parquet"))
    named = f"hf:{tmp_path / 'parquet'}#train"
    (tmp_path / "sets.yaml").write_text(
        "datasets:\n"
        "  disk: {adapter: llava, path: disk}\n"
        f"  hub: {{adapter: llava, path: '{named}'}}\n"
    )
    listed = read_file(tmp_path / "sets.yaml").datasets
    shuffled = whole.select([4, 3, 2, 1, 0]).select([4, 3, 2, 1, 0])
    for dataset in (open_dataset("llava", shuffled), listed["disk"], listed["hub"]):
        assert [sample.turns[0].text for sample in dataset] == [f"Question {n}?" for n in range(5)]
        assert len(dataset) == 5
        # Pictures are not decoded for their records; a file keeps its bytes.
        source = dataset[1].media[0].source
        assert isinstance(source, str | bytes)
        assert len(pickle.loads(pickle.dumps(dataset.records))) == 5
    assert isinstance(listed["disk"][0].media[0].source, bytes)
    with pytest.raises(ValueError, match=r"holds the splits \['train'\]; name one"):
        open_records(tmp_path / "splits")
    assert len(open_records(tmp_path / "splits" / "train")) == 5
    with pytest.raises(TypeError, match="a mapping of"):
        open_records(datasets.DatasetDict({"train": whole}))
    with pytest.raises(TypeError, match="Streams have no index"):
        open_records(whole.to_iterable_dataset())


def test_datasets_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="hf:owner/set: pip install datasets"):
        open_records("hf:owner/set")


@pytest.mark.parametrize("text", ['{"a": "\\ud800 half"}', '{"a": ' + "[" * 10**5])
def test_a_line_that_is_no_text_is_one_bad_record(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "\\ud83d\\ude00"}\n' + text + '\n{"a": 2}\n')
    records = open_records(path)
    assert records[0]["a"] == "\N{GRINNING FACE}" and records[2]["a"] == 2
    with pytest.raises(RecordError, match=r"a\.jsonl, record 1 at byte"):
        records[1]


@pytest.mark.timeout(20)
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    for source in (tmp_path / "a.jsonl", tmp_path):
        with pytest.raises(ValueError, match="not a regular file"):
            open_records(source)


def test_damaged_parquet_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": [f"{n} words" for n in range(500)]}), path)
    content = path.read_bytes()
    path.write_bytes(content[:60] + bytes(x ^ 0x55 for x in content[60:160]) + content[160:])
    with pytest.raises(ValueError, match=r"a\.parquet, rows from 0: .*is the file damaged"):
        open_records(path)[0]
