"""What a family of models tells the two-stage forward; its fields are the whole seam.

Media of one kind are a list of *items* (a video, an image), each described by a few integers: a
frame count, or a grid. Items fall into *units*, what must be encoded whole, and a unit's pixels are
consecutive entries of the first dimension of the kind's pixels, in item order. What this dimension
counts (frames, tiles, patches) is the family's choice; elsewhere it is called frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

#: Patches that go through a tower at once.
PATCHES_PER_CALL = 8192


def patches_per_tile(vision_config: Any) -> int:
    """Patches of one tile of a tower with a fixed, possibly rectangular, input size."""
    size, patch = vision_config.image_size, vision_config.patch_size
    size = [size, size] if isinstance(size, int) else size
    patch = [patch, patch] if isinstance(patch, int) else patch
    return int((size[0] // patch[0]) * (size[1] // patch[1]))


@dataclass(frozen=True)
class MediaUnits:
    """All media of one kind in a batch, cut into what is encoded whole.

    Attributes:
        frames: Entries of the pixels that each unit takes, in order.
        rows: Rows that each unit gives.
        costs: Relative cost of each unit.
        slots: ``(N,)`` for row n, in unit order, which of the kind's placeholders it replaces.
        shapes: What the encoder is told about each unit; None for its frames.
    """

    frames: tuple[int, ...]
    rows: tuple[int, ...]
    costs: tuple[int, ...]
    slots: Tensor
    shapes: tuple[Any, ...] | None = None

    @property
    def unit_shapes(self) -> tuple[Any, ...]:
        """What the encoder is told about each unit."""
        return self.frames if self.shapes is None else self.shapes


@dataclass(frozen=True)
class MediaKind:
    """One kind of medium of a family.

    Attributes:
        name: "image" or "video".
        pixels: Name of the input with the pixels of the whole batch.
        counts: Name of the input that describes each item: ``(items,)`` frame counts, or
            ``(items, n)`` integers, which ``units`` gets as tuples.
        token_id: The placeholder's id, from the model's configuration.
        units: Cuts items into units, from the configuration and their descriptions alone.
        encode: Rows ``(n, M * row_multiple)`` of some units from their pixels and shapes.
        blank: Pixels of one smallest unit, all zero, and its shape: what a rank without media
            encodes where every rank must run the tower.
        default_counts: Descriptions where only the pixels' first dimension is known.
        frames_per_call: Entries that go through the encoder at once, from the configuration; None
            for all.
    """

    name: str
    pixels: str
    counts: str
    token_id: Callable[[Any], int]
    units: Callable[[Any, Sequence[Any]], MediaUnits]
    encode: Callable[[PreTrainedModel, Tensor, Sequence[Any]], Tensor]
    blank: Callable[[PreTrainedModel], tuple[Tensor, Sequence[Any]]]
    default_counts: Callable[[int], list[Any]]
    frames_per_call: Callable[[Any], int | None]


def _no_positions(model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor | None:
    return None


def _rows_only(rows: Tensor, places: Tensor, embeds: Tensor) -> tuple[Tensor, dict[str, Any]]:
    return rows, {}


def _as_given(config: Any, batch: dict[str, Any]) -> dict[str, Any]:
    return batch


@dataclass(frozen=True)
class Family:
    """Where the parts of one kind of model are.

    Attributes:
        name: For messages.
        model_types: ``config.model_type`` of the models it covers.
        text_model: The decoder without its head.
        embed: Embeddings of a run of ids.
        vision_modules: Modules whose parameters serve media only, in the order that media pass.
        checkpoint_media: Tells the encoder to recompute what follows a frozen first module, or not
            to, and returns what it was told before.
        media: The kinds of media it knows.
        inputs: Further inputs that ``prepare`` or ``position_ids`` read.
        prepare: Turns the inputs that the model's processor makes into those that ``media``
            describe, from the configuration.
        position_ids: Positions of the whole batch: ``(B, columns)``, or ``(3, B, columns)`` for
            rotary embeddings over time, height and width, or ``(4, B, columns)`` with ordinary
            positions first, which tell documents apart; None for positions that count tokens.
        row_multiple: Columns of a row over M, from the configuration.
        text_inputs: Splits received rows into the ``(n, M)`` that replace embeddings and further
            keywords of the text model; gets the local tokens ``(n,)`` that the rows replace and
            the local embeddings ``(L, M)``.
        extra_parameters: Parameters that serve media only and are in none of ``vision_modules``.
        projector: What of ``vision_modules`` makes rows of the encoder's features: what is trained
            as the projector.
        unit_towers: Towers that attend within units of any size, which
            `longvila.parallel.tower_attention` gives one call for all units.
    """

    name: str
    model_types: tuple[str, ...]
    text_model: Callable[[PreTrainedModel], PreTrainedModel]
    embed: Callable[[PreTrainedModel, Tensor], Tensor]
    vision_modules: Callable[[PreTrainedModel], list[nn.Module]] = field(default=lambda model: [])
    checkpoint_media: Callable[[PreTrainedModel, bool], bool] = field(
        default=lambda model, enable: enable
    )
    media: tuple[MediaKind, ...] = ()
    position_ids: Callable[[PreTrainedModel, Mapping[str, Any]], Tensor | None] = _no_positions
    inputs: tuple[str, ...] = ()
    prepare: Callable[[Any, dict[str, Any]], dict[str, Any]] = _as_given
    row_multiple: Callable[[Any], int] = lambda config: 1
    text_inputs: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Any]]] = _rows_only
    extra_parameters: Callable[[PreTrainedModel], list[nn.Parameter]] = lambda model: []
    projector: Callable[[PreTrainedModel], list[nn.Module]] | None = None
    unit_towers: Callable[[PreTrainedModel], list[PreTrainedModel]] = lambda model: []

    def media_parameters(self, model: PreTrainedModel) -> list[nn.Parameter]:
        """Every parameter that serves media only."""
        modules = self.vision_modules(model)
        inside = [parameter for module in modules for parameter in module.parameters()]
        return [*inside, *self.extra_parameters(model)]

    def projector_parameters(self, model: PreTrainedModel) -> list[nn.Parameter]:
        """Every parameter that is trained as the projector's."""
        if self.projector is None:
            modules = self.vision_modules(model)[1:]
        else:
            modules = self.projector(model)
        inside = [parameter for module in modules for parameter in module.parameters()]
        return [*inside, *self.extra_parameters(model)]

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        """The text model's layers: what is recomputed and sharded one by one."""
        layers = self.text_model(model).layers
        assert isinstance(layers, nn.ModuleList)
        return layers
