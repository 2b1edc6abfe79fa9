"""Create the virtual environment that the Makefile uses.

Where the calling Python already has a CUDA build of torch, the environment sees that Python's
packages and keeps its torch; elsewhere torch 2.13.0 is installed first, so that nothing pulls in
another build. With `--oldest`, the lowest supported versions are put into a folder beside the
environment (`oldest/`), to be placed in front of it with PYTHONPATH; with `--torchvision`,
torchvision, which is no dependency, into `torchvision/` for the tests that meet one. For
development, lmms-eval is added without most of its dependencies, which ask for torchvision.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"
PROBE = "import torch; print(torch.version.cuda or '')"
#: The lowest versions of the declared ranges; the suite runs against them too.
OLDEST = ROOT / "scripts" / "oldest.txt"
#: lmms-eval, without most of what it depends on.
LMMS = ROOT / "scripts" / "lmms.txt"
#: The release that belongs to TORCH.
TORCHVISION = "torchvision==0.28.0"


def run(*command: str | Path) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True)


def has_cuda_torch() -> bool:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    return done.returncode == 0 and bool(done.stdout.strip())


def create(env: Path, extras: str) -> None:
    python = env / "bin" / "python"
    if not python.exists():
        venv.create(env, with_pip=True)
    if has_cuda_torch():
        # A plain `--system-site-packages` would look past a parent that is an environment itself.
        site = env / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        (site / "parent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    else:
        run(python, "-m", "pip", "install", "-q", TORCH)
    run(python, "-m", "pip", "install", "-q", "-e", f"{ROOT}[{extras}]")
    if "dev" in extras.split(","):
        run(python, "-m", "pip", "install", "-q", "--no-deps", "-r", LMMS)


def add_beside(env: Path, name: str, *what: str | Path) -> None:
    python = env / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", env / name,
        *what)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("env", type=Path)
    parser.add_argument("--extras", default="dev,train,weights")
    parser.add_argument("--oldest", action="store_true")
    parser.add_argument("--torchvision", action="store_true")
    args = parser.parse_args()
    env = args.env.resolve()
    wanted = hashlib.sha256(
        b"".join(p.read_bytes() for p in (ROOT / "pyproject.toml", OLDEST, LMMS, Path(__file__)))
        + f"{args.extras}".encode()
    ).hexdigest()
    name = "oldest" if args.oldest else "torchvision" if args.torchvision else "ready"
    stamp = env / f"{name}.stamp"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    if args.oldest:
        add_beside(env, name, "-r", OLDEST)
    elif args.torchvision:
        add_beside(env, name, TORCHVISION)
    else:
        create(env, args.extras)
    stamp.write_text(wanted)


if __name__ == "__main__":
    main()
