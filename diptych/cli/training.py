"""Verbs that train: demo, train, resume, plan, study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from diptych.cli.options import (
    BAD,
    OK,
    CatalogOption,
    DeviceOption,
    EncodedOption,
    JsonOption,
    RecipeArgument,
    SeedOption,
    SetOption,
    StepsOption,
    Verbs,
    Watching,
    changes,
    complete_models,
    complete_studies,
    numbers,
    pairs,
    show_table,
)

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="start from this model (a folder or a shipped name) in place of the recipe's own",
        autocompletion=complete_models,
    ),
]


def add(app: Verbs) -> None:
    """Adds the verbs of this file to the command line."""
    app.verb("demo", "diptych demo", "diptych demo --minutes 10 --page report.html")(demo)
    app.verb(
        "train",
        "diptych train bagel/tiny --steps 500 --out runs/mine",
        "diptych train runs/mine/recipe.json --out runs/again --seed 1",
        "diptych train bagel/tiny --set stages.0.train.vision=1e-3",
        "diptych train iomm/tiny --data images=FOLDER",
        "torchrun --nproc-per-node 2 -m diptych train bagel/tiny --out runs/two",
    )(train)
    app.verb(
        "resume",
        "diptych resume runs/mine",
        "diptych resume runs/mine --steps 2000 --set workers=2",
        "torchrun --nproc-per-node 2 -m diptych resume runs/two",
    )(resume)
    app.verb(
        "plan",
        "diptych plan bagel/tiny --device cpu",
        "diptych plan mine.yaml --gpus 8 --gpu h100 --price 2.5",
        "diptych plan mine.yaml --gpus 8 --memory 24 --set engine.shard=full --set engine.recompute=full",
    )(plan)
    app.verb(
        "study",
        "diptych study sgt-proxies --seeds 0",
        "diptych study sgt-ratio --steps 300 --limit 24",
        "diptych study iomm-recipes --seeds 0,1 --steps 400 --limit 24",
        "diptych study synergen-stages --seeds 0",
        "diptych study cheers-detail --seeds 0 --limit 24",
    )(study)


def demo(
    minutes: Annotated[float, typer.Option("--minutes", help="wall-clock time of the whole demonstration")] = 5.0,
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", help="train N steps instead")] = None,
    page: Annotated[Path, typer.Option("--page", metavar="FILE", help="the HTML page to write")] = Path("report.html"),
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="run folder (default: a new one under runs/)")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", help="items per category in the evaluations")] = 4,
    seed: SeedOption = 0,
) -> None:
    """Run the shipped model, train one from scratch, write a report."""
    from diptych.studies.demo import demo

    if out and out.suffix == ".html":
        raise ValueError(f"--out is the folder of the run, not {str(out)!r}; --page names the page")
    demo(minutes, steps, page, out, limit, seed)


def train(
    recipe: RecipeArgument,
    watching: Watching,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="run folder (default: a new one under runs/)")
    ] = None,
    model: ModelOption = None,
    steps: StepsOption = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="train this long by the wall clock; the schedule follows it")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="seed of weights, data order and noise")] = None,
    catalog: CatalogOption = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", metavar="NAME=DIR", help="read a data set of the recipe from a plain folder of pictures"
        ),
    ] = None,
    encoded: EncodedOption = None,
    override: SetOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train a recipe, a name or a .json or .yaml file."""
    from diptych.recipes.run import Watch, train

    release = train(
        recipe,
        out,
        steps=steps,
        minutes=minutes,
        seed=seed,
        catalog=catalog,
        override=changes(override),
        device=device,
        model=model,
        encoded=encoded,
        folders=pairs(data, "--data", "NAME=DIR"),
        watch=Watch(profile=watching.profile, track=watching.track),
    )
    show_run(release, as_json)


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a folder that `train` wrote")],
    watching: Watching,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="change a leaf of the recipe that may change: workers, checkpoint_every, catalog, "
            "stages.0.train.PART (learning rate), ...; any other is refused by name",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", help="steps of the whole run: the last stage becomes longer")
    ] = None,
    grown_data: Annotated[
        bool, typer.Option("--grown-data", help="data sets may have more rows than they had; new epochs begin")
    ] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Continue a run from its last checkpoint."""
    from diptych.recipes.run import Watch, resume

    release = resume(
        run,
        override=changes(override),
        steps=steps,
        grown_data=grown_data,
        device=device,
        watch=Watch(profile=watching.profile, track=watching.track),
    )
    show_run(release, as_json)


def _next_command(release: Path) -> str:
    """A command that works with what was trained: a model that draws, one that was taught to read, or a part alone."""
    from diptych.models.protocol import UnifiedModel
    from diptych.models.store import family_of

    run, row = release.parent, json.loads((release.parent / "recipe.json").read_text())
    trained = {part.split(".")[0] for stage in row["stages"] for part in stage["train"]}
    family = family_of(release)
    if not issubclass(family, UnifiedModel):
        return f"diptych export {release} model"
    draws = trained & {part.split(".")[0] for part in (*family.generation, "generation", "model")}
    return f"diptych generate {run} 'a red circle'" if draws else f"diptych ask {run} picture.png 'what is in it?'"


def show_run(release: Path, as_json: bool) -> None:
    """Where a finished run is, printed by the first of its processes."""
    from diptych.machine.processes import launched

    if launched()[0] > 0:
        return
    if as_json:
        print(json.dumps({"run": str(release.parent), "release": str(release)}))
    else:
        print(f"done: {release}\ntry:  {_next_command(release)}")


def plan(
    recipe: RecipeArgument,
    model: ModelOption = None,
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", help="processes in all")] = 1,
    nodes: Annotated[int, typer.Option("--nodes", metavar="N", help="machines that share them")] = 1,
    gpu: Annotated[
        str,
        typer.Option("--gpu", help="3090, 4090, 5090, a10, l4, l40s, a100-40, a100, h100, h200 or b200"),
    ] = "h100",
    memory: Annotated[
        float | None, typer.Option("--memory", metavar="GIB", help="of one device (default: the GPU's)")
    ] = None,
    mfu: Annotated[float, typer.Option("--mfu", help="share of the peak rate that training reaches")] = 0.4,
    price: Annotated[float, typer.Option("--price", help="of one device for an hour")] = 0.0,
    steps: StepsOption = None,
    catalog: CatalogOption = None,
    encoded: EncodedOption = None,
    override: SetOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> int:
    """Compute the memory, work, time and cost of a recipe."""
    from diptych.recipes.run import configured, stage_sources
    from diptych.training.plan import limits_of, plan

    kind = "cpu" if device == "cpu" else "cuda"
    peak, room = limits_of(gpu, kind, memory)
    planned = configured(recipe, model=model, steps=steps, catalog=catalog, encoded=encoded, override=changes(override))
    needs = plan(planned, stage_sources, gpus=gpus, nodes=nodes, device=kind, peak=peak, mfu=mfu, price=price)
    used = max(n.host * gpus / nodes if kind == "cpu" else n.total for n in needs)
    show_plan(planned, needs, used, room, gpus, mfu, as_json)
    return OK if used <= room * 2**30 else BAD


def show_plan(recipe, needs, used: float, room: float, gpus: int, mfu: float, as_json: bool) -> None:
    """Prints the needs of every stage, and whether ``used`` bytes fit ``room`` GiB."""
    fits = used <= room * 2**30
    if as_json:
        print(json.dumps({"fits": fits, "memory": room, "stages": [n.to_json() for n in needs]}))
        return
    rows = (
        "weights",
        "gradients",
        "optimizer",
        "average",
        "gathered",
        "activations",
        "saving",
        "process",
        "total",
        "host",
    )
    show_table(
        f"{recipe.name}: GiB of each of {gpus} processes",
        ["", *[n.stage for n in needs]],
        [[name, *(f"{getattr(n, name) / 2**30:.2f}" for n in needs)] for name in rows],
    )
    for n, stage in zip(needs, recipe.stages, strict=True):
        cost = f", {n.cost:.0f} in all" if n.cost else ""
        print(
            f"{n.stage}: {n.tokens} tokens a row, {n.flops / 1e12:.3g} TFLOP a step, {n.step_seconds:.3g} s a step at "
            f"{mfu:.0%} of the peak, {n.seconds / 3600:.3g} h for {stage.steps} steps{cost}"
        )
    print(f"{'fits' if fits else 'does not fit'}: {used / 2**30:.2f} of {room:.0f} GiB")
    if not fits:
        print(
            "try: --set engine.shard=full (more processes), --set engine.recompute=full, --set engine.offload=true,\n"
            "     --set precision=bf16, or fewer stages.N.limits.tokens"
        )


def study(
    name: Annotated[
        str,
        typer.Argument(metavar="STUDY", help="a name; a wrong one lists all of them", autocompletion=complete_studies),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="where every arm starts (default: the study's own model)",
            autocompletion=complete_models,
        ),
    ] = None,
    seeds: Annotated[
        list[str] | None,
        typer.Option("--seeds", metavar="N,N", help="one run of every arm for each (default: 0,1,2)"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", help="of every arm (default: the study's own)")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", help="items per category")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="folder of the runs, continued if it exists (default: runs/STUDY)"),
    ] = None,
    page: Annotated[Path, typer.Option("--page", metavar="DIR", help="folder of the page and its plot")] = Path(
        "docs/results"
    ),
) -> None:
    """Run a paper's table in miniature."""
    from diptych.studies.run import study

    chosen = numbers(seeds, "--seeds") if seeds else [0, 1, 2]
    print(study(name, out or Path("runs") / name, page, model, chosen, steps, limit))
