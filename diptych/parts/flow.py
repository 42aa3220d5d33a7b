"""Flow matching on the straight path between data (t = 0) and noise (t = 1): times, targets, guidance, Euler steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch

from diptych.core.noise import Noise
from diptych.core.tensors import Float, Tensor

Prediction = Literal["velocity", "data"]
Renorm = Literal["none", "global", "channel", "text_channel"]
EARLIEST = 0.05  # a data prediction is turned into a velocity by dividing by no less than this time


@dataclass(frozen=True)
class FlowSettings:
    """Sampler settings of a flow model. A model's config holds the defaults that suit its weights.

    Guidance is active while low < t <= high of ``guidance_interval``; ``renorm`` is how the guided velocity is scaled
    back (``guide``). ``warped`` uses the times of ``warp`` in place of shifted ones."""

    num_inference_steps: int = 50
    guidance_scale: float = 4.0
    image_guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.4, 1.0)
    timestep_shift: float = 3.0
    renorm: Renorm = "global"
    renorm_min: float = 0.0
    warped: bool = False

    def __post_init__(self) -> None:
        low, high = self.guidance_interval
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, not {self.num_inference_steps}")
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval must be 0 <= low <= high <= 1, not {self.guidance_interval}")
        if not (self.timestep_shift > 0 and self.guidance_scale >= 0 and self.image_guidance_scale >= 0):
            raise ValueError(
                "timestep_shift must be positive and guidance scales at least 0, not "
                f"{self.timestep_shift}, {self.guidance_scale}, {self.image_guidance_scale}"
            )
        if self.renorm not in get_args(Renorm):
            raise ValueError(f"unknown renorm {self.renorm!r}; choose from {', '.join(get_args(Renorm))}")

    def times(self, steps: int) -> Float[Tensor, " steps_1"]:
        """The steps + 1 times of the sampler, from 1 to 0."""
        return warp(steps) if self.warped else schedule(steps, self.timestep_shift)

    def within(self, steps: int) -> FlowSettings:
        """The same settings with at most ``steps`` steps."""
        return replace(self, num_inference_steps=min(steps, self.num_inference_steps))

    def guided(self, t: float) -> bool:
        """Whether guidance is active at time ``t``; an interval that begins at 0 includes 0."""
        low, high = self.guidance_interval
        return low < t <= high or t == low == 0 < high

    def combine(
        self, velocities: Float[Tensor, "R n f"], branches: Mapping[frozenset[str], float]
    ) -> Float[Tensor, "n f"]:
        """The guided velocity of one picture from the velocities of its first R branches. ``branches`` maps what each
        leaves out to its guidance scale: one without the text, and one without the images that keeps the text."""
        full, no_text, no_image = velocities[:1], None, None
        text_scale = image_scale = 1.0
        for (drop, scale), v in zip(list(branches.items())[1:], velocities[1:], strict=False):
            if "text" in drop:
                assert no_text is None, f"two branches lack the text: {branches}"
                no_text, text_scale = v[None], scale
            else:
                assert no_image is None and "image" in drop, f"neither text nor images are left out: {branches}"
                no_image, image_scale = v[None], scale
        return guide(full, no_text, no_image, text_scale, image_scale, self.renorm, self.renorm_min)[0]


def shift_time(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): a shift s > 1 moves times toward noise."""
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class TimeDraw:
    """Training times: sigmoid of a normal draw, or ``uniform`` in [0, 1); then shifted."""

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    uniform: bool = False

    def __call__(self, noise: Noise, owners: tuple[str, ...], ordinals: tuple[int, ...]) -> Float[Tensor, " N"]:
        """One time per picture, from the noise that belongs to it."""
        draw = noise.uniform if self.uniform else noise.normal
        draws = torch.cat([draw(o, f"time{i}", (1,)) for o, i in zip(owners, ordinals, strict=True)])
        return shift_time(draws if self.uniform else torch.sigmoid(self.mean + self.std * draws), self.shift)


def schedule(steps: int, shift: float, first: float = 1.0) -> Float[Tensor, " steps_1"]:
    """The steps + 1 times of the sampler, from ``first`` (before the shift) to 0; the model is evaluated at all but the
    last. Raises ``ValueError`` for fewer than one step."""
    if steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, not {steps}")
    # In float64, so that the first time is 1 for every shift: a guidance interval up to 1 includes it.
    return shift_time(torch.linspace(first, 0, steps + 1, dtype=torch.float64), shift).float()


def warp(steps: int) -> Float[Tensor, " steps_1"]:
    """steps + 1 times from 1 to 0, denser near noise: 1 - (1 - (1 - s^1.17)^0.8)^1.1 of evenly spaced s (the
    sampler of the repository LINs-lab/UCGM)."""
    s = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return (1 - (1 - (1 - s**1.17) ** 0.8) ** 1.1).float()


def mix(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) data + t noise; ``t`` (N,) broadcasts over the rest."""
    t = t.view(-1, *[1] * (data.dim() - 1))
    return (1 - t) * data + t * noise


def velocity(prediction: Tensor, x_t: Tensor, t: Tensor, kind: Prediction) -> Tensor:
    """The velocity (noise - data) of a prediction: the prediction itself, or (x_t - data) / t."""
    if kind == "velocity":
        return prediction
    return (x_t - prediction) / t.clamp(min=EARLIEST).view(-1, *[1] * (x_t.dim() - 1))


def squared_error(prediction: Tensor, data: Tensor, noise: Tensor, t: Tensor, kind: Prediction) -> Tensor:
    """Elementwise squared error in units of velocity, whatever is predicted."""
    if kind == "velocity":
        return (prediction - (noise - data)).square()
    return ((prediction - data) / t.clamp(min=EARLIEST).view(-1, *[1] * (data.dim() - 1))).square()


@runtime_checkable
class FlowDrawing(Protocol):
    """The part of a drawing that a sampler step reads (``models.protocol.Drawing`` has it)."""

    @property
    def state(self) -> Tensor:
        """x_t, (n, f)."""

    @property
    def settings(self) -> Any:
        """The ``FlowSettings``, or a family's own with the same ``guided`` and ``combine``."""

    @property
    def contexts(self) -> Sequence[object]:
        """One for each branch of guidance."""

    @property
    def branches(self) -> Mapping[frozenset[str], float]:
        """What each context leaves out -> its guidance scale."""

    @property
    def times(self) -> Tensor | None:
        """The steps + 1 times of the sampler."""

    @property
    def step(self) -> int:
        """How many steps were taken."""


def euler(
    drawings: Sequence[FlowDrawing],
    velocities: Callable[[Float[Tensor, "B n f"], Float[Tensor, " B"], int], Float[Tensor, "R B n f"]],
) -> list[tuple[Tensor, Tensor]]:
    """The next state of every drawing, and its guided velocity. ``velocities(x_t, t, branches)`` returns those of the
    first ``branches`` contexts; outside the guidance interval only the full context is evaluated."""
    now = [_interval(d) for d in drawings]
    guided = [d.settings.guided(float(t[0])) for d, t in zip(drawings, now, strict=True)]
    branches = len(drawings[0].contexts) if any(guided) else 1
    x_t = torch.stack([d.state for d in drawings])
    v = velocities(x_t, torch.stack([t[0] for t in now]).to(x_t.device), branches)
    out = []
    for i, (d, t) in enumerate(zip(drawings, now, strict=True)):
        combined = d.settings.combine(v[:, i] if guided[i] else v[:1, i], d.branches)
        out.append((d.state - combined * float(t[0] - t[1]), combined))
    return out


def _interval(drawing: FlowDrawing) -> Float[Tensor, " 2"]:
    """The times at which a drawing's next step begins and ends."""
    assert drawing.times is not None, "only a flow is integrated"
    return drawing.times[drawing.step : drawing.step + 2]


def guide(
    full: Float[Tensor, "B n f"],
    no_text: Float[Tensor, "B n f"] | None,
    no_image: Float[Tensor, "B n f"] | None,
    text_scale: float,
    image_scale: float,
    renorm: Renorm = "none",
    renorm_min: float = 0.0,
) -> Float[Tensor, "B n f"]:
    """Classifier-free guidance with up to two branches, in the order of BAGEL's
    ``modeling/bagel/bagel.py``::

        v' = v_text + g_text (v - v_text);  v'' = v_image + g_image (v' - v_image)

    and v'' scaled by clamp(|v| / |v''|, renorm_min, 1): ``global`` takes one norm per picture, ``channel`` one per
    token, ``text_channel`` one per token after text guidance and before image guidance.
    """
    out = full
    if no_text is not None:
        out = no_text + text_scale * (out - no_text)
        if renorm == "text_channel":
            out = _renorm(out, full, (-1,), renorm_min)
    if no_image is not None:
        out = no_image + image_scale * (out - no_image)
    if renorm in ("global", "channel"):
        out = _renorm(out, full, (-2, -1) if renorm == "global" else (-1,), renorm_min)
    return out


def _renorm(guided: Tensor, full: Tensor, dims: tuple[int, ...], least: float) -> Tensor:
    scale = full.norm(dim=dims, keepdim=True) / (guided.norm(dim=dims, keepdim=True) + 1e-8)
    return guided * scale.clamp(least, 1.0)
