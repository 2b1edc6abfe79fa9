"""Text behind media goes on from their height and width, wherever the sequence is cut."""

from __future__ import annotations

import pytest
import torch

from longvila.inference.positions import TextRuns

#: 3 of text, a frame of 2 x 2 whose positions span 2, 2 of text, another frame, 1 of text.
TIME = [0, 1, 2, 3, 3, 3, 3, 5, 6, 7, 7, 7, 7, 9]
HEIGHT = [0, 1, 2, 3, 3, 4, 4, 5, 6, 7, 7, 8, 8, 9]
WIDTH = [0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 8, 7, 8, 9]
MEDIA = [3, 4, 5, 6, 9, 10, 11, 12]


def positions() -> tuple[torch.Tensor, torch.Tensor]:
    is_media = torch.zeros(len(TIME), dtype=torch.bool)
    is_media[MEDIA] = True
    return torch.tensor([TIME, HEIGHT, WIDTH]), is_media


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 14])
def test_runs_do_not_depend_on_chunks(chunk: int) -> None:
    where, is_media = positions()
    runs = TextRuns()
    for start in range(0, len(TIME), chunk):
        runs = runs.read(where[:, start : start + chunk], is_media[start : start + chunk])
    assert len(TIME) + runs.offset == 10
    for length in (0, 1, 2, 3, 7, 8, 9, 13, 14):
        expected = ([0, *[t + 1 for t in TIME]])[length] if length not in (7, 13) else TIME[length]
        assert length + runs.cut(length).offset == expected
    assert runs.count(5).cut(16).offset == runs.offset


def test_a_cut_inside_media_is_refused_and_media_may_come_last() -> None:
    where, is_media = positions()
    runs = TextRuns().read(where[:, :7], is_media[:7])
    assert 7 + runs.offset == 5
    with pytest.raises(ValueError, match="inside a medium"):
        runs.cut(5)


@pytest.mark.parametrize("chunk", [1, 2, 10])
def test_seconds_of_a_video_do_not_move_the_text_behind_it(chunk: int) -> None:
    # 1 of text, two steps of 2 x 2 that are 20 apart, 1 of text.
    where = torch.tensor(
        [
            [0, 1, 1, 1, 1, 21, 21, 21, 21, 3],
            [0, 1, 1, 2, 2, 1, 1, 2, 2, 3],
            [0, 1, 2, 1, 2, 1, 2, 1, 2, 3],
        ]
    )
    is_media = torch.tensor([False, *[True] * 8, False])
    runs = TextRuns()
    for start in range(0, 10, chunk):
        runs = runs.read(where[:, start : start + chunk], is_media[start : start + chunk])
    for length, expected in ((1, 1), (9, 3), (10, 4)):
        assert length + runs.cut(length).offset == expected
    assert 9 + TextRuns().read(where[:, :9], is_media[:9]).offset == 3
