"""``diptych study``: a paper's table in miniature. Arms differ in one thing; all start from one model and share steps,
data order, noise, prompts and scorer. Arms of several stages that agree in the first share its run. Every run resumes,
so a stopped study goes on where it was."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diptych import models
from diptych.analyze.copying import copying
from diptych.analyze.drawing import drawing
from diptych.core.intervals import mean
from diptych.evaluate import evaluate
from diptych.evaluate.figures import intervals
from diptych.evaluate.scores import Score, macro, paired
from diptych.generate.engine import Engine, load
from diptych.models.hf import write_transformers
from diptych.recipes import cheers, iomm, sgt, synergen
from diptych.recipes.run import resume, train
from diptych.train.parameters import ever_trained
from diptych.train.recipe import Recipe

BENCHMARKS = ("vqa-mini", "geneval-mini")


@dataclass(frozen=True)
class Study:
    """Arms by name, each a recipe for a number of steps, and the arm that differences are taken from.

    ``takes``    modules that every arm takes from the model given and leaves as they are; the rest begins anew. None:
                 arms go on from the whole model
    ``measure``  more to know of every arm's model: numbers by name
    ``model``    where arms start, or what makes it in a folder; None where every arm is a model of its own
    ``fill``     how an arm starts from the model, where it is in neither of these ways
    ``benchmarks``  what arms are scored on (default: questions and drawings)
    """

    title: str
    arms: Mapping[str, Callable[[int], Recipe]]
    base: str
    takes: tuple[str, ...] | None = None
    measure: Callable[[Engine], dict[str, float]] | None = None
    model: str | Callable[[Path], str] | None = "bagel/tiny"
    fill: Callable[[Recipe, str], Recipe] | None = None
    steps: int = 600
    benchmarks: tuple[str, ...] = ()

    def on(self, recipe: Recipe, model: str) -> Recipe:
        """An arm's recipe, started from ``model``."""
        if self.fill or not model:
            return self.fill(recipe, model) if self.fill else recipe
        return recipe.on(model) if self.takes is None else replace(recipe, init=dict.fromkeys(self.takes, model))


def _iomm(**changes: Any) -> Callable[[int], Recipe]:
    return lambda steps: iomm.tiny(**changes, tokens=1280).with_steps(steps)


def _reader(how: tuple) -> Callable[[int], Recipe]:
    return lambda steps: synergen.reader(steps, *how)


def _words(folder: Path) -> str:
    """Trains the language model that the stages start from; returns its model's folder. What transformers reads of it
    stands beside the run."""
    release, words = _trained(synergen.words(), folder / "run"), folder / "words"
    if not words.exists():
        models.write_folder(words, lambda into: write_transformers(models.load(release), into, None))
    return str(release)


def _on_words(recipe: Recipe, model: str) -> Recipe:
    words = Path(model).parent.parent / "words" / "language"
    return replace(recipe, init=recipe.init | {"decoder": f"transformers:{words}"})


def _cheers(**changes: Any) -> Callable[[int], Recipe]:
    return lambda steps: cheers.tiny(tokens=768, **changes).with_steps(steps)


def _begun(*modules: str) -> Callable[[Recipe, str], Recipe]:
    """Arms begin with these modules of the model, which they train on; the rest begins anew in all of them."""
    return lambda recipe, model: replace(recipe, init=recipe.init | dict.fromkeys(modules, model))


BESIDE = {"model": "cheers/tiny", "measure": drawing, "steps": 200}
READER = {"takes": ("mllm", "autoencoder"), "model": "iomm/tiny", "measure": drawing}


STUDIES = {
    "sgt-proxies": Study(
        "What is drawn beside the questions (SGT, table 1.3)",
        {arm: (lambda steps, proxy=proxy: sgt.tiny(proxy, steps=steps)) for arm, proxy in sgt.ARMS.items()},
        "none",
    ),
    "sgt-ratio": Study(
        "Segmentation to questions, by samples (SGT, table 1.5)",
        {
            f"{a}:{b}": (lambda steps, ratio=a / b: sgt.tiny(ratio=ratio, steps=steps))
            for a, b in ((1, 2), (1, 1), (2, 1), (4, 1))
        },
        "2:1",
    ),
    "sgt-amount": Study(
        "How many segmentation pictures there are (SGT, table 1.5)",
        {
            str(n): (lambda steps, amount=n: sgt.tiny("segment" if amount else None, amount=amount, steps=steps))
            for n in (0, 200, 2000, 20_000)
        },
        "0",
    ),
    "iomm-components": Study(
        "What joins reader and generator (IOMM, figure 2b), beside controls of the adapter's size",
        {
            "raw": _iomm(masked=0.0, changes={"adapter": "none"}),
            "raw + block": _iomm(masked=0.0, changes={"adapter": "none", "connector_layers": 1}),
            "static queries": _iomm(masked=0.0, changes={"adapter": "static"}),
            "static queries + block": _iomm(masked=0.0, changes={"adapter": "static", "connector_layers": 1}),
            "residual queries": _iomm(masked=0.0),
            "residual queries + mask": _iomm(),
        },
        "raw",
        **READER,
    ),
    "iomm-recipes": Study(
        "Pre-training and tuning on pictures alone, on pairs, on a mix (IOMM, table 9)",
        {f"{a} to {b}": _iomm(pretrain=a, tune=b) for a in ("pair", "image") for b in ("image", "pair", "mix")},
        "pair to mix",
        **READER,
    ),
    "iomm-mask": Study(
        "The share of a picture's tokens that is masked (IOMM, figure 4b), and what is copied",
        {f"r = {r}": _iomm(masked=r) for r in (0.0, 0.25, 0.45, 0.65, 0.85, 0.95)},
        "r = 0.0",
        **READER | {"measure": lambda engine: drawing(engine) | copying(engine)},
    ),
    "iomm-tuning": Study(
        "Mixed tuning of another family (IOMM, table 2)",
        {kind: (lambda steps, kind=kind: iomm.tuning(kind, steps=steps)) for kind in ("image", "pair", "mix")}
        | {"mix, LoRA": lambda steps: iomm.tuning(steps=steps, rank=4)},
        "pair",
    ),
    "synergen-folding": Study(
        "Detail at equal length: 36 tokens of a small picture, 32 folded ones of a large one (SynerGen-VL, table 6)",
        {arm: _reader(how) for arm, how in synergen.READERS.items()},
        "24 px 1x1",
        model=None,
        steps=1500,
        benchmarks=("glyphs-read",),
    ),
    "synergen-unfolded": Study(
        "The same pixels with and without folding (SynerGen-VL, table 6, control)",
        {arm: _reader(how) for arm, how in synergen.UNFOLDED.items()},
        "64 px 2x4",
        model=None,
        steps=1500,
        benchmarks=("glyphs-read",),
    ),
    "synergen-stages": Study(
        "Two stages beside a language model (SynerGen-VL, table 7)",
        {arm: (lambda steps, how=how: synergen.miniature(steps, **how)) for arm, how in synergen.ARMS.items()},
        "S1+S2 full",
        model=_words,
        fill=_on_words,
        steps=500,
        benchmarks=("words", "glyphs-say", "glyphs-draw"),
    ),
    "cheers-detail": Study(
        "What the fine stage is given: gated detail, all of it, or none at equal parameters (Cheers, table 5)",
        {"gated": _cheers(), "ungated": _cheers(detail="added"), "none": _cheers(detail="none")},
        "gated",
        fill=_begun("decoder", "vision", "projector", "coarse"),
        **BESIDE,
    ),
    "cheers-pixels": Study(
        "Latents decoded to pixels before the vision encoder, or read as they are (Cheers, table 6)",
        {"pixels": _cheers(), "latents": _cheers(**cheers.without_pixels())},
        "pixels",
        fill=_begun("decoder"),
        **BESIDE,
    ),
    "cheers-merge": Study(
        "Tokens of a picture at equal resolution (Cheers, section 2)",
        {"2x2: 16 tokens": _cheers(), "1x1: 64 tokens": _cheers(merge=1)},
        "2x2: 16 tokens",
        fill=_begun("decoder", "vision", "fine", "gate"),
        **BESIDE,
    ),
    "cheers-cascade": Study(
        "Two stages with detail between them, or one",
        {"cascade": _cheers(), "one stage": _cheers(head_layers=(2, 0))},
        "cascade",
        fill=_begun("decoder", "vision", "projector"),
        **BESIDE,
    ),
}


def study(
    name: str,
    folder: Path,
    out: Path,
    model: str | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int | None = None,
    limit: int | None = None,
) -> Path:
    """Runs what is missing of a study and returns the page that it writes, with one table and one plot.

    ``folder`` keeps the runs, ``folder/ARM/seed-S``; ``model`` is where arms start (default: the study's own);
    ``steps`` are those of an arm (default: the study's own); ``limit`` is the evaluation's items per category.
    Raises ``ValueError`` for an unknown study, for a model where a study makes its own, and for a folder that was begun
    with other settings."""
    if name not in STUDIES:
        raise ValueError(f"unknown study {name!r}; choose from {', '.join(STUDIES)}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"a study needs different seeds, at least one, not {list(seeds)}")
    this, console = STUDIES[name], Console()
    if model is not None and not isinstance(this.model, str):
        raise ValueError(f"{name} makes its own models; it cannot start from {model!r}")
    steps = steps or this.steps
    told = model or (this.model if isinstance(this.model, str) else None)
    settings = {"study": name, "model": told and models.read_config(told), "from": told, "steps": steps, "limit": limit}
    _agree(folder, settings)
    model = this.model(folder / "start") if callable(this.model) else told or ""
    rights: dict[str, list[dict]] = {}
    measures: dict[str, list[dict[str, float]]] = {}
    if model:
        console.rule("start")
        rights["start"] = [_rights(this, model, folder / "start", limit)]
    for arm, make in this.arms.items():
        for seed in seeds:
            console.rule(f"{arm}, seed {seed}")
            run = folder / re.sub(r"[^\w.+-]+", "-", arm) / f"seed-{seed}"
            recipe = replace(this.on(make(steps), model), seed=seed)
            release = _stages(recipe, run, folder / "stage-1")
            _untouched(recipe, model, release)
            rights.setdefault(arm, []).append(_rights(this, str(release), run / "evaluate", limit))
            if this.measure:
                measures.setdefault(arm, []).append(this.measure(load(release)))
    page = _page(this, name, rights, measures, told, seeds, steps, limit, out)
    console.print(page.read_text(), highlight=False)
    return page


def _agree(folder: Path, settings: Mapping) -> None:
    """Writes what a study was begun with, or refuses to go on with something else."""
    file = folder / "study.json"
    if file.exists():
        begun = json.loads(file.read_text())
        if changed := [k for k, v in settings.items() if begun.get(k) != v]:
            raise ValueError(f"{folder} was begun with another {', '.join(changed)}; name another folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(settings), indent=1))


def _stages(recipe: Recipe, run: Path, shared: Path) -> Path:
    """The release of a recipe. Of several stages the first has a run of its own under ``shared``, for all that agree in
    it; the rest goes on from there."""
    if len(recipe.stages) > 1:
        first = replace(recipe, stages=recipe.stages[:1])
        place = shared / hashlib.sha256(first.to_json().encode()).hexdigest()[:12]
        recipe = replace(recipe, stages=recipe.stages[1:], init={"model": str(_trained(first, place))})
    return _trained(recipe, run)


def _untouched(recipe: Recipe, model: str, release: Path) -> None:
    """Raises ``ValueError`` where a weight that was taken from the model, and that no stage trains, is another now."""
    taken = {module for module, start in recipe.init.items() if start == model}
    if not taken:
        return
    before, after = models.load(model).state_dict(), models.load(release)
    learned = ever_trained(after, recipe.stages)
    kept = {n: p for n, p in after.named_parameters() if p not in learned and {"model", n.partition(".")[0]} & taken}
    if changed := sorted(n for n, p in kept.items() if not torch.equal(before[n], p)):
        raise ValueError(f"{release} changed {', '.join(changed[:4])}")


def _trained(recipe: Recipe, run: Path) -> Path:
    if not (run / "recipe.json").exists():
        return train(recipe, run)
    done = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()[-1:]]
    return run / "release" if done == [recipe.steps] and (run / "release").exists() else resume(run)


def _rights(this: Study, model: str, folder: Path, limit: int | None) -> dict[tuple[str, str, str], tuple[float, str]]:
    """Of every item (benchmark, category, id): whether it was right, and its cluster."""
    result = evaluate(load(model), this.benchmarks or BENCHMARKS, seed=0, limit=limit, folder=folder)
    return {
        (o.item.benchmark, o.item.category, o.item.id): (float(o.verdict.ok), o.item.cluster) for o in result.outcomes
    }


def _page(
    this: Study,
    name: str,
    rights: Mapping,
    measures: Mapping[str, list[dict[str, float]]],
    model: str | None,
    seeds: Sequence[int],
    steps: int,
    limit: int | None,
    out: Path,
) -> Path:
    first = next(iter(rights.values()))[0]
    begins = f"Every arm goes on from `{model}` for {steps} steps."
    if model and this.fill:
        begins = (
            f"Arms begin with what they share of `{model}` (**start**), the rest anew, and train for {steps} steps."
        )
    if model is None:
        half = ", one stage alone for half of them" if this.fill else ""
        begins = f"Every arm is trained for {steps} steps{half}."
    if this.takes:
        begins = (
            f"Every arm has {' and '.join(f'`{m}`' for m in this.takes)} of `{model}` (**start**) and leaves them bit "
            f"for bit as they are; the rest begins anew and is trained for {steps} steps in all."
        )
    lines = [
        f"# {this.title}",
        "",
        f"`diptych study {name}{f' --model {model}' if model else ''} --steps {steps} --seeds "
        f"{' '.join(map(str, seeds))}{f' --limit {limit}' if limit else ''}`",
        "",
        f"{begins} Brackets are 95 % intervals: over seeds (Student's t) where there are several, else over items. "
        f"Δ is the difference to **{this.base}** on the same items, with a bootstrap over prompts. "
        "Overall is the mean of the columns right of it.",
    ]
    plots = {}
    for benchmark in this.benchmarks or BENCHMARKS:
        categories = list(dict.fromkeys(c for b, c, _ in first if b == benchmark))
        lines += ["", f"## {benchmark}", "", f"| arm | overall | Δ | {' | '.join(categories)} |"]
        lines += ["|---" * (3 + len(categories)) + "|"]
        plots[benchmark] = {arm: _score(of, benchmark, categories) for arm, of in rights.items()}
        for arm, of in rights.items():
            cells = [_cell(plots[benchmark][arm])]
            cells.append("" if arm in ("start", this.base) else _cell(_gain(rights[this.base], of, benchmark), "+"))
            cells += [f"{_score(of, benchmark, [c]).value:.3f}" for c in categories]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    if measures:
        names = list(next(iter(measures.values()))[0])
        lines += ["", f"| arm | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
        for arm, of in measures.items():
            lines.append(f"| {arm} | {' | '.join(f'{mean([m[n] for m in of])[0]:.3g}' for n in names)} |")
        none = [{names[0]: float("nan")}]  # of the start; one seed has no interval either
        plots[names[0]] = {a: Score(*mean([m[names[0]] for m in measures.get(a, none)]), len(seeds)) for a in rights}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.png").write_bytes(intervals(plots))
    page = out / f"{name}.md"
    page.write_text("\n".join([*lines, "", f"![scores by arm]({name}.png)", ""]))
    return page


def _score(seeds: Sequence[Mapping], benchmark: str, categories: Sequence[str]) -> Score:
    """The unweighted mean over categories; its interval over seeds, or over items where there is one seed."""
    each = []
    for of in seeds:
        groups = {c: [v for (b, at, _), v in of.items() if (b, at) == (benchmark, c)] for c in categories}
        each.append(macro({c: ([r for r, _ in v], [k for _, k in v]) for c, v in groups.items()}))
    if len(each) == 1:
        return each[0]
    return Score(*mean([s.value for s in each]), sum(s.n for s in each))


def _gain(base: Sequence[Mapping], arm: Sequence[Mapping], benchmark: str) -> Score:
    """How much an arm is above the base arm on the same items, seed by seed."""
    a, b, clusters, groups = [], [], [], []
    for before, after in zip(base, arm, strict=True):
        for key, (right, cluster) in before.items():
            if key[0] == benchmark:
                a.append(right)
                b.append(after[key][0])
                clusters.append(f"{key[1]}/{cluster}")
                groups.append(key[1])
    return paired(a, b, clusters, groups)


def _cell(score: Score, sign: str = "") -> str:
    return f"{score.value:{sign}.3f} [{score.low:{sign}.3f}, {score.high:{sign}.3f}]"
