"""Several pictures as one, with their labels."""

from __future__ import annotations

from collections.abc import Sequence

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

Font = PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont
RIGHT, WRONG, PLAIN = (30, 142, 80), (206, 58, 58), (205, 208, 214)
SIDE, GAP, FRAME, LINE = 128, 14, 3, 15  # pixels: a picture, between pictures, its frame, a line of text
LINES = 4  # of a caption at most


def grid(
    images: Sequence[PIL.Image.Image],
    captions: Sequence[str],
    columns: int = 6,
    verdicts: Sequence[bool | None] | None = None,
) -> PIL.Image.Image:
    """A contact sheet: pictures at about 128 pixels, captions below, framed green where right and red where wrong."""
    verdicts = [None] * len(images) if verdicts is None else verdicts
    if not len(images) == len(captions) == len(verdicts):
        raise ValueError(f"a grid of {len(images)} pictures, {len(captions)} captions and {len(verdicts)} verdicts")
    if not images or columns < 1:
        raise ValueError(f"a grid needs a picture and a column, not {len(images)} and {columns}")
    columns = min(columns, len(images))
    font = PIL.ImageFont.load_default(12)
    texts = [_caption_lines(caption, font) for caption in captions]
    rows = [range(i, min(i + columns, len(images))) for i in range(0, len(images), columns)]
    heights = [SIDE + 2 * FRAME + 4 + LINE * max(len(texts[i]) for i in row) + GAP for row in rows]
    cell = SIDE + 2 * FRAME + GAP
    sheet = PIL.Image.new("RGB", (columns * cell + GAP, sum(heights) + GAP), "white")
    pen = PIL.ImageDraw.Draw(sheet)
    y = GAP
    for row, height in zip(rows, heights, strict=True):
        for i in row:
            x = GAP + (i - row.start) * cell
            colour = PLAIN if verdicts[i] is None else RIGHT if verdicts[i] else WRONG
            outer = SIDE + 2 * FRAME
            pen.rectangle((x, y, x + outer - 1, y + outer - 1), "white", colour, FRAME)
            picture = enlarge(images[i], SIDE)
            left, top = (SIDE - picture.width) // 2, (SIDE - picture.height) // 2
            sheet.paste(picture, (x + FRAME + left, y + FRAME + top))
            for n, line in enumerate(texts[i]):
                pen.text((x + 1, y + outer + 4 + n * LINE), line, (45, 48, 56), font)
        y += height
    return sheet


def enlarge(image: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """The RGB picture with its longer side at ``side``: whole pixels where that fits exactly, else bicubic."""
    image, longest = image.convert("RGB"), max(image.size)
    size = (max(1, round(image.width * side / longest)), max(1, round(image.height * side / longest)))
    exact = side >= longest and side % longest == 0
    return image.resize(size, PIL.Image.Resampling.NEAREST if exact else PIL.Image.Resampling.BICUBIC)


def _caption_lines(text: str, font: Font) -> list[str]:
    lines = wrap(" ".join(text.split()), font, SIDE)
    return lines if len(lines) <= LINES else [*lines[: LINES - 1], clip(f"{lines[LINES - 1]} …", font, SIDE)]


def wrap(text: str, font: Font, width: int) -> list[str]:
    """The text in lines of at most ``width`` pixels, broken at its line breaks, at spaces, and inside longer words."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            while font.getlength(word) > width:  # a word longer than a line
                cut = next(i for i in range(len(word), 0, -1) if i == 1 or font.getlength(word[:i]) <= width)
                lines += [line] if line else []
                lines.append(word[:cut])
                line, word = "", word[cut:]
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines


def clip(text: str, font: Font, width: int) -> str:
    """The text cut to ``width`` pixels, with an ellipsis where something was cut."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[: -max(1, len(text) // 50)]
    return text + "…"


def contact_sheet(images: list[PIL.Image.Image], columns: int, scale: int = 2, gap: int = 4) -> PIL.Image.Image:
    """The pictures side by side, ``columns`` to a line, enlarged by ``scale``."""
    width, height = (max(sides) * scale for sides in zip(*(i.size for i in images), strict=True))
    rows = -(-len(images) // columns)
    sheet = PIL.Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), (229, 229, 229))
    for i, image in enumerate(images):
        at = (gap + i % columns * (width + gap), gap + i // columns * (height + gap))
        sheet.paste(image.resize((image.width * scale, image.height * scale), PIL.Image.Resampling.NEAREST), at)
    return sheet
