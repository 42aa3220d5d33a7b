"""BAGEL (arXiv 2505.14683), the base of SGT: a mixture of transformers over one packed sequence.

::

    picture to read ── SigLIP ── projector ──┐ VISION   (route 0)
    picture to edit ── autoencoder ── 2x2 ───┤ CLEAN    (route 1, t = 0)
    text ── embedding ───────────────────────┤ TEXT     (route 0)      every layer: two sets of weights,
    noise + picture ── autoencoder ── 2x2 ───┤ NOISED   (route 1, t)   one softmax over all tokens
                                             ▼
                              decoder ──┬── language head → next token         (route 0)
                                        └── linear head → velocity             (route 1)

    x_t = (1 - t) data + t noise;  loss = w_text CE + w_image |v - (noise - data)|^2

Layout: every text is <|im_start|> .. <|im_end|>, every picture <|vision_start|> .. <|vision_end|>. A picture block sees
itself fully, shares one position id and moves the counter by one; a noised picture is hidden from what follows and does
not move it. An edit source is in the sequence twice, as latents and as features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from math import prod
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from diptych.core.batch import Batch, Pictures, pack
from diptych.core.layout import Kind, Layout, Segment
from diptych.core.noise import Noise
from diptych.core.sample import Image, Sample, Text
from diptych.core.tensors import NONE, Float, Tensor, to_float
from diptych.models.predictions import FlowPrediction, Predictions
from diptych.models.protocol import (
    IMAGE,
    NOTHING,
    TEXT,
    Branches,
    Context,
    Drawing,
    Drop,
    Encoder,
    Preset,
    UnifiedModel,
    advance,
    check_step,
    draw_weights,
    dropped,
    fitted,
    latent_tokens,
    noised,
    read_on,
    shown,
    supervised,
)
from diptych.models.sizes import Sizes
from diptych.parts.adapters import Projector
from diptych.parts.attention import Attend, Cached, Fixed, documents, inverse_permutation
from diptych.parts.autoencoder import AutoencoderConfig, build_latent_autoencoder, sampled, tiny_autoencoder
from diptych.parts.decoder import Decoder, DecoderConfig
from diptych.parts.flow import FlowSettings, Prediction, TimeDraw, euler, velocity
from diptych.parts.images import SizeRule, resized, to_tensor, tokens_to_latents
from diptych.parts.positions import TimestepEmbedding, grid_places, grid_table
from diptych.parts.routed import Routed
from diptych.parts.tokenizer import Tokenizer
from diptych.parts.vision import VisionConfig, VisionEncoder, blanked

READ, DRAW = 0, 1  # the two routes


Contexts = Literal["inferencer", "scripts", "wise"]
Reading = Literal["inferencer", "scripts", "benchmarks", "training", "edits", "proxies"]
CONTEXTS: Mapping[str, tuple[Drop, ...]] = {  # what the text branch and the image branch of guidance leave out
    "inferencer": (TEXT, IMAGE | {"plan"}),
    "scripts": (TEXT, IMAGE),
    "wise": (TEXT | IMAGE | {"system"},),
}


@dataclass(frozen=True)
class Settings(FlowSettings):
    """Sampler settings.

    ``contexts``  what each branch of guidance reads. The text branch never reads the text that ends the request, nor
                  the plan; the image branch reads no picture. ``inferencer``: the image branch reads no plan either.
                  ``scripts`` (GEdit, ImgEdit, KRIS, RISE): it reads the plan. ``wise``: there is no image branch, and
                  the text branch reads nothing at all
    ``reading``   the size rule of pictures to read, a name of ``Config.seen``; None: the model's own
    ``seeding``   ``address``: a picture's noise depends on its seed alone. ``published``: one generator draws the
                  posterior noise of every source and then the first noise, as the published demo does, and pixels are
                  truncated to eight bits instead of rounded"""

    contexts: Contexts = "inferencer"
    reading: Reading | None = None
    seeding: Literal["address", "published"] = "address"

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {"contexts": Contexts, "reading": Reading, "seeding": Literal["address", "published"]}
        for name, kind in known.items():
            if (value := getattr(self, name)) not in get_args(kind) and not (name == "reading" and value is None):
                raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(get_args(kind))}")


EDITS = Settings(image_guidance_scale=2.0, guidance_interval=(0.0, 1.0), renorm="text_channel")  # inferencer.py


def _preset(
    summary: str,
    draw: tuple[float, float, float],
    edit: tuple[float, float, float],
    plan: tuple[int, float] = (999, 0.0),
    renorm: str = "text_channel",
    **more: Any,
) -> Preset:
    """A preset from (text scale, image scale, begin of the guidance interval) of drawing and of editing. 50 published
    timesteps are 49 evaluations."""
    common = {"num_inference_steps": 49, "timestep_shift": 3.0, "renorm_min": 0.0, **more}
    kinds = [
        {"guidance_scale": text, "image_guidance_scale": image, "guidance_interval": (low, 1.0), "renorm": kind}
        for (text, image, low), kind in ((draw, "global"), (edit, renorm))
    ]
    return Preset(summary, common | kinds[0], common | kinds[1], plan)


_SCRIPT: dict[str, Any] = {"contexts": "scripts", "reading": "scripts"}
_DEMO, _EDIT = (4.0, 1.5, 0.4), (4.0, 2.0, 0.0)
PRESETS: Mapping[str, Preset] = {  # of ByteDance-Seed/Bagel; the last one of song2yu/SGT
    "demo": _preset("the web demo, app.py", _DEMO, _EDIT, (1023, 0.0)),
    "notebook": _preset("the notebook", (4.0, 1.0, 0.4), _EDIT),
    "inferencer": _preset("the defaults of inferencer.py", (3.0, 1.5, 0.4), (3.0, 1.5, 0.4), renorm="global"),
    "geneval": _preset("the script of GenEval", (4.0, 1.0, 0.0), _EDIT),
    "wise": _preset("the script of WISE", (4.0, 1.0, 0.4), _EDIT, (2047, 0.3), contexts="wise"),
    "gedit": _preset("the script of GEdit", _DEMO, _DEMO, (10239, 0.3), **_SCRIPT),
    "imgedit": _preset("the script of ImgEdit", _DEMO, (4.0, 1.5, 0.0), (2047, 0.3), **_SCRIPT),
    "kris": _preset("the script of KRIS", _DEMO, (4.0, 1.5, 0.0), (2047, 0.3), **_SCRIPT),
    "rise": _preset("the script of RISE", _DEMO, _EDIT, (2047, 0.3), **_SCRIPT),
    "sgt": _preset("the scripts of SGT", (4.0, 1.0, 0.4), _EDIT),
}


@dataclass(frozen=True)
class Config:
    """Sizes and settings; ``tiny`` and ``b7_mot`` (BAGEL-7B-MoT) are the named ones."""

    decoder: DecoderConfig
    vision: VisionConfig
    autoencoder: AutoencoderConfig
    latent_patch: int = 2
    latent_side: int = 64  # tokens on a side of the latent position table
    vision_side: int | None = None  # patches on a side of the vision position table; None: the encoder's own
    stretch: bool = False  # spread every picture over its whole position table (published: interpolate_pos)
    prediction: Prediction = "velocity"
    times: TimeDraw = TimeDraw()
    see: SizeRule = SizeRule(longest=980, shortest=224, stride=14)
    draw: SizeRule = SizeRule(longest=1024, shortest=512, stride=16)
    size: tuple[int, int] = (1024, 1024)
    reading: Reading = "training"  # the size rule of pictures to read in requests
    markers_in_text: bool = False  # published: markers that a text spells are markers, and answers spell them
    settings: Settings = field(default_factory=Settings)
    edits: Settings | None = None  # of requests with edit sources; None: ``settings``

    def __post_init__(self) -> None:
        if self.decoder.routes != 2:
            raise ValueError(f"BAGEL has two routes; the decoder config has {self.decoder.routes}")
        if self.draw.stride % self.stride or self.see.stride % self.vision.patch_size:
            raise ValueError(
                f"size rules must keep to the strides: draw {self.draw.stride} to {self.stride} pixels a token, "
                f"see {self.see.stride} to patches of {self.vision.patch_size}"
            )

    @property
    def stride(self) -> int:
        """Pixels on a side of one latent token."""
        return self.latent_patch * self.autoencoder.downsample

    @property
    def trained(self) -> Sizes:
        """The sizes of pictures that the model was trained on."""
        return Sizes(
            self.size,
            self.stride,
            self.draw.shortest,
            min(self.draw.longest, self.stride * self.latent_side),
            self.see.longest,
        )

    def seen(self, reading: str) -> tuple[SizeRule, ...]:
        """The size rules that a picture goes through, in turn, before the vision encoder reads it::

            inferencer   ``draw`` and then ``see``
            scripts      a short side of at least 27 patches (378 pixels): GEdit, ImgEdit, KRIS, RISE
            benchmarks   the same with at most 10240 patches: benchmarks of understanding; divided by the number of
                         pictures in training
            training     ``see`` alone
            edits        a long side of at most 37 patches (518 pixels): sources of edits in training
            proxies      a long side of 16 patches (224 pixels): SGT's proxy tasks

        Raises ``ValueError`` for an unknown name."""
        patch = self.vision.patch_size

        def sides(longest: int, shortest: int, **more: Any) -> SizeRule:
            longest = min(self.see.longest, longest * patch)
            return replace(self.see, longest=longest, shortest=min(longest, shortest * patch), **more)

        whole = self.see.longest // patch
        rules = {
            "inferencer": (self.draw, self.see),
            "scripts": (sides(whole, 27),),
            "benchmarks": (sides(whole, 27, pixels=10240 * patch**2),),
            "training": (self.see,),
            "edits": (sides(37, 16),),
            "proxies": (sides(16, 16),),
        }
        if reading not in rules:
            raise ValueError(f"unknown reading {reading!r}; choose from {', '.join(rules)}")
        return rules[reading]

    @property
    def seen_side(self) -> int:
        """Patches on a side of the vision position table."""
        return self.vision_side or self.vision.side

    @staticmethod
    def b7_mot() -> Config:
        """BAGEL-7B-MoT: Qwen2.5-7B with q/k norm, twice; SigLIP so400m at 980 less a layer; FLUX's autoencoder."""
        return Config(
            DecoderConfig(152064, 3584, 18944, 28, 28, 4, qk_norm=True, routes=2, routed=("attention", "norms", "mlp")),
            VisionConfig(1152, 4304, 26, 16, patch_size=14, image_size=980),
            AutoencoderConfig(),
            see=SizeRule(longest=980, shortest=224, stride=14, over="ratio"),
            draw=SizeRule(longest=1024, shortest=512, stride=16, over="ratio"),
            reading="inferencer",
            edits=EDITS,
        )

    @staticmethod
    def tiny_published() -> Config:
        """Sizes that a published folder can say, small enough to try its layout: 128 x 128 pixels, 256 tokens."""
        return Config(
            DecoderConfig(1024, 32, 48, 2, 4, 2, qk_norm=True, routes=2, routed=("attention", "norms", "mlp")),
            VisionConfig(32, 48, 2, 2, patch_size=14, image_size=112),
            AutoencoderConfig(channels=32, multipliers=(1, 1, 2), blocks=1, latent_channels=4),
            latent_side=16,
            see=SizeRule(longest=112, shortest=112, stride=14, over="ratio"),
            draw=SizeRule(longest=128, shortest=64, stride=8, over="ratio"),
            size=(128, 128),
            reading="inferencer",
            edits=EDITS,
        )

    @staticmethod
    def tiny(vocab_size: int = 1024) -> Config:
        """The same code at a size that two CPU cores train in minutes: 64 x 64 pixels, 16 tokens a picture."""
        return Config(
            DecoderConfig(vocab_size, 192, 384, 6, 6, 2, qk_norm=True, routes=2, routed=("attention", "norms", "mlp")),
            VisionConfig(128, 384, 4, 4, patch_size=16, image_size=128),
            tiny_autoencoder(),
            latent_side=8,
            prediction="data",
            times=TimeDraw(mean=1.8),
            see=SizeRule(longest=64, shortest=64, stride=64),
            draw=SizeRule(longest=64, shortest=64, stride=64),
            size=(64, 64),
            settings=Settings(25, guidance_scale=2.5, guidance_interval=(0.0, 0.9), timestep_shift=3.0, renorm="none"),
        )


def position_tables(c: Config) -> dict[str, Tensor]:
    """The frozen tables that are added to latents and to features; a published checkpoint may lack them."""
    d = c.decoder.hidden_size
    return {"latent_positions": grid_table(c.latent_side, d), "vision_positions": grid_table(c.seen_side, d)}


class Bagel(UnifiedModel[Settings]):
    """BAGEL of any size."""

    family = "bagel"
    routes = 2
    frozen = frozenset({"autoencoder"})
    generation = ("decoder.image", "head")
    conditions = ("text", "image", "latents", "features")
    segmented = conditions
    presets = PRESETS
    encoders: ClassVar = {"autoencoder": Encoder(("autoencoder",), ("autoencoder", "draw"))}
    parts: ClassVar = {
        "decoder.text": (
            "decoder.embed_tokens.*",
            "decoder.lm_head.*",
            "decoder.norm.0.*",
            "decoder.layers.*.input_layernorm.0.*",
            "decoder.layers.*.self_attn.0.*",
            "decoder.layers.*.o_proj.0.*",
            "decoder.layers.*.post_attention_layernorm.0.*",
            "decoder.layers.*.mlp.0.*",
        ),
        "decoder.image": (
            "decoder.norm.1.*",
            "decoder.layers.*.input_layernorm.1.*",
            "decoder.layers.*.self_attn.1.*",
            "decoder.layers.*.o_proj.1.*",
            "decoder.layers.*.post_attention_layernorm.1.*",
            "decoder.layers.*.mlp.1.*",
        ),
        "vision": ("vision.*",),
        "projector": ("projector.*",),
        "head": ("time.*", "latent_in.*", "latent_out.*"),
        "autoencoder": ("autoencoder.*",),
    }

    latent_positions: Tensor
    vision_positions: Tensor

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__()
        c, d = config, config.decoder.hidden_size
        self.config, self.tokenizer = config, tokenizer
        self.settings, self.edits = config.settings, config.edits
        self.decoder = Decoder(c.decoder)
        self.vision = VisionEncoder(c.vision)
        self.projector = Projector(c.vision.hidden_size, d)
        self.autoencoder = build_latent_autoencoder(c.autoencoder)
        features = c.autoencoder.latent_channels * c.latent_patch**2
        self.time = TimestepEmbedding(d)
        self.latent_in = nn.Linear(features, d)
        self.latent_out = nn.Linear(d, features)
        for name, table in position_tables(c).items():
            self.register_buffer(name, table)
        self.markers = {
            name: tokenizer.id(token)
            for name, token in {
                "bos": "<|im_start|>",
                "eos": "<|im_end|>",
                "image": "<|vision_start|>",
                "end": "<|vision_end|>",
            }.items()
        }
        if len(tokenizer) > c.decoder.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the decoder {c.decoder.vocab_size}")

    def initialise(self, seed: int) -> None:
        """Fresh weights of variance 1 / inputs; layers that write to a residual stream are divided by sqrt(2 layers).
        As in the published trainer, image experts are copies of the text experts and the velocity head is zero. The
        autoencoder does not change."""
        generator = torch.Generator().manual_seed(seed)
        depth = {"decoder": self.config.decoder.num_hidden_layers, "vision": self.config.vision.num_hidden_layers}
        draw_weights(self, generator, depth)
        for routed in (m for m in self.decoder.modules() if isinstance(m, Routed)):
            routed[DRAW].load_state_dict(routed[READ].state_dict())
        nn.init.zeros_(self.latent_out.weight)
        nn.init.zeros_(self.latent_out.bias)

    def blocks(self) -> Iterator[nn.Module]:
        """Decoder layers, then the vision encoder's."""
        yield from self.decoder.layers
        yield from self.vision.layers

    def trunk(self) -> Iterator[nn.Module]:
        """The decoder layers."""
        yield from self.decoder.layers

    # ---- layout -------------------------------------------------------------------------------------------------

    def lay_out(self, sample: Sample, drop: Drop = NOTHING) -> Layout:
        """Texts and pictures in order. What is dropped of a request leaves nothing behind.

        In a training sample that draws, each of these conditions can be dropped as a whole or segment by segment
        (``text:0`` is the first)::

            text      texts without a loss
            latents   clean pictures, as latents; the position counter moves by one for each that is dropped
            features  clean pictures, as features; likewise
            image     both
        """
        if sample.is_open:
            return self._request(sample, drop)
        segments, texts, pictures, gap = list[Segment](), count(), count(), 0
        drops = sample.drawing is not None

        def gone(condition: str, number: int) -> bool:
            return drops and (condition in drop or f"{condition}:{number}" in drop)

        for at, message in enumerate(sample.messages, 1):
            for i, part in enumerate(message.parts, 1):
                blocks = list[Segment | None]()
                if isinstance(part, Text):
                    if part.loss or not gone("text", next(texts)):
                        blocks.append(self._text(part))
                elif part.blank:
                    raise ValueError(f"sample {sample.id!r} has a picture without pixels that is not the one to draw")
                else:
                    final = at == len(sample.messages) and i == len(message.parts)
                    if part.role == "target":
                        blocks.append(self._target(part))
                    if not (part.role == "target" and final):
                        number = next(pictures)
                        for read in self._read(part, sample):
                            name = "latents" if read.kind == Kind.CLEAN else "features"
                            blocks.append(None if gone(name, number) or gone("image", number) else read)
                for block in blocks:
                    if block is not None:
                        segments.append(replace(block, gap=gap) if gap else block)
                    gap = gap + 1 if block is None else 0
        return Layout(sample.id, tuple(segments))

    def _request(self, sample: Sample, drop: Drop) -> Layout:
        sample, segments = dropped(sample, drop, last=True), list[Segment]()
        for message in sample.messages:
            for part in message.parts:
                if isinstance(part, Text):
                    segments.append(self._text(part))
                elif not part.blank:
                    segments += self._read(part, sample)
        if not sample.messages[-1].parts:
            segments.append(Segment(Kind.TEXT, (self.markers["bos"],)))
        return Layout(sample.id, tuple(segments))

    def _text(self, text: Text) -> Segment:
        encode = self.tokenizer.encode_markup if self.config.markers_in_text else self.tokenizer.encode
        ids = (self.markers["bos"], *encode(text.text), self.markers["eos"])
        return Segment(Kind.TEXT, ids, targets=(*ids[1:], NONE) if text.loss else ())

    def _read(self, image: Image, sample: Sample) -> list[Segment]:
        """A picture to read, as latents too unless it is to be understood only."""
        reading = image.reading or (self.config.reading if sample.is_open else "training")
        rules, c = self.config.seen(reading), self.config
        if reading == "benchmarks" and not sample.is_open:
            [rule], several = rules, sum(1 for _ in sample.images())
            rules = (replace(rule, pixels=rule.pixels // several),)
        vision = self._block(Kind.VISION, image, rules, self.config.vision.patch_size, READ)
        if image.role == "understand":
            return [vision]
        return [self._block(Kind.CLEAN, image, (c.draw,), c.stride, DRAW), vision]

    def _target(self, image: Image) -> Segment:
        rule, stride = self.config.draw, self.config.stride
        return self._block(Kind.NOISED, image, (rule,), stride, DRAW, hidden=True, advance=0, generated=True)

    def _block(
        self, kind: Kind, image: Image, rules: Sequence[SizeRule], stride: int, route: int, **more: Any
    ) -> Segment:
        sizes = [image.dimensions]
        for rule in rules:
            sizes.append(rule(*sizes[-1]))
        width, height = sizes[-1]
        grid = (height // stride, width // stride)
        ids = (self.markers["image"], *[NONE] * (grid[0] * grid[1]), self.markers["end"])

        def pixels() -> Tensor:
            return to_tensor(resized(image.pixels, sizes[1:-1], image.nearest), (width, height), image.nearest)

        held, encoded = (pixels(), False) if kind == Kind.VISION else image.through("autoencoder", pixels)
        columns: dict[str, Any] = {"image": held, "encoded": encoded, "masked": image.masked, "advance": 1} | more
        return Segment(kind, ids, grid=grid, full=True, shared=True, route=route, **columns)

    # ---- network ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, encoder: str, images: Tensor) -> Tensor:
        """Latents of uint8 or float pictures, followed by their deviation where the autoencoder has a posterior."""
        return self.autoencoder.distribution(to_float(images))

    def _embed_latents(self, tokens: Tensor, t: Tensor, grid: tuple[int, int]) -> Float[Tensor, "N n d"]:
        places = grid_places(grid, self.config.latent_side, tokens.device, self.config.stretch)
        tokens = tokens.to(self.latent_in.weight.dtype)
        return self.latent_in(tokens) + self.time(t)[:, None] + self.latent_positions[places]

    def _embed_vision(self, group: Pictures, noise: Noise) -> Float[Tensor, "N n d"]:
        assert group.images is not None
        places = grid_places(group.grid, self.config.seen_side, group.images.device, self.config.stretch)
        seen = self.projector(self.vision(to_float(group.images), places)) + self.vision_positions[places]
        return blanked(seen, group, noise)

    def _embed_read(self, batch: Batch, noise: Noise) -> list[tuple[Tensor, Float[Tensor, "N n d"]]]:
        """(places, embeddings) of the pictures that are read: features, and clean latents at t = 0."""
        pictures = [(g.tokens, self._embed_vision(g, noise)) for g in batch.of(Kind.VISION)]
        for g in batch.of(Kind.CLEAN):
            latents = latent_tokens(self, g, noise)
            pictures.append((g.tokens, self._embed_latents(latents, latents.new_zeros(len(latents)), g.grid)))
        return pictures

    def _run(
        self, batch: Batch, pictures: list[tuple[Tensor, Tensor]], positions: Tensor, order: Tensor, attend: Attend
    ) -> Float[Tensor, "T d"]:
        """Final states in stream order, from the pictures' (places, embeddings) and the batch's text."""
        stream = self.decoder.embed(batch, pictures, order)
        return self.decoder(stream, positions[order], attend, [len(r) for r in batch.routes])

    def counts(self, batch: Batch) -> dict[str, float]:
        """``text``: supervised tokens; ``image``: tokens of noised pictures."""
        return {
            "text": float((batch.targets != NONE).sum()),
            "image": float(sum(g.tokens.numel() for g in batch.of(Kind.NOISED))),
        }

    def predict(self, batch: Batch, noise: Noise) -> Predictions:
        """``text``: supervised tokens; ``image``: noised latents (``train/pretrain_unified_navit.py``)."""
        order = torch.cat(batch.routes)
        rank = inverse_permutation(order)
        pictures, targets = self._embed_read(batch, noise), []
        for g in batch.of(Kind.NOISED):
            target = noised(self, g, noise, self.config.times(noise, g.owners, g.ordinals))
            pictures.append((g.tokens, self._embed_latents(target.x_t, target.times, g.grid)))
            targets.append((g.tokens, target))
        states = self._run(batch, pictures, batch.positions, order, documents(batch, order))
        image = []
        for tokens, target in targets:
            prediction = self.latent_out(states.index_select(0, rank[tokens.flatten()])).view_as(target.data).float()
            image.append(FlowPrediction(prediction, target, self.config.prediction, batch.document[tokens[:, 0]]))
        return {"text": supervised(states, self.decoder.head_weight, batch, rank), "image": tuple(image)}

    # ---- prefill ------------------------------------------------------------------------------------------------

    def open(self) -> Context:
        """A context with an empty KV cache."""
        return Context(self.decoder.cache())

    @torch.inference_mode()
    def extend(self, contexts: Sequence[Context], sequences: Sequence[Layout]) -> list[Context]:
        """Prefills text and clean pictures (t = 0). Raises ``ValueError`` for a noised picture."""
        batch = pack(sequences, self.routes).to(self.device)
        if batch.of(Kind.NOISED):
            raise ValueError("a noised picture cannot be prefilled; use start and step")
        order = torch.cat(batch.routes)
        positions = batch.positions + torch.tensor([c.position for c in contexts], device=self.device)[batch.document]
        caches = [c.cache.reserve(c.length, len(s)) for c, s in zip(contexts, sequences, strict=True)]
        pictures = self._embed_read(batch, Noise())
        attend = Cached(caches, [c.length for c in contexts], batch, order if pictures else None)
        states = self._run(batch, pictures, positions, order, attend)
        last = torch.tensor(batch.lengths, device=self.device).cumsum(0) - 1
        logits = self.decoder.logits(states[inverse_permutation(order)[last]]).float()
        return read_on(contexts, sequences, caches, logits)

    def spoken(self, ids: Sequence[int]) -> str:
        """The text of generated ids, up to a second start marker (``inferencer.py``)."""
        start = self.markers["bos"]
        ids = list(ids)[: list(ids).index(start)] if start in ids else list(ids)
        if not self.config.markers_in_text:
            return self.tokenizer.decode(ids)
        return self.tokenizer.decode_markup(ids).partition("<|im_end|>")[0].partition("<|im_start|>")[0]

    @property
    def stop_ids(self) -> frozenset[int]:
        """<|im_end|>."""
        return frozenset({self.markers["eos"]})

    # ---- generation ---------------------------------------------------------------------------------------------

    def canvas(self, sample: Sample) -> tuple[int, int]:
        """The (height, width) of the picture to generate: see ``fitted``."""
        return fitted(sample, self.config.trained, self.config.draw)

    def branches(self, sample: Sample, settings: Settings) -> Branches:
        """The full context, if ``guidance_scale`` exceeds 1 the text branch of ``CONTEXTS``, and if
        ``image_guidance_scale`` also exceeds 1 the image branch. A request without pictures has an image branch too, as
        in ``inferencer.py``: it equals the full context, so the scales t and i act as one scale 1 + i (t - 1)."""
        lacks, branches = CONTEXTS[settings.contexts], {NOTHING: 1.0}
        there = {"text", "image"}
        there |= {"plan"} if any(isinstance(p, Text) for p in sample.messages[-1].parts) else set()
        there |= {"system"} if any(m.role == "system" for m in sample.messages) else set()
        scales = (settings.guidance_scale, settings.image_guidance_scale)
        for drop, scale in zip(lacks, scales, strict=False):
            if scale <= 1:
                break
            branches[drop & there] = scale
        return branches

    def prepare(self, sample: Sample, settings: Settings, seed: int) -> Sample:
        """The request with the size rule of its pictures; with published seeding, with its sources encoded."""
        if settings.reading:
            sample = sample.map_images(lambda i: i if i.blank else replace(i, reading=settings.reading))
        if settings.seeding == "address":
            return sample
        drawn, _ = self._published_noise(sample, seed)

        def encoded(image: Image) -> Image:
            if image.blank or image.role == "understand" or "autoencoder" in image.encoded:
                return image
            block = self._block(Kind.CLEAN, image, (self.config.draw,), self.config.stride, DRAW)
            assert block.image is not None
            distribution = self.encode("autoencoder", block.image[None].to(self.device)).float()
            latents = sampled(distribution, self.config.autoencoder.latent_channels, next(eps))
            return replace(image, encoded={**image.encoded, "autoencoder": latents[0]})

        eps = iter(x.to(self.device) for x in drawn)
        return sample.map_images(encoded)

    def _published_noise(self, sample: Sample, seed: int) -> tuple[list[Tensor], Tensor]:
        """Normal draws of one generator: (1, z, h, w) for each source that is encoded, then (tokens, features)."""
        generator, c = torch.Generator().manual_seed(seed), self.config
        drawn = []
        for image in shown(sample) if c.autoencoder.posterior else ():
            if image.role != "understand":
                width, height = (side // c.autoencoder.downsample for side in c.draw(*image.dimensions))
                drawn.append(torch.randn(1, c.autoencoder.latent_channels, height, width, generator=generator))
        return drawn, torch.randn(self._start_shape(sample), generator=generator)

    def _start_shape(self, sample: Sample) -> tuple[int, int]:
        """(tokens, features) of the picture that a request asks for."""
        return prod(self._grid(self.canvas(sample))), self.latent_in.in_features

    def start(
        self,
        contexts: Sequence[tuple[Context, ...]],
        samples: Sequence[Sample],
        settings: Sequence[Settings],
        seeds: Sequence[int],
    ) -> list[Drawing[Settings]]:
        """Standard normal noise for each request, (n, f)."""
        drawings = []
        for read, sample, s, seed in zip(contexts, samples, settings, seeds, strict=True):
            canvas, branches = self.canvas(sample), self.branches(sample, s)
            noise = Noise(seed).normal("drawing", "noise", self._start_shape(sample))
            if s.seeding == "published":
                _, noise = self._published_noise(sample, seed)
            steps = self.steps(canvas, s)
            drawings.append(Drawing(noise.to(self.device), read, branches, canvas, s, steps, s.times(steps)))
        return drawings

    def _grid(self, canvas: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tokens of a picture."""
        return canvas[0] // self.config.stride, canvas[1] // self.config.stride

    @torch.inference_mode()
    def step(self, drawings: Sequence[Drawing[Settings]]) -> list[Drawing[Settings]]:
        """One Euler step for each drawing. The branches are one batch; outside the guidance interval only the full one
        is computed."""
        check_step(drawings)
        table = self._fixed(drawings)
        moved = euler(drawings, lambda x_t, t, branches: self._velocity(x_t, t, drawings, table, branches))
        return [advance(d, state, v, table) for d, (state, v) in zip(drawings, moved, strict=True)]

    def _fixed(self, drawings: Sequence[Drawing[Settings]]) -> Fixed[Context]:
        """Keys and values of all contexts in one buffer, branch-major; kept while the same drawings are batched."""
        contexts = [d.contexts[b] for b in range(len(drawings[0].contexts)) for d in drawings]
        if drawings[0].private and drawings[0].private.holds(contexts):
            return drawings[0].private
        return Fixed(contexts, len(drawings[0].state) + 2)

    def _velocity(
        self,
        x_t: Float[Tensor, "B n f"],
        t: Float[Tensor, " B"],
        drawings: Sequence[Drawing[Settings]],
        table: Fixed[Context],
        branches: int,
    ) -> Float[Tensor, "R B n f"]:
        """The velocity of every branch; the picture's tokens are embedded once and shared by all branches."""
        B, n, _ = x_t.shape
        latents = self._embed_latents(x_t, t, self._grid(drawings[0].canvas))
        markers = torch.tensor([self.markers["image"], self.markers["end"]], device=self.device)
        embedded = self.decoder.embed_tokens(markers)
        blocks = B * branches
        latents = latents.to(embedded.dtype).repeat(branches, 1, 1).flatten(0, 1)
        stream = torch.cat([embedded.repeat(blocks, 1), latents])
        place = torch.arange(blocks * (n + 2), device=self.device).view(blocks, n + 2)
        order = torch.cat([place[:, [0, -1]].flatten(), place[:, 1:-1].flatten()])
        position = torch.tensor([d.contexts[b].position for b in range(branches) for d in drawings], device=self.device)
        positions = position.repeat_interleave(n + 2)[order]
        states = self.decoder(stream, positions, table.over(blocks, order), [2 * blocks, n * blocks])
        prediction = self.latent_out(states[2 * blocks :]).float().view(branches, B, n, -1)
        return torch.stack([velocity(p, x_t, t, self.config.prediction) for p in prediction])

    def encoded(self, drawing: Drawing[Settings]) -> dict[str, Tensor]:
        """The latents of a finished drawing, (c, h, w)."""
        grid = self._grid(drawing.canvas)
        return {"autoencoder": tokens_to_latents(drawing.state[None].clone(), grid, self.config.latent_patch)[0]}

    @torch.inference_mode()
    def finish(self, drawings: Sequence[Drawing[Settings]]) -> Float[Tensor, "B 3 H W"]:
        """Decoded pictures, clamped to [-1, 1]."""
        states = torch.stack([d.state for d in drawings])
        latents = tokens_to_latents(states, self._grid(drawings[0].canvas), self.config.latent_patch)
        pixels = self.autoencoder.decode(latents).float().clamp(-1, 1)
        for i, d in enumerate(drawings):
            if d.settings.seeding == "published":
                pixels[i] = ((pixels[i] * 0.5 + 0.5) * 255).floor() / 127.5 - 1
        return pixels
