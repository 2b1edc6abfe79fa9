"""Open a page to ask videos in a browser.

Examples:
    longvila ui
    longvila ui --model CHECKPOINT --frames 256
    longvila ui --model CHECKPOINT --no-browser --port 8080

The page is served beside the same API as by longvila serve, whose options it takes. Drop a video on
it, see the frames that the model sees, ask, and follow the times in its answers.
"""

from __future__ import annotations

import functools
import threading
import webbrowser
from dataclasses import dataclass

from longvila.cli._options import parse
from longvila.cli.serve import Options as ServeOptions
from longvila.cli.serve import serve


@dataclass(frozen=True)
class Options(ServeOptions):
    """Open a page to ask videos in a browser."""

    browser: bool = True
    """Whether the page is opened in this machine's browser."""


def main(argv: list[str]) -> int:
    """Run the verb.

    Args:
        argv: Arguments after the verb.

    Returns:
        The exit status.
    """
    options = parse(Options, argv, "ui", __doc__, flag_pairs=False)
    return serve(options, page=True, ready=functools.partial(show, browser=options.browser))


def show(address: str, *, browser: bool) -> None:
    """Say where the page is, and open it.

    Args:
        address: Of the server.
        browser: Whether to open it.
    """
    print(f"the page is at {address}/", flush=True)
    if browser:
        # A browser may keep its starter waiting.
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
