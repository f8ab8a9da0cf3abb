"""Every task's metric from sums: statistics per item that add up, and the formula that makes of their sum the number
that lmms-eval prints.

A bootstrap over clusters of items is then a matrix product and the formula: the metric itself is computed anew in each
resample. The rules are those of lmms-eval 0.7.3, `lmms_eval/tasks/*/utils.py`, with all their turns: an answer to POPE
that is neither yes nor no is wrong, but counts for neither precision nor recall.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Item = Mapping[str, Any]
"""An entry of `items` in what `llm2clip-eval lmms` wrote about a task."""
Formula = Callable[[np.ndarray], np.ndarray]
"""(..., k) sums of statistics -> (...) the metric; nan where there is nothing to measure."""


@dataclass(frozen=True)
class Measured:
    """What a model's answers come to in one metric."""

    statistics: np.ndarray
    """(num_items, k) float; a group's statistics stand with its first item, the other rows are 0."""
    groups: np.ndarray
    """(num_items,) number of the group with which an item is scored: an MME pair; mostly every item is its own."""
    scores: np.ndarray
    """(num_items,) what the answer was worth, from 0 to 1; an item of a group may have the group's score."""
    formula: Formula
    is_mean: bool = True
    """Whether the metric is proportional to the sum of the groups' scores."""
    scale: float = 100.0
    """What the metric is multiplied with to be shown: 100 for shares, 1 for points and what is in percent already."""
    best: float = 100.0
    """Highest possible metric, multiplied with scale."""

    @property
    def value(self) -> float:
        """The metric as lmms-eval prints it, not multiplied with scale."""
        return float(self.formula(self.statistics.sum(axis=0)))


def measure(items: Sequence[Item], metric: str) -> Measured:
    """Take apart what lmms-eval's `process_results` returned.

    Args:
        items: of one task; those without this metric do not count (SEED's videos in `seed_image`).
        metric: as lmms-eval calls it.

    Raises:
        ValueError: if no item has the metric, or it is none that is known to be made of sums.
    """
    scored = [item for item in items if metric in item["scores"]]
    if not scored:
        raise ValueError(f"no item has a score for {metric}")
    values = [item["scores"][metric] for item in scored]
    if isinstance(values[0], (bool, int, float)):
        return _mean(np.array(values, float), metric)
    name = metric.partition(",")[0]  # behind it the filter's name
    if name not in METRICS:
        raise ValueError(
            f"it is not known how lmms-eval's {metric} is made of its items ({_shape(values[0])}), so it cannot be "
            f"resampled; leave the task out, or choose another of its metrics. Known: {', '.join(METRICS)}, and means"
        )
    return METRICS[name](values)


def items_with(items: Sequence[Item], metric: str) -> list[Item]:
    """Those that count for a metric, in the order of `Measured`."""
    return [item for item in items if metric in item["scores"]]


def ratio(numerator: np.ndarray, denominator: np.ndarray, empty: float = np.nan) -> np.ndarray:
    """Divide, with `empty` where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    return np.divide(numerator, denominator, out=np.full(denominator.shape, float(empty)), where=denominator > 0)


def _singly(scores: np.ndarray, formula: Formula, **facts: Any) -> Measured:
    """Every item on its own: statistics are its score and 1."""
    statistics = np.stack([scores, np.ones_like(scores)], axis=1)
    return Measured(statistics, np.arange(len(scores)), scores, formula, **facts)


def _share(sums: np.ndarray) -> np.ndarray:
    return ratio(sums[..., 0], sums[..., 1])


def _mean(scores: np.ndarray, metric: str) -> Measured:
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError(
            f"{metric} has scores from {scores.min():g} to {scores.max():g}; only means of scores in 0 to 1 are known"
        )
    return _singly(scores, _share)


def _hits(right: Callable[[Any], bool | float]) -> Callable[[Sequence[Any]], Measured]:
    """Mean over items of a score that is found in, or follows from, a record."""
    return lambda values: _singly(np.array([float(right(value)) for value in values]), _share)


def _pope(formula: Formula) -> Callable[[Sequence[Any]], Measured]:
    def measured(values: Sequence[Any]) -> Measured:
        asked = np.array([value["ground_truth"] == "yes" for value in values])
        said_yes = np.array([value["prediction"] == "yes" for value in values])
        said_no = np.array([value["prediction"] == "no" for value in values])
        scores = np.array([value["score"] for value in values], float)
        counted = [asked & said_yes, ~asked & said_yes, asked & said_no, scores, np.ones_like(scores), asked]
        return Measured(np.stack(counted, axis=1).astype(float), np.arange(len(values)), scores, formula, False)

    return measured


def _precision(sums: np.ndarray) -> np.ndarray:
    return ratio(sums[..., 0], sums[..., 0] + sums[..., 1], empty=0)


def _recall(sums: np.ndarray) -> np.ndarray:
    return ratio(sums[..., 0], sums[..., 0] + sums[..., 2], empty=0)


def _f1(sums: np.ndarray) -> np.ndarray:
    precision, recall = _precision(sums), _recall(sums)
    return ratio(2 * (precision * recall), precision + recall, empty=0)


def _category_means(scores: np.ndarray, counts: np.ndarray, category: Sequence[str]) -> tuple[np.ndarray, int]:
    """(num_items, 2 * num_categories): scores by category, then counts by category."""
    names, column = np.unique(np.asarray(category), return_inverse=True)
    one_hot = np.eye(len(names))[column]
    return np.concatenate([scores[:, None] * one_hot, counts[:, None] * one_hot], axis=1), len(names)


def _means(sums: np.ndarray) -> np.ndarray:
    """(..., 2 * num_categories) -> (..., num_categories), nan for categories that are not there."""
    num = sums.shape[-1] // 2
    return ratio(sums[..., :num], sums[..., num:])


def _sum_of_means(sums: np.ndarray) -> np.ndarray:
    return np.nansum(_means(sums), axis=-1)


def _mean_of_means(sums: np.ndarray) -> np.ndarray:
    present = (sums[..., sums.shape[-1] // 2 :] > 0).sum(axis=-1)
    return ratio(np.nansum(_means(sums), axis=-1), present)


def _mme(values: Sequence[Any]) -> Measured:
    """Sum over categories of accuracy plus accuracy+, the share of images both of whose questions are right."""
    scores = np.array([value["score"] for value in values], float)
    category = [value["category"] for value in values]
    groups = _numbered([(value["category"], str(value["question_id"])) for value in values])
    sizes = np.bincount(groups)
    if (sizes != 2).any():
        odd = values[int(np.argmax(sizes[groups] != 2))]
        raise ValueError(
            f"MME is scored by pairs of questions about an image; {odd['question_id']} in {odd['category']} has "
            f"{int(sizes[sizes != 2][0])}: choose a limit that keeps pairs together"
        )
    right = np.bincount(groups, weights=scores)
    points = right / 2 * 100 + (right == 2) * 100
    first = _first_of(groups)
    statistics, num = _category_means(np.where(first, points[groups], 0.0), first.astype(float), category)
    return Measured(statistics, groups, scores, _sum_of_means, False, scale=1.0, best=200.0 * num)


def _mmstar(values: Sequence[Any]) -> Measured:
    """Mean over the finer categories of the accuracy in each."""
    scores = np.array([value["score"] for value in values], float)
    statistics, num = _category_means(scores, np.ones_like(scores), [value["l2_category"] for value in values])
    return Measured(statistics, np.arange(len(values)), scores, _mean_of_means, num == 1)


def _mmbench(values: Sequence[Any]) -> Measured:
    """Share of questions that are answered rightly in all their rotations (index and index + 1,000,000 …)."""
    import pandas
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    evaluator = MMBench_Evaluator()
    index = np.array([int(value["index"]) for value in values])
    groups = _numbered((index % 1_000_000).tolist())
    answers = {int(value["index"]): value["answer"] for value in values}
    # As in MMBench_Evaluator.eval_result: sorted by index, predictions as text.
    rows: list[list[int]] = [[] for _ in range(groups.max() + 1)]
    for row in np.argsort(index, kind="stable"):
        rows[groups[row]].append(int(row))
    scores, statistics = np.zeros(len(values)), np.zeros((len(values), 2))
    for of_group in rows:
        if index[of_group[0]] >= 1_000_000:
            raise ValueError(f"MMBench question {index[of_group[0]]} is a rotation of one that is missing")
        table = pandas.DataFrame([{**values[row], "prediction": str(values[row]["prediction"])} for row in of_group])
        hit = float(evaluator.eval_sub_data(table, answers, static_only=True))
        scores[of_group] = hit
        statistics[min(of_group)] = hit, 1
    return Measured(statistics, groups, scores, lambda sums: 100 * _share(sums), scale=1.0)


def _gpt_eval_score(values: Sequence[Any]) -> Measured:
    """MMBench without a judge, or MM-Vet, which calls its metric so too: 100 times the mean of the judge's scores."""
    if "index" in values[0]:
        return _mmbench(values)
    scores = np.array([value["score"] for value in values], float)
    return _singly(scores, lambda sums: 100 * _share(sums), scale=1.0)


def _llava_bench(values: Sequence[Any]) -> Measured:
    """The judge's points for the model in percent of those for the reference, rounded as lmms-eval does."""
    points = np.array([value["scores"] for value in values], float)  # (num_items, 2): reference, model
    if (points < 0).any():
        raise ValueError(f"the judge failed on {int((points < 0).any(axis=1).sum())} answers; have them judged again")
    statistics = np.concatenate([points, np.ones((len(points), 1))], axis=1)

    def formula(sums: np.ndarray) -> np.ndarray:
        means = np.round(ratio(sums[..., :2], sums[..., 2:]), 3)
        return np.round(ratio(means[..., 1], means[..., 0]) * 100, 1)

    return Measured(statistics, np.arange(len(points)), points[:, 1] / 10, formula, False, scale=1.0)


def _mmmu(values: Sequence[Any]) -> Measured:
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

    right: list[Any] = [evaluate_mmmu([value]) for value in values]  # (verdicts by question, accuracy) of each alone
    scores = np.array([float(accuracy["acc"]) for _, accuracy in right])
    return _singly(scores, lambda sums: np.round(_share(sums), 5))


def _ocrbench(values: Sequence[Any]) -> Measured:
    """Right answers over 1,000, however many were asked; shown as their number, as the benchmark does."""
    scores = np.array([value["score"] for value in values], float)
    return _singly(scores, lambda sums: sums[..., 0] / 1000, scale=1000.0, best=float(len(scores)))


def _mmvp_pairs(values: Sequence[Any]) -> Measured:
    """Share of pairs of images both of which are answered rightly; what has lost its partner does not count."""
    right = np.array([value["is_correct"] for value in values], float)
    groups = _numbered([value["pair_index"] for value in values])
    is_pair = np.bincount(groups) == 2
    both = (np.bincount(groups, weights=right) == 2) & is_pair
    first = _first_of(groups)
    statistics = np.stack([first & both[groups], first & is_pair[groups]], axis=1).astype(float)
    return Measured(statistics, groups, both[groups].astype(float), lambda sums: ratio(sums[..., 0], sums[..., 1], 0))


def _first_of(groups: np.ndarray) -> np.ndarray:
    """(num_items,) whether an item is the first of its group."""
    first = np.zeros(len(groups), bool)
    first[np.unique(groups, return_index=True)[1]] = True
    return first


def _numbered(keys: Sequence[Any]) -> np.ndarray:
    """Equal keys get equal numbers, from 0 in order of appearance."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def _shape(value: Any) -> str:
    return f"a mapping with {', '.join(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__


def _letters(value: Any) -> bool:
    return value["pred"].lower().strip() == value["answer"].lower().strip()


METRICS: Mapping[str, Callable[[Sequence[Any]], Measured]] = {
    "pope_accuracy": _pope(lambda sums: ratio(sums[..., 3], sums[..., 4])),
    "pope_precision": _pope(_precision),
    "pope_recall": _pope(_recall),
    "pope_f1_score": _pope(_f1),
    "pope_yes_ratio": _pope(lambda sums: ratio(sums[..., 5], sums[..., 4])),
    "mme_perception_score": _mme,
    "mme_cognition_score": _mme,
    "gpt_eval_score": _gpt_eval_score,
    "gpt_eval_llava_all": _llava_bench,
    "seed_all": _hits(_letters),
    "seed_image": _hits(_letters),
    "seed_video": _hits(_letters),
    "mmmu_acc": _mmmu,
    "average": _mmstar,
    "coarse perception": _mmstar,
    "fine-grained perception": _mmstar,
    "instance reasoning": _mmstar,
    "logical reasoning": _mmstar,
    "science & technology": _mmstar,
    "math": _mmstar,
    "ocrbench_accuracy": _ocrbench,
    "mmvp_accuracy": _hits(lambda value: value["is_correct"]),
    "mmvp_pair_accuracy": _mmvp_pairs,
    "cv_bench_acc": _hits(lambda value: value["is_correct"]),
}
"""How metrics whose items are records are made; those whose items are numbers are means."""
