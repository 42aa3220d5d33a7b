"""Faults of a run. Kills of one of several processes at random moments, after which the resumed run ends where the
undisturbed one does, bit for bit; and errors, killed workers, full disks and signals, after which a run ends by itself.

python benchmarks/faults.py --kills 10 --processes 2 [--shard full] [--steps 40]
python benchmarks/faults.py --faults 10 [--recipe TINY.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from diptych import recipes
from diptych.training import checkpoint
from diptych.training.log import read_metrics
from diptych.training.recipe import EngineConfig, Recipe


def start(recipe: Path, run: Path, processes: int, verb: str) -> list[subprocess.Popen]:
    """The run (or its resumption) on so many processes of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    what = ["train", recipe, "--out", run] if verb == "train" else ["resume", run]
    command = [sys.executable, "-m", "diptych", *map(str, what), "--device", "cpu"]
    env = os.environ | {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(command, env=env | {"RANK": str(r)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for r in range(processes)
    ]


def steps_done(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


def end(running: list[subprocess.Popen]) -> None:
    """Ends what is left of a run whose process was killed, as a launcher does."""
    for p in running:
        p.kill()
    for p in running:
        p.wait()


def survive(recipe: Recipe, folder: Path, kills: int, processes: int, seed: int, patience: float = 600.0) -> list[dict]:
    """Runs the recipe to its end through ``kills`` kills of one process each; returns when and whom."""
    file, run, draw = folder / "recipe.json", folder / "killed", random.Random(seed)
    file.write_text(recipe.to_json())
    killed: list[dict] = []
    while True:
        verb = "resume" if (run / "recipe.json").is_file() else "train"
        running, since = start(file, run, processes, verb), time.monotonic()
        left = recipe.steps - steps_done(run)
        goal = 10**9
        if len(killed) < kills:
            goal = steps_done(run) + draw.randint(1, max(1, left // (kills - len(killed) + 1)))
        while steps_done(run) < goal and all(p.poll() is None for p in running):
            assert time.monotonic() - since < patience, "the run does not move"
            time.sleep(0.02)
        if goal == 10**9:
            codes = [p.wait(timeout=patience) for p in running]
            assert codes == [0] * processes, codes
            return killed
        victim = draw.randrange(processes)
        time.sleep(draw.random() * 0.2)  # anywhere in a step or a save
        running[victim].kill()
        end(running)
        killed.append({"step": steps_done(run), "victim": victim})


def same(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same losses and the same bytes."""
    rows = [read_metrics(run) for run in (a, b)]
    keys = [k for k in rows[0][0] if k.startswith(("step", "loss", "count", "gradient_norm", "lr"))]
    losses = [[[row[k] for k in keys] for row in some] for some in rows]
    weights = [(run / "release" / "model.safetensors").read_bytes() for run in (a, b)]
    return losses[0] == losses[1] and weights[0] == weights[1]


# ---- faults inside a run --------------------------------------------------------------------------------------------

ERRORS = {e.__name__: e("injected") for e in (RuntimeError, KeyError)}
CODES = dict.fromkeys(("RuntimeError", "KeyError"), 1)
CODES |= dict.fromkeys(("ValueError", "killed worker", "full disk"), 2) | dict.fromkeys(("SIGTERM", "SIGINT"), 4)
START = 180.0  # seconds from the start to the fault
PATIENCE = 20.0  # seconds from the fault to the end of all processes
AT = 3  # the step before which it happens; a checkpoint is written after every second one


def inject(kind: str, moment: Path, arguments: list[str]) -> int:
    """``diptych ARGUMENTS``, and in its last process the fault; ``moment`` receives the time of it."""
    from diptych import cli
    from diptych.training import loop

    step, last = loop._Job.step, int(os.environ.get("WORLD_SIZE", 1)) - 1

    def faulty(job: loop._Job, *rest: Any) -> dict[str, float]:
        if job.state.step == AT and job.rank == last and not moment.exists():
            job.saver.wait()
            moment.write_text(str(time.time()))
            if kind in ERRORS:
                raise ERRORS[kind]
            if kind == "ValueError":
                job.recipe.override({"nothing": "1"})  # one that diptych itself raises
            elif kind == "killed worker":
                os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
            elif kind == "full disk":
                fill(job.folder.parent)
            else:
                os.kill(os.getpid(), getattr(signal, kind))
        return step(job, *rest)

    loop._Job.step = faulty  # type: ignore[method-assign]
    return cli.main(arguments)


def fill(folder: Path) -> None:
    """Fills the file system of a folder."""
    with (folder / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(2**14))


@contextmanager
def small_disk(folder: Path, size: str = "512m") -> Iterator[Path]:
    """A file system of its own, in memory. Raises ``PermissionError`` for anybody but root."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        raise PermissionError("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fails(kind: str, recipe: Recipe, folder: Path, processes: int, workers: int) -> dict[str, Any]:
    """Starts the recipe in a ``folder`` of its own, alone or under torchrun, lets the fault happen and tells what is
    wrong with how the run ended; ``wrong`` is empty where nothing is."""
    made = replace(recipe, checkpoint_every=2, workers=workers, engine=replace(recipe.engine, timeout=1.0))
    file, run, moment = (folder / name for name in ("recipe.json", "run", "moment"))
    file.write_text(made.to_json())
    temporary = Path(tempfile.mkdtemp(prefix="faults-"))  # a short path: loader workers put sockets there
    mark = f"DIPTYCH_FAULT={uuid.uuid4().hex}"
    env = os.environ | dict([mark.split("=")]) | {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    launcher = (
        [sys.executable]
        if processes == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(processes),
            "--master-port",
            "0",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "localhost:0",
        ]
    )
    command = [*launcher, __file__, "--inject", kind, str(moment), "train", file, "--out", run, "--device", "cpu"]
    with folder.with_suffix(".output").open("w") as output:
        process = subprocess.Popen([*map(str, command)], env=env, stdout=output, stderr=output, start_new_session=True)
        begun = time.time()
        while process.poll() is None:
            if not moment.exists() and time.time() - begun > START:
                break
            if moment.exists() and time.time() - float(moment.read_text() or "inf") > 3 * PATIENCE:
                break
            time.sleep(0.05)
    wrong = []
    seconds = time.time() - float(moment.read_text()) if moment.exists() else math.inf
    if process.returncode != (want := CODES[kind] if processes == 1 else 1):
        wrong.append(f"exit code {process.returncode}, not {want}")
    if seconds > PATIENCE:
        wrong.append(f"it took {seconds:.0f} s")
    if left := marked(mark):
        wrong.append(f"processes left: {left}")
        for number in left:
            os.kill(number, signal.SIGKILL)
    if half := [p.name for p in folder.rglob("*") if p.suffix in (".tmp", ".part")] + [
        p.name
        for p in temporary.iterdir()
        if not p.name.startswith("torch") and (p.name.startswith("pymp-") or any(q.is_file() for q in p.rglob("*")))
    ]:
        wrong.append(f"temporary files left: {half}")
    shutil.rmtree(temporary, ignore_errors=True)
    crash = run / ("crash.json" if processes == 1 else f"crash-{processes - 1}.json")
    if crash.is_file() == kind.startswith("SIG"):
        wrong.append(f"{crash.name} is {'there' if crash.is_file() else 'not there'}")
    try:
        newest, damaged = checkpoint.newest(run / "checkpoints")
        if damaged or newest is None:
            wrong.append(f"no sound last checkpoint: {damaged}")
    except ValueError as error:
        wrong.append(str(error))
    return {"fault": kind, "processes": processes, "workers": workers, "seconds": round(seconds, 1), "wrong": wrong}


def marked(mark: str) -> list[int]:
    """The processes that were started with an entry of the environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark.encode() in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
    return found


def table(recipe: Recipe, repeats: int) -> list[dict[str, Any]]:
    """Every fault, alone and in one of two processes, with 0, 1 and 2 workers in turn, ``repeats`` times each."""
    rows = []
    for kind, processes, n in itertools.product(CODES, (1, 2), range(repeats)):
        workers = 1 + n % 2 if kind == "killed worker" else n % 3
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            folder = Path(name)
            if kind == "full disk":
                folder = stack.enter_context(small_disk(folder / "disk"))
            rows.append(fails(kind, recipe, folder, processes, workers))
            print(rows[-1], flush=True)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line for each fault: how many ended well, and how long the slowest took."""
    print(f"{'fault':<16}{'processes':>10}{'ended well':>12}{'slowest, s':>12}")
    for (kind, processes), group in itertools.groupby(rows, lambda r: (r["fault"], r["processes"])):
        same_fault = list(group)
        well = sum(not r["wrong"] for r in same_fault)
        print(
            f"{kind:<16}{processes:>10}{f'{well} of {len(same_fault)}':>12}{max(r['seconds'] for r in same_fault):>12}"
        )


def main() -> int:
    if sys.argv[1:2] == ["--inject"]:
        return inject(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bagel/tiny")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--faults", type=int, default=0, help="of each kind; in place of kills")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--shard", choices=["none", "full"], default="none")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    recipe = recipes.find(a.recipe).with_steps(a.steps)
    if a.faults:
        rows = table(recipe, a.faults)
        print_table(rows)
        print(json.dumps({"benchmark": "faults", "rows": rows}))
        return int(any(r["wrong"] for r in rows))
    recipe = replace(recipe, checkpoint_every=3, workers=0, engine=EngineConfig(shard=a.shard))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "whole.json").write_text(recipe.to_json())
        for p in start(folder / "whole.json", folder / "whole", a.processes, "train"):
            assert p.wait() == 0
        killed = survive(recipe, folder, a.kills, a.processes, a.seed)
        equal = same(folder / "whole", folder / "killed")
    for row in killed:
        print(f"killed process {row['victim']} after step {row['step']}")
    print("bit-identical" if equal else "DIFFERENT")
    print(
        json.dumps(
            {"benchmark": "faults", "kills": len(killed), "processes": a.processes, "equal": equal, "rows": killed}
        )
    )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
