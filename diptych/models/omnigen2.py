"""OmniGen2 (arXiv 2506.18871): a vision-language model reads, a diffusion transformer draws from its states.

::

    words ────────────► reader (Qwen2.5-VL) ── final states ──► condition refiner ──┐
    pictures to read ──────┘                                                        │
    reference pictures ── autoencoder ── 2x2 ── linear + index ► reference refiner ─┼─► joint blocks ──► velocity
    noised latents ────────────────────── 2x2 ── linear ───────► picture refiner ───┘

    x_t = (1 - t) data + t noise;  loss = |F - (noise - data)|^2

What a picture is for decides who sees it:

    understand   the reader; its states are part of the condition (the drawing rows of SGT, arXiv 2605.18714)
    condition    the diffusion transformer, as a reference. In a conversation the reader sees it too, and its states at
                 the picture's own places are left out of the condition
    target       drawn. The last one before a request without references is the reference of that request

One user turn that is answered by one picture takes the drawing template, which has no assistant turn. Everything else
is a conversation: there an answer that begins with ``<|img|>`` is a picture.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, prod
from typing import Any, ClassVar, Literal, get_args

import torch

from diptych.core.batch import Batch, Pictures, pack
from diptych.core.checks import at_least
from diptych.core.layout import Kind, Layout, Segment
from diptych.core.noise import Noise
from diptych.core.sample import Image, Message, Sample, Text
from diptych.core.tensors import NONE, Bool, Float, Int, Tensor, to_float
from diptych.models.predictions import FlowPrediction, Noised, Predictions
from diptych.models.protocol import (
    NOTHING,
    TEXT,
    Branches,
    Context,
    Drawing,
    Drop,
    Encoder,
    UnifiedModel,
    advance,
    check_step,
    dropped,
    fitted,
    latent_tokens,
    noised,
    supervised,
    worded,
)
from diptych.models.sizes import Sizes
from diptych.parts.attention import Cached, documents
from diptych.parts.autoencoder import AutoencoderConfig, build_latent_autoencoder, sampled, tiny_autoencoder
from diptych.parts.flow import Prediction, TimeDraw, schedule, shift_time, velocity
from diptych.parts.images import ShrinkRule, lanczos, latents_to_tokens, to_tensor, tokens_to_latents
from diptych.parts.mllm import Mllm, MllmConfig
from diptych.parts.mllm_sizes import qwen25_vl_3b, tiny_internvl
from diptych.parts.reference_dit import NoisedPicture, Reference, ReferenceDit, ReferenceDitConfig
from diptych.parts.runs import Runs
from diptych.parts.solvers import Solver, dpm_step, euler_step, extrapolate
from diptych.parts.tokenizer import Tokenizer
from diptych.parts.vision import kept

BOTH = TEXT | {"image"}
FIRST, EVERY, POINTS = 5, 3, 3  # of the step cache: the first steps and every how many, and outputs extrapolated from
PICTURE = "<|img|>"  # an answer that begins with this token is a picture
SYSTEM = "You are a helpful assistant that generates high-quality images based on user instructions."
DROPPED_SYSTEM = "You are a helpful assistant that generates images."  # of training rows without their words
NEGATIVE = (  # the negative prompt of the published command-line tools
    "(((deformed))), blurry, over saturation, bad anatomy, disfigured, poorly drawn face, mutation, mutated, "
    "(extra_limb), (ugly), (poorly drawn hands), fused fingers, messy drawing, broken legs censor, censored, censor_bar"
)


@dataclass(frozen=True)
class Settings:
    """Sampler settings.

    ``guidance_scale``        of the text; no guidance at all up to 1
    ``image_guidance_scale``  of the references; up to 1 the branch without text has no references either
    ``guidance_range``        guidance is active in step i of N while low <= i / N <= high
    ``timestep_shift``        m of the times m s / (1 + (m - 1) s); None: sqrt(h w) / 40 for h x w latents
    ``solver``                ``euler``, or ``dpm``: DPM-Solver++ of order 2, multistep
    ``posterior``             whether references are samples of the autoencoder's posterior, or its mean
    ``cache``                 ``taylor``: the network runs in the first five steps, in every third after them and in the
                              last; in all others its outputs are extrapolated (TaylorSeer, arXiv 2503.06923). Faster
                              and not exact: ``benchmarks/step_cache.py`` prints the difference"""

    num_inference_steps: int = 28
    guidance_scale: float = 4.0
    image_guidance_scale: float = 1.0
    guidance_range: tuple[float, float] = (0.0, 1.0)
    timestep_shift: float | None = None
    solver: Solver = "euler"
    posterior: Literal["sample", "mean"] = "sample"
    cache: Literal["none", "taylor"] = "none"

    def __post_init__(self) -> None:
        low, high = self.guidance_range
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, not {self.num_inference_steps}")
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_range must be 0 <= low <= high <= 1, not {self.guidance_range}")
        if self.guidance_scale < 0 or self.image_guidance_scale < 0:
            raise ValueError(
                f"guidance scales must be at least 0, not {self.guidance_scale} and {self.image_guidance_scale}"
            )
        if self.timestep_shift is not None and not self.timestep_shift > 0:
            raise ValueError(f"timestep_shift must be positive or None, not {self.timestep_shift}")
        choices = {"solver": Solver, "posterior": Literal["sample", "mean"], "cache": Literal["none", "taylor"]}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose from {', '.join(get_args(kind))}")

    def within(self, steps: int) -> Settings:
        """The same settings with at most this many steps."""
        return replace(self, num_inference_steps=min(steps, self.num_inference_steps))

    def guided(self, step: int, steps: int) -> bool:
        """Whether guidance is active in this step."""
        low, high = self.guidance_range
        return low <= step / steps <= high

    def computed(self, step: int, steps: int) -> bool:
        """Whether the network runs in this step; else its outputs are extrapolated."""
        return self.cache == "none" or step < FIRST or (step - FIRST + 1) % EVERY == 0 or step == steps - 1

    def times(self, steps: int, latents: int) -> Float[Tensor, " steps_1"]:
        """The steps + 1 times from 1 (noise) to 0 of a picture with so many latent places."""
        return schedule(steps, latents**0.5 / 40 if self.timestep_shift is None else self.timestep_shift)

    def combine(self, velocities: Sequence[Float[Tensor, "n f"]], branches: Branches) -> Float[Tensor, "n f"]:
        """The guided velocity from those of the first branches: u + w (r - u) + g (f - r), where f is the full branch,
        r the one without text, and u the one without text and references. Without r, u + g (f - u)."""
        full, *away = velocities
        if not away:
            return full
        scales = list(branches.values())[1:]
        out = away[0] + scales[0] * (full - away[0])
        return out if len(away) == 1 else out + (scales[1] - 1) * (away[0] - away[1])


@dataclass(frozen=True)
class Config:
    """Sizes and settings.

    ``system``, ``dropped_system``  the system turn, and that of a training row whose words are left out; "": no turn
    ``labels``      whether ``<imgK>: `` stands before the K-th picture of a turn: ``always`` (OmniGen2's chat), only in
                    turns that ask for a drawing (``drawing``, SGT's rows), or ``never``
    ``prediction``  what the diffusion transformer returns: the velocity from noise to data (the release), or the data
    ``time_shift``  how training times depend on the picture: m = exp(0.5 + 0.65 (n - 256) / 3840) for n latent tokens
                    (``v1``, the release), sqrt(n) / 20 (``v2``), or not at all (``none``)
    ``source``      how references of a request are shrunk; ``sources`` those of a training row, by how many there are
    ``draw``        how pictures to draw are shrunk in training
    ``files``       the JSON files of the published folder that the model was read from, so that an export has them"""

    mllm: MllmConfig
    dit: ReferenceDitConfig = ReferenceDitConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    latent_patch: int = 2
    system: str = SYSTEM
    dropped_system: str = DROPPED_SYSTEM
    labels: Literal["always", "drawing", "never"] = "always"
    prediction: Prediction = "velocity"
    times: TimeDraw = TimeDraw()
    time_shift: Literal["v1", "v2", "none"] = "v1"
    source: ShrinkRule = ShrinkRule(1024**2, 1024, 16)
    sources: tuple[ShrinkRule, ...] = (
        ShrinkRule(1024**2, 2048, 16),
        ShrinkRule(1024**2, 2048, 16),
        ShrinkRule(768**2, 2048, 16),
        ShrinkRule(512**2, 2048, 16),
    )
    draw: ShrinkRule = ShrinkRule(1024**2, 2048, 16)
    size: tuple[int, int] = (1024, 1024)
    settings: Settings = Settings(50)
    edits: Settings | None = Settings(50, 5.0, 2.0)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least(1, self, "latent_patch", "size")
        if not self.sources:
            raise ValueError("sources needs a rule for a row with one source at least")
        strides = (*self.size, self.source.stride, self.draw.stride, *(rule.stride for rule in self.sources))
        if any(side % self.stride for side in strides):
            raise ValueError(f"size {self.size}, source, sources and draw must keep to {self.stride} pixels a token")
        if self.dit.text_width != self.mllm.width:
            raise ValueError(f"the condition has width {self.dit.text_width}, the reader's states {self.mllm.width}")

    @property
    def stride(self) -> int:
        """Pixels on a side of one latent token."""
        return self.latent_patch * self.autoencoder.downsample

    @property
    def trained(self) -> Sizes:
        """The sizes of pictures that the model was trained on."""
        longest = min(self.draw.longest, self.stride * min(self.dit.axes_lens[1:]))
        shortest = max(1, min(self.size) // 4 // self.stride) * self.stride
        return Sizes(self.size, self.stride, shortest, longest, self.source.longest, pixels=self.draw.pixels)

    @staticmethod
    def b3_4() -> Config:
        """OmniGen2 as released: Qwen2.5-VL-3B, 32 joint blocks of width 2520, FLUX.1's autoencoder."""
        return Config(qwen25_vl_3b())

    @staticmethod
    def tiny(vocab_size: int = 1032) -> Config:
        """The same code at a size that one CPU core trains, with the reader of ``iomm/tiny``: 64 x 64 pixels are 16
        tokens for the reader and 16 latent tokens. The shift of the times is fixed, since sqrt(h w) / 40 is below 1
        for small pictures. The network predicts the data, which small networks learn faster (NOTES.md)."""
        dit = ReferenceDitConfig(
            128, 6, 2, 4, 2, (8, 12, 12), (1024, 1024, 1024), text_width=128, multiple_of=32, references=5
        )
        shrink = ShrinkRule(128**2, 128, 16)
        settings = Settings(25, guidance_scale=2.5, timestep_shift=3.0)
        return Config(
            tiny_internvl(vocab_size),
            dit,
            tiny_autoencoder(),
            system="",
            dropped_system="",
            labels="never",
            prediction="data",
            times=TimeDraw(mean=2.2, std=1.3),
            time_shift="none",
            source=shrink,
            sources=(shrink,),
            draw=shrink,
            size=(64, 64),
            settings=settings,
            edits=replace(settings, image_guidance_scale=1.5),
        )


class OmniGen2(UnifiedModel[Settings]):
    """OmniGen2 of any size."""

    family = "omnigen2"
    frozen = frozenset({"autoencoder"})
    generation = ("dit",)
    unified = ("mllm", "dit")
    conditions = ("text", "image")
    encoders: ClassVar = {
        "autoencoder": Encoder(("autoencoder",), ("autoencoder", "draw")),
        "source": Encoder(("autoencoder",), ("autoencoder", "sources")),
        "vision": Encoder(("mllm.model",), ("mllm",)),
    }
    parts: ClassVar = {
        "mllm.language": ("mllm.model.language_model.*", "mllm.lm_head.*"),
        "mllm.vision": ("mllm.model.visual.*", "mllm.model.vision_tower.*", "mllm.model.multi_modal_projector.*"),
        "dit.attention": ("dit.*.[qkv]_proj.*", "dit.*.out_proj.*"),
        "dit.other": ("dit.*norm*", "dit.*modulation.*", "dit.*.gate_proj.*", "dit.*.up_proj.*", "dit.*.down_proj.*")
        + ("dit.time.*", "dit.condition_in.*", "dit.enter*", "dit.reference_index", "dit.leave.*"),
        "autoencoder": ("autoencoder.*",),
    }
    opens_with_picture = True

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__()
        c, self.config, self.tokenizer = config, config, tokenizer.adding([PICTURE])
        self.settings, self.edits = c.settings, c.edits
        self.mllm = Mllm(c.mllm)
        if len(self.tokenizer) > self.mllm.vocab_size:
            raise ValueError(f"the tokenizer has {len(self.tokenizer)} tokens, the reader {self.mllm.vocab_size}")
        self.features = c.autoencoder.latent_channels * c.latent_patch**2
        self.dit = ReferenceDit(c.dit, self.features)
        self.autoencoder = build_latent_autoencoder(c.autoencoder)
        self.stop, self.picture = self.tokenizer.id(c.mllm.template.stop), self.tokenizer.id(PICTURE)

    def initialise(self, seed: int) -> None:
        """Fresh weights of the reader and the diffusion transformer; the autoencoder does not change."""
        generator = torch.Generator().manual_seed(seed)
        self.mllm.initialise(generator)
        self.dit.initialise(generator)

    def blocks(self) -> Iterator[torch.nn.Module]:
        """Blocks of the reader, then those of the diffusion transformer."""
        yield from self.mllm.blocks()
        yield from self.dit.blocks()

    def trunk(self) -> Iterator[torch.nn.Module]:
        """The reader's decoder layers and the blocks of the diffusion transformer, without those of the references."""
        yield from self.mllm.language.layers
        yield from self.dit.trunk()

    # ---- layout -------------------------------------------------------------------------------------------------

    def lay_out(self, sample: Sample, drop: Drop = NOTHING) -> Layout:
        """The conversation in the reader's template. References and target come after their condition, hidden from the
        reader. A request without text keeps its references, which the reader then does not see.

        Raises ``ValueError`` for more references or longer sequences than the network takes."""
        return self._checked(dropped(sample, drop), "text" in drop)

    def lay_out_away(self, sample: Sample, drop: Drop, words: str = "") -> Layout:
        """See ``UnifiedModel``; a negative prompt keeps the layout of a branch without text."""
        if not words or "text" not in drop:
            return self.lay_out(sample, drop)
        return self._checked(dropped(worded(sample, words), drop - {"text"}), True)

    def _checked(self, sample: Sample, away: bool) -> Layout:
        """The layout of ``_write``. Raises ``ValueError`` where a target would be beyond the network's positions: its
        first position is the number of condition states plus the longer side of every reference."""
        laid, longest, offset, largest = self._write(sample, away), self.config.dit.axes_lens, 0, 0
        for s in laid.segments:
            if s.kind in (Kind.CLEAN, Kind.NOISED):
                assert s.grid
                largest = max(largest, *s.grid)
            if s.kind == Kind.CLEAN:
                offset += max(s.grid or (0, 0))
            elif s.kind != Kind.NOISED and not s.reference:
                offset += len(s)
        if sample.drawing is not None and offset >= longest[0]:
            raise ValueError(
                f"sample {laid.id!r} puts its picture at position {offset} (words and the sides of its references); "
                f"the model has {longest[0]} positions: shorten the text or use fewer or smaller references"
            )
        if largest > min(longest[1:]):
            raise ValueError(
                f"sample {laid.id!r} has a picture of {largest} tokens on a side; the model takes {min(longest[1:])}"
            )
        return laid

    def _write(self, sample: Sample, away: bool) -> Layout:
        """The layout of a sample; ``away``: of a branch without text, or of a training row whose text is dropped."""
        c, page, messages = self.config, _Page(self), list(sample.messages)
        drawing, direct = sample.drawing, _direct(sample)
        system = c.dropped_system if away and direct and not sample.is_open else c.system
        skip = 0
        if messages and messages[0].role == "system":
            system, skip = " ".join(p.text for p in messages[0].parts if isinstance(p, Text)), 1
        if system:
            page.turn("system", [Text(system)])
        if direct:
            request = [p for m in messages[skip:-1] for p in m.parts if isinstance(p, Text)]
            page.turn("user", request)
            page.between()
            assert isinstance(target := messages[-1].parts[0], Image)
            page.draw(target, self._references(sample), sample.is_open)
            return page.done(sample.id)
        for i, message in enumerate(messages[skip:], skip):
            last = i == len(messages) - 1
            if message.role != "assistant":
                hidden = away and i == sample.request_at and drawing is not None
                parts = [p for p in message.parts if not (hidden and isinstance(p, Image) and p.role == "condition")]
                asks = not last and _draws(messages[i + 1])
                page.turn(message.role, parts, c.labels == "always" or (asks and c.labels == "drawing"))
                continue
            page.open(message.role)
            if last and sample.is_open and not message.parts:
                break
            for j, part in enumerate(message.parts):
                end = last and j == len(message.parts) - 1
                if isinstance(part, Image) and part.role == "target":
                    page.write_ids([self.picture], bool(j) and _says(message.parts[j - 1]))
                    if part.blank or not sample.is_open:
                        page.draw(part, self._references(sample, (i, j)), part.blank)
                    if not part.blank and not end:
                        page.see(part)
                elif isinstance(part, Image):
                    page.see(part)
                else:
                    page.say(part)
            if not (last and message.parts and isinstance(message.parts[-1], Image) and _draws_last(message)):
                page.close(bool(message.parts) and _says(message.parts[-1]))
        return page.done(sample.id)

    def _references(self, sample: Sample, place: tuple[int, int] | None = None) -> list[Image]:
        """The references of the target at ``place`` (message, part), by default ``sample.drawing``: the condition
        pictures of its request, or else the last target before it."""
        place = place or sample.drawing
        assert place
        before = [
            (i, p)
            for i, m in enumerate(sample.messages)
            for j, p in enumerate(m.parts)
            if (i, j) < place and isinstance(p, Image)
        ]
        asked = next((i for i in reversed(range(place[0])) if sample.messages[i].role == "user"), None)
        references = [p for i, p in before if i == asked and p.role == "condition"]
        references = references or [p for _, p in before if p.role == "target"][-1:]
        if len(references) > self.config.dit.references:
            raise ValueError(
                f"sample {sample.id!r} shows {len(references)} pictures to draw from; "
                f"the model takes at most {self.config.dit.references}"
            )
        return references

    def lay_out_picture(self, image: Image) -> tuple[Segment, ...]:
        """The picture as the reader sees it, between its markers."""
        page = _Page(self)
        page.see(image)
        return page.done("drawn").segments

    # ---- network ------------------------------------------------------------------------------------------------

    def _read(self, batch: Batch, noise: Noise) -> _Stream:
        """The reader's input of a row: everything but references and targets."""
        inside = batch.document >= 0
        for g in (*batch.of(Kind.CLEAN), *batch.of(Kind.NOISED)):
            inside[g.tokens] = False
        condition, pictures = inside.clone(), batch.of(Kind.VISION)
        words = (batch.ids != NONE) & inside
        places, values = [words.nonzero()[:, 0]], [self.mllm.embed(batch.ids[words])]
        for g in pictures:
            assert g.images is not None
            tokens = g.images.to(values[0].dtype) if g.encoded else self.mllm.look(g.images)
            if g.masked:
                tokens = tokens * kept(g, noise)[..., None]
            if g.reference:
                condition[g.tokens] = False
            places.append(g.tokens.flatten())
            values.append(tokens.flatten(0, 1).to(values[0].dtype))
        joined = torch.cat(values)
        x = joined.new_zeros(len(batch), joined.shape[-1]).index_copy(0, torch.cat(places), joined)
        stream = inside.nonzero()[:, 0]
        positions = self.mllm.positions(batch.positions, pictures)[..., stream]
        return _Stream(stream, x.index_select(0, stream), positions, condition[stream], batch.take(stream))

    def counts(self, batch: Batch) -> dict[str, float]:
        """``text``: supervised tokens; ``image``: tokens of noised pictures."""
        return {
            "text": float((batch.targets != NONE).sum()),
            "image": float(sum(g.tokens.numel() for g in batch.of(Kind.NOISED))),
        }

    def predict(self, batch: Batch, noise: Noise) -> Predictions:
        """``text``: supervised tokens; ``image``: noised latents. The reader learns from both where it is trained."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.mllm.learns(batch)):
            s = self._read(batch, noise)
            states = self.mllm(s.x, s.positions, documents(s.columns))
            text = supervised(states, self.mllm.head_weight, s.columns)
        pictures, targets, owners = self._pictures(batch, s, states, noise)
        drawn = bool(batch.of(Kind.NOISED))
        image = [
            FlowPrediction(self._prediction(out)[None], target, self.config.prediction, owner[None], drawn)
            for out, target, owner in zip(self.dit(pictures), targets, owners, strict=True)
        ]
        return {"text": text, "image": tuple(image)}

    def _pictures(
        self, batch: Batch, s: _Stream, states: Float[Tensor, "S D"], noise: Noise
    ) -> tuple[list[NoisedPicture], list[Noised], list[Tensor]]:
        """The pictures to draw of a row, their latents with noise and the document of each. A row without any draws
        one token that counts nothing: other processes may draw, and wait for it."""
        clean = sorted(
            (int(g.tokens[i, 0]), Reference(tokens, g.grid))
            for g in batch.of(Kind.CLEAN)
            for i, tokens in enumerate(latent_tokens(self, g, noise))
        )
        groups = batch.of(Kind.NOISED)
        firsts = sorted(int(p) for g in groups for p in g.tokens[:, 0])
        pictures, targets, owners = [], [], []
        for g in groups:
            group = noised(self, g, noise, self._times(g, noise))
            x_t, t = group.x_t, group.times
            for i, tokens in enumerate(g.tokens):
                first, owner = int(tokens[0]), batch.document[tokens[0]]
                earlier = max((p for p in firsts if p < first), default=-1)
                references = tuple(r for p, r in clean if earlier < p < first and int(batch.document[p]) == int(owner))
                before = (s.columns.document == owner) & (s.places < first)
                condition = states[self._condition(before & s.condition, s.columns.ids, before)]
                pictures.append(NoisedPicture(x_t[i], g.grid, 1 - t[i], condition, references))
                targets.append(Noised(group.data[i : i + 1], group.noise[i : i + 1], t[i : i + 1]))
                owners.append(owner)
        if not pictures:
            empty = states.new_zeros(1, 1, self.features, dtype=torch.float32)
            pictures = [NoisedPicture(empty[0], (1, 1), empty[0, 0, 0], states[:1])]
            targets, owners = [Noised(empty, empty, empty[:, 0, 0] + 1)], [batch.document[0]]
        return pictures, targets, owners

    def _prediction(self, out: Float[Tensor, "n f"]) -> Float[Tensor, "n f"]:
        """What the network returns, with a velocity from data to noise; the network's own goes from noise to data."""
        return -out.float() if self.config.prediction == "velocity" else out.float()

    def _condition(
        self, condition: Bool[Tensor, " S"], ids: Int[Tensor, " S"], before: Bool[Tensor, " S"]
    ) -> Int[Tensor, " L"]:
        """The places whose states condition a target: those of ``condition`` without the ``<|img|>`` that opens it,
        which is the last of the places ``before`` it."""
        chosen, read = condition.nonzero()[:, 0], before.nonzero()[:, 0]
        opened = len(read) and int(ids[read[-1]]) == self.picture
        return chosen[:-1] if opened else chosen

    def _times(self, group: Pictures, noise: Noise) -> Float[Tensor, " N"]:
        """Training times of a group's pictures, 1 at noise."""
        t, n = self.config.times(noise, group.owners, group.ordinals), prod(group.grid)
        shifts = {"v1": exp(0.5 + 0.65 * (n - 256) / 3840), "v2": n**0.5 / 20, "none": 1.0}
        return shift_time(t, shifts[self.config.time_shift])

    @torch.no_grad()
    def encode(self, encoder: str, images: Tensor) -> Tensor:
        """Latents, followed by their deviation where the autoencoder has a posterior, or the reader's tokens."""
        return self.mllm.look(images) if encoder == "vision" else self.autoencoder.distribution(to_float(images))

    # ---- reading ------------------------------------------------------------------------------------------------

    def open(self) -> Context:
        """A context with an empty KV cache."""
        return Context(self.mllm.cache())

    @torch.inference_mode()
    def extend(self, contexts: Sequence[Context], sequences: Sequence[Layout]) -> list[Context]:
        """Prefills text and pictures, and keeps the final states, which condition targets. References count as tokens
        of the context, but the reader does not see them: ``start`` encodes them. Raises ``ValueError`` for a noised
        picture."""
        batch = pack(sequences).to(self.device)
        if batch.of(Kind.NOISED):
            raise ValueError("a noised picture cannot be prefilled; use start and step")
        s = self._read(batch, Noise())
        read = s.columns.lengths
        before = [c.private.upto(c.length) if c.private else None for c in contexts]
        earlier = [len(b.states) if b else 0 for b in before]
        caches = [c.cache.reserve(n, m) if m else c.cache for c, n, m in zip(contexts, earlier, read, strict=True)]
        states, logits = s.x, [c.logits for c in contexts]
        if any(read):
            reading = [i for i, n in enumerate(read) if n]
            start = torch.tensor([c.position for c in contexts], device=self.device)[s.columns.document]
            columns = replace(s.columns, lengths=tuple(read[i] for i in reading))
            attend = Cached([caches[i] for i in reading], [earlier[i] for i in reading], columns)
            states = self.mllm(s.x, s.positions + start, attend)
            last = torch.tensor(columns.lengths, device=self.device).cumsum(0) - 1
            for i, scores in zip(reading, self.mllm.logits(states[last]).float(), strict=True):
                logits[i] = scores
        firsts = torch.tensor([0, *batch.lengths], device=self.device).cumsum(0)[s.columns.document]
        pieces = zip(*(x.split(read) for x in (s.places - firsts, s.columns.ids, states, s.condition)), strict=True)
        return [
            Context(
                cache,
                c.length + len(laid),
                c.position + sum(x.moves for x in laid.segments),
                scores,
                _Read(c.private, c.length, *piece),
            )
            for cache, c, laid, scores, piece in zip(caches, contexts, sequences, logits, pieces, strict=True)
        ]

    @property
    def stop_ids(self) -> frozenset[int]:
        """The template's stop token."""
        return frozenset({self.stop})

    @property
    def picture_word(self) -> int:
        """<|img|>."""
        return self.picture

    # ---- drawing ------------------------------------------------------------------------------------------------

    def canvas(self, sample: Sample) -> tuple[int, int]:
        """The (height, width) of the picture to generate: see ``fitted``."""
        return fitted(sample, self.config.trained, self.config.source)

    def branches(self, sample: Sample, settings: Settings) -> Branches:
        """The full branch; if the text scale exceeds 1, one without text; with references, also one without both. If
        the references' scale does not exceed 1, the branch without text alone is left out, as in the released code."""
        references = bool(self._references(sample))
        if settings.guidance_scale <= 1:
            if references and settings.image_guidance_scale > 1:
                warnings.warn("image_guidance_scale has no effect while guidance_scale is at most 1", stacklevel=2)
            return {NOTHING: 1.0}
        if not references:
            return {NOTHING: 1.0, TEXT: settings.guidance_scale}
        if settings.image_guidance_scale <= 1:
            return {NOTHING: 1.0, BOTH: settings.guidance_scale}
        return {NOTHING: 1.0, TEXT: settings.guidance_scale, BOTH: settings.image_guidance_scale}

    @torch.inference_mode()
    def start(
        self,
        contexts: Sequence[tuple[Context, ...]],
        samples: Sequence[Sample],
        settings: Sequence[Settings],
        seeds: Sequence[int],
    ) -> list[Drawing[Settings]]:
        """Noise for each request, (n, f). References are encoded and states gathered once, for all steps."""
        drawings = []
        for branch_contexts, sample, s, seed in zip(contexts, samples, settings, seeds, strict=True):
            canvas, branches, noise = self.canvas(sample), self.branches(sample, s), Noise(seed)
            eps = noise.normal("drawing", "noise", (prod(self._grid(canvas)), self.features)).to(self.device)
            references = self._encoded(sample, s, noise)
            private = _Fixed(
                tuple(self._states(c) for c in branch_contexts),
                tuple(() if "image" in drop else references for drop in branches),
            )
            steps = self.steps(canvas, s)
            places = prod(canvas) // self.config.autoencoder.downsample**2
            times = s.times(steps, places)
            drawings.append(Drawing(eps, branch_contexts, branches, canvas, s, steps, times, private=private))
        return drawings

    def _states(self, context: Context) -> Float[Tensor, "L D"]:
        """The condition states of a target that follows the context."""
        if context.private is None:
            raise ValueError("a picture is drawn from a context that has read its request; this one is empty")
        read = context.private.upto(context.length)
        return read.states[self._condition(read.condition, read.ids, torch.ones_like(read.condition))]

    def _encoded(self, sample: Sample, settings: Settings, noise: Noise) -> tuple[Reference, ...]:
        """The latents of a request's references. A posterior is sampled with noise of the seed and the picture."""
        out, channels = [], self.config.autoencoder.latent_channels
        segments = [s for s in self.lay_out(sample).segments if s.kind == Kind.CLEAN]
        for k, segment in enumerate(segments):
            assert segment.image is not None and segment.grid
            image = segment.image[None].to(self.device)
            distribution = image.float() if segment.encoded else self.encode("source", image).float()
            eps = None
            if settings.posterior == "sample" and distribution.shape[1] > channels:
                eps = noise.normal("drawing", f"posterior{k}", (channels, *distribution.shape[2:])).to(self.device)
            latents = sampled(distribution, channels, eps)
            out.append(Reference(latents_to_tokens(latents, self.config.latent_patch)[0], segment.grid))
        return tuple(out)

    @torch.inference_mode()
    def step(self, drawings: Sequence[Drawing[Settings]]) -> list[Drawing[Settings]]:
        """One solver step for each drawing. All branches of all drawings are one batch; outside the guidance range only
        the full branch is computed. With a step cache the network does not run in every step."""
        check_step(drawings)
        active = [len(d.contexts) if d.settings.guided(d.step, d.steps) else 1 for d in drawings]
        forecasts = [_forecast(d, branches) for d, branches in zip(drawings, active, strict=True)]
        grid, rows = self._grid(drawings[0].canvas), []
        for d, branches, forecast in zip(drawings, active, forecasts, strict=True):
            if forecast:
                continue
            assert d.times is not None
            t = 1 - d.times[d.step].to(d.state.device)
            pairs = zip(d.private.conditions[:branches], d.private.references[:branches], strict=True)
            rows += [NoisedPicture(d.state, grid, t, condition, references) for condition, references in pairs]
        outs = zip(self.dit(rows) if rows else [], rows, strict=True)
        kind = self.config.prediction
        velocities = iter([velocity(self._prediction(out), row.x, 1 - row.t, kind) for out, row in outs])
        out = []
        for d, branches, forecast in zip(drawings, active, forecasts, strict=True):
            assert d.times is not None
            outputs, private = forecast or tuple(next(velocities) for _ in range(branches)), d.private
            if d.settings.cache != "none" and not forecast:
                private = replace(private, outputs=(*private.outputs, (float(d.times[d.step]), outputs))[-POINTS:])
            v = d.settings.combine(outputs, d.branches)
            if d.settings.solver == "euler":
                out.append(advance(d, euler_step(d.state, v, d.times, d.step), v, private))
            else:
                state, data = dpm_step(d.state, v, d.times, d.step, private.data)
                out.append(advance(d, state, v, replace(private, data=data)))
        return out

    def _grid(self, canvas: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the latent tokens of a picture."""
        return canvas[0] // self.config.stride, canvas[1] // self.config.stride

    def encoded(self, drawing: Drawing[Settings]) -> dict[str, Tensor]:
        """The latents of a finished drawing, (c, h, w)."""
        grid = self._grid(drawing.canvas)
        return {"autoencoder": tokens_to_latents(drawing.state[None].clone(), grid, self.config.latent_patch)[0]}

    @torch.inference_mode()
    def finish(self, drawings: Sequence[Drawing[Settings]]) -> Float[Tensor, "B 3 H W"]:
        """Decoded pictures, clamped to [-1, 1]."""
        states = torch.stack([d.state for d in drawings])
        latents = tokens_to_latents(states, self._grid(drawings[0].canvas), self.config.latent_patch)
        return self.autoencoder.decode(latents).float().clamp(-1, 1)


def _direct(sample: Sample) -> bool:
    """Whether a sample is one request that is answered by one picture and shows no picture to understand: it takes the
    drawing template."""
    *asked, last = [m for m in sample.messages if m.role != "system"] or [Message("user", ())]
    if len(last.parts) != 1 or not _draws(last) or any(m.role != "user" for m in asked) or len(asked) > 1:
        return False
    return not any(isinstance(p, Image) and p.role == "understand" for m in asked for p in m.parts)


def _draws(message: Message) -> bool:
    """Whether a message of the assistant holds a target."""
    targets = (p for p in message.parts if isinstance(p, Image) and p.role == "target")
    return message.role == "assistant" and any(targets)


def _draws_last(message: Message) -> bool:
    """Whether a message ends with a target."""
    last = message.parts[-1]
    return isinstance(last, Image) and last.role == "target"


def _says(part: Text | Image) -> bool:
    """Whether a part is text with loss."""
    return isinstance(part, Text) and part.loss


@dataclass(frozen=True, eq=False)
class _Stream:
    """The reader's input of a row."""

    places: Int[Tensor, " S"]  # in the row, ascending
    x: Float[Tensor, "S D"]
    positions: Tensor  # (S,) or (3, S)
    condition: Bool[Tensor, " S"]  # whether the state is part of conditions
    columns: Batch


@dataclass(frozen=True, eq=False)
class _States:
    """Ids and final states of prefilled tokens, and which of them are part of conditions."""

    ids: Int[Tensor, " S"]
    states: Float[Tensor, "S D"]
    condition: Bool[Tensor, " S"]


@dataclass(frozen=True, eq=False)
class _Read:
    """The reader's tokens of a context, one piece per ``extend``. The piece begins at token ``start`` of the context;
    ``places`` are the reader's tokens in it, since it may hold references too."""

    before: _Read | None
    start: int
    places: Int[Tensor, " S"]
    ids: Int[Tensor, " S"]
    states: Float[Tensor, "S D"]
    condition: Bool[Tensor, " S"]

    def upto(self, length: int) -> _States:
        """The reader's tokens among the first ``length`` of the context; later ones were removed by ``rewind``."""
        pieces: list[tuple[Tensor, ...]] = []
        piece: _Read | None = self
        while piece is not None:
            inside = piece.places < length - piece.start
            pieces.append((piece.ids[inside], piece.states[inside], piece.condition[inside]))
            length, piece = min(length, piece.start), piece.before
        return _States(*(torch.cat(x) for x in zip(*reversed(pieces), strict=True)))


@dataclass(frozen=True, eq=False)
class _Fixed:
    """The constants of a drawing, one for each branch. ``data``: the solver's last prediction; ``outputs``: the last
    times at which the network ran, with the velocities of the branches (step cache)."""

    conditions: tuple[Tensor, ...]
    references: tuple[tuple[Reference, ...], ...]
    data: Tensor | None = None
    outputs: tuple[tuple[float, tuple[Tensor, ...]], ...] = ()


def _forecast(drawing: Drawing[Settings], branches: int) -> tuple[Tensor, ...]:
    """The velocities of the branches extrapolated from earlier steps; none where the network is to run."""
    assert drawing.times is not None
    points = [(t, outputs) for t, outputs in drawing.private.outputs if len(outputs) >= branches]
    if drawing.settings.computed(drawing.step, drawing.steps) or not points:
        return ()
    now = float(drawing.times[drawing.step])
    return tuple(extrapolate([(t, outputs[i]) for t, outputs in points], now) for i in range(branches))


class _Page(Runs):
    """Builds the layout of a conversation. Adjacent text of the template and of the user is encoded together, as in the
    published code."""

    def __init__(self, model: OmniGen2) -> None:
        super().__init__()
        self.model, self.tokenizer = model, model.tokenizer
        self.template = model.config.mllm.template
        self.text = ""

    def between(self) -> None:
        """Encodes the text so far."""
        if self.text:
            super().write_ids(self.tokenizer.encode(self.text))
        self.text = ""

    def markup(self, markup: str) -> None:
        """Text of the template: its special tokens are tokens."""
        for ids, text in self.tokenizer.pieces(markup):
            if ids:
                self.between()
                super().write_ids(ids)
            self.text += text

    def write_ids(self, ids: Sequence[int], loss: bool = False) -> None:
        self.between()
        super().write_ids(ids, loss)

    def open(self, role: Literal["system", "user", "assistant"]) -> None:
        """The beginning of a turn."""
        self.markup(self.template.opening(role))
        if role == "assistant":
            self.between()

    def turn(
        self, role: Literal["system", "user", "assistant"], parts: Sequence[Text | Image], label: bool = False
    ) -> None:
        """A turn that the model reads."""
        self.open(role)
        count = 0
        for part in parts:
            if isinstance(part, Text):
                self.text += part.text
            else:
                count += 1
                self.text += f"<img{count}>: " if label else ""
                self.see(part)
        self.markup(self.template.end)

    def say(self, text: Text) -> None:
        """Text of an answer."""
        self.write_ids(self.tokenizer.encode(text.text), text.loss)

    def close(self, loss: bool) -> None:
        """The end of an answer."""
        self.write_ids([self.model.stop], loss)
        self.text = self.template.end.removeprefix(self.template.stop)

    def see(self, image: Image) -> None:
        """A picture that the reader reads, between its markers."""
        before, after = self.template.image
        self.markup(before)
        self.between()
        size = self.model.mllm.size(image.dimensions)
        held, encoded = image.through("vision", lambda: to_tensor(image.pixels, size, image.nearest))
        reference = image.role != "understand"
        columns: Mapping[str, Any] = {"image": held, "encoded": encoded, "masked": image.masked}
        self.add(self.model.mllm.picture(image.dimensions, reference=reference, **columns))
        self.markup(after)

    def draw(self, image: Image, references: Sequence[Image], asked: bool) -> None:
        """The references of a picture, and the picture unless it is only ``asked`` for."""
        self.between()
        c = self.model.config
        rule = c.source if asked else c.sources[min(len(references), len(c.sources)) - 1]
        for reference in references:
            self.add(self._latents(Kind.CLEAN, reference, rule, "source"))
        if not asked:
            self.add(self._latents(Kind.NOISED, image, c.draw, "autoencoder"))

    def _latents(self, kind: Kind, image: Image, rule: ShrinkRule, encoder: str) -> Segment:
        size, stride = rule(*image.dimensions), self.model.config.stride
        grid = (size[1] // stride, size[0] // stride)
        held, encoded = image.through(encoder, lambda: lanczos(image.pixels, size, image.nearest))
        ids = (NONE,) * prod(grid)
        columns: Mapping[str, Any] = {"image": held, "grid": grid, "encoded": encoded, "generated": kind == Kind.NOISED}
        return Segment(kind, ids, full=True, shared=True, hidden=True, advance=0, **columns)
