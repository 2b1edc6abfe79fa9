"""Inference on a GPU: chunks, split decode, paging and a decoding thread against a plain forward.

Run with ``pytest -m gpu tests/gpu/test_inference.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from longvila.inference.decode import attend_segment
from longvila.inference.engine import Engine
from longvila.inference.paging import Pager
from longvila.inference.session import Session
from longvila.media.synthetic import clip
from longvila.testing.asserts import relative_error
from longvila.testing.oracles import attention_oracle
from longvila.testing.tiny import tiny_model, tiny_processor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore", "error:.*cuDNN SDPA.*:UserWarning"),
]

LIMIT = 3e-2
TOKENS = 5000


@pytest.fixture(scope="module")
def model() -> Any:
    config = Qwen2Config(
        hidden_size=896, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=7,
        num_key_value_heads=1, vocab_size=500, max_position_embeddings=65536, eos_token_id=None,
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).to("cuda", torch.bfloat16).eval()


@pytest.fixture(scope="module")
def expected(model: Any) -> torch.Tensor:
    """Logits after the prompt and after each of three more tokens, by the model's own forward."""
    with torch.no_grad():
        return model(input_ids=ids(), logits_to_keep=4).logits[0].float()


def ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(500, (1, TOKENS + 3), generator=generator).cuda()


@pytest.mark.parametrize("split", [None, 300, 5000])
@pytest.mark.parametrize("budget", [None, 0, 2**20])
def test_logits_are_those_of_one_forward(
    model: Any, expected: torch.Tensor, budget: int | None, split: int | None
) -> None:
    pager = None
    if budget is not None:
        pager = Pager(torch.device("cuda"), budget, block_tokens=512)
    with Engine(model, chunk_tokens=1024, split_tokens=split, kv_offload=pager) as engine:
        film = engine.prefill({"input_ids": ids()[:, :TOKENS]})
        found = [film.logits[0].float()]  # type: ignore[index]
        for _ in range(2):  # forks read the same blocks again, through slots in use
            fork = engine.fork(film)
            steps = [
                engine.decode(fork, ids()[:, n : n + 1]) for n in range(TOKENS, TOKENS + 3)
            ]  # fmt: skip
        found += [logits[0].float() for logits in steps]
        if budget == 0:
            assert film.host_bytes > 0.8 * film.local_bytes
    assert relative_error(torch.stack(found), expected) < LIMIT


@pytest.mark.parametrize("queries", [1, 7, 300])
@pytest.mark.parametrize("tokens", [600, 70_000])
def test_a_long_segment_by_chunks_and_pieces(queries: int, tokens: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(1, queries, 28, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, tokens, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out, lse = attend_segment(q, k, v, causal=False, softmax_scale=None, piece_tokens=16384)
    want = attention_oracle(q, k, v, causal=False)
    assert relative_error(out, want[0]) < 1e-2
    assert relative_error(lse, want[1]) < 1e-2


def test_a_session_decodes_in_a_thread(tmp_path: Path) -> None:
    film = clip(tmp_path / "film.mp4", 60)
    answers = []
    for background in (False, True):
        model = tiny_model(0, dtype=torch.bfloat16).to("cuda")
        session = Session(model, tiny_processor(model.config), background=background)
        video = session.load_video(film, num_frames=40)
        answers.append(session.ask("What?", [video], max_new_tokens=4).token_ids)
    assert answers[0] == answers[1]
