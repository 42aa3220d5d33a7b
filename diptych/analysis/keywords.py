"""What a picture attends to in its prompt while it is drawn: attention mass on each class of words, by layer and step
(the keyword analysis of SGT, arXiv 2605.18714).

Queries are the tokens of the drawn picture without its markers. Keys are everything that they see: the prompt and the
picture itself. For each chosen step and layer, these are means over heads and queries:

- ``mass``: the mass on each class of words, on markers and on the picture; these sum to 1
- ``share``: mass on a class over mass on all text tokens of the prompt, in percent; the classes sum to 100. ``even`` is
  the share of the class among those tokens, which it would have if all of them got the same mass.

Only the branch with the full prompt is measured, not the other branches of guidance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch

from diptych.analysis import collect
from diptych.core.layout import Segment
from diptych.core.sample import Image, Sample, Text, assistant, user
from diptych.core.tensors import NONE
from diptych.models.protocol import Drawing, UnifiedModel

OTHER = "other"
Words = Mapping[str, frozenset[str]]  # class -> its words, lowercase


def shapes_words() -> dict[str, frozenset[str]]:
    """The classes of the shapes world's vocabulary: object, colour, position (numbers and articles are ``other``)."""
    from diptych.data.worlds import shapes

    nouns = {*shapes.SHAPES, "object"}
    return {
        "object": frozenset(nouns | {shapes.plural(n) for n in nouns}),
        "colour": frozenset(shapes.COLOURS),
        "position": frozenset(word for relation in shapes.RELATIONS for word in relation.split()),
    }


def parse_words(items: Sequence[str]) -> dict[str, frozenset[str]]:
    """The classes of words written as ``CLASS=WORD,WORD``. Raises ``ValueError`` for an item of another form."""
    parts = [item.partition("=") for item in items]
    if wrong := [item for item, (name, _, words) in zip(items, parts, strict=True) if not (name and words)]:
        raise ValueError(f"--words takes CLASS=WORD,WORD, not {', '.join(map(repr, wrong))}")
    return {name: frozenset(words.lower().split(",")) for name, _, words in parts}


def shapes_prompts(n: int, seed: int = 0) -> list[str]:
    """``n`` prompts of the shapes world that name two coloured shapes and how they stand."""
    from diptych.data.worlds import shapes

    return [p.text for p in shapes.prompts("position", n, seed, held_out=True)]


@dataclass(frozen=True, eq=False)
class Keywords:
    """``mass`` is (prompts, steps, layers, classes + 2): the classes in order, then markers, then the picture itself.

    ``counts`` is (prompts, classes), the number of tokens of each class. ``steps`` are numbered from 0; ``times`` are
    their t where the family draws by flow matching (1 is noise), else None.
    """

    classes: tuple[str, ...]
    mass: np.ndarray
    counts: np.ndarray
    steps: tuple[int, ...]
    times: tuple[float | None, ...]

    @property
    def share(self) -> np.ndarray:
        """(prompts, steps, layers, classes) in percent."""
        words = self.mass[..., : len(self.classes)]
        return 100 * words / words.sum(-1, keepdims=True)

    @property
    def even(self) -> np.ndarray:
        """(classes,) percent of the prompts' word tokens."""
        return 100 * (self.counts / self.counts.sum(1, keepdims=True)).mean(0)

    def to_json(self) -> dict[str, Any]:
        """Means over prompts, by step and layer."""
        names = (*self.classes, "markers", "picture")
        mass, share = self.mass.mean(0), self.share.mean(0)
        return {
            "classes": list(self.classes),
            "even_percent": _named(self.classes, self.even),
            "share_percent": _named(self.classes, share.mean((0, 1))),
            "steps": [
                {
                    "step": step,
                    "t": t,
                    "layers": [
                        {"layer": i}
                        | {"mass": _named(names, mass[s, i]), "share_percent": _named(self.classes, share[s, i])}
                        for i in range(mass.shape[1])
                    ],
                }
                for s, (step, t) in enumerate(zip(self.steps, self.times, strict=True))
            ],
        }


def _named(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return {name: round(float(v), 6) for name, v in zip(names, values, strict=True)}


def keywords(
    model: UnifiedModel,
    prompts: Sequence[str],
    words: Words,
    steps: int = 4,
    settings: Any = None,
    seed: int = 0,
) -> Keywords:
    """Draws each prompt once, from seed + its number, and measures ``steps`` steps spread evenly from first to last.

    ``settings`` are the family's own (default: the model's). Raises ``ValueError`` when no prompt has a word of some
    class, and as ``collect.step`` and ``collect.places`` do.
    """
    if not prompts:
        raise ValueError("no prompts to draw")
    if OTHER in words:
        raise ValueError(f"{OTHER!r} is what no class names; it cannot be a class")
    settings = settings or model.settings
    measured = [_measure(model, p, words, steps, settings, seed + i) for i, p in enumerate(prompts)]
    counts = np.stack([c for _, c, _, _ in measured])
    _, _, chosen, times = measured[0]
    if empty := [name for name, n in zip(words, counts.sum(0), strict=False) if not n]:
        raise ValueError(f"no prompt has a word of class {', '.join(empty)}; they have {_all_words(prompts)}")
    return Keywords((*words, OTHER), np.stack([mass for mass, *_ in measured]), counts, chosen, times)


def classify(model: UnifiedModel, sample: Sample, words: Words) -> tuple[torch.Tensor, list[tuple[str, str]]]:
    """((context tokens,) class number of each token, [(word, class)] of the prompt); markers have the number after
    ``other``."""
    sequence = model.lay_out(sample)
    p = collect.places(model, sample, sequence)
    names = [*words, OTHER]
    number = torch.full((len(sequence),), len(names))
    texts = [part.text for m in sample.messages for part in m.parts if isinstance(part, Text)]
    labelled = []
    for text, at in zip(texts, p.texts, strict=True):
        for word, tokens in collect.words(model, text, at):
            name = next((n for n in words if word in words[n]), OTHER)
            number[list(tokens)] = names.index(name)
            labelled.append((word, name))
    return number, labelled


def _measure(
    model: UnifiedModel, prompt: str, words: Words, steps: int, settings: Any, seed: int
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...], tuple[float | None, ...]]:
    """(mass, counts, steps, times) of one prompt; the arrays are those of ``Keywords`` without their first axis."""
    sample = Sample("prompt", (user(prompt), assistant(Image(None, "target"))))
    drawing = begin(model, sample, settings, seed)
    chosen = spread(drawing.steps, steps)
    number, _ = classify(model, sample, words)
    groups = torch.nn.functional.one_hot(number, len(words) + 2).float().to(model.device)  # the last: markers
    rows = torch.tensor([i for i, id in enumerate(drawn_segment(model, drawing.canvas).ids) if id == NONE])
    masses = []
    while not drawing.done:
        layers: list[torch.Tensor] = []

        def see(layer: int, call: collect.AttentionCall, layers: list[torch.Tensor] = layers) -> None:
            queries = rows if call.q.shape[-2] > int(rows[-1]) else torch.arange(call.q.shape[-2])
            on_prompt = call.weights(0, queries.to(call.q.device)).mean((0, 1))[: len(groups)] @ groups
            layers.append(torch.cat([on_prompt, 1 - on_prompt.sum(0, keepdim=True)]))

        if drawing.step in chosen:
            drawing = collect.step(model, drawing, see)
            masses.append(torch.stack(layers).cpu())
        else:
            [drawing] = model.step([drawing])
    counts = torch.bincount(number, minlength=len(words) + 2)[:-1]
    return torch.stack(masses).double().numpy(), counts.numpy(), tuple(chosen), _times(drawing, chosen)


def spread(total: int, n: int) -> list[int]:
    """``n`` of ``total`` steps, evenly from the first to the last. Raises ``ValueError`` where there are fewer."""
    if not 1 <= n <= total:
        raise ValueError(f"cannot look at {n} of {total} steps")
    return [round(i) for i in np.linspace(0, total - 1, n)]


def _times(drawing: Drawing, chosen: Sequence[int]) -> tuple[float | None, ...]:
    return tuple(None if drawing.times is None else round(float(drawing.times[i]), 6) for i in chosen)


def begin(model: UnifiedModel, sample: Sample, settings: Any, seed: int) -> Any:
    """The drawing of a request after prefill. Raises ``ValueError`` for a prompt without tokens."""
    sequences = [model.lay_out(sample, drop) for drop in model.branches(sample, settings)]
    if not len(sequences[0]):
        raise ValueError(f"sample {sample.id!r} has no words to attend to")
    contexts = [model.extend([model.open()], [s])[0] if len(s) else model.open() for s in sequences]
    return model.start([tuple(contexts)], [sample], [settings], [seed])[0]


def drawn_segment(model: UnifiedModel, canvas: tuple[int, int]) -> Segment:
    """The segment of a picture of (height, width) that is drawn: its ids tell picture tokens (``NONE``) from markers.

    Raises ``ValueError`` for a family that lays out no such segment."""
    blank = Image(PIL.Image.new("RGB", (canvas[1], canvas[0])), "target")
    laid = model.lay_out(Sample("blank", (user("1"), assistant(blank))))
    noised = [s for s in laid.segments if s.generated]
    if len(noised) != 1 or not noised[0].open:
        raise ValueError(f"family {model.family!r} draws outside its sequence, so it does not attend to its prompt")
    return noised[0]


def _all_words(prompts: Sequence[str]) -> str:
    return ", ".join(sorted({w for p in prompts for w in p.lower().split()})[:20])
