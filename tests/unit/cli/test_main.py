"""What the command prints where a verb fails: a sentence and a status, or a traceback of ours."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from longvila.cli.main import main
from longvila.errors import LongVILAError
from longvila.media.sampling import uniform_indices
from longvila.model.gguf import read_gguf


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], int]:
    """Run ``longvila ask`` with a body of the test's own."""

    def run(body: Callable[[], int]) -> int:
        module = SimpleNamespace(main=lambda argv: body())
        monkeypatch.setattr(importlib, "import_module", lambda name: module)
        return main(["ask"])

    return run


def fails(error: BaseException) -> Callable[[], int]:
    def body() -> int:
        raise error

    return body


@pytest.mark.parametrize(
    "error",
    [
        LongVILAError("no such film"),
        PermissionError(13, "Permission denied", "/films/a.mp4"),
        OSError(28, "No space left on device", "out/model.safetensors"),
    ],
)
def test_what_the_user_can_mend_is_a_sentence(
    error: Exception,
    verb: Callable[[Callable[[], int]], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert verb(fails(error)) == 1
    assert capsys.readouterr().err == f"longvila ask: {error}\n"


def test_our_own_value_errors_are_sentences_and_those_of_libraries_are_not(
    verb: Callable[[Callable[[], int]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb(lambda: len(uniform_indices(10, 0))) == 1
    assert "num_frames must be a whole number of at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(ValueError, match="invalid literal"):
        verb(lambda: int("x"))


def test_a_package_that_is_not_there_is_a_sentence(
    verb: Callable[[Callable[[], int]], int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert verb(lambda: len(read_gguf(Path("a.gguf")))) == 1
    assert "longvila ask: reading GGUF files needs `pip install" in capsys.readouterr().err
    with pytest.raises(ImportError, match="gguf"):
        verb(lambda: len(__import__("gguf")))


def test_an_interrupt_ends_with_its_status(
    verb: Callable[[Callable[[], int]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb(fails(KeyboardInterrupt())) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_verb_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["asks"]) == 2
    assert "did you mean 'ask'?" in capsys.readouterr().err


def test_help_of_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["help", "convert"])
    assert ended.value.code == 0
    assert "usage: longvila convert" in capsys.readouterr().out
    assert main(["help", "converts"]) == 2


@pytest.mark.parametrize(
    ("taken", "status", "said"),
    [("pipe", 141, ""), ("/dev/full", 1, "longvila {}: [Errno 28] No space left on device\n")],
)
@pytest.mark.parametrize("argument", ["--version", "help", "eval --list"])
def test_what_standard_output_does_not_take(
    argument: str, taken: str, status: int, said: str
) -> None:
    if taken == "pipe":
        read, out = os.pipe()
        os.close(read)
    else:
        out = os.open(taken, os.O_WRONLY)
    # Buffered, as for everybody: print alone notices nothing.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "longvila", *argument.split()]
    done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, env=env)
    os.close(out)
    assert (done.returncode, done.stderr) == (status, said.format(argument.split()[0]))


def test_characters_that_standard_output_lacks_are_escaped(
    verb: Callable[[Callable[[], int]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, taken = {"answer": "été 🎬 \udce9"}, io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(taken, encoding="ascii"))
    assert verb(lambda: print(json.dumps(answer, ensure_ascii=False)) or 0) == 0
    assert json.loads(taken.getvalue()) == answer


def test_streams_may_be_closed() -> None:
    command = [sys.executable, "-m", "longvila", "plan", "--help"]
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    assert subprocess.run(shell).returncode == 0
