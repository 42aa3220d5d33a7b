"""Continuous batching: requests join and leave the running batch between steps.

::

    submit ──▶ waiting ──▶ prefill ──▶ running ── tick: one token of every answer, one step of every picture ──▶ events
                                          └────────────── until it ends, or is cancelled ──────────────┘

Results are batch-invariant (on a CPU bitwise): images are encoded and decoded one by one; prefill of text, decode and
denoising are batched, with the matrix products of ``parts.batch_invariant``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import PIL.Image
import torch

from diptych.core.layout import Kind, Layout, Segment
from diptych.core.sample import Image, Message, Sample, Text, assistant, user
from diptych.core.tensors import Tensor
from diptych.generation.events import (
    Event,
    ImageDone,
    ImagePreview,
    ReasoningDelta,
    Stop,
    TextDelta,
    TokenLogprob,
    Usage,
)
from diptych.generation.prefix_cache import PrefixCache
from diptych.generation.sampling import NO_PENALTIES, Penalties, check_sampling, next_token
from diptych.generation.thinking import CLOSE, OPEN, Think, instructed, split
from diptych.models.protocol import Context, Drawing, Drop, Settings, UnifiedModel
from diptych.parts.batch_invariant import alone, steady
from diptych.parts.images import to_pil

Size = tuple[int, int]  # (width, height) in pixels


@dataclass(frozen=True, eq=False)
class TextRequest:
    """A request for an answer in text.

    ``stop`` are texts that end the answer and are not part of it. ``logprobs`` is the number of alternatives to report
    for each token; None reports nothing. ``pictures`` is the maximum number of pictures that the answer may draw, where
    the model begins one (``picture_word``); they use the model's default settings and the seeds ``seed``, ``seed`` + 1
    and so on. After that many pictures the begin-image token is emitted as ordinary text. With ``think`` the model
    reasons first (``UnifiedModel.think_before_answering``). Raises ``ValueError`` for sampling parameters that are out
    of range."""

    sample: Sample
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    pictures: int = 4
    think: bool = False
    top_k: int = 0
    penalties: Penalties = NO_PENALTIES

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p, self.top_k)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """A request for a picture.

    ``size`` is (width, height) in pixels; None takes the model's default, or the size of the edit source. ``settings``
    are the family's. ``negative_prompt`` replaces the text in the guidance branch that drops the text. ``previews`` is
    the number of previews, evenly spread over the steps. With ``think`` the model first writes a plan and draws the
    picture from it."""

    sample: Sample
    seed: int
    size: Size | None
    settings: Settings
    negative_prompt: str = ""
    previews: int = 0
    think: Think | None = None


class TextJob:
    """An answer that is being decoded: the token ``ids`` so far, and the ``reason`` it ended. Decoding pauses while
    ``image_job``, a picture of the answer, is drawn. With ``plans`` the text is the plan of that picture, and its
    events belong to the picture."""

    def __init__(self, model: UnifiedModel, request: TextRequest, plans: ImageJob | None = None) -> None:
        r, self.plans = request, plans
        self.request = request
        sample = instructed(r.sample, model.think_before_answering) if r.think else r.sample
        self.opened = _opened(sample, assistant())
        self.parameters: dict[str, Any] = {
            "max_new_tokens": r.max_new_tokens,
            "temperature": r.temperature,
            "top_p": r.top_p,
            "seed": r.seed,
        }
        if r.top_k:
            self.parameters["top_k"] = r.top_k
        if r.penalties != NO_PENALTIES:
            r.penalties.check(len(model.tokenizer))
            self.parameters["penalties"] = asdict(r.penalties)
        self.generator = torch.Generator().manual_seed(r.seed)
        self.context: Context = model.open()
        self.layout: Layout | None = None
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []  # emitted with the next text
        self.text = self.sent = self.thought = ""  # since the last picture: decoded; emitted as answer, as reasoning
        self.pending: list[int] = []  # sampled, and not yet in the context
        self.prompt_tokens = 0
        self.reason: str | None = None
        self.image_job: ImageJob | None = None
        self.parts: tuple[Text | Image, ...] = ()  # of the answer, up to its last picture
        self.text_start = 0  # number of ``ids`` before the end of the last picture; ``layout`` holds these

    @property
    def sources(self) -> tuple[PIL.Image.Image, ...]:
        """The pictures of the conversation."""
        return tuple(image.pixels for image in self.request.sample.images())

    @property
    def images(self) -> tuple[PIL.Image.Image, ...]:
        """The pictures of the answer."""
        return tuple(p.pixels for p in self.parts if isinstance(p, Image))

    @property
    def prefilled(self) -> bool:
        """Whether the context holds the conversation."""
        return self.layout is not None


class ImageJob:
    """A picture that is being drawn: one that was requested, or one that ``answer`` began."""

    def __init__(self, model: UnifiedModel, request: ImageRequest, answer: TextJob | None = None) -> None:
        r, self.answer = request, answer
        self.request = request
        self.opened = _opened(r.sample, assistant(Image(None, "target", r.size)))
        self.plan: str | None = None
        self.planned = 0  # tokens of the plan
        self.shared = True  # whether other seeds read the same
        self.canvas = model.canvas(self.opened)
        self.branches = model.branches(self.opened, r.settings)
        self.parameters: dict[str, Any] = {"size": self.canvas[::-1], "seed": r.seed, **asdict(r.settings)}
        if r.negative_prompt:
            if not any("text" in drop for drop in self.branches):
                raise ValueError("negative_prompt needs guidance: with this guidance_scale no branch reads it")
            self.parameters["negative_prompt"] = r.negative_prompt
        if r.think:
            self.parameters["think"] = asdict(r.think)
        self.drawing: Drawing | None = None
        self.image: PIL.Image.Image | None = None

    @property
    def prefilled(self) -> bool:
        """Whether the contexts hold the conversation."""
        return self.drawing is not None

    def shares_contexts(self, other: Job) -> bool:
        """Whether another picture starts from the same contexts: several pictures of a prompt share one prefill."""
        if not isinstance(other, ImageJob):
            return False
        a, b = self.request, other.request
        same = (a.size, a.negative_prompt, self.branches) == (b.size, b.negative_prompt, other.branches)
        return a.sample is b.sample and same and self.plan == other.plan and self.shared and other.shared


Job = TextJob | ImageJob


class Unservable(ValueError):
    """A request that fails at prefill; ``submit`` could not detect it."""


class Scheduler:
    """The running batch of one model. At most ``slots`` requests run together; the others wait in order.

    The scheduler is not thread-safe. ``active`` are the jobs that the model is working for: where ``tick`` raises, the
    error belongs to these jobs. ``events`` are those of the last tick, also where an error ended it."""

    def __init__(self, model: UnifiedModel, prefixes: PrefixCache | None = None, slots: int = 32) -> None:
        if slots < 1:
            raise ValueError(f"slots must be at least 1, not {slots}")
        steady(model)
        self.model, self.prefixes, self.slots = model, prefixes or PrefixCache(model, 0), slots
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.active: list[Job] = []
        self.events: list[tuple[Job, Event]] = []

    def submit(self, request: TextRequest | ImageRequest) -> Job:
        """Queues a request. Raises ``ValueError`` for one that cannot be served, before anything is computed."""
        job = self.prepare(request)
        self.waiting.append(job)
        return job

    def prepare(self, request: TextRequest | ImageRequest) -> Job:
        """Checks a request without queueing it. The thread that calls ``tick`` appends the job between two ticks."""
        return TextJob(self.model, request) if isinstance(request, TextRequest) else ImageJob(self.model, request)

    def cancel(self, job: Job) -> None:
        """Frees the job's slot at once. The job emits no further events."""
        if job in self.waiting:
            self.waiting.remove(job)
        self.running = [
            j for j in self.running if job not in (j, getattr(j, "answer", None), getattr(j, "plans", None))
        ]

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to do."""
        return not self.waiting and not self.running

    def tick(self) -> list[tuple[Job, Event]]:
        """Prefills the jobs that joined, then decodes one token of every answer and takes one step of every picture.

        Returns (job, event) in order. The last event of a job is its ``Stop``."""
        self.events = []
        try:
            while self.waiting and len(self.running) < self.slots:
                self._admit(self.waiting.popleft())
            self._prefill([job for job in self.running if not job.prefilled])
        except ValueError as error:
            raise Unservable(str(error)) from error
        self._decode([job for job in self.running if isinstance(job, TextJob) and not job.image_job])
        groups: dict[tuple, list[ImageJob]] = {}
        for job in self.running:
            if isinstance(job, ImageJob) and job.prefilled:
                groups.setdefault((job.canvas, len(job.branches)), []).append(job)
        for group in groups.values():
            self._step(group)
        self.active = []
        return self.events

    def _emit(self, job: Job, *events: Event) -> None:
        self.events += [(job, event) for event in events]
        if isinstance(events[-1], Stop):
            self.running.remove(job)

    def _admit(self, job: Job) -> None:
        """Adds a job to the running batch. A picture with a plan is added as its plan, until the plan is written."""
        self.active = [job]
        if isinstance(job, ImageJob):
            r, opened = job.request, job.opened
            job.opened = self.model.prepare(opened, r.settings, r.seed)
            job.shared = job.opened is opened
            if r.think:
                job.opened = instructed(job.opened, self.model.think_before_drawing)
                asked = replace(job.opened, messages=job.opened.messages[:-1])
                sampling = (r.think.max_new_tokens, r.think.temperature, r.think.top_p, r.seed)
                self.running.append(TextJob(self.model, TextRequest(asked, *sampling, pictures=0), job))
                return
        self.running.append(job)

    def _draw_planned(self, plan: TextJob, job: ImageJob) -> None:
        """Replaces a finished plan by its picture in the running batch."""
        job.plan, job.planned = plan.text, len(plan.ids)
        job.opened = self.model.planned(job.opened, plan.text)
        job.branches = self.model.branches(job.opened, job.request.settings)
        self.running[self.running.index(plan)] = job

    # ---- prefill ------------------------------------------------------------------------------------------------

    def _prefill(self, jobs: Sequence[Job]) -> None:
        """Prefills jobs. Layouts of text alone are prefilled in one batch, layouts with pictures one by one."""
        wanted: dict[Job, list[Layout]] = {}
        for job in jobs:
            self.active = [getattr(job, "plans", None) or job]
            if self._shared(job) is job:
                wanted[job] = self._layouts(job)
        pairs = [(job, layout) for job, many in wanted.items() for layout in many if len(layout)]
        text_only = [pair for pair in pairs if not _has_pictures(pair[1])]
        prefilled: dict[int, Context] = {}  # by id(layout)
        for group in ([text_only] if text_only else []) + [[pair] for pair in pairs if _has_pictures(pair[1])]:
            self.active = [getattr(job, "plans", None) or job for job, _ in group]
            later = [len(job.request.sample.messages) > 1 for job in self.active]
            contexts = self.prefixes.prefill([layout for _, layout in group], later)
            prefilled |= {id(layout): context for (_, layout), context in zip(group, contexts, strict=True)}
        for job in jobs:
            self.active = [getattr(job, "plans", None) or job]
            if isinstance(job, TextJob):
                [job.layout] = wanted[job]
                job.context = prefilled[id(job.layout)]
                job.prompt_tokens = job.context.length
                continue
            first, r = self._shared(job), job.request
            assert isinstance(first, ImageJob)
            fresh = tuple(prefilled.get(id(layout)) or self.model.open() for layout in wanted.get(job, ()))
            branches = first.drawing.contexts if first.drawing else fresh
            [job.drawing] = self.model.start([branches], [job.opened], [r.settings], [r.seed])

    def _shared(self, job: Job) -> Job:
        """The first running picture of the same request, whose contexts this job shares; else the job itself."""
        return next((j for j in self.running if isinstance(job, ImageJob) and job.shares_contexts(j)), job)

    def _layouts(self, job: Job) -> list[Layout]:
        """The layouts to prefill: the conversation, or one layout for each branch of guidance."""
        if isinstance(job, TextJob):
            return [self.model.lay_out(job.opened)]
        return [self._branch(job, drop) for drop in job.branches]

    def _branch(self, job: ImageJob, drop: Drop) -> Layout:
        """The layout of a branch of guidance."""
        return self.model.lay_out_away(job.opened, drop, job.request.negative_prompt)

    # ---- text ---------------------------------------------------------------------------------------------------

    def _decode(self, jobs: Sequence[TextJob]) -> None:
        """Samples one token of each job, after one batched forward over the tokens sampled before."""
        extended = [job for job in jobs if job.pending]
        if extended:
            self.active = [job.plans or job for job in extended]
            replies = [self.model.reply(job.pending) for job in extended]
            with alone():
                contexts = self.model.extend([job.context for job in extended], replies)
            for job, context in zip(extended, contexts, strict=True):
                job.context, job.pending = context, []
        for job in jobs:
            self._sample(job)

    def _sample(self, job: TextJob) -> None:
        self.active, r = [job.plans or job], job.request
        logits = job.context.logits
        if r.penalties != NO_PENALTIES:
            logits = r.penalties(logits, _text_ids(job.layout), job.ids)
        token = next_token(logits, r.temperature, r.top_p, job.generator, r.top_k)
        room = len(job.images) < r.pictures and len(job.ids) + 1 < r.max_new_tokens
        if token == self.model.picture_word and room and not (job.ids and self.model.opens_with_picture):
            self._begin_picture(job, token)
            return
        reason = "stop" if token in self.model.stop_ids else None
        if not reason:
            if r.logprobs is not None:
                job.logprobs.append(self._logprobs(job.context, token, r.logprobs))
            job.ids.append(token)
            job.pending = [token]
            job.text = self.model.spoken(job.ids[job.text_start :])
            ends = [at for s in r.stop if (at := job.text.find(s)) >= 0]
            if ends:
                job.text, reason = job.text[: min(ends)], "stop"
            elif len(job.ids) == r.max_new_tokens:
                reason = "length"
        tags = (OPEN, CLOSE) if r.think else ()
        self._emit_text(job, job.text if reason else _stable(job.text, (*r.stop, *tags)))
        if reason and job.plans:
            self._draw_planned(job, job.plans)
        elif reason:
            assert job.layout
            job.reason, ids = reason, job.ids[job.text_start : len(job.ids) - len(job.pending)]
            self.prefixes.keep(job.layout, ids, job.context)
            self._emit(job, Stop(reason, Usage(job.prompt_tokens, len(job.ids), len(job.images)), job.parameters))

    def _emit_text(self, job: TextJob, ready: str) -> None:
        """Emit the part of the text that the client has not received: thoughts apart, and a plan as thoughts."""
        thought, ready = (ready, "") if job.plans else split(ready) if job.request.think else ("", ready)
        if len(thought) > len(job.thought):
            self._emit(job.plans or job, ReasoningDelta(thought[len(job.thought) :]))
            job.thought = thought
        if len(ready) > len(job.sent):
            self._emit(job, TextDelta(ready[len(job.sent) :], tuple(job.logprobs)))
            job.sent, job.logprobs = ready, []

    def _begin_picture(self, job: TextJob, token: int) -> None:
        """Suspend an answer that begins a picture; the drawing starts from the answer's context."""
        self._emit_text(job, job.text)
        seed, later = job.request.seed + len(job.images), len(job.request.sample.messages) > 1
        job.ids.append(token)
        job.parts += (Text(job.text, loss=True),) if job.text or self.model.opens_with_picture else ()
        [job.context] = self.model.extend([job.context], [self.model.reply([token])])
        turn = assistant(*job.parts, Image(None, "target"))
        opened = replace(job.opened, messages=(*job.opened.messages[:-1], turn))
        image_job = ImageJob(self.model, ImageRequest(opened, seed, None, self.model.defaults(opened)), job)
        others = [self.model.lay_out(opened, drop) for drop in image_job.branches if drop]
        contexts = [
            self.prefixes.prefill([layout], [later])[0] if len(layout) else self.model.open() for layout in others
        ]
        [image_job.drawing] = self.model.start(
            [(job.context, *contexts)], [opened], [image_job.request.settings], [seed]
        )
        job.image_job = image_job
        self.running.append(image_job)

    def _end_picture(self, job: TextJob, image: PIL.Image.Image) -> None:
        """Adds the finished picture to the answer and prefills it; decoding continues."""
        assert job.layout
        seen = Image(image, "target")
        text, picture = Segment(Kind.TEXT, tuple(job.ids[job.text_start :])), self.model.lay_out_picture(seen)
        job.layout = Layout(job.layout.id, (*job.layout.segments, text, *picture))
        rest = Layout(job.layout.id, job.layout.segments[-len(picture) :])
        [job.context] = self.model.extend([job.context], [rest])
        job.parts, job.text_start, job.image_job = (*job.parts, seen), len(job.ids), None
        job.text = job.sent = ""

    def _logprobs(self, context: Context, token: int, most: int) -> TokenLogprob:
        scores = context.logits.float().log_softmax(-1)
        values, ids = scores.topk(min(most, len(scores)))
        piece = self.model.tokenizer.piece
        top = tuple((piece(int(i)), float(v)) for i, v in zip(ids, values, strict=True))
        return TokenLogprob(piece(token), float(scores[token]), top)

    # ---- pictures -----------------------------------------------------------------------------------------------

    def _step(self, group: Sequence[ImageJob]) -> None:
        """One step of pictures of one size; the finished ones are decoded one by one."""
        self.active = [job.answer or job for job in group]
        moved = self.model.step([job.drawing for job in group if job.drawing])
        for job, drawing in zip(group, moved, strict=True):
            asked, previews = job.answer or job, job.request.previews
            self.active = [asked]
            if drawing.done:
                job.image = to_pil(self.model.finish([drawing])[0])
                self._emit(asked, ImageDone(job.image, job.request.seed))
                if job.answer:
                    self.running.remove(job)
                    self._end_picture(job.answer, job.image)
                else:
                    self._emit(job, Stop("image", Usage(drawing.contexts[0].length, job.planned, 1), job.parameters))
            elif drawing.step in {round(drawing.steps * i / (previews + 1)) for i in range(1, previews + 1)}:
                image = to_pil(self.model.preview([drawing])[0])
                self._emit(asked, ImagePreview(image, drawing.step, drawing.steps))
            job.drawing = drawing


def exact(model: UnifiedModel) -> bool:
    """Whether drawing is batch-invariant to the bit on this machine. Two steps are drawn, alone and in a batch."""
    settings = model.settings.within(2)
    size = model.canvas(Sample("", (user(""), assistant(Image(None, "target")))))[::-1]

    def latents(*prompts: str) -> Tensor:
        loop = Scheduler(model, slots=len(prompts))
        jobs = [loop.submit(ImageRequest(Sample("", (user(p),)), 0, size, settings)) for p in prompts]
        for _ in range(2):
            loop.tick()
        assert isinstance(jobs[0], ImageJob) and jobs[0].drawing
        return jobs[0].drawing.state

    return torch.equal(latents("a star"), latents("a star", "a red circle left of a blue square", ""))


def _opened(sample: Sample, turn: Message) -> Sample:
    """The sample as a request: an open turn is added to a conversation that ends with the user's message."""
    if sample.is_open:
        return sample
    if not sample.messages or sample.messages[-1].role != "user":
        raise ValueError("a conversation must end with a user's message")
    return replace(sample, messages=(*sample.messages, turn))


def _has_pictures(layout: Layout) -> bool:
    """Whether a layout holds pictures."""
    return any(s.image is not None for s in layout.segments)


def _text_ids(layout: Layout | None) -> tuple[int, ...]:
    """The token ids of the text segments of a layout."""
    return tuple(i for s in (layout.segments if layout else ()) if s.kind == Kind.TEXT for i in s.ids if i >= 0)


def _stable(text: str, stops: Sequence[str]) -> str:
    """The prefix of an unfinished text that no later token can change: without an incomplete character and without what
    may be the beginning of a stop text."""
    if text.endswith("\ufffd"):
        return ""
    held = max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text[: len(text) - held]
