"""Rows of several documents, and positions with gaps, in a model's own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longvila.testing.asserts import assert_close
from longvila.testing.tiny import tiny_model

IDS = torch.randint(250, (1, 12), generator=torch.Generator().manual_seed(0))
LENGTHS = [5, 7]
RESTARTING = torch.cat([torch.arange(n) for n in LENGTHS])[None]


@pytest.mark.parametrize(
    "said",
    [
        {"position_ids": RESTARTING},
        {"document_lengths": LENGTHS},
        {"document_lengths": torch.tensor(LENGTHS), "attention_mask": torch.ones_like(IDS)},
        {"document_lengths": [5, 0, 7], "position_ids": RESTARTING, "use_cache": False},
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_documents_of_a_row_do_not_see_each_other(said: dict[str, Any], attention: str) -> None:
    model = tiny_model()
    model.set_attn_implementation(attention)
    apart = torch.cat([model(input_ids=ids).logits for ids in IDS.split(LENGTHS, 1)], 1)
    assert_close(model(input_ids=IDS, **said).logits, apart, name="logits", tolerance=1e-5)


def test_the_first_token_of_a_document_is_no_target() -> None:
    model = tiny_model()
    losses = [model(input_ids=ids, labels=ids).loss for ids in IDS.split(LENGTHS, 1)]
    wanted = (losses[0] * 4 + losses[1] * 6) / 10
    loss = model(input_ids=IDS, labels=IDS, document_lengths=LENGTHS).loss
    assert_close(loss, wanted, name="loss", tolerance=1e-6)


def test_positions_that_leave_some_out_cut_no_document() -> None:
    model = tiny_model()
    positions = torch.arange(12)[None] * 3
    wanted = model(input_ids=IDS, position_ids=positions, attention_mask=torch.ones_like(IDS))
    for options in ({}, {"use_cache": False}):
        out = model(input_ids=IDS, position_ids=positions, **options)
        assert_close(out.logits, wanted.logits, name="logits", tolerance=1e-6)
    assert model(input_ids=IDS, position_ids=positions).past_key_values.get_seq_length() == 12


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"document_lengths": [5, 6]}, "add up to the tokens of one row"),
        ({"document_lengths": LENGTHS, "use_cache": True}, "has no cache"),
        ({"position_ids": RESTARTING * 2}, "leave some out"),
        (
            {"document_lengths": LENGTHS, "position_ids": torch.arange(12)[None]},
            r"documents of \[5, 7\] tokens, but position_ids restart at \[\]",
        ),
        ({"document_lengths": [6, 6], "position_ids": RESTARTING}, r"restart at \[5\]"),
        ({"document_lengths": [12], "position_ids": RESTARTING}, r"restart at \[5\]"),
        (
            {"document_lengths": LENGTHS, "attention_mask": (IDS[0, 0] != IDS).long()},
            "do not go with an attention_mask",
        ),
    ],
)
def test_what_transformers_cannot_be_told(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model()(input_ids=IDS, **said)
