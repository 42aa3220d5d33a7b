"""Model folders: which files hold what, and a model filled from them tensor by tensor.

A ``PublishedFormat`` describes the folder of a family; the mechanism is the same for all. Files may lie in several
folders that are searched in order, so a folder that holds only fine-tuned weights goes before the one it was made from.
Tensors are read one at a time onto the device, so the host holds at most the model and one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diptych.models.protocol import Trainable
from diptych.models.published.key_map import Rules, State, Step, export, names, plan, raise_all
from diptych.models.release import write_tensors
from diptych.models.store import create
from diptych.parts.quantize import to_int8
from diptych.parts.tokenizer import Tokenizer

Json = Mapping[str, Mapping[str, Any]]  # content by file name


States = Mapping[str, State]  # tensors by stem, such as "ema"


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of a name: ours ("bf16"), PyTorch's ("bfloat16", "torch.bfloat16") or the dtype itself. None is None.

    Raises ``ValueError`` for one that parameters cannot have."""
    names = {str(kind).removeprefix("torch."): kind for kind in DTYPES.values()} | DTYPES
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in DTYPES.values()):
        return dtype
    if (name := str(dtype).removeprefix("torch.")) not in names:
        raise ValueError(f"unknown dtype {name!r}; choose from {', '.join(DTYPES)}")
    return names[name]


_STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class PublishedFormat:
    """How a family's published folder is laid out, as the family's file describes it.

    ``weights``   stem of a safetensors file (whole, or in shards with ``STEM.safetensors.index.json``) -> its key map,
                  which may depend on the config
    ``json``      JSON files that must be there, which also tell the layout from others
    ``optional``  JSON files that are read where they are there
    ``config``    the Config that the JSON files and the tensors' names and shapes say. Raises ``ValueError``
    ``describe``  the JSON files of a Config, the inverse
    ``free``      fields of the Config that the layout does not say: how to train and draw, not what the weights are
    ``computed``  values of the tensors that a checkpoint may lack
    ``mine``      whether the JSON files are this family's, where others name theirs alike
    ``exact``     globs over our names: kept in float32 (or whole numbers) whatever they are stored in, and stored in
                  the type of the other tensors where that is narrower
    ``tokenizer`` the subfolder of the tokenizer's files; "": they lie in the folder itself
    ``elsewhere`` other stems of the same weights, which a folder that is laid over another one has in their place
    """

    weights: Mapping[str, Callable[[Any], Rules]]
    json: tuple[str, ...]
    config: Callable[[Json, States], Any]
    describe: Callable[[Any], dict[str, dict]]
    optional: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    computed: Callable[[Any], dict[str, Tensor]] = lambda config: {}
    mine: Callable[[Json], bool] = lambda json: True
    exact: tuple[str, ...] = ()
    tokenizer: str = ""
    elsewhere: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def find(self, places: Places, stem: str) -> Path | None:
        """The weights of a stem: of the first folder that has them under one of their names."""
        stems = (*self.elsewhere.get(stem, ()), stem)
        return next((path for f in places.folders for s in stems if (path := Places((f,)).weights(s))), None)


@dataclass(frozen=True)
class Places:
    """Folders searched in order: the first that has a file gives it."""

    folders: tuple[Path, ...]

    def __str__(self) -> str:
        return " over ".join(map(str, self.folders))

    def find(self, name: str) -> Path | None:
        """The file of this name, if any folder has it."""
        return next((f / name for f in self.folders if (f / name).is_file()), None)

    def weights(self, stem: str) -> Path | None:
        """The file or the index of shards of a stem. Raises ``ValueError`` where a folder has both."""
        for folder in self.folders:
            there = [f for f in (folder / f"{stem}.safetensors{end}" for end in ("", ".index.json")) if f.is_file()]
            if len(there) > 1:
                raise ValueError(f"{folder} holds both {there[0].name} and {there[1].name}; remove one")
            if there:
                return there[0]
        return None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the first folder that has one, in itself or in ``processor/``. Raises ``ValueError`` where
        none has."""
        found = (f for folder in self.folders for f in (folder, folder / "processor") if Tokenizer.there(f))
        return Tokenizer.load(next(found, self.folders[-1]))


def missing(layout: PublishedFormat, places: Places) -> list[str]:
    """The files of a layout that are not there (or are another family's), the tokenizer's aside."""
    lacks = [n for n in layout.json if not places.find(n)]
    lacks += [f"{stem}.safetensors" for stem in layout.weights if not layout.find(places, stem)]
    if layout.tokenizer and not any(Tokenizer.there(f / layout.tokenizer) for f in places.folders):
        lacks.append(f"{layout.tokenizer}/tokenizer.json")
    return lacks if lacks or tells(layout, places) else [f"{' and '.join(layout.json)} of its own"]


def tells(layout: PublishedFormat, places: Places) -> bool:
    """Whether the JSON files of this layout are there."""
    found = {name: path for name in layout.json if (path := places.find(name))}
    return len(found) == len(layout.json) and layout.mine({name: read_json(path) for name, path in found.items()})


def read_json(path: Path) -> dict:
    """A JSON object. Raises ``ValueError`` naming the file."""
    try:
        row = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(row).__name__}")
    return row


class Tensors:
    """The tensors of a safetensors file, or of the shards that an index lists, read one at a time.

    ``shapes`` are meta tensors by name, from the headers alone. Raises ``ValueError`` naming a file that is missing,
    truncated or not what the index says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, Tensor] = {}
        self._file: dict[str, Path] = {}
        index = read_json(path).get("weight_map") if path.suffix == ".json" else None
        if path.suffix == ".json" and not (isinstance(index, dict) and index):
            raise ValueError(f"{path} has no weight_map")
        for file in sorted({path.parent / name for name in index.values()}) if index else [path]:
            self._scan(file)
        if index is not None:
            wrong = [f"{name} is not in {file}" for name, file in sorted(index.items()) if self._in(name) != file]
            wrong += [f"{name} of {self._in(name)} is not listed" for name in sorted(self.shapes.keys() - index)]
            raise_all(wrong, f"{path} and its shards disagree")

    def _in(self, name: str) -> str | None:
        return self._file[name].name if name in self._file else None

    def _scan(self, file: Path) -> None:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  a handle, not a dictionary
                    header = opened.get_slice(name)
                    if (stored := header.get_dtype()) not in _STORED:
                        raise ValueError(f"{file}: {name} is stored as {stored}, which is not supported")
                    self.shapes[name] = torch.empty(header.get_shape(), dtype=_STORED[stored], device="meta")
                    self._file[name] = file
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot read {file}: {error}") from error

    def read(self, name: str) -> Tensor:
        """A tensor as stored, on the CPU: a view of the mapped file. The mapping goes with its last view, so the pages
        of a tensor do not stay in memory after it was copied."""
        try:
            with safe_open(self._file[name], "pt") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot read {self._file[name]}: {error}") from error


@dataclass(frozen=True)
class Source:
    """A model found on disk: what it is, and where its tensors are. ``dtype`` None: as stored."""

    family: str
    config: Any
    tokenizer: Tokenizer
    weights: tuple[tuple[Tensors, Rules], ...]
    where: str
    dtype: torch.dtype | None
    computed: Callable[[Any], dict[str, Tensor]] = lambda config: {}
    exact: tuple[str, ...] = ()


def open_published(family: str, layout: PublishedFormat, places: Places) -> Source:
    """A published folder. Raises ``ValueError`` naming missing and unreadable files and settings that do not fit."""
    if lacks := missing(layout, places):
        raise ValueError(f"{places} lacks {', '.join(lacks)}; a published {family} folder holds them (or give base)")
    tokenizer = places.tokenizer()
    rows = {name: read_json(path) for name in (*layout.json, *layout.optional) if (path := places.find(name))}
    tensors = {stem: Tensors(path) for stem in layout.weights if (path := layout.find(places, stem))}
    try:
        config = layout.config(rows, {stem: t.shapes for stem, t in tensors.items()})
    except ValueError as error:
        raise ValueError(f"{places}: {error}") from error
    weights = tuple((tensors[stem], rules(config)) for stem, rules in layout.weights.items())
    return Source(family, config, tokenizer, weights, str(places), None, layout.computed, layout.exact)


def make(
    source: Source,
    device: torch.device,
    dtype: torch.dtype | None,
    quantize: bool,
    prepare: Callable[[Trainable], None] | None = None,
    share: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Trainable:
    """The model of a source on ``device``, in evaluation mode, filled tensor by tensor.

    ``dtype`` is that of the parameters, None for as stored; buffers and the parts that no recipe may train (the
    autoencoder) then stay in float32. ``share`` gives what this process keeps of a tensor, in place of the model's own.
    Raises ``ValueError`` listing every missing, unknown and misshapen tensor."""
    model = create(source.family, source.config, source.tokenizer, "meta")
    if prepare:
        prepare(model)
    expected = model.state_dict()
    wrong, lacking, plans = [], [], []
    claimed: set[str] = set()
    for tensors, rules in source.weights:
        mine = {n: expected[n] for n in names(rules, expected)}
        steps, may_lack, lines = plan(rules, tensors.shapes, mine)
        wrong += lines if len(source.weights) == 1 else [f"{tensors.path.name}: {line}" for line in lines]
        claimed |= mine.keys()
        lacking += may_lack
        plans += [(tensors, step) for step in steps]
    wrong += [f"{own}: no map has a rule for this tensor of ours" for own in sorted(expected.keys() - claimed)]
    raise_all(wrong, f"{source.where} does not fit the model")
    exact = {g for part in model.frozen for g in model.parts[part]}
    parameters = {n for n, _ in model.named_parameters()}

    def chosen(own: str) -> torch.dtype | None:
        if _among(own, source.exact):
            return torch.float32
        kept = own not in parameters or any(fnmatchcase(own, g) for g in exact)
        return dtype and (torch.float32 if kept else dtype)

    if quantize:
        to_int8(model.blocks())
    for tensors, step in plans:
        _copy(model, tensors, step, device, chosen, share)
    values = source.computed(source.config) if lacking else {}
    for own in lacking:
        _place(model, own, values[own], device, chosen(own), share)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    return model.eval()


def _among(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, g) for g in globs)


def _copy(
    model: Trainable,
    tensors: Tensors,
    step: Step,
    device: torch.device,
    chosen: Callable[[str], torch.dtype | None],
    share: Callable[[Tensor, Tensor], Tensor] | None,
) -> None:
    for own, tensor in step.apply(tensors.read).items():
        _place(model, own, tensor, device, chosen(own), share)


def _place(
    model: Trainable,
    own: str,
    tensor: Tensor,
    device: torch.device,
    dtype: torch.dtype | None,
    share: Callable[[Tensor, Tensor], Tensor] | None,
) -> None:
    """Puts a copy of the tensor, or this process's share of it, where the model's own is."""
    path, _, leaf = own.rpartition(".")
    like = getattr(model.get_submodule(path), leaf)
    if share:
        tensor = share(tensor, like)
    tensor = tensor.to(device) if device.type != "cpu" else tensor
    wanted = dtype if dtype and tensor.is_floating_point() else tensor.dtype
    tensor = tensor.to(wanted, copy=device.type == "cpu").contiguous()
    model.get_submodule(path).load_state_dict({leaf: tensor}, strict=False, assign=True)


def write_published(model: Trainable, layout: PublishedFormat, folder: Path, state: State) -> None:
    """Writes a model into an existing folder as its family publishes it: the same file names and keys.

    Raises ``ValueError`` for settings that the layout cannot say."""
    rows = layout.describe(model.config)
    theirs = {}
    for stem, rules in layout.weights.items():
        mine = {n: state[n] for n in names(rules(model.config), state)}
        exact = {n: t for n, t in mine.items() if _among(n, layout.exact)}
        stored = {t.dtype for n, t in mine.items() if n not in exact}
        if len(stored) == 1 and (narrow := stored.pop()) != torch.float32:
            mine |= {n: t.to(narrow) for n, t in exact.items()}
        theirs[stem] = export(rules(model.config), mine)
    back = layout.config(rows, theirs)
    lost = [
        f"{f.name}={getattr(model.config, f.name)}"
        for f in fields(back)
        if f.name not in layout.free and getattr(back, f.name) != getattr(model.config, f.name)
    ]
    raise_all(lost, f"the published layout of {model.family} cannot say")
    for stem, tensors in theirs.items():
        write_tensors(folder / f"{stem}.safetensors", tensors)
    for name, row in rows.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(row, indent=2, ensure_ascii=False) + "\n")
    into = folder / layout.tokenizer
    into.mkdir(exist_ok=True)
    model.tokenizer.save(into, split=not (into / "tokenizer_config.json").is_file())
