"""Predictions apart from their loss, and drawings that become training rows."""

from __future__ import annotations

import torch

from diptych.core.batch import pack
from diptych.core.noise import Noise
from diptych.core.sample import Image, Sample, assistant
from diptych.generation.scheduler import ImageJob, ImageRequest, Scheduler
from diptych.models.predictions import TokenPrediction, score
from tests.support import tiny

NOISE = Noise(3, 5)


def drawn(model, sample: Sample, seed: int = 7) -> ImageJob:
    loop = Scheduler(model)
    job = loop.submit(ImageRequest(sample, seed, None, model.defaults(sample)))
    while not loop.idle:
        loop.tick()
    assert isinstance(job, ImageJob) and job.drawing is not None
    return job


def test_the_score_of_predictions_is_the_loss(model):
    batch = pack([model.lay_out(s) for s in tiny.samples()], model.routes)
    with torch.no_grad():
        predictions = model.predict(batch, NOISE)
        losses, scored = model(batch, NOISE), score(predictions, batch, model.counts(batch))
    assert predictions.keys() == losses.keys() == model.counts(batch).keys()
    for name, term in losses.items():
        assert torch.equal(term.sum, scored[name].sum) and term.count == scored[name].count


def test_an_objective_sees_the_predictions_inside_forward(model):
    batch = pack([model.lay_out(tiny.draw())], model.routes)
    seen = []

    def objective(predictions, row, counts):
        seen.append((set(predictions), row is batch, counts == model.counts(batch)))
        return score(predictions, row, counts)

    with torch.no_grad():
        model(batch, NOISE, objective)
    assert seen == [({"text", "image"}, True, True)]


def test_a_finished_drawing_is_a_training_row_without_being_encoded_again(model):
    for ask in (tiny.request(tiny.draw()), tiny.request(tiny.edit())):
        job = drawn(model, ask)
        height, width = job.drawing.canvas
        target = Image(None, "target", (width, height), encoded=model.encoded(job.drawing))
        batch = pack([model.lay_out(Sample(ask.id, (*ask.messages, assistant(target))))], model.routes)
        with torch.no_grad():
            [part] = model.predict(batch, NOISE)["image"]
        if isinstance(part, TokenPrediction):
            assert torch.equal(part.targets, job.drawing.state.flatten())
        else:
            data = part.target.data if part.features == -1 else part.target.data.flatten(2).transpose(1, 2)
            assert torch.equal(data[0], job.drawing.state)
            again = model.predict(batch, NOISE)["image"][0].target
            assert torch.equal(again.x_t, part.target.x_t) and torch.equal(again.times, part.target.times)
