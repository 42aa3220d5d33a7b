"""Builds diptych/data/emoji.json.xz from two npm packages; prints what went in and the checksum.

    python scripts/build_emoji.py

Needs npm. The same package versions give the same bytes. See diptych/data/worlds/NOTICE for the licences.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import subprocess
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

PICTURES = "@iconify-json/fluent-emoji-flat@1.2.6"
WORDS = "emojibase-data@17.0.0"
LANGUAGES = ("en", "zh", "es", "fr", "de", "ja", "hi", "ru", "pt", "ko")
DESTINATION = Path(__file__).resolve().parent.parent / "diptych" / "data" / "worlds" / "emoji.json.xz"


def fetch(package: str, folder: Path) -> Path:
    """The folder of an npm package, unpacked under ``folder``."""
    folder.mkdir()
    subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def bare(code: str) -> str:
    """A code point sequence without the variation selector, lowercase: the key on which the packages are joined."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def join(pictures: Path, words: Path) -> list[dict]:
    """One row per picture without a skin tone, in Unicode order."""

    def read(path: Path):
        return json.loads(path.read_text(encoding="utf-8"))

    icons = read(pictures / "icons.json")["icons"]
    slugs = {bare(code): slug for code, slug in read(pictures / "chars.json").items()}
    names = read(words / "en" / "messages.json")
    groups = {row["order"]: row["key"] for row in names["groups"]}
    subgroups = {row["order"]: row["key"] for row in names["subgroups"]}
    labels = {
        language: {row["hexcode"]: row["label"] for row in read(words / language / "data.json")}
        for language in LANGUAGES
    }
    rows = []
    for row in sorted(read(words / "en" / "data.json"), key=lambda row: row.get("order", 10**6)):
        slug = slugs.get(bare(row["hexcode"]))
        if slug in icons and "group" in row:
            rows.append(
                {
                    "id": slug,
                    "labels": {language: labels[language][row["hexcode"]] for language in LANGUAGES},
                    "tags": row["tags"],
                    "group": groups[row["group"]],
                    "subgroup": subgroups[row["subgroup"]],
                    "body": icons[slug]["body"],
                }
            )
    return rows


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        rows = join(fetch(PICTURES, Path(temporary) / "pictures"), fetch(WORDS, Path(temporary) / "words"))
    text = json.dumps(rows, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    packed = lzma.compress(text.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME)
    DESTINATION.write_bytes(packed)
    print(f"{len(rows)} pictures, {len(text)} characters, {len(packed)} bytes packed")
    print(", ".join(f"{group} {n}" for group, n in Counter(row["group"] for row in rows).most_common()))
    print(f"sha256 {hashlib.sha256(packed).hexdigest()}")


if __name__ == "__main__":
    main()
