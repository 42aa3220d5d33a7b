"""Continuous batching: requests join and leave the running batch between steps.

::

    submit ──▶ waiting ──▶ read ──▶ running ── tick: one word of every answer, one step of every picture ──▶ events
                                       └────────────── until it ends, or is cancelled ─────────────┘

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
from diptych.generation.events import Event, ImageDone, ImagePreview, ReasoningDelta, Stop, TextDelta, Usage, Word
from diptych.generation.prefix_cache import Memory
from diptych.generation.sampling import check_sampling, next_word
from diptych.generation.thinking import CLOSE, OPEN, Think, instructed, split
from diptych.models.protocol import Context, Drawing, Drop, Settings, UnifiedModel
from diptych.parts.batch_invariant import alone, steady
from diptych.parts.images import to_pil

Size = tuple[int, int]  # (width, height) in pixels


@dataclass(frozen=True, eq=False)
class TextRequest:
    """A request for words. ``stop`` are texts that end the answer and are not part of it; ``logprobs`` is how many
    likeliest words to report beside each word said (None: report nothing); ``pictures`` is how many pictures the answer
    may draw where the model begins one (``picture_word``), with the settings that suit them and seeds from ``seed`` on:
    after that many the begin-image token is emitted as
    ordinary text. With ``think`` the model is asked to reason first (``UnifiedModel.think_before_answering``)."""

    sample: Sample
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    pictures: int = 4
    think: bool = False

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """A request for a picture. ``settings`` are the family's; ``negative_prompt`` stands in for the dropped words in
    the branch of guidance that has no text; ``previews`` are shown evenly spread on the way. With ``think`` the model
    first writes a plan, which the picture is drawn from."""

    sample: Sample
    seed: int
    size: Size | None
    settings: Settings
    negative_prompt: str = ""
    previews: int = 0
    think: Think | None = None


class TextJob:
    """An answer on its way: ``ids`` said so far, and how it ended. While ``sketch`` is drawn the words wait. With
    ``plans`` it is no answer but the plan of that picture, to which its events belong."""

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
        self.generator = torch.Generator().manual_seed(r.seed)
        self.context: Context = model.open()
        self.laid: Layout | None = None
        self.ids: list[int] = []
        self.words: list[Word] = []  # reported with the next text
        self.text = self.told = self.thought = ""
        self.unread: list[int] = []  # said, and not yet read
        self.read = 0
        self.reason: str | None = None
        self.sketch: ImageJob | None = None
        self.parts: tuple[Text | Image, ...] = ()  # of the answer, up to its last picture
        self.since = 0  # words of ``ids`` before the end of the last picture; ``laid`` holds these

    @property
    def images(self) -> tuple[PIL.Image.Image, ...]:
        """The pictures of the answer."""
        return tuple(p.pixels for p in self.parts if isinstance(p, Image))

    @property
    def begun(self) -> bool:
        """Whether its conversation has been read."""
        return self.laid is not None


class ImageJob:
    """A picture on its way; of an answer that began it (``talk``), or asked for."""

    def __init__(self, model: UnifiedModel, request: ImageRequest, talk: TextJob | None = None) -> None:
        r, self.talk = request, talk
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
    def begun(self) -> bool:
        """Whether its conversation has been read."""
        return self.drawing is not None

    def reads_as(self, other: Job) -> bool:
        """Whether another picture starts from the very same contexts: several pictures of a prompt read it once."""
        if not isinstance(other, ImageJob):
            return False
        a, b = self.request, other.request
        same = (a.size, a.negative_prompt, self.branches) == (b.size, b.negative_prompt, other.branches)
        return a.sample is b.sample and same and self.plan == other.plan and self.shared and other.shared


Job = TextJob | ImageJob


class Unfit(ValueError):
    """A request that its model cannot begin, found out only now."""


class Scheduler:
    """The running batch of one model. ``slots`` is how many requests run together; the others wait in order.

    Not for several threads at once. ``at`` are the jobs that the model is working for: to whom an error belongs that
    comes out of ``tick``; ``events`` are those of the last tick, also of one that an error has ended."""

    def __init__(self, model: UnifiedModel, memory: Memory | None = None, slots: int = 32) -> None:
        if slots < 1:
            raise ValueError(f"slots must be at least 1, not {slots}")
        steady(model)
        self.model, self.memory, self.slots = model, memory or Memory(model, 0), slots
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.at: list[Job] = []
        self.events: list[tuple[Job, Event]] = []

    def submit(self, request: TextRequest | ImageRequest) -> Job:
        """The request in line. Raises ``ValueError`` for one that cannot be served, before anything is computed."""
        job = self.prepare(request)
        self.waiting.append(job)
        return job

    def prepare(self, request: TextRequest | ImageRequest) -> Job:
        """The request checked and not yet in line: whoever ticks in another thread appends it between two ticks."""
        return TextJob(self.model, request) if isinstance(request, TextRequest) else ImageJob(self.model, request)

    def cancel(self, job: Job) -> None:
        """Frees the job's place at once; it says no more."""
        if job in self.waiting:
            self.waiting.remove(job)
        self.running = [j for j in self.running if job not in (j, getattr(j, "talk", None), getattr(j, "plans", None))]

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to do."""
        return not self.waiting and not self.running

    def tick(self) -> list[tuple[Job, Event]]:
        """One word of every answer and one step of every picture, after reading what has joined. Events in order; a
        job's last one is its ``Stop``."""
        self.events = []
        try:
            while self.waiting and len(self.running) < self.slots:
                self._admit(self.waiting.popleft())
            self._join([job for job in self.running if not job.begun])
        except ValueError as error:
            raise Unfit(str(error)) from error
        self._say([job for job in self.running if isinstance(job, TextJob) and not job.sketch])
        groups: dict[tuple, list[ImageJob]] = {}
        for job in self.running:
            if isinstance(job, ImageJob) and job.begun:
                groups.setdefault((job.canvas, len(job.branches)), []).append(job)
        for group in groups.values():
            self._step(group)
        self.at = []
        return self.events

    def _tell(self, job: Job, *events: Event) -> None:
        self.events += [(job, event) for event in events]
        if isinstance(events[-1], Stop):
            self.running.remove(job)

    def _admit(self, job: Job) -> None:
        """Begins to run a job. In the place of a picture that needs a plan, the plan runs until it is written."""
        self.at = [job]
        if isinstance(job, ImageJob):
            r, opened = job.request, job.opened
            job.opened = self.model.prepare(opened, r.settings, r.seed)
            job.shared = job.opened is opened
            if r.think:
                job.opened = instructed(job.opened, self.model.think_before_drawing)
                asked = replace(job.opened, messages=job.opened.messages[:-1])
                how = (r.think.max_new_tokens, r.think.temperature, r.think.top_p, r.seed)
                self.running.append(TextJob(self.model, TextRequest(asked, *how, pictures=0), job))
                return
        self.running.append(job)

    def _draw_planned(self, talk: TextJob, job: ImageJob) -> None:
        """The plan is written: its picture takes its place."""
        job.plan, job.planned = talk.text, len(talk.ids)
        job.opened = self.model.planned(job.opened, talk.text)
        job.branches = self.model.branches(job.opened, job.request.settings)
        self.running[self.running.index(talk)] = job

    # ---- joining ------------------------------------------------------------------------------------------------

    def _join(self, jobs: Sequence[Job]) -> None:
        """Begins what has joined. Words alone are read together, what shows pictures one by one."""
        wanted: dict[Job, list[Layout]] = {}
        for job in jobs:
            self.at = [getattr(job, "plans", None) or job]
            if self._first(job) is job:
                wanted[job] = self._sequences(job)
        pairs = [(job, laid) for job, many in wanted.items() for laid in many if len(laid)]
        words = [pair for pair in pairs if not _shows(pair[1])]
        read: dict[int, Context] = {}  # by id(laid)
        for group in ([words] if words else []) + [[pair] for pair in pairs if _shows(pair[1])]:
            self.at = [getattr(job, "plans", None) or job for job, _ in group]
            later = [len(job.request.sample.messages) > 1 for job in self.at]
            contexts = self.memory.read([laid for _, laid in group], later)
            read |= {id(laid): context for (_, laid), context in zip(group, contexts, strict=True)}
        for job in jobs:
            self.at = [job]
            if isinstance(job, TextJob):
                [job.laid] = wanted[job]
                job.context = read[id(job.laid)]
                job.read = job.context.length
                continue
            first, r = self._first(job), job.request
            assert isinstance(first, ImageJob)
            own = tuple(read.get(id(laid)) or self.model.open() for laid in wanted.get(job, ()))
            branches = first.drawing.contexts if first.drawing else own
            [job.drawing] = self.model.start([branches], [job.opened], [r.settings], [r.seed])

    def _first(self, job: Job) -> Job:
        """The first running picture of the same request, whose contexts this one shares; else the job itself."""
        return next((j for j in self.running if isinstance(job, ImageJob) and job.reads_as(j)), job)

    def _sequences(self, job: Job) -> list[Layout]:
        """What the job reads: its conversation, or what each branch of guidance sees of it."""
        if isinstance(job, TextJob):
            return [self.model.lay_out(job.opened)]
        return [self._branch(job, drop) for drop in job.branches]

    def _branch(self, job: ImageJob, drop: Drop) -> Layout:
        """What a branch of guidance reads."""
        return self.model.lay_out_away(job.opened, drop, job.request.negative_prompt)

    # ---- words --------------------------------------------------------------------------------------------------

    def _say(self, talks: Sequence[TextJob]) -> None:
        """One word of each, after the model has read together what they said last."""
        going = [talk for talk in talks if talk.unread]
        if going:
            self.at = [talk.plans or talk for talk in going]
            replies = [self.model.reply(talk.unread) for talk in going]
            with alone():
                contexts = self.model.extend([talk.context for talk in going], replies)
            for talk, context in zip(going, contexts, strict=True):
                talk.context, talk.unread = context, []
        for talk in talks:
            self._word(talk)

    def _word(self, talk: TextJob) -> None:
        self.at, r = [talk.plans or talk], talk.request
        word = next_word(talk.context.logits, r.temperature, r.top_p, talk.generator)
        room = len(talk.images) < r.pictures and len(talk.ids) + 1 < r.max_new_tokens
        if word == self.model.picture_word and room and not (talk.ids and self.model.opens_with_picture):
            self._pause(talk, word)
            return
        reason = "stop" if word in self.model.stop_ids else None
        if not reason:
            if r.logprobs is not None:
                talk.words.append(self._reported(talk.context, word, r.logprobs))
            talk.ids.append(word)
            talk.unread = [word]
            talk.text = self.model.spoken(talk.ids[talk.since :])
            ends = [at for s in r.stop if (at := talk.text.find(s)) >= 0]
            if ends:
                talk.text, reason = talk.text[: min(ends)], "stop"
            elif len(talk.ids) == r.max_new_tokens:
                reason = "length"
        tags = (OPEN, CLOSE) if r.think else ()
        self._tell_text(talk, talk.text if reason else _settled(talk.text, (*r.stop, *tags)))
        if reason and talk.plans:
            self._draw_planned(talk, talk.plans)
        elif reason:
            assert talk.laid
            talk.reason, read = reason, talk.ids[talk.since : len(talk.ids) - len(talk.unread)]
            self.memory.keep(talk.laid, read, talk.context)
            self._tell(talk, Stop(reason, Usage(talk.read, len(talk.ids), len(talk.images)), talk.parameters))

    def _tell_text(self, talk: TextJob, ready: str) -> None:
        """Emit the part of the text that the client has not received: thoughts apart, and a plan as thoughts."""
        thought, ready = (ready, "") if talk.plans else split(ready) if talk.request.think else ("", ready)
        if len(thought) > len(talk.thought):
            self._tell(talk.plans or talk, ReasoningDelta(thought[len(talk.thought) :]))
            talk.thought = thought
        if len(ready) > len(talk.told):
            self._tell(talk, TextDelta(ready[len(talk.told) :], tuple(talk.words)))
            talk.told, talk.words = ready, []

    def _pause(self, talk: TextJob, word: int) -> None:
        """Suspend an answer that begins a picture; the drawing starts from the answer's context."""
        self._tell_text(talk, talk.text)
        seed, later = talk.request.seed + len(talk.images), len(talk.request.sample.messages) > 1
        talk.ids.append(word)
        talk.parts += (Text(talk.text, loss=True),) if talk.text or self.model.opens_with_picture else ()
        [talk.context] = self.model.extend([talk.context], [self.model.reply([word])])
        turn = assistant(*talk.parts, Image(None, "target"))
        opened = replace(talk.opened, messages=(*talk.opened.messages[:-1], turn))
        sketch = ImageJob(self.model, ImageRequest(opened, seed, None, self.model.defaults(opened)), talk)
        others = [self.model.lay_out(opened, drop) for drop in sketch.branches if drop]
        read = [self.memory.read([laid], [later])[0] if len(laid) else self.model.open() for laid in others]
        [sketch.drawing] = self.model.start([(talk.context, *read)], [opened], [sketch.request.settings], [seed])
        talk.sketch = sketch
        self.running.append(sketch)

    def _resume(self, talk: TextJob, image: PIL.Image.Image) -> None:
        """The picture is part of the answer, which reads it and goes on."""
        assert talk.laid
        seen = Image(image, "target")
        said, new = Segment(Kind.TEXT, tuple(talk.ids[talk.since :])), self.model.drawn(seen)
        talk.laid = Layout(talk.laid.id, (*talk.laid.segments, said, *new))
        rest = Layout(talk.laid.id, talk.laid.segments[-len(new) :])
        [talk.context] = self.model.extend([talk.context], [rest])
        talk.parts, talk.since, talk.sketch = (*talk.parts, seen), len(talk.ids), None
        talk.text = talk.told = ""

    def _reported(self, context: Context, word: int, most: int) -> Word:
        scores = context.logits.float().log_softmax(-1)
        values, ids = scores.topk(min(most, len(scores)))
        piece = self.model.tokenizer.piece
        likeliest = tuple((piece(int(i)), float(v)) for i, v in zip(ids, values, strict=True))
        return Word(piece(word), float(scores[word]), likeliest)

    # ---- pictures -----------------------------------------------------------------------------------------------

    def _step(self, group: Sequence[ImageJob]) -> None:
        """One step of pictures of one size; the finished ones are decoded one by one."""
        self.at = [job.talk or job for job in group]
        moved = self.model.step([job.drawing for job in group if job.drawing])
        for job, drawing in zip(group, moved, strict=True):
            asked, previews = job.talk or job, job.request.previews
            self.at = [asked]
            if drawing.done:
                job.image = to_pil(self.model.finish([drawing])[0])
                self._tell(asked, ImageDone(job.image, job.request.seed))
                if job.talk:
                    self.running.remove(job)
                    self._resume(job.talk, job.image)
                else:
                    self._tell(job, Stop("image", Usage(drawing.contexts[0].length, job.planned, 1), job.parameters))
            elif drawing.step in {round(drawing.steps * i / (previews + 1)) for i in range(1, previews + 1)}:
                image = to_pil(self.model.preview([drawing])[0])
                self._tell(asked, ImagePreview(image, drawing.step, drawing.steps))
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


def _shows(laid: Layout) -> bool:
    """Whether a sequence holds pictures."""
    return any(s.image is not None for s in laid.segments)


def _settled(text: str, stops: Sequence[str]) -> str:
    """As much of an unfinished text as no later word can change: half a character waits for its other half, and what
    may be the beginning of a stop text for the rest of it."""
    if text.endswith("\ufffd"):
        return ""
    held = max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text[: len(text) - held]
