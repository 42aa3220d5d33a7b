"""The interface of a model family. The rest of the library uses these members and no others.

``Trainable`` is enough for the training loop; ``UnifiedModel`` adds prefill and picture generation. Families are
final: they inherit from one of these and from no other class of diptych.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from diptych.core.batch import Batch, Pictures
from diptych.core.layout import Kind, Layout, Segment
from diptych.core.losses import Losses
from diptych.core.noise import Noise
from diptych.core.sample import Image, Message, Sample, Text
from diptych.core.tensors import NONE, Float, Int, Tensor
from diptych.models.predictions import Noised, Objective, Predictions, TokenPrediction, score
from diptych.models.sizes import Sizes
from diptych.parts.autoencoder import sampled
from diptych.parts.images import latents_to_tokens
from diptych.parts.routed import spare_parameters
from diptych.parts.tokenizer import Tokenizer

Drop = frozenset[str]  # which of a family's conditions to leave out
# The system texts of BAGEL's think mode (ByteDance-Seed/Bagel, inferencer.py, Apache-2.0); users' weights know them.
THINK_BEFORE_DRAWING = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. <think> planning process here </think> image "
    "here"
)
THINK_BEFORE_ANSWERING = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, i.e. <think> reasoning process here </think> "
    "answer here"
)
NOTHING, TEXT, IMAGE = Drop(), Drop({"text"}), Drop({"image"})
Branches = Mapping[Drop, float]  # what a branch of guidance leaves out -> its guidance scale


@runtime_checkable
class Settings(Protocol):
    """The sampler settings that every family has; a family's own are a frozen dataclass with these members."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the branch without text; 1 is no guidance."""

    @property
    def image_guidance_scale(self) -> float:
        """The guidance scale of the branch without pictures."""

    @property
    def num_inference_steps(self) -> int | None:
        """Denoising steps; None in families that generate a picture token by token."""

    def within(self, steps: int) -> Settings:
        """The same settings with at most ``steps`` denoising steps."""


S = TypeVar("S", bound=Settings)  # a family's own settings


@dataclass(frozen=True, eq=False)
class Context:
    """The tokens that a model has prefilled. ``extend`` returns a new context; the old one stays valid."""

    cache: Any  # of the family: a parts.attention.Cache for most
    length: int = 0  # tokens read
    position: int = 0  # next position id
    logits: Tensor = field(
        default_factory=lambda: torch.empty(0)
    )  # (V,) scores of the next token; empty before the first
    private: Any = None  # family-private


@dataclass(frozen=True, eq=False)
class Drawing(Generic[S]):
    """A picture that is being generated: ``state`` is x_t of a flow, or a grid of codes that are partly chosen."""

    state: Tensor
    contexts: tuple[Context, ...]  # one for each of ``branches``
    branches: Branches
    canvas: tuple[int, int]  # (height, width) in pixels
    settings: S
    steps: int
    times: Tensor | None = None  # of a flow: the steps + 1 times of the sampler
    step: int = 0
    velocity: Tensor | None = None  # of a flow: the velocity of its last step
    seed: int = 0  # of the random draws of a step; a flow has none after its first noise
    private: Any = None  # family-private

    def __post_init__(self) -> None:
        if len(self.contexts) != len(self.branches):
            names = ", ".join("+".join(sorted(drop)) or "nothing" for drop in self.branches)
            raise ValueError(f"guidance needs contexts without {names}; there are {len(self.contexts)}")

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.step >= self.steps

    @property
    def ahead(self) -> Drawing[S]:
        """The drawing as it would end now: of a flow, the data x_t - t v that the last velocity predicts."""
        if self.velocity is None or self.times is None:
            return self
        return replace(self, state=self.state - float(self.times[self.step]) * self.velocity)


class Encoder(NamedTuple):
    """A frozen encoder whose outputs can be precomputed: its modules and the settings that its input depends on."""

    modules: tuple[str, ...]  # of the family
    settings: tuple[str, ...]  # fields of its Config


class Trainable(nn.Module, ABC):
    """A network with its own layout of samples and its own loss."""

    family: ClassVar[str]
    parts: ClassVar[
        Mapping[str, tuple[str, ...]]
    ]  # part name -> globs over parameter names; each parameter in one part
    routes: ClassVar[int] = 1  # how many experts ``core.batch.pack`` prepares index lists for
    frozen: ClassVar[frozenset[str]] = frozenset()  # parts that no recipe may train
    generation: ClassVar[tuple[str, ...]] = ()  # parts that generate pictures, for recipes of any family
    unified: ClassVar[tuple[str, ...]] = ("decoder", "vision", "projector", "head")  # parts that SGT post-trains
    conditions: ClassVar[tuple[str, ...]] = ()  # what ``lay_out`` can drop, such as "text" and "image"
    segmented: ClassVar[tuple[str, ...]] = ()  # those of ``conditions`` of which it can drop segments, as "text:0"
    encoders: ClassVar[Mapping[str, Encoder]] = {}  # frozen encoders that ``lay_out`` names (``Image.through``)
    config: Any
    tokenizer: Tokenizer

    @abstractmethod
    def lay_out(self, sample: Sample, drop: Drop = NOTHING) -> Layout:
        """The sample as segments; ``drop`` names conditions to leave out (guidance, and dropout in training):
        ``dropped`` removes them, and the family only chooses what replaces removed text (nothing, or blank tokens).

        A request (``sample.is_open``) ends where its answer or its picture begins, with the opening markers. Earlier
        pictures of a request are clean. In a training sample a target is noised, and what follows sees a clean copy.
        Pure: no network, no random state. Raises ``ValueError`` for what the family cannot lay out."""

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, float]:
        """How many elements each loss term has, from the batch alone: known before any forward, so that counts can be
        added over micro-batches and processes before the first backward."""

    @abstractmethod
    def losses(self, batch: Batch, noise: Noise) -> Losses:
        """The loss terms of a batch as (sum, count), with the names and counts of ``counts``."""

    def forward(self, batch: Batch, noise: Noise) -> Losses:
        """``losses``; the training loop calls the module, so that sharding hooks run."""
        return self.losses(batch, noise)

    @abstractmethod
    def blocks(self) -> Iterator[nn.Module]:
        """The blocks that are checkpointed and compiled one by one."""

    def trunk(self) -> Iterator[nn.Module]:
        """The ``blocks`` that every forward calls equally often, whatever the batch holds; they are sharded one by one.
        Modules that a batch may not use (a vision encoder), or uses once per picture shape, are gathered with the rest.
        Processes that share a model wait for each other in every call, also backward: the loss of every batch must
        depend on the trunk's output."""
        yield from self.blocks()

    @abstractmethod
    def initialise(self, seed: int) -> None:
        """Fresh weights, the same for the same seed."""

    def encode(self, encoder: str, images: Tensor) -> Tensor:
        """Features of a frozen encoder for N equally sized pictures, (N, ...). Deterministic: this is what
        ``diptych data precompute`` stores and what segments hold with ``encoded``."""
        raise NotImplementedError(f"{self.family} declares encoders and lacks encode")

    def through(self, encoder: str, group: Pictures) -> Tensor:
        """Features of one of ``encoders`` for a group's pictures: the stored ones where there are any."""
        assert group.images is not None
        return group.images if group.encoded else self.encode(encoder, group.images)

    def digest(self, encoder: str) -> str:
        """Hex digest of everything that an ``encoder``'s features depend on: weights and settings. Empty where the
        weights are in a folder that the config does not name."""
        modules, settings = self.encoders[encoder]
        values = {name: getattr(self.config, name) for name in settings}
        plain = {name: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for name, v in values.items()}
        for values_with_folder in (v for v in plain.values() if isinstance(v, dict) and "folder" in v):
            values_with_folder["folder"] = None  # features depend on the weights, not on where they are
        digest = hashlib.sha256(json.dumps([self.family, encoder, plain], sort_keys=True, default=asdict).encode())
        for module in modules:
            weight_files = getattr(self.get_submodule(module), "files", None)
            if weight_files is not None:
                if not (files := weight_files()):
                    return ""
                for file in files:
                    with file.open("rb") as opened:
                        digest.update(hashlib.file_digest(opened, "sha256").digest())
            for name, tensor in sorted(self.get_submodule(module).state_dict().items()):
                # shards of several processes are gathered
                whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                digest.update(f"{module}.{name} {whole.dtype} {tuple(whole.shape)}".encode())
                digest.update(whole.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:32]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def activated_parameters(self) -> int:
        """Parameters that serve one token: all but one copy of every routed module."""
        return sum(p.numel() for p in self.parameters()) - spare_parameters(self)


@dataclass(frozen=True)
class Preset:
    """The sampler settings of a published entry point, as changes of the family's defaults."""

    summary: str
    draw: Mapping[str, Any]
    edit: Mapping[str, Any]
    plan: tuple[int, float] = (999, 0.0)  # of thinking before a picture: most tokens, and temperature
    config: Mapping[str, Any] = field(default_factory=dict)  # leaves of the model's config, changed when it is loaded


class UnifiedModel(Trainable, Generic[S]):
    """A family that reads and generates pictures. Generation takes lists: one request is a list of one."""

    opens_with_picture: ClassVar[bool] = False  # ``picture_word`` begins a picture only as the first word of an answer
    think_before_drawing: ClassVar[str] = THINK_BEFORE_DRAWING  # the system text of a request that is planned first
    think_before_answering: ClassVar[str] = THINK_BEFORE_ANSWERING
    settings: S  # default sampler settings
    edits: S | None = None  # default sampler settings of edits; None: ``settings``

    presets: ClassVar[Mapping[str, Preset]] = {}

    def defaults(self, sample: Sample | None = None, preset: str = "") -> S:
        """The default settings of a request: ``edits``, if the model has them and the request has edit sources; or
        those of a ``preset``. Raises ``ValueError`` for an unknown preset and for one that changes the config."""
        edits = sample is not None and bool(sources(sample))
        if preset:
            named = self.preset(preset)
            if named.config:
                raise ValueError(f"preset {preset!r} changes the model's config: give it when the model is loaded")
            return replace(self.settings, **(named.edit if edits else named.draw))
        return self.settings if self.edits is None or not edits else self.edits

    @classmethod
    def preset(cls, name: str) -> Preset:
        """One of ``presets``. Raises ``ValueError`` for a name that the family does not have."""
        if name not in cls.presets:
            raise ValueError(f"unknown preset {name!r}; {cls.family} has {', '.join(cls.presets) or 'none'}")
        return cls.presets[name]

    @abstractmethod
    def predict(self, batch: Batch, noise: Noise) -> Predictions:
        """What the model predicts for a batch, by the terms of ``counts``. Two calls with one batch and one noise see
        the same x_t for any weights."""

    def losses(self, batch: Batch, noise: Noise) -> Losses:
        """The loss terms of supervised training."""
        return score(self.predict(batch, noise), batch, self.counts(batch))

    def forward(self, batch: Batch, noise: Noise, objective: Objective = score) -> Losses:
        """The losses that ``objective`` computes from the predictions. It runs inside the forward, the only place where
        sharded weights are gathered."""
        return objective(self.predict(batch, noise), batch, self.counts(batch))

    @abstractmethod
    def canvas(self, sample: Sample) -> tuple[int, int]:
        """The (height, width) of the picture that a request asks for: the requested size, else that of the last picture
        of the conversation, else the model's default. Raises ``ValueError`` for a size that is not supported."""

    @abstractmethod
    def open(self) -> Context:
        """An empty context."""

    @abstractmethod
    def extend(self, contexts: Sequence[Context], sequences: Sequence[Layout]) -> list[Context]:
        """The contexts after prefill of one layout each; their logits predict the next token."""

    def reply(self, ids: Sequence[int], drop: Drop = NOTHING) -> Layout:
        """The layout of an answer's tokens, for ``extend``; with ``drop``, as a branch of guidance reads them."""
        return Layout("reply", (Segment(Kind.TEXT, tuple(ids)),))

    def lay_out_away(self, sample: Sample, drop: Drop, words: str = "") -> Layout:
        """The layout of a request for a branch of guidance: without what ``drop`` names, and with ``words`` (a negative
        prompt) in place of the dropped text."""
        if not words or "text" not in drop:
            return self.lay_out(sample, drop)
        return self.lay_out(worded(sample, words), drop - {"text"} | {"plan"})

    def rewind(self, context: Context, length: int, position: int) -> Context:
        """The context of the first ``length`` tokens, whose next position id is ``position``. It has no logits before
        the next ``extend``."""
        return replace(context, length=length, position=position, logits=torch.empty(0))

    @property
    @abstractmethod
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""

    @property
    def picture_word(self) -> int | None:
        """The token with which an answer begins a picture; None in families that do not have one."""
        return None

    def planned(self, sample: Sample, plan: str) -> Sample:
        """The request with the plan that the model generated for it, in the open turn before the picture."""
        *before, turn = sample.messages
        return replace(sample, messages=(*before, replace(turn, parts=(Text(plan), *turn.parts))))

    def spoken(self, ids: Sequence[int]) -> str:
        """The text of generated ids, special tokens left out."""
        return self.tokenizer.decode(ids)

    def prepare(self, sample: Sample, settings: S, seed: int) -> Sample:
        """The request that is laid out for these settings and this seed; most families do not change it."""
        return sample

    def lay_out_picture(self, image: Image) -> tuple[Segment, ...]:
        """The segments of a generated picture after its ``picture_word``, up to where the answer's text continues."""
        raise NotImplementedError(f"{self.family} has a picture_word and lacks lay_out_picture")

    def branches(self, sample: Sample, settings: S) -> Branches:
        """The branches of guidance for a request, in the order in which they are combined: what ``lay_out`` drops for
        each -> its scale. The full one comes first.

        Without text when its scale exceeds 1, and then without pictures too when the conversation shows some and their
        scale exceeds 1 (BAGEL's ``inferencer.py``)."""
        branches = {NOTHING: 1.0}
        if settings.guidance_scale > 1:
            branches[TEXT] = settings.guidance_scale
            if shown(sample) and settings.image_guidance_scale > 1:
                branches[IMAGE] = settings.image_guidance_scale
        return branches

    def steps(self, canvas: tuple[int, int], settings: S) -> int:
        """How many steps a picture takes, at most; in families that generate codes, its number of tokens."""
        if settings.num_inference_steps is None:
            raise NotImplementedError(f"{self.family} generates token by token and lacks steps")
        return settings.num_inference_steps

    @abstractmethod
    def start(
        self,
        contexts: Sequence[tuple[Context, ...]],
        samples: Sequence[Sample],
        settings: Sequence[S],
        seeds: Sequence[int],
    ) -> list[Drawing[S]]:
        """The drawings of requests before their first step, each from its own seed: noise or an empty grid.
        ``contexts`` holds one context for each of the request's ``branches``."""

    @abstractmethod
    def step(self, drawings: Sequence[Drawing[S]]) -> list[Drawing[S]]:
        """One denoising step, or one patch of codes, for all of them at once. They must be of one canvas size and have
        equally many branches. Raises ``ValueError`` otherwise, and for a drawing that is done."""

    def preview(self, drawings: Sequence[Drawing[S]]) -> Float[Tensor, "B 3 H W"]:
        """The pictures of ``Drawing.ahead``, in [-1, 1]."""
        return self.finish([d.ahead for d in drawings])

    @abstractmethod
    def encoded(self, drawing: Drawing[S]) -> dict[str, Tensor]:
        """A finished drawing as ``Image.encoded`` holds it: its latents or codes by encoder. A training sample takes
        these, since encoding the decoded picture again gives other ones."""

    @abstractmethod
    def finish(self, drawings: Sequence[Drawing[S]]) -> Float[Tensor, "B 3 H W"]:
        """The pictures in [-1, 1]; codes that are not chosen yet are grey."""


# ---- steps ------------------------------------------------------------------------------------------------------


def check_step(drawings: Sequence[Drawing]) -> None:
    """Raises ``ValueError`` where drawings cannot take a step together, or one is done."""
    if len({d.canvas for d in drawings}) != 1 or len({len(d.contexts) for d in drawings}) != 1:
        raise ValueError("one step takes drawings of one canvas size and one number of branches")
    if any(d.done for d in drawings):
        raise ValueError("a finished drawing takes no further step")


def advance(drawing: Drawing[S], state: Tensor, velocity: Tensor | None = None, private: Any = None) -> Drawing[S]:
    """The drawing after one more step."""
    return replace(drawing, state=state, step=drawing.step + 1, velocity=velocity, private=private)


# ---- requests ---------------------------------------------------------------------------------------------------


def dropped(sample: Sample, drop: Drop, last: bool = False) -> Sample:
    """The sample without the conditions that ``drop`` names of the picture that is drawn (``Sample.drawing``)::

        text    the words of its request and, in a request, the plan that was made from them; with ``last`` only the
                text that ends the request: one that a picture follows stays
        image   every picture before it: sources, pictures to understand, and what was drawn earlier
        plan    the text that a request's open turn begins with
        system  the words of system messages

    Where nothing is drawn, of the answer. What follows the drawing stays.
    Raises ``ValueError`` for a picture without pixels that is not the one to draw."""
    place, asked, messages = sample.drawing, sample.request_at, []
    for i, message in enumerate(sample.messages):
        parts = []
        planning = sample.is_open and i == len(sample.messages) - 1
        for j, part in enumerate(message.parts):
            if isinstance(part, Image):
                if part.blank and not (sample.is_open and (i, j) == place):
                    raise ValueError(f"sample {sample.id!r} has a picture without pixels that is not the one to draw")
                gone = "image" in drop and (place is None or (i, j) < place)
            elif planning:
                gone = bool({"text", "plan"} & drop)
            elif message.role == "system":
                gone = "system" in drop
            else:
                gone = "text" in drop and i == asked and (not last or j == len(message.parts) - 1)
            parts += [] if gone else [part]
        messages.append(Message(message.role, tuple(parts)))
    return replace(sample, messages=tuple(messages)) if drop else sample


def worded(sample: Sample, words: str) -> Sample:
    """The sample with ``words`` as the text of its request. Raises ``ValueError`` where there is no request."""
    at = sample.request_at
    if at is None:
        raise ValueError(f"sample {sample.id!r} has no request whose text could be replaced")
    pictures = [p for p in sample.messages[at].parts if isinstance(p, Image)]
    changed = replace(sample.messages[at], parts=(*pictures, Text(words)))
    return replace(sample, messages=(*sample.messages[:at], changed, *sample.messages[at + 1 :]))


def shown(sample: Sample) -> list[Image]:
    """The pictures of a request's conversation, in order."""
    return [p for p in sample.images() if not p.blank]


def every_scale(sample: Sample, settings: Settings) -> Branches:
    """Branches for scales above and below 1: without text where its scale is not 1; without pictures where the
    conversation shows some and their scale is not 1."""
    branches = {NOTHING: 1.0}
    if settings.guidance_scale != 1:
        branches[TEXT] = settings.guidance_scale
    if shown(sample) and settings.image_guidance_scale != 1:
        branches[IMAGE] = settings.image_guidance_scale
    return branches


def sources(sample: Sample) -> list[Image]:
    """The edit sources of a request: its pictures, in order. Earlier pictures of the conversation are context."""
    return [p for p in (sample.request.parts if sample.request else ()) if isinstance(p, Image)]


def fitted(sample: Sample, sizes: Sizes, rule: Callable[[int, int], tuple[int, int]] | None = None) -> tuple[int, int]:
    """The (height, width) to draw for a request: the requested size, else ``rule`` of the last picture of the
    conversation, else the model's default. Raises ``ValueError`` for a size that the model was not trained on."""
    last, before = sample.messages[-1].parts[-1:], shown(sample) if rule else []
    requested = last[0].size if last and isinstance(last[0], Image) else None
    width, height = requested or sizes.default
    if requested:
        sizes.check(width, height)
    elif rule and before:
        width, height = rule(*before[-1].dimensions)
        if not sizes.allow(width, height):
            from_width, from_height = before[-1].dimensions
            raise ValueError(
                f"a picture of {from_width}x{from_height} pixels gives a canvas of {width}x{height}, but size must be "
                f"{sizes}; request a size or crop the picture"
            )
    return height, width


# ---- pictures ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def latent_tokens(model: Trainable, group: Pictures, noise: Noise) -> Float[Tensor, "N n f"]:
    """Patches of a group's latents; a posterior is sampled with each picture's noise."""
    distribution, channels = model.through("autoencoder", group).float(), model.config.autoencoder.latent_channels
    eps = None
    if distribution.shape[1] > channels:
        shape = (channels, *distribution.shape[2:])
        eps = draw_noise(noise, group, f"{group.kind} posterior", shape).to(distribution.device)
    return latents_to_tokens(sampled(distribution, channels, eps), model.config.latent_patch)


def noised(model: Trainable, group: Pictures, noise: Noise, times: Float[Tensor, " N"]) -> Noised:
    """A group's latents with each picture's noise, at given times."""
    data = latent_tokens(model, group, noise)
    eps = draw_noise(noise, group, "noise", tuple(data.shape[1:])).to(data.device)
    return Noised(data, eps, times.to(data.device))


def supervised(
    states: Float[Tensor, "T d"], table: Float[Tensor, "V d"], columns: Batch, rank: Int[Tensor, " T"] | None = None
) -> tuple[TokenPrediction, ...]:
    """The predictions of the supervised text tokens. ``rank`` maps a place of the row to its row of ``states``."""
    at = (columns.targets != NONE).nonzero()[:, 0]
    read = states.index_select(0, at if rank is None else rank[at])
    return (TokenPrediction(read, table, columns.targets[at], columns.document[at]),)


def draw_noise(noise: Noise, group: Pictures, name: str, shape: tuple[int, ...]) -> Tensor:
    """Normal draws for every picture of a group, (N, *shape), each from its own address; a ``name`` that several kinds
    of pictures draw under says which (ordinals count one kind)."""
    return torch.stack(
        [noise.normal(o, f"{name}{i}", shape) for o, i in zip(group.owners, group.ordinals, strict=True)]
    )


def read_on(
    contexts: Sequence[Context], sequences: Sequence[Layout], caches: Sequence[Any], logits: Float[Tensor, "B V"]
) -> list[Context]:
    """The contexts after prefill of one layout each into ``caches``, with the logits of the next token."""
    return [
        Context(cache, c.length + len(s), c.position + sum(x.moves for x in s.segments), scores, c.private)
        for cache, c, s, scores in zip(caches, contexts, sequences, logits, strict=True)
    ]


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
