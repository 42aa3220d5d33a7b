"""The sizes of pictures that a model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diptych.core.sample import Image, Sample


@dataclass(frozen=True)
class Sizes:
    """Sizes in pixels. A request for another canvas is refused; pictures to read are reduced to ``read``.

    ``default``   (width, height) that is drawn where a request does not say a size
    ``stride``    sides of a canvas are multiples of this
    ``shortest``  least side of a canvas
    ``longest``   greatest side of a canvas
    ``read``      the greatest side at which a picture is read: larger ones are resized
    ``aspect``    the greatest ratio of long to short side of pictures that are read or edited; beyond it ``remarks``
    ``pixels``    the greatest area of a canvas, where there is one
    """

    default: tuple[int, int]
    stride: int
    shortest: int
    longest: int
    read: int
    aspect: float = 2.0
    pixels: int | None = None

    def allow(self, width: int, height: int) -> bool:
        """Whether a canvas of this size can be drawn as trained."""
        sides = all(s % self.stride == 0 and self.shortest <= s <= self.longest for s in (width, height))
        return sides and width * height <= (self.pixels or width * height)

    def check(self, width: int, height: int) -> None:
        """Raises ``ValueError``, with the sizes that there are, for a canvas that the model was not trained on."""
        if not self.allow(width, height):
            raise ValueError(f"size must be {self}, not {width}x{height}")

    def remarks(self, sample: Sample) -> list[str]:
        """One line for every picture of a request whose aspect ratio the model was not trained on."""
        pictures = [part for part in sample.images() if not part.blank]
        return [self._remark(*picture.dimensions) for picture in pictures if self._long(picture)]

    def _long(self, picture: Image) -> bool:
        return max(picture.dimensions) > self.aspect * min(picture.dimensions)

    def _remark(self, width: int, height: int) -> str:
        return (
            f"a picture of {width}x{height} pixels has an aspect ratio above {self.aspect:g}, "
            "on which the model was not trained; crop it for a better result"
        )

    def to_json(self) -> dict:
        """The fields as JSON has them, for lists of models."""
        return {**asdict(self), "default": list(self.default)}

    @property
    def range(self) -> str:
        """The canvases that the model draws, in words."""
        if self.shortest == self.longest:
            return f"{self.longest}x{self.longest}"
        area = f" and at most {self.pixels} pixels" if self.pixels else ""
        return f"multiples of {self.stride} from {self.shortest} to {self.longest}{area}"

    def __str__(self) -> str:
        return f"{self.range}, which the model was trained on"


def parse_size(size: int | str | Sequence[int]) -> tuple[int, int]:
    """(width, height) of 64, "64", "64x48" or (64, 48). Raises ``ValueError`` for anything else."""
    sides: Any = str(size).lower().split("x") if isinstance(size, str | int) else size
    try:
        width, height = (int(side) for side in (sides * 2 if len(sides) == 1 else sides))
    except (TypeError, ValueError) as error:
        raise ValueError(f"size must be WIDTHxHEIGHT, one number or (width, height), not {size!r}") from error
    return width, height
