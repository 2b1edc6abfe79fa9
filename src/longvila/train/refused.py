"""What `longvila.train.trainer.MeshTrainer` refuses of the Trainer that it is put before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_REFUSED = {
    "model_init": "the model is put on the mesh once; build it before",
    "compute_metrics": "no rank has whole logits; evaluate answers with longvila.evaluation",
    "preprocess_logits_for_metrics": "no rank has whole logits",
    "compute_loss_func": "the loss is computed in tiles where the tokens are",
}
#: Classes whose loss is the mean cross-entropy; beside it, SFTTrainer's measures the logits.
_CROSS_ENTROPY = (("transformers", "Trainer"), ("trl", "SFTTrainer"))


def check_arguments(given: Mapping[str, Any]) -> None:
    """Refuse arguments of a Trainer that a mesh cannot serve.

    Args:
        given: Keyword arguments of the Trainer.

    Raises:
        ValueError: With the first of them, and why.
    """
    for name, why in _REFUSED.items():
        if given.get(name) is not None:
            raise ValueError(f"{name} is not supported: {why}")


def check_loss(trainer: type, mixin: type) -> None:
    """Refuse a class whose own loss would be passed over.

    Args:
        trainer: Class of the trainer.
        mixin: Its base whose ``compute_loss`` comes before those of the classes behind it.

    Raises:
        ValueError: With the class whose loss it is.
    """
    order = trainer.__mro__
    behind = order[order.index(mixin) + 1 :]
    owner = next((each for each in behind if "compute_loss" in vars(each)), None)
    if owner is None or (owner.__module__.split(".")[0], owner.__name__) in _CROSS_ENTROPY:
        return
    raise ValueError(
        f"{owner.__name__}.compute_loss would be passed over: {mixin.__name__} comes before it and "
        "trains on the mean cross-entropy of the targets, over all ranks. For another loss, write "
        f"compute_loss in a class before {mixin.__name__}, or a loop of your own around "
        "parallelize (docs/guides/parallelize.md: a loss of your own)"
    )
