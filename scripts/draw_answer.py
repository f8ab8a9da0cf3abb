"""Ask a demo model about a picture of our own drawing, and draw question and answer beside it (README's picture).

    python scripts/draw_answer.py --model runs/demo/llava/export-llm2clip/seed-0/model --output docs/llava_answer.png

The demo's own pictures are made of drawings that belong to others, so they are not in this repository.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from llm2clip_eval.answerer import Answerer

SIZE, CELL = 96, 32
"""Of a demo scene: three by three cells."""
SCENES = (
    {(0, 1): "sun", (2, 0): "house"},
    {(0, 0): "sun", (1, 2): "tree", (2, 0): "house"},
    {(0, 2): "sun", (1, 0): "tree", (2, 1): "tree", (2, 2): "house"},
)
QUESTIONS = ("How many things are in the picture?", "Are there more than 2 things in the picture?")
ZOOM = 3


def draw_thing(draw: ImageDraw.ImageDraw, name: str, left: int, top: int) -> None:
    """One thing of a few plain shapes, in a cell."""
    x, y, end = left + 4, top + 4, CELL - 9
    if name == "sun":
        draw.ellipse((x + 2, y + 2, x + end - 2, y + end - 2), fill="#fcc21b", outline="#f79329", width=2)
    elif name == "house":
        draw.rectangle((x + 3, y + 11, x + end - 3, y + end), fill="#e59600", outline="#784719")
        draw.polygon([(x, y + 12), (x + end // 2, y), (x + end, y + 12)], fill="#c33c2e")
        draw.rectangle((x + 9, y + 15, x + 14, y + end), fill="#543930")
    else:
        draw.rectangle((x + 9, y + 14, x + 14, y + end), fill="#784719")
        draw.polygon([(x + 1, y + 16), (x + end // 2, y), (x + end - 1, y + 16)], fill="#3b9e3f")


def scene(things: dict[tuple[int, int], str]) -> Image.Image:
    """A picture of things by (row, column)."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    draw = ImageDraw.Draw(image)
    for (row, column), name in things.items():
        draw_thing(draw, name, CELL * column, CELL * row)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    from matplotlib import pyplot

    pictures = [scene(things) for things in SCENES]
    answerer = Answerer(args.model, dtype="float32", batch_size=len(SCENES), max_new_tokens=8)
    answers = [
        answerer.answer(
            [question] * len(pictures), list(range(len(pictures))), lambda place: pictures[place], question
        )
        for question in QUESTIONS
    ]
    figure, axes = pyplot.subplots(1, len(pictures), figsize=(9, 4))
    for place, (axis, picture) in enumerate(zip(axes, pictures, strict=True)):
        axis.imshow(picture.resize((ZOOM * SIZE, ZOOM * SIZE), Image.Resampling.LANCZOS))
        axis.set_xticks([])
        axis.set_yticks([])
        said = [f"{question}\n{given[place]}" for question, given in zip(QUESTIONS, answers, strict=True)]
        axis.set_xlabel("\n\n".join(said), fontsize=9)
        print([given[place] for given in answers])
    figure.tight_layout()
    figure.savefig(args.output, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
