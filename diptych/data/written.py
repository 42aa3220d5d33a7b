"""Picture files that the library writes for a user. Each carries a mark, and only a file with the mark is replaced."""

from __future__ import annotations

from pathlib import Path

import PIL.Image

from diptych.machine.disk import atomic, check_folder

MARK = "diptych"  # what the field Software says, in EXIF and in PNG texts
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_SOFTWARE = 0x0131  # EXIF tag


def save_picture(image: PIL.Image.Image, path: Path) -> None:
    """Writes a picture with the mark, atomically, in the format of its suffix. Raises ``ValueError`` as
    ``check_picture_path`` does."""
    check_picture_path(path)
    marked = PIL.Image.Exif()
    marked[_SOFTWARE] = MARK
    with atomic(path) as part:
        image.save(part, FORMATS[path.suffix.lower()], exif=marked)


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


def is_marked(path: Path) -> bool:
    """Whether a file is a picture that this library wrote."""
    try:
        with PIL.Image.open(path) as image:
            texts = (image.info.get("Software"), image.getexif().get(_SOFTWARE))
    except (OSError, ValueError, SyntaxError):
        return False
    return any(str(text).startswith(MARK) for text in texts if text)
