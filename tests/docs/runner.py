"""Run Python without paying for the import of torch and transformers each time.

A server imports both once and forks a child for every request that comes in on a Unix socket:
``{"script": path or null, "arguments": [...], "cwd": folder, "ranks": number or null}``; without a
script the child is the ``longvila`` command. `longvila` itself is left to the children, so that a
snippet which forgets to import it fails. With ranks there are so many children, in the environment
that ``torchrun`` makes on one machine; that torchrun itself starts what it is given is PyTorch's to
test, and `longvila train` is tested under its agent. The answer is ``{"status", "output"}``.

    python runner.py serve SOCKET
    python runner.py longvila SOCKET ARGUMENT...       what the `longvila` of the tests calls
    python runner.py torchrun SOCKET ARGUMENT...       what the `torchrun` of the tests calls
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Sequence


def preload() -> None:
    import torch
    import torch.distributed.fsdp
    import transformers.generation.utils
    import transformers.modeling_utils
    import transformers.models.qwen2.modeling_qwen2
    import transformers.models.siglip.modeling_siglip
    import transformers.processing_utils
    import transformers.trainer  # noqa: F401

    torch.set_num_threads(1)


def run(
    script: str | None, arguments: Sequence[str], cwd: str, ranks: int | None = None
) -> dict[str, object]:
    """Run a script as ``python script`` would, or the command, in a child or on ranks."""
    with tempfile.TemporaryFile() as log, socket.socket() as found:
        # Held as long as the ranks run: they may listen on it too, and nobody else gets it.
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
        children = []
        for rank in range(ranks or 1):
            child = os.fork()
            if child == 0:
                if ranks is not None:
                    join(rank, ranks, port)
                become(script, arguments, cwd, log.fileno())
            children.append(child)
        status = 0
        while children:
            child, how = os.wait()
            if child not in children:
                continue
            children.remove(child)
            ended = os.waitstatus_to_exitcode(how)
            if ended and not status:
                status = ended
                for other in children:  # they would wait for it
                    os.kill(other, signal.SIGKILL)
        log.seek(0)
        return {"status": status, "output": log.read().decode()}


def join(rank: int, ranks: int, port: int) -> None:
    """Set what torchrun tells a process."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def become(script: str | None, arguments: Sequence[str], cwd: str, log: int) -> None:
    status = 1
    try:
        os.chdir(cwd)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = [script or "longvila", *arguments]
        if script is None:
            from longvila.cli.main import main

            status = main(list(arguments))
        else:
            sys.path.insert(0, cwd)
            runpy.run_path(script, run_name="__main__")
            status = 0
    except SystemExit as leave:
        status = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve(path: str) -> None:
    preload()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}.new")
        server.listen()
        os.rename(f"{path}.new", path)  # whoever finds the socket can connect
        while True:
            connection, _ = server.accept()
            with connection, connection.makefile("rw") as stream:
                line = stream.readline()
                if line.strip() == "stop":
                    return
                stream.write(json.dumps(run(**json.loads(line))) + "\n")


def ask(path: str, request: dict[str, object] | str) -> dict[str, object]:
    """Send a request to the server and wait for its answer."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        with client.makefile("rw") as stream:
            stream.write((request if isinstance(request, str) else json.dumps(request)) + "\n")
            stream.flush()
            answer = stream.readline()
    return json.loads(answer) if answer else {}


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        request: dict[str, object] = {
            "script": None, "arguments": sys.argv[3:], "cwd": os.getcwd(), "ranks": None
        }  # fmt: skip
        if sys.argv[1] == "torchrun":
            option, number, program, *rest = sys.argv[3:]
            assert option == "--nproc-per-node" and program.endswith(".py"), sys.argv[3:]
            request |= {"script": program, "arguments": rest, "ranks": int(number)}
        done = ask(sys.argv[2], request)
        print(done["output"], end="")
        sys.exit(int(str(done["status"])))
