"""Token folding: a grid of tokens as fewer, wider ones, and back (SynerGen-VL 3.1). A plain space-to-depth.

With a ratio of (m, n) the fold r C + c of a grid that is C folds wide covers rows r m .. r m + m - 1 and columns
c n .. c n + n - 1; inside it the m n codes are in raster order.
"""

from __future__ import annotations

from einops import rearrange

from diptych.core.tensors import Tensor

Ratio = tuple[int, int]  # (rows, columns) of the grid in one fold


def folded(grid: tuple[int, int], ratio: Ratio) -> tuple[int, int]:
    """(rows, columns) of folds of a grid. Raises ``ValueError`` where the ratio does not divide it."""
    if grid[0] % ratio[0] or grid[1] % ratio[1]:
        raise ValueError(f"a grid of {grid[0]}x{grid[1]} tokens does not fold by {ratio[0]}x{ratio[1]}")
    return grid[0] // ratio[0], grid[1] // ratio[1]


def fold(x: Tensor, ratio: Ratio) -> Tensor:
    """(N, h, w, ...) codes or features as (N, folds, codes of a fold, ...). Raises as ``folded`` does."""
    folded((x.shape[1], x.shape[2]), ratio)
    return rearrange(x, "N (r m) (c n) ... -> N (r c) (m n) ...", m=ratio[0], n=ratio[1])


def unfold(x: Tensor, grid: tuple[int, int], ratio: Ratio) -> Tensor:
    """The inverse of ``fold`` for a grid of (rows, columns) tokens."""
    rows, columns = folded(grid, ratio)
    return rearrange(x, "N (r c) (m n) ... -> N (r m) (c n) ...", r=rows, c=columns, m=ratio[0], n=ratio[1])
