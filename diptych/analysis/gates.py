"""When and where a gate adds detail to a picture while it is drawn (Cheers, arXiv 2603.12793, figure 3).

A *gate* is a module that gives one number for each latent of a picture; families that have one name it ``gate.gate``.
A hook collects its outputs while prompts are drawn without guidance, so they belong to the branch with the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from diptych.analysis.collect import outputs
from diptych.core.sample import Image, Sample, assistant, user
from diptych.core.tensors import Float, Tensor
from diptych.models.protocol import UnifiedModel

GATE = "gate.gate"


@dataclass(frozen=True, eq=False)
class Gates:
    """``values`` of the gate for every picture, step, row and column; ``times`` of the steps (1 is noise, 0 data); the
    finished ``pictures`` in [-1, 1]."""

    values: Float[np.ndarray, "P S h w"]
    times: tuple[float, ...]
    pictures: Float[Tensor, "P 3 H W"]

    @property
    def activity(self) -> Float[np.ndarray, "P S"]:
        """Mean size of the gate over a picture."""
        return np.abs(self.values).mean((-2, -1))

    @property
    def sparsity(self) -> Float[np.ndarray, "P S"]:
        """The smallest share of a picture that holds nine tenths of the gate's total size: small for a sparse gate."""
        sizes = np.sort(np.abs(self.values).reshape(*self.values.shape[:2], -1), -1)[..., ::-1]
        whole = sizes.sum(-1, keepdims=True)
        held = np.cumsum(sizes, -1) / np.where(whole == 0, 1, whole)
        return ((held < 0.9).sum(-1) + 1) / sizes.shape[-1]

    @property
    def contours(self) -> Float[np.ndarray, "P S"]:
        """Correlation over a picture of the gate's size with how strongly the finished picture changes there (nan where
        either is the same everywhere)."""
        edges = _edges(self.pictures, self.values.shape[-2:])
        return np.array(
            [
                [_correlation(np.abs(step), edge) for step in steps]
                for steps, edge in zip(self.values, edges, strict=True)
            ]
        )

    def to_json(self) -> list[dict[str, float | None]]:
        """Means over pictures, one row a step."""
        with np.errstate(invalid="ignore"):
            contours = [float(np.mean(c[~np.isnan(c)])) if not np.isnan(c).all() else None for c in self.contours.T]
        return [
            {
                "t": round(t, 6),
                "activity": round(float(a), 6),
                "signed": round(float(v), 6),
                "share": round(float(s), 6),
                "contours": None if c is None else round(c, 6),
            }
            for t, a, v, s, c in zip(
                self.times,
                self.activity.mean(0),
                self.values.mean((0, 2, 3)),
                self.sparsity.mean(0),
                contours,
                strict=True,
            )
        ]


@torch.inference_mode()
def gates(model: UnifiedModel, prompts: Sequence[str], steps: int = 20, seed: int = 0) -> Gates:
    """The gate while ``prompts`` are drawn in ``steps`` steps, each from its own seed.

    Raises ``ValueError`` for a model without a gate."""
    try:
        gate = model.get_submodule(GATE)
    except AttributeError as error:
        raise ValueError(f"family {model.family!r} has no gate to look at (no module {GATE!r})") from error
    values, pictures = [], []
    times: tuple[float, ...] = ()
    for i, prompt in enumerate(prompts):
        request = Sample(prompt, (user(prompt), assistant(Image(None, "target"))))
        settings = replace(model.settings, num_inference_steps=steps, guidance_scale=1.0)
        [context] = model.extend([model.open()], [model.lay_out(request)])
        [drawing] = model.start([(context,)], [request], [settings], [seed + i])
        seen: list[Tensor] = []

        def collect(name: str, output: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(output)

        with outputs({"gate": gate}, collect):
            while not drawing.done:
                [drawing] = model.step([drawing])
        if not seen:
            raise ValueError(f"this {model.family} does not ask its gate (its config says so)")
        rows, columns = _grid(drawing.canvas, seen[0].shape[1])
        values.append(torch.stack(seen).view(len(seen), rows, columns).float().cpu().numpy())
        pictures.append(model.finish([drawing])[0].cpu())
        assert drawing.times is not None, "a family with a gate draws by flow matching"
        times = tuple(float(t) for t in drawing.times[:-1])
    return Gates(np.stack(values), times, torch.stack(pictures))


def _grid(canvas: tuple[int, int], places: int) -> tuple[int, int]:
    """(rows, columns) of so many places on a canvas of (height, width)."""
    side = round((canvas[0] * canvas[1] / places) ** 0.5)
    return canvas[0] // side, canvas[1] // side


def _edges(pictures: Float[Tensor, "P 3 H W"], grid: tuple[int, int]) -> Float[np.ndarray, "P h w"]:
    """How strongly pictures change, averaged over the places of a grid."""
    grey = pictures.float().mean(1).numpy()
    down, right = np.gradient(grey, axis=(1, 2))
    change = torch.from_numpy(np.hypot(down, right))[:, None]
    return torch.nn.functional.adaptive_avg_pool2d(change, grid)[:, 0].numpy()


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])
