"""Verbs that score: evaluate with its sub-verbs, and report."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from diptych.cli.options import (
    BaseOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    Group,
    JsonOption,
    PresetOption,
    QuantizeOption,
    Sampling,
    SeedOption,
    ShardOption,
    Verbs,
    complete_benchmarks,
    complete_models,
    config_changes,
    pairs,
    show_table,
)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="a folder that `evaluate --out` wrote")]
LayoutDirOption = Annotated[
    Path | None, typer.Option("--layout", metavar="DIR", help="also write the pictures as official scripts read them")
]


class Evaluate(Group):
    """``diptych evaluate MODEL BENCHMARK`` is short for ``diptych evaluate run MODEL BENCHMARK``."""

    default = "run"


def add(app: Verbs) -> None:
    """Adds the verbs of this file to the command line."""
    verbs = Verbs(
        cls=Evaluate,
        help="Score a model, or compare and read scores. `evaluate MODEL BENCHMARK...` is short for `evaluate run`.",
        subcommand_metavar="[VERB] ...",
        epilog="\b\nexamples:\n"
        "  diptych evaluate bagel/tiny mini --limit 4 --out runs/check\n"
        "  diptych evaluate list\n"
        "  diptych evaluate compare runs/check runs/other\n"
        "\n\b\noptions of each verb: diptych evaluate VERB --help",
    )
    app.add_typer(verbs, name="evaluate")
    verbs.verb(
        "run",
        "diptych evaluate run bagel/tiny mini --limit 4 --out runs/check",
        "diptych evaluate bagel/tiny geneval=evaluation_metadata.jsonl --no-score --layout images",
        "diptych evaluate folder:images geneval=evaluation_metadata.jsonl",
        "diptych evaluate http://localhost:8000/v1 vqa-mini --remote-model NAME",
        "diptych evaluate runs/mine wise=data --judge NAME --judge-url http://localhost:8001/v1 --cache judged",
        "diptych evaluate runs/mine lmms-eval:pope,mmbench_en_dev --limit 8",
        "torchrun --nproc-per-node 2 -m diptych evaluate runs/mine mini --out runs/check",
        "diptych evaluate runs/mine mini --out runs/check --shard 0/3",
    )(run)
    verbs.verb("list", "diptych evaluate list")(list_benchmarks)
    verbs.verb("score", "diptych evaluate score runs/check", "diptych evaluate score runs/check vqa-mini")(score)
    verbs.verb("merge", "diptych evaluate merge runs/check")(merge)
    verbs.verb("compare", "diptych evaluate compare runs/check runs/other --json")(compare)
    verbs.verb("read", "diptych evaluate read geneval=results.jsonl")(read)
    verbs.verb("distance", "diptych evaluate distance drawn/ photos/ --features efflite0")(distance)
    app.verb(
        "report",
        "diptych report runs/mine/evaluate",
        "diptych report runs/a runs/b --out compared.html",
    )(report)


@dataclass(frozen=True)
class Scoring:
    """The judges and networks that score, and where what they computed is kept."""

    judge: Annotated[
        str | None, typer.Option("--judge", metavar="NAME", help="the judge: the name of a model behind --judge-url")
    ] = None
    judge_url: Annotated[
        str | None,
        typer.Option(
            "--judge-url", metavar="URL", help="an OpenAI-compatible address; without it the cache is replayed"
        ),
    ] = None
    rubrics: Annotated[
        Path | None,
        typer.Option("--rubrics", metavar="DIR", help="instructions of judges, NAME.txt, in place of ours"),
    ] = None
    cache: Annotated[
        Path | None,
        typer.Option("--cache", metavar="DIR", help="keeps judges' replies and features of reference pictures"),
    ] = None
    detector: Annotated[
        str | None, typer.Option("--detector", metavar="MODEL", help="GenEval: Mask2Former, a folder or org/name")
    ] = None
    clip: Annotated[str | None, typer.Option("--clip", metavar="MODEL", help="GenEval: CLIP, a folder or org/name")] = (
        None
    )
    features: Annotated[
        str | None,
        typer.Option("--features", help="fid, distance: efflite0 (default), inception, or its TorchScript file"),
    ] = None
    pictures: Annotated[
        int | None, typer.Option("-n", metavar="N", help="pictures of each prompt, of geneval and dpg (default: 4)")
    ] = None

    def tools(self, device: str = "auto", lmms_tasks: str | None = None) -> Any:
        """What the benchmarks score with. Raises ``ValueError`` for a judge's address without its name."""
        from diptych.evaluation.benchmarks.table import Tools
        from diptych.evaluation.judges.judge import Judge
        from diptych.machine.devices import pick_device

        if self.judge_url and not self.judge:
            raise ValueError("--judge-url needs --judge NAME: the judge is part of every score's name")
        judge = Judge(self.judge, self.judge_url, self.cache, api_key()) if self.judge else None
        networks = {"detector": self.detector, "clip": self.clip, "features": self.features}
        return Tools(
            judge=judge,
            rubrics=self.rubrics,
            cache=self.cache,
            device=str(pick_device(device)),
            pictures=self.pictures,
            lmms_tasks=lmms_tasks,
            **{name: value for name, value in networks.items() if value},
        )


def api_key() -> str:
    """The key of judges and endpoints, from the environment."""
    return os.environ.get("OPENAI_API_KEY", "none")


def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="a name that `diptych models` lists, a model, run or published folder, org/name, http://host:port/v1, "
            "or folder:DIR of pictures made elsewhere",
            autocompletion=complete_models,
        ),
    ],
    sampling: Sampling,
    scoring: Scoring,
    benchmarks: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="BENCHMARK",
            help="names that `diptych evaluate list` shows; NAME=FILE where it needs your file; lmms-eval:TASK,TASK",
            autocompletion=complete_benchmarks,
        ),
    ] = None,
    base: BaseOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    preset: PresetOption = "",
    config: ConfigOption = None,
    seed: SeedOption = 0,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", help="items per category")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="folder of items, scores and pictures; continued if it exists"),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option("--size", metavar="PIXELS", help="side (default: 64 for shipped models, else the model's own)"),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="items or requests at once")] = 32,
    no_score: Annotated[
        bool, typer.Option("--no-score", help="only make the answers and pictures; `evaluate score` later")
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            metavar="N",
            help="longest answer (default: the benchmark's own; 2048 with --thinking)",
        ),
    ] = None,
    system: Annotated[str, typer.Option("--system", metavar="TEXT", help="a system message before each question")] = "",
    thinking: Annotated[
        bool | None,
        typer.Option("--thinking/--no-thinking", help="reason in <think> tags before each answer and picture"),
    ] = None,
    answer_temperature: Annotated[
        float, typer.Option("--answer-temperature", metavar="T", help="0 takes the likeliest token")
    ] = 0.0,
    layout: LayoutDirOption = None,
    remote_model: Annotated[
        str, typer.Option("--remote-model", metavar="NAME", help="the model's name where MODEL is http://host/v1")
    ] = "",
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="DIR", help="lmms-eval: a folder of your own task files")
    ] = None,
    shard: ShardOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a model on benchmarks."""
    from diptych.evaluation import harness, remote
    from diptych.evaluation.benchmarks.table import resolve
    from diptych.evaluation.card import Answering
    from diptych.generation.engine import load
    from diptych.machine.processes import parse_shard, processes

    if shard and layout:
        raise ValueError("--layout goes with `diptych evaluate score`, after the shards are merged")
    if shard and not out:
        raise ValueError("--shard needs --out DIR, the folder that all shares have in common")
    with processes() as (rank, _):
        if model.startswith(("http://", "https://")):
            engine: Any = remote.Endpoint(model, remote_model, api_key())
        elif model.startswith("folder:"):
            engine = remote.PictureFolder(model.removeprefix("folder:"))
        else:
            engine = load(model, device, dtype, base, quantize, preset, config_changes(config))
        changed = sampling.given(engine)
        tools = scoring.tools(device, tasks)
        ours = [name for name in benchmarks or [] if not name.startswith("lmms-eval:")]
        if layout:
            harness.check_layout(layout, resolve(ours, tools)[0])
        result = harness.evaluate(
            engine,
            benchmarks or [],
            seed=seed,
            limit=limit,
            folder=harness.Share(out, *parse_shard(shard)) if shard and out else out,
            progress=not as_json,
            answering=Answering(max_new_tokens, system, thinking, answer_temperature),
            size=size,
            settings=engine.settings(changed) if changed else None,
            batch_size=batch_size,
            tools=tools,
            score=not no_score,
        )
        if rank > 0:
            return
        if shard:
            items, verb = len(result.outcomes), f"diptych evaluate merge {out}"
            row = {"items": items, "failures": result.failures, "merge": verb}
            print(json.dumps(row) if as_json else f"share {shard}: {items} items; when all are done: {verb}")
            return
        if layout:
            for folder in harness.write_layout(layout, result, resolve(ours, tools)[0]):
                print(folder, file=sys.stderr)
        if no_score and not as_json:
            print(f"made, not scored: diptych evaluate score {out}" if out else "made, and gone: --out keeps it")
        else:
            show_result(str(result.card["model"]), result, as_json)


def list_benchmarks(as_json: JsonOption = False) -> None:
    """List the benchmarks, and which need a file of yours."""
    from diptych.evaluation.benchmarks.table import GROUPS, TABLE

    if as_json:
        print(json.dumps({name: {"file": entry.file, "what": entry.what} for name, entry in TABLE.items()}))
        return
    rows = [[name, "several", ", ".join(members)] for name, members in GROUPS.items()]
    rows += [[name, entry.file, entry.what] for name, entry in TABLE.items()]
    show_table("benchmarks", ["name", "your file", "what"], rows)


def score(
    run: RunArgument,
    scoring: Scoring,
    benchmarks: Annotated[
        list[str] | None,
        typer.Argument(metavar="BENCHMARK", help="default: all of the run's", autocompletion=complete_benchmarks),
    ] = None,
    device: DeviceOption = "auto",
    layout: LayoutDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compute the verdicts of an evaluation again, without its model."""
    from diptych.evaluation.benchmarks.table import resolve
    from diptych.evaluation.harness import rescore, write_layout
    from diptych.machine.processes import processes

    tools = scoring.tools(device)
    with processes() as (rank, _):
        result = rescore(run, benchmarks or [], tools, progress=not as_json)
        if rank > 0:
            return
        if layout:
            asked = list(dict.fromkeys(result.card["asked"].values()))
            write_layout(layout, result, resolve(benchmarks or asked, tools)[0])
        show_result(str(run), result, as_json)


def merge(run: RunArgument, scoring: Scoring, device: DeviceOption = "auto", as_json: JsonOption = False) -> None:
    """Put the shards of an evaluation together and compute its scores.

    Options of judges are those that the shards had."""
    score(run, scoring, device=device, as_json=as_json)


def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="a folder that `evaluate --out` wrote")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="another one, of the same items")],
    as_json: JsonOption = False,
) -> None:
    """Compare two evaluations by paired tests on the same items."""
    from diptych.evaluation.compare import compare

    differences = compare(first, second)
    if as_json:
        print(json.dumps({name: d.to_json() for name, d in differences.items()}))
        return
    show_table(
        f"A {first}   B {second}",
        ["benchmark", "A", "B", "B - A", "95 % interval", "p", "B better / worse", "n"],
        [
            [
                name,
                f"{d.a:.3f}",
                f"{d.b:.3f}",
                f"{d.score.value:+.3f}",
                f"{d.score.low:+.3f} .. {d.score.high:+.3f}",
                f"{d.p:.4f}",
                f"{d.better} / {d.worse}",
                d.score.n,
            ]
            for name, d in differences.items()
        ],
    )


def read(
    files: Annotated[
        list[str],
        typer.Argument(metavar="KIND=FILE", help="KIND: geneval, wise, dpg, gedit, imgedit, lmms-eval or vlmevalkit"),
    ],
    as_json: JsonOption = False,
) -> None:
    """Read the results that other harnesses wrote."""
    from diptych.evaluation.other_results import read

    scores: dict[str, Any] = {}
    for kind, file in pairs(files, "read", "KIND=FILE, such as geneval=results.jsonl").items():
        scores |= read(kind, file)
    show_only_scores("read", scores, as_json)


def distance(
    drawn: Annotated[Path, typer.Argument(metavar="DRAWN", help="a folder of pictures")],
    real: Annotated[Path, typer.Argument(metavar="REAL", help="a folder of reference pictures")],
    scoring: Scoring,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Compute FID, KID, precision and recall between two folders."""
    from diptych.evaluation.benchmarks.distances import compare_folders

    scores = compare_folders(drawn, real, scoring.tools(device))
    show_only_scores(f"{drawn} against {real}", scores, as_json)


def show_result(title: str, result: Any, as_json: bool) -> None:
    """Prints the scores of an evaluation, and how many items failed."""
    if as_json:
        print(json.dumps(result.to_json()))
        return
    show_scores(title, result.scores, result.baselines)
    if result.failures:
        print(f"{result.failures} items failed; they count as wrong", file=sys.stderr)


def show_only_scores(title: str, scores: Any, as_json: bool) -> None:
    """Prints scores that have no evaluation."""
    if as_json:
        print(json.dumps({"scores": {name: s.to_json() for name, s in scores.items()}}))
    else:
        show_scores(title, scores, {})


def show_scores(title: str, scores: Any, baselines: Any) -> None:
    """Prints scores with their intervals and what to compare them with."""
    rows = []
    for name, s in scores.items():
        others = "  ".join(f"{k} {v:.2f}" for k, v in baselines.get(name, {}).items())
        rows.append([name, f"{s.value:.3f}", f"{s.low:.3f} .. {s.high:.3f}", s.n, others])
    show_table(title, ["score", "value", "95 % interval", "n", "to compare with"], rows)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="folders that `evaluate --out` wrote")],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="the HTML page; its tables go to the same name with .md")
    ] = Path("report.html"),
    per_category: Annotated[
        int, typer.Option("--per-category", metavar="N", help="pictures or questions of each category")
    ] = 6,
    force: Annotated[
        bool, typer.Option("--force", help="overwrite files of these names that diptych did not write")
    ] = False,
) -> None:
    """Write evaluations as one page and as Markdown tables."""
    from diptych.evaluation.harness import load_result
    from diptych.evaluation.page import write_markdown, write_report
    from diptych.evaluation.report import sections

    if per_category < 1:
        raise ValueError(f"per-category must be at least 1, not {per_category}")
    names = [run.name if run.is_absolute() else str(run) for run in runs]
    names = names if len(set(names)) == len(names) else [str(run) for run in runs]
    results = {name: load_result(run) for name, run in zip(names, runs)}
    parts = sections(results, per_category=per_category)
    title = f"Evaluation of {', '.join(dict.fromkeys(str(r.card['model']) for r in results.values()))}"
    print(write_report(out, parts, title, " · ".join(results), force=force))
    print(write_markdown(out.with_suffix(".md"), parts, title, force=force))
