"""Where samples come from: the worlds that ship with the package, and the user's own files."""
