"""Picture files that the library writes for a user.

Each file carries a mark, and only a file with the mark is replaced. A generated picture also carries its parameters, as
JSON in EXIF's ``ImageDescription``, which PNG, JPEG and WebP have alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image

from diptych.machine.disk import atomic, check_folder

MARK = "diptych"  # what the field Software says, in EXIF and in PNG texts
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_DESCRIPTION, _SOFTWARE = 0x010E, 0x0131  # EXIF tags


def save_picture(image: PIL.Image.Image, path: Path, parameters: Mapping[str, Any] | None = None) -> None:
    """Writes a picture with the mark and its ``parameters``, atomically, in the format of its suffix. Raises
    ``ValueError`` as ``check_picture_path`` does."""
    check_picture_path(path)
    marked = PIL.Image.Exif()
    marked[_SOFTWARE] = MARK
    if parameters is not None:
        marked[_DESCRIPTION] = json.dumps(dict(parameters))
    with atomic(path) as part:
        image.save(part, FORMATS[path.suffix.lower()], exif=marked)


def numbered(path: Path, n: int) -> list[Path]:
    """The files of ``n`` pictures: ``path`` for one, and for several its name with ``-0``, ``-1`` ... appended."""
    return [path] if n == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(n)]


def check_picture_path(path: Path) -> None:
    """Raises ``ValueError`` for a path that no picture can be written to without the loss of another file: a folder, a
    path below a file, a file without the mark, a suffix of no format that is written."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{str(path)!r} is no picture file; its name must end in {', '.join(FORMATS)}")
    check_folder(path.parent)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a picture file to write")
    if path.exists() and not is_marked(path):
        raise ValueError(f"{path} is there and was not written by diptych; name another file")


def read_parameters(path: Path) -> dict[str, Any]:
    """The parameters that ``save_picture`` wrote into a picture file. Raises ``ValueError`` for a file that is not a
    picture, and for a picture without parameters."""
    try:
        with PIL.Image.open(path) as image:
            text = image.getexif().get(_DESCRIPTION)
    except FileNotFoundError:
        raise ValueError(f"no file {str(path)!r}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path} is not a picture: {error}") from error
    try:
        parameters = json.loads(text) if text and is_marked(path) else None
    except json.JSONDecodeError:
        parameters = None
    if not isinstance(parameters, dict):
        raise ValueError(f"{path} has no parameters of diptych; pictures of generate and edit have")
    return parameters


def is_marked(path: Path) -> bool:
    """Whether a file is a picture that this library wrote."""
    try:
        with PIL.Image.open(path) as image:
            texts = (image.info.get("Software"), image.getexif().get(_SOFTWARE))
    except (OSError, ValueError, SyntaxError):
        return False
    return any(str(text).startswith(MARK) for text in texts if text)
