"""The table of families and of their named sizes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.models.protocol import Trainable

if TYPE_CHECKING:
    from diptych.models.published.folder import PublishedFormat


FAMILIES = {
    "bagel": "diptych.models.bagel:Bagel",
    "autoencoder": "diptych.models.autoencoder:AutoencoderTraining",
    "iomm": "diptych.models.iomm:Iomm",
    "cheers": "diptych.models.cheers:Cheers",
    "synergen": "diptych.models.synergen:SynerGen",
    "omnigen2": "diptych.models.omnigen2:OmniGen2",
}
PUBLISHED = {
    "bagel": "diptych.models.published.bagel",
    "cheers": "diptych.models.published.cheers",
    "omnigen2": "diptych.models.published.omnigen2",
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
    "bagel/tiny-published": Size("bagel", "tiny_published", "random weights: diptych export --fresh"),
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
    "omnigen2/tiny": Size("omnigen2", "tiny", "not trained yet"),
    "omnigen2/3b-4b": Size("omnigen2", "b3_4", "OmniGen2/OmniGen2"),
    "omnigen2/3b-4b-sgt": Size("omnigen2", "b3_4", "Two-hot/SGT-Gen2", base="omnigen2/3b-4b"),
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


def published_format(name: str) -> PublishedFormat | None:
    """The format of a family's published folders, or None where the family has none."""
    family(name)
    if name not in PUBLISHED:
        return None
    return importlib.import_module(PUBLISHED[name]).PUBLISHED


def config(size: str) -> Any:
    """The configuration of a named size, such as ``bagel/tiny``. Raises ``ValueError`` listing the sizes."""
    if size not in SIZES:
        raise ValueError(f"unknown model {size!r}; choose from {', '.join(SIZES)}")
    return getattr(config_class(SIZES[size].family), SIZES[size].config)()
