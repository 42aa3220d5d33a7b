"""The training loop and what it needs. ``diptych.train(recipe)`` runs a recipe (see ``diptych.recipes.run``)."""

from diptych.core.callable import make_callable

make_callable(__name__, "diptych.recipes.run")
