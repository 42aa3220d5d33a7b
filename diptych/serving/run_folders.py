"""The folders of training runs: their metrics and sheets of samples, also while they are being written.

Names of runs and of sheets are looked up in listings; nothing that a client sends is ever joined to a path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diptych.training.log import read_metrics

DEPTH = 3  # levels of folders below the root that may be runs


class Runs:
    """The runs under a folder, by their path within it."""

    def __init__(self, root: Path | None) -> None:
        self.root = root

    def all(self) -> dict[str, Path]:
        """Name -> folder of every run, the latest written first."""
        if self.root is None or not self.root.is_dir():
            return {}
        root, runs = self.root.resolve(), {}
        for depth in range(1, DEPTH + 1):
            for file in self.root.glob("/".join(["*"] * depth) + "/metrics.jsonl"):
                if file.resolve().is_relative_to(root):
                    runs[file.parent.relative_to(self.root).as_posix()] = file.parent
        return dict(sorted(runs.items(), key=lambda item: -(item[1] / "metrics.jsonl").stat().st_mtime))

    def find(self, name: str) -> Path:
        """The folder of a run. Raises ``ValueError`` for a name that is not listed."""
        if name not in (runs := self.all()):
            raise ValueError(f"no run {name[:100]!r}; there are: {', '.join(runs) or 'none'}")
        return runs[name]

    def rows(self, name: str, after: int, most: int) -> list[dict[str, Any]]:
        """What was logged of the steps after ``after``: at most ``most`` rows, evenly spaced, the last one included."""
        later = (row for row in read_metrics(self.find(name)) if row["step"] > after)
        rows = [{k: v for k, v in row.items() if isinstance(v, (int, float, str))} for row in later]
        stride = -(-len(rows) // most)
        return rows[::-1][::stride][::-1] if rows else []

    def about(self, name: str) -> dict[str, Any]:
        """Its recipe's name, steps and stages, and its sheets of samples in order."""
        folder = self.find(name)
        recipe = folder / "recipe.json"
        content = json.loads(recipe.read_text()) if recipe.is_file() else {}
        stages = [{"name": s["name"], "steps": s["steps"]} for s in content.get("stages", [])]
        return {"id": name, "recipe": content.get("name"), "stages": stages, "samples": list(self._sheets(folder))}

    def sheet(self, name: str, file: str) -> bytes:
        """One sheet of samples. Raises ``ValueError`` for one that is not listed."""
        sheets = self._sheets(self.find(name))
        if file not in sheets:
            raise ValueError(f"no sheet {file[:100]!r} in run {name!r}")
        return sheets[file].read_bytes()

    def _sheets(self, folder: Path) -> dict[str, Path]:
        within = folder.resolve()
        files = sorted((folder / "samples").glob("step-*.png"))
        return {f.name: f for f in files if f.resolve().is_relative_to(within)}
