"""The training loop. It does not depend on the modalities and heads of a model."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from diptych.core.batch import Batch
from diptych.core.losses import add_counts, check_weights, combine
from diptych.core.noise import Noise
from diptych.data.loader import Loader, Row, merge_states
from diptych.machine import disk
from diptych.machine.devices import fastest_precision
from diptych.machine.doctor import environment
from diptych.machine.processes import any_of, gather, place, processes, together, total
from diptych.models import adapters, store
from diptych.models.protocol import Trainable
from diptych.models.release import MARK
from diptych.parts.quantize import widened
from diptych.training import checkpoint, lora, optim, plan
from diptych.training.build import build, copy
from diptych.training.clock import Clock
from diptych.training.log import Log, Tally, Targets, Work, gradient_norms, memory, profiler
from diptych.training.parallel import add_gradients, local, settle, sharded, whole
from diptych.training.parameters import Average, freeze, release_state, select
from diptych.training.policy import Snapshot
from diptych.training.recipe import Recipe, Stage
from diptych.training.rewards import RewardStage, Rollouts, Tools
from diptych.training.rows import Sources, stage_loader

Hook = Callable[[Trainable, int, Path], None]  # called with the model, the step and the run after every checkpoint


# What a run writes into its folder, besides recipe.json.
OWN_NAMES = (
    "environment.json",
    "metrics.jsonl",
    "checkpoints",
    "samples",
    "release",
    "tensorboard",
    "trace.json",
    "judge",
)


class Interrupted(Exception):
    """The run was asked to stop; ``path`` is the checkpoint that it resumes from."""

    def __init__(self, path: Path, step: int) -> None:
        super().__init__(f"stopped after step {step}; go on with: diptych resume {path.parent.parent}")
        self.path, self.step = path, step


@dataclass
class State:
    """Where a run is: everything that a resumed run needs and nothing else."""

    model: Trainable
    stage: int = 0  # index of the current stage
    done: int = 0  # steps done in it
    step: int = 0  # steps done in all
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    average: Average | None = None
    loader: dict | None = None
    snapshots: dict[str, Snapshot] = field(default_factory=dict)  # other weights of a stage with ``reward``


def train(
    recipe: Recipe,
    run: str | Path | None,
    sources: Sources,
    device: str = "cpu",
    resume: bool = False,
    show: bool = True,
    hook: Hook | None = None,
    stop: threading.Event | None = None,
    profile: int = 0,
    track: str | None = None,
    grown: bool = False,
    rollouts: Rollouts | None = None,
) -> Path:
    """Runs the recipe into the folder ``run`` and returns the folder of the released model (``run/release``).

    ``run`` receives recipe.json (which can be run again), environment.json, metrics.jsonl (one object a step),
    checkpoints/, samples/ (whatever ``hook`` draws) and release/; crash.json after an error (crash-N.json in process
    N); trace.json of the first ``profile`` steps. By default it is a folder under ``runs``, named by the recipe and
    the time. ``track`` names a tracker (trackio, wandb). ``rollouts`` draws and judges for stages with ``reward``.

    A folder that already holds a run is refused unless ``resume``, which continues from the newest checkpoint whose
    checksums hold, on any number of processes that share the rows of a step; ``grown`` allows data sets to be longer
    than they were.

    Raises ``Interrupted`` after SIGINT, SIGTERM or ``stop``, with everything saved; ``ValueError`` for settings that
    contradict each other and for a stage without anything to learn; ``OSError`` for a full disk and a dead worker."""
    with processes(device, recipe.engine.timeout) as (rank, world), _asked_to_stop(stop) as asked:
        began = time.monotonic()
        if device.startswith("cuda"):
            torch.set_float32_matmul_precision("high")  # products that stay float32 use the tensor cores (TF32)
        run = agreed_folder(run, recipe)
        asked_for, recipe = recipe.precision, _settled(recipe, device, run if resume else None)
        together(lambda: _prepare(run, recipe, resume) if rank == 0 else None)
        find = resume and rank == 0
        candidates = together(lambda: checkpoint.newest(run / "checkpoints") if find else (None, []))
        saved, damaged = gather(candidates)[0]
        model = build(recipe, device, resuming=saved is not None)
        _check(recipe, model)
        state, meta = State(model), None
        if saved:
            meta = checkpoint.read_meta(saved)
            state.stage, state.done, state.step = meta["stage"], meta["done"], meta["step"]
            state.loader = meta["loader"]
        log = Log(run, recipe.steps, state.step, show, track) if rank == 0 else None
        if log:
            for line in damaged:
                log.say(f"{line}; going on from {saved}")
            if asked_for == "auto":
                log.say(f"precision auto: {recipe.precision}, the faster one on this {device.partition(':')[0]}")
        saver = checkpoint.Saver(run / "checkpoints", recipe.keep, recipe.engine.async_save, recipe.engine.timeout)
        first_world = meta["world"] if meta else world
        job = _Job(recipe, run, sources, state, log, asked, hook, rank, world, first_world, saver, grown, rollouts)
        job.clock = Clock(recipe, (meta.get("elapsed", 0.0) if meta else 0.0) + time.monotonic() - began)
        together(job.keep_room)
        try:
            with profiler(run / "trace.json" if rank == 0 else None, profile) as job.turn:
                for index in range(state.stage, len(recipe.stages)):
                    if index != state.stage:
                        state.stage, state.done, state.loader = index, 0, None
                    job.run_stage(recipe.stages[index], saved if meta else None)
                    meta = None
            together(saver.wait)
            job.release()
        except Exception as error:
            if not isinstance(error, Interrupted):
                job.report(error)
            raise
        finally:
            with ExitStack() as stack:  # all of them, whatever the others raise
                stack.callback(log.close if log else nullcontext)
                stack.callback(saver.close)
                stack.callback(job.reserve.unlink, missing_ok=True)
    return run / "release"


def agreed_folder(run: str | Path | None, recipe: Recipe) -> Path:
    """The folder of a run: ``run``, or a new one under ``runs`` that process 0 names for all."""
    if run is not None:
        return Path(run).expanduser()
    return Path(gather(f"runs/{recipe.name.replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}")[0])


@dataclass
class _Job:
    """One call of ``train``: what its stages share."""

    recipe: Recipe
    folder: Path
    sources: Sources
    state: State
    log: Log | None
    asked: threading.Event
    hook: Hook | None
    rank: int
    world: int
    first_world: int  # processes that the run began with: they decide how many rows a step has
    saver: checkpoint.Saver
    grown: bool = False
    rollouts: Rollouts | None = None
    clock: Clock = field(init=False)
    work: Work = field(init=False)
    turn: Callable[[], None] = field(init=False)  # called after every step
    row: list[Row] = field(default_factory=list)  # rows of the step that is being computed

    def __post_init__(self) -> None:
        self.clock = Clock(self.recipe)

    def rows(self, stage: Stage) -> int:
        """How many rows this process adds up for a step. Raises ``ValueError`` where they do not divide."""
        rows = stage.limits.rows_of(self.first_world) * self.first_world
        if rows % self.world:
            raise ValueError(
                f"a step of this run has {rows} rows, which do not divide among {self.world} processes; "
                f"it began with {self.first_world}"
            )
        return rows // self.world

    def run_stage(self, stage: Stage, saved: Path | None) -> None:
        """Runs a stage from the current state to its end; ``saved`` is the checkpoint that the state was read from."""
        recipe, state, model = self.recipe, self.state, self.state.model
        rates = select(model, stage.train)
        parts = freeze(model, stage.train)
        settle(model)
        named = {name: p for part in parts.values() for name, p in part.items()}
        names = {id(p): name for name, p in named.items()}
        state.optimizers = optim.build(model, parts, rates, stage.optimizer, recipe.precision)
        state.average = Average(named, stage.ema, stage.ema_warmup) if stage.ema else None
        rewarded = (
            RewardStage(recipe, stage, model, self.sources, self.rollouts, named, self.folder) if stage.reward else None
        )
        state.snapshots = rewarded.snapshots if rewarded else {}
        if saved:
            checkpoint.load(saved, _tensors(state))
            checkpoint.restore_optimizer(state.optimizers, names, saved, "optimizer.")
            if state.average:
                state.average.steps = checkpoint.read_meta(saved)["average"]
        static = recipe.engine.compile or model.device.type == "cuda"  # rows of one length: nothing is compiled twice
        loader = rewarded or stage_loader(
            recipe,
            stage,
            model,
            self.sources,
            pad_to=stage.limits.tokens if static else None,
            rank=self.rank,
            world=self.world,
        )
        if state.loader:
            loader.load_state_dict(state.loader, self.grown)
        self.work = Work(str(model.device), recipe.precision, lambda batch: plan.flops(recipe, stage, batch))
        targets = Targets(stage.name)
        self.clock.start()
        with loader.running() as rows:
            while not (self.clock.over(state.stage, state.done) or (rewarded and rewarded.over)):
                if rewarded:
                    row = self.reward_step(rewarded, names, parts)
                else:
                    row = self.step(stage, rows, self.rows(stage), parts)
                state.done += 1
                state.step += 1
                self.clock.tick()
                if self.log:
                    along = sum(s.steps for s in recipe.stages[: state.stage])
                    position = along + self.clock.position(state.stage, state.done)
                    self.log.step({"step": state.step, "stage": stage.name, **row}, position)
                last = self.clock.over(state.stage, state.done) or bool(rewarded and rewarded.over)
                if not rewarded:
                    targets.add(row, last)
                self.turn()
                stopping = any_of(self.asked.is_set() or self.saver.failed)
                if stopping or last or state.step % recipe.checkpoint_every == 0:
                    path = self.save(loader, names)
                    self.draw()
                    if stopping and not (last and state.stage == len(recipe.stages) - 1):
                        together(self.saver.wait)
                        self.release()
                        raise Interrupted(path, state.step)
        if state.average and state.stage < len(recipe.stages) - 1:
            state.average.hand_on()

    def reward_step(
        self,
        rewarded: RewardStage,
        names: Mapping[int, str],
        parts: Mapping[str, Mapping[str, nn.Parameter]],
    ) -> dict[str, float]:
        """One step of a stage with ``reward``. Where a judge cannot be reached, the last step is saved before the run
        ends, unless the weights have moved on (dev asks are scored after the update); a resumed run asks again."""
        state, stage = self.state, rewarded.stage
        position = self.clock.position(state.stage, state.done)
        optim.set_rates(state.optimizers, rate := optim.factor(stage.schedule, position, stage.steps))
        update = partial(self.update, stage, parts)
        tools = Tools(self.autocast, update, self.stop_unless_finite, self.folder)
        due = state.done + 1 == stage.steps or (state.step + 1) % self.recipe.checkpoint_every == 0
        try:
            row = rewarded.step(tools, state.step, state.done, due)
        except ConnectionError:
            if state.step and not rewarded.moved:  # after the update the weights are no longer those of the last step
                self.save(rewarded, names)
                together(self.saver.wait)
            raise
        tokens = row.pop("tokens")
        lr = rate * max(g["peak"] for o in state.optimizers for g in o.param_groups)
        return row | {"lr": lr, "tokens_per_second": tokens / row["seconds"]}

    def save(self, loader: Loader | RewardStage, names: Mapping[int, str]) -> Path:
        """Begins the checkpoint of this step; every process must call it."""
        state = self.state
        meta = {
            "stage": state.stage,
            "done": state.done,
            "step": state.step,
            "loader": self._position(loader),
            "average": state.average.steps if state.average else 0,
            "world": self.first_world,
            "elapsed": self.clock.elapsed(),
        }
        slots = checkpoint.optimizer_state(state.optimizers, names)
        return self.saver.save(state.step, _tensors(state) | {f"optimizer.{k}": v for k, v in slots.items()}, meta)

    @staticmethod
    def _position(loader: Loader | RewardStage) -> dict:
        """Where the data of the stage stands; every process must call it."""
        return loader.state_dict() if isinstance(loader, RewardStage) else merge_states(gather(loader.state_dict()))

    def draw(self) -> None:
        """Calls the hook on rank 0: with the model, or with a copy for use where processes share it. Every process must
        call it."""
        model, recipe = self.state.model, self.recipe
        if not self.hook:
            return
        if sharded(recipe.engine):
            weights = whole(model.state_dict())
            if self.rank == 0:
                model = copy(model, lora.merged(weights), recipe.precision)
        if self.rank == 0:
            # drawings have other shapes, and few: they are not worth compiling for
            with torch.compiler.set_stance("force_eager") if recipe.engine.compile else nullcontext():
                self.hook(model, self.state.step, self.folder)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.state.model.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")

    def release(self) -> None:
        """Writes the model as it is now, averaged where the stage averages; every process must call it."""
        state = self.state
        weights = whole(release_state(state.model, state.average))
        if self.rank == 0:
            store.save(state.model, self.folder / "release", lora.merged(widened(weights)), force=True)
            if self.recipe.lora:
                file = self.folder / "release" / "adapter.safetensors"
                pairs, mark = lora.adapters(weights), MARK | {"base": self.recipe.init.get("model", "")}
                save_file(pairs, file, mark)
                if published := adapters.to_published(state.model, pairs):
                    save_file(published, file.with_name(adapters.PUBLISHED_FILE), mark)

    @property
    def reserve(self) -> Path:
        return self.folder / f".reserve-{self.rank}"

    def keep_room(self) -> None:
        """Holds a little of the disk, so that crash.json can be written when it is full."""
        disk.write_bytes(self.reserve, os.urandom(2**16))

    def report(self, error: Exception) -> None:
        """Leaves crash.json: what happened, where, with which samples, and the last good checkpoint."""
        self.reserve.unlink(missing_ok=True)
        with suppress(Exception):
            self.saver.wait()
        good = checkpoint.available(self.folder / "checkpoints")
        row = {
            "error": f"{type(error).__name__}: {error}",
            "step": self.state.step + 1,
            "stage": self.recipe.stages[self.state.stage].name,
            "rank": self.rank,
            "samples": [name for r in self.row for name in r.batch.samples],
            "last_checkpoint": str(good[-1]) if good else None,
            "go_on": f"diptych resume {self.folder}",
            "traceback": traceback.format_exc(),
        }
        file = self.folder / ("crash.json" if self.rank == 0 else f"crash-{self.rank}.json")
        try:
            disk.write_text(file, json.dumps(row, indent=1))
        except OSError as unwritten:  # the disk may be what failed
            error.add_note(f"{file} cannot be written: {unwritten}; last good checkpoint: {row['last_checkpoint']}")
        else:
            error.add_note(f"see {file}; last good checkpoint: {row['last_checkpoint']}")

    def step(
        self, stage: Stage, rows: Iterator[Row], accumulate: int, parts: Mapping[str, Mapping[str, nn.Parameter]]
    ) -> dict[str, float]:
        """One optimizer step over ``accumulate`` rows; returns what to log."""
        state, model, start = self.state, self.state.model, time.perf_counter()
        self.row = micro = together(lambda: [next(rows) for _ in range(accumulate)])
        waited = time.perf_counter() - start
        batches = [r.batch.to(model.device) for r in micro]
        counts = total(add_counts([model.counts(b) for b in batches]))
        noise = Noise(self.recipe.seed, state.step)
        position = self.clock.position(state.stage, state.done)
        optim.set_rates(state.optimizers, rate := optim.factor(stage.schedule, position, stage.steps))
        tally = Tally(counts, stage.data)
        tokens = sum(sum(b.lengths) for b in batches)
        total_losses = []
        for batch in batches:
            with self.autocast():
                losses = model(batch, noise)
                loss = combine(losses, stage.loss, counts)
            if loss.requires_grad:  # a row may reach nothing that is trained
                loss.backward()
            total_losses.append(loss.detach())
            tally.add(losses, batch)
        # the device is waited for here, once all rows are on their way, and once more for the gradient's norm
        values = zip(torch.stack(total_losses).tolist(), batches, strict=True)
        bad = [(value, batch) for value, batch in values if not math.isfinite(value)]
        self.stop_unless_finite("loss", bad[0][0] if bad else 0.0, [batch for _, batch in bad])
        norms = self.update(stage, parts, batches)
        for r in micro:
            tally.hold(r)
        seconds = time.perf_counter() - start
        pictures = sum(len(g.tokens) for b in batches for g in b.pictures)
        return {
            **tally.logged(stage.loss),
            **{f"count/{n}": v for n, v in counts.items()},
            "lr": rate * max(g["peak"] for o in state.optimizers for g in o.param_groups),
            **norms,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "images_per_second": pictures / seconds,
            **(self.work.logged(batches[0], tokens, seconds) if self.rank == 0 else {}),
            "fill": tokens / (stage.limits.tokens * len(batches)),
            "data_wait": waited / seconds,
            "memory": memory(model.device),
            "skipped": sum(len(r.stats.skipped) for r in micro),
        }

    def update(
        self, stage: Stage, parts: Mapping[str, Mapping[str, nn.Parameter]], batches: list[Batch]
    ) -> dict[str, float]:
        """The optimizer step on the gradients that all processes have gathered; returns their norms."""
        trained = [p for part in parts.values() for p in part.values()]
        add_gradients(trained)
        norms = gradient_norms(parts)
        norm = math.hypot(*norms.values())
        self.stop_unless_finite("gradient's norm", norm, batches)
        if (shrink := stage.optimizer.clip / (norm + 1e-6)) < 1:
            torch._foreach_mul_([local(p.grad) for p in trained if p.grad is not None], shrink)
        for optimizer in self.state.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.state.average:
            self.state.average.update()
        return {"gradient_norm": norm} | {f"gradient_norm/{part}": v for part, v in norms.items()}

    def stop_unless_finite(self, what: str, value: float, batches: list[Batch]) -> None:
        """Raises ``FloatingPointError`` in every process where one of them met NaN or infinity; names the samples."""
        names = [] if math.isfinite(value) else [name for batch in batches for name in batch.samples]
        if not any_of(bool(names)):
            return
        rows = [(v, n) for v, n in gather((value, names)) if n]
        some = [name for _, n in rows for name in n]
        listed = f"{', '.join(some[:8])}{' ...' if len(some) > 8 else ''}"
        raise FloatingPointError(
            f"step {self.state.step + 1}: the {what} is {rows[0][0]}; nothing was updated. Samples of the row: {listed}"
        )


def _tensors(state: State) -> dict[str, torch.Tensor]:
    out = {f"model.{k}": v for k, v in state.model.state_dict().items()}
    out |= {f"{name}.{k}": v for name, s in state.snapshots.items() for k, v in s.state().items()}
    return out | ({f"average.{k}": v for k, v in state.average.state().items()} if state.average else {})


def _check(recipe: Recipe, model: Trainable) -> None:
    """Everything that can be known to be wrong before the first step."""
    empty = torch.zeros(0, dtype=torch.long)
    none = Batch(empty, empty, empty, empty, empty, empty.bool(), empty.bool(), (empty,) * model.routes, (), (), ())
    for stage in recipe.stages:
        select(model, stage.train)
        check_weights(set(model.counts(none)), stage.loss)


def _settled(recipe: Recipe, device: str, run: Path | None) -> Recipe:
    """The recipe with ``auto`` replaced by a precision, the same in all processes: that of the ``run`` that is resumed,
    or the faster one on the device of process 0."""
    if recipe.precision != "auto":
        return recipe
    before = run / "recipe.json" if run else None
    kept = Recipe.load(before).precision if before and before.is_file() else "auto"
    return replace(recipe, precision=gather(fastest_precision(device) if kept == "auto" else kept)[0])


def _holds(path: Path) -> bool:
    """Whether a path is a file, or a folder that is not empty."""
    return any(path.iterdir()) if path.is_dir() else os.path.lexists(path)


def _prepare(run: Path, recipe: Recipe, resume: bool) -> None:
    if (run / "recipe.json").exists() and not resume:
        raise ValueError(f"{run} already holds a run; go on with it (diptych resume {run}) or name another folder")
    disk.check_folder(run)
    if not resume and (taken := [name for name in OWN_NAMES if _holds(run / name)]):
        raise ValueError(f"{run} is no run, but holds {taken[0]}, which a run would write; name another folder")
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "samples").mkdir(exist_ok=True)
    disk.write_text(run / "recipe.json", recipe.to_json())
    disk.write_text(run / "environment.json", json.dumps(environment(), indent=1))


@contextmanager
def _asked_to_stop(stop: threading.Event | None) -> Iterator[threading.Event]:
    """SIGINT and SIGTERM set the event; a second SIGINT interrupts at once. Only the main thread can listen."""
    event = stop or threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number, frame):
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    old = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    except BaseException:
        if place()[1] > 1:  # torchrun sends SIGTERM as soon as one process has ended: the others still clean up
            old[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for s, h in old.items():
            signal.signal(s, h)
