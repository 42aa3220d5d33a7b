"""Image-only training data: unlabelled pictures, and self-conditioning on them (IOMM, arXiv 2603.16139, sections 3.2
and 3.4)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diptych.core.sample import Image, Sample, assistant, user
from diptych.data.mixture import Source

PICTURES = "/pictures"  # NAME/pictures: the target pictures of NAME, without text


def bare(sample: Sample) -> Sample:
    """The sample reduced to its last target picture. Raises ``ValueError`` where it has none."""
    drawn = [image for image in sample.images() if image.role == "target"]
    if not drawn:
        raise ValueError(f"sample {sample.id!r} draws no picture")
    return replace(sample, messages=(assistant(drawn[-1]),))


@dataclass(frozen=True, eq=False)
class UnlabelledPictures:
    """The target pictures of a data set, without text."""

    source: Source

    @property
    def name(self) -> str:
        """The name of the data set, followed by ``/pictures``."""
        return self.source.name + PICTURES

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Sample:
        return bare(self.source[index])


@dataclass(frozen=True, eq=False)
class SelfConditioned:
    """A data set whose unlabelled pictures are conditioned on themselves: the model reads the picture, a share
    ``masked`` of its tokens blank, and the text ``prompt`` (empty: the family's own), and generates it. Samples with
    text are unchanged."""

    source: Source
    masked: float
    prompt: str = ""

    @property
    def name(self) -> str:
        """The name of the data set."""
        return self.source.name

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Sample:
        sample = self.source[index]
        if not (alone(sample) or sample.info.get("self")):
            return sample
        drawn = sample.messages[-1].parts[-1]
        assert isinstance(drawn, Image)
        read = drawn
        if len(sample.messages) > 1:  # encoded beforehand: what was read may carry more than what is drawn
            read = next(p for p in sample.messages[0].parts if isinstance(p, Image))
        asked = user(*([self.prompt] if self.prompt else []), replace(read, role="understand", masked=self.masked))
        return replace(sample, messages=(asked, assistant(drawn)), info={**sample.info, "self": True})


def alone(sample: Sample) -> bool:
    """Whether a sample is a picture to draw and nothing else."""
    parts = [p for m in sample.messages for p in m.parts]
    return len(parts) == 1 and isinstance(parts[0], Image) and parts[0].role == "target"
