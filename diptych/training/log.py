"""The log of a run: a progress bar on a terminal, lines elsewhere, metrics.jsonl in any case, and TensorBoard where
it is installed."""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from diptych.core.batch import Batch
from diptych.core.losses import Losses, Term
from diptych.data.loader import Row
from diptych.machine import disk
from diptych.machine.devices import matmul_rate
from diptych.machine.processes import place, total


def memory(device: torch.device | str = "cpu") -> float:
    """The most memory this process has held, in GiB: of the GPU where it computes on one, else of the host."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform != "darwin" else 2**30)


MEASURED = 10  # the step whose work is counted; by then everything is warm


class Work:
    """How much of the device's own matrix-product peak a run uses. One row's products are counted once, on the meta
    device (``train.plan``), so that nothing of the run changes; recomputed ones count. The peak is measured here. A
    family that cannot be planned has no ``mfu``."""

    def __init__(self, device: str, precision: str, count: Callable[[Any], float]) -> None:
        self.device, self.count, self.steps, self.per_token, self.peak = device, count, 0, 0.0, 0.0
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def logged(self, batch: Any, tokens: int, seconds: float) -> dict[str, float]:
        """``mfu`` of a step (of so many tokens, one of its rows is ``batch``) from the measured one on."""
        self.steps += 1
        if self.steps == MEASURED:
            try:
                self.per_token = self.count(batch) / max(sum(batch.lengths), 1)
            except ValueError:
                return {}
            self.peak = matmul_rate(self.dtype, self.device, n=768 if self.device == "cpu" else 8192) * 1e9
        return {"mfu": self.per_token * tokens / seconds / self.peak} if self.peak else {}


@contextmanager
def profiler(file: Path | None, steps: int) -> Iterator[Callable[[], None]]:
    """What to call after every step: traces ``steps`` of them, after five that warm up, into ``file``."""
    if not steps or file is None:
        yield lambda: None
        return
    from torch.profiler import profile, schedule

    plan = schedule(wait=4, warmup=1, active=steps, repeat=1)
    with profile(schedule=plan, on_trace_ready=lambda p: p.export_chrome_trace(str(file))) as traced:
        yield traced.step


TRACKERS = ("trackio", "wandb")


def tracker(name: str | None, run: Path) -> Any:
    """The module of a tracker, with a run begun. Raises ``ValueError`` for one that is unknown or not installed."""
    if name is None:
        return None
    if name not in TRACKERS:
        raise ValueError(f"unknown tracker {name!r}; choose from {', '.join(TRACKERS)}")
    if not importlib.util.find_spec(name):
        raise ValueError(f"tracking with {name} needs its package: pip install {name}")
    module = importlib.import_module(name)
    module.init(project="diptych", name=run.name, config=json.loads((run / "recipe.json").read_text()))
    return module


class Log:
    """Writes one JSON object a step; shows the latest. Lines of steps that a resumed run repeats are cut first."""

    def __init__(self, run: Path, total: int, step: int, show: bool = True, track: str | None = None) -> None:
        self.tracker = tracker(track, run)
        self.path, self.total, self.show = run / METRICS, total, show
        keep_until(self.path, step)
        self.file = self.path.open("ab", buffering=0)  # a line is written at once, and nothing is left for ``close``
        self.recent: deque[tuple[float, float]] = deque(maxlen=50)
        self.last_line = 0.0
        self.board = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step)
        self.console = Console(stderr=True, markup=False)
        self.bar = None
        if show and self.console.is_terminal:
            columns = (TextColumn("{task.fields[stage]}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            self.bar = Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[text]}"), console=self.console)
            self.task = self.bar.add_task("", total=total, completed=step, stage="", text="")
            self.bar.start()

    def step(self, row: Mapping[str, Any], position: float) -> None:
        """Records one step; ``row`` has at least step, stage and loss. ``position`` says how far the run is, in steps
        of its schedule. Raises ``OSError`` where the line cannot be written."""
        line = json.dumps(row).encode() + b"\n"
        if self.file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        if self.board:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.board.add_scalar(name, value, int(row["step"]))
        if self.tracker:
            self.tracker.log({k: v for k, v in row.items() if k not in ("step", "stage")}, step=int(row["step"]))
        now = time.perf_counter()
        self.recent.append((now, position))
        if not self.show:
            return
        if self.bar:
            self.bar.update(self.task, completed=position, stage=row["stage"], text=self._text(row))
        elif now - self.last_line > 15 or position == self.total:
            self.last_line = now
            where = (
                f"{row['step']}/{self.total}"
                if position == row["step"]
                else f"{row['step']}, {position / self.total:.0%}"
            )
            self.console.print(f"{row['stage']} {where}  {self._text(row)}", highlight=False, soft_wrap=True)

    def _text(self, row: Mapping) -> str:
        terms = "  ".join(f"{k[5:]} {v:.3f}" for k, v in row.items() if k.startswith("loss/"))
        (t0, s0), (t1, s1) = self.recent[0], self.recent[-1]
        left = (self.total - s1) * (t1 - t0) / (s1 - s0) if s1 > s0 else 0.0
        used = f"MFU {row['mfu']:.0%}  " if "mfu" in row else ""
        reward = f"reward {row['reward']:.3f}  " if "reward" in row else ""
        return (
            f"{reward}loss {row['loss']:.3f}  {terms}  {row['tokens_per_second']:.0f} tok/s  {used}"
            f"{row['images_per_second']:.0f} img/s  wait {row['data_wait']:.1%}  {row['memory']:.1f} GiB  "
            f"ETA {int(left // 60)}:{int(left % 60):02d}"
        )

    def say(self, text: str) -> None:
        """A message above the bar."""
        if self.show:
            self.console.print(text, highlight=False, soft_wrap=True)  # paths stay whole

    def close(self) -> None:
        """Ends the bar, the board, the tracker and the file, each of them whatever the others raise."""
        with ExitStack() as stack:
            stack.callback(self.file.close)
            if self.tracker:
                stack.callback(self.tracker.finish)
            if self.board:
                stack.callback(self.board.close)
            if self.bar:
                stack.callback(self.bar.stop)


METRICS = "metrics.jsonl"
PATIENCE = 10  # steps after which a stage that has learned nothing ends
HINT = "A target is an assistant's text or a picture with the role target; diptych data check names the rows"

warnings = logging.getLogger("diptych.training")


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The logged steps of a run (its folder, or a metrics file), oldest first: one dict of step, stage and values each.

    A last line that is still being written is left out. Raises ``ValueError`` where there is no such file, and for any
    other line that is not a JSON object."""
    path = Path(run) / METRICS if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise ValueError(f"{run} is no run: it holds no {METRICS}")
    text = path.read_text("utf-8", errors="replace")
    rows = []
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: damaged line: {error}") from error
        rows.append(row)
    return rows


def consumption(run: str | Path) -> float:
    """Tokens per second that the trainer of a run uses when it never waits for data: mean tokens of a step over the
    median computing time. The first step, which warms up, does not count. Raises ``ValueError`` for a shorter run."""
    rows = read_metrics(run)[1:]
    if not rows:
        raise ValueError(f"{run} has logged fewer than two steps")
    seconds = sorted(row["seconds"] * (1 - row["data_wait"]) for row in rows)
    tokens = [row["tokens_per_second"] * row["seconds"] for row in rows]
    return sum(tokens) / len(tokens) / seconds[len(seconds) // 2]


def keep_until(path: Path, step: int) -> None:
    """Cuts the lines of steps after ``step``, and a half-written last line, from a metrics file."""
    if path.is_file():
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        disk.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


class Tally:
    """Sums of a step: loss terms, loss terms by data set (of families that tell), samples by data set."""

    def __init__(self, counts: Mapping[str, float], data: Mapping[str, float]) -> None:
        self.counts = counts
        self.sums = {"untargeted": 0.0} | {f"loss/{n}": 0.0 for n in counts} | {f"samples/{name}": 0.0 for name in data}
        self.by_data = {f"{name}/{n}/{what}": 0.0 for name in data for n in counts for what in ("sum", "count")}
        self.data = sorted(data, key=len, reverse=True)  # a name may begin with another
        self.terms: list[tuple[str, Term, tuple[str | None, ...]]] = []  # not read from the device yet

    def add(self, losses: Losses, batch: Batch) -> None:
        """Adds the loss terms of one batch, in all and by data set. Waits for no result."""
        owners = tuple(next((d for d in self.data if sample.startswith(f"{d}/")), None) for sample in batch.samples)
        self.terms += [(n, Term(term.sum.detach(), *term[1:]), owners) for n, term in losses.items()]

    def _read(self) -> None:
        """Reads all terms from the device at once."""
        if not self.terms:
            return
        tensors = [x.flatten() for _, term, _ in self.terms for x in (term.sum, term.documents) if x is not None]
        values = iter(torch.cat([x.double() for x in tensors]).tolist())
        for n, term, owners in self.terms:
            self.sums[f"loss/{n}"] += next(values)
            for _, owner in zip(range(0 if term.documents is None else len(term.documents)), owners, strict=False):
                value, count = next(values), next(values)
                if owner:
                    self.by_data[f"{owner}/{n}/sum"] += value
                    self.by_data[f"{owner}/{n}/count"] += count
        self.terms = []

    def hold(self, row: Row) -> None:
        """Adds what the loader says about a row."""
        self.sums["untargeted"] += row.stats.untargeted
        for name, n in row.stats.samples.items():
            self.sums[f"samples/{name}"] += n

    def logged(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Everything over all processes, losses divided by their counts."""
        self._read()
        sums = total(self.sums | self.by_data)
        terms = {n: sums[f"loss/{n}"] / max(count, 1.0) for n, count in self.counts.items()}
        pairs = {(d, n): (sums[f"{d}/{n}/sum"], sums[f"{d}/{n}/count"]) for d in self.data for n in terms}
        return {
            "loss": sum(weights[n] * v for n, v in terms.items()),
            **{f"loss/{n}": v for n, v in terms.items()},
            **{f"data/{d}/{n}": value / count for (d, n), (value, count) in pairs.items() if count},
            **{name: v for name, v in sums.items() if name.startswith("samples/")},
            "untargeted": sums["untargeted"],
        }


class Targets:
    """Watches that a stage learns: warns of samples without a target, and ends a stage in which nothing has one."""

    def __init__(self, stage: str) -> None:
        self.stage, self.steps, self.samples, self.untargeted, self.learned = stage, 0, 0, 0, False

    def add(self, row: Mapping[str, float], last: bool) -> None:
        """Takes the logged row of a step; ``last`` says that the stage ends with it.

        Raises ``ValueError`` where nothing was learned in the first ``PATIENCE`` steps, or in the whole of a shorter
        stage."""
        self.steps += 1
        self.samples += int(sum(value for name, value in row.items() if name.startswith("samples/")))
        before, self.untargeted = self.untargeted, self.untargeted + int(row["untargeted"])
        counted = sum(value for name, value in row.items() if name.startswith("count/"))
        some = self.untargeted < self.samples
        self.learned = self.learned or (some and counted > 0 and row["gradient_norm"] > 0)
        counts = f"stage {self.stage!r}: {self.untargeted} of {self.samples} samples have no target"
        if not self.learned and (last or self.steps >= PATIENCE):
            unreached = "the losses reach nothing that the stage trains"
            why = unreached if counted and some else f"no row carries a loss; {counts}"
            raise ValueError(f"stage {self.stage!r} learns nothing in {self.steps} steps: {why}. {HINT}")
        if self.untargeted and (not before or last) and place()[0] == 0:
            warnings.warning("%s. %s", counts, HINT)


def gradient_norms(parts: Mapping[str, Mapping[str, nn.Parameter]]) -> dict[str, float]:
    """The norm of all gradients of each part; read from the device at once."""
    norms = []
    for parameters in parts.values():
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    return dict(zip(parts, torch.stack(norms).tolist() if norms else (), strict=True))
