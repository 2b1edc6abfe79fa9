"""What a vision-language model is made of, as plain numbers, and the sizes the original trains.

A text model is layers of attention and a gated MLP between an embedding and a head; a tower is
layers of full attention over the patches of one frame; a projector joins patches to rows. Formulas
elsewhere (`longvila.memory.estimate`, `longvila.memory.operations`) read these numbers alone, so
that a plan needs neither a model nor transformers. `longvila.parallel.sizes` reads them from a
configuration or from a model, with parameters counted one by one.

It knows no mixture of experts and no recurrent layer.

Letters: M model dim, I MLP dim, H query heads, K kv heads, D head dim, V vocabulary rows, C tower
dim, P patches of a frame, N rows of a frame.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Any

from longvila.errors import LongVILAError


class PlanError(LongVILAError, ValueError):
    """A plan was asked for something that has no meaning; the message says what would."""


@dataclass(frozen=True, kw_only=True)
class TextSize:
    """A causal language model.

    Attributes:
        layers: Layers.
        width: M.
        mlp_width: I.
        heads: H.
        kv_heads: K.
        head_dim: D.
        vocabulary: V, rows of the embedding.
        layer_parameters: Parameters of one layer.
        layer_matrices: Of those, in linear layers.
        mlp_matrices: Of those, in the MLP.
        other_parameters: Parameters in neither layers, embedding nor head: the last norm.
        tied: Whether the head is the embedding.
        qk_norm: Whether queries and keys are normalised.
    """

    layers: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    layer_parameters: int
    layer_matrices: int
    mlp_matrices: int
    other_parameters: int
    tied: bool = False
    qk_norm: bool = False

    @classmethod
    def gated(
        cls,
        *,
        layers: int,
        width: int,
        mlp_width: int,
        heads: int,
        kv_heads: int,
        vocabulary: int,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        tied: bool = False,
        qk_norm: bool = False,
    ) -> TextSize:
        """Count the parameters of a model like Llama or Qwen.

        Args:
            layers: Layers.
            width: M.
            mlp_width: I.
            heads: H.
            kv_heads: K.
            vocabulary: V.
            head_dim: D; M / H if None.
            qkv_bias: Whether query, key and value projections have a bias.
            tied: Whether the head is the embedding.
            qk_norm: Whether queries and keys are normalised.

        Returns:
            The sizes: a layer has ``2 M H D + 2 M K D + 3 M I`` weights in matrices, two norms
            of M, and what the flags add.
        """
        d = width // heads if head_dim is None else head_dim
        mlp = 3 * width * mlp_width
        matrices = 2 * width * heads * d + 2 * width * kv_heads * d + mlp
        vectors = 2 * width + qkv_bias * (heads + 2 * kv_heads) * d + qk_norm * 2 * d
        return cls(
            layers=layers,
            width=width,
            mlp_width=mlp_width,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=d,
            vocabulary=vocabulary,
            layer_parameters=matrices + vectors,
            layer_matrices=matrices,
            mlp_matrices=mlp,
            other_parameters=width,
            tied=tied,
            qk_norm=qk_norm,
        )

    @property
    def embedding_parameters(self) -> int:
        """Rows of the embedding times M."""
        return self.vocabulary * self.width

    @property
    def head_parameters(self) -> int:
        """Parameters of the head that are not the embedding's."""
        return 0 if self.tied else self.embedding_parameters

    @property
    def parameters(self) -> int:
        """All parameters."""
        layers = self.layers * self.layer_parameters
        return layers + self.embedding_parameters + self.head_parameters + self.other_parameters


@dataclass(frozen=True, kw_only=True)
class TowerSize:
    """A vision tower and the projector behind it.

    Attributes:
        layers: Layers that run.
        width: C.
        mlp_width: Width of the tower's MLP.
        heads: Heads.
        patches: P, patches of a frame.
        pixels: Values of a frame.
        matrices: Weights of the linear layers and the patch embedding.
        parameters: All parameters of the tower.
        rows: N, tokens that a frame gives the language model.
        separators: Text tokens after each frame.
        together: Frames whose patches attend to each other.
        projected: Rows of a frame in the projector, where they are pooled behind it; else N.
        joined_width: Width of what the projector's first linear layer reads.
        projector_matrices: Weights of the projector's linear layers.
        projector_parameters: All parameters of the projector.
        frames_per_call: Frames in the tower at once; None for all.
        adjustable: Whether the model's configuration says how many.
    """

    layers: int
    width: int
    mlp_width: int
    heads: int
    patches: int
    pixels: int
    matrices: int
    parameters: int
    rows: int
    separators: int = 1
    together: int = 1
    projected: int | None = None
    joined_width: int = 0
    projector_matrices: int = 0
    projector_parameters: int = 0
    frames_per_call: int | None = 32
    adjustable: bool = True

    @classmethod
    def siglip(
        cls,
        *,
        text_width: int,
        layers: int = 27,
        width: int = 1152,
        mlp_width: int = 4304,
        heads: int = 16,
        image_size: int = 384,
        patch_size: int = 14,
        unused_layers: int = 1,
        block: int = 2,
        separators: int = 1,
        frames_per_call: int | None = 32,
    ) -> TowerSize:
        """Count a SigLIP tower that is cut after the layer it is read from, and its projector.

        Args:
            text_width: M.
            layers: Layers of the whole tower.
            width: C.
            mlp_width: Width of its MLP.
            heads: Heads.
            image_size: Pixels along a side.
            patch_size: Pixels along a side of a patch.
            unused_layers: Layers behind the one whose output is used.
            block: Patches along a side that the projector joins into a row.
            separators: Text tokens after each frame.
            frames_per_call: Frames in the tower at once.
        """
        side = image_size // patch_size
        used = layers - unused_layers
        per_layer = 4 * width * width + 2 * width * mlp_width
        vectors = 4 * width + (4 * width + mlp_width + width)
        embedding = 3 * patch_size**2 * width
        joined = block * block * width
        linear = joined * text_width + text_width * text_width
        return cls(
            layers=used,
            width=width,
            mlp_width=mlp_width,
            heads=heads,
            patches=side * side,
            pixels=3 * image_size**2,
            matrices=used * per_layer + embedding,
            parameters=used * (per_layer + vectors) + embedding + width + side * side * width,
            rows=(-(-side // block)) ** 2,
            separators=separators,
            joined_width=joined,
            projector_matrices=linear,
            projector_parameters=linear + 2 * text_width + 2 * joined,
            frames_per_call=frames_per_call,
        )

    @property
    def projector_rows(self) -> int:
        """Rows of a frame that go through the projector."""
        return self.rows if self.projected is None else self.projected

    @property
    def tokens(self) -> int:
        """Tokens of a frame in the text, with its separator."""
        return self.rows + self.separators


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A model: text, and a tower or none.

    Attributes:
        name: For messages.
        text: The language model.
        tower: Tower and projector, None for text alone.
    """

    name: str
    text: TextSize
    tower: TowerSize | None = None

    @property
    def parameters(self) -> int:
        """All parameters."""
        tower = self.tower
        media = 0 if tower is None else tower.parameters + tower.projector_parameters
        return self.text.parameters + media

    @property
    def root_parameters(self) -> int:
        """Parameters outside the text layers: one FSDP group, gathered for a whole step."""
        return self.parameters - self.text.layers * self.text.layer_parameters

    def with_frames_per_call(self, frames: int | None) -> ModelSize:
        """Return the model with another micro-batch of frames."""
        if self.tower is None:
            return self
        return replace(self, tower=replace(self.tower, frames_per_call=frames))


# ---- presets -----------------------------------------------------------------------------------

#: Sizes by the configurations that are published with the weights.
_TEXT: dict[str, dict[str, Any]] = {
    "qwen2-1.5b": {
        "layers": 28, "width": 1536, "mlp_width": 8960, "heads": 12, "kv_heads": 2,
        "vocabulary": 151936, "qkv_bias": True, "tied": True,
    },
    "qwen2-7b": {
        "layers": 28, "width": 3584, "mlp_width": 18944, "heads": 28, "kv_heads": 4,
        "vocabulary": 152064, "qkv_bias": True,
    },
    "llama3-8b": {
        "layers": 32, "width": 4096, "mlp_width": 14336, "heads": 32, "kv_heads": 8,
        "vocabulary": 128256,
    },
    "llama2-13b": {
        "layers": 40, "width": 5120, "mlp_width": 13824, "heads": 40, "kv_heads": 40,
        "vocabulary": 32000,
    },
    "yi-34b": {
        "layers": 60, "width": 7168, "mlp_width": 20480, "heads": 56, "kv_heads": 8,
        "vocabulary": 64000,
    },
}  # fmt: skip

#: Preset: language model, and the side of a frame in pixels.
_PRESETS: dict[str, tuple[str, int]] = {
    "1.5B": ("qwen2-1.5b", 384),
    "7B": ("qwen2-7b", 384),
    "7B-448": ("qwen2-7b", 448),
    "8B": ("llama3-8b", 384),
    "13B": ("llama2-13b", 384),
    "34B": ("yi-34b", 384),
}
_ALIASES = {
    "longvila-1.5b-256f": "1.5B", "qwen2-1.5b-longvila-256f": "1.5B", "longvila-1.5b": "1.5B",
    "longvila-7b-1m": "7B", "qwen2-7b-longvila-1m": "7B", "longvila-7b": "7B",
    "longvila-7b-256f": "7B-448", "qwen2-7b-longvila-256f": "7B-448",
    "longvila-8b": "8B", "llama3-longvila-8b": "8B", "llama3-8b": "8B",
    "vila1.5-13b": "13B", "vila1.5-34b": "34B",
}  # fmt: skip


def preset_names() -> tuple[str, ...]:
    """Return the names of the presets."""
    return tuple(_PRESETS)


def preset(name: str) -> ModelSize:
    """Return a size by its name: ``7B``, ``longvila-7b-1m``, ``org/qwen2-7b-longvila-1M``.

    Args:
        name: Name in any case; what stands before a slash is left out.

    Raises:
        PlanError: If there is none of this name; the nearest ones are given.

    Source: The configurations published with Qwen2, Llama 3, Llama 2, Yi and SigLIP-so400m; which
        of them make up LongVILA, and that it reads SigLIP's next-to-last layer and joins 2 x 2
        patches (27 x 27, padded to 28 x 28, to 14 x 14 = 196 rows and a newline), from upstream's
        code. The 34B text model had another tower upstream; here it has SigLIP like the others.
    """
    short = name.rsplit("/", 1)[-1].lower()
    by_lower = {each.lower(): each for each in _PRESETS}
    known = by_lower.get(short) or _ALIASES.get(short)
    if known is None:
        near = difflib.get_close_matches(short, [*by_lower, *_ALIASES], n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise PlanError(
            f"there is no preset {name!r} and no folder of that name{hint}; presets are "
            f"{', '.join(_PRESETS)}, or give the folder of a model"
        )
    text_name, side = _PRESETS[known]
    text = TextSize.gated(**_TEXT[text_name])
    return ModelSize(
        name=known, text=text, tower=TowerSize.siglip(text_width=text.width, image_size=side)
    )
