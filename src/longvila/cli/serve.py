"""Serve a model to OpenAI clients.

Examples:
    longvila serve --model CHECKPOINT
    longvila serve --model CHECKPOINT --root /data/videos --port 8080
    longvila serve --model CHECKPOINT --host 0.0.0.0 --key-file keys.txt --host-names gpu7 --http
    longvila serve --model CHECKPOINT --gpus 8

Requests may carry media as data: URIs. Files are read only below a --root, addresses are fetched
only with --http, and then only public ones. The server listens on this machine alone unless --host
says otherwise; then give out keys. With several GPUs each reads its part of every prompt and keeps
its part of the caches; the answers are those of one.
"""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvila.cli._options import ModelOptions, parse
from longvila.cli.ask import find_device, open_engine, run_over_ranks
from longvila.errors import LongVILAError

if TYPE_CHECKING:
    from longvila.inference.serving.app import Server
    from longvila.inference.serving.settings import Settings
    from longvila.inference.workers import Ranks

log = logging.getLogger(__name__)

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Bounds:
    """Limits on requests."""

    body_mib: int = 256
    """Size of a request, media in it counted."""
    held_mib: int = 2048
    """Requests under way together."""
    text_chars: int = 8388608
    """Characters of a conversation's text."""
    upload_mib: int = 4096
    """Size of an uploaded file."""
    stored_mib: int = 16384
    """Uploaded files together."""
    media_items: int = 16
    """Images and videos of a conversation."""
    media_mib: int = 8192
    """Size of one file or download."""
    frames: int = 2048
    """Frames of a conversation's videos."""
    duration_s: float = 21600.0
    """Length of a video."""
    decoded_mib: int = 16384
    """Frames of a video, for models that take them in their own size."""
    prompt_tokens: int | None = None
    """Tokens of a prompt; what the context holds if absent."""
    new_tokens: int = 4096
    """Tokens of an answer."""
    active: int = 16
    """Requests that the model works on at once; a client has half of the places at most."""
    preparing: int = 4
    """Requests whose media are decoded at once; likewise."""
    waiting: int = 64
    """Requests in the queue."""
    per_client: int = 16
    """Requests of one client at once."""
    wait_s: float = 900.0
    """Longest wait in the queue."""
    media_s: float = 600.0
    """Longest fetching and decoding of a request's media."""


@dataclass(frozen=True)
class Options(ModelOptions):
    """Serve a model to OpenAI clients."""

    name: str | None = None
    """What requests call the model; the last part of --model if absent."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 for any that is free."""
    host_names: tuple[str, ...] = ()
    """Names that requests may be addressed to, beside --host; * for any."""
    key_file: Path | None = None
    """File with the keys that clients present, one a line."""
    root: tuple[Path, ...] = ()
    """Folders whose files requests may name."""
    http: bool = False
    """Fetch http(s) addresses."""
    http_networks: tuple[str, ...] = ()
    """Networks that may be fetched from although they are not public, such as 10.1.0.0/16."""
    frames: int | None = None
    """Frames sampled from a video where a request does not say."""
    max_new_tokens: int = 512
    """Longest answer where a request does not say."""
    temperature: float = 0.0
    """Of sampling where a request does not say; 0 takes the likeliest token."""
    kv_gib: float | None = None
    """Memory for keys and values, in use and kept; most of what the GPU has left if absent."""
    media_cache_mib: int = 1024
    """Decoded frames that are kept."""
    limits: Bounds = field(default_factory=Bounds)
    """Limits on requests."""


def main(argv: list[str]) -> int:
    """Run the verb.

    Args:
        argv: Arguments after the verb.

    Returns:
        The exit status.
    """
    options = parse(Options, argv, "serve", __doc__, flag_pairs=False)
    return serve(options, page=False)


def _say_nothing(address: str) -> None:
    """What is called with the address where nobody waits for it."""


def serve(options: Options, *, page: bool, ready: Callable[[str], None] = _say_nothing) -> int:
    """Load the model and serve until interrupted.

    Args:
        options: Of the command line.
        page: Whether the page is served too.
        ready: Called with the server's address once it listens; with several ranks a function of a
            module.

    Returns:
        The exit status.

    Raises:
        LongVILAError: If the server cannot start.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as fault:
        raise LongVILAError(
            f"the server needs {fault.name}: pip install 'longvila[serve]'"
        ) from fault
    check_numbers(options)
    settings = to_settings(options, page=page)  # what does not do is said before loading
    device = find_device(options.device, gpus=options.gpus)
    return run_over_ranks(run, (options, settings, ready), size=options.gpus, device=device)


def check_numbers(options: Options) -> None:
    """Refuse numbers that mean nothing.

    Args:
        options: Of the command line.

    Raises:
        LongVILAError: If one is out of range; the message names its option.
    """
    if options.gpus < 1:
        raise LongVILAError(f"--gpus must be at least 1, got {options.gpus}")
    if not 0 <= options.port < 65536:
        raise LongVILAError(f"--port must be from 0 to 65535, got {options.port}")
    if options.frames is not None and options.frames < 1:
        raise LongVILAError(f"--frames must be at least 1, got {options.frames}")
    if options.max_new_tokens < 1:
        raise LongVILAError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    if not options.temperature >= 0:
        raise LongVILAError(f"--temperature must be 0 or more, got {options.temperature}")
    if options.kv_gib is not None and not 0 < options.kv_gib < float("inf"):
        raise LongVILAError(f"--kv-gib must be a number above 0, got {options.kv_gib}")
    if options.media_cache_mib < 0:
        raise LongVILAError(f"--media-cache-mib must be 0 or more, got {options.media_cache_mib}")


def run(ranks: Ranks, argument: tuple[Options, Settings, Callable[[str], None]]) -> int:
    """Serve on the first rank; the others do as it says.

    Args:
        ranks: This process among those that share the work.
        argument: Options, settings, and what to call with the address.

    Returns:
        The exit status.

    Raises:
        RanksLostError: If the ranks could not go on together.
    """
    from longvila.inference.leading import Leader, control_group, follow

    options, settings, ready = argument
    listener = ranks.together(
        lambda: listen(options.host, options.port) if ranks.is_first else None
    )
    try:
        engine, processor = open_engine(options, ranks)
        kv = min(ranks.gather(kv_bytes(options, engine.model)))
        settings = replace(settings, kv_bytes=kv)
        if ranks.size == 1:
            run_server(options, listener, build(engine, processor, settings), ready)
            return 0
        group = control_group()
        if not ranks.is_first:
            # Signals are the first rank's; what ends it ends the others.
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, signal.SIG_IGN)
            follow(engine, group)
            return 0
        leader = Leader(engine, group)
        server = build(leader, processor, settings, on_close=leader.close)
        run_server(options, listener, server, ready, leader=leader)
        leader.check()
        return 0
    finally:
        if listener is not None:
            listener.close()


def run_server(
    options: Options,
    listener: socket.socket,
    server: Server,
    ready: Callable[[str], None],
    *,
    leader: Any = None,
) -> None:
    """Answer requests until interrupted, or until ranks have lost each other.

    Args:
        options: Of the command line.
        listener: A socket that listens.
        server: Closed at the end.
        ready: Called with the server's address.
        leader: Of several ranks.
    """
    import uvicorn

    limits = server.settings.limits
    config = uvicorn.Config(
        server.app,
        log_level="warning",
        limit_concurrency=4 * (limits.waiting + limits.active) + 64,
        timeout_graceful_shutdown=5,
        server_header=False,
        proxy_headers=False,
    )
    shown = f"[{options.host}]" if ":" in options.host else options.host
    address = f"http://{shown}:{listener.getsockname()[1]}"
    running = uvicorn.Server(config)
    if leader is not None:
        leader.on_lost = lambda: setattr(running, "should_exit", True)
    print(f"{server.settings.name} is served at {address}/v1", file=sys.stderr, flush=True)
    ready(address)
    try:
        running.run(sockets=[listener])
    finally:
        server.close()


def listen(host: str, port: int) -> socket.socket:
    """Open the socket before the model is loaded, so that a taken port is known at once.

    Raises:
        LongVILAError: If it cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(128)
        except OSError:
            listener.close()
            raise
    except OSError as fault:
        raise LongVILAError(f"cannot listen on {host} port {port}: {fault}") from fault
    return listener


def build(
    engine: Any,
    processor: Any,
    settings: Settings,
    *,
    on_close: Callable[[], None] = lambda: None,
) -> Server:
    """Put the server together.

    Args:
        engine: The model's engine.
        processor: Its processor.
        settings: Of the server.
        on_close: Called when the model's thread has stopped.

    Returns:
        The server, its model's thread running.

    Raises:
        LongVILAError: If the model or an option does not do.
    """
    from longvila.inference.serving.app import Server

    try:
        return Server(engine, processor, settings, on_close=on_close)
    except ValueError as fault:
        raise LongVILAError(str(fault)) from fault


def to_settings(options: Options, *, page: bool) -> Settings:
    """Turn options into the server's settings, but for the memory of keys and values.

    Args:
        options: Of the command line.
        page: Whether the page is served.

    Raises:
        LongVILAError: If an option does not do.
    """
    from longvila.inference.serving.settings import Access, Limits, Settings

    for root in options.root:
        if not root.is_dir():
            raise LongVILAError(f"--root {root}: a root must be a folder")
    for network in options.http_networks:
        try:
            ipaddress.ip_network(network)
        except ValueError as fault:
            raise LongVILAError(f"--http-networks {network}: {fault}") from fault
    try:
        limits = Limits(
            **{
                name.replace("_mib", "_bytes"): value << 20 if name.endswith("_mib") else value
                for name, value in vars(options.limits).items()
            }
        )
    except ValueError as fault:
        raise LongVILAError(str(fault)) from fault
    keys: tuple[str, ...] = ()
    if options.key_file is not None:
        try:
            lines = options.key_file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as fault:
            reason = getattr(fault, "strerror", None) or fault
            raise LongVILAError(f"--key-file {options.key_file}: {reason}") from fault
        keys = tuple(line.strip() for line in lines if line.strip())
        if not keys:
            raise LongVILAError(f"{options.key_file}: holds no key")
    local = options.host in _LOOPBACK
    if not local and not keys:
        log.warning("listening on %s without keys: whoever reaches it may use it", options.host)
    hosts = {*options.host_names, options.host, *(_LOOPBACK if local else ())}
    if "*" in hosts or options.host in ("0.0.0.0", "::"):
        # Everything is listened on, under whatever names this machine has, unless they are given.
        hosts = set(options.host_names) - {"*"}
        hosts |= set(_LOOPBACK) if hosts else set()
    folder = Path(options.model or "longvila-smol")
    name = options.name or (folder.resolve() if folder.is_dir() else folder).name
    return Settings(
        name=name,
        limits=limits,
        access=Access(options.root, options.http, options.http_networks),
        keys=keys,
        hosts=tuple(sorted(hosts)),
        frames=options.frames,
        new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        media_cache_bytes=options.media_cache_mib << 20,
        page=page,
    )


def kv_bytes(options: Options, model: Any) -> int:
    """Bytes for keys and values: as given, or four fifths of what the model's device has left."""
    if options.kv_gib is not None:
        return int(options.kv_gib * 2**30)
    import torch

    if model.device.type == "cuda":
        return int(torch.cuda.mem_get_info(model.device)[0] * 0.8)
    return 4 << 30
