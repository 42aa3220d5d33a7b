"""What benchmarks of edits share: the edit source, and the folder of edited pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import PIL.Image

from diptych.data.sources import inside
from diptych.evaluation import files
from diptych.evaluation.scores import Item, Outcome


def source_path(reference: str, root: Path, where: str) -> str:
    """A "data:" address as it is, or the path of a picture below ``root``. Raises ``ValueError`` naming the row for one
    that lies outside."""
    if reference.startswith("data:"):
        return reference
    try:
        inside(root, reference)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return str(root / reference)


def source_of(item: Item) -> PIL.Image.Image:
    """The edit source of an item."""
    return files.picture(next(item.sample.images()).image)


def as_large(image: PIL.Image.Image, source: PIL.Image.Image) -> PIL.Image.Image:
    """The picture at the size of its source."""
    return image if image.size == source.size else image.resize(source.size, PIL.Image.Resampling.BICUBIC)


def write_edits(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Every edited picture at its place; for GEdit at the size of its source, with the source beside it."""
    for o in outcomes:
        image, path = o.image, folder / o.item.place
        if image is None:
            continue
        if o.item.benchmark == "gedit":
            source = source_of(o.item)
            files.save(source, path.with_name(f"{path.stem}_SRCIMG.png"))
            image = as_large(image, source)
        files.save(image, path)
