"""SynerGen-VL (arXiv 2412.09604): one next-token model that reads and draws pictures as folded codes.

::

    picture ── VQ tokenizer ── codes ── embed + position ── fold m x n ── MLP ──┐ CODES (route 1)
    text ── embedding ──────────────────────────────────────────────────────────┤ TEXT  (route 0)   one attention, and
                                                                                ▼          in every layer two FFNs
                                             causal decoder ──┬── language head → next token
                                                              └── unfolding head → the m n codes of the next token

    x_V(i) = MLP(concat_j (E[v(i,j)] + P(i,j)))                                  (Eq. 1)
    y = x + Attn(norm x);  out = y + FFN_V(norm y) for picture tokens, FFN_T for text        (Eq. 2)
    p(v(i,j) | v(i,<j), h_i), h_i the final state one token before i             (Eq. 3)
    loss = w_text CE + w_image CE of codes, w_image / w_text = 2                 (Eq. 4)

Layout: chat messages, each picture <boi> tokens <eoi> in its place. A picture to understand is tiled (InternVL 1.5),
its tiles one after another between one pair of markers. A generated picture has the same tokens, which what follows
attends to. Everything is causal and every token has one position. A request without text is "Here is a random image
<UNCOND>:". The three markers have a separate embedding table; their ids follow the vocabulary's last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from diptych.core.batch import Batch, Pictures, pack
from diptych.core.checks import at_least
from diptych.core.layout import Kind, Layout, Segment
from diptych.core.noise import Noise
from diptych.core.sample import Image, Message, Sample, Text
from diptych.core.tensors import NONE, Float, Int, Tensor, to_float
from diptych.models.predictions import Predictions, TokenPrediction
from diptych.models.protocol import (
    NOTHING,
    Branches,
    Context,
    Drawing,
    Drop,
    Encoder,
    UnifiedModel,
    advance,
    check_step,
    draw_weights,
    dropped,
    every_scale,
    fitted,
    read_on,
    supervised,
)
from diptych.models.sizes import Sizes
from diptych.parts.attention import Attend, Cached, Streams, documents, inverse_permutation
from diptych.parts.autoencoder import AutoencoderConfig, build_autoencoder, tiny_tokenizer
from diptych.parts.codes import CodeHead, CodeSettings
from diptych.parts.decoder import Decoder, DecoderConfig
from diptych.parts.fold import Ratio, fold, folded, unfold
from diptych.parts.images import SizeRule, Tiling, fit
from diptych.parts.routed import Routed
from diptych.parts.tokenizer import Tokenizer
from diptych.parts.vision import blanked

WORDS, PICTURES = 0, 1  # the two routes
ENDS = ("</s>", "<|endoftext|>")  # also end an answer, if the tokenizer has them
UNCONDITIONAL = ("Here is a random image", ":")  # around <UNCOND>


@dataclass(frozen=True)
class Chat:
    """How messages are written: ``begin`` once, then of each ``role`` (with the role's name), its parts and ``end``."""

    begin: str = ""
    role: str = "<|im_start|>{role}\n"
    end: str = "<|im_end|>\n"


@dataclass(frozen=True)
class Config:
    """Sizes and settings; ``b2`` (InternLM2-1.8B), ``qwen2`` (the ablations' Qwen2-0.5B) and ``tiny`` are named.

    ``grid`` are the (rows, columns) of the table of code positions, resized for pictures of another grid;
    ``image_loss_on_und`` lets pictures that are read carry the picture loss too, on which the paper is silent.
    """

    decoder: DecoderConfig
    head: DecoderConfig
    autoencoder: AutoencoderConfig
    fold: Ratio = (2, 8)
    embed_size: int = 2048
    embed_std: float = 0.02  # of fresh embeddings
    grid: tuple[int, int] = (64, 64)
    see: Tiling = Tiling(512)
    draw: SizeRule = SizeRule(longest=512, shortest=512, stride=512)
    size: tuple[int, int] = (512, 512)
    chat: Chat = Chat()
    image_loss_on_und: bool = False
    settings: CodeSettings = field(default_factory=CodeSettings)

    def __post_init__(self) -> None:
        at_least(1, self, "fold", "embed_size", "grid", "size")
        c, cell = self.decoder, (self.fold[0] * self.autoencoder.downsample, self.fold[1] * self.autoencoder.downsample)
        if not self.autoencoder.codebook or self.head.vocab_size != self.autoencoder.codebook:
            raise ValueError(
                f"the head says {self.head.vocab_size} codes, the {self.autoencoder.kind} autoencoder has "
                f"{self.autoencoder.codebook}; it must be a vq or emu3 with as many"
            )
        if self.head.routes != 1 or (c.routes, c.routed) not in ((1, ()), (2, ("mlp",))):
            raise ValueError("the decoder has two routes of mlp, or one of everything; the head has one")
        sides = {"see.side": (self.see.side,) * 2, "draw.stride": (self.draw.stride,) * 2, "size": self.size[::-1]}
        for name, (height, width) in sides.items():
            if height % cell[0] or width % cell[1]:
                raise ValueError(f"{name} {height}x{width} does not divide into tokens of {cell[0]}x{cell[1]} pixels")

    @property
    def stride(self) -> int:
        """The sides of generated pictures are multiples of this many pixels."""
        return self.draw.stride

    @property
    def trained(self) -> Sizes:
        """The sizes of pictures that the model was trained on."""
        return Sizes(self.size, self.stride, self.draw.shortest, self.draw.longest, self.see.side * self.see.most)

    @property
    def codes_per_token(self) -> int:
        """Codes of one token."""
        return self.fold[0] * self.fold[1]

    @staticmethod
    def over(decoder: DecoderConfig, **changes: Any) -> Config:
        """On a base language model: vision experts beside its FFNs, four of its layers as the unfolding head, Emu3's
        tokenizer."""
        head = replace(decoder, vocab_size=32768, num_hidden_layers=4, tie_word_embeddings=False)
        base = replace(decoder, routes=2, routed=("mlp",))
        sizes: dict[str, Any] = {"autoencoder": AutoencoderConfig("emu3"), "embed_size": decoder.hidden_size}
        return Config(base, head, **(sizes | changes))

    @staticmethod
    def b2() -> Config:
        """The published one: InternLM2-1.8B, 512 x 512 pixels in 256 tokens."""
        base = DecoderConfig(92544, 2048, 8192, 24, 16, 8, rms_norm_eps=1e-5, qkv_bias=False)
        return Config.over(base, chat=Chat(begin="<s>"))

    @staticmethod
    def qwen2() -> Config:
        """The ablations': Qwen2-0.5B-Instruct, 256 x 256 pixels without folding."""
        base = DecoderConfig(151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True)
        rule = SizeRule(longest=256, shortest=256, stride=256)
        return Config.over(base, fold=(1, 1), grid=(32, 32), see=Tiling(256), draw=rule, size=(256, 256))

    @staticmethod
    def tiny(vocab_size: int = 1024) -> Config:
        """The same code at a size that two CPU cores train: 64 x 64 pixels, 256 codes in 16 tokens a picture."""
        return Config(
            DecoderConfig(vocab_size, 192, 384, 6, 6, 2, qk_norm=True, routes=2, routed=("mlp",)),
            DecoderConfig(1000, 128, 256, 2, 4, 2, qk_norm=True),
            tiny_tokenizer(),
            embed_size=64,
            embed_std=0.3,
            grid=(16, 16),
            see=Tiling(64),
            draw=SizeRule(longest=64, shortest=64, stride=64),
            size=(64, 64),
            chat=Chat(role="<|im_start|>", end="<|im_end|>"),
            settings=CodeSettings(guidance_scale=2.0, temperature=0.5),
        )


class FoldMLP(nn.Module):
    """Norm, linear, GELU, linear: from the features of a fold to the decoder's width. The paper says "MLP"."""

    def __init__(self, wide: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(wide)
        self.fc1 = nn.Linear(wide, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "*n f"]) -> Float[Tensor, "*n d"]:
        """One decoder token for each fold."""
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class VisualEmbed(nn.Module):
    """Codes to tokens (Eq. 1): embedding, learned 2-D position, folding, MLP."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.ratio, d = c.fold, c.decoder.hidden_size
        self.tok = nn.Embedding(c.autoencoder.codebook, c.embed_size)
        self.pos = nn.Parameter(torch.zeros(*c.grid, c.embed_size))
        self.proj = FoldMLP(c.codes_per_token * c.embed_size, d)

    def positions(self, grid: tuple[int, int]) -> Float[Tensor, "n s e"]:
        """The position table of a grid of codes, folded; resized (bicubic) for another grid."""
        table: Tensor = self.pos
        if grid != tuple(table.shape[:2]):
            table = F.interpolate(table.permute(2, 0, 1)[None], grid, mode="bicubic")[0].permute(1, 2, 0)
        return fold(table[None], self.ratio)[0]

    def forward(self, codes: Int[Tensor, "*n s"], positions: Float[Tensor, "*n s e"]) -> Float[Tensor, "*n d"]:
        """Tokens of folded codes."""
        return self.proj((self.tok(codes) + positions).flatten(-2))


@dataclass(frozen=True, eq=False)
class _Batched:
    """A drawing that is batched with others: the shared streams, its rows in them, and its last final states."""

    streams: Streams
    rows: tuple[int, ...]  # one a branch
    h: Float[Tensor, "R d"]


class SynerGen(UnifiedModel[CodeSettings]):
    """SynerGen-VL of any size."""

    family = "synergen"
    routes = 2
    frozen = frozenset({"autoencoder"})
    generation = ("decoder.vision", "head")
    conditions = ("text", "image")
    encoders: ClassVar = {"autoencoder": Encoder(("autoencoder",), ("autoencoder", "see", "draw"))}
    parts: ClassVar = {
        "decoder.text": ("decoder.embed_tokens.*", "decoder.lm_head.*", "decoder.layers.*.mlp.0.*"),
        "decoder.attention": ("decoder.layers.*.self_attn.*", "decoder.layers.*.o_proj.*"),
        "decoder.norms": (
            "decoder.norm.*",
            "decoder.layers.*.input_layernorm.*",
            "decoder.layers.*.post_attention_layernorm.*",
        ),
        "decoder.vision": ("decoder.layers.*.mlp.1.*",),
        "special": ("special_embed.*",),
        "vision": ("visual_embed.tok.*", "visual_embed.pos"),
        "projector": ("visual_embed.proj.*",),
        "head": ("unfold.*",),
        "autoencoder": ("autoencoder.*",),
    }

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__()
        c = config
        self.config, self.tokenizer = config, tokenizer
        self.settings = config.settings
        self.decoder = Decoder(c.decoder)
        self.special_embed = nn.Embedding(3, c.decoder.hidden_size)
        self.visual_embed = VisualEmbed(c)
        self.unfold = CodeHead(c.decoder.hidden_size, c.head, c.codes_per_token)
        self.autoencoder = build_autoencoder(c.autoencoder)
        if len(tokenizer) > c.decoder.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the decoder {c.decoder.vocab_size}")
        self.boi, self.eoi, self.uncond = (c.decoder.vocab_size + i for i in range(3))
        self.begin, self.end = tokenizer.encode_markup(c.chat.begin), tokenizer.encode_markup(c.chat.end)
        self.roles = {r: tokenizer.encode_markup(c.chat.role.format(role=r)) for r in ("system", "user", "assistant")}
        if not self.end or not all(self.roles.values()):
            raise ValueError(f"a chat needs text for role and end: {c.chat}")
        if not c.chat.end.startswith(tuple(tokenizer.special)):
            known = ", ".join(tokenizer.special) or "none"
            raise ValueError(
                f"chat.end {c.chat.end!r} must begin with a special token of the tokenizer, which has {known}"
            )
        self._stops = frozenset({self.end[0], *(tokenizer.id(s) for s in tokenizer.special if s in ENDS)})

    def initialise(self, seed: int) -> None:
        """Fresh weights of variance 1 / inputs; layers that write to a residual stream are divided by sqrt(2 layers).
        Vision experts are copies of the text experts. The picture tokenizer does not change."""
        generator = torch.Generator().manual_seed(seed)
        depth = {"decoder": self.config.decoder.num_hidden_layers, "unfold": self.config.head.num_hidden_layers}
        nn.init.normal_(self.visual_embed.pos, std=self.config.embed_std, generator=generator)
        draw_weights(self, generator, depth, self.config.embed_std)
        self.copy_experts()

    def copy_experts(self) -> None:
        """Makes every vision expert a copy of its layer's text FFN (3.1)."""
        for routed in (m for m in self.decoder.modules() if isinstance(m, Routed) and len(m) == 2):
            routed[PICTURES].load_state_dict(routed[WORDS].state_dict())

    def blocks(self) -> Iterator[nn.Module]:
        """Decoder layers, then those of the code head."""
        yield from self.decoder.layers
        yield from self.unfold.layers

    def trunk(self) -> Iterator[nn.Module]:
        """The decoder layers."""
        yield from self.decoder.layers  # a row without a picture to draw does not call the code head

    # ---- layout -------------------------------------------------------------------------------------------------

    def lay_out(self, sample: Sample, drop: Drop = NOTHING) -> Layout:
        """Messages in order; a request without text is ``UNCONDITIONAL``."""
        seen = sum(image.role == "understand" for image in sample.images())  # what is dropped changes no other picture
        sample = dropped(sample, drop)
        segments = [Segment(Kind.TEXT, tuple(self.begin))] if self.begin else []
        for i, message in enumerate(sample.messages):
            asks = sample.drawing is not None and i == sample.request_at
            opens, most = sample.is_open and i == len(sample.messages) - 1, max(1, self.config.see.most // max(seen, 1))
            segments += self._message(message, sample, opens, asks, most)
        return Layout(sample.id, tuple(segments))

    def _message(self, message: Message, sample: Sample, opens: bool, asks: bool, most: int) -> list[Segment]:
        """The segments of one message. A token with loss is the target of the place before it, whatever that holds; so
        is the first token of ``chat.end`` after a text with loss."""
        ids = list(self.roles[message.role])
        learned = [False] * len(ids)
        pictures: dict[int, Segment] = {}
        for part in message.parts:
            if isinstance(part, Text):
                ids += (text := self.tokenizer.encode(part.text))
                learned += [part.loss] * len(text)
            elif part.blank:
                ids.append(self.boi)
            else:
                generated = part.role == "target" and not sample.is_open
                pictures[len(ids)] = block = self._picture(part, generated, most)
                ids += block.ids
                learned += [False] * len(block)
        if asks and not any(isinstance(part, Text) for part in message.parts):
            before, after = map(self.tokenizer.encode, UNCONDITIONAL)
            ids += (text := [*before, self.uncond, *after])
            learned += [False] * len(text)
        if not opens:
            ids += self.end
            last = message.parts[-1] if message.parts else None
            learned += [isinstance(last, Text) and last.loss] + [False] * (len(self.end) - 1)
        targets = [i if s else NONE for i, s in zip(ids[1:], learned[1:], strict=False)] + [NONE]
        return self._cut(ids, targets, pictures)

    def _cut(self, ids: list[int], targets: list[int], pictures: dict[int, Segment]) -> list[Segment]:
        """The segments of a run of ids; ``pictures`` holds the segments of pictures by the index where they begin."""
        out, at = [], 0
        for stop in (*pictures, len(ids)):
            for start, end, block in ((at, stop, None), (stop, stop + len(pictures.get(stop, ())), pictures.get(stop))):
                if start < end:
                    expected = tuple(targets[start:end])
                    segment = block or Segment(Kind.TEXT, tuple(ids[start:end]))
                    out.append(replace(segment, targets=expected if any(t != NONE for t in expected) else ()))
                at = end
        return out

    def _picture(self, image: Image, generated: bool, most: int) -> Segment:
        """A picture between its markers, (tiles, 3, H, W): tiles to understand, one for a condition and a target."""
        c = self.config
        if image.role == "understand":
            width = height = c.see.side
            tiles = c.see.count(*image.dimensions, most)
            held, encoded = image.through("autoencoder", lambda: c.see(image.pixels, most, image.nearest))
        else:
            (width, height), tiles = c.draw(*image.dimensions), 1
            held, encoded = image.through(
                "autoencoder", lambda: fit(image.pixels, (width, height), image.nearest)[None]
            )
        p = c.autoencoder.downsample
        expected = (tiles, height // p, width // p)
        if encoded and tuple(held.shape) != expected:
            stored, needed = (" x ".join(map(str, shape)) for shape in (held.shape, expected))
            raise ValueError(f"a picture was encoded as {stored} codes and is {needed} here; encode it again")
        grid = self._grid(height, width)
        ids = (self.boi, *[NONE] * (tiles * grid[0] * grid[1]), self.eoi)
        columns: dict[str, Any] = {"generated": generated, "encoded": encoded, "masked": image.masked}
        return Segment(Kind.CODES, ids, image=held, grid=grid, route=PICTURES, **columns)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the tokens of a picture."""
        p = self.config.autoencoder.downsample
        return folded((height // p, width // p), self.config.fold)

    # ---- network ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _codes(self, group: Pictures) -> Int[Tensor, "N t n s"]:
        """Folded codes of a group's pictures, tile by tile."""
        codes = self.through("autoencoder", group)
        return fold(codes.long().flatten(0, 1), self.config.fold).unflatten(0, codes.shape[:2])

    @torch.no_grad()
    def encode(self, encoder: str, images: Tensor) -> Tensor:
        """Codes (N, tiles, h, w) of uint8 or float pictures (N, tiles, 3, H, W), as int16 where that is enough."""
        with torch.autocast(images.device.type, enabled=False):  # half precision chooses other codes
            codes = self.autoencoder.encode(to_float(images.flatten(0, 1)))
        kept = torch.int16 if self.config.autoencoder.codebook <= 2**15 else torch.int32
        return codes.to(kept).unflatten(0, images.shape[:2])

    def _embed_codes(self, codes: Int[Tensor, "N t n s"], grid: tuple[int, int]) -> Float[Tensor, "N m d"]:
        m, n = self.config.fold
        positions = self.visual_embed.positions((grid[0] * m, grid[1] * n))
        return self.visual_embed(codes, positions.expand(*codes.shape, -1)).flatten(1, 2)

    def _embed_text(self, ids: Int[Tensor, " W"]) -> Float[Tensor, "W d"]:
        V = self.config.decoder.vocab_size
        text = self.decoder.embed_tokens(ids.clamp(max=V - 1))
        marks = self.special_embed((ids - V).clamp(min=0)).to(text.dtype)
        return torch.where((ids < V)[:, None], text, marks)

    def _run(
        self, batch: Batch, pictures: list[tuple[Tensor, Tensor]], positions: Tensor, order: Tensor, attend: Attend
    ) -> Float[Tensor, "T d"]:
        """Final states in stream order, from the pictures' (places, tokens) and the batch's text."""
        stream = self.decoder.embed(batch, pictures, order, self._embed_text)
        return self.decoder(stream, positions[order], attend, [len(r) for r in batch.routes])

    def _generated(self, batch: Batch) -> list[Pictures]:
        """The pictures that carry the picture loss."""
        return [g for g in batch.of(Kind.CODES) if g.generated or self.config.image_loss_on_und]

    def counts(self, batch: Batch) -> dict[str, float]:
        """``text``: supervised tokens; ``image``: codes of the pictures that carry the picture loss."""
        return {
            "text": float((batch.targets != NONE).sum()),
            "image": float(sum(g.tokens.numel() * self.config.codes_per_token for g in self._generated(batch))),
        }

    def predict(self, batch: Batch, noise: Noise) -> Predictions:
        """``text``: supervised tokens; ``image``: codes (Eq. 4). A picture's first token is predicted from <boi>, every
        other from the token before it. Only masks are random."""
        order = torch.cat(batch.routes)
        rank = inverse_permutation(order)
        codes = {id(g): self._codes(g) for g in batch.of(Kind.CODES)}
        pictures = [
            (g.tokens, blanked(self._embed_codes(codes[id(g)], g.grid), g, noise)) for g in batch.of(Kind.CODES)
        ]
        states = self._run(batch, pictures, batch.positions, order, documents(batch, order))

        image: tuple[TokenPrediction, ...] = ()
        if groups := self._generated(batch):
            before = torch.cat([g.tokens.flatten() for g in groups]) - 1
            answer = torch.cat([codes[id(g)].flatten(0, 2) for g in groups])
            hidden = self.unfold(states.index_select(0, rank[before]), answer)
            document = batch.document[before].repeat_interleave(self.config.codes_per_token)
            image = (TokenPrediction(hidden, self.unfold.classifier.weight, answer.flatten(), document),)
        return {"text": supervised(states, self.decoder.head_weight, batch, rank), "image": image}

    # ---- prefill ------------------------------------------------------------------------------------------------

    def open(self) -> Context:
        """A context with an empty KV cache."""
        return Context(self.decoder.cache())

    @torch.inference_mode()
    def extend(self, contexts: Sequence[Context], sequences: Sequence[Layout]) -> list[Context]:
        """Prefills; a context keeps its last final state, from which a picture's first token is predicted."""
        batch, noise = pack(sequences, self.routes).to(self.device), Noise()
        order = torch.cat(batch.routes)
        positions = batch.positions + torch.tensor([c.position for c in contexts], device=self.device)[batch.document]
        caches = [c.cache.reserve(c.length, len(s)) for c, s in zip(contexts, sequences, strict=True)]
        pictures = [
            (g.tokens, blanked(self._embed_codes(self._codes(g), g.grid), g, noise)) for g in batch.of(Kind.CODES)
        ]
        attend = Cached(caches, [c.length for c in contexts], batch, order if pictures else None)
        states = self._run(batch, pictures, positions, order, attend)
        last = torch.tensor(batch.lengths, device=self.device).cumsum(0) - 1
        final = states[inverse_permutation(order)[last]]
        read = read_on(contexts, sequences, caches, self.decoder.logits(final).float())
        return [replace(context, private=h) for context, h in zip(read, final, strict=True)]

    @property
    def stop_ids(self) -> frozenset[int]:
        """The first token of ``chat.end`` and the tokenizer's ``ENDS``."""
        return self._stops

    # ---- generation ---------------------------------------------------------------------------------------------

    def branches(self, sample: Sample, settings: CodeSettings) -> Branches:
        """See ``every_scale``."""
        return every_scale(sample, settings)

    def canvas(self, sample: Sample) -> tuple[int, int]:
        """The (height, width) of the picture to generate: see ``fitted``."""
        return fitted(sample, self.config.trained, self.config.draw)

    def steps(self, canvas: tuple[int, int], settings: CodeSettings) -> int:
        """The number of tokens of the picture."""
        return prod(self._grid(*canvas))

    def start(
        self,
        contexts: Sequence[tuple[Context, ...]],
        samples: Sequence[Sample],
        settings: Sequence[CodeSettings],
        seeds: Sequence[int],
    ) -> list[Drawing[CodeSettings]]:
        """Empty grids of codes; ``state`` is (tokens, codes), ``NONE`` where no code is chosen yet."""
        drawings = []
        for read, sample, s, seed in zip(contexts, samples, settings, seeds, strict=True):
            canvas = self.canvas(sample)
            state = torch.full((self.steps(canvas, s), self.config.codes_per_token), NONE, device=self.device)
            drawings.append(Drawing(state, read, self.branches(sample, s), canvas, s, len(state), seed=seed))
        return drawings

    @torch.inference_mode()
    def step(self, drawings: Sequence[Drawing[CodeSettings]]) -> list[Drawing[CodeSettings]]:
        """The codes of one token for each drawing. Every branch decodes the token with the vision experts, as in
        training."""
        check_step(drawings)
        R, B = len(drawings[0].contexts), len(drawings)
        h = torch.stack(
            [d.private.h if d.private else torch.stack([c.private for c in d.contexts]) for d in drawings], 1
        )
        chance = [Noise(d.seed, d.step).uniform("drawing", "codes", (self.config.codes_per_token,)) for d in drawings]
        settings, scales = [d.settings for d in drawings], [tuple(d.branches.values()) for d in drawings]
        codes = self.unfold.sample(h, settings, scales, torch.stack(chance).to(self.device))
        at = torch.tensor([d.step for d in drawings], device=self.device)
        grid, (m, n) = self._grid(*drawings[0].canvas), self.config.fold
        token = self.visual_embed(codes, self.visual_embed.positions((grid[0] * m, grid[1] * n))[at])
        streams = self._streams(drawings)
        position = [d.contexts[b].position + d.step for b in range(R) for d in drawings]
        positions = torch.tensor(position, device=self.device)
        token = token.to(self.decoder.embed_tokens.weight.dtype).repeat(R, 1)
        new = self.decoder(token, positions, streams.grow(), [0, R * B]).unflatten(0, (R, B))
        return [
            advance(
                d,
                d.state.index_copy(0, at[i : i + 1], codes[i : i + 1]),
                private=_Batched(streams, tuple(b * B + i for b in range(R)), new[:, i]),
            )
            for i, d in enumerate(drawings)
        ]

    def _streams(self, drawings: Sequence[Drawing[CodeSettings]]) -> Streams:
        """Keys and values of every branch of every drawing, branch-major; kept while the same drawings are batched."""
        R, B = len(drawings[0].contexts), len(drawings)
        lengths = [d.contexts[b].length + d.step for b in range(R) for d in drawings]
        first = drawings[0].private and drawings[0].private.streams
        if first and first.lengths == lengths:
            together = (d.private and d.private.streams is first for d in drawings)
            if all(together) and [d.private.rows[b] for b in range(R) for d in drawings] == list(range(R * B)):
                return first
        read = [
            d.private.streams.prefix(d.private.rows[b], d.contexts[b].length + d.step) if d.private else d.contexts[b]
            for b in range(R)
            for d in drawings
        ]
        return Streams(read, max(d.steps - d.step for d in drawings))

    def _unfolded(self, drawings: Sequence[Drawing[CodeSettings]]) -> Int[Tensor, "B h w"]:
        (rows, columns), (m, n) = self._grid(*drawings[0].canvas), self.config.fold
        return unfold(torch.stack([d.state for d in drawings]), (rows * m, columns * n), self.config.fold)

    def encoded(self, drawing: Drawing[CodeSettings]) -> dict[str, Tensor]:
        """The codes of a finished drawing, (1, h, w)."""
        return {"autoencoder": self._unfolded([drawing]).clone()}

    @torch.inference_mode()
    def finish(self, drawings: Sequence[Drawing[CodeSettings]]) -> Float[Tensor, "B 3 H W"]:
        """Decoded pictures, clamped to [-1, 1]; codes that are not chosen yet are grey."""
        codes = self._unfolded(drawings)
        images = self.autoencoder.decode(codes.clamp(min=0)).float().clamp(-1, 1)
        p = self.config.autoencoder.downsample
        return images * (codes != NONE).repeat_interleave(p, 1).repeat_interleave(p, 2)[:, None]
