"""Draws docs/idea.png, the README's picture: one model answers about a picture, draws from words, and edits.

python scripts/draw_idea.py [MODEL]
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import diptych
from diptych.data.worlds import emoji, shapes_sources

INK, PAPER = "#1f2430", "#ffffff"
READ, DRAW = "#2c7fb8", "#d95f0e"


def main() -> None:
    model = diptych.load(sys.argv[1] if len(sys.argv) > 1 else "bagel/tiny", "cpu")
    scene = next(shapes_sources.source("shapes/ask", "test", 64)[3].images()).pixels
    apple = emoji.render(next(e for e in emoji.records() if e.labels["en"] == "red apple"), 64)
    drawn = model.generate("two blue stars", seed=0).images[0]
    pair = model.generate("a red circle left of a green square", seed=0).images[0]
    edited = model.edit(pair, "make the circle blue", seed=0).images[0]

    figure, axes = plt.subplots(figsize=(13, 4.4), dpi=110)
    axes.axis("off")
    rows = [
        (34, scene, "describe the picture", model.ask(scene, "describe the picture").text, None),
        (18, apple, "what is this?", model.ask(apple, "what is this?").text, None),
    ]
    for y, picture, question, answer, _ in rows:
        show(axes, picture, 6, y)
        text(axes, 14, y + 2.5, question, READ)
        text(axes, 14, y - 2.5, f"“{answer}”", INK, size=9.5, weight="bold")
        arrow(axes, (50, y), (54, 23 + (y - 26) / 3), READ)
    axes.add_patch(FancyBboxPatch((55.5, 12), 29, 22, boxstyle="round,pad=1", fc="#f3efe6", ec=INK, lw=1.5))
    text(axes, 70, 29, "one network", INK, size=14, weight="bold", ha="center")
    text(axes, 70, 23, "one packed sequence\none softmax over all tokens", INK, size=9.5, ha="center")
    text(axes, 70, 16.5, "language head  ·  velocity head", INK, size=8.5, ha="center")
    asked = {"two blue stars": drawn, "a red circle left of a green square": pair, "then: make the circle blue": edited}
    for y, (prompt, picture) in zip((36, 22, 8), asked.items(), strict=True):
        arrow(axes, (86.5, 23 + (y - 22) / 3), (91, y), DRAW)
        show(axes, picture, 98, y)
        text(axes, 105.5, y, f"“{prompt}”", DRAW)
    text(axes, 0, 46, "it reads", READ, size=14, weight="bold")
    text(axes, 92, 46, "and it draws", DRAW, size=14, weight="bold")
    figure.savefig("docs/idea.png", bbox_inches="tight", facecolor=PAPER)
    print("docs/idea.png")


def show(axes, picture, x: float, y: float, side: float = 12) -> None:
    axes.imshow(
        picture, extent=(x - side / 2, x + side / 2, y - side / 2, y + side / 2), interpolation="lanczos", zorder=2
    )
    axes.add_patch(plt.Rectangle((x - side / 2, y - side / 2), side, side, fill=False, ec="#c9c9c9", lw=1, zorder=3))
    axes.set(xlim=(-1, 142), ylim=(1, 48), aspect="equal")


def text(
    axes, x: float, y: float, words: str, colour: str, size: float = 10.5, weight: str = "normal", ha: str = "left"
) -> None:
    axes.text(x, y, words, color=colour, fontsize=size, fontweight=weight, ha=ha, va="center", wrap=False)


def arrow(axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=colour, lw=1.8))


if __name__ == "__main__":
    main()
