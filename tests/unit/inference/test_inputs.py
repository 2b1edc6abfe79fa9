"""Rows get filler in front and one sample loses its padding."""

from __future__ import annotations

import pytest
import torch

from longvila.inference.inputs import pad_rows, whole_row


def test_rows_of_different_lengths_end_together() -> None:
    rows = [torch.tensor([1, 2, 3]), torch.tensor([[4]]), torch.tensor([5, 6])]
    ids, mask = pad_rows(rows)
    assert ids.tolist() == [[1, 2, 3], [4, 4, 4], [5, 5, 6]]
    assert mask is not None and mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    ids, mask = pad_rows(rows[:1] * 2)
    assert ids.shape == (2, 3) and mask is None
    whole = torch.ones(2, 5)
    assert pad_rows(whole)[0] is whole
    for wrong in ([], [torch.ones(2), torch.ones(0)]):
        with pytest.raises(ValueError, match="at least one token"):
            pad_rows(wrong)


def test_padding_of_one_sample_is_left_out() -> None:
    ids = torch.tensor([[9, 9, 1, 2]])
    assert whole_row(ids, torch.tensor([[0, 0, 1, 1]])).tolist() == [[1, 2]]
    assert whole_row(ids, None) is ids
    with pytest.raises(ValueError, match="no token"):
        whole_row(ids, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="one sample"):
        whole_row(ids.expand(2, -1), None)
