"""TRL's SFTTrainer over a mesh: all there is to write."""

from __future__ import annotations

from dataclasses import dataclass

from trl import SFTConfig, SFTTrainer

from longvila.train.arguments import MeshArguments
from longvila.train.trainer import MeshTrainer


@dataclass
class Arguments(MeshArguments, SFTConfig):
    """Arguments of both."""


class MeshSFTTrainer(MeshTrainer, SFTTrainer):
    """A trainer that is both."""
