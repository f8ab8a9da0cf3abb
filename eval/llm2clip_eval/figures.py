"""The report's figures, drawn with matplotlib as SVG: narrow enough to be read on a phone."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from llm2clip.run_dir import atomic_write

WIDTH = 4.3
"""Inches; about 410 px in a browser, scaled to three quarters on a phone."""
PALETTE = ("#0072B2", "#E69F00", "#8C8C8C", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#444444")
"""Okabe & Ito 2008: told apart with any kind of colour vision."""
VERDICT_COLOURS = {"better": "#0072B2", "worse": "#D55E00", "undecided": "#8C8C8C"}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text: any script, any resolution
    "svg.hashsalt": "llm2clip",  # same input, same file
    "text.parse_math": False,  # a $ in a name is a $
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9a9a9a",
    "axes.labelcolor": "#333333",
    "xtick.color": "#555555",
    "ytick.color": "#333333",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}


def draw_all(report: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Draw every figure, write it below `directory` as SVG, and return them as data URIs.

    Returns:
        `headline` and `loss` (None where there is nothing to draw), `forests`, one per comparison, and `colours`, by
        arm label.
    """
    directory.mkdir(exist_ok=True)
    colours = arm_colours(report)
    with matplotlib.rc_context(STYLE):
        forests = [
            save(draw_forest(comparison, report["headline"]), directory / f"differences-{number}.svg")
            for number, comparison in enumerate(report["comparisons"])
        ]
        headline = loss = None
        if report["headline"]:
            headline = save(draw_headline(report, colours), directory / "headline.svg")
        if any(steps for _, _, steps, _ in report["curves"]):
            loss = save(draw_losses(report["curves"], colours), directory / "loss.svg")
    return {"headline": headline, "loss": loss, "forests": forests, "colours": colours}


def draw_answers(report: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Draw the figure of an answers report as `accuracy.svg`.

    Returns:
        `accuracy`, a data URI, and `colours`, by arm label.
    """
    directory.mkdir(exist_ok=True)
    colours = arm_colours(report)
    with matplotlib.rc_context(STYLE):
        figure = draw_accuracy(report, colours)
        return {"accuracy": save(figure, directory / "accuracy.svg"), "colours": colours}


def arm_colours(report: Mapping[str, Any]) -> dict[str, str]:
    """One colour per arm label, the first target's being blue."""
    labels = [arm.label for arm in report["arms"].values()]
    targets = {comparison["target"].label for comparison in report["comparisons"]}
    ranked = sorted(labels, key=lambda label: label not in targets)
    return {label: PALETTE[number % len(PALETTE)] for number, label in enumerate(ranked)}


def draw_headline(report: Mapping[str, Any], colours: Mapping[str, str]) -> Figure:
    """Bars of mean R@1: one group per headline result, one bar per arm."""
    arms = list(report["arms"].values())
    groups = report["headline"]
    figure, axes = _axes(0.55 + len(groups) * (0.3 + 0.27 * len(arms)))
    longest = max(arm.recall(key, "mean") for arm in arms for key in groups)
    rows = []
    for group, key in enumerate(groups):
        top = group * (len(arms) + 1.1)
        axes.text(0, top - 0.85, _name(key), weight="bold", va="center")
        for row, arm in enumerate(arms):
            value = arm.recall(key, "mean")
            axes.barh(top + row, value, height=0.82, color=colours[arm.label])
            axes.text(value + longest * 0.015, top + row, f"{value:.1f}", va="center", color="#333333")
            rows.append(top + row)
        axes.plot([report["pools"][key].chance] * 2, [top - 0.5, top + len(arms) - 0.5], color="#333333", lw=1, ls=":")
    axes.set(ylim=(len(groups) * (len(arms) + 1.1) - 1.3, -1.4), xlim=(0, max(longest, 1) * 1.15))
    axes.set_yticks(rows, [arm.label for arm in arms] * len(groups))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("mean R@1 (%); dotted: chance")
    axes.spines["left"].set_visible(False)
    return figure


def draw_forest(comparison: Mapping[str, Any], headline: Sequence[tuple[str, str]]) -> Figure:
    """Difference of every pool with its interval; headline results first and in bold."""
    differences = comparison["differences"]
    keys = [*headline, *(key for key in differences if key not in headline)]
    figure, axes = _axes(0.9 + 0.235 * len(keys))
    for row, key in enumerate(keys):
        found = differences[key].comparison
        colour = VERDICT_COLOURS[found.verdict]
        axes.plot([found.low, found.high], [row, row], color=colour, lw=2.2, solid_capstyle="round")
        axes.plot(found.difference, row, "D" if key in headline else "o", color=colour, ms=6)
    axes.axvline(0, color="#333333", lw=0.9)
    if headline:
        axes.axhline(len(headline) - 0.5, color="#c8c8c8", lw=0.8)
    axes.grid(axis="x", color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
    axes.set(ylim=(len(keys) - 0.4, -0.6))
    axes.set_yticks(range(len(keys)), [_name(key) for key in keys])
    for label, key in zip(axes.get_yticklabels(), keys, strict=True):
        label.set(fontweight="bold" if key in headline else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"R@1 of {comparison['target'].label}\nminus {comparison['baseline'].label} (points)")
    return figure


def draw_accuracy(report: Mapping[str, Any], colours: Mapping[str, str]) -> Figure:
    """Accuracy of every arm on every group in English (on all if there are none), with intervals, blind and chance."""
    pools = {
        pool: [facts for facts in found if facts.group.language == "en"] or found
        for pool, found in report["pools"].items()
    }
    num_rows = sum(len(facts.scores) + 0.5 for found in pools.values() for facts in found) + 1.4 * len(pools)
    figure, axes = _axes(0.8 + 0.19 * num_rows + 0.2 * len(report["arms"]))
    top, ticks = 0.0, {}
    for pool, found in pools.items():
        axes.text(0, top, pool, weight="bold", va="center")
        top += 1.1
        for facts in found:
            count = len(facts.scores)
            ticks[top + (count - 1) / 2] = facts.group.kind
            axes.plot([100 * facts.bar] * 2, [top - 0.5, top + count - 0.5], color="#333333", lw=1.2, ls=":", zorder=4)
            for row, score in enumerate(facts.scores.values(), 1):
                _draw_score(axes, top + row - 1, score, colours[score.label])
            top += count + 0.5
        top += 0.3
    axes.set(ylim=(top - 0.4, -0.9), xlim=(0, 100))
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel("right answers (%)")
    handles: list[Any] = [Patch(color=colours[arm.label], label=arm.label) for arm in report["arms"].values()]
    handles.append(Line2D([], [], ls="", marker="o", mfc="white", mec="#333333", label="the same model, blind"))
    handles.append(Line2D([], [], color="#333333", lw=1.2, ls=":", label="chance or best constant answer"))
    figure.legend(handles=handles, loc="outside upper left", frameon=False, fontsize=9)
    return figure


def _draw_score(axes: Axes, row: float, score: Any, colour: str) -> None:
    value, low, high = score.accuracy.percent
    axes.barh(row, value, height=0.82, color=colour, alpha=0.75)
    axes.plot([low, high], [row, row], color="#222222", lw=1.4, solid_capstyle="butt")
    if score.blind:
        axes.plot(score.blind.percent.value, row, "o", mfc="white", mec="#333333", ms=4.5, zorder=5, clip_on=False)


def draw_losses(
    curves: Sequence[tuple[str, int, Sequence[int], Sequence[float]]], colours: Mapping[str, str]
) -> Figure:
    """Training loss of every run; a second seed of an arm in a lighter line."""
    figure, axes = _axes(3.0)
    for label, seed, steps, losses in curves:
        if len(steps):
            axes.plot(steps, losses, color=colours[label], lw=0.6, alpha=0.35)
            smooth = _smooth(np.asarray(losses))
            axes.plot(
                steps, smooth, color=colours[label], lw=1.8, alpha=0.55 if seed else 1, label=None if seed else label
            )
    axes.set(xlabel="optimizer step", ylabel="training loss")
    axes.grid(color="#e6e6e6", lw=0.7)
    axes.legend(frameon=False)
    return figure


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a twentieth of the run, shorter at its ends."""
    half = len(values) // 40
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _name(key: tuple[str, str]) -> str:
    return f"{key[0]} · {key[1]}"


def save(figure: Figure, path: Path) -> str:
    """Write an SVG, and give it as a data URL for pages that hold everything."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    atomic_write(path, buffer.getvalue())
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
