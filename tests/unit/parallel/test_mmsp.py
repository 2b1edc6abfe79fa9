"""Plans, inputs and messages of the two-stage forward, on one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from longvila.log import log_once
from longvila.parallel.apply import ParallelPlan, parallelize
from longvila.parallel.families import find_family
from longvila.parallel.mmsp import gather_logits
from longvila.sp.mesh import SPMesh
from longvila.testing.asserts import assert_close
from longvila.testing.tiny import TINY_IMAGE_ID, TINY_VIDEO_ID, tiny_config, tiny_model

PLAN = ParallelPlan(fsdp=False, two_stage=True)


def batch_of(frames: int = 2) -> dict[str, Any]:
    ids = torch.cat([torch.arange(4), torch.full((9 * frames,), TINY_VIDEO_ID), torch.arange(6)])
    labels = ids.masked_fill(ids == TINY_VIDEO_ID, -100)
    return {
        "input_ids": ids[None], "labels": labels[None],
        "pixel_values_videos": torch.randn(frames, 3, 20, 20),
        "video_num_frames": torch.tensor([frames]),
    }  # fmt: skip


def test_shifted_labels_may_come_shifted() -> None:
    """As trainers pass them beside or in place of labels."""
    model = parallelize(tiny_model().train(), SPMesh(), PLAN)
    batch = batch_of()
    expected = model(**batch).loss
    shifted = torch.nn.functional.pad(batch.pop("labels"), (0, 1), value=-100)[:, 1:]
    assert torch.equal(model(**batch, shift_labels=shifted).loss, expected)


def test_counts_may_be_left_out() -> None:
    """Frames without counts are one video, tiles without counts one image each."""
    model = parallelize(tiny_model().train(), SPMesh(), PLAN)
    batch = batch_of(3)
    expected = model(**batch).loss
    assert torch.equal(model(**{**batch, "video_num_frames": 3}).loss, expected)
    batch.pop("video_num_frames")
    assert torch.equal(model(**batch).loss, expected)
    ids = torch.full((1, 18), TINY_IMAGE_ID)
    ids = torch.cat([ids, torch.arange(5)[None]], dim=1)
    labels = ids.masked_fill(ids == TINY_IMAGE_ID, -100)
    assert model(ids, torch.randn(2, 3, 20, 20), labels=labels).loss.isfinite()


def test_placeholders_are_no_targets() -> None:
    model = parallelize(tiny_model().train(), SPMesh(), PLAN)
    batch = batch_of()
    with pytest.raises(ValueError, match=r"labels ask for \d+ ids .* set labels to -100 there"):
        model(**{**batch, "labels": batch["input_ids"]})


def test_another_loss_is_not_passed_over() -> None:
    model = parallelize(tiny_model().train(), SPMesh(), PLAN)
    model.loss_function = lambda *args, **kwargs: torch.zeros(())
    with pytest.raises(ValueError, match="was given a loss_function"):
        model(**batch_of())


def test_documents_may_be_given_by_length() -> None:
    """Two documents in one row, without positions: each as if it were alone."""
    model = parallelize(tiny_model(dtype=torch.float64).train(), SPMesh(), PLAN)
    ids = torch.arange(20)[None]
    both = model(input_ids=ids, labels=ids, document_lengths=[8, 12]).loss
    one, two = (model(input_ids=part, labels=part).loss for part in ids.split([8, 12], dim=1))
    assert_close(both, (7 * one + 11 * two) / 18)


def test_logits_come_with_their_places() -> None:
    model = parallelize(tiny_model().train(), SPMesh(), PLAN)
    batch = batch_of()
    output = model(**batch, output_logits=True)
    assert output.logits.shape == (1, 28, tiny_config().text_config.vocab_size)
    assert torch.equal(output.token_indices, torch.arange(28))
    with pytest.raises(ValueError, match="output_logits=True"):
        gather_logits(model(**batch), (1, 28), SPMesh())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 28, 32)}, r"does not take \['inputs_embeds'\]"),
        ({"use_cache": True}, "cannot serve use_cache=True"),
        ({"logits_to_keep": 1}, "cannot serve logits_to_keep=1"),
        ({"logits_to_keep": torch.arange(2)}, r"cannot serve logits_to_keep=tensor\(\[0, 1"),
        ({"labels": torch.zeros(1, 5).long()}, r"labels must have the shape of input_ids, \(1, 28"),
        ({"input_ids": torch.zeros(28).long()}, r"input_ids must be \(B, columns\), got \(28,\)"),
        ({"input_ids": None}, r"input_ids must be \(B, columns\), got None"),
        ({"pixel_values_videos": torch.zeros(1, 3, 20, 20)}, "has 1 frames, but video_num_frames"),
    ],
)
def test_steps_that_cannot_be_served_are_refused(extra: dict[str, Any], message: str) -> None:
    model = parallelize(tiny_model().train(), SPMesh(), PLAN)
    with pytest.raises(ValueError, match=message):
        model(**{**batch_of(), **extra})


@pytest.mark.parametrize("side", ["left", "right"])
def test_targets_at_padding_are_left_out_with_a_word(
    side: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The model alone counts them: who compares the two should not have to search."""
    log_once.cache_clear()
    model = parallelize(tiny_model(dtype=torch.float64).train(), SPMesh(), PLAN)
    ids = torch.arange(12)[None]
    mask = (ids < 9 if side == "right" else ids >= 3).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 3] = -100  # behind padding on the left
    clean = model(input_ids=ids, labels=labels, attention_mask=mask).loss
    assert not caplog.records
    if side == "right":
        labels = torch.where(mask == 0, ids, labels)
    else:
        labels[:, 3] = 3
    assert torch.equal(model(input_ids=ids, labels=labels, attention_mask=mask).loss, clean)
    assert "the model's own forward counts it" in caplog.text


def test_a_frozen_tower_runs_in_micro_batches() -> None:
    """Whatever the family does inside: here one that takes all frames it is given at once."""
    model = tiny_model().train()
    model.model.vision_tower.requires_grad_(False)
    family = find_family(model)
    seen: list[int] = []

    def encode(model: Any, pixels: Tensor, shapes: Any) -> Tensor:
        seen.append(pixels.shape[0])
        return family.media[1].encode(model, pixels, shapes)

    parallelize(model, SPMesh(), PLAN)
    two_stage = vars(model)["_longvila_parallel"].two_stage
    two_stage.family = replace(
        family, media=(family.media[0], replace(family.media[1], encode=encode))
    )
    model(**batch_of(6)).loss.backward()
    assert seen == [4, 2]
