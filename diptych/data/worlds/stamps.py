"""Photographs: cut-outs with exact mattes, and composed scenes of them. Not in the package: prepared by one command.

``prepare`` turns the stamps of Tux Paint (the Debian packages tuxpaint-stamps-default and tuxpaint-data, GPL-2 and
other free licences, see their copyright files) into a folder of captioned WebP cut-outs and photographic backgrounds.
The objects and backgrounds are real; the scenes are composed, so their masks and boxes are exact.

The split is by caption: about one caption in ten, by a hash, is in "test" and never in "train".
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from diptych.core.sample import Image, assistant, user
from diptych.data.canvas import Generated, Made, pick
from diptych.data.tasks import ladder
from diptych.machine.disk import write_into

PACKAGES = ("tuxpaint-stamps-default", "tuxpaint-data")
LICENCE = (
    "Tux Paint stamps and templates: GPL-2 (Debian), mixed free licences upstream; see the packages' copyright files."
)
LONGEST = 256  # pixels of a cut-out's longer side
_SKIPPED = {
    "symbols",
    "cartoon",
    "military",
    "roadsigns",
    "toys",
    "halloween",
    "easter",
    "flags",
    "people",
    "clothes",
}
_BUSY = {"jellyfish", "sheep", "wool_mill_machine"}  # backgrounds that show objects of their own
_PLACES = {
    "cliff": "a cliff",
    "corn_maze": "corn",
    "lighthouse": "a lighthouse",
    "mossy_log": "a mossy log",
    "ocean_splash": "the ocean",
    "ocean_waves": "the ocean",
    "redwoods_above": "redwoods",
    "spiders_web": "a spider's web",
    "sun_behind_clouds": "clouds",
    "sun_behind_leaves": "leaves",
    "trees_above": "trees",
    "trees_at_dusk": "trees at dusk",
}
_KINDS = {
    "animals": "animal",
    "plants": "plant",
    "food": "food",
    "vehicles": "vehicle",
    "music": "instrument",
    "tools": "tool",
    "space": "space",
    "sports": "sport",
}


def default_root() -> Path:
    """Where stamps are prepared unless another folder is named."""
    return Path.home() / ".cache" / "diptych" / "stamps"


# --- preparing --------------------------------------------------------------------------------------------------------


def prepare(destination: Path | None = None, source: Path | None = None) -> dict[str, int]:
    """Writes cut-outs, backgrounds and ``index.json`` into a folder; returns how many of each, and of what was skipped.

    ``source`` is a folder that holds the unpacked packages; without it both are fetched with apt-get. Raises
    ``ValueError`` where that is impossible, where the folder holds no stamps or no templates, and where
    ``destination`` holds files but is no folder of stamps (nothing is written then).
    """
    destination = default_root() if destination is None else Path(destination)
    _check_destination(destination)
    if source is not None:
        return _write(Path(source), destination)
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise ValueError(
                f"{tool} not found; unpack {' and '.join(PACKAGES)} elsewhere and name that folder as source"
            )
    with tempfile.TemporaryDirectory() as temporary:
        result = subprocess.run(["apt-get", "download", *PACKAGES], cwd=temporary, capture_output=True, text=True)
        if result.returncode:
            raise ValueError(f"apt-get download {' '.join(PACKAGES)} failed: {result.stderr.strip()[-300:]}")
        for package in sorted(Path(temporary).glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", package, temporary], check=True)
        return _write(Path(temporary), destination)


def _check_destination(folder: Path) -> None:
    """Raises ``ValueError`` for a folder that holds files and that ``prepare`` did not write."""
    if not folder.exists():
        return
    files = [f for f in folder.iterdir() if not f.name.startswith(".diptych.")] if folder.is_dir() else [folder]
    try:
        licence = json.loads((folder / "index.json").read_text("utf-8")).get("licence")
    except (OSError, ValueError, AttributeError):
        licence = None
    if files and licence != LICENCE:
        raise ValueError(f"{folder} holds {files[0].name}, which is not of a folder of stamps; name another folder")


def _write(source: Path, destination: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    destination.mkdir(parents=True, exist_ok=True)
    write_into(destination, lambda part: counts.update(_convert(source, part)))
    return counts


def noun_of(caption: str) -> str | None:
    """The noun of a caption, without its article: "A colorful rooster." gives "colorful rooster".

    ``None`` where the caption is not the plain name of one thing: exclamations, sentences, more than four words.
    """
    text = re.sub(r"\([^)]*\)", "", caption.strip()).replace("’", "'")
    text = re.sub(r"[“”\"]|(?<!\w)'|'(?!\w)", "", text)
    match = re.fullmatch(r"(?:an?|the) ([\w' -]+?)(?:, .*)?\s*\.?", text.strip(), flags=re.IGNORECASE)
    if not match:
        return None
    words = match.group(1).split()
    if len(words) > 4 or {"is", "are", "was", "that", "for", "from", "used"} & set(words):
        return None
    return " ".join(words).lower()


def _convert(source: Path, destination: Path) -> dict[str, int]:
    """Writes cut-outs, backgrounds and index of the unpacked packages; returns numbers by what they count."""
    folders = {}
    for name in ("stamps", "templates"):
        candidates = sorted((p for p in source.rglob(name) if p.is_dir()), key=lambda p: len(p.parts))
        if not candidates:
            raise ValueError(
                f"no folder {name!r} under {str(source)!r}; it must hold the unpacked {' and '.join(PACKAGES)}"
            )
        folders[name] = candidates[0]
    counts: Counter[str] = Counter()
    rows, backgrounds = [], []
    (destination / "images").mkdir(parents=True, exist_ok=True)
    for path in sorted(folders["stamps"].rglob("*.png")):
        place = path.relative_to(folders["stamps"])
        caption = path.with_suffix(".txt")
        if path.stem.endswith(("_mirror", "_flip")) or _SKIPPED & set(place.parts) or not caption.exists():
            counts["skipped: variant, symbol or cartoon"] += 1
            continue
        noun = noun_of(caption.read_text(encoding="utf-8", errors="replace").partition("\n")[0])
        if noun is None:
            counts["skipped: caption is not a name"] += 1
            continue
        picture = PIL.Image.open(path).convert("RGBA")
        if not _photographic(picture):
            counts["skipped: not a photographic cut-out"] += 1
            continue
        picture = picture.crop(picture.getchannel("A").point(lambda a: 255 * (a >= 16)).getbbox())
        picture.thumbnail((LONGEST, LONGEST), PIL.Image.Resampling.LANCZOS)
        file = f"images/{'_'.join(place.with_suffix('').parts)}.webp"
        picture.save(destination / file, quality=90, method=4)
        kind = next((_KINDS[part] for part in reversed(place.parts) if part in _KINDS), "object")
        rows.append({"file": file, "noun": noun, "kind": kind, "from": str(place)})
    for path in sorted(folders["templates"].glob("*.jpg")):
        if path.stem in _BUSY:
            continue
        picture = PIL.Image.open(path).convert("RGB")
        picture.thumbnail((512, 512), PIL.Image.Resampling.LANCZOS)
        file = f"images/background_{path.stem}.webp"
        picture.save(destination / file, quality=90, method=4)
        backgrounds.append(file)
    if not rows or not backgrounds:
        raise ValueError(
            f"{str(source)!r} holds {len(rows)} usable stamps and {len(backgrounds)} backgrounds; need both"
        )
    index = {"licence": LICENCE, "stamps": rows, "backgrounds": backgrounds}
    (destination / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return {"stamps": len(rows), "captions": len({r["noun"] for r in rows}), "backgrounds": len(backgrounds)} | counts


def _photographic(picture: PIL.Image.Image) -> bool:
    """Whether a cut-out has a matte and the many colours of a photograph."""
    pixels = np.asarray(picture)
    alpha = pixels[..., 3]
    solid = (pixels[alpha > 200][:, :3] >> 3).astype(int) @ [1024, 32, 1]
    return bool(len(np.unique(solid)) >= 300 and (alpha < 128).mean() > 0.05)


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stamp:
    """A cut-out: its file under the root, its English name without article, and what kind of thing it is."""

    file: str
    noun: str
    kind: str


@dataclass(frozen=True)
class Stamps:
    """A prepared folder: the cut-outs and the background files."""

    root: str
    stamps: tuple[Stamp, ...]
    backgrounds: tuple[str, ...]

    def of(self, split: str) -> tuple[Stamp, ...]:
        """The cut-outs of a split."""
        return _of(self, split)


@cache
def load(root: str | Path | None = None) -> Stamps:
    """The stamps prepared in a folder. Raises ``ValueError`` where nothing has been prepared."""
    root = default_root() if root is None else Path(root)
    if not (root / "index.json").exists():
        raise ValueError(
            f"no stamps in {str(root)!r}; run `diptych data prepare stamps` once, or name their folder as root"
        )
    index = json.loads((root / "index.json").read_text(encoding="utf-8"))
    stamps = tuple(Stamp(row["file"], row["noun"], row["kind"]) for row in index["stamps"])
    return Stamps(str(root), stamps, tuple(index["backgrounds"]))


def split_of(stamp: Stamp) -> str:
    """The split of a stamp: "test" for about one caption in ten."""
    return "train" if int.from_bytes(hashlib.sha256(stamp.noun.encode()).digest()[:4], "big") % 10 else "test"


@cache
def _of(stamps: Stamps, split: str) -> tuple[Stamp, ...]:
    chosen = tuple(s for s in stamps.stamps if split_of(s) == split)
    if len({s.noun for s in chosen}) < 2:
        raise ValueError(f"{stamps.root!r} has fewer than two captions in split {split!r}")
    return chosen


@lru_cache(maxsize=512)
def _open(path: str) -> PIL.Image.Image:
    return PIL.Image.open(path).copy()


@dataclass(frozen=True)
class PlacedStamp:
    """A stamp in a scene: its file and its box, in fractions of the canvas."""

    file: str
    noun: str
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class StampScene:
    """Stamps that do not overlap, on a square crop (left, top, side in fractions of the shorter edge) or on white."""

    background: str | None
    crop: tuple[float, float, float]
    things: tuple[PlacedStamp, ...]

    def to_json(self) -> dict:
        """The scene as a JSON object, which ``from_json`` reads."""
        return asdict(self) | {"crop": list(self.crop), "things": [asdict(t) for t in self.things]}

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> StampScene:
        """The scene of a JSON object."""
        return StampScene(row["background"], tuple(row["crop"]), tuple(PlacedStamp(**t) for t in row["things"]))


def boxes(scene: StampScene, size: int) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of every stamp, in pixels."""
    corners = []
    for t in scene.things:
        left, top = round(t.left * size), round(t.top * size)
        corners.append((left, top, left + max(1, round(t.width * size)), top + max(1, round(t.height * size))))
    return corners


def render(scene: StampScene, stamps: Stamps, size: int) -> PIL.Image.Image:
    """The RGB picture of a scene, ``size`` pixels square."""
    if scene.background is None:
        picture = PIL.Image.new("RGB", (size, size), (255, 255, 255))
    else:
        photo = _open(f"{stamps.root}/{scene.background}")
        left, top, side = (c * min(photo.size) for c in scene.crop)
        area = (left, top, left + side, top + side)
        picture = photo.resize((size, size), PIL.Image.Resampling.BILINEAR, box=area, reducing_gap=2.0)
    for cutout, (left, top, _, _) in _cutouts(scene, stamps, size):
        picture.paste(cutout, (left, top), cutout)
    return picture


def masks(scene: StampScene, stamps: Stamps, size: int) -> np.ndarray:
    """Instance masks: (stamps, size, size) bool, true where a stamp covers at least half of the pixel."""
    stacked = np.zeros((len(scene.things), size, size), bool)
    for i, (cutout, (left, top, right, bottom)) in enumerate(_cutouts(scene, stamps, size)):
        alpha = np.asarray(cutout.getchannel("A")) >= 128
        stacked[i, top:bottom, left:right] = alpha[: size - top, : size - left]
    return stacked


def _cutouts(scene: StampScene, stamps: Stamps, size: int):
    for thing, box in zip(scene.things, boxes(scene, size), strict=True):
        whole = _open(f"{stamps.root}/{thing.file}").convert("RGBA")
        yield whole.resize((box[2] - box[0], box[3] - box[1]), PIL.Image.Resampling.BOX, reducing_gap=2.0), box


# --- sources ----------------------------------------------------------------------------------------------------------


def _article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" and not noun.startswith(("eu", "uk ", "us")) else "a ") + noun


def _fit(rng: np.random.Generator, stamps: Stamps, stamp: Stamp, left: float, top: float, room: float) -> PlacedStamp:
    """The stamp somewhere in a square of side ``room``, as large as it fits or a little smaller."""
    size = _open(f"{stamps.root}/{stamp.file}").size
    width, height = (room * rng.uniform(0.8, 0.96) / max(size) * np.array(size)).round(4).tolist()
    x, y = left + rng.uniform(0, room - width), top + rng.uniform(0, room - height)
    return PlacedStamp(stamp.file, stamp.noun, round(float(x), 4), round(float(y), 4), width, height)


def random_scene(rng: np.random.Generator, stamps: Stamps, split: str, most: int = 4) -> StampScene:
    """One to ``most`` stamps of different names on a photograph: one large, or more in a 2x2 lattice."""
    n, choices = int(rng.integers(1, most + 1)), stamps.of(split)
    chosen: dict[str, Stamp] = {}
    for i in rng.permutation(len(choices)):
        chosen.setdefault(choices[i].noun, choices[i])
        if len(chosen) == n:
            break
    if len(chosen) == 1:
        left, top = rng.uniform(0, 0.25, 2)
        things = [_fit(rng, stamps, next(iter(chosen.values())), left, top, 0.75)]
    else:
        cells = rng.permutation(4)[: len(chosen)]
        things = [
            _fit(rng, stamps, stamp, int(c) % 2 / 2, int(c) // 2 / 2, 0.5)
            for stamp, c in zip(chosen.values(), cells, strict=True)
        ]
    side = rng.uniform(0.5, 1.0)
    left, top = rng.uniform(0, 1 - side, 2)
    crop = (round(float(left), 4), round(float(top), 4), round(float(side), 4))
    return StampScene(pick(rng, stamps.backgrounds), crop, tuple(things))


def make_draw(rng: np.random.Generator, split: str, size: int, root: str | None = None) -> Made:
    """A name, and the cut-out on white, as large as it fits."""
    stamps = load(root)
    stamp = pick(rng, stamps.of(split))
    width, height = _open(f"{stamps.root}/{stamp.file}").size
    w, h = (0.94 * side / max(width, height) for side in (width, height))
    scene = StampScene(None, (0.0, 0.0, 1.0), (PlacedStamp(stamp.file, stamp.noun, (1 - w) / 2, (1 - h) / 2, w, h),))
    messages = user(_article(stamp.noun)), assistant(Image(render(scene, stamps, size), "target"))
    return messages, {"type": "draw", "scene": scene.to_json()}


def make_ask(rng: np.random.Generator, split: str, size: int, root: str | None = None) -> Made:
    """A composed photograph and a question (name, kind, exists), and the answer; yes and no are balanced."""
    stamps = load(root)
    type_ = pick(rng, ("name", "kind", "exists"))
    scene = random_scene(rng, stamps, split, 4 if type_ == "exists" else 1)
    thing = pick(rng, scene.things)
    if type_ == "exists":
        yes = rng.random() < 0.5
        present = {word for t in scene.things for word in t.noun.split()}
        absent = [s.noun for s in stamps.of(split) if not present & set(s.noun.split())]  # a "red apple" is an "apple"
        yes = yes or not absent
        question, answer = f"is there {_article(thing.noun if yes else pick(rng, absent))}?", "yes" if yes else "no"
    elif type_ == "kind":
        kind = next(s.kind for s in stamps.stamps if s.file == thing.file)
        question, answer = "what kind of thing is this?", kind
    else:
        question, answer = "what is this?", thing.noun
    messages = user(Image(render(scene, stamps, size)), question), assistant(answer)
    return messages, {"type": type_, "answer": answer, "scene": scene.to_json()}


def make_scene(rng: np.random.Generator, split: str, size: int, root: str | None = None) -> Made:
    """A caption ("a frog and a red apple, on mossy bark"), and the composed photograph."""
    stamps = load(root)
    scene = random_scene(rng, stamps, split)
    names = [_article(t.noun) for t in scene.things]
    text = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    stem = Path(scene.background or "").stem.removeprefix("background_")
    place = _PLACES.get(stem, stem.replace("_", " "))
    messages = user(f"{text}, in front of {place}"), assistant(Image(render(scene, stamps, size), "target"))
    return messages, {"type": "scene", "scene": scene.to_json()}


def annotated(scene: StampScene, stamps: Stamps, size: int) -> ladder.Annotated:
    """The picture of a scene with its masks; classes are all nouns of the prepared stamps."""
    classes = tuple(sorted({s.noun for s in stamps.stamps}))
    names = [t.noun for t in scene.things]
    instance_masks = masks(scene, stamps, size)
    phrases = ladder.phrases_of(names, ladder.boxes_of(instance_masks))
    return ladder.Annotated(
        render(scene, stamps, size), instance_masks, tuple(map(classes.index, names)), classes, phrases=phrases
    )


def make_task(rng: np.random.Generator, split: str, size: int, task: str, root: str | None = None) -> Made:
    """A composed photograph and the target of a task of SGT."""
    stamps = load(root)
    scene = random_scene(rng, stamps, split)
    messages, info = ladder.make(ladder.find(task), annotated(scene, stamps, size), rng)
    return messages, {**info, "scene": scene.to_json()}


_KNOWN = {"masks", "labels", "things", "boxes", "phrases"}  # of a composed photograph; its depth is not
SOURCES: dict[str, Callable[..., Made]] = {
    "stamps/draw": make_draw,
    "stamps/ask": make_ask,
    "stamps/scenes": make_scene,
    **{
        f"stamps/sgt/{n}": partial(make_task, task=n)
        for n, task in ladder.TASKS.items()
        if _KNOWN.issuperset(task.needs)
    },
}


def source(name: str, split: str = "train", size: int = 64, seed: int = 0, root: str | Path | None = None) -> Generated:
    """An endless source of stamps prepared in ``root``. Raises ``ValueError`` for an unknown name or no stamps."""
    if name not in SOURCES:
        raise ValueError(f"unknown source {name!r}; stamps has {', '.join(SOURCES)}")
    generated = Generated(name, partial(SOURCES[name], root=None if root is None else str(root)), split, size, seed)
    load(None if root is None else str(root)).of(split)
    return generated
