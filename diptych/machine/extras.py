"""The optional extras of the package: what each is for, and which of their packages are installed."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version

UNLOCKS = {  # what each extra is for; a test compares the names with the package's metadata
    "hf": "IOMM and OmniGen2 models, published autoencoders",
    "data": "Parquet files, zstd, languages of captions",
    "remote": "s3://, gs://, https:// and hf:// addresses",
    "track": "TensorBoard logs",
    "tune": "LoRA",
    "evaluate": "judges, endpoints, GenEval's detector, distances",
    "features": "distances without a download",
    "serve": "the HTTP server and its page",
    "test": "the test suite",
    "docs": "the documentation site",
}


def install(extra: str) -> str:
    """The command that installs an extra; diptych is installed from its checkout."""
    return f"pip install -e '.[{extra}]'"


def declared() -> dict[str, list[str]]:
    """The packages of every extra, from the metadata of the installed package."""
    packages: dict[str, list[str]] = {}
    for line in requires("diptych") or ():
        if match := re.match(r"([\w.-]+).*;.*extra == ['\"](\w+)['\"]", line):
            packages.setdefault(match[2], []).append(match[1])
    return packages


def state(extra: str, packages: list[str]) -> str:
    """What an extra is for, and which of its packages are missing."""
    versions, missing = [], []
    for package in packages:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    hint = f"missing {', '.join(missing)}: {install(extra)}" if missing else "complete"
    return f"{UNLOCKS[extra]}; {hint}" + (f" ({', '.join(versions)})" if versions and extra != "test" else "")
