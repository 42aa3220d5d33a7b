"""``diptych study``: a paper's table in miniature. Arms differ in one thing; all start from one model and share steps,
data order, noise, prompts and scorer. Every run resumes, so a stopped study goes on where it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from diptych import models
from diptych.core.intervals import mean
from diptych.evaluate import evaluate
from diptych.evaluate.figures import intervals
from diptych.evaluate.scores import Score, macro, paired
from diptych.generate.engine import load
from diptych.recipes import sgt, synergen
from diptych.recipes.run import resume, train
from diptych.train.recipe import Recipe

BENCHMARKS = ("vqa-mini", "geneval-mini")


Arm = Callable[[int, str], Recipe]  # (steps, the model that arms start from) -> what the arm trains


@dataclass(frozen=True)
class Study:
    """Arms by name, and the arm that differences are taken from.

    ``model`` is where arms start (a name or folder), or what makes it in a folder; None where every arm is a model of
    its own. ``benchmarks`` (default: questions and drawings) are scored on pictures of ``size`` pixels."""

    title: str
    arms: Mapping[str, Arm]
    base: str
    model: str | Callable[[Path], str] | None = "bagel/tiny"
    steps: int = 600
    benchmarks: tuple[str, ...] = ()
    size: int = 64


def _sgt(**how: Any) -> Arm:
    return lambda steps, model: sgt.tiny(**how, steps=steps).on(model)


def _reader(how: tuple) -> Arm:
    return lambda steps, model: synergen.reader(steps, *how)


def _words(folder: Path) -> str:
    """Trains the language model that the stages start from; returns its model's folder."""
    release = _trained(synergen.words(), folder / "run")
    words = folder / "words"
    if not words.exists():
        models.save_language_model(models.load(release), words)
    return str(release)


def _stages(**how: Any) -> Arm:
    """An arm on the language model that stands beside the start's run (``_words``)."""
    return lambda steps, model: synergen.miniature(str(Path(model).parent.parent / "words"), steps, **how)


STUDIES = {
    "sgt-proxies": Study(
        "What is drawn beside the questions (SGT, table 1.3)",
        {arm: _sgt(proxy=proxy) for arm, proxy in sgt.ARMS.items()},
        "none",
    ),
    "sgt-ratio": Study(
        "Segmentation to questions, by samples (SGT, table 1.5)",
        {f"{a}:{b}": _sgt(ratio=a / b) for a, b in ((1, 2), (1, 1), (2, 1), (4, 1))},
        "2:1",
    ),
    "sgt-amount": Study(
        "How many segmentation pictures there are (SGT, table 1.5)",
        {str(n): _sgt(proxy="segment" if n else None, amount=n or None) for n in (0, 200, 2000, 20_000)},
        "0",
    ),
    "synergen-folding": Study(
        "Detail at equal length: token folding (SynerGen-VL, table 6)",
        {arm: _reader(how) for arm, how in synergen.READERS.items()},
        "24 px, no folding: 36 tokens",
        model=None,
        steps=1500,
        benchmarks=("glyphs-read",),
    ),
    "synergen-unfolded": Study(
        "The same pixels with and without folding (SynerGen-VL, table 6, control)",
        {arm: _reader(how) for arm, how in synergen.UNFOLDED.items()},
        "64 px, folded 2x4: 32 tokens",
        model=None,
        steps=1500,
        benchmarks=("glyphs-read",),
    ),
    "synergen-stages": Study(
        "Two stages beside a language model (SynerGen-VL, table 7)",
        {arm: _stages(**how) for arm, how in synergen.ARMS.items()},
        "S1+S2 full",
        model=_words,
        steps=500,
        benchmarks=("words", "glyphs-say", "glyphs-draw"),
        size=32,
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

    ``folder`` keeps the runs, ``folder/ARM/seed-S``; ``limit`` is the evaluation's items per category. Model and steps
    are the study's own by default. Raises ``ValueError`` for an unknown study, for a model where every arm is its own,
    and for a folder that was begun with other settings."""
    if name not in STUDIES:
        raise ValueError(f"unknown study {name!r}; choose from {', '.join(STUDIES)}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"a study needs different seeds, at least one, not {list(seeds)}")
    this, console = STUDIES[name], Console()
    if model is not None and not isinstance(this.model, str):
        raise ValueError(f"{name} makes its own models; it starts from no other")
    steps = steps or this.steps
    told = model or (this.model if isinstance(this.model, str) else None)
    settings = {"study": name, "model": told and models.read_config(told), "from": told, "steps": steps, "limit": limit}
    _agree(folder, settings)
    start = this.model(folder / "start") if callable(this.model) else told or ""
    rights: dict[str, list[dict]] = {}
    if start:
        console.rule("start")
        rights["start"] = [_rights(this, start, folder / "start" / "evaluate", limit)]
    for arm, make in this.arms.items():
        for seed in seeds:
            console.rule(f"{arm}, seed {seed}")
            run = folder / _folder(arm) / f"seed-{seed}"
            recipe = replace(make(steps, start), seed=seed)
            rights.setdefault(arm, []).append(_rights(this, str(_trained(recipe, run)), run / "evaluate", limit))
    page = _page(this, name, rights, told, seeds, steps, out)
    console.print(page.read_text(), highlight=False)
    return page


def _folder(arm: str) -> str:
    """An arm's name as a folder's."""
    return re.sub(r"[^\w.+-]+", "-", arm)


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


def _trained(recipe: Recipe, run: Path) -> Path:
    if not (run / "recipe.json").exists():
        return train(recipe, run)
    done = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()[-1:]]
    return run / "release" if done == [recipe.steps] and (run / "release").exists() else resume(run)


def _rights(this: Study, model: str, folder: Path, limit: int | None) -> dict[tuple[str, str, str], tuple[float, str]]:
    """Of every item (benchmark, category, id): whether it was right, and its cluster."""
    names = this.benchmarks or BENCHMARKS
    result = evaluate(load(model), names, seed=0, limit=limit, folder=folder, size=this.size)
    return {
        (o.item.benchmark, o.item.category, o.item.id): (float(o.verdict.ok), o.item.cluster) for o in result.outcomes
    }


def _page(
    this: Study, name: str, rights: Mapping, model: str | None, seeds: Sequence[int], steps: int, out: Path
) -> Path:
    first = next(iter(rights.values()))[0]
    from_ = f" --model {model}" if model else ""
    goes = f"goes on from `{model}`" if model else "starts from one language model" if this.model else "starts afresh"
    half = " (an arm of one stage takes half)" if callable(this.model) else ""
    lines = [
        f"# {this.title}",
        "",
        f"`diptych study {name}{from_} --steps {steps} --seeds {' '.join(map(str, seeds))}`",
        "",
        f"Every arm {goes}, {steps} steps{half}. Brackets are 95 % intervals: over seeds (Student's t) where there "
        "are several, else over items. Δ is the difference to "
        f"**{this.base}** on the same items, with a bootstrap over prompts.",
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
