"""One function for each probe: from one model, or a model and its base, to numbers and figures in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diptych.analysis import attention, figures, gates, keywords, layers, separability
from diptych.analysis.published import published_attention, published_shares
from diptych.core.sample import Image, Sample, assistant, user
from diptych.data.written import check_picture_path
from diptych.machine import disk
from diptych.models.protocol import UnifiedModel

Models = Mapping[str, UnifiedModel]  # one, or two: the model and its base


@dataclass(frozen=True)
class Findings:
    """The result of a probe: its ``numbers`` as JSON, and PNG ``figures`` by name."""

    name: str
    numbers: Mapping[str, Any]
    figures: Mapping[str, bytes]

    def write(self, folder: Path) -> list[Path]:
        """Writes ``<name>.json`` and the figures into ``folder`` and returns the files. Raises ``ValueError`` where a
        file of such a name was not written by a probe."""
        files = [folder / f"{self.name}.json", *(folder / f"{name}.png" for name in self.figures)]
        for file in files[1:]:
            check_picture_path(file)
        if files[0].exists() and not _is_probe(files[0]):
            raise ValueError(f"{files[0]} is there and was not written by diptych; name another folder")
        disk.write_text(files[0], json.dumps(self.numbers, indent=1))
        for file, png in zip(files[1:], self.figures.values(), strict=True):
            with disk.atomic(file) as part:
                part.write_bytes(png)
        return files


def _is_probe(file: Path) -> bool:
    """Whether a JSON file holds the numbers of a probe."""
    try:
        numbers = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(numbers, dict) and "what" in numbers


def run_separability(
    models: Models, data: separability.Labelled, what: str, at: Sequence[str] | None = None, seed: int = 0
) -> Findings:
    """Probe accuracy, discriminant ratio, silhouette and t-SNE at every point, the same points for a base."""
    at = at or separability.points(next(iter(models.values())))
    measures, planes = {}, {}
    for name, model in models.items():
        measures[name], vectors = separability.separability(model, data, at, seed)
        planes[name] = {point: separability.tsne(x, seed=seed) for point, x in vectors.items()}
    numbers = {
        "what": "separability",
        "data": what,
        "classes": list(data.classes),
        "pictures": len(data.pictures),
        "folds": separability.FOLDS,
        "perplexity": separability.PERPLEXITY,
        "seed": seed,
        "models": measures,
    }
    if len(models) == 2:
        ours, base = measures.values()
        numbers["change"] = {p: _difference(ours[p], base[p]) for p in ours}
    title = f"{what}: {len(data.pictures)} pictures of {len(data.classes)} classes"
    shown = {
        "separability": figures.separability(measures, title),
        "tsne": figures.maps(planes, data.labels, data.classes, f"t-SNE, {title}"),
    }
    return Findings("separability", numbers, shown)


def _difference(ours: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float]:
    value = {"accuracy": ours["accuracy"]["value"] - base["accuracy"]["value"]}
    value |= {k: ours[k] - base[k] for k in ("discriminant_ratio", "silhouette")}
    return {k: round(v, 6) for k, v in value.items()}


def run_attention(
    models: Models,
    samples: Sequence[Sample],
    what: str,
    rows: attention.Rows = "answer",
    markers: bool = False,
    published: bool = False,
) -> Findings:
    """A_V and A_T by layer, and the change against a base in percent; ``published`` adds the released code's number."""
    allocations = {name: attention.allocation(m, samples, rows, markers) for name, m in models.items()}
    by_layer = {name: a.to_json() for name, a in allocations.items()}
    numbers: dict[str, Any] = {
        "what": "attention",
        "data": what,
        "requests": len(samples),
        **attention.describe(rows, markers),
        "models": by_layer,
    }
    changes = None
    if len(models) == 2:
        ours, base = allocations.values()
        changes = attention.change(ours.picture, base.picture)
        numbers["change_percent"] = {"picture": changes, "text": attention.change(ours.text, base.text)}
    shown: dict[str, Any] = dict(by_layer)
    if published:
        released = {name: _published(m, samples) for name, m in models.items()}
        numbers["published_attn_score"] = released
        shown |= {f"{name}: as published": values for name, values in released.items()}
    title = f"attention of {'the answer' if rows == 'answer' else 'the question'}, {len(samples)} requests of {what}"
    return Findings("attention", numbers, {"attention": figures.attention(shown, changes, title)})


def _published(model: UnifiedModel, samples: Sequence[Sample]) -> list[float]:
    """Mean of ``published_attention`` over requests, whose last words are the question's (no open turn)."""
    scores = []
    for sample in samples:
        asked = attention.request(sample)
        laid = model.lay_out(Sample(asked.id, asked.messages[:-1]))
        scores.append(published_attention(model, laid).cpu().double().numpy())
    return [round(float(v), 6) for v in np.mean(scores, 0)]


def run_similarity(models: Models, samples: Sequence[Sample], what: str) -> Findings:
    """Layer-wise cosine of the same picture read and drawn, and its controls (SynerGen-VL, figure 4)."""
    similarities = {name: layers.similarity(m, samples) for name, m in models.items()}
    numbers = {
        "what": "similarity",
        "data": what,
        "pictures": len(samples),
        "instruction": layers.INSTRUCTION,
        "models": similarities,
    }
    title = f"the same picture read and drawn, {len(samples)} of {what}"
    return Findings("similarity", numbers, {"similarity": figures.similarity(similarities, title)})


def run_locality(models: Models, samples: Sequence[Sample], what: str) -> Findings:
    """How local the attention among a picture's tokens is, read and drawn, and the first picture's maps (figure 5)."""
    localities = {name: layers.locality(m, samples) for name, m in models.items()}
    numbers = {
        "what": "locality",
        "data": what,
        "pictures": len(samples),
        "models": {n: f.to_json() for n, f in localities.items()},
    }
    shown = {
        "locality": figures.locality(localities, f"attention among the tokens of a picture, {len(samples)} of {what}")
    }
    for i, (name, local) in enumerate(localities.items()):
        shown["regions" if not i else "regions-against"] = figures.regions(local, f"{name}: {local.first.caption}")
    return Findings("locality", numbers, shown)


def run_keywords(
    models: Models,
    prompts: Sequence[str],
    words: keywords.Words,
    what: str,
    steps: int = 4,
    seed: int = 0,
    published: bool = False,
) -> Findings:
    """Shares of word classes by step and layer; a base draws the same prompts from the same seeds. ``published`` adds
    the released code's percentages, means over prompts by step, class and layer."""
    results = {name: keywords.keywords(m, prompts, words, steps, seed=seed) for name, m in models.items()}
    numbers: dict[str, Any] = {
        "what": "keywords",
        "data": what,
        "prompts": list(prompts),
        "seed": seed,
        "words": {name: sorted(some) for name, some in words.items()},
        "models": {name: k.to_json() for name, k in results.items()},
    }
    if len(models) == 2:
        ours, base = (k.share.mean((0, 1)) for k in results.values())  # (layers, classes)
        if ours.shape != base.shape:
            raise ValueError(f"cannot compare {len(ours)} layers with the base's {len(base)}")
        classes = next(iter(results.values())).classes
        change = 100 * (ours - base) / base
        numbers["change_percent"] = [
            {"layer": i} | {c: round(float(v), 6) for c, v in zip(classes, row, strict=True)}
            for i, row in enumerate(change)
        ]
    if published:
        numbers["published_share_percent"] = {
            name: _mean_shares([published_shares(m, p, words, steps, seed + i) for i, p in enumerate(prompts)])
            for name, m in models.items()
        }
    title = f"attention to words while drawing, {len(prompts)} prompts"
    return Findings("keywords", numbers, {"keywords": figures.keywords(results, title)})


def run_gates(models: Models, prompts: Sequence[str], what: str, steps: int = 20, seed: int = 0) -> Findings:
    """The gate's size by step and place while prompts are drawn; a base draws the same prompts from the same seeds."""
    results = {name: gates.gates(m, prompts, steps, seed) for name, m in models.items()}
    numbers = {
        "what": "gates",
        "data": what,
        "prompts": list(prompts),
        "seed": seed,
        "models": {name: g.to_json() for name, g in results.items()},
    }
    title = f"where the gate is open while drawing, {len(prompts)} prompts"
    return Findings("gates", numbers, {"gates": figures.gates(results, prompts, title)})


def _mean_shares(prompts: Sequence[Sequence[Mapping[str, Sequence[float]]]]) -> list[dict[str, list[float]]]:
    return [
        {c: [round(float(v), 6) for v in np.mean([shares[c] for shares in step], 0)] for c in step[0]}
        for step in zip(*prompts, strict=True)
    ]


def size(model: UnifiedModel) -> int:
    """The side in pixels of embedded pictures for a model: the shorter side of what it draws."""
    return min(model.canvas(Sample("size", (user("a"), assistant(Image(None, "target"))))))
