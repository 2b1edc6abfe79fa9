"""LongVILA: long-context vision-language models for long video.

Layers, lowest first (`tests/architecture` enforces the order): ``ops``, ``memory`` and ``media``
are maths on one process; ``sp`` is sequence parallelism for plain tensors and never imports
transformers; ``model`` is the single-device model in Hugging Face form and never imports ``sp``;
``parallel`` applies the one to the other.

Importing this package makes transformers' Auto classes know LongVILA without loading transformers
(see `longvila.model.auto`); the public names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from longvila.model.auto import install as _install
from longvila.model.auto import load_models as _load_models

__version__ = "0.1.0"

_PUBLIC = {
    "LongVILAConfig": "longvila.model.configuration_longvila",
    "LongVILAModel": "longvila.model.modeling_longvila",
    "LongVILAForConditionalGeneration": "longvila.model.modeling_longvila",
    "LongVILAImageProcessor": "longvila.model.image_processing_longvila",
    "LongVILAProcessor": "longvila.model.processing_longvila",
    "LongVILAVideoProcessor": "longvila.model.video_processing_longvila",
    "ParallelPlan": "longvila.parallel.apply",
    "parallelize": "longvila.parallel.apply",
    "unparallelize": "longvila.parallel.apply",
    "build_mesh": "longvila.sp.mesh",
}
__all__ = [*_PUBLIC]  # noqa: PLE0604 - keys are names

_install()


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    if name == "LongVILAConfig":  # A caller may look up models by the class alone.
        _load_models()
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
