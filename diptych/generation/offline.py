"""Pictures of a file of prompts, in independent shards.

Shard ``i`` of ``n`` draws prompts i, i + n, i + 2n ... A picture depends on its prompt, seed and settings alone, so the
number of shards changes nothing. A picture that exists is not drawn again: a killed shard continues where it stopped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.core.sample import Sample, user
from diptych.data.reading import read
from diptych.machine import disk

if TYPE_CHECKING:
    from diptych.generation.engine import Engine

FIELDS = ("id", "prompt", "seed")
SETTINGS = "generate.json"


@dataclass(frozen=True)
class PromptRow:
    """One prompt of the file. ``id`` names its pictures; ``seed`` is that of its first picture."""

    id: str
    prompt: str
    seed: int

    def file(self, picture: int, n: int) -> str:
        """The file name of picture number ``picture`` of the prompt's ``n``."""
        return f"{self.id}.png" if n == 1 else f"{self.id}-{picture}.png"


def read_prompts(path: Path, seed: int = 0) -> list[PromptRow]:
    """The prompts of a .txt file, one a line, or of a .jsonl file with ``prompt`` and, optional, ``id`` and ``seed``.

    The default id is the number of the prompt, from 00000; the default seed is ``seed``. Raises ``ValueError`` naming
    the line that cannot be used, and for an id that occurs twice."""
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: prompts are a .txt file, one a line, or a .jsonl file")
    try:
        lines = read(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    prompts: dict[str, PromptRow] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        prompt = PromptRow(f"{len(prompts):05d}", line.strip(), seed)
        if path.suffix == ".jsonl":
            row = _row(line, where)
            prompt = PromptRow(str(row.get("id", prompt.id)), row["prompt"], row.get("seed", seed))
        if not re.fullmatch(r"\w[\w.-]*", prompt.id):
            raise ValueError(f"{where}: id {prompt.id!r} cannot name a file; use letters, digits, '_', '-' and '.'")
        if prompt.id in prompts:
            raise ValueError(f"{where}: id {prompt.id!r} occurs twice")
        prompts[prompt.id] = prompt
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return list(prompts.values())


def _row(line: str, where: str) -> dict[str, Any]:
    """A row of a .jsonl file, checked."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f"{where} needs 'prompt', a text")
    if unknown := sorted(row.keys() - set(FIELDS)):
        raise ValueError(f"{where}: unknown keys {unknown}; known: {', '.join(FIELDS)}")
    if not isinstance(row.get("seed", 0), int) or isinstance(row.get("seed"), bool) or row.get("seed", 0) < 0:
        raise ValueError(f"{where}: seed must be a whole number of at least 0, not {row['seed']!r}")
    return row


def generate_file(
    engine: Engine,
    prompts: Path,
    out: Path,
    n: int = 1,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    batch_size: int = 32,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Draws ``n`` pictures of each prompt of this shard into the folder ``out`` and returns the shard's list of them.

    The list is ``prompts.jsonl`` (of one shard) or ``prompts-I-of-N.jsonl``: a row a picture with ``file``, ``id``,
    ``prompt``, ``seed``. ``progress`` is called with (pictures done, pictures in all). Prompts may be added to the file
    later. Raises ``ValueError`` for a folder whose pictures were drawn by another model, with other settings, or of
    other prompts or seeds under the same ids, and for one that holds such files without ``generate.json``."""
    every = read_prompts(prompts, seed)
    rows = every[shard[0] :: shard[1]]
    chosen = engine.settings(settings or {})
    described = {"model": engine.name, "n": n, "size": size and list(size), "settings": asdict(chosen)}
    _agree(out, described, every)
    wanted = [(p, k, out / p.file(k, n)) for p in rows for k in range(n)]
    missing = [w for w in wanted if not w[2].is_file()]
    done = len(wanted) - len(missing)
    progress(done, len(wanted))
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        samples = [Sample(f"{p.id}-{k}", (user(p.prompt),)) for p, k, _ in batch]
        pictures = engine.draw(samples, [p.seed + k for p, k, _ in batch], size, chosen, batch_size)
        for (_, _, file), picture in zip(batch, pictures, strict=True):
            picture.save(file)
        done += len(batch)
        progress(done, len(wanted))
    name = "prompts.jsonl" if shard[1] == 1 else f"prompts-{shard[0]}-of-{shard[1]}.jsonl"
    written = [{"file": f.name, "id": p.id, "prompt": p.prompt, "seed": p.seed + k} for p, k, f in wanted]
    disk.write_text(out / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written))
    return out / name


def _agree(out: Path, settings: dict[str, Any], prompts: Sequence[PromptRow]) -> None:
    """Writes the settings and the prompts of the folder's pictures, or compares them with the ones stored there."""
    disk.check_folder(out)
    file, settings = out / SETTINGS, json.loads(json.dumps(settings))
    asked = {p.id: [p.prompt, p.seed] for p in prompts}
    before: dict[str, list] = {}
    if file.is_file():
        stored = _settings_of(file)
        if changes := [f"{k} {stored.get(k)!r}, not {v!r}" for k, v in settings.items() if stored.get(k) != v]:
            raise ValueError(f"{out} holds pictures with {'; '.join(changes)}; choose another folder")
        before = stored["prompts"]
        for name in asked.keys() & before.keys():
            if asked[name] != before[name]:
                (prompt, seed), (other, other_seed) = before[name], asked[name]
                raise ValueError(
                    f"{out} holds pictures of {name}: {prompt!r} with seed {seed}, not {other!r} with seed "
                    f"{other_seed}; choose another folder"
                )
    taken = (out / p.file(k, settings["n"]) for p in prompts if p.id not in before for k in range(settings["n"]))
    lists = () if before else out.glob("prompts*.jsonl")
    if existing := next((path for path in (*taken, *lists) if path.exists()), None):
        raise ValueError(f"{existing} exists and was not drawn by `diptych generate`; choose another folder")
    if asked.keys() - before.keys():
        disk.write_text(file, json.dumps(settings | {"prompts": before | asked}, indent=1, ensure_ascii=False))


def _settings_of(file: Path) -> dict[str, Any]:
    """The content of ``generate.json``. Raises ``ValueError`` for a file that ``_agree`` did not write."""
    try:
        settings = json.loads(read(file).decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("prompts"), dict):
        raise ValueError(f"{file} was not written by `diptych generate`; choose another folder")
    return settings
