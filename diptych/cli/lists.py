"""Verbs that list: models, recipes, doctor."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from diptych.cli.options import JsonOption, Verbs, complete_recipes, show_table


def add(app: Verbs) -> None:
    """Adds the verbs of this file to the command line."""
    app.verb("models", "diptych models", "diptych models --json")(models)
    app.verb("recipes", "diptych recipes", "diptych recipes bagel/tiny")(recipes)
    app.verb("doctor", "diptych doctor", "diptych doctor --json")(doctor)


def models(as_json: JsonOption = False) -> None:
    """List models with their parameter counts and picture sizes."""
    from diptych.models.store import list_models

    rows = list_models()
    if as_json:
        print(json.dumps(rows))
        return
    show_table(
        "models",
        ["name", "family", "parameters", "activated", "draws", "ships", "source"],
        [
            [
                row["name"],
                row["family"],
                *(
                    "needs extra hf" if row[key] is None else short(row[key])
                    for key in ("parameters", "activated_parameters")
                ),
                row["sizes"]["range"] if row["sizes"] else "",
                "yes" if row["shipped"] else "",
                row["source"],
            ]
            for row in rows
        ],
    )


def short(count: int) -> str:
    """A count in three digits: 5868667 is "5.87 M"."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.3g} {letter}"
    return str(count)


def recipes(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="the recipe to print as JSON", autocompletion=complete_recipes),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List recipes, or print one as JSON."""
    from diptych import recipes

    if recipe:
        print(recipes.find(recipe).to_json())
        return
    table = {name: recipes.find(name) for name in recipes.RECIPES}
    if as_json:
        print(json.dumps([{"name": n, "family": r.model["family"], "steps": r.steps} for n, r in table.items()]))
        return
    rows = [[n, r.model["family"], r.steps, ", ".join(s.name for s in r.stages)] for n, r in table.items()]
    show_table("recipes", ["name", "family", "steps", "stages"], rows)


def doctor(as_json: JsonOption = False) -> None:
    """Show devices, memory, dtypes, attention and extras here."""
    from diptych.machine.doctor import report

    findings = report()
    if as_json:
        print(json.dumps(findings))
        return
    show_table("doctor", ["what", "found"], [[name, value] for name, value in findings.items()])
