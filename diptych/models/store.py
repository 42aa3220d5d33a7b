"""Creates, saves, finds and loads models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from diptych.core.errors import nearest
from diptych.machine.disk import recover
from diptych.models.configs import changed, config_from_json, config_to_json
from diptych.models.protocol import Trainable
from diptych.models.table import FAMILIES, SHIPPED, SIZES, family, published_format
from diptych.models.table import config as named_config
from diptych.parts.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from diptych.models.published.folder import PublishedFormat, SearchPath, StoredModel


Format = Literal["diptych", "published", "hf"]


def create(name: str, config: Any, tokenizer: Tokenizer | None = None, device: str = "cpu") -> Trainable:
    """An uninitialised model of a family on ``device`` (``meta`` allocates nothing)."""
    import torch
    from torch.overrides import TorchFunctionMode

    class WithoutInitialisation(TorchFunctionMode):
        """Skips ``torch.nn.init``. Its functions write nothing on the meta device, but import torch._dynamo there."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if getattr(func, "__module__", None) == "torch.nn.init":
                return args[0] if args else (kwargs or {})["tensor"]
            return func(*args, **(kwargs or {}))

    meta = torch.device(device).type == "meta"
    with torch.device(device), WithoutInitialisation() if meta else nullcontext():
        return family(name)(config, tokenizer or Tokenizer.tiny())


def skeleton(name: str) -> Trainable:
    """A model of a named size without weights (on the meta device, with the tiny tokenizer): it can lay out samples.
    Raises ``ValueError`` for an unknown name."""
    if name not in SIZES:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(SIZES)}{nearest(name, SIZES)}")
    return create(SIZES[name].family, named_config(name), Tokenizer.tiny(), "meta")


def untrained(name: str) -> Trainable:
    """A model of a named size with random weights and the tiny tokenizer. Raises ``ValueError`` for an unknown name."""
    skeleton(name)
    model = create(SIZES[name].family, named_config(name), Tokenizer.tiny())
    model.initialise(0)
    return model.eval()


def list_models() -> list[dict[str, Any]]:
    """Every named model with its parameter counts (taken on the meta device; None where a package is missing) and the
    ``sizes`` of pictures it was trained on (the fields of ``Sizes`` and their ``range`` in words)."""
    rows = []
    counts: tuple[int | None, int | None]
    for name, size in SIZES.items():
        try:
            model = skeleton(name)
            counts = sum(p.numel() for p in model.parameters()), model.activated_parameters()
        except ValueError:  # an extra that is not installed; loading the model names it
            counts = None, None
        row = {"name": name, "family": size.family, "parameters": counts[0], "activated_parameters": counts[1]}
        shipped = bool(size.folder and (SHIPPED / size.folder / "config.json").is_file())
        trained = getattr(named_config(name), "trained", None)  # an autoencoder draws no canvas
        sizes = trained and trained.to_json() | {"range": trained.range}
        rows.append(row | {"shipped": shipped, "sizes": sizes, "source": size.source})
    return rows


def save(
    model: Trainable,
    folder: str | Path,
    state: Mapping[str, Any] | None = None,
    published: bool = False,
    force: bool = False,
) -> Path:
    """Writes config.json, model.safetensors and tokenizer.json into ``folder`` and returns it; with ``published``, the
    files and tensor names of the family's published checkpoints.

    ``state`` overrides the weights (an average, another dtype). A folder that holds a model of ours is replaced. A
    folder with files that this library did not write is refused; ``force`` overwrites the files of the same names in it
    and touches no other. Raises ``ValueError`` for such a folder, for a quantised model, and for a family or settings
    without a published format."""
    from diptych.models import release
    from diptych.models.published.folder import write_published
    from diptych.parts.quantize import quantized

    if quantized(model) and not state:
        raise ValueError("a model loaded with quantize cannot be saved; load it without")
    fmt = published_format(model.family) if published else None
    if published and not fmt:
        raise ValueError(f"family {model.family!r} has no published format")
    weights = state or model.state_dict()

    def write(tmp: Path) -> None:
        if fmt:
            write_published(model, fmt, tmp, weights)
            return
        release.write_tensors(tmp / "model.safetensors", weights)
        (tmp / "config.json").write_text(json.dumps(config_to_json(model.family, model.config), indent=1))
        model.tokenizer.save(tmp)

    return release.write_model(folder, write, force)


def export(
    name_or_path: str | Path,
    folder: str | Path,
    format: Format = "diptych",
    dtype: str | None = None,
    base: str | Path | None = None,
    force: bool = False,
    adapter: str | Path | None = None,
    fresh: bool = False,
) -> Path:
    """Loads a model as ``load`` does and writes it into ``folder``, which is returned.

    ``format``  "diptych" (config.json, model.safetensors, tokenizer.json), "published" (as the family's authors publish
                it) or "hf" (the language and vision parts, for transformers)
    ``dtype``   of the parameters: "fp32", "bf16" or "fp16". By default bf16 for "diptych", else as stored. Buffers keep
                theirs, and in "published" a file of the autoencoder alone is float32, as authors publish it
    ``force``   as in ``save``
    ``adapter`` a file of low-rank adapters that are added to the weights (``models.adapters.apply``)
    ``fresh``   random weights of a named size, with the tiny tokenizer, in place of the model's

    Raises ``ValueError`` for a folder that ``save`` refuses, before anything is loaded."""
    from diptych.models import adapters, release
    from diptych.models.published.folder import pick_dtype
    from diptych.models.published.transformers import write_transformers

    if format not in get_args(Format):
        raise ValueError(f"unknown format {format!r}; choose from {', '.join(get_args(Format))}")
    kind = pick_dtype(dtype or ("bf16" if format == "diptych" else None))
    release.check_target(folder, force)
    model = untrained(str(name_or_path)) if fresh else load(name_or_path, base=base)
    if adapter is not None:
        adapters.apply(model, adapter)
    if format == "hf":
        return release.write_model(folder, lambda tmp: write_transformers(model, tmp, kind), force)
    fmt = published_format(model.family) if format == "published" else None
    kept = _frozen_files(model, fmt) if fmt else set()
    cast = {k: v.float() if k in kept else v.to(kind) for k, v in model.named_parameters()} if kind else {}
    return save(model, folder, model.state_dict() | cast, format == "published", force)


def _frozen_files(model: Trainable, fmt: PublishedFormat) -> set[str]:
    """The tensors of those published files that hold nothing but parts that no recipe may train (an autoencoder)."""
    from diptych.models.published.key_map import mapped_names

    globs = [glob for part in model.frozen for glob in model.parts[part]]
    kept: set[str] = set()
    for rules in fmt.weights.values():
        names = set(mapped_names(rules(model.config), model.state_dict()))
        if all(any(fnmatchcase(name, glob) for glob in globs) for name in names):
            kept |= names
    return kept


def remote_code(folder: str | Path) -> str:
    """What transformers needs besides a published folder to load it with ``trust_remote_code``; empty for nothing."""
    fmt = published_format(open_model(folder).family)
    return fmt.remote_code if fmt else ""


def resolve(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: a path, a run folder (its newest release), the name of a shipped size, or a model of the
    hub (``org/name``, or a size whose source is one), fetched into the hub's cache; ``revision`` is a branch, a tag or
    a commit there.

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
    if size and not size.folder:
        message = f"{str(name_or_path)!r} is a size without weights here ({size.source}); train it, or give a folder"
    else:
        message = f"no model {str(name_or_path)!r}: not a folder, and these ship: {', '.join(shipped) or 'none'}"
        message += nearest(name_or_path, SIZES)
    hub = size.source if size else str(name_or_path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub):
        raise ValueError(message)
    try:
        return fetch(hub, revision)
    except ValueError as error:
        raise ValueError(f"{message}; {error}") from error


FILES = ("*.json", "*.safetensors", "merges.txt", "tokenizer.model")  # of a model of the hub


def fetch(repository: str, revision: str | None = None) -> Path:
    """The folder of a model of the hub (``org/name``) in the hub's cache, fetched where it is not there and the hub is
    not offline (``HF_HUB_OFFLINE``). Of ``org/name/PATH`` only this file or folder is fetched, and its path is
    returned. Raises ``ValueError`` saying why it could not be."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(f"fetching {repository} needs the package huggingface_hub") from error
    try:
        organisation, name, *inside = repository.split("/", 2)
        wanted = [inside[0], f"{inside[0]}/*"] if inside else list(FILES)
        fetched = snapshot_download(f"{organisation}/{name}", revision=revision, allow_patterns=wanted)
        return Path(fetched, *inside)
    except (OSError, ValueError) as error:
        raise ValueError(f"{repository} cannot be fetched from the hub: {str(error).splitlines()[0]}") from error


def search_path(name_or_path: str | Path, base: str | Path | None = None, revision: str | None = None) -> SearchPath:
    """The folders that hold the files of a model: its own, then those of ``base`` (by default a known size's base)."""
    from diptych.models.published.folder import SearchPath

    if base is None and not Path(name_or_path).is_dir():
        base = next((s.base for n, s in SIZES.items() if str(name_or_path) in (n, s.source)), None)
    return SearchPath((resolve(name_or_path, revision), *(search_path(base).folders if base else ())))


def read_config(name_or_path: str | Path) -> dict[str, Any]:
    """The family and the fields of the Config of a folder (diptych's or a published one) or a shipped name."""
    stored = open_model(name_or_path)
    return config_to_json(stored.family, stored.config)


def family_of(name_or_path: str | Path, base: str | Path | None = None, revision: str | None = None) -> type[Trainable]:
    """The class of the family of a stored model."""
    return family(open_model(name_or_path, base, revision).family)


def open_model(name_or_path: str | Path, base: str | Path | None = None, revision: str | None = None) -> StoredModel:
    """The model of a folder or name, without its weights. Raises ``ValueError`` where there is none."""
    import torch

    from diptych.models.published import folder as folders
    from diptych.models.published.key_map import rules

    path = search_path(name_or_path, base, revision)
    config_file = path.folders[0] / "config.json"
    row = folders.read_json(config_file) if config_file.is_file() else {}
    if "family" in row:
        if base is not None:
            raise ValueError(f"{path.folders[0]} is complete in itself; base is for published folders")
        name, settings = config_from_json(row)
        tokenizer = Tokenizer.load(path.folders[0])
        tensors = folders.Tensors(path.folders[0] / "model.safetensors")
        weights = ((tensors, rules({"**": "**"})),)
        return folders.StoredModel(name, settings, tokenizer, weights, str(path), torch.float32)
    formats = {name: fmt for name in FAMILIES if (fmt := published_format(name))}
    for name, fmt in formats.items():
        if folders.has_config(fmt, path):
            return folders.open_published(name, fmt, path)
    missing = {name: ", ".join(folders.missing_files(fmt, path)) for name, fmt in formats.items()}
    lacks = [f"as a published {name} folder it lacks {files}" for name, files in missing.items()]
    raise ValueError(
        f"{path} holds no model: neither config.json nor release/config.json of ours is there, and "
        f"{'; '.join(lacks)} (base says where the rest is)"
    )


def load(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    base: str | Path | None = None,
    quantize: str | None = None,
    prepare: Callable[[Trainable], None] | None = None,
    share: Callable[[Any, Any], Any] | None = None,
    config: Any = None,
    changes: Mapping[str, Any] | None = None,
    revision: str | None = None,
) -> Trainable:
    """The model of a folder (diptych's, a run's or a published one), a shipped name or a model of the hub, for use.

    ``dtype``     of the parameters: "fp32", "bf16" or "fp16", PyTorch's longer name, or a ``torch.dtype``. By default
                  float32 for diptych's own folders and as stored for published ones. With a dtype, buffers and the
                  autoencoder are float32
    ``base``      the model whose files are taken where a published folder lacks them
    ``quantize``  "int8" rounds the weights of the blocks (``parts.quantize``): for use, not for training
    ``prepare``   is called with the empty model, on the meta device
    ``share``     maps a full tensor and the model's empty one, which ``prepare`` sharded, to what this process keeps
    ``config``    settings in place of the folder's, for tensors of the same shapes
    ``revision``  branch, tag or commit of a model of the hub
    ``changes``   leaves of the settings that are changed, by dotted path

    Tensors go one by one onto the device; on a CPU large ones of the file's own dtype stay mapped.
    Strict: missing, unknown and misshapen tensors are an error that lists them.
    """
    import torch

    from diptych.models.published import folder as folders

    requested_dtype = folders.pick_dtype(dtype)
    if quantize not in (None, "int8"):
        raise ValueError(f"unknown quantize {quantize!r}; there is int8")
    stored = open_model(name_or_path, base, revision)
    if config is not None:
        if type(config) is not type(stored.config):
            raise ValueError(
                f"{name_or_path} is of family {stored.family!r}, which has other settings than those given"
            )
        stored = replace(stored, config=config)
    stored = replace(stored, config=changed(stored.family, stored.config, changes or {}))
    parameter_dtype = requested_dtype or stored.dtype
    return folders.load_model(stored, torch.device(device), parameter_dtype, quantize is not None, prepare, share)


def load_strict(model: nn.Module, state: Mapping[str, Any], where: str) -> None:
    """Copies ``state`` into a module. Raises ``ValueError`` with every missing, unknown and misshapen tensor."""
    from diptych.models.published.key_map import conversions, raise_all, rules

    _, _, errors = conversions(rules({"**": "**"}), state, model.state_dict())
    raise_all(errors, f"{where} does not fit the model")
    model.load_state_dict(dict(state))
