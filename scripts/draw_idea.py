"""Draws docs/idea.png, the README's picture: one model answers about a picture, draws from words, and edits.

python scripts/draw_idea.py [MODEL]
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import diptych
from diptych.data import emoji, shapes

INK, PAPER = "#1f2430", "#ffffff"
READ, DRAW = "#2c7fb8", "#d95f0e"


def main() -> None:
    model = diptych.load(sys.argv[1] if len(sys.argv) > 1 else "bagel/tiny", "cpu")
    scene = next(shapes.source("shapes/ask", "test", 64)[3].images()).pixels
    apple = emoji.render(next(e for e in emoji.records() if e.labels["en"] == "red apple"), 64)
    drawn = model.generate("two blue stars", seed=3).images[0]
    pair = model.generate("a red circle left of a green square", seed=1).images[0]
    edited = model.edit(pair, "make the circle blue", seed=0).images[0]

    figure, axes = plt.subplots(figsize=(12, 4.6), dpi=110)
    axes.set(xlim=(0, 120), ylim=(0, 46))
    axes.axis("off")
    rows = [
        (34, scene, "describe the picture", model.ask(scene, "describe the picture").text, None),
        (18, apple, "what is this?", model.ask(apple, "what is this?").text, None),
    ]
    for y, picture, question, answer, _ in rows:
        show(axes, picture, 6, y)
        text(axes, 20, y + 2, question, READ)
        arrow(axes, (32, y), (48, 23 + (y - 26) / 3), READ)
        text(axes, 20, y - 3, f"“{answer}”", INK, weight="bold")
    axes.add_patch(FancyBboxPatch((49, 12), 22, 22, boxstyle="round,pad=1", fc="#f3efe6", ec=INK, lw=1.5))
    text(axes, 60, 29, "one network", INK, size=14, weight="bold", ha="center")
    text(axes, 60, 23.5, "one packed sequence\none softmax over all tokens", INK, size=9.5, ha="center")
    text(axes, 60, 17, "language head   ·   velocity head", INK, size=9.5, ha="center")
    asked = {"two blue stars": drawn, "a red circle left of a green square": pair, "then: make the circle blue": edited}
    for y, (prompt, picture) in zip((36, 21, 6), asked.items()):
        arrow(axes, (72, 23 + (y - 21) / 3), (82, y), DRAW)
        show(axes, picture, 89, y)
        text(axes, 96, y, f"“{prompt}”", DRAW)
    text(axes, 13, 44.5, "it reads", READ, size=14, weight="bold", ha="center")
    text(axes, 100, 44.5, "and it draws", DRAW, size=14, weight="bold", ha="center")
    figure.savefig("docs/idea.png", bbox_inches="tight", facecolor=PAPER)
    print("docs/idea.png")


def show(axes, picture, x: float, y: float, side: float = 12) -> None:
    axes.imshow(
        picture, extent=(x - side / 2, x + side / 2, y - side / 2, y + side / 2), interpolation="lanczos", zorder=2
    )
    axes.add_patch(plt.Rectangle((x - side / 2, y - side / 2), side, side, fill=False, ec="#c9c9c9", lw=1, zorder=3))
    axes.set(xlim=(0, 120), ylim=(0, 46), aspect="equal")


def text(
    axes, x: float, y: float, words: str, colour: str, size: float = 10.5, weight: str = "normal", ha: str = "left"
) -> None:
    axes.text(x, y, words, color=colour, fontsize=size, fontweight=weight, ha=ha, va="center", wrap=False)


def arrow(axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=colour, lw=1.8))


if __name__ == "__main__":
    main()
