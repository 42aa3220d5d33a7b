"""What every family offers, and nothing else may be asked of one.

``Trainable`` is enough for the training loop; ``UnifiedModel`` adds reading and drawing. Families are final: they
inherit from one of these and from nothing else of ours.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from diptych.core.batch import Batch, Pictures
from diptych.core.losses import Losses
from diptych.core.noise import Noise
from diptych.core.sample import Image, Sample
from diptych.core.sequence import Sequence as Laid
from diptych.core.tensors import Float, Tensor
from diptych.parts.codes import CodeSettings
from diptych.parts.flow import FlowSettings
from diptych.parts.routed import spare_parameters
from diptych.parts.tokenizer import Tokenizer

Drop = frozenset[str]  # which of a family's conditions to leave out
NOTHING: Drop = frozenset()


@dataclass(frozen=True, eq=False)
class Context:
    """What a model has read so far. Reading returns a new context; the old one stays usable."""

    cache: Any  # the family's: a parts.attention.Cache for most
    length: int = 0  # tokens read
    position: int = 0  # next position id
    logits: Tensor = field(
        default_factory=lambda: torch.empty(0)
    )  # (V,) scores of the next word; none before the first
    slot: Any = None  # family-private


@dataclass(frozen=True, eq=False)
class Drawing:
    """A picture in the making: ``state`` is noise on its way to latents, or a grid of codes being filled."""

    state: Tensor
    contexts: tuple[Context, ...]  # one per branch of guidance, as ``branches`` listed them
    canvas: tuple[int, int]  # (height, width) in pixels
    settings: Any  # the family's own
    step: int
    steps: int
    slot: Any = None  # family-private

    @property
    def done(self) -> bool:
        """Whether only ``finish`` is left."""
        return self.step >= self.steps


class Encoder(NamedTuple):
    """A frozen encoder whose outputs may be computed once and kept: where it is, and what decides what it is shown."""

    modules: tuple[str, ...]  # of the family
    settings: tuple[str, ...]  # fields of its Config


class Trainable(nn.Module, ABC):
    """A network that lays out its own samples and owns its loss."""

    family: ClassVar[str]
    parts: ClassVar[
        Mapping[str, tuple[str, ...]]
    ]  # part name -> globs over parameter names; each parameter in one part
    routes: ClassVar[int] = 1  # how many experts ``core.batch.pack`` prepares index lists for
    frozen: ClassVar[frozenset[str]] = frozenset()  # parts that no recipe may train
    conditions: ClassVar[tuple[str, ...]] = ()  # what ``lay_out`` can drop, such as "text" and "image"
    encoders: ClassVar[Mapping[str, Encoder]] = {}  # frozen encoders that ``lay_out`` names (``Image.through``)
    config: Any
    tokenizer: Tokenizer

    @abstractmethod
    def lay_out(self, sample: Sample, drop: Drop = NOTHING) -> Laid:
        """The sample as segments; ``drop`` names conditions to leave out (guidance, and dropout in training).

        A request (``sample.is_open``) ends where its answer or its picture begins, whatever opens it included; pictures
        before that have been drawn, so they are read. In a training sample a target is drawn, and read by what follows.
        Pure: no network, no random state. Raises ``ValueError`` for what the family cannot lay out."""

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, float]:
        """How many elements each loss term has, from the batch alone: known before any forward, so that counts can be
        added over micro-batches and processes before the first backward."""

    @abstractmethod
    def losses(self, batch: Batch, noise: Noise) -> Losses:
        """The loss terms of a batch as (sum, count), with the names and counts of ``counts``."""

    def forward(self, batch: Batch, noise: Noise) -> Losses:
        """``losses``: the only way in for training."""
        return self.losses(batch, noise)

    @abstractmethod
    def blocks(self) -> Iterator[nn.Module]:
        """What to recompute and to compile one by one."""

    def trunk(self) -> Iterator[nn.Module]:
        """Those of ``blocks`` that every forward calls, and calls equally often, whatever the batch holds: sharded one
        by one. What batches may lack (a vision encoder) or call once for every shape of pictures is gathered with the
        rest. Processes that share a model wait for each other in every call, so each of them goes backward too: the
        loss of any batch depends on the trunk's output."""
        yield from self.blocks()

    @abstractmethod
    def initialise(self, seed: int) -> None:
        """Fresh weights, the same for the same seed."""

    def encode(self, encoder: str, images: Tensor) -> Tensor:
        """What one of ``encoders`` makes of N pictures of one shape as segments hold them, (N, ...), before anything
        that is trained or random: what segments hold with ``encoded``, and what ``diptych data precompute`` keeps."""
        raise NotImplementedError(f"{self.family} declares encoders and lacks encode")

    def digest(self, encoder: str) -> str:
        """Hex digest of everything that decides what ``encoder`` makes of a picture: weights and settings."""
        modules, settings = self.encoders[encoder]
        values = {name: getattr(self.config, name) for name in settings}
        plain = {name: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for name, v in values.items()}
        made = hashlib.sha256(json.dumps([self.family, encoder, plain], sort_keys=True).encode())
        for module in modules:
            for name, tensor in sorted(self.get_submodule(module).state_dict().items()):
                whole = (
                    tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                )  # shards of several processes
                made.update(f"{module}.{name} {whole.dtype} {tuple(whole.shape)}".encode())
                made.update(whole.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return made.hexdigest()[:32]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def activated_parameters(self) -> int:
        """Parameters that serve one token: all but one copy of every routed module."""
        return sum(p.numel() for p in self.parameters()) - spare_parameters(self)


class UnifiedModel(Trainable):
    """A family that reads pictures and draws them. Generation takes lists: one request is a list of one."""

    settings: Any  # the family's own frozen dataclass; these suit the weights

    @abstractmethod
    def canvas(self, sample: Sample) -> tuple[int, int]:
        """The (height, width) to draw for a request: the size it asks for, else that of the picture it edits, else the
        model's own. Raises ``ValueError`` for a size that cannot be drawn."""

    @abstractmethod
    def open(self) -> Context:
        """An empty context."""

    @abstractmethod
    def extend(self, contexts: Sequence[Context], sequences: Sequence[Laid]) -> list[Context]:
        """The contexts after reading one sequence each; their logits predict the next word."""

    @abstractmethod
    def reply(self, ids: Sequence[int], drop: Drop = NOTHING) -> Laid:
        """Words of an answer, as a sequence to read on; with ``drop``, as a branch of guidance reads them."""

    def rewind(self, context: Context, length: int, position: int) -> Context:
        """The context as it was after its first ``length`` tokens, where position ids stood at ``position``; read on
        before asking for words."""
        return replace(context, length=length, position=position, logits=torch.empty(0))

    @property
    @abstractmethod
    def stop_ids(self) -> frozenset[int]:
        """Words that end an answer."""

    @abstractmethod
    def branches(self, sample: Sample, settings: Any) -> tuple[Drop, ...]:
        """The contexts that drawing a request needs, the full one first: what ``lay_out`` must drop for each."""

    @abstractmethod
    def start(
        self,
        contexts: Sequence[tuple[Context, ...]],
        canvases: Sequence[tuple[int, int]],
        settings: Sequence[Any],
        seeds: Sequence[int],
    ) -> list[Drawing]:
        """Begins pictures: noise or an empty grid, drawn from each picture's own seed."""

    @abstractmethod
    def step(self, drawings: Sequence[Drawing]) -> list[Drawing]:
        """One denoising step, or one patch of codes, for all of them at once. They must be of one canvas size and have
        equally many branches. Raises ``ValueError`` otherwise, and for a drawing that is done."""

    @abstractmethod
    def preview(self, drawings: Sequence[Drawing]) -> Float[Tensor, "B 3 H W"]:
        """The pictures as they would look if drawing ended here."""

    @abstractmethod
    def finish(self, drawings: Sequence[Drawing]) -> Float[Tensor, "B 3 H W"]:
        """The pictures in [-1, 1]."""


def advance(drawing: Drawing, state: Tensor, slot: Any = None) -> Drawing:
    """The drawing one step on."""
    return replace(drawing, state=state, step=drawing.step + 1, slot=slot)


# ---- what families that draw share ------------------------------------------------------------------------------


def shown(sample: Sample) -> list[Image]:
    """The pictures of a request's conversation, in order."""
    return [p for p in sample.images() if not p.blank]


def draw_noise(noise: Noise, group: Pictures, name: str, shape: tuple[int, ...]) -> Tensor:
    """Normal draws for every picture of a group, (N, *shape), each from its own address."""
    return torch.stack(
        [noise.normal(o, f"{name}{i}", shape) for o, i in zip(group.owners, group.ordinals, strict=True)]
    )


def read_on(
    contexts: Sequence[Context], sequences: Sequence[Laid], caches: Sequence[Any], logits: Float[Tensor, "B V"]
) -> list[Context]:
    """The contexts after their sequences were read into ``caches``, with the scores of their next words."""
    return [
        Context(cache, c.length + len(s), c.position + sum(x.moves for x in s.segments), scores, c.slot)
        for cache, c, s, scores in zip(caches, contexts, sequences, logits, strict=True)
    ]


def flow_branches(sample: Sample, settings: FlowSettings | CodeSettings) -> tuple[Drop, ...]:
    """Full; without text when its scale exceeds 1; without pictures when the conversation shows some and their scale
    exceeds 1. There is no guidance at all when the text scale is at most 1."""
    if settings.guidance_scale <= 1:
        return (NOTHING,)
    if shown(sample) and settings.image_guidance_scale > 1:
        return (NOTHING, frozenset({"text"}), frozenset({"image"}))
    return (NOTHING, frozenset({"text"}))


def draw_weights(
    model: nn.Module, generator: torch.Generator, depth: Mapping[str, int], embedding: float = 0.3
) -> None:
    """Draws linear weights with variance 1 / inputs and zero biases; those that write to a residual stream of ``depth``
    layers (by the module's first name) are smaller by sqrt(2 depth). The autoencoder is left alone."""
    for name, module in model.named_modules():
        if name.startswith("autoencoder"):
            continue
        if isinstance(module, nn.Linear):
            std = module.in_features**-0.5
            if name.endswith((".out_proj", ".fc2", ".down_proj", ".o_proj")) or ".o_proj." in name:
                std /= (2 * depth.get(name.split(".")[0], 0.5)) ** 0.5
            nn.init.normal_(module.weight, std=std, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=embedding, generator=generator)
