"""Entry point of the ``longvila`` command."""

from __future__ import annotations

import ast
import codecs
import difflib
import importlib
import io
import json
import logging
import os
import pkgutil
import signal
import sys
from pathlib import Path

from longvila import __version__
from longvila.errors import LongVILAError


def verbs() -> dict[str, str]:
    """Map each verb to its one-line summary, without importing it."""
    folder = Path(__file__).parent
    found = {}
    for module in pkgutil.iter_modules([str(folder)]):
        if module.name == "main" or module.name.startswith("_"):
            continue
        text = (folder / f"{module.name}.py").read_text(encoding="utf-8")
        docstring = ast.get_docstring(ast.parse(text)) or ""
        found[module.name] = docstring.partition("\n")[0]
    return found


def usage() -> str:
    """Return the text that ``longvila --help`` prints."""
    width = max(len(name) for name in verbs())
    lines = [f"  {name:<{width}}  {summary}" for name, summary in sorted(verbs().items())]
    return "\n".join(
        ["usage: longvila VERB ...", "", *lines, "", "longvila VERB --help says more of each."]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one verb; errors a user can act on are printed without a traceback.

    Args:
        argv: Arguments without the program's name; those of the process if None.

    Returns:
        The exit status.
    """
    argv = sys.argv[1:] if argv is None else argv
    prepare_streams()
    if argv[:1] == ["help"] and argv[1:]:
        argv = [argv[1], "--help"]
    program = " ".join(["longvila", *argv[:1]])
    try:
        try:
            status = run(argv)
        except SystemExit:  # --help, or a line that cannot be read
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # at Python's own end nobody would say what went wrong
        return status
    except BrokenPipeError:
        # Whoever read standard output has enough.
        drop_output()
        return 128 + signal.SIGPIPE
    except (LongVILAError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        drop_output()
        return 1
    except (ValueError, ImportError) as error:
        if not raised_here(error):
            raise
        print(f"{program}: {error}", file=sys.stderr)
        drop_output()
        return 1
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        drop_output()
        return 128 + signal.SIGINT


def run(argv: list[str]) -> int:
    """Run one verb, whatever it raises.

    Args:
        argv: Arguments without the program's name.

    Returns:
        The exit status.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"longvila {__version__}")
        return 0
    verb, rest = argv[0], argv[1:]
    known = verbs()
    if verb not in known:
        near = difflib.get_close_matches(verb, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"longvila: there is no verb {verb!r}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "urllib3", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    status: int = importlib.import_module(f"longvila.cli.{verb}").main(rest)
    return status


def prepare_streams() -> None:
    """Let every verb read and print, whatever it was started with.

    A stream that was closed is empty. A character that standard output's encoding lacks is written
    as its escape, with which JSON stays JSON: an answer may take hours to come to.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("longvila.escape", _escape)
        sys.stdout.reconfigure(errors="longvila.escape")


def _escape(fault: UnicodeError) -> tuple[str, int]:
    assert isinstance(fault, UnicodeEncodeError)
    return json.dumps(fault.object[fault.start : fault.end])[1:-1], fault.end


def drop_output() -> None:
    """Keep Python from complaining at its end of what standard output did not take."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def raised_here(error: Exception) -> bool:
    """Whether this package raised an error itself.

    Its own say what was expected and what came; one that escapes from a library is a fault of
    ours, and its traceback is what helps.
    """
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    name = "" if place is None else place.tb_frame.f_globals.get("__name__", "")
    return name.partition(".")[0] == "longvila"
