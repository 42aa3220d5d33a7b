"""The synthetic worlds that ship with the package: shapes, emoji, glyphs and stamps."""
