"""One data set of many shards from its index to merged scores: index, filter in shares, shard order, training on two
processes, a kill, resuming on three, evaluation in three shares, merge.

    python benchmarks/at_scale.py                                   # 200,000 samples in 200 shards
    python benchmarks/at_scale.py --samples 2000000 --shards 2000   # 4 GB of disk

Every step is the command that a user types. Prints seconds of wall clock and of processors for each.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import finish

from diptych.data.encoded import add_member, shard_name, written
from diptych.training.log import read_metrics
from diptych.training.recipe import Limits
from tests.support import tiny

SHARES = 3
COLOURS = ("red", "green", "blue", "yellow", "black", "white")


def write_shard(folder: Path, rows: int, number: int) -> None:
    """A shard of pictures with captions; every fiftieth row repeats the picture of the row before."""
    rng = np.random.default_rng(number)
    data = b""
    with written(folder / shard_name(number)) as tar:
        for i in range(rows):
            colour = int(rng.integers(len(COLOURS)))
            if i % 50 != 49:
                pixels = np.repeat(np.repeat(rng.integers(0, 255, (4, 4, 3), np.uint8), 8, 0), 8, 1)
                file = io.BytesIO()
                PIL.Image.fromarray(pixels).save(file, "PNG", compress_level=1)
                data = file.getvalue()
            add_member(tar, f"{number:05d}-{i:05d}.png", data)
            add_member(tar, f"{number:05d}-{i:05d}.txt", f"a pattern with {COLOURS[colour]}".encode())


class Clock:
    """Runs the steps and keeps their times."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float | str]] = []

    def add(self, step: str, start: float, before: float, note: str = "") -> None:
        row = {"step": step, "seconds": time.perf_counter() - start, "processor_seconds": used() - before, "note": note}
        self.rows.append(row)
        print(f"{step:<28} {row['seconds']:8.1f} s  {row['processor_seconds']:8.1f} processor s  {note}", flush=True)

    def run(self, step: str, *commands: list[str], note: str = "") -> str:
        """Runs commands at the same time; returns what the last one prints."""
        start, before = time.perf_counter(), used()
        running = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True) for c in commands]
        outputs = [process.communicate()[0] for process in running]
        if any(process.returncode for process in running):
            raise SystemExit(f"{step} failed: {[p.returncode for p in running]}")
        self.add(step, start, before, note)
        return outputs[-1]


def used() -> float:
    """Processor seconds of all finished children and of this process."""
    return sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def diptych(*words: object) -> list[str]:
    return [sys.executable, "-m", "diptych", *map(str, words)]


def torchrun(processes: int, *words: object) -> list[str]:
    head = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*head, "-m", "diptych", *map(str, words)]


def train_and_kill(clock: Clock, command: list[str], run: Path, at: int) -> None:
    """Starts a training and kills all its processes once the checkpoint ``at`` is there."""
    start, before = time.perf_counter(), used()
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    first = None
    while not (run / "checkpoints" / f"step-{at:08d}" / "meta.json").is_file():
        if process.poll() is not None:
            raise SystemExit(f"the training ended with {process.returncode} before it was killed")
        if first is None and (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size:
            first = time.perf_counter() - start
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    clock.add("train on 2, killed", start, before, f"first step after {first or 0:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2, help="that write and index")
    parser.add_argument("--folder", type=Path, help="keep everything there (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, clock = args.folder or Path(temporary), Clock()
        begin, start, before = time.perf_counter(), time.perf_counter(), used()
        with ProcessPoolExecutor(args.processes) as pool:
            list(pool.map(partial(write_shard, folder / "tars", args.samples // args.shards), range(args.shards)))
        clock.add("write", start, before, f"{args.samples} samples in {args.shards} shards")
        catalog, kept = folder / "data.yaml", folder / "kept"
        entry = "{format: webdataset, path: tars/*.tar, read: draw"
        catalog.write_text(f"whole: {entry}}}\nbig: {entry}, index: whole.index, keep: kept}}\n")
        clock.run("index", diptych("data", "index", catalog, "whole", "--processes", args.processes))
        words = ["data", "filter", "whole", "--catalog", catalog, "--out", kept, "--min-side", 16, "--exact"]
        for k in range(SHARES):
            clock.run(f"filter {k}/{SHARES}", diptych(*words, "--shard", f"{k}/{SHARES}"))
        merged = json.loads(clock.run("filter, merge", diptych(*words, "--merge", "--json")))
        print(f"{merged['kept']} of {merged['rows']} rows are kept; dropped {merged['dropped']}")
        recipe = tiny.recipe(
            data={"big": 1.0},
            train={"decoder": 2e-3, "head": 2e-3},
            steps=12,
            limits=Limits(tokens=192, pictures=16, rows=6),
        ).override({"order": "shards", "buffer": "1000", "streams": "12", "workers": "1", "checkpoint_every": "4"})
        (folder / "recipe.json").write_text(recipe.override({"catalog": str(catalog)}).to_json())
        speed = clock.run("bench", diptych("data", "bench", folder / "recipe.json", "--workers", "1", "--json"))
        print(
            {k: round(v, 3) for k, v in json.loads(speed)["rows"][0].items() if str(k).endswith(("second", "sample"))}
        )
        run = folder / "run"
        command = torchrun(2, "train", folder / "recipe.json", "--out", run, "--device", "cpu")
        train_and_kill(clock, command, run, 4)
        clock.run("resume on 3", torchrun(3, "resume", run, "--device", "cpu"))
        alone = diptych("train", folder / "recipe.json", "--out", folder / "alone", "--device", "cpu")
        clock.run("the same on 1, undisturbed", alone)
        losses = [{row["step"]: row["loss"] for row in read_metrics(folder / name)} for name in ("run", "alone")]
        apart = max(abs(losses[0][step] - loss) / abs(loss) for step, loss in losses[1].items())
        print(f"losses of the killed and resumed run and of the undisturbed one: at most {apart:.1e} apart")
        words = ["evaluate", run, "mini", "--limit", 1, "--out", folder / "scores", "--device", "cpu"]
        for k in range(SHARES):
            clock.run(f"evaluate {k}/{SHARES}", diptych(*words, "--shard", f"{k}/{SHARES}"))
        scores = json.loads(clock.run("evaluate, merge", diptych("evaluate", "merge", folder / "scores", "--json")))
        minutes = (time.perf_counter() - begin) / 60
        print(f"{scores['items']} items in {len(scores['scores'])} scores; {minutes:.1f} minutes in all")
    finish("at_scale", clock.rows)


if __name__ == "__main__":
    main()
