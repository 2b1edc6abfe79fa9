"""Nothing outside the roots is ever opened, whatever it is called."""

from __future__ import annotations

import base64
import os
import socket
from pathlib import Path

import pytest

from longvila.inference.serving.access import Gate, Opened, shorten
from longvila.inference.serving.errors import RequestError
from longvila.inference.serving.settings import Access, Limits
from longvila.inference.serving.uploads import Uploads

LIMITS = Limits(media_bytes=1000)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two roots beside what must stay unread."""
    for name in ("root/deep/er", "second", "rootless"):
        (tmp_path / name).mkdir(parents=True)
    for name in (
        "root/a.mp4", "root/deep/b c%20.mp4", "root/deep/er/c.mp4", "second/d.mp4",
        "rootless/secret.mp4", "secret.mp4",
    ):  # fmt: skip
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "root/out.mp4").symlink_to(tmp_path / "secret.mp4")
    (tmp_path / "root/in.mp4").symlink_to(tmp_path / "root/a.mp4")
    (tmp_path / "root/outside").symlink_to(tmp_path / "rootless")
    (tmp_path / "root/up").symlink_to("..")
    (tmp_path / "root/empty.mp4").touch()
    (tmp_path / "root/large.mp4").write_bytes(b"x" * 1001)
    os.mkfifo(tmp_path / "root/pipe.mp4")
    with socket.socket(socket.AF_UNIX) as plug:
        plug.bind(str(tmp_path / "root/plug.mp4"))
    return tmp_path


@pytest.fixture
def gate(tree: Path) -> Gate:
    return Gate(Access(roots=(tree / "root", tree / "second")), LIMITS, Uploads(100))


def read(gate: Gate, url: str) -> bytes:
    with gate.open(url, timeout_s=5) as opened:
        return opened.source if isinstance(opened.source, bytes) else opened.source.read_bytes()


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("a.mp4", "root/a.mp4"),
        ("./deep//er/c.mp4", "root/deep/er/c.mp4"),
        ("deep/b c%20.mp4", "root/deep/b c%20.mp4"),
        ("file://{tree}/root/deep/b%20c%2520.mp4", "root/deep/b c%20.mp4"),
        ("file://localhost{tree}/root/a.mp4", "root/a.mp4"),
        ("FILE:{tree}/root/a.mp4", "root/a.mp4"),
        ("{tree}/second/d.mp4", "second/d.mp4"),
        ("d.mp4", "second/d.mp4"),
    ],
)
def test_files_below_a_root_are_read(gate: Gate, tree: Path, url: str, name: str) -> None:
    assert read(gate, url.replace("{tree}", str(tree))) == name.encode()


def test_a_root_has_the_name_that_the_operator_gave_it(tree: Path) -> None:
    (tree / "data").symlink_to(tree / "root")
    linked = Gate(Access(roots=(tree / "data" / "deep",)), LIMITS, Uploads(100))
    for name in ("data", "root"):
        assert read(linked, f"{tree}/{name}/deep/er/c.mp4") == b"root/deep/er/c.mp4"
        with pytest.raises(RequestError, match="not a file in the folders"):
            read(linked, f"{tree}/{name}/a.mp4")


@pytest.mark.parametrize(
    "url",
    [
        "{tree}/secret.mp4",
        "{tree}/nothing.mp4",
        "{tree}/rootless/secret.mp4",
        "file://{tree}/secret.mp4",
        "file://{tree}/root/../secret.mp4",
        "file://{tree}/root/%2e%2e/secret.mp4",
        "file://{tree}/root/deep/..%2f..%2fsecret.mp4",
        "../secret.mp4",
        "deep/../../secret.mp4",
        "deep/../a.mp4",
        "..",
        ".",
        "/",
        "",
        "file:",
        "file://",
        "file://elsewhere/root/a.mp4",
        "file://{tree}/root/a.mp4?x",
        "file://[broken/root/a.mp4",
        "a.mp4\0.txt",
        "file://{tree}/root/a.mp4%00.txt",
        "deep\\..\\..\\secret.mp4",
        "out.mp4",
        "in.mp4",
        "outside/secret.mp4",
        "up/secret.mp4",
        "{tree}/root/up/secret.mp4",
        "deep",
        "pipe.mp4",
        "plug.mp4",
        "a.mp4/",
        "a.mp4/x",
        "/dev/zero",
        "/proc/self/environ",
        "/etc/passwd",
        "~/.ssh/id_rsa",
        "x" * 5000,
    ],
)
def test_everything_else_is_refused_in_the_same_words(gate: Gate, tree: Path, url: str) -> None:
    if url == "a.mp4/":  # a trailing slash says nothing about a file
        assert read(gate, url) == b"root/a.mp4"
        return
    with pytest.raises(RequestError, match="not a file in the folders") as caught:
        read(gate, url.replace("{tree}", str(tree)))
    assert caught.value.status == 403
    assert len(caught.value.message) < 200


def test_names_are_refused_before_their_turn(gate: Gate, tree: Path) -> None:
    gate.admit("a.mp4")
    gate.admit("data:video/mp4;base64,!!!!")  # looked at when it is decoded
    for url in ("../secret.mp4", "out.mp4", "upload:none", "http://example.org/", "ftp://x/"):
        with pytest.raises(RequestError):
            gate.admit(url)
    fetching = Gate(Access(http=True), LIMITS, Uploads(1))
    fetching.admit("http://some.example/film.mp4")
    with pytest.raises(RequestError, match="name or a password"):
        fetching.admit("http://a:b@some.example/film.mp4")


def test_percent_signs_that_are_no_text_are_refused(gate: Gate, tree: Path) -> None:
    with pytest.raises(RequestError) as caught:
        read(gate, f"file://{tree}/root/%ff.mp4")
    assert caught.value.status == 403


def test_a_root_may_be_a_link_but_must_be_a_folder(tree: Path) -> None:
    (tree / "linked").symlink_to(tree / "second")
    gate = Gate(Access(roots=(tree / "linked",)), LIMITS, Uploads(1))
    assert read(gate, "d.mp4") == b"second/d.mp4"
    with pytest.raises(ValueError, match="must be a folder"):
        Gate(Access(roots=(tree / "secret.mp4",)), LIMITS, Uploads(1))


def test_no_root_no_files(tree: Path) -> None:
    gate = Gate(Access(), LIMITS, Uploads(1))
    with pytest.raises(RequestError, match="--root") as caught:
        read(gate, f"{tree}/root/a.mp4")
    assert caught.value.status == 403


def test_sizes(gate: Gate) -> None:
    with pytest.raises(RequestError, match="at most 1000") as caught:
        read(gate, "large.mp4")
    assert caught.value.status == 413
    with pytest.raises(RequestError, match="empty"):
        read(gate, "empty.mp4")
    with pytest.raises(RequestError, match="at most 1000"):
        read(gate, "data:video/mp4;base64," + "A" * 2000)


def test_a_file_that_is_exchanged_is_noticed(gate: Gate, tree: Path) -> None:
    with gate.open("a.mp4", timeout_s=5) as opened:
        opened.check()
        (tree / "root/a.mp4").unlink()
        with pytest.raises(RequestError, match="changed"):
            opened.check()
        (tree / "root/a.mp4").symlink_to(tree / "secret.mp4")
        with pytest.raises(RequestError, match="changed"):
            opened.check()
    Opened("bytes", b"1").check()


@pytest.mark.parametrize(
    ("url", "data"),
    [
        ("data:video/mp4;base64," + base64.b64encode(b"abc").decode(), b"abc"),
        ("DATA:;BASE64,YWJj", b"abc"),
        ("data:image/png;charset=x;base64,YWJj", b"abc"),
    ],
)
def test_data(gate: Gate, url: str, data: bytes) -> None:
    assert read(gate, url) == data


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:,abc",
        "data:video/mp4,abc",
        "data:;base64,",
        "data:;base64,a b",
        "data:;base64,ü",
    ],
)
def test_data_that_is_none(gate: Gate, url: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(gate, url)
    assert caught.value.status == 400 and caught.value.code == "invalid_media"


@pytest.mark.parametrize("url", ["gopher://x/1", "rtsp://x/1", "concat:a.mp4|b.mp4", "pipe:0"])
def test_other_schemes(gate: Gate, url: str) -> None:
    with pytest.raises(RequestError, match="named by"):
        read(gate, url)


def test_names_in_messages_are_short_and_printable() -> None:
    assert shorten("a\n\x1b[31mb") == "a??[31mb"
    assert len(shorten("x" * 500)) == 80
