"""Writing model folders: whole or not at all, and never at the cost of a file that this library did not write."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diptych.machine import disk
from diptych.models.table import FAMILIES, PUBLISHED, published_format

MARK = {"format": "pt", "writer": "diptych"}  # metadata of every safetensors file that this library writes
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
README = """# {family}, for transformers

{parts}
The language part reads and writes text between <|im_start|> and <|im_end|>. The image parts have no class in
transformers; load the whole model with diptych.
"""


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file that carries our mark, readable for everybody: the same bytes for the same tensors."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, file, metadata=MARK)
    file.chmod(0o644)  # safetensors writes for the owner alone
    with file.open("r+b") as opened:  # and the entries of ``metadata`` in a random order
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        ordered = json.dumps(header | {"__metadata__": MARK}, separators=(",", ":"), ensure_ascii=False).encode()
        opened.seek(8)
        opened.write(ordered.ljust(length))


def check_target(folder: str | Path, force: bool = False) -> Path:
    """The folder to write a model into, with ``~`` expanded and links followed.

    Raises ``ValueError`` where the path is a file, or a folder that holds anything that this library did not write.
    ``force`` allows such a folder: files of the same names are overwritten then, and no other file is touched."""
    target = Path(folder).expanduser().resolve()
    for path in (target, *target.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file; a model is written into a folder")
    if not force and target.is_dir() and (files := foreign(target)):
        more = f" and {len(files) - 4} more" if len(files) > 4 else ""
        raise ValueError(
            f"{target} holds files that diptych did not write ({', '.join(files[:4])}{more}); choose another folder, "
            "or overwrite the files of the same names with --force (in Python force=True)"
        )
    return target


def write_model(folder: str | Path, write: Callable[[Path], None], force: bool = False) -> Path:
    """Calls ``write`` on a temporary folder and puts the result where ``check_target`` says; returns that folder.

    A folder that holds nothing but what this library wrote is replaced as a whole: a kill leaves the old model or the
    new one. Into any other folder (empty, with files of the user, a mount point, the working directory) the files are
    moved one by one."""
    target = check_target(folder, force)
    if not target.exists() or (_replaceable(target) and not foreign(target) and any(target.iterdir())):
        disk.write_folder(target, write)
    else:
        disk.write_into(target, write)
    return target


def foreign(folder: Path) -> list[str]:
    """The files and folders below ``folder`` that this library did not write, as relative paths.

    A file is ours if its name is one of those we write and the safetensors files beside it carry our mark. Names alone
    prove nothing: a published checkpoint of others has the same ones."""
    known = _known()
    folders = {str(parent) for name in known for parent in PurePosixPath(name).parents}
    entries = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    tensors = {name: path for name, path in entries.items() if path.suffix == ".safetensors"}
    marked = bool(tensors) and all(_marked(path) for path in tensors.values())
    return [name for name, path in entries.items() if not marked or not _ours(name, path, known, folders)]


def _ours(name: str, path: Path, known: set[str], folders: set[str]) -> bool:
    if path.is_dir() and not path.is_symlink():
        return name in folders
    return name in known and (path.name != "README.md" or _is_readme(path))


def _known() -> set[str]:
    """The relative paths of all files that this library writes into a model folder, in any format."""
    parts = {f"{part}/{file}" for part in ("language", "vision") for file in ("config.json", "model.safetensors")}
    names = {"config.json", "model.safetensors", "README.md", *TOKENIZER, *parts}
    names |= {"adapter.safetensors", "pytorch_lora_weights.safetensors"}
    names |= {f"language/{file}" for file in TOKENIZER}
    for fmt in (published_format(family) for family in PUBLISHED):
        assert fmt
        names |= {*fmt.json, *fmt.optional, *(f"{stem}.safetensors" for stem in fmt.weights)}
        names |= {f"{fmt.tokenizer}/{file}" for file in TOKENIZER if fmt.tokenizer}
    return names


def _marked(file: Path) -> bool:
    """Whether a safetensors file was written by this library: by its mark, or by a config.json of ours beside it."""
    try:
        with safe_open(file, "pt") as opened:
            if (opened.metadata() or {}).get("writer") == MARK["writer"]:
                return True
        config = json.loads((file.parent / "config.json").read_text())
    except (SafetensorError, OSError, ValueError):
        return False
    return file.name == "model.safetensors" and isinstance(config, dict) and config.get("family") in FAMILIES


def _is_readme(file: Path) -> bool:
    """Whether a README.md is the one that ``write_transformers`` writes, unchanged."""
    pattern = re.escape(README).replace(r"\{family\}", r"\w+").replace(r"\{parts\}", r"(- `[^`]*`\n)+")
    return bool(re.fullmatch(pattern, file.read_text(errors="replace")))


def _replaceable(folder: Path) -> bool:
    """Whether a folder may be renamed: not where a shell stands in it, nor a mount point, nor in a read-only parent."""
    inside = Path.cwd().is_relative_to(folder)
    return not inside and not os.path.ismount(folder) and os.access(folder.parent, os.W_OK)
