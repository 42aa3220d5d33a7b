"""``diptych demo``: the shipped model at work, the same model trained from scratch, and a page that compares them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import PIL.Image
from rich.console import Console

from diptych import recipes
from diptych.core.sample import Image, Sample, Text, user
from diptych.data.contact_sheet import grid
from diptych.data.worlds import emoji, shapes_sources
from diptych.evaluation import page
from diptych.evaluation.figures import curves
from diptych.evaluation.harness import Result, evaluate
from diptych.evaluation.report import score_table
from diptych.evaluation.scores import Score
from diptych.generation.engine import Engine, load
from diptych.recipes.run import train
from diptych.training.log import read_metrics
from diptych.training.loop import Interrupted
from diptych.training.recipe import Limits, Recipe

PROMPTS = (
    "a red circle",
    "three blue stars",
    "a green square left of a black cross",
    "a yellow star and a purple circle",
    "two triangles",
    "a cross above a circle",
    "sun",
    "red apple",
    "red heart",
    "cat face",
    "pizza",
    "house",
)
BENCHMARKS = ("geneval-mini", "vqa-mini", "caption-mini", "edit-mini")
QUESTIONS, EDITS = 6, 4
TRAINED, SHIPPED = "trained here", "shipped"
LEAST_TRAINING = 1 / 3  # share of the budget that training has, however long the rest takes
SLOWER = 1.5  # how much longer the trained model may take to show and score than the shipped one did
SHOWN_FIRST = 1 / 4  # share of the budget after which no further benchmark of the shipped model starts


def brief(recipe: Recipe) -> Recipe:
    """The recipe for minutes instead of hours: many steps of small rows, and no edits."""
    stage = recipe.stages[0]
    data = {name: share for name, share in stage.data.items() if not name.endswith("/edit")}
    small = replace(stage, data=data, limits=Limits(tokens=1024, pictures=48), ema=0.99)
    return replace(recipe, stages=(small, *recipe.stages[1:]))


def demo(
    minutes: float = 5.0,
    steps: int | None = None,
    out: Path = Path("report.html"),
    run: Path | None = None,
    limit: int = 4,
    seed: int = 0,
) -> Path:
    """Runs the demonstration and returns the page's path.

    ``minutes``  wall-clock time of the whole demonstration; training gets what the rest leaves, at least a third, and
                 benchmarks that would not end in time are left out
    ``steps``    trains this many steps instead
    ``out``      the page
    ``run``      folder of the run (default: a new one under ``runs``)
    ``limit``    items per category in the evaluations

    An interrupted demonstration writes the page about what there is, then raises ``Interrupted`` or
    ``KeyboardInterrupt``. Raises ``ValueError`` for a page that another program wrote, and for a folder that holds
    files."""
    if not minutes > 0:
        raise ValueError(f"minutes must be more than 0, not {minutes}")
    page.check_replaceable(out)
    run = run or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    if run.is_dir() and any(run.iterdir()):
        raise ValueError(f"{run} holds files already; name a new folder")
    this = _Demo(Console(markup=False), out, run, limit, seed, time.monotonic())
    with this.page_in_any_case():
        this.console.rule("the shipped model")
        budget = 60 * minutes if steps is None else math.inf
        this.show(SHIPPED, load("bagel/tiny", "cpu"), until=SHOWN_FIRST * budget)
        this.console.rule("the same model from scratch")
        this.train(minutes, steps)
        this.console.rule("scores")
        this.show(TRAINED, load(run / "train", "cpu"), until=budget)
    return out


@dataclass(frozen=True)
class Work:
    """What one model draws, answers and edits; ``result`` are its scores."""

    drawn: list[PIL.Image.Image]
    answers: list[str]
    edited: list[PIL.Image.Image]
    result: Result | None = None


@dataclass
class _Demo:
    """A demonstration: its settings, and what it has so far."""

    console: Console
    out: Path
    run: Path
    limit: int
    seed: int
    began: float
    works: dict[str, Work] = field(default_factory=dict)
    took: dict[str, float] = field(default_factory=dict)  # seconds that each benchmark took
    steps: int = 0
    seconds: float = 0.0  # of training
    million_parameters: float = 0.0

    def train(self, minutes: float, steps: int | None) -> None:
        """Trains the brief recipe for ``steps``, or for the minutes that the budget leaves. After an interruption the
        model is shown as it is, and ``Interrupted`` goes on."""
        recipe = replace(brief(recipes.find("bagel/tiny")), seed=self.seed)
        if steps is None:
            used = (time.monotonic() - self.began) / 60
            recipe = replace(recipe, minutes=max(minutes - (1 + SLOWER) * used, LEAST_TRAINING * minutes))
            self.console.print(f"training for {recipe.minutes:.1f} minutes of {minutes:g}")
        else:
            recipe = replace(recipe.with_steps(steps), checkpoint_every=max(50, steps // 4))
        start = time.monotonic()
        try:
            train(recipe, self.run / "train", device="cpu")
        except Interrupted as stop:
            self.steps, self.seconds = stop.step, time.monotonic() - start
            if (self.run / "train" / "release").is_dir():
                self.console.print("interrupted: showing the model as it is")
                self.show(TRAINED, load(self.run / "train", "cpu"), until=0.0)
            raise
        self.seconds = time.monotonic() - start
        self.steps = read_metrics(self.run / "train")[-1]["step"]

    def show(self, name: str, engine: Engine, until: float) -> None:
        """Draws, answers and edits with a model, and scores it on the benchmarks that end by ``until`` seconds of the
        demonstration; the pictures go to the run's folder."""
        start = time.monotonic()
        drawn = [p.image for p in engine.draw([Sample(p, (user(p),)) for p in PROMPTS], [self.seed] * len(PROMPTS))]
        answers = [engine.ask(picture, question).text for picture, question, _ in _questions()]
        edits = _edits()
        requests = [Sample(f"edit/{i}", (user(Image(p, "condition"), text),)) for i, (p, text) in enumerate(edits)]
        edited = [p.image for p in engine.draw(requests, [self.seed] * len(requests))]
        folder = self.run / name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        grid(drawn, list(PROMPTS), 6).save(folder / "drawn.png")
        pairs = [picture for (before, _), after in zip(edits, edited, strict=True) for picture in (before, after)]
        grid(pairs, [caption for _, text in edits for caption in ("before", text)], 4).save(folder / "edited.png")
        self.million_parameters = sum(p.numel() for p in engine.model.parameters()) / 1e6
        self.works[name] = Work(drawn, answers, edited)
        seconds = time.monotonic() - start
        self.console.print(
            f"drew {len(drawn)} prompts and {len(edited)} edits in {seconds:.1f} s: {folder}", soft_wrap=True
        )
        scored: list[str] = []
        for benchmark in BENCHMARKS:
            start = time.monotonic()
            if start - self.began + self.took.get(benchmark, 0.0) > until:
                continue
            scored.append(benchmark)  # those before are in the folder and take no time again
            where = self.run / "evaluate" / folder.name
            result = evaluate(engine, scored, seed=self.seed, limit=self.limit, folder=where)
            self.works[name] = replace(self.works[name], result=result)
            self.took[benchmark] = time.monotonic() - start

    @contextmanager
    def page_in_any_case(self) -> Iterator[None]:
        """Writes the page at the end, also of a demonstration that the user interrupts."""
        try:
            yield
        except (Interrupted, KeyboardInterrupt):
            if self.works:
                self.write_page("Interrupted. ")
            raise
        self.write_page()

    def write_page(self, note: str = "") -> None:
        """Writes the page and prints where it is, the scores, and what to do next."""
        results = {name: work.result for name, work in reversed(self.works.items()) if work.result}
        sections: list[page.Section] = [self.drawings(), self.answers(), self.edits()]
        metrics = self.run / "train" / "metrics.jsonl"
        if self.steps and metrics.is_file():
            sections.append(page.Figure("Training", curves(metrics), "Faint: every logged step. Bold: smoothed."))
        if results:
            table = score_table(results)
            overall = tuple(row for row in table.rows if str(row[0]).endswith("/overall"))
            sections.append(replace(table, rows=overall))
            for name, *cells in overall:
                values = [f"{model} {c.value:.2f}" for model, c in zip(results, cells) if isinstance(c, Score)]
                self.console.print(f"{name!s:<32} {'   '.join(values)}", highlight=False)
        commands = "\n".join(self.next_commands())
        sections.append(page.Text("Try next", code=commands))
        counted = f"{self.steps} step{'s' if self.steps != 1 else ''}"
        trained = f"trained from scratch for {counted} ({self.seconds / 60:.1f} minutes on this machine)"
        summary = (
            f"{note}A unified model of {self.million_parameters:.1f} million parameters, "
            f"{trained if self.steps else 'not trained here yet'}, beside the one that ships. "
            "Scores are strict: an answer or picture is right only if it is exactly what was asked for."
        )
        page.write_report(self.out, sections, title="diptych demo", summary=summary)
        self.console.rule()
        self.console.print(f"report: {self.out.resolve()}\n\ntry next:\n{commands}", highlight=False, soft_wrap=True)

    @property
    def models(self) -> str:
        """The names of the models that there are, the trained one first."""
        return ", ".join(reversed(self.works))

    def drawings(self) -> page.Gallery:
        """What the models draw of the same prompts."""
        works = list(reversed(self.works.values()))
        items = tuple(page.Shown(tuple(w.drawn[i] for w in works), prompt) for i, prompt in enumerate(PROMPTS))
        return page.Gallery("Drawn", items, f"From left: {self.models}.")

    def answers(self) -> page.Questions:
        """The answer of the model trained here, or of the shipped model where none was trained."""
        name, work = list(self.works.items())[-1]
        asked = [
            page.Asked(picture, question, answer, right, answer == right)
            for (picture, question, right), answer in zip(_questions(), work.answers, strict=True)
        ]
        return page.Questions(f"Answered by the model {name}", tuple(asked))

    def edits(self) -> page.Gallery:
        """What the models make of the same edits."""
        works = list(reversed(self.works.values()))
        items = tuple(
            page.Shown((picture, *(w.edited[i] for w in works)), text) for i, (picture, text) in enumerate(_edits())
        )
        note = f"From left: the picture to edit, {self.models}. The short recipe has no edits."
        return page.Gallery("Edited", items, note)

    def next_commands(self) -> list[str]:
        """Commands to go on with."""
        trained = self.run / "train"
        commands = ["diptych generate bagel/tiny 'two blue stars and a red circle' -n 4 --seed 1"]
        if TRAINED in self.works:
            commands.append(f"diptych chat {trained}")
        if (trained / "recipe.json").is_file():
            commands.append(f"diptych train {trained / 'recipe.json'} --steps 3000 --out runs/longer")
        scored = [name.replace(" ", "-") for name, work in self.works.items() if work.result]
        if scored:
            folders = " ".join(str(self.run / "evaluate" / name) for name in scored)
            commands.append(f"diptych report {folders} --out every-item.html")
        return commands


SIDE = 64  # pixels of the pictures that are asked about and edited


def _questions() -> list[tuple[PIL.Image.Image, str, str]]:
    """Pictures, questions and the right answers: scenes of shapes, and an emoji."""
    source = shapes_sources.source("shapes/ask", "test", SIDE)
    samples = [source[i] for i in range(QUESTIONS)]
    asked = [(next(s.images()).pixels, _text(s), str(s.info["answer"])) for s in samples]
    apple = next(e for e in emoji.records() if e.labels["en"] == "red apple")
    return [*asked, (emoji.render(apple, SIDE), "what is this?", "red apple")]


def _edits() -> list[tuple[PIL.Image.Image, str]]:
    """Pictures and what to change in them."""
    source = shapes_sources.source("shapes/edit", "test", SIDE)
    return [(next(source[i].images()).pixels, _text(source[i])) for i in range(EDITS)]


def _text(sample: Sample) -> str:
    """The text of a sample's first message."""
    return next(part.text for part in sample.messages[0].parts if isinstance(part, Text))
