"""Fetching a public address for a client, without becoming its way into the network here.

For the address and for every redirect anew:

1. Scheme, host and port are checked; names and passwords in an address are refused.
2. The host is resolved once. If any of its addresses is not public (loopback, private, link-local,
   carrier or cloud metadata, multicast, an IPv4 address wrapped in IPv6), it is refused.
3. The connection goes to the very address that was checked, so a name that resolves differently a
   moment later changes nothing. TLS is verified for the name.
4. What comes is counted and timed while it is written to a file.

Proxies of the environment are not used: they would resolve the name again. Cookies and credentials
are never sent.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longvila.inference.serving.errors import RequestError
from longvila.inference.serving.settings import Access

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
#: Host and port to the texts of its addresses.
Resolver = Callable[[str, int], list[str]]
_CHUNK = 1 << 20
_STEP_S = 15.0
_LONGEST_ADDRESS = 2048


def resolve_host(host: str, port: int) -> list[str]:
    """Return the addresses of a host."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(item[4][0]) for item in found]


def unwrap(address: Address) -> list[Address]:
    """Return an address and the IPv4 addresses that it carries inside."""
    found: list[Address] = [address]
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            found.append(address.ipv4_mapped)
        if address.sixtofour is not None:
            found.append(address.sixtofour)
        if address.teredo is not None:
            found += address.teredo
        if address in ipaddress.ip_network("64:ff9b::/96") or address in ipaddress.ip_network(
            "64:ff9b:1::/48"
        ):
            found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return found


def is_public(address: Address) -> bool:
    """Whether an address, and whatever it wraps, belongs to the public network."""
    return all(
        one.is_global
        and not (one.is_multicast or one.is_reserved or one.is_unspecified or one.is_link_local)
        for one in unwrap(address)
    )


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed meanwhile
        connection.shutdown(socket.SHUT_RDWR)


class Fetcher:
    """Fetches addresses into files.

    Args:
        access: What may be reached.
        resolver: Turns a host into addresses.
        tls: Context of https connections.
    """

    def __init__(
        self,
        access: Access,
        *,
        resolver: Resolver = resolve_host,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.access, self.resolver = access, resolver
        self.networks = [ipaddress.ip_network(text) for text in access.networks]
        self.tls = tls or ssl.create_default_context()

    def admit(self, url: str) -> None:
        """Refuse what can be refused without asking the network.

        Raises:
            RequestError: If addresses are not fetched, or this is none.
        """
        if not self.access.http:
            raise RequestError(
                "this server does not fetch addresses; send the medium as a data: URI",
                status=403,
                code="http_disabled",
            )
        self._parse(url)

    def fetch(
        self,
        url: str,
        *,
        max_bytes: int,
        timeout_s: float,
        check: Callable[[], None] = lambda: None,
    ) -> Path:
        """Fetch an address.

        Args:
            url: An http(s) address.
            max_bytes: Most bytes.
            timeout_s: Most seconds.
            check: Called now and then; raises to stop.

        Returns:
            A temporary file, which the caller removes.

        Raises:
            RequestError: If it may not or cannot be fetched.
        """
        self.admit(url)
        deadline = time.monotonic() + timeout_s
        for _ in range(self.access.redirects + 1):
            check()
            further = self._get(url, max_bytes, deadline, check)
            if isinstance(further, Path):
                return further
            if url.lower().startswith("https:") and further.lower().startswith("http:"):
                raise self._refuse("the address redirects from https to http")
            url = further
        raise self._refuse(f"the address redirects more than {self.access.redirects} times")

    # ---- one address

    def _get(
        self, url: str, max_bytes: int, deadline: float, check: Callable[[], None]
    ) -> Path | str:
        parts, host, port = self._parse(url)
        address = self._choose(host, port)
        left = max(0.1, min(_STEP_S, deadline - time.monotonic()))
        path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        try:
            connection = self._connect(parts.scheme, host, port, address, left)
            # A wait for one byte is bounded by the socket, many of them by this.
            timer = threading.Timer(deadline - time.monotonic(), _hang_up, (connection.sock,))
            timer.daemon = True
            timer.start()
            try:
                connection.request(
                    "GET", path, headers={"User-Agent": "longvila", "Accept-Encoding": "identity"}
                )
                answer = connection.getresponse()
                if answer.status in (301, 302, 303, 307, 308):
                    target = answer.getheader("Location")
                    if not target:
                        raise self._failed("redirects nowhere")
                    return urllib.parse.urljoin(url, target)
                if answer.status != 200:
                    raise self._failed(f"answers {answer.status}")
                return self._save(answer, max_bytes, deadline, check)
            finally:
                timer.cancel()
                connection.close()
        except (OSError, ValueError, http.client.HTTPException) as fault:
            # Which of the hosts here answer, and how, is nobody's business.
            raise self._failed("cannot be fetched") from fault

    def _parse(self, url: str) -> tuple[urllib.parse.SplitResult, str, int]:
        if len(url) > _LONGEST_ADDRESS or not url.isascii() or any(ord(c) <= 32 for c in url):
            raise self._refuse("the address is longer than addresses are, or not plain ASCII")
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
        except ValueError as fault:
            raise self._refuse("the address cannot be understood") from fault
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise self._refuse("only http:// and https:// addresses with a host are fetched")
        if parts.username is not None or parts.password is not None or "\\" in url:
            raise self._refuse("an address must not carry a name or a password")
        return parts, parts.hostname, port

    def _choose(self, host: str, port: int) -> str:
        """Return an address of a host that may be contacted; refuse if any may not."""
        try:
            texts = [str(ipaddress.ip_address(host))]
        except ValueError:
            try:
                texts = self.resolver(host, port)
            except (OSError, UnicodeError) as fault:
                raise self._failed("has a host that cannot be found") from fault
        if not texts:
            raise self._failed("has a host that cannot be found")
        for text in texts:
            address = ipaddress.ip_address(text.partition("%")[0])
            listed = any(address in network for network in self.networks)
            if not listed and not is_public(address):
                raise self._refuse("the address leads to a network that is not public")
            if not listed and port not in self.access.ports:
                raise self._refuse(
                    f"port {port} is not contacted; only {', '.join(map(str, self.access.ports))}"
                )
        return texts[0]

    def _connect(
        self, scheme: str, host: str, port: int, address: str, timeout_s: float
    ) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
        plain = socket.create_connection((address, port), timeout=timeout_s)
        try:
            connection.sock = (
                self.tls.wrap_socket(plain, server_hostname=host) if scheme == "https" else plain
            )
        except BaseException:
            plain.close()
            raise
        if scheme == "https":
            connection.default_port = 443
        return connection

    def _save(
        self, answer: Any, max_bytes: int, deadline: float, check: Callable[[], None]
    ) -> Path:
        promised = answer.getheader("Content-Length")
        if promised is not None and promised.isdecimal() and int(promised) > max_bytes:
            raise self._too_large(max_bytes)
        size = 0
        with tempfile.NamedTemporaryFile(prefix="longvila-", delete=False) as out:
            path = Path(out.name)
            try:
                # read1 returns what has come, so that a slow trickle meets the deadline.
                while chunk := answer.read1(_CHUNK):
                    size += len(chunk)
                    if size > max_bytes:
                        raise self._too_large(max_bytes)
                    if time.monotonic() > deadline:
                        raise self._failed("was not fetched in time")
                    check()
                    out.write(chunk)
                if time.monotonic() > deadline:  # the end may be our own hanging up
                    raise self._failed("was not fetched in time")
                if promised is not None and promised.isdecimal() and size < int(promised):
                    raise self._failed("ended before all of it had come")
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        return path

    @staticmethod
    def _refuse(message: str) -> RequestError:
        return RequestError(message, status=403, code="address_refused")

    @staticmethod
    def _failed(what: str) -> RequestError:
        return RequestError(f"the address {what}", code="fetch_failed")

    @staticmethod
    def _too_large(max_bytes: int) -> RequestError:
        return RequestError(
            f"the address holds more than the {max_bytes} bytes taken; send a smaller file",
            status=413,
            code="media_too_large",
        )
