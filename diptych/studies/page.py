"""The results page of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from diptych.core.intervals import mean
from diptych.evaluation.figures import intervals
from diptych.evaluation.scores import Score, macro, paired
from diptych.studies.study import BENCHMARKS, Study


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
