"""What a run says while it runs: a progress bar on a terminal, a line now and then elsewhere, metrics.jsonl always,
TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


def memory() -> float:
    """The most memory this process has held, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform != "darwin" else 2**30)


class Log:
    """Writes one JSON object a step; shows the latest. Lines of steps that a resumed run repeats are cut first."""

    def __init__(self, run: Path, total: int, step: int, show: bool = True) -> None:
        self.path, self.total, self.show = run / "metrics.jsonl", total, show
        keep_until(self.path, step)
        self.file: TextIO = self.path.open("a")
        self.recent: deque[tuple[float, int]] = deque(maxlen=50)
        self.last_line = 0.0
        self.board = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step)
        self.console = Console(stderr=True)
        self.bar = None
        if show and self.console.is_terminal:
            columns = (TextColumn("{task.fields[stage]}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            self.bar = Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[text]}"), console=self.console)
            self.task = self.bar.add_task("", total=total, completed=step, stage="", text="")
            self.bar.start()

    def step(self, row: Mapping[str, Any]) -> None:
        """Records one step; ``row`` has at least step, stage and loss."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.board:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.board.add_scalar(name, value, int(row["step"]))
        now = time.perf_counter()
        self.recent.append((now, int(row["step"])))
        if not self.show:
            return
        if self.bar:
            self.bar.update(self.task, completed=row["step"], stage=row["stage"], text=self._text(row))
        elif now - self.last_line > 15 or row["step"] == self.total:
            self.last_line = now
            self.console.print(f"{row['stage']} {row['step']}/{self.total}  {self._text(row)}", highlight=False)

    def _text(self, row: Mapping) -> str:
        terms = "  ".join(f"{k[5:]} {v:.3f}" for k, v in row.items() if k.startswith("loss/"))
        (t0, s0), (t1, s1) = self.recent[0], self.recent[-1]
        left = (self.total - s1) * (t1 - t0) / (s1 - s0) if s1 > s0 else 0.0
        return (
            f"loss {row['loss']:.3f}  {terms}  {row['tokens_per_second']:.0f} tok/s  "
            f"{row['images_per_second']:.0f} img/s  wait {row['data_wait']:.1%}  {row['memory']:.1f} GiB  "
            f"ETA {int(left // 60)}:{int(left % 60):02d}"
        )

    def say(self, text: str) -> None:
        """A message above the bar."""
        if self.show:
            self.console.print(text, highlight=False)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
        if self.board:
            self.board.close()
        self.file.close()


def keep_until(path: Path, step: int) -> None:
    """Cuts lines of steps after ``step`` (and a half-written last line) from a metrics file."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] > step:
            break
        kept.append(line)
    tmp = path.with_suffix(".tmp")
    tmp.write_text("".join(line + "\n" for line in kept))
    tmp.replace(path)
