"""A stage that trains from rewards: rollouts, judging, advantages, and the updates on them.

::

    asks ── old weights ──▶ rollouts ── rewards ──▶ advantages ──▶ packed rows ──▶ objective ──▶ optimizer step
             ▲                                                                                        │
             └───────────────────────────────── old weights follow ◀──────────────────────────────────┘

Nothing of a rollout is saved: asks and seeds are functions of the run's seed and the step, so a resumed run makes the
rollouts that the uninterrupted run would have made.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import PIL.Image
import torch
from torch import nn

from diptych.core import intervals
from diptych.core.batch import Batch, pack
from diptych.core.layout import Layout
from diptych.core.losses import add_counts, combine
from diptych.core.noise import Noise
from diptych.core.sample import Image, Message, Sample
from diptych.data.contact_sheet import grid
from diptych.data.mixture import Mixture, bits
from diptych.machine import disk
from diptych.machine.processes import gather, place, together, total
from diptych.models.protocol import Trainable, UnifiedModel
from diptych.training.log import Tally, memory
from diptych.training.objectives import Policy, Recorded, Recorder
from diptych.training.parallel import sharded
from diptych.training.policy import Snapshot
from diptych.training.recipe import Recipe, Reward, Stage
from diptych.training.rows import Sources

log = logging.getLogger("diptych.training")
PATIENCE = 20  # steps without any difference between rollouts before a warning
SHEET = (4, 6)  # groups and rollouts of a group on a sheet of rollouts


@dataclass(frozen=True, eq=False)
class Rollout:
    """What the model made of an ask: a training sample that holds it, and the picture or text itself.

    ``finished`` is False for text that reached its limit; it is judged, and not trained on."""

    sample: Sample
    made: PIL.Image.Image | str
    finished: bool = True


@runtime_checkable
class Rollouts(Protocol):
    """What a stage with ``reward`` is handed: how the model makes something of an ask, and how that is judged."""

    def make(self, model: UnifiedModel, asks: Sequence[Sample], seeds: Sequence[int], how: Reward) -> list[Rollout]:
        """One rollout for each ask, from its own seed. Asks that are one object share their prefill."""

    def judge(
        self, asks: Sequence[Sample], made: Sequence[PIL.Image.Image | str], how: Reward, folder: Path
    ) -> list[dict[str, float | None]]:
        """The value of every reward, by name; None where there is nothing to judge. Raises ``ConnectionError`` for a
        judge that cannot be reached. Replies of judges are kept in ``folder``."""

    def temperatures(self, model: UnifiedModel, how: Reward, folder: Path) -> dict[str, float]:
        """The sampling temperature of each loss term."""


Update = Callable[[list[Batch]], dict[str, float]]  # the optimizer step; returns gradient norms


@dataclass(frozen=True)
class Tools:
    """What a step needs of the training loop."""

    autocast: Callable[[], AbstractContextManager]
    update: Update
    check: Callable[[str, float, list[Batch]], None]  # stops the run at a loss that is not finite
    folder: Path


class RewardStage:
    """The asks of a stage, the other weights that it needs, and one step at a time.

    It stands where the loader of a supervised stage does: it is saved and resumed with the same calls."""

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        model: Trainable,
        sources: Sources,
        rollouts: Rollouts | None,
        parameters: Mapping[str, nn.Parameter],
        folder: Path,
    ) -> None:
        """Raises ``ValueError`` for what cannot be trained from rewards."""
        assert stage.reward is not None
        if not isinstance(model, UnifiedModel):
            raise ValueError(f"stage {stage.name!r} trains from rewards, but family {model.family!r} makes nothing")
        if rollouts is None:
            raise ValueError(f"stage {stage.name!r} trains from rewards; pass rollouts to train")
        if sharded(recipe.engine):
            raise ValueError(f"a stage with reward needs engine.shard none, not {recipe.engine.shard!r}")
        self.recipe, self.stage, self.model, self.how, self.rollouts = recipe, stage, model, stage.reward, rollouts
        self.sources = sources(recipe, stage)
        seed = recipe.seed + 7919 * recipe.stages.index(stage)
        self.mixture = Mixture(self.sources, stage.data, seed)
        self.dev = list(self._dev(sources, seed))
        self.temperatures = rollouts.temperatures(model, self.how, folder)
        self.snapshots: dict[str, Snapshot] = {}
        if self.how.follow[2]:
            self.snapshots["old"] = Snapshot(parameters)
        if any(self.how.reference.values()):
            self.snapshots["first"] = Snapshot(parameters)
        self.same = True  # old weights equal the trained ones
        self.best, self.since, self.alike = -math.inf, 0, 0
        self.over = False
        self.moved = False  # the running step has begun to change the weights
        self._warn_of_guidance()

    def _dev(self, sources: Sources, seed: int) -> Iterator[Sample]:
        how = self.how
        if how.dev:
            held = sources(self.recipe, replace(self.stage, data=how.dev))
            mixture = Mixture(held, how.dev, seed)
            for _ in range(how.dev_asks):
                draw = mixture.draw()
                yield held[draw.source][draw.index]

    def _warn_of_guidance(self) -> None:
        scale = getattr(self.model.settings, "guidance_scale", 1.0)
        rolled = self.how.sampling.get("guidance_scale", scale)
        if rolled <= 1 < scale and not self.how.reference.get("image") and place()[0] == 0:
            log.warning(
                "rollouts have guidance_scale %g, the model's own is %g, and reward.reference has no weight for image: "
                "such training moves guidance into the weights, and drawing with guidance gets worse. Set "
                "reward.reference.image to 1, or reward.sampling.guidance_scale to %g",
                rolled,
                scale,
                scale,
            )

    # ---- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the asks and the stop rule are; JSON-able, the same in every process."""
        state = {"since": self.since, "alike": self.alike, "same": self.same, "over": self.over}
        return {"asks": self.mixture.state_dict(), "best": None if self.best == -math.inf else self.best, **state}

    def load_state_dict(self, state: Mapping[str, Any], grown: bool = False) -> None:
        """Continues where ``state`` was taken."""
        self.mixture.load_state_dict(state["asks"])
        self.best = -math.inf if state["best"] is None else state["best"]
        self.since, self.alike = state["since"], state["alike"]
        self.same, self.over = state["same"], state["over"]

    @contextmanager
    def running(self) -> Iterator[Iterator[Any]]:
        """Nothing has to be started or ended, and there are no rows: ``step`` makes them."""
        yield iter(())

    # ---- a step -------------------------------------------------------------------------------------------------

    def step(self, tools: Tools, step: int, done: int, checkpoint: bool) -> dict[str, float]:
        """One step: ``step`` counts those of the run, ``done`` those of the stage. With ``checkpoint`` the dev asks are
        scored, too, and a sheet of rollouts is written. Returns what to log; draws nothing anew where a judge fails."""
        began, position = time.perf_counter(), self.mixture.state_dict()
        self.moved = False
        row: dict[str, float] = {}
        if self.dev and done == 0:
            row |= {f"dev_before/{k}": v for k, v in self.score(tools).items()}
        try:
            groups = self._groups(tools, step)
        except ConnectionError:
            self.mixture.load_state_dict(position)  # a resumed run asks the same again
            raise
        rolled = time.perf_counter()
        totals = self._advantages(groups)
        trained = [r for g in groups for r in g.trained]
        self.moved = True
        row |= self._train(tools, step, trained)
        self._follow(done)
        if checkpoint:
            if self.dev:
                row |= {f"dev/{k}": v for k, v in self.score(tools).items()}
                self._judge_dev(row["dev/score"])
            if place()[0] == 0:
                self._sheet(groups, tools.folder, step + 1)
        row |= self._logged(groups, totals)
        seconds = time.perf_counter() - began
        made = total({"made": float(sum(len(g.rollouts) for g in groups))})["made"]
        return row | {
            "seconds": seconds,
            "seconds/rollouts": rolled - began,
            "images_per_second": made / seconds,
            "data_wait": 0.0,
            "memory": memory(self.model.device),
        }

    def _groups(self, tools: Tools, step: int) -> list[_Group]:
        """The rollouts of this process's asks, with their rewards."""
        rank, world = place()
        draws = [self.mixture.draw() for _ in range(self.how.asks)]

        def work() -> list[_Group]:
            groups = []
            for k in range(rank, len(draws), world):
                row = self.sources[draws[k].source][draws[k].index]
                name, ask = f"{row.id}/{step}/{k}", asked(row)
                seeds = [bits(self.recipe.seed, "rollout", step, k, g) >> 33 for g in range(self.how.group)]
                groups.append(_Group(name, row, ask, seeds))
            self._make(tools, groups, self.how)
            return groups

        return together(work)

    def _make(self, tools: Tools, groups: Sequence[_Group], how: Reward) -> None:
        """Fills groups with rollouts of the old weights and their rewards."""
        asks = [g.ask for g in groups for _ in g.seeds]
        old = self.snapshots.get("old")
        with evaluating(self.model), old.used() if old and not self.same else nullcontext(), tools.autocast():
            made = self.rollouts.make(self.model, asks, [s for g in groups for s in g.seeds], how)
        values = self.rollouts.judge(
            [g.row for g in groups for _ in g.seeds], [r.made for r in made], how, tools.folder
        )
        at = 0
        for g in groups:
            g.rollouts, g.values = made[at : at + len(g.seeds)], values[at : at + len(g.seeds)]
            at += len(g.seeds)
            for k, (rollout, value) in enumerate(zip(g.rollouts, g.values, strict=True)):
                if bad := {n: v for n, v in value.items() if v is not None and not math.isfinite(v)}:
                    raise ValueError(f"rewards must be finite; rollout {k} of ask {g.row.id!r} has {bad}")
                g.samples.append(replace(rollout.sample, id=f"{g.name}.{k}"))
            judged = {name for value in g.values for name, v in value.items() if v is not None}  # what fits this ask
            for value in g.values:
                parts = [how.rewards[name] * v for name in sorted(judged) if (v := value[name]) is not None]
                g.totals.append(sum(parts) if parts and len(parts) == len(judged) else None)

    def _advantages(self, groups: Sequence[_Group]) -> dict[str, float]:
        """Gives every rollout its advantage; returns sums over all rollouts of all processes."""
        known = [t for g in groups for t in g.known]
        sums = {"n": float(len(known)), "sum": sum(known), "squares": sum(t * t for t in known)}
        sums = total(sums)
        n = max(sums["n"], 1.0)
        mean = sums["sum"] / n
        deviation = math.sqrt(max(sums["squares"] / n - mean * mean, 0.0))
        for g in groups:
            if g.spread:
                scale = {"batch": deviation, "group": g.deviation, "none": 1.0}[self.how.std]
                divisor = scale + 1e-4 if self.how.std != "none" else 1.0
                g.trained = [
                    (sample, (t - g.mean) / divisor)
                    for sample, rollout, t in zip(g.samples, g.rollouts, g.totals, strict=True)
                    if t is not None and rollout.finished
                ]
        return {"reward": mean, "reward/std": deviation, "n": sums["n"]}

    def _train(self, tools: Tools, step: int, trained: Sequence[tuple[Sample, float]]) -> dict[str, float]:
        """The updates on the rollouts that differ from their group; without any, nothing moves."""
        how, model, stage = self.how, self.model, self.stage
        rows = [(pack([x for x, _ in row], model.routes).to(model.device), row) for row in self._rows(trained)]
        counts = total(add_counts([_zeros(stage), *(model.counts(b) for b, _ in rows)]))
        counts = {name: n * how.draws for name, n in counts.items()}
        anything = total({"n": float(len(trained))})["n"]
        self.alike = 0 if anything else self.alike + 1
        if self.alike == PATIENCE and place()[0] == 0:
            log.warning(
                "stage %r: for %d steps the rollouts of every ask have had equal rewards (%s), so nothing was learned. "
                "Choose asks that the model sometimes gets right, or a graded reward",
                stage.name,
                PATIENCE,
                ", ".join(how.rewards),
            )
        tally, logged = Tally(counts, stage.data), dict[str, float]()
        norms: dict[str, float] = {"gradient_norm": 0.0}
        if anything:
            recorded = self._record(tools, step, [b for b, _ in rows])
            for update in range(how.updates):
                values = [
                    self._backward(tools, rows[i], self._noise(step, u, d), counts, old, first, tally, logged)
                    for (u, d, i), (old, first) in recorded.items()
                    if u == update
                ]
                bad = next((v for v in values if not math.isfinite(v)), 0.0)
                tools.check("loss", bad, [b for b, _ in rows])
                norms = tools.update([b for b, _ in rows])
        tokens = float(sum(sum(b.lengths) for b, _ in rows))
        return tally.logged(stage.loss) | _means(logged) | norms | {"trained": anything, "tokens": tokens}

    def _noise(self, step: int, update: int, draw: int) -> Noise:
        return Noise(self.recipe.seed, (step * self.how.updates + update) * self.how.draws + draw)

    def _record(
        self, tools: Tools, step: int, batches: list[Batch]
    ) -> dict[tuple[int, int, int], tuple[Recorded | None, Recorded | None]]:
        """What the old and the first weights predict for every (update, draw, row); None where nobody asks."""
        out = {}
        for u in range(self.how.updates):
            for d in range(self.how.draws):
                for i, batch in enumerate(batches):
                    noise = self._noise(step, u, d)
                    old = self.snapshots.get("old")
                    needed = self.how.updates > 1 or not self.same
                    before = self._predictions(tools, batch, noise, None if self.same else old) if needed else None
                    first = self.snapshots.get("first")
                    out[u, d, i] = before, self._predictions(tools, batch, noise, first) if first else None
        return out

    @torch.no_grad()
    def _predictions(self, tools: Tools, batch: Batch, noise: Noise, weights: Snapshot | None) -> Recorded:
        recorder = Recorder(self.temperatures)
        with weights.used() if weights else nullcontext(), tools.autocast():
            self.model(batch, noise, recorder)
        return recorder.values

    def _backward(
        self,
        tools: Tools,
        row: tuple[Batch, Sequence[tuple[Layout, float]]],
        noise: Noise,
        counts: Mapping[str, float],
        old: Recorded | None,
        first: Recorded | None,
        tally: Tally,
        logged: dict[str, float],
    ) -> float:
        """Adds the gradients of a row; returns its loss."""
        batch, pairs = row
        advantages = torch.tensor([a for _, a in pairs], dtype=torch.float32, device=batch.ids.device)
        policy = Policy(advantages, self.how, self.temperatures, old, first, logged)
        with tools.autocast():
            losses = self.model(batch, noise, policy)
            loss = combine(losses, self.stage.loss, counts)
        if loss.requires_grad:
            loss.backward()
        tally.add(losses, batch)
        return float(loss.detach())

    def _rows(self, trained: Sequence[tuple[Sample, float]]) -> list[list[tuple[Layout, float]]]:
        """Rollouts in order, in rows within the stage's limits. Raises ``ValueError`` for one that fits no row."""
        limits, rows, tokens, pictures = self.stage.limits, list[list[tuple[Layout, float]]](), 0, 0
        for sample, advantage in trained:
            layout = self.model.lay_out(sample)
            if len(layout) > limits.tokens or layout.pictures > limits.pictures:
                raise ValueError(
                    f"rollout {sample.id!r} has {len(layout)} tokens and {layout.pictures} pictures; limits allow "
                    f"{limits.tokens} and {limits.pictures}"
                )
            tokens, pictures = tokens + len(layout), pictures + layout.pictures
            if not rows or tokens > limits.tokens or pictures > limits.pictures:
                rows.append([])
                tokens, pictures = len(layout), layout.pictures
            rows[-1].append((layout, advantage))
        return rows

    def _follow(self, done: int) -> None:
        if "old" in self.snapshots:
            decay = self.how.decay(done)
            self.snapshots["old"].follow(decay)
            self.same = not decay

    # ---- dev ----------------------------------------------------------------------------------------------------

    def score(self, tools: Tools) -> dict[str, float]:
        """The mean reward of the dev asks with the trained weights and the model's own settings: score, low and high
        (95 %), n."""
        rank, world = place()
        how = replace(self.how, sampling={})

        def work() -> list[float]:
            groups = []
            for k in range(rank, len(self.dev), world):
                groups.append(_Group(f"dev/{k}", self.dev[k], asked(self.dev[k]), [bits("dev", k) >> 33]))
            same, self.same = self.same, True  # the trained weights, not the old ones
            try:
                self._make(tools, groups, how)
            finally:
                self.same = same
            return [t for g in groups for t in g.known]

        known = together(work)
        sums = total({"n": float(len(known)), "sum": sum(known), "squares": sum(t * t for t in known)})
        n = max(sums["n"], 1.0)
        mean = sums["sum"] / n
        half = intervals.Z * math.sqrt(max(sums["squares"] / n - mean * mean, 0.0) / n)
        return {"score": mean, "low": mean - half, "high": mean + half, "n": sums["n"]}

    def _judge_dev(self, score: float) -> None:
        """The stop rule: the stage is over after ``patience`` scores that were not better than the best."""
        self.since = 0 if score > self.best else self.since + 1
        self.best = max(self.best, score)
        if self.how.patience and self.since >= self.how.patience:
            self.over = True

    # ---- log ----------------------------------------------------------------------------------------------------

    def _logged(self, groups: Sequence[_Group], totals: Mapping[str, float]) -> dict[str, float]:
        """Rewards by name and by type of ask, groups without variance, and variety, over all processes."""
        sums: dict[str, float] = {"groups": 0.0, "even": 0.0, "even/low": 0.0, "even/high": 0.0, "cut": 0.0}
        types = sorted(set(self._types(groups)))
        for name in (*self.how.rewards, *types):
            sums |= {f"{name}|sum": 0.0, f"{name}|n": 0.0}
        sums |= {"variety|sum": 0.0, "variety|n": 0.0}
        for g in groups:
            sums["groups"] += 1
            sums["cut"] += sum(not r.finished for r in g.rollouts)
            if g.known and not g.spread:
                sums["even"] += 1
                sums["even/low" if g.mean < 0.5 else "even/high"] += 1
            for value in g.values:
                for name, v in value.items():
                    if v is not None:
                        sums[f"{name}|sum"] += v
                        sums[f"{name}|n"] += 1
            kind = str(g.row.info.get("type", ""))
            if kind in types:
                sums[f"{kind}|sum"] += sum(g.known)
                sums[f"{kind}|n"] += len(g.known)
            if (spread := variety(g.rollouts)) is not None:
                sums["variety|sum"] += spread
                sums["variety|n"] += 1
        sums = total(sums)

        def mean(name: str) -> float:
            return sums[f"{name}|sum"] / max(sums[f"{name}|n"], 1.0)

        many = max(sums["groups"], 1.0)
        out = {"reward": totals["reward"], "reward/std": totals["reward/std"], "rollouts": totals["n"]}
        out |= {f"reward/{name}": mean(name) for name in self.how.rewards}
        out |= {f"reward/type/{kind}": mean(kind) for kind in types if sums[f"{kind}|n"]}
        out |= {"even": sums["even"] / many, "even/low": sums["even/low"] / many, "even/high": sums["even/high"] / many}
        out |= {"variety": mean("variety")} if sums["variety|n"] else {}
        return out | ({"cut": sums["cut"]} if sums["cut"] else {})

    def _types(self, groups: Sequence[_Group]) -> list[str]:
        return [t for some in gather([str(g.row.info["type"]) for g in groups if "type" in g.row.info]) for t in some]

    def _sheet(self, groups: Sequence[_Group], folder: Path, step: int) -> None:
        """Rollouts of the first asks with their rewards, where they are pictures."""
        pairs = [
            (r.made, f"{t if t is None else f'{t:.2f}'}  {g.ask.prompt}")
            for g in groups[: SHEET[0]]
            for r, t in list(zip(g.rollouts, g.totals, strict=True))[: SHEET[1]]
            if isinstance(r.made, PIL.Image.Image)
        ]
        if pairs:
            images, captions = zip(*pairs, strict=True)
            with disk.atomic(folder / "samples" / f"step-{step:08d}-rollouts.png") as part:
                grid(images, captions, columns=min(SHEET[1], self.how.group)).save(part, "PNG")


class _Group:
    """The rollouts of one ask."""

    def __init__(self, name: str, row: Sample, ask: Sample, seeds: list[int]) -> None:
        self.name, self.row, self.ask, self.seeds = name, row, ask, seeds
        self.rollouts: list[Rollout] = []
        self.values: list[dict[str, float | None]] = []
        self.totals: list[float | None] = []
        self.samples: list[Sample] = []
        self.trained: list[tuple[Sample, float]] = []

    @property
    def known(self) -> list[float]:
        """The rewards of the rollouts that could be judged."""
        return [t for t in self.totals if t is not None]

    @property
    def mean(self) -> float:
        return sum(self.known) / max(len(self.known), 1)

    @property
    def deviation(self) -> float:
        return math.sqrt(sum((t - self.mean) ** 2 for t in self.known) / max(len(self.known), 1))

    @property
    def spread(self) -> bool:
        """Whether its rollouts differ in reward: else there is nothing to learn from them."""
        return len(self.known) > 1 and max(self.known) - min(self.known) > 1e-9


def asked(sample: Sample) -> Sample:
    """The row of a data set as a request: without its last answer, and without loss on earlier ones. A picture keeps
    the requested size. A row that ends with the user's message asks for a picture.

    Raises ``ValueError`` for a row that has no request, or draws before its last answer."""
    messages = sample.messages
    last = messages[-1] if messages else None
    answer = last.parts[-1] if last and last.role == "assistant" and last.parts else None
    kept = messages[:-1] if last and last.role == "assistant" else messages
    if not kept or kept[-1].role != "user":
        raise ValueError(f"sample {sample.id!r} is no ask: it has no user's message before its answer")
    if any(p.role == "target" for m in kept for p in m.parts if isinstance(p, Image)):
        raise ValueError(f"sample {sample.id!r} draws a picture before its last answer; only the last can be rewarded")
    quiet = [tuple(p if isinstance(p, Image) else replace(p, loss=False) for p in m.parts) for m in kept]
    kept = tuple(replace(m, parts=parts) for m, parts in zip(kept, quiet, strict=True))
    if answer is None or isinstance(answer, Image):
        size = answer.size if isinstance(answer, Image) else None
        kept = (*kept, Message("assistant", (Image(None, "target", size),)))
    return replace(sample, messages=kept)


def variety(rollouts: Sequence[Rollout]) -> float | None:
    """How different the rollouts of an ask are: of pictures the mean distance between their latents, over their size
    (1.41 where they are independent), or the share of codes that differ; of texts the share of different ones."""
    if len(rollouts) < 2:
        return None
    if isinstance(rollouts[0].made, str):
        return len({str(r.made) for r in rollouts}) / len(rollouts)
    pictures = [next(iter(list(r.sample.images())[-1].encoded.values())) for r in rollouts]
    if len({p.shape for p in pictures}) > 1:
        return None
    x = torch.stack(pictures).flatten(1)
    pairs = torch.triu_indices(len(x), len(x), 1)
    if not x.is_floating_point():
        return float((x[pairs[0]] != x[pairs[1]]).float().mean())
    x = x.float()
    return float((x[pairs[0]] - x[pairs[1]]).square().mean(1).sqrt().mean() / x.square().mean().sqrt().clamp(min=1e-9))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without gradient; its modes come back with the end of the block."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _zeros(stage: Stage) -> dict[str, float]:
    return dict.fromkeys(stage.loss, 0.0)


def _means(logged: Mapping[str, float]) -> dict[str, float]:
    """Sums of the objective over all processes, divided by how many elements they have."""
    names = sorted({name for some in gather(list(logged)) for name in some})
    sums = total({name: logged.get(name, 0.0) for name in names}) if names else {}
    n = {name: max(value, 1.0) for name, value in sums.items() if name.endswith("/n")}
    return {f"policy/{k}": v / n[f"{k.partition('/')[0]}/n"] for k, v in sums.items() if k not in n}
