"""Scores of a model, with intervals and the settings that produced them, and the pages that show them."""
