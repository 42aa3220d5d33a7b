"""IOMM (arXiv 2603.16139): a frozen vision-language model, and a generator that learns from pictures alone.

::

    text ── embedding ───────────────────────────┐
    picture ── vision tower ── masked by r ──────┤ c       all frozen
                                                 ▼
           ┌──────── residual queries q(c) ── c ─┤
           ▼                                     ▼
    language model g: causal, the queries see c, c never sees the queries
           └──────────────► h = g([c, q(c)]) ──► connector
                                                    ▼
    noise + picture ── autoencoder ── 2x2 ──► diffusion transformer F(x_t, t, h) ──► velocity

    x_t = (1 - t) data + t noise;  loss = |F - (noise - data)|^2          only q, the connector and F learn

A picture without words is drawn from itself: c = [prompt, <img>, its own tokens with a share r of them blank, </img>].
Pairs take the caption, edits the instruction and the source. Questions are answered by g, which nothing has touched.

The prefix c does not depend on what is learned: it runs once without gradient and its keys and values are kept; the
queries alone run with gradient. Queries and the picture to draw are hidden from what follows and move no position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from diptych.core.batch import Batch, pack
from diptych.core.checks import at_least
from diptych.core.layout import Kind, Layout, Segment
from diptych.core.noise import Noise
from diptych.core.sample import Image, Message, Sample, Text
from diptych.core.tensors import NONE, Bool, Float, Tensor, to_float
from diptych.models.predictions import FlowPrediction, Noised, Predictions
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
    dropped,
    every_scale,
    fitted,
    noised,
    supervised,
    worded,
)
from diptych.models.sizes import Sizes
from diptych.parts.adapters import Connector, NoQueries, QueryBlock, ResidualQueries, StaticQueries
from diptych.parts.attention import Cached, Continued, Recorded, documents
from diptych.parts.autoencoder import AutoencoderConfig, build_latent_autoencoder, tiny_autoencoder
from diptych.parts.dit import DitConfig, Group, blocks, build_dit
from diptych.parts.flow import FlowSettings, Prediction, TimeDraw, euler, velocity
from diptych.parts.images import SizeRule, to_tensor, tokens_to_latents
from diptych.parts.images import crop as cropped
from diptych.parts.mllm import Mllm, MllmConfig
from diptych.parts.mllm_sizes import internvl3_2b, tiny_internvl
from diptych.parts.runs import Runs
from diptych.parts.tokenizer import Tokenizer
from diptych.parts.vision import kept


@dataclass(frozen=True)
class Prompts:
    """The reader's prompt for a picture: with a caption, with pictures alone, and without either."""

    words: str = "Generate an image: {}"
    pictures: str = "Generate an image that is identical to the reference image:"
    nothing: str = "Generate an image."

    def __post_init__(self) -> None:
        if self.words.count("{}") != 1:
            raise ValueError(f"prompts.words must hold {{}} once, where a caption goes; it is {self.words!r}")


@dataclass(frozen=True)
class Config:
    """Sizes and settings. Where the paper is silent, the defaults are our choice.

    ``adapter``      ``residual`` (IOMM), ``static`` (MetaQuery) or ``none``
    ``cond_tokens``  what the generator sees of h: all of it, or the queries' part; the paper uses all
    ``mask_mode``    blank tokens are zeros; or zeros that only they themselves see; or left out
    ``text_first``   whether the words of a picture to draw come before its sources
    ``crop``         whether pictures to draw, and their sources, are cropped to ``size``
    """

    mllm: MllmConfig
    dit: DitConfig
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    adapter: Literal["residual", "static", "none"] = "residual"
    queries: int = 256
    adapter_heads: int = 12
    adapter_layers: int = 1
    connector_layers: int = 0
    cond_tokens: Literal["all", "queries"] = "all"
    mask_mode: Literal["zero", "zero_hide", "drop"] = "zero"
    text_first: bool = True
    prompts: Prompts = Prompts()
    latent_patch: int = 2
    prediction: Prediction = "velocity"
    times: TimeDraw = TimeDraw(uniform=True)
    draw: SizeRule = SizeRule(longest=1024, shortest=512, stride=16)
    crop: bool = True
    size: tuple[int, int] = (512, 512)
    settings: FlowSettings = field(
        default_factory=lambda: FlowSettings(50, 4.5, guidance_interval=(0.0, 1.0), timestep_shift=1.0, renorm="none")
    )

    def __post_init__(self) -> None:
        at_least(1, self, "queries", "adapter_heads", "latent_patch", "size")
        at_least(0, self, "adapter_layers", "connector_layers")
        if self.cond_tokens == "queries" and self.adapter == "none":
            raise ValueError("cond_tokens 'queries' needs an adapter; adapter is 'none'")
        if any(side % self.stride for side in (*self.size, self.draw.stride)):
            raise ValueError(f"size {self.size} and draw must keep to {self.stride} pixels a token")

    @property
    def stride(self) -> int:
        """Pixels on a side of one latent token."""
        return self.latent_patch * self.autoencoder.downsample

    @property
    def trained(self) -> Sizes:
        """The sizes of pictures that the model was trained on."""
        sides = (min(self.size), max(self.size)) if self.crop else (self.draw.shortest, self.draw.longest)
        return Sizes(self.size, self.stride, *sides, read=self.mllm.longest)

    @staticmethod
    def b(mllm: MllmConfig | None = None) -> Config:
        """IOMM-B: 1.6 B in 19 double-stream blocks of width 1536, on InternVL3-2B unless another is given."""
        mllm = mllm or internvl3_2b()
        return Config(mllm, DitConfig("double", 1536, 19, 12, (0, 64, 64)), adapter_heads=mllm.width // 128)

    @staticmethod
    def l(mllm: MllmConfig | None = None) -> Config:  # noqa: E743  the paper's name
        """IOMM-L: 2.7 B in 18 double-stream blocks of width 2048."""
        return replace(Config.b(mllm), dit=DitConfig("double", 2048, 18, 16, (0, 64, 64)))

    @staticmethod
    def xl(mllm: MllmConfig | None = None) -> Config:
        """IOMM-XL: 6 B in the single-stream lay-out of Z-Image."""
        return replace(Config.b(mllm), dit=DitConfig("single", 3840, 30, 30, (32, 48, 48), refiners=2, theta=256.0))

    @staticmethod
    def tiny(vocab_size: int = 1024) -> Config:
        """The same code at a size that one CPU core trains in hours: 64 x 64 pixels, 16 tokens a picture either way.
        Condition tokens get position ids (as in XL), since a small reader's hidden states encode word order poorly."""
        return Config(
            tiny_internvl(vocab_size),
            DitConfig("double", 128, 6, 4, (8, 12, 12)),
            tiny_autoencoder(),
            queries=16,
            adapter_heads=4,
            prompts=Prompts("{}", "the same picture", "a picture"),
            prediction="data",
            times=TimeDraw(mean=2.2, std=1.3),
            draw=SizeRule(longest=64, shortest=64, stride=64),
            crop=False,
            size=(64, 64),
            settings=FlowSettings(
                25, guidance_scale=2.5, guidance_interval=(0.0, 0.9), timestep_shift=3.0, renorm="none"
            ),
        )


class Iomm(UnifiedModel[FlowSettings]):
    """IOMM of any size, over any vision-language model."""

    family = "iomm"
    frozen = frozenset({"autoencoder"})
    generation = ("adapter", "connector", "dit")
    conditions = ("text", "image")
    encoders: ClassVar = {
        "autoencoder": Encoder(("autoencoder",), ("autoencoder", "draw", "crop", "size")),
        "vision": Encoder(("mllm.model",), ("mllm", "crop", "size")),
    }
    parts: ClassVar = {
        "mllm": ("mllm.*",),
        "adapter": ("adapter.*",),
        "connector": ("connector.*",),
        "dit": ("dit.*",),
        "autoencoder": ("autoencoder.*",),
    }

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__()
        c, self.config, self.tokenizer = config, config, tokenizer
        self.settings = c.settings
        self.mllm = Mllm(c.mllm)
        width = self.mllm.width
        if len(tokenizer) > self.mllm.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the reader {self.mllm.vocab_size}")
        make = {"residual": ResidualQueries, "static": StaticQueries, "none": NoQueries}[c.adapter]
        self.adapter = make(width, c.queries, c.adapter_heads, c.adapter_layers)
        self.connector = Connector(width, c.dit.hidden_size, c.adapter_heads, c.connector_layers)
        self.features = c.autoencoder.latent_channels * c.latent_patch**2
        self.dit = build_dit(c.dit, self.features)
        self.autoencoder = build_latent_autoencoder(c.autoencoder)
        self.stop = tokenizer.id(c.mllm.template.stop)
        self.image_markers = tuple(tokenizer.encode_markup(m) for m in c.mllm.template.image)

    def initialise(self, seed: int) -> None:
        """Fresh weights, also of the reader; the autoencoder does not change."""
        generator = torch.Generator().manual_seed(seed)
        for part in (self.mllm, self.adapter, self.connector, self.dit):
            part.initialise(generator)

    def blocks(self) -> Iterator[torch.nn.Module]:
        """Blocks of the reader, the diffusion transformer, the adapter and the connector."""
        yield from self.mllm.blocks()
        yield from blocks(self.dit)
        for part in (self.adapter, self.connector):
            yield from (module for module in part.modules() if isinstance(module, QueryBlock))

    def trunk(self) -> Iterator[torch.nn.Module]:
        """The reader's decoder layers and the blocks of the diffusion transformer."""
        yield from self.mllm.language.layers  # twice: for the prefix and for the queries
        yield from blocks(self.dit)

    # ---- layout -------------------------------------------------------------------------------------------------

    def lay_out(self, sample: Sample, drop: Drop = NOTHING) -> Layout:
        """The conversation in the reader's template. A target is queries and then its latents; a request without text
        has the prompt for pictures alone, or that for neither."""
        sample = dropped(sample, drop)
        page, template, previous = _Page(self), self.config.mllm.template, None
        for i, message in enumerate(sample.messages):
            following = sample.messages[i + 1] if i + 1 < len(sample.messages) else None
            if message.role == "assistant":
                if _draws(message) and (previous is None or previous.role != "user"):
                    self._request(page, (), False)
                page.write(template.opening("assistant"))
                if sample.is_open and following is None and not message.parts:
                    return page.done(sample.id)
                self._answer(page, sample, message, following is None)
            elif message.role == "user" and following is not None and _draws(following):
                self._request(page, message.parts, self.config.crop)
            elif message.parts:
                page.write(template.opening(message.role))
                for part in message.parts:
                    page.part(part)
                page.end()
            previous = message
        return page.done(sample.id)

    def _request(self, page: _Page, parts: Sequence[Text | Image], crop: bool) -> None:
        """A user's turn that asks for a picture."""
        words = " ".join(p.text for p in parts if isinstance(p, Text))
        pictures = [p for p in parts if isinstance(p, Image)]
        prompts = self.config.prompts
        if words:
            text = words if pictures else prompts.words.replace("{}", words)
        else:
            text = prompts.pictures if pictures else prompts.nothing
        page.write(self.config.mllm.template.opening("user"))
        turn: list[Text | Image] = [Text(text), *pictures]
        for part in turn if self.config.text_first else [*turn[1:], turn[0]]:
            page.part(part, crop)
        page.end()

    def _answer(self, page: _Page, sample: Sample, message: Message, final: bool) -> None:
        """An assistant's turn, after its opening."""
        for i, part in enumerate(message.parts, 1):
            last = final and i == len(message.parts)
            if isinstance(part, Image) and part.role == "target":
                page.write_ids(self.image_markers[0])
                if part.blank:
                    return
                if not sample.is_open:
                    page.draw(part)
                if not last:
                    page.see(part, self.config.crop)
                    page.write_ids(self.image_markers[1])
            else:
                page.part(part)
        if not final or not (message.parts and _draws(message, -1)):
            page.end(any(isinstance(p, Text) and p.loss for p in message.parts[-1:]))

    def planned(self, sample: Sample, plan: str) -> Sample:
        """The request with the plan after its words: the generator is conditioned on the user's turn."""
        return worded(sample, f"{sample.prompt}\n{plan}".strip())

    # ---- network ------------------------------------------------------------------------------------------------

    def _embed(self, batch: Batch, noise: Noise) -> _Stream:
        """The language model's input of a row: everything but queries and targets."""
        inside = batch.document >= 0
        for g in (*batch.of(Kind.QUERY), *batch.of(Kind.NOISED)):
            inside[g.tokens] = False
        seen, pictures = inside.clone(), batch.of(Kind.VISION)
        words = (batch.ids != NONE) & inside
        places, values = [words.nonzero()[:, 0]], [self.mllm.embed(batch.ids[words])]
        for g in pictures:
            tokens = g.pixels.to(values[0].dtype) if g.encoded else self.mllm.look(g.pixels)
            if g.masked:
                keep = kept(g, noise)
                tokens = tokens * keep[..., None]
                if self.config.mask_mode != "zero":
                    seen[g.tokens[~keep]] = False
                if self.config.mask_mode == "drop":
                    inside[g.tokens[~keep]] = False
            places.append(g.tokens.flatten())
            values.append(tokens.flatten(0, 1).to(values[0].dtype))
        joined = torch.cat(values)
        x = joined.new_zeros(len(batch), joined.shape[-1]).index_copy(0, torch.cat(places), joined)
        stream = inside.nonzero()[:, 0]
        columns, seen = batch.take(stream), seen[stream]
        if not bool(seen.all()):  # an unseen token is a hidden segment of its own
            alone = torch.arange(len(stream), device=stream.device) + int(batch.segment.max()) + 1
            columns = replace(columns, hidden=~seen, segment=torch.where(seen, columns.segment, alone))
        positions = self.mllm.positions(batch.positions, pictures)[..., stream]
        return _Stream(stream, x.index_select(0, stream), positions, seen, columns)

    def _queries(
        self,
        c: Float[Tensor, "N L D"],
        states: Float[Tensor, "N L D"],
        valid: Bool[Tensor, "N L"],
        seen: Bool[Tensor, "N L"],
        positions: Tensor,
        prefix: Any,
    ) -> tuple[Float[Tensor, "N M d"], Bool[Tensor, "N M"]]:
        """Conditions of N targets, and which of their tokens are not padding. The queries attend to c, pass through g
        after its prefix, and the connector maps the part of h that ``cond_tokens`` names. ``positions`` are those of
        the first query."""
        queries = self.adapter(c, seen)
        if n := queries.shape[1]:
            offsets = torch.arange(n, device=c.device)
            where = (positions[..., None] + offsets).flatten(-2)
            run = self.mllm(queries.to(c.dtype).flatten(0, 1), where, Continued(prefix, seen, n))
            run, query_valid = run.unflatten(0, (-1, n)), valid.new_ones(len(valid), n)
            everything = self.config.cond_tokens == "all"
            states = torch.cat([run, states], 1) if everything else run
            valid = torch.cat([query_valid, valid], 1) if everything else query_valid
            if everything:  # the connector has padding last, the generator the queries
                return self.connector(states, valid).roll(-n, 1), valid.roll(-n, 1)
        return self.connector(states, valid), valid

    def _condition(self, batch: Batch, s: _Stream, states: Tensor, memory: dict) -> tuple[Tensor, Tensor]:
        """The conditions of all targets, group after group: each sees what comes before it in its document."""
        first, index, valid = _before(batch, s)
        where = self.mllm.positions(batch.positions, [])[..., first]

        def prefix(layer: int) -> tuple[Tensor, Tensor]:
            return tuple(x[index] for x in memory[layer])  # type: ignore[return-value]

        return self._queries(s.x[index], states[index], valid, valid & s.seen[index], where, prefix)

    def reference(self, batch: Batch, noise: Noise) -> tuple[Tensor, Tensor]:
        """The same conditions without a kept prefix: g runs over c and its queries at once, with gradient through all
        of it. The reference for tests and for benchmarks/iomm_prefix.py."""
        s = self._embed(batch, noise)
        _, index, valid = _before(batch, s)
        queries = self.adapter(s.x[index], valid & s.seen[index])
        tokens = batch.of(Kind.QUERY)[0].tokens  # all of one shape, so in the order of the row
        rank = torch.cat([g.tokens[:, 0] for g in batch.of(Kind.NOISED)]).argsort().argsort()
        places = torch.cat([s.places, tokens.flatten()])
        order = places.argsort()
        x = torch.cat([s.x, queries[rank.argsort()].flatten(0, 1)])[order]
        columns = batch.take(places[order])
        hidden = torch.cat([~s.seen, s.seen.new_ones(tokens.numel())])[order]
        segment = torch.cat([s.columns.segment, batch.segment[tokens.flatten()] + int(s.columns.segment.max()) + 1])[
            order
        ]
        positions = self.mllm.positions(batch.positions, batch.of(Kind.VISION))[..., places[order]]
        states = self.mllm(x, positions, documents(replace(columns, hidden=hidden, segment=segment)))
        back = order.argsort()
        query_states = states[back[len(s.places) :].view(len(tokens), -1)[rank]]
        everything = self.config.cond_tokens == "all"
        whole = torch.cat([states[back[: len(s.places)]][index], query_states], 1) if everything else query_states
        query_valid = valid.new_ones(query_states.shape[:2])
        seen = torch.cat([valid, query_valid], 1) if everything else query_valid
        return self.connector(whole, seen), seen

    def counts(self, batch: Batch) -> dict[str, float]:
        """``text``: supervised tokens; ``image``: tokens of noised pictures."""
        return {
            "text": float((batch.targets != NONE).sum()),
            "image": float(sum(g.tokens.numel() for g in batch.of(Kind.NOISED))),
        }

    def predict(self, batch: Batch, noise: Noise) -> Predictions:
        """``text``: supervised tokens; ``image``: noised latents (Alg. 1)."""
        drawn = batch.of(Kind.NOISED)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.mllm.learns(batch)):
            s = self._embed(batch, noise)
            attend = Recorded(documents(s.columns))
            states = self.mllm(s.x, s.positions, attend)
            text = supervised(states, self.mllm.head_weight, s.columns)
        times = [self.config.times(noise, g.owners, g.ordinals) for g in drawn]
        targets = [noised(self, g, noise, t) for g, t in zip(drawn, times, strict=True)]
        grids, owners = [g.grid for g in drawn], [batch.document[g.tokens[:, 0]] for g in drawn]
        if not drawn:  # a token without loss: other processes may have targets and wait for this one (``trunk``)
            nothing = states.new_zeros(1, 1, self.features, dtype=torch.float32)
            targets, grids, owners = [Noised(nothing, nothing, nothing[:, 0, 0])], [(1, 1)], [batch.document[:1]]
        conditions, valid = self._condition(batch, s, states, attend.memory)
        sizes = [len(target.data) for target in targets]
        groups = [
            Group(target.x_t, target.times, condition, mask, grid)
            for target, condition, mask, grid in zip(
                targets, conditions.split(sizes), valid.split(sizes), grids, strict=True
            )
        ]
        image = [
            FlowPrediction(prediction.float(), target, self.config.prediction, owner, bool(drawn))
            for prediction, target, owner in zip(self.dit(groups), targets, owners, strict=True)
        ]
        return {"text": text, "image": tuple(image)}

    @torch.no_grad()
    def encode(self, encoder: str, images: Tensor) -> Tensor:
        """Latents (followed by their deviation where the autoencoder has a posterior), or the reader's tokens of
        pictures before any is blanked."""
        return self.mllm.look(images) if encoder == "vision" else self.autoencoder.distribution(to_float(images))

    # ---- prefill ------------------------------------------------------------------------------------------------

    def open(self) -> Context:
        """A context with an empty KV cache."""
        return Context(self.mllm.cache())

    @torch.inference_mode()
    def extend(self, contexts: Sequence[Context], sequences: Sequence[Layout]) -> list[Context]:
        """Prefills text and pictures. Embeddings and final states are kept, since queries attend to them. Raises
        ``ValueError`` for a noised picture."""
        batch = pack(sequences).to(self.device)
        if batch.of(Kind.NOISED):
            raise ValueError("a noised picture cannot be prefilled; use start and step")
        if self.config.mask_mode != "zero" and any(g.masked for g in batch.pictures):
            raise ValueError(f"a masked picture is read with mask_mode 'zero' only, not {self.config.mask_mode!r}")
        s = self._embed(batch, Noise())
        start = torch.tensor([c.position for c in contexts], device=self.device)[batch.document]
        caches = [c.cache.reserve(c.length, n) for c, n in zip(contexts, batch.lengths, strict=True)]
        attend = Cached(caches, [c.length for c in contexts], s.columns)
        states = self.mllm(s.x, s.positions + start, attend)
        last = torch.tensor(batch.lengths, device=self.device).cumsum(0) - 1
        logits = self.mllm.logits(states[last]).float()
        return [
            Context(
                cache,
                c.length + n,
                c.position + sum(g.moves for g in laid.segments),
                scores,
                _Read(c.private, c.length, x, h),
            )
            for cache, c, n, laid, scores, x, h in zip(
                caches,
                contexts,
                batch.lengths,
                sequences,
                logits,
                s.x.split(batch.lengths),
                states.split(batch.lengths),
                strict=True,
            )
        ]

    @property
    def stop_ids(self) -> frozenset[int]:
        """The template's stop token."""
        return frozenset({self.stop})

    # ---- generation ---------------------------------------------------------------------------------------------

    def canvas(self, sample: Sample) -> tuple[int, int]:
        """The (height, width) of the picture to generate: see ``fitted``."""
        c = self.config
        return fitted(sample, c.trained, None if c.crop else c.draw)

    def branches(self, sample: Sample, settings: FlowSettings) -> Branches:
        """See ``every_scale``."""
        return every_scale(sample, settings)

    @torch.inference_mode()
    def start(
        self,
        contexts: Sequence[tuple[Context, ...]],
        samples: Sequence[Sample],
        settings: Sequence[FlowSettings],
        seeds: Sequence[int],
    ) -> list[Drawing[FlowSettings]]:
        """Noise for each request, (n, f). The conditions of its contexts are computed once, for all steps."""
        flat = {id(c): c for read in contexts for c in read}
        conditions = dict(zip(flat, self._conditions(list(flat.values())), strict=True))
        drawings = []
        for read, sample, s, seed in zip(contexts, samples, settings, seeds, strict=True):
            canvas, branches = self.canvas(sample), self.branches(sample, s)
            noise = Noise(seed).normal("drawing", "noise", (prod(self._grid(canvas)), self.features)).to(self.device)
            steps = self.steps(canvas, s)
            drawings.append(
                Drawing(
                    noise,
                    read,
                    branches,
                    canvas,
                    s,
                    steps,
                    s.times(steps),
                    private=tuple(conditions[id(c)] for c in read),
                )
            )
        return drawings

    def _conditions(self, contexts: list[Context]) -> list[Float[Tensor, "M d"]]:
        """The condition of every context."""
        lengths = torch.tensor([c.length for c in contexts], device=self.device)
        read = [c.private.upto(c.length) for c in contexts]
        c, states = (pad_sequence(list(x), batch_first=True) for x in zip(*read, strict=True))
        valid = torch.arange(c.shape[1], device=self.device) < lengths[:, None]
        position = self.mllm.positions(torch.tensor([x.position for x in contexts], device=self.device), [])

        def prefix(layer: int) -> tuple[Tensor, Tensor]:
            return tuple(  # type: ignore[return-value]
                pad_sequence([x.cache.buffer[layer, i, : x.length] for x in contexts], batch_first=True) for i in (0, 1)
            )

        conditions, seen = self._queries(c, states, valid, valid, position, prefix)
        return [x[v] for x, v in zip(conditions, seen, strict=True)]

    @torch.inference_mode()
    def step(self, drawings: Sequence[Drawing[FlowSettings]]) -> list[Drawing[FlowSettings]]:
        """One Euler step for each drawing. The branches are one batch; outside the guidance interval only the full one
        is computed."""
        check_step(drawings)
        moved = euler(drawings, lambda x_t, t, branches: self._velocity(x_t, t, drawings, branches))
        return [advance(d, state, v, d.private) for d, (state, v) in zip(drawings, moved, strict=True)]

    def _velocity(
        self,
        x_t: Float[Tensor, "B n f"],
        t: Float[Tensor, " B"],
        drawings: Sequence[Drawing[FlowSettings]],
        branches: int,
    ) -> Float[Tensor, "R B n f"]:
        each = [d.private[b] for b in range(branches) for d in drawings]
        lengths = torch.tensor([len(c) for c in each], device=self.device)
        longest = int(lengths.max())
        valid = torch.arange(longest, device=self.device) < lengths[:, None]
        condition = torch.stack([F.pad(c, (0, 0, 0, longest - len(c))) for c in each])
        x, times = x_t.repeat(branches, 1, 1), t.repeat(branches)
        [prediction] = self.dit([Group(x, times, condition, valid, self._grid(drawings[0].canvas))])
        return velocity(prediction.float(), x, times, self.config.prediction).unflatten(0, (branches, -1))

    def _grid(self, canvas: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the latent tokens of a picture."""
        return canvas[0] // self.config.stride, canvas[1] // self.config.stride

    def encoded(self, drawing: Drawing[FlowSettings]) -> dict[str, Tensor]:
        """The latents of a finished drawing, (c, h, w)."""
        grid = self._grid(drawing.canvas)
        return {"autoencoder": tokens_to_latents(drawing.state[None].clone(), grid, self.config.latent_patch)[0]}

    @torch.inference_mode()
    def finish(self, drawings: Sequence[Drawing[FlowSettings]]) -> Float[Tensor, "B 3 H W"]:
        """Decoded pictures, clamped to [-1, 1]."""
        states = torch.stack([d.state for d in drawings])
        latents = tokens_to_latents(states, self._grid(drawings[0].canvas), self.config.latent_patch)
        return self.autoencoder.decode(latents).float().clamp(-1, 1)


def _draws(message: Message, at: int = 0) -> bool:
    """Whether a message of the assistant begins (or ends) with a picture that is drawn."""
    part = message.parts[at] if message.role == "assistant" and message.parts else None
    return isinstance(part, Image) and part.role == "target"


@dataclass(frozen=True, eq=False)
class _Stream:
    """The language model's input of a row."""

    places: Tensor  # (T,) in the row, ascending
    x: Tensor  # (T, D) embeddings
    positions: Tensor  # (T,) or (3, T)
    seen: Tensor  # (T,) whether other tokens may attend to it
    columns: Batch


def _before(batch: Batch, s: _Stream) -> tuple[Tensor, Tensor, Tensor]:
    """Of every picture to draw, group after group (or of the row's second word, where there is none): its first place
    in the row, the places in the stream of what stands before it in its document (N, L), and which of these are real.
    """
    first = torch.cat([g.tokens[:, 0] for g in batch.of(Kind.NOISED)] or [batch.ids.new_ones(1)])
    starts = torch.tensor([0, *batch.lengths], device=first.device).cumsum(0)[batch.document[first]]
    low, high = torch.searchsorted(s.places, starts), torch.searchsorted(s.places, first)
    index = low[:, None] + torch.arange(int((high - low).max()), device=first.device)
    valid = index < high[:, None]
    return first, torch.where(valid, index, low[:, None]), valid


@dataclass(frozen=True, eq=False)
class _Read:
    """The embeddings and final states of a context, one piece per ``extend``; this one begins at token ``start``."""

    before: _Read | None
    start: int
    x: Tensor
    states: Tensor

    def upto(self, length: int) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T D"]]:
        """(embeddings, states) of the first ``length`` tokens; later ones were removed by ``rewind``."""
        pieces: list[tuple[Tensor, Tensor]] = []
        piece: _Read | None = self
        while piece is not None:
            n = max(0, length - piece.start)
            pieces.append((piece.x[:n], piece.states[:n]))
            length, piece = min(length, piece.start), piece.before
        return tuple(torch.cat(x) for x in zip(*reversed(pieces), strict=True))  # type: ignore[return-value]


class _Page(Runs):
    """Builds the layout of a conversation: runs of text, and pictures between them."""

    def __init__(self, model: Iomm) -> None:
        super().__init__()
        self.model, self.tokenizer = model, model.tokenizer
        self.template = model.config.mllm.template
        self.rest = model.tokenizer.encode_markup(self.template.end.removeprefix(self.template.stop))
        self.between = False

    def write(self, markup: str) -> None:
        """Text of the template."""
        if self.between:
            self.write_ids(self.rest)
        self.between = False
        self.write_ids(self.tokenizer.encode_markup(markup))

    def part(self, part: Text | Image, crop: bool = False) -> None:
        """A text, or a picture to read."""
        if isinstance(part, Text):
            self.write_ids(self.tokenizer.encode(part.text), part.loss)
            return
        self.write_ids(self.model.image_markers[0])
        self.see(part, crop)
        self.write_ids(self.model.image_markers[1])

    def end(self, loss: bool = False) -> None:
        """The end of a message."""
        self.write_ids([self.model.stop], loss)
        self.between = True

    def see(self, image: Image, crop: bool = False) -> None:
        """The tokens of a picture to read."""
        mllm, whole = self.model.mllm, self.model.config.size if crop else image.dimensions

        def pixels() -> Tensor:
            return to_tensor(cropped(image.pixels, whole, image.nearest), mllm.size(whole), image.nearest)

        held, encoded = image.through("vision", pixels)
        self.add(mllm.picture(whole, image=held, encoded=encoded, masked=image.masked))

    def draw(self, image: Image) -> None:
        """Queries, and the target that is conditioned on them."""
        c = self.model.config
        width, height = c.size if c.crop else c.draw(*image.dimensions)
        grid = (height // c.stride, width // c.stride)

        def pixels() -> Tensor:
            source = cropped(image.pixels, c.size, image.nearest) if c.crop else image.pixels
            return to_tensor(source, (width, height), image.nearest)

        if c.adapter != "none":
            self.add(Segment(Kind.QUERY, (NONE,) * c.queries, hidden=True, advance=0))
        held, encoded = image.through("autoencoder", pixels)
        columns: dict[str, Any] = {"image": held, "encoded": encoded, "grid": grid, "full": True, "shared": True}
        ids = (NONE,) * (grid[0] * grid[1])
        self.add(Segment(Kind.NOISED, ids, hidden=True, advance=0, generated=True, **columns))
