"""The flow: path, schedule, losses, guidance and Euler steps, as properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.core.noise import Noise
from diptych.parts.flow import EARLIEST, TimeDraw, guide, mix, schedule, shift_time, squared_error, velocity

B, N, F = 3, 5, 4


def draw(seed: int) -> torch.Tensor:
    return torch.randn(B, N, F, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DATA, NOISE, OTHER = draw(0), draw(1), draw(2)


def test_ends_of_the_path():
    assert torch.equal(mix(DATA, NOISE, torch.zeros(B)), DATA)
    assert torch.equal(mix(DATA, NOISE, torch.ones(B)), NOISE)


def test_velocity_is_the_derivative_of_the_path():
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    step = 1e-3
    slope = (mix(DATA, NOISE, t + step) - mix(DATA, NOISE, t)) / step
    torch.testing.assert_close(slope, NOISE - DATA)


@settings(deadline=None)
@given(st.integers(1, 60), st.floats(0.1, 10))
def test_schedule(steps, shift):
    times = schedule(steps, shift)
    assert len(times) == steps + 1 and times[0] == 1 and times[-1] == 0
    assert (times.diff() < 0).all()


def test_schedule_needs_a_step():
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1, not 0"):
        schedule(0, 1.0)


@given(st.floats(0, 1), st.floats(0.1, 10))
def test_shift_keeps_the_ends_and_is_undone_by_its_inverse(t, shift):
    time = torch.tensor(t, dtype=torch.float64)
    assert float(shift_time(time, 1.0)) == t
    torch.testing.assert_close(shift_time(shift_time(time, shift), 1 / shift), time)
    assert float(shift_time(time, 3.0)) >= t - 1e-12


@settings(deadline=None)
@given(st.integers(1, 40), st.floats(0.2, 6))
def test_euler_on_a_constant_field_is_exact(steps, shift):
    times = schedule(steps, shift).double()
    x = NOISE
    for now, then in zip(times, times[1:], strict=False):
        x = x - (NOISE - DATA) * (now - then)
    torch.testing.assert_close(x, DATA)


@settings(deadline=None)
@given(st.floats(EARLIEST, 1))
def test_predictions_agree(t):
    """A velocity prediction and the data prediction that stands for it have one loss and one velocity."""
    times = torch.full((B,), t, dtype=torch.float64)
    x_t = mix(DATA, NOISE, times)
    data = x_t - t * OTHER  # what a velocity of OTHER says about the data
    torch.testing.assert_close(velocity(data, x_t, times, "data"), OTHER)
    assert velocity(OTHER, x_t, times, "velocity") is OTHER
    loss = squared_error(OTHER, DATA, NOISE, times, "velocity")
    torch.testing.assert_close(squared_error(data, DATA, NOISE, times, "data"), loss)


def test_a_data_prediction_stays_finite_at_time_zero():
    t = torch.zeros(B, dtype=torch.float64)
    torch.testing.assert_close(velocity(OTHER, DATA, t, "data"), (DATA - OTHER) / EARLIEST)
    assert squared_error(OTHER, DATA, NOISE, t, "data").isfinite().all()


@pytest.mark.parametrize("kind", ["velocity", "data"])
def test_a_perfect_prediction_has_no_loss(kind):
    t = torch.rand(B, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    perfect = NOISE - DATA if kind == "velocity" else DATA
    assert float(squared_error(perfect, DATA, NOISE, t, kind).abs().max()) == 0


@pytest.mark.parametrize("renorm", ["none", "global", "channel", "text_channel"])
def test_scale_one_is_no_guidance(renorm):
    torch.testing.assert_close(guide(DATA, NOISE, None, 1.0, 1.0, renorm), DATA)
    torch.testing.assert_close(guide(DATA, NOISE, OTHER, 1.0, 1.0, renorm), DATA)
    assert torch.equal(guide(DATA, None, None, 7.0, 7.0), DATA)


def test_scale_zero_is_the_branch_without():
    torch.testing.assert_close(guide(DATA, NOISE, None, 0.0, 1.0), NOISE)
    torch.testing.assert_close(guide(DATA, NOISE, OTHER, 5.0, 0.0), OTHER)


def test_equal_branches_are_a_fixed_point():
    for scale in (0.0, 2.0, 9.0):
        torch.testing.assert_close(guide(DATA, DATA, DATA, scale, scale), DATA)


@pytest.mark.parametrize("renorm, dims", [("global", (-2, -1)), ("channel", (-1,))])
@given(st.floats(1, 20), st.floats(1, 5))
def test_renorm_never_lengthens(renorm, dims, text, image):
    out = guide(DATA, NOISE, OTHER, text, image, renorm)
    assert (out.norm(dim=dims) <= DATA.norm(dim=dims) * (1 + 1e-6)).all()


def test_renorm_min_bounds_the_shrinking():
    plain = guide(DATA, NOISE, None, 9.0, 1.0)
    assert torch.equal(guide(DATA, NOISE, None, 9.0, 1.0, "global", 1.0), plain)
    half = guide(DATA, NOISE, None, 9.0, 1.0, "global", 0.5)
    assert (half.norm(dim=(-2, -1)) >= 0.5 * plain.norm(dim=(-2, -1)) * (1 - 1e-6)).all()


def test_renorm_of_one_picture_does_not_depend_on_its_batch_mates():
    whole = guide(DATA, NOISE, OTHER, 4.0, 2.0, "global")
    torch.testing.assert_close(whole[:1], guide(DATA[:1], NOISE[:1], OTHER[:1], 4.0, 2.0, "global"))


def test_times_belong_to_the_sample():
    times, noise = TimeDraw(shift=2.0), Noise(1, 2)
    together = times(noise, ("a", "b", "a"), (0, 0, 1))
    assert torch.equal(together[1:2], times(noise, ("b",), (0,)))
    assert len(set(together.tolist())) == 3 and ((together > 0) & (together < 1)).all()
    plain = TimeDraw()(noise, ("a", "b", "a"), (0, 0, 1))
    torch.testing.assert_close(shift_time(plain, 2.0), together)


def test_times_follow_mean_and_deviation():
    names = tuple(map(str, range(2000)))
    t = TimeDraw(mean=-0.3, std=0.5)(Noise(), names, (0,) * len(names))
    logit = torch.logit(t)
    assert abs(float(logit.mean()) + 0.3) < 0.05 and abs(float(logit.std()) - 0.5) < 0.05
