"""What the command prints where a verb fails: a sentence and a status, or a traceback of ours."""

from __future__ import annotations

import importlib
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
