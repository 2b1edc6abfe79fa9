"""Addresses: only public ones, whatever names, forms and redirects they hide behind."""

from __future__ import annotations

import http.server
import ipaddress
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from longvila.inference.serving.errors import Cancelled, RequestError
from longvila.inference.serving.fetch import Fetcher, is_public, resolve_host
from longvila.inference.serving.settings import Access

NAMES = {"good.example": "127.0.0.1", "inner.example": "10.0.0.7"}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, str]]

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["Host"]))
        if self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", self.path.partition("?")[2])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path == "/nowhere":
            self.send_response(302)
            self.end_headers()
            return
        body = b"film" * (1000 if self.path == "/large" else 1)
        self.send_response(404 if self.path == "/missing" else 200)
        if self.path == "/drip":
            self.end_headers()
            for _ in range(1200):
                self.wfile.write(b"x")
                time.sleep(0.05)
            return
        if self.path == "/short":
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True
            return
        if self.path == "/large":
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the fetcher hung up
            self.close_connection = True

    def log_message(self, *arguments: Any) -> None:
        return


@pytest.fixture
def site() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A site on this machine, as ``host:port``, and what it was asked."""
    Handler.seen = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"good.example:{server.server_address[1]}", Handler.seen
    server.shutdown()
    thread.join()
    server.server_close()


def fetcher(**changes: Any) -> Fetcher:
    values: dict[str, Any] = {"http": True, "networks": ("127.0.0.0/8",), **changes}
    return Fetcher(Access(**values), resolver=lambda host, port: [NAMES[host]])


def fetch(url: str, who: Fetcher | None = None, **options: Any) -> bytes:
    options = {"max_bytes": 100, "timeout_s": 120.0, **options}
    path = (who or fetcher()).fetch(url, **options)
    try:
        return path.read_bytes()
    finally:
        path.unlink()


def test_a_file_is_fetched_from_the_address_that_was_checked(site: Any) -> None:
    host, seen = site
    assert fetch(f"http://{host}/film.mp4?x=1#part") == b"film"
    assert seen == [("/film.mp4?x=1", host)]


def test_a_name_that_turns_elsewhere_is_not_followed(site: Any) -> None:
    """The name is resolved once; what it says a moment later does not matter."""
    host, seen = site
    answers = iter(["127.0.0.1", "10.0.0.7"])
    who = Fetcher(
        Access(http=True, networks=("127.0.0.1/32",)),
        resolver=lambda host, port: [next(answers)],
    )
    assert fetch(f"http://{host}/film.mp4", who) == b"film"
    with pytest.raises(RequestError, match="not public"):
        fetch(f"http://{host}/film.mp4", who)
    assert len(seen) == 1


def test_redirects_are_checked_anew(site: Any) -> None:
    host, seen = site
    assert fetch(f"http://{host}/to?/film.mp4") == b"film"
    assert fetch(f"http://{host}/to?http://{host}/film.mp4") == b"film"
    seen.clear()
    for target in (
        "http://inner.example/", "http://169.254.169.254/latest/meta-data/", "http://[::1]:22/",
        "file:///etc/passwd", "ftp://good.example/", "http://user:pass@good.example/",
    ):  # fmt: skip
        with pytest.raises(RequestError) as caught:
            fetch(f"http://{host}/to?{target}")
        assert caught.value.status == 403, target
    assert len(seen) == 6
    loop = f"http://{host}/to?" + f"http://{host}/to?" * 9
    with pytest.raises(RequestError, match="more than 5 times"):
        fetch(loop)
    with pytest.raises(RequestError, match="redirects nowhere"):
        fetch(f"http://{host}/nowhere")


def test_https_is_not_left() -> None:
    who = fetcher()
    steps = iter(["http://good.example/"])
    who._get = lambda *a: next(steps)  # type: ignore[method-assign]
    with pytest.raises(RequestError, match="from https to http"):
        fetch("https://good.example/", who)


PRIVATE = [
    "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "192.0.0.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:a9fe:a9fe", "fe80::1", "fc00::1",
    "fd00:ec2::254", "ff02::1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a00:1",
    "2002:7f00:1::", "2002:a00:1::1", "2001:0:4136:e378:8000:63bf:f5ff:fffe", "2001:db8::1",
    "::ffff:93.184.216.34",  # no address of the public network is written so
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    host = f"[{address}]" if ":" in address else address
    closed = Fetcher(Access(http=True), resolver=lambda host, port: [address])
    for url in (f"http://{host}/", "http://some.example/", "https://some.example/"):
        with pytest.raises(RequestError, match="not public") as caught:
            fetch(url, closed)
        assert caught.value.status == 403


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_one_private_address_among_public_ones_is_enough() -> None:
    mixed = Fetcher(Access(http=True), resolver=lambda host, port: ["93.184.216.34", "10.0.0.1"])
    with pytest.raises(RequestError, match="not public"):
        fetch("http://some.example/", mixed)


@pytest.mark.parametrize(
    "url",
    [
        "http://2130706433/", "http://0x7f.1/", "http://0177.0.0.1/", "http://127.1/",
        "http://localhost/", "http://localhost.:80/",
    ],
)  # fmt: skip
def test_odd_spellings_of_this_machine(url: str) -> None:
    """Whatever the system's resolver makes of them is checked."""
    closed = Fetcher(Access(http=True), resolver=resolve_host)
    with pytest.raises(RequestError):
        fetch(url, closed)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://user@93.184.216.34/", "name or a password"),
        ("http://user:pass@93.184.216.34/", "name or a password"),
        ("http:///film", "with a host"),
        ("http:film", "with a host"),
        ("http://93.184.216.34:22/", "port 22"),
        ("http://93.184.216.34:99999/", "understood"),
        ("http://[::1/", "understood"),
        ("http://93.184.216.34/a\r\nX: y", "plain ASCII"),
        ("http://93.184.216.34/a b", "plain ASCII"),
        ("http://93.184.216.34\\@10.0.0.1/", "name or a password"),
        ("http://93.184.216.34/" + "x" * 3000, "longer"),
        ("http://bücher.example/", "plain ASCII"),
    ],
)
def test_addresses_that_are_no_addresses(url: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        fetch(url, Fetcher(Access(http=True)))


def test_switched_off() -> None:
    with pytest.raises(RequestError, match="data: URI") as caught:
        fetch("http://93.184.216.34/", Fetcher(Access()))
    assert caught.value.status == 403


def test_sizes_and_times(site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    host, _ = site
    for path, options, says in (
        ("large", {}, "more than the 100 bytes"),
        ("film", {"max_bytes": 3}, "more than the 3 bytes"),
        ("missing", {}, "answers 404"),
        ("short", {}, "ended before"),
        ("drip", {"timeout_s": 0.3}, "."),
    ):
        start = time.monotonic()
        with pytest.raises(RequestError, match=says):
            fetch(f"http://{host}/{path}", **options)
        assert time.monotonic() - start < 30
    with pytest.raises(RequestError, match="cannot be fetched"):
        fetch("http://127.0.0.1:9/")
    assert not list(tmp_path.iterdir()), "a part of a file was left behind"


def test_a_fetch_is_given_up_when_nobody_waits(site: Any) -> None:
    host, _ = site
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        fetch(f"http://{host}/drip", check=check)
