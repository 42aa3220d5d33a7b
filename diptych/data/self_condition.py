"""Pictures without words, and how they are drawn from themselves (IOMM, arXiv 2603.16139, 3.2 and 3.4)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diptych.core.sample import Image, Sample, assistant, user
from diptych.data.mixture import Source

PICTURES = "/pictures"  # NAME/pictures is what NAME draws, without words


def bare(sample: Sample) -> Sample:
    """What a sample draws last, and nothing else. Raises ``ValueError`` where it draws nothing."""
    drawn = [image for image in sample.images() if image.role == "target"]
    if not drawn:
        raise ValueError(f"sample {sample.id!r} draws no picture")
    return replace(sample, messages=(assistant(drawn[-1]),))


@dataclass(frozen=True, eq=False)
class UnlabelledPictures:
    """The pictures that a data set draws, without words: unlabelled images."""

    source: Source

    @property
    def name(self) -> str:
        return self.source.name + PICTURES

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Sample:
        return bare(self.source[index])


@dataclass(frozen=True, eq=False)
class SelfConditioned:
    """A data set whose pictures without words are drawn from themselves: each is also read, with a share ``masked`` of
    its tokens blank, beside the words ``prompt`` (none: the family has words of its own). Other samples stay."""

    source: Source
    masked: float
    prompt: str = ""

    @property
    def name(self) -> str:
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
