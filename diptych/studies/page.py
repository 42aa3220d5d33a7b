"""The results page of a study: a table for each benchmark, further measurements, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diptych.core.intervals import mean
from diptych.data.written import check_picture_path
from diptych.evaluation.figures import intervals
from diptych.evaluation.scores import Score, macro, paired
from diptych.machine import disk
from diptych.studies.study import Items, Results

Plots = dict[str, dict[str, Score]]  # panel -> arm -> score


def write_page(results: Results, out: Path) -> Path:
    """Writes ``out/NAME.md`` and ``out/NAME.png`` and returns the page's path. Raises as ``check_page``."""
    name, plots = results.name, Plots()
    lines = [f"# {results.study.title}", "", f"`{_command(results)}`", "", _introduction(results)]
    for benchmark in results.study.benchmarks:
        lines += _benchmark_table(results, benchmark, plots)
    if results.measures:
        lines += _measures_table(results, plots)
    lines += ["", f"![scores by arm]({name}.png)", ""]
    check_page(out, name)
    with disk.atomic(out / f"{name}.png") as file:
        file.write_bytes(intervals(plots))
    disk.write_text(out / f"{name}.md", "\n".join(lines))
    return out / f"{name}.md"


def check_page(out: Path, name: str) -> None:
    """Raises ``ValueError`` where ``write_page`` would overwrite a file that it did not write."""
    page = out / f"{name}.md"
    if page.exists() and f"`diptych study {name}" not in page.read_text("utf-8", errors="replace"):
        raise ValueError(f"{page} is there and is no page of this study; name another folder")
    check_picture_path(out / f"{name}.png")


def _command(results: Results) -> str:
    """The command that runs the study."""
    model = f" --model {results.model}" if results.model else ""
    limit = f" --limit {results.limit}" if results.limit else ""
    seeds = ",".join(map(str, results.seeds))
    return f"diptych study {results.name}{model} --steps {results.steps} --seeds {seeds}{limit}"


def _introduction(results: Results) -> str:
    """How arms start, and how to read the tables."""
    study, model, steps = results.study, results.model, results.steps
    if model is None:
        half = ", one stage alone for half of them" if study.fill else ""
        begins = f"Every arm is trained for {steps} steps{half}."
    elif study.takes:
        taken = " and ".join(f"`{module}`" for module in study.takes)
        begins = (
            f"Every arm takes {taken} from `{model}` (**start**) and keeps them frozen; everything else is "
            f"initialised anew and trained for {steps} steps in all."
        )
    elif study.fill:
        begins = (
            f"Arms take the modules that they share with `{model}` (**start**), initialise the others anew, and train "
            f"for {steps} steps."
        )
    else:
        begins = f"Every arm continues from `{model}` for {steps} steps."
    return (
        f"{begins} Brackets are 95 % intervals: over seeds (Student's t) where there are several, else over items. "
        f"Δ is the difference to **{study.base}** on the same items, with a bootstrap over prompts. "
        "Overall is the mean of the columns right of it."
    )


def _benchmark_table(results: Results, benchmark: str, plots: Plots) -> list[str]:
    """Lines of the table of one benchmark, a row an arm; adds its panel to the plots."""
    study, first = results.study, next(iter(results.scores.values()))[0]
    categories = list(dict.fromkeys(category for name, category, _ in first if name == benchmark))
    overall = {arm: _score(seeds, benchmark, categories) for arm, seeds in results.scores.items()}
    plots[benchmark] = overall
    lines = ["", f"## {benchmark}", "", f"| arm | overall | Δ | {' | '.join(categories)} |"]
    lines += ["|---" * (3 + len(categories)) + "|"]
    for arm, seeds in results.scores.items():
        compared = arm not in ("start", study.base)
        gain = _cell(_gain(results.scores[study.base], seeds, benchmark), "+") if compared else ""
        parts = [f"{_score(seeds, benchmark, [category]).value:.3f}" for category in categories]
        lines.append(f"| {' | '.join([arm, _cell(overall[arm]), gain, *parts])} |")
    return lines


def _measures_table(results: Results, plots: Plots) -> list[str]:
    """Lines of the table of further measurements, means over seeds; the first of them is plotted."""
    measures = results.measures
    names = list(next(iter(measures.values()))[0])
    lines = ["", f"| arm | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for arm, seeds in measures.items():
        lines.append(f"| {arm} | {' | '.join(f'{mean([m[name] for m in seeds])[0]:.3g}' for name in names)} |")
    unknown = [{names[0]: float("nan")}]  # of the start, which is scored and not measured
    plots[names[0]] = {
        arm: Score(*mean([m[names[0]] for m in measures.get(arm, unknown)]), len(results.seeds))
        for arm in results.scores
    }
    return lines


def _score(seeds: Sequence[Items], benchmark: str, categories: Sequence[str]) -> Score:
    """The unweighted mean over categories; its interval over seeds, or over items where there is one seed."""
    scores = []
    for items in seeds:
        groups = {c: [v for (b, at, _), v in items.items() if (b, at) == (benchmark, c)] for c in categories}
        scores.append(macro({c: ([r for r, _ in v], [k for _, k in v]) for c, v in groups.items()}))
    if len(scores) == 1:
        return scores[0]
    return Score(*mean([s.value for s in scores]), sum(s.n for s in scores))


def _gain(base: Sequence[Items], arm: Sequence[Items], benchmark: str) -> Score:
    """How much an arm is above the base arm on the same items, seed by seed."""
    before, after, clusters, groups = [], [], [], []
    for base_items, items in zip(base, arm, strict=True):
        for key, (right, cluster) in base_items.items():
            name, category, _ = key
            if name == benchmark:
                before.append(right)
                after.append(items[key][0])
                clusters.append(f"{category}/{cluster}")
                groups.append(category)
    return paired(before, after, clusters, groups)


def _cell(score: Score, sign: str = "") -> str:
    return f"{score.value:{sign}.3f} [{score.low:{sign}.3f}, {score.high:{sign}.3f}]"
