"""Tests diptych with the lowest version that pyproject.toml allows of every dependency, on each Python given.

    python scripts/test_floors.py                       python3.11, 3.12 and 3.13, where they are installed
    python scripts/test_floors.py python3.12 --tests tests/core

Each Python gets a fresh virtual environment (about 2 GB of downloads for torch); exits with 1 when one fails.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHONS = ("python3.11", "python3.12", "python3.13")


def floors(extra: str = "test") -> list[str]:
    """``name==floor`` for every dependency and those of an extra; a dependency without a floor stays as it is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = dict.fromkeys([*project["dependencies"], *project["optional-dependencies"][extra]])
    return [re.sub(r"^([\w.-]+)>=([\w.]+).*", r"\1==\2", line) for line in lines]


def tested(python: str, tests: list[str]) -> bool:
    """Whether the tests pass in a fresh environment of this Python with the floors installed."""
    with tempfile.TemporaryDirectory() as folder:
        inner = Path(folder) / "bin" / "python"
        for command in (
            [python, "-m", "venv", folder],
            [inner, "-m", "pip", "install", "--quiet", *floors()],
            [inner, "-m", "pip", "install", "--quiet", "--no-deps", "-e", ROOT],
            [inner, "-m", "pytest", "-x", *tests],
        ):
            if subprocess.run(command, cwd=ROOT).returncode:
                print(f"{python}: failed: {' '.join(map(str, command[:6]))} ...", file=sys.stderr)
                return False
    print(f"{python}: passed")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", help=f"default: of {', '.join(PYTHONS)} those that are installed")
    parser.add_argument("--tests", nargs="+", default=["tests/core", "tests/parts", "tests/protocol", "tests/cli"])
    asked = parser.parse_args()
    pythons = asked.pythons or [python for python in PYTHONS if shutil.which(python)]
    results = [tested(python, asked.tests) for python in pythons]
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
