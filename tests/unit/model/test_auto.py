"""Importing the package: fast, without transformers, and known to every Auto class in any order."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import longvila

SRC = str(Path(__file__).parents[3] / "src")


def run(code: str) -> subprocess.CompletedProcess[str]:
    inherited = os.environ.get("PYTHONPATH", "")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([SRC, inherited])}
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True,
        text=True,
        env=env,
    )


def check(code: str) -> str:
    done = run(code)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


#: Forks a child for each request, after what transformers would import of others. What the tests
#: are about is left to the child: transformers, torchvision and this package.
SERVER = """
import json, os, sys, tempfile, traceback
import accelerate, huggingface_hub, jinja2, numpy, PIL.Image, safetensors.torch, tokenizers
import torch, torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor
found = {"transformers", "torchvision", "longvila"} & set(sys.modules)
assert not found, found
for line in sys.stdin:
    request = json.loads(line)
    with tempfile.TemporaryFile() as log:
        child = os.fork()
        if child == 0:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sys.path[:0] = request["paths"]
            status = 0
            try:
                exec(request["code"], {"__name__": "__main__"})
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitpid(child, 0)[1]
        log.seek(0)
        print(json.dumps([status, log.read().decode()]), flush=True)
"""
Fork = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def fork() -> Iterator[Fork]:
    """Run code in a child that has torch; returns its status and what it printed."""
    paths = os.pathsep.join([SRC, os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen(
        [sys.executable, "-W", "error::UserWarning", "-c", SERVER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    with server:
        assert server.stdin is not None and server.stdout is not None

        def run_in_child(code: str, *paths: str) -> tuple[int, str]:
            server.stdin.write(json.dumps({"code": code, "paths": paths}) + "\n")
            server.stdin.flush()
            status, said = json.loads(server.stdout.readline())
            return status, said

        yield run_in_child


def check_forked(fork: Fork, code: str, *paths: str) -> str:
    status, said = fork(code, *paths)
    assert status == 0, said
    return said


def test_import_is_fast_and_loads_no_transformers() -> None:
    code = (
        "import sys, time, torch\n"
        "start = time.process_time()\n"
        "import longvila\n"
        "print(time.process_time() - start)\n"
        "assert not any(m.split('.')[0] == 'transformers' for m in sys.modules)\n"
    )
    assert float(check(code).split()[0]) < 0.3


def test_import_after_transformers_is_fast_too() -> None:
    # A torchvision that is there has to be imported to learn whether it works, which transformers'
    # own processors would do a moment later; here it counts as theirs.
    code = (
        "import contextlib, time, torch, transformers\n"
        "with contextlib.suppress(Exception): import torchvision\n"
        "start = time.process_time()\n"
        "import longvila\n"
        "print(time.process_time() - start)\n"
    )
    assert float(check(code).split()[0]) < 0.3


def test_works_without_transformers() -> None:
    check(
        "import sys\n"
        "sys.modules['transformers'] = None\n"
        "import longvila, longvila.sp, longvila.ops, longvila.memory, longvila.media\n"
        "try:\n"
        "    longvila.LongVILAModel\n"
        "except ModuleNotFoundError as fault:\n"
        "    assert 'transformers' in str(fault)\n"
        "else:\n"
        "    raise AssertionError\n"
    )


CONFIG = "AutoConfig.for_model('longvila').tokens_per_frame"
MODEL = "AutoModelForImageTextToText._model_mapping[longvila.LongVILAConfig].__name__"


ORDERS = [
    f"import longvila\nfrom transformers import AutoModelForImageTextToText\nprint({MODEL})",
    f"from transformers import AutoModelForImageTextToText\nimport longvila\nprint({MODEL})",
    f"import longvila\nfrom transformers import Trainer, pipeline, AutoConfig\nprint({CONFIG})",
    "import longvila.model.processing_longvila",
]
MORE_ORDERS = [
    f"import longvila\nfrom transformers import AutoConfig\nprint({CONFIG})",
    f"from transformers import AutoConfig\nimport longvila\nprint({CONFIG})",
    "import longvila.model.configuration_longvila, longvila.model.image_processing_longvila",
    "import longvila.model.modeling_longvila",
    "import longvila\nfrom transformers import AutoImageProcessor, AutoProcessor",
    "import longvila\nprint(longvila.LongVILAProcessor, longvila.LongVILAVideoProcessor)",
]


@pytest.mark.parametrize(
    "code", [*ORDERS, *(pytest.param(code, marks=pytest.mark.slow) for code in MORE_ORDERS)]
)
def test_any_order_of_imports(fork: Fork, code: str) -> None:
    check_forked(fork, code)


def test_unknown_names() -> None:
    assert {"LongVILAModel", "LongVILAProcessor"} <= set(dir(longvila))
    everything: dict[str, object] = {}
    exec("from longvila import *", everything)
    assert set(everything) - {"__builtins__"} == set(longvila._PUBLIC)
    with pytest.raises(AttributeError, match="nonesuch"):
        longvila.nonesuch  # noqa: B018


# ---- torchvision: absent, broken, working

USE = """
import sys, tempfile
import numpy as np
import longvila
from transformers import AutoProcessor, AutoConfig
from longvila.testing.tiny import tiny_config, tiny_model, tiny_processor
processor = tiny_processor()
chat = [{"role": "user", "content": [
    {"type": "video", "video": np.zeros((2, 8, 8, 3), np.uint8)}, {"type": "text", "text": "Q"}]}]
with tempfile.TemporaryDirectory() as folder:
    processor.save_pretrained(folder)
    tiny_config().save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
tiny_model().generate(**inputs, max_new_tokens=2)
from transformers import Trainer, TrainingArguments, pipeline
"""


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="is installed")
def test_torchvision_absent() -> None:
    """Everything else here runs without it; the one face that needs it says so."""
    from transformers import AutoVideoProcessor

    with pytest.raises(ImportError, match="AutoVideoProcessor requires the Torchvision library"):
        AutoVideoProcessor.from_pretrained("anything")


@pytest.fixture
def broken(tmp_path: Path) -> str:
    """A torchvision as the CUDA wheel beside a CPU torch: found, with metadata, and failing."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    info = tmp_path / "torchvision-0.28.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    return str(tmp_path)


def test_torchvision_broken(fork: Fork, broken: str) -> None:
    out = check_forked(fork, USE, broken)
    assert out.count("torchvision is installed but cannot be imported (operator") == 1


@pytest.mark.slow
def test_torchvision_broken_and_transformers_first(fork: Fork, broken: str) -> None:
    out = check_forked(fork, "import transformers\n" + USE, broken)
    assert out.count("torchvision is installed but cannot be imported (operator") == 1


def test_torchvision_broken_breaks_transformers_without_us(fork: Fork, broken: str) -> None:
    """The test above would mean nothing if this one failed."""
    status, said = fork("from transformers.image_utils import load_image", broken)
    assert status != 0 and "torchvision::nms" in said
