"""Positions with jumps: where they stand, how far they reach, attention across them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longvila.data.collate import Collator
from longvila.data.encode import IGNORE_INDEX, Document
from longvila.data.spread import JUMPS, spread_positions
from longvila.parallel.apply import ParallelPlan, parallelize
from longvila.sp.mesh import SPMesh
from longvila.testing.asserts import assert_close
from longvila.testing.tiny import tiny_model

FRAME, TEXT = 9, 5


def _video(frames: int, seed: int) -> Tensor:
    """Two words, then frames of four placeholders and a newline, then four words."""
    words = torch.randint(20, 99, (6,), generator=torch.Generator().manual_seed(seed))
    frame = torch.tensor([FRAME] * 4 + [TEXT])
    return torch.cat([words[:2], frame.repeat(frames), words[2:]])


def test_jumps_stand_between_frames_and_reach_the_context() -> None:
    reach, furthest, spread = 10_000, 0, 0
    for seed in range(200):
        ids = _video(50, seed)
        positions = spread_positions(ids, reach, [FRAME, 8])
        steps = positions.diff()
        places = (steps > 1).nonzero().flatten()
        assert positions[0] == 0 and steps.min() == 1 and positions[-1] < reach
        assert places.numel() <= JUMPS
        assert (ids[places] == FRAME).all() and (ids[places + 1] == TEXT).all()
        furthest, spread = max(furthest, int(positions[-1])), spread + (places.numel() > 0)
    assert furthest > 0.95 * reach
    assert 70 <= spread <= 130  # half of them


def test_the_same_tokens_have_the_same_positions() -> None:
    for seed in range(20):
        one, other = (spread_positions(_video(9, seed), 500, [FRAME]) for _ in range(2))
        assert torch.equal(one, other)


def test_text_alone_may_jump_anywhere() -> None:
    places = set()
    for seed in range(300):
        ids = torch.randint(20, 99, (30,), generator=torch.Generator().manual_seed(seed))
        places |= set((spread_positions(ids, 500, [FRAME]).diff() > 1).nonzero().flatten().tolist())
    assert places == set(range(29))


@pytest.mark.parametrize(("size", "reach"), [(1, 1), (1, 50), (40, 40)])
def test_nothing_to_spread(size: int, reach: int) -> None:
    positions = spread_positions(torch.full((size,), TEXT), reach)
    assert positions.tolist() == list(range(size))


def test_a_document_beyond_the_reach_is_refused() -> None:
    with pytest.raises(ValueError, match="41 tokens does not fit 40"):
        spread_positions(torch.zeros(41, dtype=torch.int64), 40)


def test_a_batch_spreads_each_document() -> None:
    ids = [torch.arange(20, 20 + n) for n in (30, 40, 50, 60, 70)]
    labels = [each.clone() for each in ids]
    for each in labels:
        each[0] = IGNORE_INDEX
    documents = [
        Document(str(n), each, label, (each.numel(),))
        for n, (each, label) in enumerate(zip(ids, labels, strict=True))
    ]
    documents.append(  # two in one
        Document("p", torch.cat(ids[:2]), torch.cat(labels[:2]), (30, 40))
    )
    batch = Collator(None, spread=1000)(documents)
    expected = [spread_positions(each, 1000) for each in [*ids, *ids[:2]]]
    assert torch.equal(batch["position_ids"][0], torch.cat(expected))
    assert batch["document_lengths"] == [30, 40, 50, 60, 70, 30, 40]


def test_a_model_attends_across_jumps() -> None:
    """A document with jumps stays one document in the two-stage step."""
    plain = tiny_model(dtype=torch.float64).train()
    ids = torch.randint(20, 60, (1, 24), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([spread_positions(each, 90) for each in ids[0].split([14, 10])])[None]
    assert (positions.diff() > 1).any()
    model = parallelize(
        tiny_model(dtype=torch.float64).train(), SPMesh(), ParallelPlan(fsdp=False, two_stage=True)
    )
    both = model(input_ids=ids, labels=ids, position_ids=positions, document_lengths=[14, 10]).loss
    parts = [
        plain(
            input_ids=part,
            labels=part,
            position_ids=at,
            attention_mask=torch.ones_like(part),  # without it a jump would start a document
        ).loss
        for part, at in zip(ids.split([14, 10], 1), positions.split([14, 10], 1), strict=True)
    ]
    # Rotary tables are float32.
    assert_close(both, (13 * parts[0] + 9 * parts[1]) / 22, tolerance=1e-6)
