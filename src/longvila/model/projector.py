"""From features of the vision tower to rows for the language model.

1. A downsampling projector first joins each block of ``n x n`` patches into one token by writing
   their channels one after the other, row by row inside the block (`SpaceToDepth`). Sides that
   do not divide are padded with zero patches at the bottom and on the right: 27 becomes 28.
2. Then come LayerNorms, linear layers and exact (erf) GELUs, per token.

| projector_type | layers (C tower channels, M model dim) |
| --- | --- |
| ``identity`` | none; C must be M |
| ``linear`` | C>M |
| ``mlp<n>x_gelu`` | C>M, then n-1 times GELU, M>M |
| ``mlp_downsample``, ``mlp_downsample_2x2_fix`` | 2x2, LN, 4C>M, GELU, M>M |
| ``mlp_downsample_3x3_fix`` | 3x3, LN, 9C>3C, GELU, LN, 3C>M, GELU, M>M |
| ``mlp_downsample_3x3_s2`` | 3x3, then LN and linear over 9C>3C>C>C/3>M, GELUs, M>M |
| ``mlp_downsample_3x3_s2_new`` | 3x3, then LN and linear over 9C>4C>2C>C>C/3>M, GELUs, M>M |
| ``mlp_downsample_<n>x<n>`` | nxn, LN, n²C>M, GELU, M>M (ours: the 2x2 form for larger blocks) |

Parameters are named ``layers.<index>`` with upstream's indices, so conversion is a rename.
``token_order="column"`` emits the tokens column by column: weights from before upstream changed the
order of ``mlp_downsample`` were trained so. The order only permutes tokens.

Dimensions: F frames, P patches, N tokens of a frame, C tower channels, M model dim.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from longvila.model.configuration_longvila import (
    LongVILAConfig,
    downsample_factor,
    projector_depth,
)


class SpaceToDepth(nn.Module):
    """Join blocks of patches into tokens by concatenating channels.

    Args:
        factor: Side of a block in patches.
        grid: Patches of a frame as (height, width).
        token_order: ``row`` or ``column``, the order of the emitted tokens.
    """

    def __init__(self, factor: int, grid: tuple[int, int], token_order: str) -> None:
        super().__init__()
        self.factor, self.grid, self.token_order = factor, grid, token_order

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(F, P, C)`` to ``(F, N, factor² C)``.

        Args:
            x: Patches in row order, shape (F, P, C).

        Returns:
            Tokens, shape (F, N, factor² C).

        Raises:
            ValueError: If the number of patches is not that of the grid.
        """
        frames, patches, channels = x.shape
        height, width = self.grid
        if patches != height * width:
            raise ValueError(
                f"the tower gave {patches} tokens a frame, the projector expects "
                f"{height} x {width} = {height * width} patches; a class token is dropped with "
                'vision_feature_select="patch"'
            )
        n = self.factor
        x = x.view(frames, height, width, channels)
        if height % n or width % n:
            x = F.pad(x, (0, 0, 0, -width % n, 0, -height % n))
        rows, columns = x.shape[1] // n, x.shape[2] // n
        x = x.view(frames, rows, n, columns, n, channels)
        order = (0, 1, 3, 2, 4, 5) if self.token_order == "row" else (0, 3, 1, 2, 4, 5)
        return x.permute(order).reshape(frames, rows * columns, n * n * channels)

    def extra_repr(self) -> str:
        """Show the block, the grid and the order when the module is printed."""
        return f"factor={self.factor}, grid={self.grid}, token_order={self.token_order!r}"


def _chain(widths: list[int], out: int, first: nn.Module) -> nn.Sequential:
    """Blocks (LayerNorm, Linear, GELU) along widths, then one Linear without a norm."""
    layers: list[nn.Module] = [first]
    for a, b in zip(widths, [*widths[1:], out], strict=True):
        layers += [nn.LayerNorm(a), nn.Linear(a, b), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(out, out))


def build_layers(config: LongVILAConfig) -> nn.Module:
    """Build the layers of a projector by name.

    Args:
        config: Gives the name, the channels of the tower, the grid and the model dim.

    Returns:
        A module from (F, P, C) to (F, N, M) whose parameters carry upstream's names.

    Raises:
        ValueError: If the name is unknown, or ``identity`` meets different widths.
    """
    kind = config.projector_type
    c = config.vision_config.hidden_size
    m = config.text_config.hidden_size
    factor = downsample_factor(kind)
    if kind == "identity":
        if c != m:
            raise ValueError(f"projector identity needs equal widths, got {c} and {m}")
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(c, m)
    if depth := projector_depth(kind):
        layers: list[nn.Module] = [nn.Linear(c, m)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(m, m)]
        return nn.Sequential(*layers)
    join = SpaceToDepth(factor, config.patch_grid, config.token_order)
    if kind == "mlp_downsample_3x3_fix":
        return _chain([9 * c, 3 * c], m, join)
    if kind == "mlp_downsample_3x3_s2":
        return _chain([9 * c, 3 * c, c, c // 3], m, join)
    if kind == "mlp_downsample_3x3_s2_new":
        return _chain([9 * c, 4 * c, 2 * c, c, c // 3], m, join)
    return _chain([factor * factor * c], m, join)


class LongVILAProjector(nn.Module):
    """The projector of a model, chosen by ``config.projector_type``."""

    def __init__(self, config: LongVILAConfig) -> None:
        super().__init__()
        self.layers = build_layers(config)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (F, P, C) of the tower to rows (F, N, M) for the language model."""
        return self.layers(features)
