"""The figures of a comparison: differences with their intervals, by task and by category, and the paper's radar."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from llm2clip_eval.comparison import CandidateComparison, Comparison, TaskDifference
from llm2clip_eval.comparison_tables import macro_verdict, number, shorten, signed
from llm2clip_eval.figures import PALETTE, STYLE, VERDICT_COLOURS, save

WIDTH = 3.75
"""Inches; 360 px, the width of a phone, so that letters are as large there as the page's own."""
ROW = 0.43
"""Inches per row: a line of text and its interval below."""
COLOURS = {**VERDICT_COLOURS, "equivalent": "#009E73"}
BASELINE_COLOUR = "#666666"
RADAR = 2.15
"""Inches across."""
RADAR_LABEL = 0.72
"""Inches above and below."""
MAX_CATEGORIES = 40
"""Rows of a figure of categories; the table has all."""


@dataclass(frozen=True)
class Line:
    """A difference and its interval, as one row of a figure."""

    name: str
    difference: float
    low: float
    high: float
    colour: str
    marker: str = "o"
    is_filled: bool = True
    margin: float = 0.0


@dataclass(frozen=True)
class Figures:
    """Data URIs, and the colour of every model."""

    forests: list[str]
    """One per candidate."""
    radar: str | None
    """None if fewer than three tasks are common to all."""
    categories: dict[tuple[str, str], str]
    """By candidate's name and task."""
    colours: dict[str, str]
    """By model's name."""


def draw_all(comparison: Comparison, directory: Path) -> Figures:
    """Draw every figure and write it below `directory` as SVG."""
    directory.mkdir(exist_ok=True)
    colours = model_colours(comparison)
    forests, categories, radar = [], {}, None
    with matplotlib.rc_context({**STYLE, "font.size": 11.5}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # text stays text: the reader's fonts draw it
        for place, candidate in enumerate(comparison.candidates):
            forest = draw_forest(candidate, comparison.baseline_label)
            forests.append(save(forest, directory / f"differences-{place}.svg"))
            for row, task in enumerate(candidate.tasks):
                if len(task.categories) > 1:
                    path = directory / f"categories-{place}-{row}.svg"
                    categories[candidate.name, task.task] = save(draw_categories(task), path)
        if len(common_tasks(comparison)) >= 3:
            radar = save(draw_radar(comparison, colours), directory / "radar.svg")
    return Figures(forests, radar, categories, colours)


def model_colours(comparison: Comparison) -> dict[str, str]:
    """Grey for the baseline, then the palette's."""
    names = [candidate.name for candidate in comparison.candidates]
    palette = [colour for colour in PALETTE if colour not in ("#8C8C8C", "#444444")]
    return {comparison.baseline: BASELINE_COLOUR} | {
        name: palette[number % len(palette)] for number, name in enumerate(names)
    }


def draw_forest(candidate: CandidateComparison, baseline_label: str) -> Figure:
    """Differences of one candidate, one panel per unit; the average a diamond, judged tasks hollow."""
    panels: dict[bool, list[Line]] = {}
    for task in sorted(candidate.tasks, key=lambda task: task.judge is not None):
        panels.setdefault(beyond_percent(task), []).append(_task_line(task))
    if macro := candidate.macro:
        colour, name = COLOURS[macro_verdict(macro)], f"macro average of {macro.num_tasks} tasks"
        line = Line(name, macro.difference, macro.low, macro.high, colour, marker="D")
        lines = panels.setdefault(False, [])
        lines.insert(sum(line.is_filled for line in lines), line)
    heights = [0.6 + ROW * len(lines) for _, lines in sorted(panels.items())]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.35), layout="constrained")
    panels_of = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, (is_beyond, lines) in zip(panels_of, sorted(panels.items()), strict=True):
        _draw_lines(axes, lines)
        axes.set_xlabel("points of the task's own scale" if is_beyond else "points")
    title = textwrap.fill(f"{candidate.label} minus {baseline_label}", 36)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    return figure


def beyond_percent(task: TaskDifference) -> bool:
    """Whether scores are of hundreds and thousands (MME), so that one axis cannot show them beside percent."""
    return max(task.baseline, task.candidate) > 100


def _task_line(task: TaskDifference) -> Line:
    return Line(
        name=task.task,
        difference=task.difference,
        low=task.low,
        high=task.high,
        colour=COLOURS[task.verdict],
        is_filled=task.judge is None,
        margin=task.margin,
    )


def draw_categories(task: TaskDifference) -> Figure:
    """Differences of a task's categories, the largest ones if there are very many."""
    by_size = sorted(task.categories, key=lambda category: -category.num_items)[:MAX_CATEGORIES]
    lines = [
        Line(
            name=f"{category.name} ({category.num_items})",
            difference=category.difference,
            low=category.low,
            high=category.high,
            colour=COLOURS["better" if category.low > 0 else "worse" if category.high < 0 else "undecided"],
        )
        for category in task.categories
        if category in by_size
    ]
    figure = Figure(figsize=(WIDTH, 0.6 + ROW * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    _draw_lines(axes, lines)
    axes.set_xlabel("points")
    return figure


def _draw_lines(axes: Axes, lines: Sequence[Line]) -> None:
    """Each row's name and numbers in a line of text, below it the interval, so that both have the whole width."""
    for row, line in enumerate(lines):
        axes.plot([0, 0], [row - 0.14, row + 0.22], color="#333333", lw=0.9, zorder=1.9)  # not through the text
        if row and lines[row - 1].is_filled and not line.is_filled:
            axes.axhline(row - 0.62, color="#c8c8c8", lw=0.8)
        if line.margin:
            axes.fill_between([-line.margin, line.margin], row - 0.12, row + 0.2, color="#d9dde2", lw=0)
        axes.plot([line.low, line.high], [row + 0.04] * 2, color=line.colour, lw=2.4, solid_capstyle="round")
        face = line.colour if line.is_filled else "white"
        axes.plot(line.difference, row + 0.04, line.marker, mfc=face, mec=line.colour, mew=1.6, ms=6.5)
        across = axes.get_yaxis_transform()
        weight = "bold" if line.marker == "D" else "normal"
        axes.text(0, row - 0.36, shorten(line.name, 34), transform=across, va="center", fontweight=weight)
        axes.text(1, row - 0.36, signed(line.difference), transform=across, va="center", ha="right", color="#333333")
    axes.grid(axis="x", color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
    axes.set(ylim=(len(lines) - 0.6, -0.7))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def common_tasks(comparison: Comparison) -> list[tuple[TaskDifference, ...]]:
    """The tasks without a judge that every candidate has: for each, its differences in the order of candidates."""
    by_name = [{t.task: t for t in candidate.tasks if t.judge is None} for candidate in comparison.candidates]
    if not by_name:
        return []
    return [tuple(tasks[name] for tasks in by_name) for name in by_name[0] if all(name in tasks for tasks in by_name)]


def radar_span(tasks: Sequence[TaskDifference]) -> tuple[float, float]:
    """Scores at the centre and at the rim of a task's axis.

    The best model is at the rim. The worst is at 40 % of the radius or further out: where the models differ by less
    than the test can detect, that much is what separates rim and 40 %, so that noise does not fill the picture.
    """
    scores = [tasks[0].baseline, *(task.candidate for task in tasks)]
    best = max(scores)
    noise = max((task.mde for task in tasks if math.isfinite(task.mde)), default=0.0)
    span = max(best - min(scores), noise) / 0.6
    return best - (span or 1.0), best


def radar_axes(comparison: Comparison) -> list[tuple[str, float, float]]:
    """The radar's axes: task, score at the centre, score at the rim."""
    return [(of_task[0].task, *radar_span(of_task)) for of_task in common_tasks(comparison)]


def draw_radar(comparison: Comparison, colours: dict[str, str]) -> Figure:
    """One polygon per model over the tasks that all have; every axis with a scale of its own."""
    tasks = common_tasks(comparison)
    angles = 2 * np.pi * np.arange(len(tasks)) / len(tasks)
    legend = 0.21 * len(colours) + 0.1
    height = RADAR + 2 * RADAR_LABEL + legend
    figure = Figure(figsize=(WIDTH, height))
    where = ((WIDTH - RADAR) / 2 / WIDTH, RADAR_LABEL / height, RADAR / WIDTH, RADAR / height)
    axes: Any = figure.add_axes(where, projection="polar")
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    spans = [radar_span(of_task) for of_task in tasks]
    labels = [comparison.baseline_label, *(candidate.label for candidate in comparison.candidates)]
    handles: list[Any] = []
    for model, (colour, label) in enumerate(zip(colours.values(), labels, strict=True)):
        scores = [of_task[model - 1].candidate if model else of_task[0].baseline for of_task in tasks]
        radii = [(score - centre) / (rim - centre) for score, (centre, rim) in zip(scores, spans, strict=True)]
        style = {"color": colour, "lw": 1.8, "ls": "-" if model else "--"}
        axes.plot([*angles, angles[0]], [*radii, radii[0]], marker="o", ms=3.5, zorder=3 if model else 4, **style)
        axes.fill(angles, radii, color=colour, alpha=0.1 if model else 0.05, lw=0)
        handles.append(Line2D([], [], label=shorten(label, 38), **style))
    for angle, of_task, (_, rim) in zip(angles, tasks, spans, strict=True):
        across, up = np.sin(angle), np.cos(angle)
        align = "center" if abs(across) < 0.1 else "left" if across > 0 else "right"
        rise = "bottom" if up > 0.5 else "top" if up < -0.5 else "center"
        text = "\n".join([*_narrow(of_task[0].task), number(rim)])
        axes.text(angle, 1.08, text, ha=align, va=rise, fontsize=10, linespacing=1.05)
    axes.set(ylim=(0, 1.04), yticklabels=[], xticklabels=[])
    axes.set_yticks([0.4, 0.7, 1.0])
    axes.set_xticks(angles)
    axes.grid(color="#dcdfe3", lw=0.7)
    axes.spines["polar"].set_visible(False)
    figure.legend(handles=handles, loc="upper left", frameon=False, fontsize=10.5, borderaxespad=0)
    return figure


def _narrow(name: str) -> list[str]:
    """A name in at most three short lines, broken at underscores where it has some."""
    words = name.replace("_", "_ ")
    return [line.replace("_ ", "_") for line in textwrap.wrap(words, 11, max_lines=3, placeholder="…")]
