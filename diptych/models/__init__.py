"""The table of families, their named sizes, and how a model is made, saved and loaded."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.models.protocol import Trainable
from diptych.parts.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import nn

    from diptych.models.folders import Layout, Places, Source

FAMILIES = {
    "bagel": "diptych.models.bagel:Bagel",
    "autoencoder": "diptych.models.autoencoder:AutoencoderTraining",
    "iomm": "diptych.models.iomm:Iomm",
    "cheers": "diptych.models.cheers:Cheers",
    "synergen": "diptych.models.synergen:SynerGen",
}


@dataclass(frozen=True)
class Size:
    """A named configuration of a family. ``source`` says where its weights come from, if anywhere."""

    family: str
    config: str  # name of the static method of the family's Config
    source: str  # an org/name of the hub, where it is one
    folder: str | None = None  # inside the package, when the weights ship
    base: str | None = None  # the model whose other files the source's weights take


SIZES: dict[str, Size] = {
    "bagel/tiny": Size("bagel", "tiny", "ships with diptych", "bagel-tiny"),
    "bagel/7b-mot": Size("bagel", "b7_mot", "ByteDance-Seed/BAGEL-7B-MoT"),
    "bagel/7b-sgt": Size("bagel", "b7_mot", "Two-hot/SGT-BAGEL", base="bagel/7b-mot"),
    "autoencoder/tiny": Size("autoencoder", "tiny", "ships with diptych", "autoencoder-tiny"),
    "iomm/tiny": Size("iomm", "tiny", "ships with diptych", "iomm-tiny"),
    "iomm/b": Size("iomm", "b", "arXiv 2603.16139, not released"),
    "iomm/l": Size("iomm", "l", "arXiv 2603.16139, not released"),
    "iomm/xl": Size("iomm", "xl", "arXiv 2603.16139, not released"),
    "cheers/tiny": Size("cheers", "tiny", "ships with diptych", "cheers-tiny"),
    "cheers/1.5b": Size("cheers", "b1_5", "ai9stars/Cheers"),
    "synergen/tiny": Size("synergen", "tiny", "ships with diptych", "synergen-tiny"),
    "synergen/2b": Size("synergen", "b2", "no weights were published"),
    "synergen/qwen2-0.5b": Size("synergen", "qwen2", "no weights were published"),
    "autoencoder/vq-tiny": Size("autoencoder", "vq_tiny", "ships with diptych", "vq-tiny"),
}
SHIPPED = Path(__file__).parent.parent / "checkpoints"


def family(name: str) -> type[Trainable]:
    """The class of a family. Raises ``ValueError`` listing the families."""
    if name not in FAMILIES:
        raise ValueError(f"unknown family {name!r}; choose from {', '.join(FAMILIES)}")
    module, cls = FAMILIES[name].split(":")
    return getattr(importlib.import_module(module), cls)


def config_class(name: str) -> type:
    """The Config dataclass of a family."""
    family(name)
    return importlib.import_module(FAMILIES[name].split(":")[0]).Config


def published_layout(name: str) -> Layout | None:
    """How a family's published folders are laid out (``PUBLISHED`` of its file), if it has any."""
    family(name)
    return getattr(importlib.import_module(FAMILIES[name].split(":")[0]), "PUBLISHED", None)


def config(size: str) -> Any:
    """The configuration of a named size, such as ``bagel/tiny``. Raises ``ValueError`` listing the sizes."""
    if size not in SIZES:
        raise ValueError(f"unknown model {size!r}; choose from {', '.join(SIZES)}")
    return getattr(config_class(SIZES[size].family), SIZES[size].config)()


def config_from_json(row: Mapping[str, Any]) -> tuple[str, Any]:
    """(family, Config) of a ``config.json``. Raises ``ValueError`` naming unknown families, fields and bad values."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    row = dict(row)
    name = row.pop("family", None)
    cls = config_class(str(name))
    for part in _dataclasses(cls):
        setattr(part, "__pydantic_config__", ConfigDict(extra="forbid"))  # noqa: B010
    try:
        return str(name), TypeAdapter(cls).validate_python(row)
    except ValidationError as error:
        lines = [f"{name}.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ValueError("bad model config: " + "; ".join(lines)) from error


def config_to_json(name: str, config: Any) -> dict:
    """The ``config.json`` of a model: its family and every field, as JSON has them (lists, not tuples)."""
    return {"family": name, **json.loads(json.dumps(asdict(config)))}


def _dataclasses(cls: type) -> set[type]:
    from dataclasses import fields, is_dataclass
    from typing import get_args, get_type_hints

    found, queue = set(), [cls]
    while queue:
        item = queue.pop()
        if isinstance(item, type) and is_dataclass(item) and item not in found:
            found.add(item)
            hints = get_type_hints(item)
            queue += [hints[f.name] for f in fields(item)]
        else:
            queue += get_args(item)
    return found


def create(name: str, config: Any, tokenizer: Tokenizer | None = None, device: str = "cpu") -> Trainable:
    """An uninitialised model of a family on ``device`` (``meta`` allocates nothing)."""
    import torch

    with torch.device(device):
        return family(name)(config, tokenizer or Tokenizer.tiny())


def save(model: Trainable, folder: str | Path, state: Mapping[str, Any] | None = None, published: bool = False) -> None:
    """Writes config.json, model.safetensors and tokenizer.json, under a temporary name that is then renamed; with
    ``published`` the files and tensor names that the family's published checkpoints have.

    ``state`` overrides the weights (an average, another dtype). An existing folder is replaced as a whole. Raises
    ``ValueError`` for a quantised model and for a family or settings that are not published like that."""
    from safetensors.torch import save_file

    from diptych.models.folders import write_published
    from diptych.parts.quantize import quantized

    if quantized(model) and not state:
        raise ValueError("a model loaded with quantize cannot be saved; load it without")
    layout = published_layout(model.family) if published else None
    if published and not layout:
        raise ValueError(f"family {model.family!r} has no published layout")
    weights = state or model.state_dict()

    def write(tmp: Path) -> None:
        if layout:
            write_published(model, layout, tmp, weights)
            return
        tensors = {k: v.detach().contiguous().cpu() for k, v in weights.items()}
        save_file(tensors, tmp / "model.safetensors", metadata={"format": "pt"})
        (tmp / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
        (tmp / "config.json").write_text(json.dumps(config_to_json(model.family, model.config), indent=1))
        model.tokenizer.save(tmp)

    write_folder(Path(folder), write)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Calls ``write`` on a temporary folder, then renames it ``folder``: a kill leaves the old one or the new one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    tmp, old = folder.with_name(f".{folder.name}.{os.getpid()}.tmp"), folder.with_name(f".{folder.name}.old")
    for stale in folder.parent.glob(f".{escape(folder.name)}.*.tmp"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    try:
        tmp.mkdir()
        write(tmp)
        if folder.exists():
            folder.rename(old)
        tmp.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        recover(folder)
        shutil.rmtree(tmp, ignore_errors=True)


def recover(folder: Path) -> None:
    """Brings back the old folder where a kill fell between the two renames of ``write_folder``."""
    old = folder.with_name(f".{folder.name}.old")
    if old.is_dir():
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)


def resolve(name_or_path: str | Path) -> Path:
    """The folder of a model: a path, a run folder (its newest release), the name of a shipped size, or a model of the
    hub (``org/name``, or a size whose source is one), fetched into the hub's cache.

    Raises ``ValueError`` listing what ships."""
    path = Path(name_or_path)
    for folder in (path, path / "release"):
        recover(folder)
    for folder in (path, path / "release"):
        if (folder / "config.json").is_file():
            return folder
    size = SIZES.get(str(name_or_path))
    if size and size.folder and (SHIPPED / size.folder / "config.json").is_file():
        return SHIPPED / size.folder
    if path.is_dir():
        return path
    shipped = [n for n, s in SIZES.items() if s.folder and (SHIPPED / s.folder / "config.json").is_file()]
    told = f"no model {str(name_or_path)!r}: not a folder, and these ship: {', '.join(shipped) or 'none'}"
    hub = size.source if size else str(name_or_path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub):
        raise ValueError(told)
    try:
        return fetch(hub)
    except ValueError as error:
        raise ValueError(f"{told}; {error}") from error


def fetch(repository: str) -> Path:
    """The folder of a model of the hub (``org/name``) in the hub's cache, fetched where it is not there and the hub is
    not offline (``HF_HUB_OFFLINE``). Raises ``ValueError`` saying why it could not be."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(f"fetching {repository} needs the package huggingface_hub") from error
    try:
        return Path(snapshot_download(repository, allow_patterns=["*.json", "*.safetensors", "merges.txt"]))
    except (OSError, ValueError) as error:
        raise ValueError(f"{repository} cannot be fetched from the hub: {str(error).splitlines()[0]}") from error


def places(name_or_path: str | Path, base: str | Path | None = None) -> Places:
    """Where the files of a model are looked for: its folder, then those of ``base`` (of a known size: its own base)."""
    from diptych.models.folders import Places

    if base is None and not Path(name_or_path).is_dir():
        base = next((s.base for n, s in SIZES.items() if str(name_or_path) in (n, s.source)), None)
    return Places((resolve(name_or_path), *(places(base).folders if base else ())))


def read_config(name_or_path: str | Path) -> dict[str, Any]:
    """The family and the fields of the Config of a folder (ours or a published one) or a shipped name."""
    source = open_source(name_or_path)
    return config_to_json(source.family, source.config)


def pick_device(device: str) -> str:
    """The device to use: ``auto`` is a GPU when there is one. Raises ``ValueError`` for one that is not there."""
    import torch

    there = [
        "cpu",
        *(["cuda"] if torch.cuda.is_available() else []),
        *(["mps"] if torch.backends.mps.is_available() else []),
    ]
    if device == "auto":
        return "cuda" if "cuda" in there else "cpu"
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"unknown device {device!r}; choose from auto, cpu, cuda, mps")
    if kind not in there:
        raise ValueError(f"device {device!r} is not there; this machine has {', '.join(there)}")
    return device


def open_source(name_or_path: str | Path, base: str | Path | None = None) -> Source:
    """What a model on disk is and where its tensors are, with nothing loaded yet. Raises ``ValueError``."""
    import torch

    from diptych.models import folders
    from diptych.models.weights import rules

    where = places(name_or_path, base)
    ours = where.folders[0] / "config.json"
    row = folders.read_json(ours) if ours.is_file() else {}
    if "family" in row:
        if base is not None:
            raise ValueError(f"{where.folders[0]} is complete in itself; base is for published folders")
        name, settings = config_from_json(row)
        tokenizer = Tokenizer.load(where.folders[0])
        tensors = folders.Tensors(where.folders[0] / "model.safetensors")
        weights = ((tensors, rules({"**": "**"})),)
        return folders.Source(name, settings, tokenizer, weights, str(where), torch.float32)
    layouts = {name: layout for name in FAMILIES if (layout := published_layout(name))}
    for name, layout in layouts.items():
        if folders.tells(layout, where):
            return folders.open_published(name, layout, where)
    lacks = [f"as a published {n} folder it lacks {', '.join(folders.missing(x, where))}" for n, x in layouts.items()]
    raise ValueError(
        f"{where} holds no model: neither config.json nor release/config.json of ours is there, and "
        f"{'; '.join(lacks)} (base says where the rest is)"
    )


def load(
    name_or_path: str | Path,
    device: str = "cpu",
    dtype: str | None = None,
    base: str | Path | None = None,
    quantize: str | None = None,
    prepare: Callable[[Trainable], None] | None = None,
    share: Callable[[Any, Any], Any] | None = None,
    config: Any = None,
) -> Trainable:
    """The model of a folder (ours, a run's or a published one), a shipped name or a model of the hub, for use.

    ``dtype``     of the parameters: "fp32", "bf16" or "fp16". By default float32 for our own folders and as stored for
                  published ones. Buffers and the autoencoder are float32 where it is given
    ``base``      the model whose files are taken where a published folder lacks them
    ``quantize``  "int8" rounds the weights of the blocks (``parts.quantize``): for use, not for training
    ``prepare``   is called with the empty model, on the meta device
    ``share``     what this process keeps of a tensor, in place of one of the model's own that ``prepare`` sharded
    ``config``    settings in place of the folder's, for tensors of the same shapes

    Tensors go one by one onto the device. Strict: missing, unknown and misshapen tensors are an error that lists them.
    """
    import torch

    from diptych.models import folders

    if dtype is not None and dtype not in folders.DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose from {', '.join(folders.DTYPES)}")
    if quantize not in (None, "int8"):
        raise ValueError(f"unknown quantize {quantize!r}; there is int8")
    source = open_source(name_or_path, base)
    if config is not None:
        if type(config) is not type(source.config):
            raise ValueError(
                f"{name_or_path} is of family {source.family!r}, which has other settings than those given"
            )
        source = replace(source, config=config)
    kind = source.dtype if dtype is None else folders.DTYPES[dtype]
    return folders.make(source, create, torch.device(device), kind, quantize is not None, prepare, share)


def load_strict(model: nn.Module, state: Mapping[str, Any], where: str) -> None:
    """Copies ``state`` into a module. Raises ``ValueError`` with every missing, unknown and misshapen tensor."""
    from diptych.models.weights import plan, raise_all, rules

    _, _, wrong = plan(rules({"**": "**"}), state, model.state_dict())
    raise_all(wrong, f"{where} does not fit the model")
    model.load_state_dict(dict(state))
