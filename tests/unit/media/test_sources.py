"""What a user may name, and what is refused."""

from __future__ import annotations

import base64
import http.server
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from longvila.errors import VideoError
from longvila.media.image import ImageError
from longvila.media.sources import Limits, natural_key, resolve
from longvila.media.synthetic import clip, read_number
from longvila.media.video import read_frames


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip(tmp_path_factory.mktemp("sources") / "a film.mp4", 12)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the film, a redirect, a trickle, and things that go wrong."""

    film = b""

    def do_GET(self) -> None:
        if self.path == "/missing.mp4":
            self.send_error(404)
            return
        if self.path in ("/moved.mp4", "/local.mp4"):
            self.send_response(302)
            self.send_header(
                "Location", "/film.mp4" if self.path == "/moved.mp4" else "file:///etc/hostname"
            )
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        if self.path == "/slow.mp4":
            for _ in range(600):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.1)
        elif self.path == "/film.mp4":
            self.wfile.write(self.film)

    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""


class QuietServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: object) -> None:
        """A client that hangs up is what some tests are about."""


@pytest.fixture(scope="module")
def address(film: Path) -> Iterator[str]:
    Handler.film = film.read_bytes()
    server = QuietServer(("127.0.0.1", 0), Handler)
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def numbers(source: object, **options: object) -> list[int | None]:
    return [read_number(f) for f in read_frames(source, num_frames=3, **options).frames]  # type: ignore[arg-type]


def test_every_way_to_name_a_file(film: Path) -> None:
    data = film.read_bytes()
    text = base64.b64encode(data).decode()
    sources = [
        film,
        str(film),
        film.as_uri(),
        f"file://localhost{film.as_uri().removeprefix('file://')}",
        data,
        bytearray(data),
        memoryview(data),
        io.BytesIO(data),
        f"data:video/mp4;base64,{text}",
        text,
    ]
    for source in sources:
        assert numbers(source) == [0, 6, 11]


def test_fetching(address: str) -> None:
    assert numbers(f"{address}/film.mp4") == [0, 6, 11]
    assert numbers(f"{address}/moved.mp4") == [0, 6, 11]


def test_a_download_leaves_nothing_behind(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = resolve(f"{address}/film.mp4")
    assert source.path is not None and source.path.exists()
    source.close()
    source.close()
    numbers(f"{address}/film.mp4")
    for path, limits in [("missing", Limits()), ("film", Limits(max_bytes=10))]:
        with pytest.raises(VideoError):
            resolve(f"{address}/{path}.mp4", limits=limits)
    with pytest.raises(VideoError):
        numbers(f"{address}/empty.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "limits", "message"),
    [
        ("film.mp4", Limits(allow_http=False), "switched off here"),
        ("film.mp4", Limits(max_bytes=100), "more than the 100 bytes allowed"),
        ("slow.mp4", Limits(timeout_s=0.5), "not fetched within 0.5 s"),
        ("missing.mp4", Limits(), "cannot be fetched: HTTP Error 404"),
        ("empty.mp4", Limits(), "the server sent nothing"),
        ("local.mp4", Limits(), "cannot be fetched"),
    ],
)
def test_fetching_is_limited(address: str, path: str, limits: Limits, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(VideoError, match=message) as caught:
        resolve(f"{address}/{path}", limits=limits)
    assert path in str(caught.value)
    assert time.monotonic() - start < 30


def test_allow_http_is_an_option_of_reading(address: str) -> None:
    with pytest.raises(VideoError, match="switched off"):
        read_frames(f"{address}/film.mp4", num_frames=1, allow_http=False)


def test_nobody_listens() -> None:
    with pytest.raises(VideoError, match=r"127\.0\.0\.1:9/a\.mp4: cannot be fetched"):
        resolve("http://127.0.0.1:9/a.mp4")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/film.mp4", r"no/such/film\.mp4: no such file"),
        (Path("no/such/film.mp4"), r"no/such/film\.mp4: no such file"),
        ("", "path of the video or picture is empty"),
        ("ftp://host/film.mp4", "only file://, http:// and https://"),
        ("http://[::1/film.mp4", "is no address"),
        ("file://[::1/film.mp4", "is no address"),
        ("file://elsewhere/film.mp4", "must be on this machine, not 'elsewhere'"),
        ("data:video/mp4;base64", "no comma"),
        ("data:video/mp4;base64,@@@@", "not valid base64"),
        ("data:video/mp4;base64,", "empty"),
        ("x" * 5000 + ".mp4", "too long"),
        ("nul\0byte.mp4", "not a path"),
        (b"", "are empty"),
        ("/dev/null", "not a regular file"),
    ],
)
def test_messages(source: object, message: str) -> None:
    with pytest.raises(VideoError, match=message):
        resolve(source)
    with pytest.raises(ImageError, match=message):
        resolve(source, error=ImageError)


def test_a_large_base64_text_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(VideoError, match="more than the 64 bytes allowed"):
        resolve("A" * 1000, limits=Limits(max_bytes=64))


def test_other_types() -> None:
    with pytest.raises(TypeError, match="got int"):
        resolve(7)


def test_natural_order() -> None:
    names = ["f10.png", "F2.png", "f1.png", "f01b.png", "2.png", "10.png"]
    assert sorted(names, key=natural_key) == [
        "2.png",
        "10.png",
        "f1.png",
        "f01b.png",
        "F2.png",
        "f10.png",
    ]
