"""The one training loop. It never learns which modalities or heads exist."""

from __future__ import annotations

import json
import math
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diptych import models
from diptych.core.batch import Batch
from diptych.core.losses import add_counts, check_weights, combine
from diptych.core.noise import Noise
from diptych.data.encoded import encoders_of, refuse_stale
from diptych.data.loader import Loader, Row, merge_states
from diptych.models.folders import read_language_model
from diptych.models.protocol import Trainable
from diptych.parts.decoder import Decoder
from diptych.parts.tokenizer import Tokenizer
from diptych.train import checkpoint, optim
from diptych.train.log import Log, memory
from diptych.train.parallel import add_gradients, any_of, gather, processes, total
from diptych.train.parameters import Average, freeze, release_state, select
from diptych.train.recipe import Recipe, Stage

FOREIGN = "transformers:"  # begins a source of ``init`` that transformers reads

Sources = Callable[[Recipe, Stage], Mapping[str, Any]]  # the data sets of a stage, by name
Hook = Callable[[Trainable, int, Path], None]  # called with the model, the step and the run after every checkpoint


class Interrupted(Exception):
    """The run was asked to stop; ``path`` is the checkpoint that it goes on from."""

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


def build(recipe: Recipe, device: str = "cpu", tokenizer: Tokenizer | None = None) -> Trainable:
    """The recipe's model with fresh weights, and with the parts that ``init`` names taken from other models, or a
    decoder from a language model of transformers (whose tokenizer comes with it)."""
    name, config = models.config_from_json(recipe.model)
    if tokenizer is None:
        tokenizer = _tokenizer(recipe)
    with torch.random.fork_rng(devices=[]):  # what ``initialise`` leaves alone belongs to the seed too
        torch.manual_seed(recipe.seed)
        model = models.create(name, config, tokenizer)
    model.initialise(recipe.seed)
    for path, source in recipe.init.items():
        if source.startswith(FOREIGN):
            _foreign(model, path, name, source)
            continue
        where, _, other_path = source.partition("#")
        other = models.load(where)
        if path == "model":
            models.load_strict(model, other.state_dict(), source)
            continue
        mine, theirs = _module(model, path, name), _module(other, other_path or path, where)
        models.load_strict(mine, theirs.state_dict(), f"{source}, taken over as {path!r},")
    return model.to(device)


def _tokenizer(recipe: Recipe) -> Tokenizer:
    """The tokenizer of the model that a recipe goes on from, or of the library's model inside it; else the tiny one."""
    whole = recipe.init.get("model")
    inner = next((s.removeprefix(FOREIGN) for s in recipe.init.values() if s.startswith(FOREIGN)), None)
    if whole:
        return models.places(whole).tokenizer()
    return Tokenizer.load(_folder(inner)) if inner else Tokenizer.tiny()


def _foreign(model: Trainable, path: str, name: str, source: str) -> None:
    module, where = _module(model, path, name), source.removeprefix(FOREIGN)
    if isinstance(module, Decoder):
        read_language_model(module, _folder(where))
        return
    if not hasattr(module, "load_pretrained"):
        raise ValueError(
            f"init: module {path!r} of {name} is neither a decoder nor one of transformers; {source!r} cannot fill it"
        )
    module.load_pretrained(where)


def _folder(where: str) -> Path:
    """The folder of transformers of this path, or of this ``org/name`` of the hub."""
    return Path(where) if Path(where).is_dir() else models.fetch(where)


def _module(model: Trainable, path: str, name: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        known = ", ".join(n for n, _ in model.named_children())
        raise ValueError(f"init: {name} has no module {path!r}; it has {known}, and what is inside them") from error


def train(
    recipe: Recipe,
    run: str | Path,
    sources: Sources,
    device: str = "cpu",
    resume: bool = False,
    show: bool = True,
    hook: Hook | None = None,
    stop: threading.Event | None = None,
) -> Path:
    """Runs the recipe into the folder ``run`` and returns the folder of the released model (``run/release``).

    ``run`` receives recipe.json (itself runnable), environment.json, metrics.jsonl (one object a step), checkpoints/,
    samples/ (whatever ``hook`` draws) and release/. A folder that already holds a run is refused unless ``resume``.
    Raises ``Interrupted`` after SIGINT, SIGTERM or ``stop``, with everything saved."""
    run = Path(run)
    with processes() as (rank, world), _asked_to_stop(stop) as asked:
        _together(lambda: _prepare(run, recipe, resume) if rank == 0 else None)
        model = build(recipe, device)
        _check(recipe, model)
        state = State(model)
        saved = checkpoint.available(run / "checkpoints") if resume else []
        meta = checkpoint.read_meta(saved[-1]) if saved else None
        if meta:
            state.stage, state.done, state.step = meta["stage"], meta["done"], meta["step"]
            state.loader = meta["loader"]
        log = Log(run, recipe.steps, state.step, show) if rank == 0 else None
        job = _Job(recipe, run, sources, state, log, asked, hook, rank, world)
        try:
            for index in range(state.stage, len(recipe.stages)):
                if index != state.stage:
                    state.stage, state.done, state.loader = index, 0, None
                job.run_stage(recipe.stages[index], saved[-1] if meta else None)
                meta = None
            job.release()
        finally:
            if log:
                log.close()
    return run / "release"


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

    def run_stage(self, stage: Stage, saved: Path | None) -> None:
        """One stage from where the state stands (``saved``, where it was read from a checkpoint) to its end."""
        recipe, state, model = self.recipe, self.state, self.state.model
        rates = select(model, stage.train)
        parts = freeze(model, stage.train)
        named = {name: p for part in parts.values() for name, p in part.items()}
        names = {id(p): name for name, p in named.items()}
        state.optimizers = optim.build(model, parts, rates, stage.optimizer)
        state.average = Average(named, stage.ema) if stage.ema else None
        if saved:
            filled = checkpoint.load(saved, _tensors(state))
            model.load_state_dict({k[len("model.") :]: v for k, v in filled.items() if k.startswith("model.")})
            checkpoint.restore_optimizer(state.optimizers, names, saved, "optimizer.")
            if state.average:
                state.average.steps = checkpoint.read_meta(saved)["average"]
        sources = self.sources(recipe, stage)
        self._check_encoded(sources)
        loader = Loader(
            sources,
            stage.data,
            model.lay_out,
            routes=model.routes,
            tokens=stage.limits.tokens,
            pictures=stage.limits.pictures,
            seed=recipe.seed + 7919 * state.stage,
            workers=recipe.workers,
            streams=recipe.streams,
            dropout=stage.dropout,
            conditions=model.conditions,
            rank=self.rank,
            world=self.world,
            skip_limit=recipe.skip_limit,
        )
        if state.loader:
            loader.load_state_dict(state.loader)
        rows = iter(loader)
        while state.done < stage.steps:
            row = _step(recipe, stage, state, rows, list(named.values()))
            state.done += 1
            state.step += 1
            if self.log:
                self.log.step({"step": state.step, "stage": stage.name, **row})
            stopping = any_of(self.asked.is_set())
            last = state.done == stage.steps
            if stopping or last or state.step % recipe.checkpoint_every == 0:
                path = self.save(loader, names)
                if stopping and not (last and state.stage == len(recipe.stages) - 1):
                    self.release()
                    raise Interrupted(path, state.step)
        if state.average and state.stage < len(recipe.stages) - 1:
            state.average.hand_on()

    def _check_encoded(self, sources: Mapping[str, Any]) -> None:
        """Refuses data sets that another encoder made than the model's, or one that this stage would change."""
        model = self.state.model
        for encoder in encoders_of(sources) & model.encoders.keys():
            modules = [model.get_submodule(m) for m in model.encoders[encoder].modules]
            if any(p.requires_grad for m in modules for p in m.parameters()):
                raise ValueError(
                    f"this stage trains {encoder!r}, and its data sets hold what that made of pictures before"
                )
        refuse_stale(sources, lambda name: model.digest(name) if name in model.encoders else f"{model.family} has none")

    def save(self, loader: Loader, names: Mapping[int, str]) -> Path:
        """Writes the checkpoint of this step; every process must call it."""
        state = self.state
        path = self.folder / "checkpoints" / f"step-{state.step:08d}"
        rows = merge_states(gather(loader.state_dict()))
        if self.rank == 0:
            meta = {
                "stage": state.stage,
                "done": state.done,
                "step": state.step,
                "loader": rows,
                "average": state.average.steps if state.average else 0,
            }
            slots = checkpoint.optimizer_state(state.optimizers, names)
            tensors = _tensors(state) | {f"optimizer.{k}": v for k, v in slots.items()}
            checkpoint.save(path, tensors, meta, self.recipe.keep)
            if self.hook:
                self.hook(state.model, state.step, self.folder)
        return path

    def release(self) -> None:
        """Writes the model as it is now, averaged where the stage averages."""
        if self.rank == 0:
            state = self.state
            models.save(state.model, self.folder / "release", release_state(state.model, state.average))


def _step(
    recipe: Recipe, stage: Stage, state: State, rows: Iterator[Row], trained: list[nn.Parameter]
) -> dict[str, float]:
    """One optimizer step over ``accumulate`` rows; returns what to log."""
    model, start = state.model, time.perf_counter()
    micro = _together(lambda: [next(rows) for _ in range(stage.limits.accumulate)])
    waited = time.perf_counter() - start
    batches = [r.batch.to(model.device) for r in micro]
    counts = total(add_counts([model.counts(b) for b in batches]))
    noise = Noise(recipe.seed, state.step)
    optim.set_rates(state.optimizers, rate := optim.factor(stage.schedule, state.done, stage.steps))
    sums: dict[str, float] = dict.fromkeys(counts, 0.0)
    for batch in batches:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            losses = model(batch, noise)
            loss = combine(losses, stage.loss, counts)
        if any_of(not math.isfinite(float(loss.detach()))):
            raise FloatingPointError(
                f"step {state.step + 1}: the loss is {float(loss.detach())}; nothing was updated. {_named([batch])}"
            )
        if loss.requires_grad:  # a row may reach nothing that is trained
            loss.backward()
        for name, term in losses.items():
            sums[name] += float(term.sum.detach())
    for parameter in trained:  # as if every process had reached it, however many there are
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    add_gradients(trained)
    norm = float(torch.nn.utils.clip_grad_norm_(trained, stage.optimizer.clip))
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"step {state.step + 1}: the gradient's norm is {norm}; nothing was updated. {_named(batches)}"
        )
    for optimizer in state.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if state.average:
        state.average.update()
    sums = total(sums)
    held = total({name: float(sum(r.stats.samples.get(name, 0) for r in micro)) for name in stage.data})
    terms = {name: sums[name] / max(counts[name], 1.0) for name in sums}
    seconds = time.perf_counter() - start
    tokens = sum(sum(b.lengths) for b in batches)
    pictures = sum(len(g.tokens) for b in batches for g in b.pictures)
    return {
        "loss": sum(stage.loss[n] * v for n, v in terms.items()),
        **{f"loss/{n}": v for n, v in terms.items()},
        **{f"count/{n}": v for n, v in counts.items()},
        "lr": rate * max(g["peak"] for o in state.optimizers for g in o.param_groups),
        "gradient_norm": norm,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "images_per_second": pictures / seconds,
        "fill": tokens / (stage.limits.tokens * len(batches)),
        "data_wait": waited / seconds,
        "memory": memory(),
        "skipped": sum(len(r.stats.skipped) for r in micro),
        **{f"samples/{name}": n for name, n in held.items()},
    }


def _together(work: Callable[[], Any]) -> Any:
    """The result of ``work``; when it raises in one process, every process raises."""
    error, result = None, None
    try:
        result = work()
    except (ValueError, OSError, ArithmeticError) as caught:
        error = caught
    if any_of(error is not None):
        raise error or ValueError("another process stopped with an error")
    return result


def _named(batches: list[Batch]) -> str:
    names = [name for batch in batches for name in batch.samples]
    return f"Samples of the row: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"


def _tensors(state: State) -> dict[str, torch.Tensor]:
    out = {f"model.{k}": v for k, v in state.model.state_dict().items()}
    return out | ({f"average.{k}": v for k, v in state.average.state().items()} if state.average else {})


def _check(recipe: Recipe, model: Trainable) -> None:
    """Everything that can be known to be wrong before the first step."""
    empty = torch.zeros(0, dtype=torch.long)
    none = Batch(empty, empty, empty, empty, empty, empty.bool(), empty.bool(), (empty,) * model.routes, (), (), ())
    for stage in recipe.stages:
        select(model, stage.train)
        check_weights(set(model.counts(none)), stage.loss)


def _prepare(run: Path, recipe: Recipe, resume: bool) -> None:
    if (run / "recipe.json").exists() and not resume:
        raise ValueError(f"{run} already holds a run; go on with it (diptych resume {run}) or name another folder")
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "samples").mkdir(exist_ok=True)
    (run / "recipe.json").write_text(recipe.to_json())
    (run / "environment.json").write_text(json.dumps(environment(), indent=1))


def environment() -> dict[str, str]:
    """What a score may depend on besides the recipe: versions, processor, git state."""
    from importlib.metadata import version

    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        git = "not a git checkout"
    packages = {name: version(name) for name in ("diptych", "torch", "numpy", "tokenizers", "safetensors")}
    return {"python": platform.python_version(), "machine": platform.machine(), "git": git, **packages}


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
    finally:
        for s, h in old.items():
            signal.signal(s, h)
