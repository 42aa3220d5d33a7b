"""Studies: the claims of the papers in miniature, and the demo."""
