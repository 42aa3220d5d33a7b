"""Rollouts: what a model makes of asks, through the scheduler that serves requests, and how rewards judge it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import PIL.Image

from diptych.core.sample import Image, Message, Sample, Text
from diptych.generation.engine import changed
from diptych.generation.scheduler import ImageJob, ImageRequest, Scheduler, TextJob, TextRequest
from diptych.models.protocol import Settings, UnifiedModel
from diptych.recipes import rewards
from diptych.training.recipe import Reward
from diptych.training.rewards import Rollout

SLOTS = 64  # rollouts that run together


class Scheduled:
    """Rollouts through ``generation.scheduler``: a picture does not depend on those that are drawn with it."""

    def make(self, model: UnifiedModel, asks: Sequence[Sample], seeds: Sequence[int], how: Reward) -> list[Rollout]:
        """One rollout for each ask: the picture that its last turn asks for, or an answer in text."""
        loop = Scheduler(model, None, min(SLOTS, len(asks)))
        jobs = [loop.submit(_request(model, ask, seed, how)) for ask, seed in zip(asks, seeds, strict=True)]
        while not loop.idle:
            loop.tick()
        return [
            _drawn(model, ask, job) if isinstance(job, ImageJob) else _said(model, ask, job)
            for ask, job in zip(asks, jobs, strict=True)
        ]

    def judge(
        self, asks: Sequence[Sample], made: Sequence[PIL.Image.Image | str], how: Reward, folder: Path
    ) -> list[dict[str, float | None]]:
        """The value of every reward. Raises ``ValueError`` where a reward returns another number of values."""
        columns = {}
        for name in how.rewards:
            values = list(rewards.find(name, folder)(asks, made))
            if len(values) != len(made):
                raise ValueError(f"reward {name!r} returned {len(values)} values for {len(made)} rollouts")
            columns[name] = [None if v is None else float(v) for v in values]
        return [{name: column[i] for name, column in columns.items()} for i in range(len(made))]

    def temperatures(self, model: UnifiedModel, how: Reward, folder: Path) -> dict[str, float]:
        """The temperature of words and, where a picture is codes, of codes. Raises ``ValueError`` for unknown rewards,
        and for sampling of codes whose probabilities are not those of the model."""
        for name in how.rewards:
            rewards.find(name, folder)
        settings = changed(model.settings, how.sampling)
        if settings.num_inference_steps is not None:
            return {"text": how.temperature}
        values = asdict(settings)  # type: ignore[call-overload]
        wanted = {"guidance_scale": 1, "top_p": 1}
        if wrong := {k: values[k] for k, v in wanted.items() if values[k] != v}:
            raise ValueError(
                f"rollouts of codes need reward.sampling with {wanted}, not {wrong}: guided or cut "
                "probabilities are not those that are trained"
            )
        if not values["temperature"]:
            raise ValueError("rollouts of codes need a reward.sampling.temperature above 0")
        return {"text": how.temperature, "image": values["temperature"]}


def _request(model: UnifiedModel, ask: Sample, seed: int, how: Reward) -> ImageRequest | TextRequest:
    last = ask.messages[-1].parts[-1] if ask.messages[-1].role == "assistant" else None
    if isinstance(last, Image):
        settings: Settings = changed(model.defaults(ask), how.sampling)
        return ImageRequest(ask, seed, last.size, settings)
    return TextRequest(ask, how.max_new_tokens, how.temperature, 1.0, seed, pictures=0)


def _drawn(model: UnifiedModel, ask: Sample, job: ImageJob) -> Rollout:
    """The picture as a training target, by its latents or codes: encoded again it would be another one."""
    assert job.drawing is not None and job.image is not None
    height, width = job.canvas
    target = Image(job.image, "target", (width, height), encoded=model.encoded(job.drawing))
    turn = replace(ask.messages[-1], parts=(target,))
    return Rollout(replace(ask, messages=(*ask.messages[:-1], turn)), job.image)


def _said(model: UnifiedModel, ask: Sample, job: TextJob) -> Rollout:
    """The answer as a training target. One that was cut off, or whose text is read as other tokens than were sampled,
    is not trained on: its probability is not known."""
    text = model.tokenizer.decode(job.ids)
    exact = tuple(model.tokenizer.encode(text)) == tuple(job.ids)
    finished = job.reason == "stop" and exact and bool(text)
    sample = replace(ask, messages=(*ask.messages, Message("assistant", (Text(text or " ", loss=True),))))
    return Rollout(sample, text, finished)
