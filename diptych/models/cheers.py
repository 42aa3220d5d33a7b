"""Cheers (arXiv 2603.12793): one vision tokenizer for reading and drawing, a cascaded flow head with gated detail.

::

    picture ── autoencoder ── z, mixed with noise if it is a target
                              │
                    pixel decoder D ── patches e of D(z) ── SigLIP2 ── 2x2 merge ── semantic tokens
                                        │                                            │
    text ── embedding ──────────────────┼────────────────────────────────────────────┤  one sequence, one decoder
                                        │                                            ├── language head → next token
                                        │                     hidden states at the picture, not shifted
                                        │                                            │
                                        │       coarse stage (t) ── channel to space ┘
                                        └────── x = LayerNorm(s + gate(s) e)
                                                fine stage (t) ── velocity (or data) of every latent

    z_t = (1 - t) data + t noise;  loss = w_text CE + w_image |v - (noise - data)|^2

Only the two stages of the head receive the time; tokenizer and decoder infer it from the noised picture. The published
code counts time from noise to data and predicts data - noise: only ``_predict`` converts both.

Layout: ChatML; a picture is <im_start> .. <im_end> in the text, one position id for each of its tokens, which see each
other fully. In training a noised picture is hidden from what follows, which reads its clean copy at the same positions.
Guidance replaces all text tokens except picture markers by <no_mean>.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from diptych.core.batch import Batch, Pictures, pack
from diptych.core.layout import Kind, Layout, Segment
from diptych.core.noise import Noise
from diptych.core.sample import Image, Message, Sample, Text
from diptych.core.tensors import NONE, Float, Int, Tensor, to_float
from diptych.models.predictions import FlowPrediction, Noised, Predictions
from diptych.models.protocol import (
    NOTHING,
    Branches,
    Context,
    Drawing,
    Drop,
    Encoder,
    Preset,
    UnifiedModel,
    advance,
    check_step,
    draw_noise,
    draw_weights,
    dropped,
    fitted,
    read_on,
    sources,
    supervised,
)
from diptych.models.sizes import Sizes
from diptych.parts.attention import Cached, Fixed, documents, sdpa
from diptych.parts.autoencoder import AutoencoderConfig, LatentDecoder, build_latent_autoencoder, tiny_autoencoder
from diptych.parts.decoder import MLP, Attention, Decoder, DecoderConfig, Rope
from diptych.parts.flow import (
    FlowSettings,
    Prediction,
    TimeDraw,
    euler,
    mix,
    schedule,
    shift_time,
    velocity,
)
from diptych.parts.images import SizeRule, crop, letterbox, to_tensor
from diptych.parts.norms import RMSNorm
from diptych.parts.positions import TimestepEmbedding
from diptych.parts.tokenizer import Tokenizer
from diptych.parts.vision import VisionConfig, VisionEncoder, blanked

START, END, BLANK = "<im_start>", "<im_end>", "<no_mean>"


ADDED = ("<image>", "<image_gen>", START, END, BLANK)  # at the end of Qwen's vocabulary, in this order


SYSTEM = "You are a helpful assistant."

Quirk = Literal[
    "repeated_positions",
    "structural_labels",
    "visible_noise",
    "loss_on_all_pictures",
    "dummy_picture",
    "endpoint_step",
    "bf16_latents",
]


"""Defects of the published code that ``published_quirks`` can switch on:

``repeated_positions``    the fine stage counts its N tokens 0 .. N/2 - 1 twice; the published weights learned with it
``structural_labels``     newlines and markers are predicted in every turn, also where text is dropped
``visible_noise``         what follows a noised picture in training sees it, and no clean copy is read
``loss_on_all_pictures``  the flow loss also takes pictures that are only read (at the data's end, target 0) and dummies
``dummy_picture``         a text without pictures follows a causal picture of nothing: random pixels when read, pure
                          latent noise in training. Prompts of pictures had none in training
``endpoint_step``         N steps are N - 1 intervals and a last one of 1/N from the data's end; an edit's first time is
                          shifted, although its state has the noise of the unshifted time
``bf16_latents``          x_t is rounded to bfloat16 after every step

Its other defects have no counterpart here: in a batch of unequal lengths every row is computed as if alone, no answer
depends on another row, and all pictures of a message are read.
"""


@dataclass(frozen=True)
class Settings(FlowSettings):
    """Sampler settings. ``source_share``: an edit starts from a mix of this share of its (last) source's latents
    with noise, and takes proportionally fewer steps. With 0 it starts from noise; the source is in its context only."""

    source_share: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.source_share < 1:
            raise ValueError(f"source_share must be in [0, 1), not {self.source_share}")


@dataclass(frozen=True)
class Config:
    """Sizes and settings; ``tiny`` and ``b1_5`` (the published Cheers) are the named ones.

    ``merge``          vision tokens on a side of one semantic token
    ``head_layers``    blocks of the coarse and of the fine stage; no fine ones: the coarse stage gives the latents
    ``detail``         what the fine stage is given beside the semantic tokens: gated detail, all of it, or none (the
                       gate then scales the tokens themselves, so that the parameters are as many)
    ``pixels``         latents become pixels before the vision encoder; else it reads the latents themselves
    ``unit_pixels``    the autoencoder's pictures are in [0, 1], not in [-1, 1]
    ``roles``          turns begin with their role, after a system turn; else the markers of a turn are all there is
    ``sizes``          how pictures keep their shape; None: all are brought to ``size``, those to read with black
                       borders, those to draw cropped
    """

    decoder: DecoderConfig
    vision: VisionConfig
    autoencoder: AutoencoderConfig
    merge: int = 2
    head_layers: tuple[int, int] = (7, 3)
    detail: Literal["gated", "added", "none"] = "gated"
    pixels: bool = True
    unit_pixels: bool = True
    roles: bool = True
    prediction: Prediction = "velocity"
    times: TimeDraw = TimeDraw(uniform=True)
    sizes: SizeRule | None = None
    size: tuple[int, int] = (512, 512)
    settings: Settings = field(
        default_factory=lambda: Settings(
            80, guidance_scale=9.5, guidance_interval=(0.0, 1.0), timestep_shift=2.0, renorm="none", source_share=0.1
        )
    )
    published_quirks: tuple[Quirk, ...] = ()

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.published_quirks) - set(get_args(Quirk))):
            raise ValueError(f"unknown published_quirks {unknown}; choose from {', '.join(get_args(Quirk))}")
        if self.decoder.routes != 1:
            raise ValueError(f"Cheers has one route; the decoder config has {self.decoder.routes}")
        if min(self.merge, self.head_layers[0]) < 1 or self.head_layers[1] < 0:
            raise ValueError(f"merge {self.merge} and head_layers {self.head_layers} must be at least 1 (fine: 0)")
        patch = self.autoencoder.downsample if self.pixels else 1
        if self.vision.patch_size != patch:
            raise ValueError(
                f"vision.patch_size must be {patch}, one patch for each latent, not {self.vision.patch_size}"
            )
        if invalid := [s for s in (*self.size, self.sizes and self.sizes.stride) if s and s % self.stride]:
            raise ValueError(f"size and sizes.stride must be multiples of {self.stride}, not {invalid[0]}")

    @property
    def stride(self) -> int:
        """Pixels on a side of one semantic token."""
        return self.merge * self.autoencoder.downsample

    @property
    def trained(self) -> Sizes:
        """The sizes of pictures that the model was trained on."""
        sides = (self.sizes.shortest, self.sizes.longest) if self.sizes else (min(self.size), max(self.size))
        return Sizes(self.size, self.stride, *sides, read=sides[1])

    @staticmethod
    def b1_5() -> Config:
        """The published Cheers: FLUX.2's autoencoder, SigLIP2 so400m/16 at 512, Qwen2.5-1.5B."""
        return Config(
            DecoderConfig(151936, 1536, 8960, 28, 12, 2, tie_word_embeddings=True),
            VisionConfig(1152, 4304, 27, 16, patch_size=16, image_size=512, pooling=True),
            AutoencoderConfig(latent_channels=32, statistics=True, fold=2, quant=True),
            published_quirks=("repeated_positions",),
        )

    @staticmethod
    def tiny(vocab_size: int = 1032) -> Config:
        """The same code at a size that a CPU core trains in hours: 64 x 64 pixels, 64 latents, 16 tokens a picture."""
        return Config(
            DecoderConfig(vocab_size, 192, 384, 6, 6, 2, qk_norm=True, tie_word_embeddings=True),
            VisionConfig(128, 256, 3, 4, patch_size=8, image_size=64),
            tiny_autoencoder(),
            head_layers=(1, 2),
            unit_pixels=False,
            roles=False,
            prediction="data",
            times=TimeDraw(mean=1.8),
            sizes=SizeRule(longest=64, shortest=64, stride=64),
            size=(64, 64),
            settings=Settings(25, guidance_scale=2.5, guidance_interval=(0.0, 0.9), timestep_shift=3.0, renorm="none"),
        )


class MergingProjector(nn.Module):
    """Norm, merge of every ``merge`` x ``merge`` neighbourhood (row, column, channel fastest), linear, GELU, linear."""

    def __init__(self, width_in: int, width_out: int, merge: int) -> None:
        super().__init__()
        self.merge, inner = merge, width_in * merge**2
        self.layernorm = nn.LayerNorm(width_in)
        self.mlp = nn.Sequential(nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, width_out))

    def forward(self, x: Float[Tensor, "N m v"], grid: tuple[int, int]) -> Float[Tensor, "N n d"]:
        """``grid`` is the (rows, columns) of the merged tokens."""
        p = self.merge
        x = rearrange(self.layernorm(x), "N (h p w q) c -> N (h w) (p q c)", h=grid[0], p=p, w=grid[1], q=p)
        return self.mlp(x)


def channel_to_space(x: Float[Tensor, "N n f"], grid: tuple[int, int], merge: int) -> Float[Tensor, "N m c"]:
    """The inverse of the merge: every token becomes ``merge`` x ``merge`` of its neighbourhood."""
    return rearrange(x, "N (h w) (p q c) -> N (h p w q) c", h=grid[0], w=grid[1], p=merge, q=merge)


class HeadLayer(nn.Module):
    """x += g1 attend(rms(x) (1 + s1) + b1);  x += g2 swiglu(rms(x) (1 + s2) + b2);  b, s, g from the time."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        d = c.hidden_size
        self.heads = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
        self.modulation = nn.Linear(d, 6 * d)
        self.input_layernorm = RMSNorm(d, c.rms_norm_eps)
        self.attn = Attention(c)
        self.o_proj = nn.Linear(d, d, bias=False)
        self.post_attention_layernorm = RMSNorm(d, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Float[Tensor, "N n d"], time: Float[Tensor, "N d"], rope: Rope) -> Float[Tensor, "N n d"]:
        """(N, n, d) to the same shape; ``rope`` rotates queries and keys."""
        b1, s1, g1, b2, s2, g2 = self.modulation(F.silu(time))[:, None].chunk(6, -1)
        h = self.input_layernorm(x) * (1 + s1) + b1
        q, k, v = (y.unflatten(0, x.shape[:2]) for y in self.attn(h.flatten(0, 1)).split(self.heads, 1))
        x = x + g1 * self.o_proj(sdpa(rope(q), rope(k), v).flatten(-2))
        return x + g2 * self.mlp(self.post_attention_layernorm(x) * (1 + s2) + b2)


class Final(nn.Module):
    """RMSNorm, shift and scale from the time, linear."""

    def __init__(self, width: int, out: int, eps: float) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.norm = RMSNorm(width, eps)
        self.linear = nn.Linear(width, out)

    def forward(self, x: Float[Tensor, "N n d"], time: Float[Tensor, "N d"]) -> Float[Tensor, "N n o"]:
        """The predictions of every token; ``time`` are features of the timestep."""
        shift, scale = self.modulation(F.silu(time))[:, None].chunk(2, -1)
        return self.linear(self.norm(x) * (1 + scale) + shift)


class HeadStage(nn.Module):
    """One stage of the head: an embedding of the time, blocks that attend within one picture, the final layer."""

    def __init__(self, width: int, heads: int, kv_heads: int, layers: int, out: int, eps: float) -> None:
        super().__init__()
        c = self.config = DecoderConfig(
            1, width, 4 * width, layers, heads, kv_heads, rms_norm_eps=eps, rope_theta=1e4, qkv_bias=False
        )
        self.time = TimestepEmbedding(width)
        self.layers = nn.ModuleList(HeadLayer(c) for _ in range(layers))
        self.final = Final(width, out, eps)

    def forward(
        self, x: Float[Tensor, "N n d"], t: Float[Tensor, " N"], positions: Int[Tensor, " n"]
    ) -> Float[Tensor, "N n o"]:
        """``t`` runs from 0 (noise) to 1 (data) and is not scaled."""
        time, rope = self.time(t), Rope(positions, self.config.width, self.config.rope_theta)
        for layer in self.layers:
            x = layer(x, time, rope)
        return self.final(x, time)


class Gate(nn.Module):
    """Detail beside semantics: LayerNorm(s + g e), g one number a token, of any sign and size (the paper's formula
    leaves out the norm)."""

    def __init__(self, width: int, detail: str) -> None:
        super().__init__()
        self.detail = detail
        self.gate = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, s: Float[Tensor, "N m v"], e: Float[Tensor, "N m v"]) -> Float[Tensor, "N m v"]:
        """The input of the fine stage: semantic tokens ``s`` with the detail ``e``."""
        if self.detail == "added":
            return self.layer_norm(s + e)
        return self.layer_norm(s + self.gate(s) * (s if self.detail == "none" else e))


PRESETS = {
    "published": Preset(
        "the published code as it samples, oddities included",
        {},
        {},
        config={"published_quirks": ["repeated_positions", "endpoint_step", "dummy_picture", "bf16_latents"]},
    )
}


class Cheers(UnifiedModel[Settings]):
    """Cheers of any size."""

    family = "cheers"
    presets = PRESETS
    frozen = frozenset({"autoencoder"})
    generation = ("decoder", "head")
    conditions = ("text", "image")
    encoders: ClassVar = {"autoencoder": Encoder(("autoencoder",), ("autoencoder", "unit_pixels", "sizes", "size"))}
    parts: ClassVar = {
        "decoder": ("decoder.*",),
        "vision": ("vision.*",),
        "pixels": ("pixel_decoder.*",),
        "projector": ("projector.*",),
        "head": ("coarse.*", "gate.*", "fine.*"),
        "autoencoder": ("autoencoder.*",),
    }

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__()
        c, d, v = config, config.decoder.hidden_size, config.vision.hidden_size
        self.config, self.settings = config, config.settings
        self.tokenizer = tokenizer.adding(ADDED)
        self.decoder = Decoder(c.decoder)
        self.vision = VisionEncoder(c.vision, 3 if c.pixels else c.autoencoder.features)
        self.projector = MergingProjector(v, d, c.merge)
        kv, eps, latents = c.decoder.num_key_value_heads, c.decoder.rms_norm_eps, c.autoencoder.features
        coarse, fine = c.head_layers
        width = v if fine else latents
        self.coarse = HeadStage(d, c.decoder.num_attention_heads, kv, coarse, c.merge**2 * width, eps)
        if fine:
            self.gate = Gate(v, c.detail)
            self.fine = HeadStage(v, c.vision.num_attention_heads, kv, fine, latents, eps)
        self.autoencoder = build_latent_autoencoder(c.autoencoder)
        if c.pixels:
            self.pixel_decoder = LatentDecoder(c.autoencoder)
        tokens = {"turn": "<|im_start|>", "stop": "<|im_end|>", "start": START, "end": END, "blank": BLANK}
        self.markers = {name: self.tokenizer.id(token) for name, token in tokens.items()}
        if len(self.tokenizer) > c.decoder.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(self.tokenizer)} tokens with Cheers's, the decoder {c.decoder.vocab_size}"
            )

    def initialise(self, seed: int) -> None:
        """For training from scratch: weights of variance 1 / inputs, what writes to a residual stream divided by
        sqrt(2 layers); what the time modulates, the gate and the predictions begin at zero (published: all but the
        last). The autoencoder is left alone."""
        generator = torch.Generator().manual_seed(seed)
        c = self.config
        depth = {"decoder": c.decoder.num_hidden_layers, "vision": c.vision.num_hidden_layers}
        draw_weights(self, generator, depth, embedding=c.decoder.hidden_size**-0.5)
        for name, module in self.named_modules():
            if name.startswith("pixel_decoder.") and isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)
        fine = self.config.head_layers[1] > 0
        zero = [layer.modulation for s in self._stages() for layer in s.layers]
        zero += [self._stages()[-1].final.linear, *([self.gate.gate[2]] if fine else [])]
        for linear in zero:
            assert isinstance(linear, nn.Linear)
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def _stages(self) -> list[HeadStage]:
        return [self.coarse, self.fine] if self.config.head_layers[1] else [self.coarse]

    def blocks(self) -> Iterator[nn.Module]:
        """Decoder layers, the vision encoder's, then those of the head."""
        yield from self.decoder.layers
        yield from self.vision.layers
        for stage in self._stages():
            yield from stage.layers

    def trunk(self) -> Iterator[nn.Module]:
        """The decoder layers."""
        yield from self.decoder.layers

    # ---- layout -------------------------------------------------------------------------------------------------

    def lay_out(self, sample: Sample, drop: Drop = NOTHING) -> Layout:
        """ChatML with each picture between its markers. Dropping ``text`` does not remove the text of a request: it
        replaces all tokens before the generated picture, except picture markers, by <no_mean>, without targets."""
        sample, page = dropped(sample, drop - {"text"}), _ChatML(self, drop)
        if "dummy_picture" in self.config.published_quirks and not any(True for _ in sample.images()):
            page.show(self._dummy(sample))
        if self.config.roles and sample.messages[0].role != "system":
            self._turn(page, sample, Message("system", (Text(SYSTEM),)), -1)
        for index, message in enumerate(sample.messages):
            self._turn(page, sample, message, index)
        return page.done(sample.id)

    def _turn(self, page: _ChatML, sample: Sample, message: Message, index: int) -> None:
        """Writes message ``index``: <|im_start|>, the role, the parts, and <|im_end|> unless the turn goes on (an open
        turn) or ends with the target."""
        roles, last = self.config.roles, index == len(sample.messages) - 1
        visible = "visible_noise" in self.config.published_quirks
        page.write(self.markers["turn"])
        page.text(f"{message.role}\n" if roles else "")
        learned = False  # whether the latest part has a loss
        for i, part in enumerate(message.parts):
            following = i + 1 < len(message.parts)
            if isinstance(part, Text):
                learned = part.loss
                if learned:
                    page.write(*self.tokenizer.encode(part.text), learned=True)
                else:
                    page.text(part.text)
            elif part.blank:
                page.write(self.markers["start"])
            else:
                learned = part.role == "target" and not sample.is_open
                page.write(self.markers["start"], learned=learned)
                if learned:
                    page.show(self._target(part, visible))
                    if (index, i) == sample.drawing:
                        page.drop -= {"text"}  # what follows the picture keeps its text
                    if last and not following and not visible:
                        return
                if not (learned and visible):
                    page.show(self._picture(Kind.CLEAN if part.role == "condition" else Kind.VISION, part))
                page.write(self.markers["end"])
                newline = roles and message.role == "user" and following and not (learned and visible)
                page.text("\n" if newline else "")
        if not (last and sample.is_open):
            page.write(self.markers["stop"], learned=learned)
            page.text("\n" if roles else "")

    def text_segments(self, run: Sequence[tuple[int, bool]], drop: Drop) -> list[Segment]:
        """The segments of a run of text tokens, cut where supervision begins or ends."""
        structural = "structural_labels" in self.config.published_quirks
        labels = [i if learned and ("text" not in drop or structural) else NONE for i, learned in run]
        if structural:
            always = {self.markers[n] for n in ("turn", "stop", "start", "blank")} | set(self.tokenizer.encode("\n"))
            labels = [i if i in always else label for (i, _), label in zip(run, labels, strict=True)]
        ids = self.reply([i for i, _ in run], drop).segments[0].ids if run else ()
        targets = (*labels[1:], NONE)
        ends = [i for i in range(1, len(ids)) if _speaks(targets, i) != _speaks(targets, i - 1)]
        spans = zip([0, *ends], [*ends, len(ids)], strict=True)
        return [Segment(Kind.TEXT, ids[a:b], targets[a:b] if _speaks(targets, a) else ()) for a, b in spans if a < b]

    def _target(self, image: Image, visible: bool) -> Segment:
        block = replace(self._picture(Kind.NOISED, image), generated=True)
        return block if visible else replace(block, hidden=True, advance=0)

    def _picture(self, kind: Kind, image: Image) -> Segment:
        c = self.config
        size = c.sizes(*image.dimensions) if c.sizes else c.size

        def pixels() -> Tensor:
            if c.sizes:
                return to_tensor(image.pixels, size, image.nearest)
            framed = (crop if image.role == "target" else letterbox)(image.pixels, size, image.nearest)
            return to_tensor(framed, size, image.nearest)

        held, encoded = image.through("autoencoder", pixels)
        return self._block(kind, size, held, encoded=encoded, masked=image.masked)

    def _block(self, kind: Kind, size: tuple[int, int], image: Tensor, **columns: Any) -> Segment:
        grid = (size[1] // self.config.stride, size[0] // self.config.stride)
        return Segment(kind, (NONE,) * (grid[0] * grid[1]), image=image, grid=grid, **{"full": True, **columns})

    def _dummy(self, sample: Sample) -> Segment:
        """The dummy picture of the published code before a text without pictures: causal, and without markers."""
        width, height = self.config.size
        if sample.is_open:
            pixels = Noise().uniform(sample.id, "dummy", (3, height, width)) * 2 - 1
            return self._block(Kind.VISION, (width, height), pixels, full=False)
        black = torch.zeros(3, height, width, dtype=torch.uint8)
        return self._block(Kind.NOISED, (width, height), black, full=False)

    # ---- network ------------------------------------------------------------------------------------------------

    def _latents(self, group: Pictures) -> Float[Tensor, "N c h w"]:
        return self.through("autoencoder", group).float()

    def encode(self, encoder: str, images: Tensor) -> Float[Tensor, "N c h w"]:
        """Latents of uint8 or float pictures: the posterior's mean. No gradient passes, unless the
        pixels ask for it."""
        with torch.set_grad_enabled(images.requires_grad):
            pixels = to_float(images)
            return self.autoencoder.encode((pixels + 1) / 2 if self.config.unit_pixels else pixels)

    def _see(self, z: Float[Tensor, "N c h w"]) -> tuple[Float[Tensor, "N n d"], Float[Tensor, "N m v"]]:
        """The one tokenizer: semantic tokens of latents, clean or noised, and their detail, which is the patches (with
        their positions) that the vision encoder began with."""
        rows, columns = z.shape[-2:]
        image = self.pixel_decoder.decode(z) if self.config.pixels else z
        detail = self.vision.embed(image, self.vision.resized((rows, columns)))
        merge = self.config.merge
        return self.projector(self.vision(image, embedded=detail), (rows // merge, columns // merge)), detail

    def _predict(
        self, hidden: Float[Tensor, "N n d"], detail: Float[Tensor, "N m v"], t: Float[Tensor, " N"], z: Tensor
    ) -> Float[Tensor, "N c h w"]:
        """The head's prediction for the picture ``z`` at times ``t`` (1 at noise): its velocity, or its data."""
        grid = (z.shape[-2] // self.config.merge, z.shape[-1] // self.config.merge)
        places = torch.arange(detail.shape[1], device=hidden.device)
        out = channel_to_space(self.coarse(hidden, 1 - t, places[: hidden.shape[1]]), grid, self.config.merge)
        if self.config.head_layers[1]:
            repeated = "repeated_positions" in self.config.published_quirks
            out = self.fine(self.gate(out, detail), 1 - t, places % (len(places) // 2) if repeated else places)
        out = rearrange(out, "N (h w) c -> N c h w", h=z.shape[-2]).float()
        return -out if self.config.prediction == "velocity" else out

    def _supervised(self, group: Pictures) -> bool:
        return group.generated or "loss_on_all_pictures" in self.config.published_quirks

    def counts(self, batch: Batch) -> dict[str, float]:
        """``text``: supervised tokens; ``image``: latents of the pictures that carry the flow loss."""
        latents = sum(g.tokens.numel() for g in batch.pictures if self._supervised(g)) * self.config.merge**2
        return {"text": float((batch.targets != NONE).sum()), "image": float(latents)}

    def predict(self, batch: Batch, noise: Noise) -> Predictions:
        """``text``: supervised tokens; ``image``: noised latents."""
        pictures, drawn = [], []
        for g in batch.pictures:
            data = self._latents(g)
            t, eps = data.new_zeros(len(data)), data  # a picture that is read has no noise: its velocity is 0
            if g.kind == Kind.NOISED:
                eps = draw_noise(noise, g, "noise", tuple(data.shape[1:])).to(data.device)
                t = self.config.times(noise, g.owners, g.ordinals).to(data.device) if g.generated else t + 1
            tokens, detail = self._see(mix(data, eps, t))
            pictures.append((g.tokens, blanked(tokens, g, noise)))
            if self._supervised(g):
                drawn.append((g.tokens, data, eps, t, detail))
        states = self.decoder(self.decoder.embed(batch, pictures), batch.positions, documents(batch))
        image = []
        for tokens, data, eps, t, detail in drawn:
            hidden = states.index_select(0, tokens.flatten()).unflatten(0, tuple(tokens.shape))
            prediction, document = self._predict(hidden, detail, t, data), batch.document[tokens[:, 0]]
            image.append(FlowPrediction(prediction, Noised(data, eps, t), self.config.prediction, document, features=1))
        return {"text": supervised(states, self.decoder.head_weight, batch), "image": tuple(image)}

    # ---- prefill ------------------------------------------------------------------------------------------------

    def open(self) -> Context:
        """A context with an empty KV cache and no edit sources."""
        return Context(self.decoder.cache(), private=())

    @torch.inference_mode()
    def extend(self, contexts: Sequence[Context], sequences: Sequence[Layout]) -> list[Context]:
        """Prefills text and clean pictures. ``Context.private`` holds (end, latents) of every edit source. Raises
        ``ValueError`` for a noised picture."""
        batch = pack(sequences, self.routes).to(self.device)
        if batch.of(Kind.NOISED):
            raise ValueError("a noised picture cannot be prefilled; use start and step")
        starts, noise = torch.tensor([c.position for c in contexts], device=self.device), Noise()
        caches = [c.cache.reserve(c.length, len(s)) for c, s in zip(contexts, sequences, strict=True)]
        ends = torch.tensor(batch.lengths).cumsum(0)
        sources: list[list[tuple[int, Tensor]]] = [[] for _ in contexts]
        pictures = []
        for g in batch.pictures:
            z = self._latents(g)
            pictures.append((g.tokens, blanked(self._see(z)[0], g, noise)))
            for places, latents in zip(g.tokens, z, strict=True):
                if g.kind == Kind.CLEAN:
                    d = int(batch.document[places[0]])
                    begins = int(ends[d]) - batch.lengths[d]
                    sources[d].append((contexts[d].length + int(places[-1]) + 1 - begins, latents))
        attend = Cached(caches, [c.length for c in contexts], batch)
        stream = self.decoder.embed(batch, pictures)
        states = self.decoder(stream, batch.positions + starts[batch.document], attend)
        logits = self.decoder.logits(states[ends.to(self.device) - 1]).float()
        read = read_on(contexts, sequences, caches, logits)
        return [replace(c, private=(*c.private, *sorted(new, key=lambda s: s[0]))) for c, new in zip(read, sources)]

    def rewind(self, context: Context, length: int, position: int) -> Context:
        """See ``UnifiedModel``; edit sources after ``length`` are removed."""
        private = tuple(source for source in context.private if source[0] <= length)
        return replace(super().rewind(context, length, position), private=private)

    def reply(self, ids: Sequence[int], drop: Drop = NOTHING) -> Layout:
        """See ``UnifiedModel``; without text, all tokens but picture markers become <no_mean>."""
        kept = {self.markers["start"], self.markers["end"]}
        blank = self.markers["blank"]
        ids = [i if i in kept else blank for i in ids] if "text" in drop else ids
        return Layout("reply", (Segment(Kind.TEXT, tuple(ids)),))

    @property
    def stop_ids(self) -> frozenset[int]:
        """<|im_end|>."""
        return frozenset({self.markers["stop"]})

    @property
    def picture_word(self) -> int:
        """<im_start>."""
        return self.markers["start"]

    def lay_out_picture(self, image: Image) -> tuple[Segment, ...]:
        """The clean picture and <im_end>."""
        return self._picture(Kind.VISION, image), Segment(Kind.TEXT, (self.markers["end"],))

    # ---- generation ---------------------------------------------------------------------------------------------

    def canvas(self, sample: Sample) -> tuple[int, int]:
        """The (height, width) of the picture to generate: see ``fitted``."""
        return fitted(sample, self.config.trained, self.config.sizes)

    def start(
        self,
        contexts: Sequence[tuple[Context, ...]],
        samples: Sequence[Sample],
        settings: Sequence[Settings],
        seeds: Sequence[int],
    ) -> list[Drawing[Settings]]:
        """Noise for each request, mixed with the last edit source where ``source_share`` asks for it."""
        drawings = []
        for read, sample, s, seed in zip(contexts, samples, settings, seeds, strict=True):
            canvas = self.canvas(sample)
            rows, columns = (side // self.config.autoencoder.downsample for side in canvas)
            noise = Noise(seed).normal("drawing", "noise", (self.config.autoencoder.features, rows, columns))
            edited = any(picture.role == "condition" for picture in sources(sample))
            source = read[0].private[-1][1] if edited else None  # the request was read last
            drawings.append(self.begin(noise.to(self.device), read, self.branches(sample, s), canvas, s, source))
        return drawings

    def begin(
        self,
        noise: Float[Tensor, "c h w"],
        contexts: tuple[Context, ...],
        branches: Branches,
        canvas: tuple[int, int],
        s: Settings,
        source: Float[Tensor, "c _ _"] | None = None,
    ) -> Drawing[Settings]:
        """A drawing from given noise; an edit's begins at ``source_share`` of its last source."""
        state, share = noise, s.source_share if source is not None else 0.0
        if share and source is not None:
            if source.shape != noise.shape:
                raise ValueError(
                    "an edit that begins at its source has the source's size; set source_share to 0 for another"
                )
            state = mix(source[None], noise[None], noise.new_tensor([1 - share]))[0]
        times = self._times(s, share)
        return Drawing(state.flatten(1).T, contexts, branches, canvas, s, len(times) - 1, times)

    def _times(self, s: Settings, share: float) -> Float[Tensor, " steps_1"]:
        steps, first = max(1, int((1 - share) * s.num_inference_steps + 1e-9)), 1 - share
        if "endpoint_step" in self.config.published_quirks:
            points = schedule(steps - 1, s.timestep_shift, first) if steps > 1 else torch.ones(1)
            return torch.cat([points, points.new_tensor([points[-1] - 1 / steps])])
        if s.warped:
            if share:
                raise ValueError("an edit that begins at its source takes shifted times; set warped to false")
            return s.times(steps)
        if share:  # the time that the shift turns into the state's own
            first = float(shift_time(torch.tensor(first, dtype=torch.float64), 1 / s.timestep_shift))
        return schedule(steps, s.timestep_shift, first)

    @torch.inference_mode()
    def step(self, drawings: Sequence[Drawing[Settings]]) -> list[Drawing[Settings]]:
        """One Euler step each. All branches of guidance share the tokenizer's work on the same latents; outside the
        interval they are not computed."""
        check_step(drawings)
        contexts = [d.contexts[b] for b in range(len(drawings[0].contexts)) for d in drawings]
        canvas, table = drawings[0].canvas, drawings[0].private
        if table is None or not table.holds(contexts):
            table = Fixed(contexts, canvas[0] * canvas[1] // self.config.stride**2)

        def velocities(x_t: Tensor, t: Tensor, branches: int) -> Tensor:
            return self._velocity(self._grid(x_t, canvas), t, table, branches).flatten(-2).transpose(-1, -2)

        out = []
        for d, (state, v) in zip(drawings, euler(drawings, velocities), strict=True):
            if "bf16_latents" in self.config.published_quirks:
                state = state.bfloat16().float()
            out.append(advance(d, state, v, table))
        return out

    def _grid(self, tokens: Float[Tensor, "B m c"], canvas: tuple[int, int]) -> Float[Tensor, "B c h w"]:
        rows = canvas[0] // self.config.autoencoder.downsample
        return rearrange(tokens, "B (h w) c -> B c h w", h=rows)

    def _velocity(
        self, z: Float[Tensor, "B c h w"], t: Float[Tensor, " B"], table: Fixed[Context], branches: int
    ) -> Float[Tensor, "R B c h w"]:
        """The velocity of every branch."""
        alone = z.split(1 if z.device.type == "cpu" else len(z))  # on a CPU convolutions are not batch-invariant
        tokens, detail = (torch.cat(x) for x in zip(*(self._see(one) for one in alone), strict=True))
        n, blocks = tokens.shape[1], len(z) * branches
        stream = tokens.to(self.decoder.embed_tokens.weight.dtype).repeat(branches, 1, 1).flatten(0, 1)
        places = torch.arange(blocks * n, device=self.device)
        starts = torch.tensor([c.position for c in table.contexts[:blocks]], device=self.device)
        states = self.decoder(stream, starts.repeat_interleave(n) + places % n, table.over(blocks, places))
        hidden = states.unflatten(0, (blocks, n))
        prediction = self._predict(hidden, detail.repeat(branches, 1, 1), t.repeat(branches), z)
        each = prediction.unflatten(0, (branches, len(z)))
        return torch.stack([velocity(p, z, t, self.config.prediction) for p in each])

    def encoded(self, drawing: Drawing[Settings]) -> dict[str, Tensor]:
        """The latents of a finished drawing, (c, h, w)."""
        return {"autoencoder": self._grid(drawing.state[None].clone(), drawing.canvas)[0]}

    @torch.inference_mode()
    def finish(self, drawings: Sequence[Drawing[Settings]]) -> Float[Tensor, "B 3 H W"]:
        """Decoded pictures, clamped to [-1, 1]."""
        latents = self._grid(torch.stack([d.state for d in drawings]), drawings[0].canvas)
        pictures = self.autoencoder.decode(latents).float()
        return (pictures * 2 - 1 if self.config.unit_pixels else pictures).clamp(-1, 1)


class _ChatML:
    """Builds the layout of a conversation: the segments so far, and the run of tokens since the last picture."""

    def __init__(self, model: Cheers, drop: Drop) -> None:
        self.model, self.drop = model, drop
        self.segments: list[Segment] = []
        self.run: list[tuple[int, bool]] = []  # token ids, each with whether it is to be predicted
        self.pending = ""  # text without loss: encoded in one piece, since a tokenizer merges across its parts

    def text(self, text: str) -> None:
        """Text without loss."""
        self.pending += text

    def write(self, *ids: int, learned: bool = False) -> None:
        """Tokens, after the pending text."""
        if self.pending:
            self.run += [(i, False) for i in self.model.tokenizer.encode(self.pending)]
        self.run += [(i, learned) for i in ids]
        self.pending = ""

    def show(self, picture: Segment) -> None:
        """A picture, after the run of tokens before it."""
        self.segments += [*self.model.text_segments(self.run, self.drop), picture]
        self.run = []

    def done(self, name: str) -> Layout:
        """The layout of the whole conversation."""
        self.write()
        return Layout(name, (*self.segments, *self.model.text_segments(self.run, self.drop)))


def _speaks(targets: Sequence[int], i: int) -> bool:
    """Whether token ``i`` predicts the next one, or is the last one that is predicted."""
    return targets[i] != NONE or (i > 0 and targets[i - 1] != NONE)
