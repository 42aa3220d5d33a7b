"""BAGEL (arXiv 2505.14683), the base of SGT: a mixture of transformers over one packed sequence.

::

    picture to read ── SigLIP ── projector ──┐ VISION   (route 0)
    picture to edit ── autoencoder ── 2x2 ───┤ CLEAN    (route 1, t = 0)
    text ── embedding ───────────────────────┤ TEXT     (route 0)      every layer: two sets of weights,
    noise + picture ── autoencoder ── 2x2 ───┤ NOISED   (route 1, t)   one softmax over all tokens
                                             ▼
                              decoder ──┬── language head → next word          (route 0)
                                        └── linear head → velocity             (route 1)

    x_t = (1 - t) data + t noise;  loss = w_text CE + w_image |v - (noise - data)|^2

Layout: every text is <|im_start|> .. <|im_end|>, every picture <|vision_start|> .. <|vision_end|>. A picture block sees
itself fully, shares one position id and moves the counter by one; a noised picture is hidden from what follows and does
not move it. A picture to edit is read twice, as latents and as features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar

import torch
from torch import nn

from diptych.core.batch import Batch, Pictures, pack
from diptych.core.layout import Kind, Layout, Segment
from diptych.core.noise import Noise
from diptych.core.sample import Image, Sample, Text
from diptych.core.tensors import NONE, Float, Tensor, to_float
from diptych.models.predictions import FlowPrediction, Predictions
from diptych.models.protocol import (
    NOTHING,
    Context,
    Drawing,
    Drop,
    Encoder,
    UnifiedModel,
    advance,
    check_step,
    draw_weights,
    dropped,
    fitted,
    latent_tokens,
    noised,
    read_on,
    supervised,
)
from diptych.models.sizes import Sizes
from diptych.parts.adapters import Projector
from diptych.parts.attention import Attend, Cached, Fixed, documents, inverse_permutation
from diptych.parts.autoencoder import AutoencoderConfig, build_latent_autoencoder, tiny_autoencoder
from diptych.parts.decoder import Decoder, DecoderConfig
from diptych.parts.flow import FlowSettings, Prediction, TimeDraw, euler, velocity
from diptych.parts.images import SizeRule, to_tensor, tokens_to_latents
from diptych.parts.positions import TimestepEmbedding, grid_places, grid_table
from diptych.parts.routed import Routed
from diptych.parts.tokenizer import Tokenizer
from diptych.parts.vision import VisionConfig, VisionEncoder, blanked

READ, DRAW = 0, 1  # the two routes


EDITS = FlowSettings(image_guidance_scale=2.0, guidance_interval=(0.0, 1.0), renorm="text_channel")  # inferencer.py


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
    settings: FlowSettings = field(default_factory=FlowSettings)
    edits: FlowSettings | None = None  # of requests that show sources; None: as ``settings``

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
            settings=FlowSettings(
                25, guidance_scale=2.5, guidance_interval=(0.0, 0.9), timestep_shift=3.0, renorm="none"
            ),
        )


def position_tables(c: Config) -> dict[str, Tensor]:
    """The frozen tables that are added to latents and to features; a published checkpoint may lack them."""
    d = c.decoder.hidden_size
    return {"latent_positions": grid_table(c.latent_side, d), "vision_positions": grid_table(c.seen_side, d)}


class Bagel(UnifiedModel[FlowSettings]):
    """BAGEL of any size."""

    family = "bagel"
    routes = 2
    frozen = frozenset({"autoencoder"})
    generation = ("decoder.image", "head")
    conditions = ("text", "image")
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
        """For training from scratch: weights of variance 1 / inputs, what writes to a residual stream divided by
        sqrt(2 layers), image experts as copies of the text experts and the velocity head at zero (as the published
        trainer has them). The autoencoder is left alone."""
        generator = torch.Generator().manual_seed(seed)
        depth = {"decoder": self.config.decoder.num_hidden_layers, "vision": self.config.vision.num_hidden_layers}
        draw_weights(self, generator, depth)
        for routed in (m for m in self.decoder.modules() if isinstance(m, Routed)):
            routed[DRAW].load_state_dict(routed[READ].state_dict())
        nn.init.zeros_(self.latent_out.weight)
        nn.init.zeros_(self.latent_out.bias)

    def blocks(self) -> Iterator[nn.Module]:
        yield from self.decoder.layers
        yield from self.vision.layers

    def trunk(self) -> Iterator[nn.Module]:
        yield from self.decoder.layers

    # ---- layout -------------------------------------------------------------------------------------------------

    def lay_out(self, sample: Sample, drop: Drop = NOTHING) -> Layout:
        """Texts and pictures in order; nothing stands in the place of what is dropped."""
        sample, segments = dropped(sample, drop), list[Segment]()
        for at, message in enumerate(sample.messages, 1):
            for i, part in enumerate(message.parts, 1):
                if isinstance(part, Text):
                    segments.append(self._text(part))
                elif not part.blank:
                    final = at == len(sample.messages) and i == len(message.parts)
                    if part.role == "target" and not sample.is_open:
                        segments.append(self._drawn(part))
                    if not (part.role == "target" and final):
                        segments += self._read(part)
        if sample.is_open and not sample.messages[-1].parts:
            segments.append(Segment(Kind.TEXT, (self.markers["bos"],)))
        return Layout(sample.id, tuple(segments))

    def _text(self, text: Text) -> Segment:
        ids = (self.markers["bos"], *self.tokenizer.encode(text.text), self.markers["eos"])
        return Segment(Kind.TEXT, ids, targets=(*ids[1:], NONE) if text.loss else ())

    def _read(self, image: Image) -> list[Segment]:
        vision, c = self._block(Kind.VISION, image, self.config.see, self.config.vision.patch_size, READ), self.config
        if image.role == "understand":
            return [vision]
        return [self._block(Kind.CLEAN, image, c.draw, c.stride, DRAW), vision]

    def _drawn(self, image: Image) -> Segment:
        rule, stride = self.config.draw, self.config.stride
        return self._block(Kind.NOISED, image, rule, stride, DRAW, hidden=True, advance=0, drawn=True)

    def _block(self, kind: Kind, image: Image, rule: SizeRule, stride: int, route: int, **more: Any) -> Segment:
        width, height = rule(*image.dimensions)
        grid = (height // stride, width // stride)
        ids = (self.markers["image"], *[NONE] * (grid[0] * grid[1]), self.markers["end"])

        def pixels() -> Tensor:
            return to_tensor(image.pixels, (width, height), image.nearest)

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

    def _run(
        self, batch: Batch, pictures: list[tuple[Tensor, Tensor]], positions: Tensor, order: Tensor, attend: Attend
    ) -> Float[Tensor, "T d"]:
        """Final states in stream order, from the pictures' (places, embeddings) and the batch's words."""
        stream = self.decoder.embed(batch, pictures, order)
        return self.decoder(stream, positions[order], attend, [len(r) for r in batch.routes])

    def counts(self, batch: Batch) -> dict[str, float]:
        return {
            "text": float((batch.targets != NONE).sum()),
            "image": float(sum(g.tokens.numel() for g in batch.of(Kind.NOISED))),
        }

    def predict(self, batch: Batch, noise: Noise) -> Predictions:
        """``text``: supervised words; ``image``: noised latents (``train/pretrain_unified_navit.py``)."""
        order = torch.cat(batch.routes)
        rank = inverse_permutation(order)
        pictures = [(g.tokens, self._embed_vision(g, noise)) for g in batch.of(Kind.VISION)]
        for g in batch.of(Kind.CLEAN):
            latents = latent_tokens(self, g, noise)
            pictures.append((g.tokens, self._embed_latents(latents, latents.new_zeros(len(latents)), g.grid)))
        drawn = []
        for g in batch.of(Kind.NOISED):
            target = noised(self, g, noise, self.config.times(noise, g.owners, g.ordinals))
            pictures.append((g.tokens, self._embed_latents(target.x_t, target.times, g.grid)))
            drawn.append((g.tokens, target))
        states = self._run(batch, pictures, batch.positions, order, documents(batch, order))
        image = []
        for tokens, target in drawn:
            prediction = self.latent_out(states.index_select(0, rank[tokens.flatten()])).view_as(target.data).float()
            image.append(FlowPrediction(prediction, target, self.config.prediction, batch.document[tokens[:, 0]]))
        return {"text": supervised(states, self.decoder.head_weight, batch, rank), "image": tuple(image)}

    # ---- reading ------------------------------------------------------------------------------------------------

    def open(self) -> Context:
        return Context(self.decoder.cache())

    @torch.inference_mode()
    def extend(self, contexts: Sequence[Context], sequences: Sequence[Layout]) -> list[Context]:
        """Reads clean pictures at t = 0; a noised picture cannot be read."""
        batch = pack(sequences, self.routes).to(self.device)
        if batch.of(Kind.NOISED):
            raise ValueError("a noised picture is drawn, not read; use start and step")
        order, start, noise = torch.cat(batch.routes), batch.positions, Noise()
        positions = start + torch.tensor([c.position for c in contexts], device=self.device)[batch.document]
        caches = [c.cache.reserve(c.length, len(s)) for c, s in zip(contexts, sequences, strict=True)]
        pictures = [(g.tokens, self._embed_vision(g, noise)) for g in batch.of(Kind.VISION)]
        for g in batch.of(Kind.CLEAN):
            latents = latent_tokens(self, g, noise)
            pictures.append((g.tokens, self._embed_latents(latents, latents.new_zeros(len(latents)), g.grid)))
        attend = Cached(caches, [c.length for c in contexts], batch, order if pictures else None)
        states = self._run(batch, pictures, positions, order, attend)
        last = torch.tensor(batch.lengths, device=self.device).cumsum(0) - 1
        logits = self.decoder.logits(states[inverse_permutation(order)[last]]).float()
        return read_on(contexts, sequences, caches, logits)

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset({self.markers["eos"]})

    # ---- drawing ------------------------------------------------------------------------------------------------

    def canvas(self, sample: Sample) -> tuple[int, int]:
        return fitted(sample, self.config.trained, self.config.draw)

    def start(
        self,
        contexts: Sequence[tuple[Context, ...]],
        samples: Sequence[Sample],
        settings: Sequence[FlowSettings],
        seeds: Sequence[int],
    ) -> list[Drawing[FlowSettings]]:
        drawings = []
        for read, sample, s, seed in zip(contexts, samples, settings, seeds, strict=True):
            canvas, branches = self.canvas(sample), self.branches(sample, s)
            noise = Noise(seed).normal("drawing", "noise", (prod(self._grid(canvas)), self.latent_in.in_features))
            steps = self.steps(canvas, s)
            drawings.append(Drawing(noise.to(self.device), read, branches, canvas, s, steps, s.times(steps)))
        return drawings

    def _grid(self, canvas: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tokens of a picture."""
        return canvas[0] // self.config.stride, canvas[1] // self.config.stride

    @torch.inference_mode()
    def step(self, drawings: Sequence[Drawing[FlowSettings]]) -> list[Drawing[FlowSettings]]:
        """One Euler step each. Branches of guidance are one batch; outside the interval they are not computed."""
        check_step(drawings)
        table = self._fixed(drawings)
        moved = euler(drawings, lambda x_t, t, branches: self._velocity(x_t, t, drawings, table, branches))
        return [advance(d, state, v, table) for d, (state, v) in zip(drawings, moved, strict=True)]

    def _fixed(self, drawings: Sequence[Drawing[FlowSettings]]) -> Fixed[Context]:
        """The contexts' keys and values side by side, branch-major; kept while the same drawings go on together."""
        contexts = [d.contexts[b] for b in range(len(drawings[0].contexts)) for d in drawings]
        if drawings[0].slot and drawings[0].slot.holds(contexts):
            return drawings[0].slot
        return Fixed(contexts, len(drawings[0].state) + 2)

    def _velocity(
        self,
        x_t: Float[Tensor, "B n f"],
        t: Float[Tensor, " B"],
        drawings: Sequence[Drawing[FlowSettings]],
        table: Fixed[Context],
        branches: int,
    ) -> Float[Tensor, "R B n f"]:
        """The velocity of every branch; the picture's tokens are embedded once and shared by all branches."""
        B, n, _ = x_t.shape
        latents = self._embed_latents(x_t, t, self._grid(drawings[0].canvas))
        markers = torch.tensor([self.markers["image"], self.markers["end"]], device=self.device)
        words = self.decoder.embed_tokens(markers)
        blocks = B * branches
        latents = latents.to(words.dtype).repeat(branches, 1, 1).flatten(0, 1)
        stream = torch.cat([words.repeat(blocks, 1), latents])
        place = torch.arange(blocks * (n + 2), device=self.device).view(blocks, n + 2)
        order = torch.cat([place[:, [0, -1]].flatten(), place[:, 1:-1].flatten()])
        position = torch.tensor([d.contexts[b].position for b in range(branches) for d in drawings], device=self.device)
        positions = position.repeat_interleave(n + 2)[order]
        states = self.decoder(stream, positions, table.over(blocks, order), [2 * blocks, n * blocks])
        prediction = self.latent_out(states[2 * blocks :]).float().view(branches, B, n, -1)
        return torch.stack([velocity(p, x_t, t, self.config.prediction) for p in prediction])

    def encoded(self, drawing: Drawing[FlowSettings]) -> dict[str, Tensor]:
        grid = self._grid(drawing.canvas)
        return {"autoencoder": tokens_to_latents(drawing.state[None].clone(), grid, self.config.latent_patch)[0]}

    @torch.inference_mode()
    def finish(self, drawings: Sequence[Drawing[FlowSettings]]) -> Float[Tensor, "B 3 H W"]:
        states = torch.stack([d.state for d in drawings])
        latents = tokens_to_latents(states, self._grid(drawings[0].canvas), self.config.latent_patch)
        return self.autoencoder.decode(latents).float().clamp(-1, 1)
