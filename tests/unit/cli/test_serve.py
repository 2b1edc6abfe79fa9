"""``longvila serve`` and ``longvila ui``: options become settings, a process serves until told."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import webbrowser
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import tyro
from transformers import Qwen2Config

from longvila.cli import serve as serve_cli
from longvila.cli import ui as ui_cli
from longvila.errors import CheckpointError, LongVILAError, ModelError
from longvila.inference.engine import Engine
from longvila.inference.workers import Ranks
from longvila.media import synthetic
from longvila.testing import tiny

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("checkpoint") / "small")


def options(*argv: str, kind: type = serve_cli.Options) -> Any:
    return tyro.cli(kind, args=list(argv), config=(tyro.conf.FlagCreatePairsOff,))


def settings(*argv: str) -> Any:
    return serve_cli.to_settings(options(*argv), page=False)


def test_options_become_settings(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("\ufeffone\n\n two \n")  # an editor's mark at the beginning
    found = settings(
        "--model", "a/b/big", "--root", str(tmp_path), "--http", "--http-networks", "10.0.0.0/8",
        "--key-file", str(keys), "--frames", "64", "--limits.body-mib", "3",
        "--limits.frames", "9", "--limits.active", "2",
    )  # fmt: skip
    assert found.name == "big" and not found.page and found.frames == 64
    assert found.access.roots == (tmp_path,) and found.access.http
    assert found.access.networks == ("10.0.0.0/8",) and found.keys == ("one", "two")
    limits = found.limits
    assert (limits.body_bytes, limits.frames, limits.active) == (3 << 20, 9, 2)
    plain = settings()
    assert plain.name == "longvila-smol" and plain.access.roots == () and not plain.access.http
    assert set(plain.hosts) == {"127.0.0.1", "localhost", "::1"}


def test_the_name_is_that_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my model" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "my model")
    assert [settings("--model", name).name for name in (".", "inner/..", "org/hub")] == [
        "my model", "my model", "hub",
    ]  # fmt: skip


def test_every_limit_can_be_set_and_the_defaults_agree() -> None:
    from longvila.inference.serving.settings import Limits

    assert settings().limits == Limits()


def test_hosts_and_keys_of_an_open_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert settings("--host", "0.0.0.0").hosts == ()
    assert "without keys" in caplog.text
    assert settings("--host", "0.0.0.0", "--host-names", "*").hosts == ()
    named = settings("--host", "0.0.0.0", "--host-names", "gpu7").hosts
    assert set(named) == {"gpu7", "127.0.0.1", "localhost", "::1"}
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(LongVILAError, match="holds no key"):
        settings("--key-file", str(tmp_path / "keys"))


def test_what_cannot_be_served_is_said_before_anything_is_loaded(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(LongVILAError, match=f"cannot listen on 127.0.0.1 port {port}"):
            serve_cli.main(["--model", str(checkpoint), "--port", port])
    with pytest.raises(CheckpointError, match="--model"):
        serve_cli.main(["--model", str(tmp_path), "--port", "0"])
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    monkeypatch.setattr(serve_cli, "open_engine", lambda *args: pytest.fail("it was loaded"))
    for option, value, message in (
        ("--root", tmp_path / "no", "--root .*no: a root must be a folder"),
        ("--limits.frames", 0, "limit frames must be positive"),
        ("--gpus", 0, "--gpus must be at least 1, got 0"),
        ("--port", 80000, "--port must be from 0 to 65535, got 80000"),
        ("--frames", 0, "--frames must be at least 1, got 0"),
        ("--max-new-tokens", 0, "--max-new-tokens must be at least 1, got 0"),
        ("--temperature", "nan", "--temperature must be 0 or more, got nan"),
        ("--kv-gib", 0, "--kv-gib must be a number above 0, got 0"),
        ("--kv-gib", "inf", "--kv-gib must be a number above 0, got inf"),
        ("--media-cache-mib", -1, "--media-cache-mib must be 0 or more, got -1"),
        ("--key-file", tmp_path / "no", "--key-file .*no: No such file"),
        ("--key-file", tmp_path / "binary", "--key-file .*binary: 'utf-8' codec"),
        ("--http-networks", "10.0.0.1/8", "--http-networks 10.0.0.1/8: .* host bits set"),
        ("--device", "cuda:99", "--device cuda:99: torch sees"),
    ):
        with pytest.raises(LongVILAError, match=message):
            serve_cli.main(["--model", str(checkpoint), option, str(value)])
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(LongVILAError, match=r"pip install 'longvila\[serve\]'"):
        serve_cli.main(["--model", str(checkpoint)])


def test_models_that_see_nothing_are_refused(tmp_path: Path) -> None:
    Qwen2Config(num_hidden_layers=1).save_pretrained(tmp_path)
    alone = Ranks(0, 1, torch.device("cpu"))
    with pytest.raises(CheckpointError, match="qwen2 is a language model and sees no images or"):
        serve_cli.open_engine(options("--model", str(tmp_path)), alone)
    with (
        Engine(tiny.tiny_model()) as engine,
        pytest.raises(ModelError, match="object has no video processor"),
    ):
        serve_cli.build(engine, object(), settings())


def test_memory_for_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.tiny_model()
    assert serve_cli.kv_bytes(options("--kv-gib", "0.5"), model) == 1 << 29
    assert serve_cli.kv_bytes(options(), model) == 4 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert serve_cli.kv_bytes(options(), model) == 800


def test_the_page_is_opened_in_a_browser(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    done = threading.Event()

    def serve(options: Any, *, page: bool, ready: Any) -> int:
        assert page
        ready("http://127.0.0.1:1")
        return 0

    monkeypatch.setattr(ui_cli, "serve", serve)
    monkeypatch.setattr(webbrowser, "open", lambda url: (opened.append(url), done.set()))
    assert ui_cli.main(["--no-browser"]) == 0 and not opened
    assert ui_cli.main(["--frames", "9"]) == 0
    assert done.wait(120) and opened == ["http://127.0.0.1:1"]
    assert "the page is at http://127.0.0.1:1/" in capsys.readouterr().out


@pytest.mark.parametrize(("verb", "gpus"), [("ui", 1), ("serve", 2)])
def test_a_command_serves_and_ends_cleanly(
    checkpoint: Path, tmp_path: Path, verb: str, gpus: int
) -> None:
    synthetic.clip(tmp_path / "film.mp4", num_frames=12, fps=6, width=64, height=48)
    (tmp_path / "tmp").mkdir()
    command = [
        sys.executable, "-c", "import sys; from longvila.cli.main import main; sys.exit(main())",
        verb, *(["--no-browser"] if verb == "ui" else []), "--model", str(checkpoint),
        "--port", "0", "--root", str(tmp_path),
        "--device", "cpu", "--gpus", str(gpus),
    ]  # fmt: skip
    packages = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(packages),
        "TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        found, lines = None, []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"small is served at (http://127\.0\.0\.1:\d+/v1)", line):
                break
        assert found is not None, "".join(lines)
        with openai.OpenAI(base_url=found[1], api_key="none") as client:
            content = [
                {"type": "video_url", "video_url": {"url": "film.mp4"}},
                {"type": "text", "text": "What?"},
            ]
            answer = client.chat.completions.create(
                model="small", messages=[{"role": "user", "content": content}], max_tokens=3
            )  # type: ignore[call-overload]
            assert answer.usage.completion_tokens <= 3
            page = client.with_options(max_retries=0)._client.get(found[1][:-2])
            assert ("What the model sees" in page.text) == (verb == "ui")
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        # uvicorn ends by the signal that it got, after it has closed everything.
        assert process.wait(120) in (0, -signal.SIGTERM), rest
    assert "Traceback" not in rest, rest
    assert not list((tmp_path / "tmp").iterdir()), "uploads were left behind"
