"""The training loop and what it needs. ``diptych.train(recipe)`` runs a recipe (see ``diptych.recipes.run``)."""
