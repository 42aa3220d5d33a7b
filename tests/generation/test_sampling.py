"""Sampling of tokens, compared with transformers' logits processors."""

from __future__ import annotations

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper

from diptych.generation.engine import Engine
from diptych.generation.events import TextDelta
from diptych.generation.sampling import Penalties, check_sampling, next_token
from tests.support import tiny


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny.shake(tiny.model("bagel")).requires_grad_(False), "tiny")


def test_the_repetition_penalty_is_that_of_transformers():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    prompt, answer = [3, 7, 7, 11], [2, 7]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + answer]), logits[None].clone())[0]
    assert torch.equal(Penalties(1.7)(logits, prompt, answer), expected)


def test_presence_counts_once_and_frequency_each_time():
    changed = Penalties(presence=0.5, frequency=0.25, bias=((4, 3.0),))(torch.zeros(6), [1], [2, 2, 3])
    assert changed.tolist() == [0.0, 0.0, -1.0, -0.75, 3.0, 0.0]


def test_top_k_samples_what_transformers_keeps():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    kept = TopKLogitsWarper(4)(torch.zeros(1, 1, dtype=torch.long), logits[None])[0].isfinite().nonzero().flatten()
    generator = torch.Generator().manual_seed(2)
    assert {next_token(logits, 5.0, 1.0, generator, 4) for _ in range(200)} == set(kept.tolist())


def test_values_that_no_sampler_has_are_refused():
    with pytest.raises(ValueError, match="top_k must be at least 0"):
        check_sampling(1.0, 1.0, -1)
    with pytest.raises(ValueError, match="repetition_penalty must be more than 0 and at most 10, not 0.0"):
        Penalties(0.0)
    with pytest.raises(ValueError, match="logit_bias names token 9; the vocabulary has tokens 0 to 5"):
        Penalties(bias=((9, 1.0),)).check(6)


def test_an_answer_and_its_stream_are_sampled_alike(engine):
    options = {"max_new_tokens": 12, "temperature": 2.0, "seed": 3, "top_k": 5, "repetition_penalty": 1.3}
    answer = engine.chat("hello", **options)
    streamed = "".join(e.text for e in engine.stream("hello", **options) if isinstance(e, TextDelta))
    assert streamed.strip() == answer.text.strip() and answer.parameters["top_k"] == 5
    assert engine.chat("hello", 12, 2.0, seed=3, top_k=1).ids == engine.chat("hello", 12).ids
