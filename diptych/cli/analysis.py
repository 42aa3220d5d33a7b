"""``diptych analyze``: one verb for each probe."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from diptych.cli.options import (
    CatalogOption,
    JsonOption,
    Loading,
    SeedOption,
    Verbs,
    at_least_one,
    complete_models,
    listed,
)

SizeOption = Annotated[
    int | None,
    typer.Option("--size", metavar="PIXELS", help="side of embedded pictures (default: the model's drawing size)"),
]
PromptOption = Annotated[
    list[str] | None,
    typer.Option("--prompt", metavar="TEXT", help="a prompt to draw; may be repeated (default: prompts of shapes)"),
]
PublishedOption = Annotated[
    bool, typer.Option("--published", help="also compute the numbers as SGT's published code does")
]


def number_option(what: str) -> Any:
    """The option ``-n``: how many of what."""
    return typer.Option("-n", metavar="N", help=what)


def add(app: Verbs) -> None:
    """Adds the verbs of this file to the command line."""
    verbs = Verbs(
        help="Look inside a model: features, attention, gates.",
        subcommand_metavar="PROBE MODEL ...",
        epilog="\b\nexamples:\n"
        "  diptych analyze attention bagel/tiny\n"
        "  diptych analyze gates cheers/tiny --prompt 'a red circle'\n"
        "\n\b\noptions of each probe: diptych analyze PROBE --help",
    )
    app.add_typer(verbs, name="analyze")
    verbs.verb(
        "separability", "diptych analyze separability bagel/tiny --data emoji/fruit --at vision,projector,layer.5"
    )(separability)
    verbs.verb(
        "attention",
        "diptych analyze attention bagel/tiny",
        "diptych analyze attention runs/mine --against bagel/tiny --rows question --out analysis",
    )(attention)
    verbs.verb(
        "keywords",
        "diptych analyze keywords bagel/tiny --prompt 'a red cat, a dog' --words object=cat,dog --words colour=red",
    )(keywords)
    verbs.verb("similarity", "diptych analyze similarity synergen/tiny")(similarity)
    verbs.verb("locality", "diptych analyze locality synergen/tiny --data shapes/draw")(locality)
    verbs.verb("gates", "diptych analyze gates cheers/tiny --prompt 'a red circle' --steps 20")(gates)


@dataclass(frozen=True)
class Probing:
    """What every probe takes: the model, another one to compare with, and where the results go."""

    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="MODEL",
            help="compare with this model: the change, in percent by layer",
            autocompletion=complete_models,
        ),
    ] = None
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="folder to write")] = Path("analysis")
    as_json: JsonOption = False

    def models(self, loading: Loading) -> dict[str, Any]:
        """The model, and the one to compare with, by name."""
        from diptych.generation.engine import load

        if self.against == loading.model:
            raise ValueError(f"{loading.model} cannot be compared with itself")
        models = {loading.model: loading.load().model}
        if self.against:
            models[self.against] = load(self.against, loading.device, loading.dtype).model
        return models

    def show(self, result: Any) -> None:
        """Writes the tables and figures and prints their files."""
        files = [str(file) for file in result.write(self.out)]
        print(json.dumps({"files": files, **result.numbers}) if self.as_json else "\n".join(files))


def separability(
    loading: Loading,
    probing: Probing,
    data: Annotated[
        str,
        typer.Option("--data", metavar="NAME", help="a set of look-alikes, or a folder with one sub-folder a class"),
    ] = "emoji/fruit",
    at: Annotated[
        list[str] | None,
        typer.Option("--at", metavar="POINT,POINT", help="parts (vision) and layers (layer.0); default: all"),
    ] = None,
    n: Annotated[int | None, number_option("pictures of each class (default: 40; of a folder, all)")] = None,
    size: SizeOption = None,
    seed: SeedOption = 0,
) -> None:
    """Measure how well features separate look-alikes, by layer."""
    from diptych.analysis import run
    from diptych.analysis.separability import SETS, folder, labelled

    at_least_one(n=n, size=size)
    models = probing.models(loading)
    side = size or run.size(models[loading.model])
    pictures = folder(data, n) if data not in SETS and Path(data).is_dir() else labelled(data, n or 40, side, seed)
    probing.show(run.run_separability(models, pictures, data, listed(at) or None, seed))


def attention(
    loading: Loading,
    probing: Probing,
    data: Annotated[str, typer.Option("--data", metavar="NAME", help="a data set of questions")] = "shapes/ask",
    catalog: CatalogOption = None,
    rows: Annotated[
        Literal["answer", "question"],
        typer.Option("--rows", help="queries: the token that predicts the answer, or the tokens of the question"),
    ] = "answer",
    markers: Annotated[
        bool, typer.Option("--markers", help="count markers with the text or picture that they enclose")
    ] = False,
    published: PublishedOption = False,
    n: Annotated[int, number_option("questions")] = 32,
    size: SizeOption = None,
) -> None:
    """Measure the attention of answer or question to the picture.

    The report has one value for each layer."""
    from diptych.analysis import run

    at_least_one(n=n, size=size)
    models = probing.models(loading)
    questions = samples(data, catalog, size or run.size(models[loading.model]), n)
    probing.show(run.run_attention(models, questions, data, rows, markers, published))


def keywords(
    loading: Loading,
    probing: Probing,
    prompt: PromptOption = None,
    words: Annotated[
        list[str] | None,
        typer.Option(
            "--words", metavar="CLASS=WORD,WORD", help="a class of words; may be repeated (default: those of shapes)"
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="how many steps to look at")] = 4,
    published: PublishedOption = False,
    n: Annotated[int | None, number_option("prompts of shapes (default: 8)")] = None,
    seed: SeedOption = 0,
) -> None:
    """Measure which prompt words a drawn picture attends to."""
    from diptych.analysis import run
    from diptych.analysis.keywords import parse_words, shapes_words

    at_least_one(n=n, steps=steps)
    prompts, name = chosen_prompts(prompt, n, seed)
    classes = parse_words(words) if words else shapes_words()
    models = probing.models(loading)
    probing.show(run.run_keywords(models, prompts, classes, name, steps, seed, published))


def gates(
    loading: Loading,
    probing: Probing,
    prompt: PromptOption = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="denoising steps of a picture")] = 20,
    n: Annotated[int | None, number_option("prompts of shapes (default: 8)")] = None,
    seed: SeedOption = 0,
) -> None:
    """Measure how far the gate of detail opens (Cheers)."""
    from diptych.analysis import run

    at_least_one(n=n, steps=steps)
    prompts, name = chosen_prompts(prompt, n, seed)
    probing.show(run.run_gates(probing.models(loading), prompts, name, steps, seed))


def similarity(
    loading: Loading,
    probing: Probing,
    data: Annotated[str, typer.Option("--data", metavar="NAME", help="a data set of drawings")] = "shapes/draw",
    catalog: CatalogOption = None,
    n: Annotated[int, number_option("pictures")] = 200,
    size: SizeOption = None,
) -> None:
    """Compare the same picture tokens when read and when drawn.

    The report has the similarity at each layer."""
    from diptych.analysis import run

    probe_drawings(run.run_similarity, loading, probing, data, catalog, n, size)


def locality(
    loading: Loading,
    probing: Probing,
    data: Annotated[str, typer.Option("--data", metavar="NAME", help="a data set of drawings")] = "shapes/draw",
    catalog: CatalogOption = None,
    n: Annotated[int, number_option("pictures")] = 32,
    size: SizeOption = None,
) -> None:
    """Measure how local attention between picture tokens is.

    The report has one value for each layer."""
    from diptych.analysis import run

    probe_drawings(run.run_locality, loading, probing, data, catalog, n, size)


def probe_drawings(
    probe: Callable[..., Any],
    loading: Loading,
    probing: Probing,
    data: str,
    catalog: str | None,
    n: int,
    size: int | None,
) -> None:
    """Runs a probe of the models on ``n`` drawings of a data set and shows its report."""
    from diptych.analysis import run

    at_least_one(n=n, size=size)
    models = probing.models(loading)
    drawings = samples(data, catalog, size or run.size(models[loading.model]), n)
    probing.show(probe(models, drawings, data))


def samples(name: str, catalog: str | None, size: int, n: int) -> list[Any]:
    """The first ``n`` test samples of a data set."""
    from diptych.data.catalog import sources

    source = sources([name], catalog=catalog, size=size, split="test")[name]
    return [source[i] for i in range(min(n, len(source)))]


def chosen_prompts(prompt: list[str] | None, n: int | None, seed: int) -> tuple[list[str], str]:
    """The user's prompts, or ``n`` (default: 8) of shapes, and what they are called."""
    from diptych.analysis.keywords import shapes_prompts

    if prompt and n is not None:
        raise ValueError("-n is the number of prompts of shapes; it cannot be given with --prompt")
    return (prompt, "yours") if prompt else (shapes_prompts(n or 8, seed), "shapes")
