"""Two GPUs, one of which hears what to do: the logits of one GPU.

Run by pytest, which starts the processes, or by hand: ``python tests/gpu/test_leading.py``. Calls
are told through the host and computed over NCCL, from a thread, as a server's are.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from longvila.inference.engine import Engine
from longvila.inference.leading import Leader, control_group, follow
from longvila.inference.workers import Ranks, run_over_ranks
from longvila.testing.asserts import relative_error

LIMIT = 3e-2
TOKENS = 9000


def make_model(device: torch.device) -> Any:
    config = Qwen2Config(
        hidden_size=896, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=7,
        num_key_value_heads=1, vocab_size=500, max_position_embeddings=65536, eos_token_id=None,
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).to(device, torch.bfloat16).eval()


def converse(engine: Any) -> list[torch.Tensor]:
    """A long prompt, one behind a fork of it, one behind its beginning, tokens behind that."""
    ids = torch.randint(500, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    film = engine.prefill({"input_ids": ids})
    turn = engine.prefill({"input_ids": ids[:, :700]}, onto=engine.fork(film))
    part = engine.fork(film, tokens=TOKENS // 3)
    found = [film.logits, turn.logits]
    return found + [engine.decode(part, torch.tensor([[token]])) for token in (7, 8, 9, 10)]


def work(ranks: Ranks, argument: None) -> int:
    model = make_model(ranks.device)
    engine = Engine(model, ranks.mesh(model.config), chunk_tokens=1024)
    group = control_group()
    if not ranks.is_first:
        follow(engine, group)
        return 0
    with Engine(make_model(ranks.device), chunk_tokens=1024) as alone:
        expected = converse(alone)
    leader = Leader(engine, group)
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(converse, leader).result()
    leader.close()
    errors = [relative_error(a.float(), b.float()) for a, b in zip(found, expected, strict=True)]
    print("errors", [f"{error:.1e}" for error in errors])
    assert max(errors) < LIMIT, errors
    print("equal to one GPU")
    return 0


@pytest.mark.gpu
def test_two_gpus_one_of_which_leads() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, found {torch.cuda.device_count()}")
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert "equal to one GPU" in done.stdout


if __name__ == "__main__":
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    sys.exit(run_over_ranks(work, None, size=2, device=kind))
