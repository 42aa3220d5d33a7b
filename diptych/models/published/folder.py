"""Model folders: which files hold what, and a model filled from them tensor by tensor.

A ``PublishedFormat`` describes the folder of a family; the mechanism is the same for all. Files may lie in several
folders that are searched in order: a folder with only fine-tuned weights comes before the folder of its base model.
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
from diptych.models.published.key_map import Conversion, Rules, State, conversions, export, mapped_names, raise_all
from diptych.models.release import write_tensors
from diptych.models.store import create
from diptych.parts.quantize import to_int8
from diptych.parts.tokenizer import Tokenizer

Json = Mapping[str, Mapping[str, Any]]  # content by file name


States = Mapping[str, State]  # tensors by stem, such as "ema"


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of a name: "bf16", PyTorch's "bfloat16" or "torch.bfloat16", or the dtype itself. None stays None.

    Raises ``ValueError`` for a dtype that parameters cannot have."""
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
    """The files of a family's published folder and what they contain.

    ``weights``      stem of a safetensors file (whole, or in shards with ``STEM.safetensors.index.json``) -> its key
                     map, which may depend on the config
    ``json``         required JSON files, which also distinguish the format from others
    ``optional``     JSON files that are read if they exist
    ``config``       the Config from the JSON files and the names and shapes of the tensors. Raises ``ValueError``
    ``describe``     the JSON files of a Config, the inverse
    ``unstored``     fields of the Config that the files do not contain: they concern training and sampling
    ``computed``     values of the tensors that a checkpoint may lack
    ``matches``      whether the JSON files belong to this family, where other families use the same file names
    ``float32``      globs over native names. These tensors are loaded as float32 (or integers) whatever their stored
                     dtype, and written in the dtype of the other tensors where that is narrower
    ``remote_code``  what transformers needs besides to load the folder with ``trust_remote_code``, and from where
    ``tokenizer``    the subfolder of the tokenizer's files; "" for the folder itself
    ``other_stems``  stem -> other stems of the same weights, which folders that need a ``base`` use
    ``adapters``     the first component of the names in the published trainer's files of adapters, and the stem of the
                     weights that they change
    """

    weights: Mapping[str, Callable[[Any], Rules]]
    json: tuple[str, ...]
    config: Callable[[Json, States], Any]
    describe: Callable[[Any], dict[str, dict]]
    optional: tuple[str, ...] = ()
    unstored: tuple[str, ...] = ()
    computed: Callable[[Any], dict[str, Tensor]] = lambda config: {}
    matches: Callable[[Json], bool] = lambda json: True
    float32: tuple[str, ...] = ()
    tokenizer: str = ""
    remote_code: str = ""
    other_stems: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    adapters: tuple[str, str] | None = None

    def find(self, search_path: SearchPath, stem: str) -> Path | None:
        """The weights of a stem, from the first folder that has them under any of their stems."""
        stems = (*self.other_stems.get(stem, ()), stem)
        return next((path for f in search_path.folders for s in stems if (path := SearchPath((f,)).weights(s))), None)


@dataclass(frozen=True)
class SearchPath:
    """Folders that are searched in order: a file comes from the first one that has it."""

    folders: tuple[Path, ...]

    def __str__(self) -> str:
        return " over ".join(map(str, self.folders))

    def find(self, name: str) -> Path | None:
        """The first file of this name, or None."""
        return next((f / name for f in self.folders if (f / name).is_file()), None)

    def weights(self, stem: str) -> Path | None:
        """The safetensors file of a stem or the index of its shards, or None. Raises ``ValueError`` where a folder has
        both."""
        for folder in self.folders:
            files = [f for f in (folder / f"{stem}.safetensors{end}" for end in ("", ".index.json")) if f.is_file()]
            if len(files) > 1:
                raise ValueError(f"{folder} holds both {files[0].name} and {files[1].name}; remove one")
            if files:
                return files[0]
        return None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the first folder that has one, directly or in ``processor/``. Raises ``ValueError`` where
        none has one."""
        candidates = (f for folder in self.folders for f in (folder, folder / "processor") if Tokenizer.there(f))
        return Tokenizer.load(next(candidates, self.folders[-1]))


def missing_files(fmt: PublishedFormat, search_path: SearchPath) -> list[str]:
    """The files of a format that do not exist or belong to another family, apart from an unnested tokenizer's."""
    missing = [n for n in fmt.json if not search_path.find(n)]
    missing += [f"{stem}.safetensors" for stem in fmt.weights if not fmt.find(search_path, stem)]
    if fmt.tokenizer and not any(Tokenizer.there(f / fmt.tokenizer) for f in search_path.folders):
        missing.append(f"{fmt.tokenizer}/tokenizer.json")
    return missing if missing or has_config(fmt, search_path) else [f"{' and '.join(fmt.json)} of its own"]


def has_config(fmt: PublishedFormat, search_path: SearchPath) -> bool:
    """Whether all required JSON files of this format exist and belong to its family."""
    files = {name: path for name in fmt.json if (path := search_path.find(name))}
    return len(files) == len(fmt.json) and fmt.matches({name: read_json(path) for name, path in files.items()})


def read_json(path: Path) -> dict:
    """A JSON object. Raises ``ValueError`` naming the file."""
    try:
        row = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(row).__name__}")
    return row


MAPPED = 2**20  # bytes from which a tensor stays mapped; smaller ones are copied to addresses that kernels prefer


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
            errors = [f"{name} is not in {file}" for name, file in sorted(index.items()) if self._in(name) != file]
            errors += [f"{name} of {self._in(name)} is not listed" for name in sorted(self.shapes.keys() - index)]
            raise_all(errors, f"{path} and its shards disagree")

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
        """A tensor as stored, on the CPU: a view of the memory-mapped file. The mapping ends with its last view, so the
        pages of a tensor leave memory once it is copied."""
        try:
            with safe_open(self._file[name], "pt") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot read {self._file[name]}: {error}") from error


@dataclass(frozen=True)
class StoredModel:
    """A model on disk whose weights are not loaded yet.

    ``weights``   each file's tensors with its key map
    ``path``      the folder or folders, for messages
    ``dtype``     of the parameters; None for as stored
    ``computed``  values of the tensors that the files may lack, from the config
    ``float32``   globs over native names: see ``PublishedFormat``
    """

    family: str
    config: Any
    tokenizer: Tokenizer
    weights: tuple[tuple[Tensors, Rules], ...]
    path: str
    dtype: torch.dtype | None
    computed: Callable[[Any], dict[str, Tensor]] = lambda config: {}
    float32: tuple[str, ...] = ()


def open_published(family: str, fmt: PublishedFormat, search_path: SearchPath) -> StoredModel:
    """The model of a published folder. Raises ``ValueError`` naming missing and unreadable files and settings that do
    not fit."""
    if missing := missing_files(fmt, search_path):
        raise ValueError(
            f"{search_path} lacks {', '.join(missing)}; a published {family} folder holds them (or give base)"
        )
    tokenizer = search_path.tokenizer()
    rows = {name: read_json(path) for name in (*fmt.json, *fmt.optional) if (path := search_path.find(name))}
    tensors = {stem: Tensors(path) for stem in fmt.weights if (path := fmt.find(search_path, stem))}
    try:
        config = fmt.config(rows, {stem: t.shapes for stem, t in tensors.items()})
    except ValueError as error:
        raise ValueError(f"{search_path}: {error}") from error
    weights = tuple((tensors[stem], rules(config)) for stem, rules in fmt.weights.items())
    return StoredModel(family, config, tokenizer, weights, str(search_path), None, fmt.computed, fmt.float32)


def load_model(
    stored: StoredModel,
    device: torch.device,
    dtype: torch.dtype | None,
    quantize: bool,
    prepare: Callable[[Trainable], None] | None = None,
    share: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Trainable:
    """The stored model on ``device``, in evaluation mode, filled tensor by tensor.

    ``dtype`` is that of the parameters, None for as stored; with a ``dtype``, buffers and the parts that no recipe may
    train (the autoencoder) are float32. ``share`` maps a full tensor and the model's empty one to what this process
    keeps. Raises ``ValueError`` listing every missing, unknown and misshapen tensor."""
    model = create(stored.family, stored.config, stored.tokenizer, "meta")
    if prepare:
        prepare(model)
    expected = model.state_dict()
    errors, absent, steps = [], [], []
    mapped: set[str] = set()
    for tensors, rules in stored.weights:
        state = {n: expected[n] for n in mapped_names(rules, expected)}
        file_steps, file_absent, file_errors = conversions(rules, tensors.shapes, state)
        errors += file_errors if len(stored.weights) == 1 else [f"{tensors.path.name}: {e}" for e in file_errors]
        mapped |= state.keys()
        absent += file_absent
        steps += [(tensors, step) for step in file_steps]
    errors += [f"{name}: no map has a rule for this tensor of ours" for name in sorted(expected.keys() - mapped)]
    raise_all(errors, f"{stored.path} does not fit the model")
    frozen = {g for part in model.frozen for g in model.parts[part]}
    parameters = {n for n, _ in model.named_parameters()}

    def dtype_of(name: str) -> torch.dtype | None:
        if _matches_any(name, stored.float32):
            return torch.float32
        full_precision = name not in parameters or any(fnmatchcase(name, g) for g in frozen)
        return dtype and (torch.float32 if full_precision else dtype)

    if quantize:
        to_int8(model.blocks())
    for tensors, step in steps:
        _load_tensors(model, tensors, step, device, dtype_of, share)
    values = stored.computed(stored.config) if absent else {}
    for name in absent:
        _assign(model, name, values[name], device, dtype_of(name), share)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    return model.eval()


def _matches_any(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, g) for g in globs)


def _load_tensors(
    model: Trainable,
    tensors: Tensors,
    step: Conversion,
    device: torch.device,
    dtype_of: Callable[[str], torch.dtype | None],
    share: Callable[[Tensor, Tensor], Tensor] | None,
) -> None:
    """Reads, converts and assigns one published tensor. It is freed on return, before the next one is read."""
    for name, tensor in step.apply(tensors.read).items():
        _assign(model, name, tensor, device, dtype_of(name), share)


def _assign(
    model: Trainable,
    name: str,
    tensor: Tensor,
    device: torch.device,
    dtype: torch.dtype | None,
    share: Callable[[Tensor, Tensor], Tensor] | None,
) -> None:
    """Replaces the model's empty tensor by a copy of ``tensor``, or of this process's share of it. On a CPU a large
    tensor of the right dtype is not copied: it stays a private mapping of the file, which writes do not reach."""
    path, _, leaf = name.rpartition(".")
    if share:
        tensor = share(tensor, getattr(model.get_submodule(path), leaf))
    tensor = tensor.to(device) if device.type != "cpu" else tensor
    wanted = dtype if dtype and tensor.is_floating_point() else tensor.dtype
    copied = device.type == "cpu" and (share is not None or tensor.nbytes < MAPPED)
    tensor = tensor.to(wanted, copy=copied).contiguous()
    model.get_submodule(path).load_state_dict({leaf: tensor}, strict=False, assign=True)


def write_published(model: Trainable, fmt: PublishedFormat, folder: Path, state: State) -> None:
    """Writes the native ``state`` of a model into an existing folder in its family's published format: the same file
    names and keys.

    Raises ``ValueError`` for settings that the format cannot represent."""
    rows = fmt.describe(model.config)
    files = {}
    for stem, rules in fmt.weights.items():
        native = {n: state[n] for n in mapped_names(rules(model.config), state)}
        float32 = {n: t for n, t in native.items() if _matches_any(n, fmt.float32)}
        dtypes = {t.dtype for n, t in native.items() if n not in float32}
        if len(dtypes) == 1 and (narrow := dtypes.pop()) != torch.float32:
            native |= {n: t.to(narrow) for n, t in float32.items()}
        files[stem] = export(rules(model.config), native)
    reread = fmt.config(rows, files)
    lost = [
        f"{f.name}={getattr(model.config, f.name)}"
        for f in fields(reread)
        if f.name not in fmt.unstored and getattr(reread, f.name) != getattr(model.config, f.name)
    ]
    raise_all(lost, f"the published format of {model.family} cannot represent")
    for stem, tensors in files.items():
        write_tensors(folder / f"{stem}.safetensors", tensors)
    for name, row in rows.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(row, indent=2, ensure_ascii=False) + "\n")
    into = folder / fmt.tokenizer
    into.mkdir(exist_ok=True)
    model.tokenizer.save(into, split=not (into / "tokenizer_config.json").is_file())
