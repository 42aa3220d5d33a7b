"""What the benchmarks share: best-of timing, a human table, one line of JSON at the end."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def best(work: Callable[[], Any], repeat: int = 5, warm: int = 1) -> float:
    """Seconds of the fastest of ``repeat`` runs after ``warm`` that are not counted."""
    for _ in range(warm):
        work()
    found = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        found = min(found, time.perf_counter() - start)
    return found


def finish(name: str, rows: list[dict[str, Any]], **summary: Any) -> None:
    """Prints the rows as a table and everything as one line of JSON."""
    table = Table(*map(str, rows[0]), title=name)
    for row in rows:
        table.add_row(*[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()])
    Console(width=140, markup=False).print(table)
    where = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    print(json.dumps({"benchmark": name, **where, **summary, "rows": rows}))
