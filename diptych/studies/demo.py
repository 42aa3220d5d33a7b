"""``diptych demo``: the shipped model at work, the same model trained from scratch, and a page that compares them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from diptych import recipes
from diptych.core.sample import Image, Sample, user
from diptych.data.contact_sheet import grid
from diptych.data.worlds import emoji, shapes_sources
from diptych.evaluation.harness import evaluate
from diptych.evaluation.page import Asked, Gallery, Questions, Shown, Text, write_report
from diptych.evaluation.report import sections
from diptych.generation.engine import Engine, load
from diptych.recipes.run import stage_sources, train
from diptych.training import build, loop
from diptych.training.log import read_metrics
from diptych.training.recipe import Limits, Recipe

PROMPTS = (
    "a red circle", "three blue stars", "a green square left of a black cross", "a yellow star and a purple circle",
    "two triangles", "a cross above a circle", "sun", "red apple", "red heart", "cat face", "pizza", "house",
)  # fmt: skip
BENCHMARKS = ("geneval-mini", "vqa-mini", "caption-mini", "edit-mini")


def brief(recipe: Recipe) -> Recipe:
    """The recipe for minutes instead of hours: many steps of small rows, and no edits."""
    stage = recipe.stages[0]
    data = {name: share for name, share in stage.data.items() if not name.endswith("/edit")}
    small = replace(stage, data=data, limits=Limits(tokens=1024, pictures=48), ema=0.99)
    return replace(recipe, stages=(small, *recipe.stages[1:]))


def demo(minutes: float, steps: int | None, out: Path, run: Path | None, limit: int, seed: int) -> Path:
    """Runs the whole demonstration and returns the page's path."""
    console = Console()
    started = time.strftime("%Y%m%d-%H%M%S")
    run = run or Path("runs") / f"demo-{started}"
    recipe = brief(recipes.find("bagel/tiny"))
    results, shown = {}, []

    shipped = load("bagel/tiny", "cpu")
    console.rule("the shipped model")
    shown = show_off(shipped, run, console, seed)

    console.rule("the same model from scratch")
    if steps is None:
        console.print("measuring this machine ...")
        seconds = seconds_per_step(recipe)
        steps = max(20, int(minutes * 60 / seconds))
        console.print(f"{seconds:.2f} s a step: {steps} steps fit {minutes:g} minutes")
    recipe = replace(recipe.with_steps(steps), seed=seed, checkpoint_every=max(50, steps // 4))
    untrained = Engine(build.build(recipe), "untrained")  # type: ignore[arg-type]
    start = time.perf_counter()
    release = train(recipe, run / "train", device="cpu")
    spent = time.perf_counter() - start
    trained = load(release, "cpu")

    console.rule("scores")
    for name, engine in (("untrained", untrained), ("trained", trained), ("shipped", shipped)):
        results[name] = evaluate(engine, BENCHMARKS, seed=seed, limit=limit, folder=run / "evaluate" / name)
    for name in (n for n in results["shipped"].scores if n.endswith("/overall")):
        cells = "   ".join(f"{m} {r.scores[name].value:.2f}" for m, r in results.items())
        console.print(f"{name:<32} {cells}", highlight=False)
    millions = sum(p.numel() for p in trained.model.parameters()) / 1e6
    commands = "\n".join(next_commands(run / "train"))
    page = write_report(
        out,
        [*shown, *sections(results, run / "train" / "metrics.jsonl"), Text("Try next", code=commands)],
        title="diptych demo",
        summary=f"A unified model of {millions:.1f} million parameters, trained from scratch for {steps} steps "
        f"({spent / 60:.1f} minutes on this machine), beside the untrained one and the one that ships. "
        "Scores are strict: exactly what was asked for, nothing else.",
    )
    console.rule()
    console.print(f"report: {page.resolve()}\n\ntry next:\n{commands}", highlight=False)
    return page


def show_off(engine: Engine, run: Path, console: Console, seed: int) -> list[Gallery | Questions]:
    """Draws, answers and edits with a model; prints as it goes, saves the grid, returns the page's sections."""
    start = time.perf_counter()
    drawn = engine.draw([Sample(p, (user(p),)) for p in PROMPTS], [seed] * len(PROMPTS))
    run.mkdir(parents=True, exist_ok=True)
    grid([d.image for d in drawn], list(PROMPTS), 6).save(run / "drawn.png")
    console.print(f"drew {len(drawn)} prompts in {time.perf_counter() - start:.1f} s: {run / 'drawn.png'}")
    asked = []
    source = shapes_sources.source("shapes/ask", "test", engine.model.config.size[0])
    for sample in (source[i] for i in range(6)):
        [answer] = engine.answers([replace(sample, messages=sample.messages[:-1])])
        question = sample.messages[0].parts[-1].text  # type: ignore[union-attr]
        picture = next(sample.images()).pixels
        asked.append(Asked(picture, question, answer.text, sample.info["answer"], answer.text == sample.info["answer"]))
        console.print(f"  {question}  ->  {answer.text}   (right answer: {sample.info['answer']})", highlight=False)
    fruit = emoji.render(next(e for e in emoji.records() if e.labels["en"] == "red apple"), engine.model.config.size[0])
    said = engine.ask(fruit, "what is this?").text
    asked.append(Asked(fruit, "what is this?", said, "red apple", said == "red apple"))
    edits = []
    changes = shapes_sources.source("shapes/edit", "test", engine.model.config.size[0])
    for sample in (changes[i] for i in range(4)):
        before = next(sample.images()).pixels
        instruction = sample.messages[0].parts[-1].text  # type: ignore[union-attr]
        request = Sample(sample.id, (user(Image(before, "condition"), instruction),))
        after = engine.draw([request], [seed])[0].image
        edits.append(Shown((before, after), instruction))
    grid([i for e in edits for i in e.images], [t for e in edits for t in ("before", e.caption)], 4).save(
        run / "edited.png"
    )
    console.print(f"edited {len(edits)} pictures: {run / 'edited.png'}   ({time.perf_counter() - start:.1f} s in all)")
    return [
        Gallery("Drawn by the shipped model", tuple(Shown((d.image,), d.prompt) for d in drawn)),
        Questions("Asked of the shipped model", tuple(asked)),
        Gallery("Edited by the shipped model", tuple(edits)),
    ]


def seconds_per_step(recipe: Recipe, steps: int = 4) -> float:
    """What one training step takes here, from a few steps that are thrown away."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        short = replace(recipe.with_steps(steps + 2), checkpoint_every=10**9)
        loop.train(short, Path(folder) / "run", stage_sources, show=False)
        rows = read_metrics(Path(folder) / "run")
        return sum(row["seconds"] for row in rows[2:]) / steps


def next_commands(run: Path) -> list[str]:
    """Three things to do next."""
    return [
        "diptych generate bagel/tiny 'two blue stars and a red circle' -n 4 --seed 1",
        f"diptych chat {run}",
        f"diptych train {run / 'recipe.json'} --steps 3000 --out runs/longer",
    ]
