"""Sinusoids: the frozen 2-D tables of picture positions and the features of a timestep."""

from __future__ import annotations

import torch
from torch import nn

from diptych.core.tensors import Float, Int, Tensor


def _waves(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    angle = x[..., None] * 10000 ** -(torch.arange(width // 2, dtype=torch.float64, device=x.device) / (width // 2))
    return angle.sin(), angle.cos()


def grid_table(side: int, width: int) -> Float[Tensor, "places d"]:
    """Sine-cosine table of a ``side`` x ``side`` grid, row-major: the first half of the features encodes the column,
    the second half the row, each as [sin, cos] (BAGEL's ``modeling/bagel/modeling_utils.py``)."""
    if width % 4:
        raise ValueError(f"a 2-D position table needs a width that is a multiple of 4, not {width}")
    if torch.get_default_device().type == "meta":  # arithmetic there imports torch._dynamo
        return torch.empty(side * side, width)
    place = torch.arange(side, dtype=torch.float64)
    line = torch.cat(_waves(place, width // 2), -1)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return torch.cat([columns, rows], -1).flatten(0, 1).float()


def grid_places(
    grid: tuple[int, int], side: int, device: torch.device | str = "cpu", stretch: bool = False
) -> Int[Tensor, " n"]:
    """Places of a (rows, columns) grid in a table of ``side``: row * side + column. With ``stretch`` a grid of any size
    is spread over the whole table (BAGEL's ``interpolate_pos``). Raises ``ValueError`` when it does not fit."""
    if stretch:
        row, column = (_spread(n, side, device) for n in grid)
        return (row[:, None] * side + column).flatten()
    if max(grid) > side:
        raise ValueError(f"a picture of {grid[0]}x{grid[1]} tokens does not fit the {side}x{side} position table")
    row, column = torch.arange(grid[0], device=device), torch.arange(grid[1], device=device)
    return (row[:, None] * side + column).flatten()


def _spread(n: int, side: int, device: torch.device | str) -> Tensor:
    """floor(side i / n) of i < n, with the float32 rounding of the published code where that is a whole number."""
    edges = torch.arange(1 / side, 1, 1 / side, device=device)
    return torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / n, device=device), edges, right=True)


class TimestepEmbedding(nn.Module):
    """Width-``width`` features of times, taken as they are: 256 sinusoids (cosines first), linear, SiLU, linear."""

    def __init__(self, width: int, frequencies: int = 256, hidden: int | None = None) -> None:
        super().__init__()
        self.frequencies, hidden = frequencies, hidden or width
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden), nn.SiLU(), nn.Linear(hidden, width))

    def sinusoid(self, t: Float[Tensor, " n"]) -> Float[Tensor, "n f"]:
        """[cos, sin] of t * 10000^(-i / half)."""
        sin, cos = _waves(t.double(), self.frequencies)
        return torch.cat([cos, sin], -1).float()

    def forward(self, t: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Features of the times, in the dtype of the MLP."""
        return self.mlp(self.sinusoid(t).to(next(self.mlp.parameters()).dtype))
