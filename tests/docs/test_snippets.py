"""Every python and shell block of the README and the docs runs, as written.

A file's blocks run in order in one folder that holds ``model`` (a tiny saved model) and
``video.mp4`` (a short clip), the names the pages use. A block that cannot run here is preceded by
``<!-- not run: REASON -->``; the reasons are counted and printed, so that they stay few. A block
followed by one line of text and a ``text`` block prints exactly that.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import runner

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?```(?P<language>python|sh)\n(?P<body>.*?)^```$"
    r"(?:\n\n[^\n]*\n\n```text\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    language: str
    body: str
    why_not: str | None
    output: str | None


def blocks(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text("utf-8"))
    return [Block(m["language"], m["body"], m["why"], m["output"]) for m in found]


#: A script that a later block starts says its name in its first line: ``# train.py``.
NAMED = re.compile(r"# (?P<name>\w+\.py)\n")

RUNNABLE = [page for page in PAGES if any(b.why_not is None for b in blocks(page))]


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from longvila.media import synthetic
    from longvila.testing import tiny

    folder = tmp_path_factory.mktemp("snippets")
    tiny.save_tiny(folder / "model")
    synthetic.clip(folder / "video.mp4", num_frames=48, fps=12, width=96, height=64)
    return folder


@dataclass(frozen=True)
class Runner:
    """Where Python runs (see `runner`), and the environment of shell blocks.

    Their ``longvila`` is that of this tree, and runs there too, as do the ranks of ``torchrun``.
    """

    socket: str
    environment: dict[str, str]

    def python(self, script: Path) -> tuple[int, str]:
        request = {"script": str(script), "arguments": [], "cwd": str(script.parent)}
        done = runner.ask(self.socket, request)
        return int(str(done["status"])), str(done["output"])

    def shell(self, body: str, cwd: Path) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", body],
            cwd=cwd,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )
        return done.returncode, done.stdout


@pytest.fixture(scope="session")
def run() -> Iterator[Runner]:
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        address = f"{folder}/socket"
        for name in ("longvila", "torchrun"):
            command = f"exec '{sys.executable}' '{runner.__file__}' {name} '{address}'"
            Path(folder, name).write_text(f'#!/bin/sh\n{command} "$@"\n')
            Path(folder, name).chmod(0o755)
        paths = [folder, str(Path(sys.executable).parent), os.environ["PATH"]]
        packages = [os.environ.get("PYTHONPATH", ""), str(ROOT / "src")]
        environment = {
            **os.environ,
            "PATH": os.pathsep.join(paths),
            "PYTHONPATH": os.pathsep.join(path for path in packages if path),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",  # the pages promise a CPU; two ranks may find one GPU
        }
        server = subprocess.Popen(
            [sys.executable, runner.__file__, "serve", address], env=environment
        )
        while not os.path.exists(address):
            assert server.poll() is None, "the server of the snippets did not start"
            time.sleep(0.05)
        yield Runner(address, environment)
        runner.ask(address, "stop")
        assert server.wait(timeout=120) == 0


@pytest.mark.parametrize("page", RUNNABLE, ids=[str(p.relative_to(ROOT)) for p in RUNNABLE])
def test_snippets_run(
    page: Path,
    workspace: Path,
    run: Runner,
    tmp_path: Path,
) -> None:
    for name in workspace.iterdir():
        (tmp_path / name.name).symlink_to(name)
    for number, block in enumerate(blocks(page)):
        if block.why_not is not None:
            continue
        if block.language == "python":
            script = tmp_path / f"snippet_{number}.py"
            # Under the name a page gives in its first line, later blocks may start it again.
            if named := NAMED.match(block.body):
                script = tmp_path / named["name"]
            script.write_text(block.body)
            status, output = run.python(script)
        else:
            status, output = run.shell(block.body, tmp_path)
        assert status == 0, f"{page.name}, block {number}:\n{block.body}\n{output}"
        if block.output is not None:
            assert output == block.output, f"{page.name}: block {number} prints\n{output}"


def test_a_block_that_fails_is_found(run: Runner, tmp_path: Path) -> None:
    script = tmp_path / "wrong.py"
    script.write_text("print('before')\nraise ValueError('as it must')\n")
    status, output = run.python(script)
    assert status == 1 and "before" in output and "ValueError: as it must" in output
    script.write_text("from transformers import AutoConfig\nAutoConfig.for_model('longvila')\n")
    assert run.python(script)[0] == 1, "a snippet knows longvila without importing it"
    script.write_text("import sys\nsys.exit(3)\n")
    assert run.python(script)[0] == 3
    status, output = run.shell("longvila nothing", tmp_path)
    assert status == 2 and "there is no verb" in output


@pytest.mark.parametrize("page", RUNNABLE, ids=[str(p.relative_to(ROOT)) for p in RUNNABLE])
def test_what_is_trained_is_loaded_in_float32(page: Path) -> None:
    # Checkpoints are bfloat16 mostly, and come so: on one process small updates would be lost.
    for block in blocks(page):
        trains = re.search(r"AdamW\(|build_optimizer\(|[^.]LongVILATrainer\(", block.body)
        if block.language == "python" and trains:
            loaded = re.findall(r"ImageTextToText\.from_pretrained\((.*)\)", block.body)
            assert loaded and re.search(r"dtype=\S*float32", loaded[0]), loaded


def test_blocks_that_are_not_run_say_why() -> None:
    skipped = [(page.name, b.why_not) for page in PAGES for b in blocks(page) if b.why_not]
    for name, why in skipped:
        print(f"{name}: not run: {why}")
    total = sum(len(blocks(page)) for page in PAGES)
    assert len(skipped) <= max(6, total // 2)


LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#]+)")


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text("utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_stays_short() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) < 250


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_every_page_is_reached_from_the_index(page: Path) -> None:
    seen: set[Path] = set()
    waiting = [ROOT / "docs" / "index.md", ROOT / "README.md"]
    while waiting:
        here = waiting.pop().resolve()
        if here in seen or here.suffix != ".md" or not here.exists():
            continue
        seen.add(here)
        waiting += [here.parent / target for target in LINK.findall(here.read_text("utf-8"))]
    assert page.resolve() in seen, f"no link leads to {page.relative_to(ROOT)}"
