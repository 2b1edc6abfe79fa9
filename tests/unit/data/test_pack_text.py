"""Packing text: exact rows, any number of processes, killed at any moment."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from data_cases import write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longvila.data.datasets import open_dataset
from longvila.data.pack_text import PackOptions, pack_text, parse_length
from longvila.data.records import open_records
from longvila.errors import LongVILAError
from longvila.testing.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


TEXTS = [chr(97 + n % 26) * (1 + (n * 37) % 90) for n in range(60)]


def expected(texts: list[str], length: int, least: int = 1) -> tuple[list[list[int]], list[Any]]:
    """Rows by the plainest way: everything in one list, then cut."""
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    stream: list[int] = []
    starts = set()
    for text in texts:
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], end]
        if len(ids) >= least:
            starts.add(len(stream))
            stream += ids
    rows, lengths = [], []
    for first in range(0, len(stream) - length + 1, length):
        edges = [first, *sorted(s for s in starts if first < s < first + length), first + length]
        rows.append(stream[first : first + length])
        lengths.append([b - a for a, b in itertools.pairwise(edges)])
    return rows, lengths


def read(folder: Path) -> tuple[list[list[int]], list[Any]]:
    manifest = json.loads((folder / "manifest.json").read_text())
    rows, lengths = [], []
    for name, number in manifest["progress"]["shards"]:
        dataset = open_dataset("tokens", folder / name)
        assert len(dataset) == number
        for index in range(number):
            sample = dataset[index]
            assert sample.token_ids is not None
            rows.append(sample.token_ids.tolist())
            lengths.append(list(sample.document_lengths))
    return rows, lengths


def options(tmp_path: Path, tokenizer: str, **more: Any) -> PackOptions:
    source = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    values = {"length": 100, "rows_per_shard": 4, "piece_records": 7, **more}
    return PackOptions((str(source),), tmp_path / values.pop("to", "out"), tokenizer, **values)


@pytest.mark.parametrize("form", ["parquet", "jsonl", "upstream"])
def test_rows_are_the_texts_behind_one_another(tmp_path: Path, tokenizer: str, form: Any) -> None:
    progress = pack_text(options(tmp_path, tokenizer, format=form))
    rows, lengths = read(tmp_path / "out")
    assert rows == expected(TEXTS, 100)[0] and len(rows) == progress.rows
    if form == "upstream":
        assert all(
            set(row) == {"text"} for row in open_records(tmp_path / "out" / "rows-00000.json")
        )
    else:
        assert lengths == expected(TEXTS, 100)[1]
    total = sum(len(text) + 1 for text in TEXTS)
    assert progress.counts["tokens"] == total and progress.counts["documents"] == len(TEXTS)
    assert progress.counts["tail"] == total % 100
    assert sum(n for n, _ in progress.histogram.values()) == len(TEXTS)
    assert sum(n for _, n in progress.histogram.values()) == total


@given(
    st.lists(st.integers(0, 40), max_size=12),
    st.integers(1, 30),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 12),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_interrupted_anywhere_the_rows_are_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: str,
    sizes: list[int],
    length: int,
    per_shard: int,
    per_piece: int,
    least: int,
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    texts = [chr(97 + n) * size for n, size in enumerate(sizes)]
    source = write_jsonl(folder / "t.jsonl", [{"text": text} for text in texts])
    chosen = PackOptions(
        (str(source),), folder / "out", tokenizer, length,
        rows_per_shard=per_shard, piece_records=per_piece, min_tokens=least, format="jsonl",
    )  # fmt: skip

    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if not progress.done:
            raise Stop

    for _ in range(1000):
        try:
            pack_text(chosen, report=stop)
            break
        except Stop:
            continue
    assert read(folder / "out") == expected(texts, length, least)
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    kept = [n + 1 for n in sizes if n + 1 >= least]
    assert manifest["progress"]["counts"].get("documents", 0) == len(kept)
    assert manifest["progress"]["counts"].get("tokens", 0) == sum(kept)
    assert manifest["progress"]["counts"].get("short", 0) == len(sizes) - len(kept)


KILLED = """
import os, signal, sys
from pathlib import Path
from longvila.data import pack_text as module
source, out, tokenizer, moment, count = sys.argv[1:]
options = module.PackOptions((source,), Path(out), tokenizer, 100, rows_per_shard=4,
                             piece_records=7)
calls = 0
def die(*_):
    global calls
    calls += 1
    if calls == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
replace = os.replace
if moment == "before":  # a shard or manifest is written but has not its name
    os.replace = lambda a, b: (die(), replace(a, b))
elif moment == "after":  # a shard has its name, the manifest does not know it
    os.replace = lambda a, b: (replace(a, b), die())
module.pack_text(options)
"""


@pytest.mark.parametrize(
    ("moment", "count"), [("after", 1), ("after", 2), ("before", 4), ("after", 5)]
)
def test_killed_at_any_moment_nothing_is_lost(
    tmp_path: Path, tokenizer: str, moment: str, count: int
) -> None:
    chosen = options(tmp_path, tokenizer)
    command = [sys.executable, "-c", KILLED, chosen.sources[0], str(chosen.output), tokenizer]
    done = subprocess.run([*command, moment, str(count)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not json.loads((chosen.output / "manifest.json").read_text())["progress"]["done"]
    pack_text(chosen)
    assert read(chosen.output) == expected(TEXTS, 100)
    assert pack_text(chosen).done and not list(chosen.output.glob(".*"))


def test_processes_do_not_change_the_rows(tmp_path: Path, tokenizer: str) -> None:
    pack_text(options(tmp_path, tokenizer, processes=2))
    assert read(tmp_path / "out") == expected(TEXTS, 100)


def test_every_kind_of_source(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "books").mkdir()
    for number in range(3):
        (tmp_path / "books" / f"{number}.txt").write_text(TEXTS[number] + "\nend")
    lines = tmp_path / "lines.txt"
    lines.write_text("\n\n".join(TEXTS[3:6]) + "\n")
    table = tmp_path / "t.parquet"
    parquet.write_table(pa.Table.from_pylist([{"body": t} for t in TEXTS[6:9]]), table)
    for source, texts, more in (
        ("books", [t + "\nend" for t in TEXTS[:3]], {}),
        ("lines.txt", TEXTS[3:6], {"documents": "line"}),
        ("t.parquet", TEXTS[6:9], {"text_field": "body"}),
    ):
        out = tmp_path / f"out-{source}"
        pack_text(PackOptions((str(tmp_path / source),), out, tokenizer, 10, **more))  # type: ignore[arg-type]
        assert read(out) == expected(texts, 10), source


def test_the_originals_rows_are_packed_again_at_another_length(
    tmp_path: Path, tokenizer: str
) -> None:
    pack_text(options(tmp_path, tokenizer, format="upstream", rows_per_shard=100))
    rows = read(tmp_path / "out")[0]
    pack_text(PackOptions((str(tmp_path / "out"),), tmp_path / "longer", tokenizer, 250))
    longer, lengths = read(tmp_path / "longer")
    flat = [i for row in rows for i in row]
    assert [i for row in longer for i in row] == flat[: len(flat) // 250 * 250]
    assert lengths[0] == [100, 100, 50] and lengths[1] == [50, 100, 100]
    pack_text(options(tmp_path, tokenizer, to="ours", rows_per_shard=100))
    again = tmp_path / "again"
    source = str(tmp_path / "ours" / "rows-00000.parquet")
    pack_text(PackOptions((source,), again, tokenizer, 50, text_field="input_ids"))
    assert [i for row in read(again)[0] for i in row] == flat


def test_a_format_that_cannot_be_written_is_told_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"longvila\[train\]"):
        pack_text(PackOptions(("nothing",), tmp_path / "out", "none", 100))
    assert not (tmp_path / "out").exists()


def test_the_last_row_may_be_kept(tmp_path: Path, tokenizer: str) -> None:
    progress = pack_text(options(tmp_path, tokenizer, keep_tail=True))
    rows = read(tmp_path / "out")[0]
    assert len(rows[-1]) == progress.counts["tail"] < 100
    assert progress.rows == len(rows)


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path, tokenizer: str) -> None:
    pack_text(options(tmp_path, tokenizer))
    with pytest.raises(ValueError, match=r"rows of other sources or settings \(length 100"):
        pack_text(options(tmp_path, tokenizer, length=50))
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="but no manifest"):
        pack_text(options(tmp_path, tokenizer))


def test_a_folder_is_read_whole_or_refused(tmp_path: Path, tokenizer: str) -> None:
    books = tmp_path / "books"
    (books / "more").mkdir(parents=True)
    (books / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\n")
    (books / "more" / "B.TXT").write_text("three")
    chosen = PackOptions((str(books),), tmp_path / "out", tokenizer, 5, documents="line")
    pack_text(chosen)
    assert read(tmp_path / "out") == expected(["one", "two", "three"], 5)
    for name, message in (
        ("c.jsonl", r"a folder of \.txt and \.jsonl, of which only one kind"),
        ("more/d.txt.gz", r"compressed files, which have no offsets \(.*d\.txt\.gz, 1 in all"),
    ):
        (books / name).write_text("{}")
        with pytest.raises(ValueError, match=message):
            pack_text(PackOptions((str(books),), tmp_path / "other", tokenizer, 6))
        (books / name).unlink()
    with pytest.raises(ValueError, match=r"rows lies in .*books: what is written there"):
        pack_text(PackOptions((str(books),), books / "rows", tokenizer, 5))


def test_hidden_files_are_no_texts(tmp_path: Path, tokenizer: str) -> None:
    folder = tmp_path / "texts"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("a.txt", "._a.txt", ".ipynb_checkpoints/a-checkpoint.txt", "._b.jsonl"):
        (folder / name).write_text("words " * 50)
    packed = pack_text(PackOptions((str(folder),), tmp_path / "out", tokenizer, 10))
    assert packed.counts["documents"] == 1


def test_a_source_that_grew_is_read_anew_in_the_same_process(
    tmp_path: Path, tokenizer: str
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS[:20]])
    for number, texts in enumerate((TEXTS[:20], TEXTS)):
        write_jsonl(source, [{"text": text} for text in texts])
        pack = PackOptions((str(source),), tmp_path / f"out{number}", tokenizer, 100)
        assert pack_text(pack).counts["documents"] == len(texts)
        assert read(pack.output) == expected(texts, 100)


def test_rows_that_do_not_add_up_are_refused(tmp_path: Path, tokenizer: str) -> None:
    for number, (row, message) in enumerate(
        (
            ({"text": [1, 2, 3], "document_lengths": [1, 1]}, "3 ids, but .* add up to 2"),
            ({"text": [1, 2], "document_lengths": [3, -1]}, "add up to 2"),
            ({"text": [1, -5]}, "ids from -5 to 1 are no token ids"),
            ({"text": [1, 1 << 31]}, "to 2147483648 are no token ids"),
        )
    ):
        source = write_jsonl(tmp_path / f"{number}.jsonl", [{"text": "ab"}, row])
        with pytest.raises(ValueError, match=rf"{number}\.jsonl, record 1: .*{message}"):
            pack_text(PackOptions((str(source),), tmp_path / f"{number}", tokenizer, 5))


def test_one_run_at_a_time_and_nothing_of_it_missing(tmp_path: Path, tokenizer: str) -> None:
    chosen = options(tmp_path, tokenizer)

    def second(progress: Any) -> None:
        with pytest.raises(LongVILAError, match="another run is at work in"):
            pack_text(chosen)

    pack_text(chosen, report=second)
    (chosen.output / "rows-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"rows-00001.parquet was written and is gone"):
        pack_text(chosen)
    for damaged in ("", "{}", '{"fingerprint": 1, "version": 1, "progress": {"no": 1}}'):
        (chosen.output / "manifest.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"manifest.json is damaged .* begin again"):
            pack_text(chosen)


def test_a_process_that_is_ended_from_outside_is_said(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed:
        def result(self) -> None:
            raise BrokenProcessPool("ended")

    monkeypatch.setattr(ProcessPoolExecutor, "submit", lambda *_: Killed())
    with pytest.raises(LongVILAError, match=r"ended from outside.*fewer processes"):
        pack_text(options(tmp_path, tokenizer, processes=2))


def test_wrong_inputs_say_why(tmp_path: Path, tokenizer: str) -> None:
    with pytest.raises(ValueError, match=r"record 0: no field 'body', only \['text'\]"):
        pack_text(options(tmp_path, tokenizer, text_field="body"))
    assert pack_text(options(tmp_path, tokenizer)).done  # nothing is left of the wrong settings
    with pytest.raises(ValueError, match="no token '<end>'"):
        pack_text(options(tmp_path, tokenizer, to="b", end_token="<end>"))
    with pytest.raises(ValueError, match="format must be"):
        options(tmp_path, tokenizer, format="csv")
    with pytest.raises(ValueError, match="at least one source"):
        PackOptions((), tmp_path, tokenizer, 5)
    with pytest.raises(ValueError, match="length must be at least 1"):
        options(tmp_path, tokenizer, length=0)
    with pytest.raises(FileNotFoundError, match="no such file"):
        pack_text(PackOptions((str(tmp_path / "none.txt"),), tmp_path / "x", tokenizer, 5))
    with pytest.raises(ValueError, match="rows_per_shard must be at least 1, got 0"):
        options(tmp_path, tokenizer, rows_per_shard=0)
    for name, content, message in (
        ("latin.txt", b"caf\xe9", r"latin.txt: is no UTF-8"),
        ("number.jsonl", b'{"text": 5}', "must be a text or a list of token ids, got '5'"),
        ("null.jsonl", b'{"text": null}', "got 'None'"),
        ("half.jsonl", b'{"text": [1.5, 2]}', r"got '\[1.5, 2\]'"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            pack_text(PackOptions((str(tmp_path / name),), tmp_path / name[:4], tokenizer, 5))


@pytest.mark.parametrize(
    ("text", "length"), [("64k", 65536), ("1M", 1 << 20), (" 512K", 1 << 19), ("100", 100), (7, 7)]
)
def test_lengths_are_read(text: str | int, length: int) -> None:
    assert parse_length(text) == length


@pytest.mark.parametrize("text", ["", "k", "0", "1.5M", "64kb"])
def test_wrong_lengths_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a number like 65536"):
        parse_length(text)
