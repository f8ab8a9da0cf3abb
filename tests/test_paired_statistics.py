"""Paired tests on task metrics: nothing is found in nothing, what is planted is found as often as it should be."""

from __future__ import annotations

import lmms_results
import numpy as np
import pytest
import scipy.stats

from llm2clip_eval import paired_statistics as statistics
from llm2clip_eval.paired_statistics import Paired, clusters_of
from llm2clip_eval.task_metrics import Measured, measure


def scored(scores: np.ndarray) -> Measured:
    return measure(lmms_results.matched(scores.tolist()), "exact_match")


def means(*arms: np.ndarray, clusters: np.ndarray | None = None) -> Paired:
    """Two arms of one model each, by their items' scores."""
    own = np.arange(len(arms[0])) if clusters is None else clusters
    return Paired.of([scored(arms[0])], [scored(arms[1])], own)


def differences(task: Paired, seed: int = 0, num: int = 10_000) -> np.ndarray:
    return statistics.resampled_differences(task, num_resamples=num, seed=seed)


def pope(rng: np.random.Generator, num: int, right: float, shift: float = 0.0) -> list[Measured]:
    """F1 of two models that mostly say the same, the second right more often by `shift`."""
    truth = rng.random(num) < 0.5
    ease, own = rng.random(num), rng.random((2, num))
    models = []
    for row, level in zip(own, (right, right + shift), strict=True):
        is_right = np.where(row < 0.5, ease, rng.random(num)) < level
        said = np.where(is_right, truth, ~truth)
        answers = [("yes" if a else "no", "yes" if b else "no") for a, b in zip(said, truth, strict=True)]
        models.append(measure(lmms_results.pope(answers), "pope_f1_score"))
    return models


def test_items_are_connected_through_shared_labels():
    labels = [["a"], ["b"], ["a", "c"], ["d"], ["c"], []]
    clusters = clusters_of(labels)
    assert clusters[0] == clusters[2] == clusters[4]
    assert len(set(clusters.tolist())) == 4 and sorted(set(clusters.tolist())) == [0, 1, 2, 3]


def test_the_bootstrap_of_a_mean_has_the_standard_error_of_theory():
    rng = np.random.default_rng(0)
    baseline, candidate = rng.random(400), rng.random(400)
    difference = candidate - baseline
    found = differences(means(baseline, candidate), num=20_000)
    expected = difference.std() / np.sqrt(400)
    assert found.std() == pytest.approx(expected, rel=0.02)
    assert found.mean() == pytest.approx(difference.mean(), abs=0.05 * expected)
    low, high = statistics.interval(found, 0.9)
    assert (low, high) == pytest.approx(difference.mean() + expected * np.array([-1.645, 1.645]), abs=0.05 * expected)
    # found in 80 % of tests at 5 %: (1.96 + 0.84) standard errors
    assert statistics.minimum_detectable(found, 0.95) == pytest.approx(2.8016 * expected, rel=0.02)


def test_a_cluster_counts_as_one_observation():
    rng = np.random.default_rng(1)
    once = rng.integers(2, size=(2, 100)).astype(float)
    copied = np.repeat(once, 10, axis=1)
    one = means(*once)
    ten = means(*copied, clusters=np.repeat(np.arange(100), 10))
    np.testing.assert_allclose(differences(one, num=500), differences(ten, num=500), atol=1e-12)
    p_one, p_ten = (statistics.sign_flip_p(task, num_resamples=2000, seed=0) for task in (one, ten))
    assert p_one == p_ten


def test_the_interval_of_a_metric_that_is_no_mean_agrees_with_scipy():
    baseline, candidate = pope(np.random.default_rng(2), 300, 0.7, 0.08)

    def f1_difference(rows, axis=-1):
        rows = rows.astype(int)
        theirs, ours = (model.formula(model.statistics[rows].sum(axis=-2)) for model in (baseline, candidate))
        return ours - theirs

    expected = scipy.stats.bootstrap(
        (np.arange(300),), f1_difference, vectorized=True, n_resamples=10_000, method="percentile", rng=3, batch=500
    ).confidence_interval
    task = Paired.of([baseline], [candidate], np.arange(300))
    assert statistics.interval(differences(task), 0.95) == pytest.approx((expected.low, expected.high), abs=0.006)
    assert np.subtract(*task.metrics()[::-1]) == pytest.approx(candidate.value - baseline.value)


@pytest.mark.parametrize("num_models", [1, 3])
def test_a_model_against_itself_shows_nothing_in_any_statistic(num_models):
    rng = np.random.default_rng(4)
    models = [pope(rng, 120, level)[0] for level in (0.6, 0.7, 0.8)[:num_models]]
    task = Paired.of(models, models, np.arange(120) // 3, same_models=True)
    found = differences(task, num=1000)
    baseline, candidate = task.metrics()
    assert candidate - baseline == 0
    assert (found == 0).all() and statistics.interval(found, 0.95) == (0, 0)
    assert statistics.bootstrap_p(found, 0.0) == 1
    assert statistics.minimum_detectable(found, 0.95) == 0
    assert statistics.mcnemar_p(0, 0) == 1
    assert statistics.holm([1.0, 1.0]) == [1, 1]
    assert statistics.equivalence_p(found, found, 0.01) < 0.01  # shown to be equal
    assert task.is_itself and (statistics.unseen_share([[task]], size=10, seed=0) == 0).all()
    if num_models == 1:
        assert statistics.sign_flip_p(task, num_resamples=1000, seed=0) == 1


@pytest.mark.parametrize(("wins", "losses"), [(9, 1), (1, 9), (12, 7), (3, 3), (0, 6), (40, 22)])
def test_mcnemar_is_the_exact_binomial_test(wins, losses):
    smaller = scipy.stats.binom.cdf(min(wins, losses), wins + losses, 0.5)
    assert statistics.mcnemar_p(wins, losses) == pytest.approx(min(1, 2 * smaller))


def test_the_permutation_test_of_a_mean_is_that_of_scipy():
    rng = np.random.default_rng(5)
    baseline, candidate = rng.random(12), rng.random(12) + 0.2
    expected = scipy.stats.permutation_test(
        (candidate - baseline,), np.mean, permutation_type="samples", n_resamples=np.inf
    ).pvalue  # all 4096 patterns of signs
    found = statistics.sign_flip_p(means(baseline / 2, candidate / 2), num_resamples=40_000, seed=6)
    assert found == pytest.approx(expected, abs=0.01)


def test_holm_of_a_hand_computed_example():
    # sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, never falling
    assert statistics.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert statistics.holm([0.5, 0.4]) == [0.8, 0.8]
    assert statistics.holm([0.01]) == [0.01]
    assert statistics.holm([]) == []


def test_equivalence_asks_both_ends():
    spread = np.random.default_rng(7).normal(0.5, 1, 100_000)
    upper, lower = scipy.stats.norm.sf(2, 0.5), scipy.stats.norm.cdf(-2, 0.5)
    assert statistics.equivalence_p(spread, spread, 2) == pytest.approx(max(upper, lower), abs=0.003)
    assert statistics.equivalence_p(spread - 1, spread - 1, 2) == pytest.approx(max(upper, lower), abs=0.003)
    assert statistics.equivalence_p(spread, spread, 0.1) > 0.5
    assert statistics.equivalence_p(spread - 9, spread, 2) > 0.99  # what may be lost unseen


def test_the_same_seed_gives_the_same_and_another_another():
    task = means(*np.random.default_rng(8).random((2, 60)))
    first, again, other = (differences(task, seed, num=700) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()
    flips = [statistics.sign_flip_p(task, num_resamples=2000, seed=seed) for seed in (1, 1)]
    assert flips[0] == flips[1]


NUM_SIMULATIONS = 500
NUM_ITEMS = 200
RESAMPLES = 219
"""Few, for speed: 11 of 220 is exactly 5 %."""
LEVEL = 0.6
SHARED = 0.7
"""How often a model's answer follows the question's ease and not its own luck."""


def agrees(count: int, share: float) -> bool:
    """Whether a count of simulations can be that of a share: binomial, at one in a thousand."""
    return scipy.stats.binomtest(int(count), NUM_SIMULATIONS, share).pvalue > 0.001


def right(rng: np.random.Generator, ease: np.ndarray, level: float) -> np.ndarray:
    """Answers of a model that are right with probability `level`."""
    return np.where(rng.random(ease.shape) < SHARED, ease, rng.random(ease.shape)) < level


def simulate(shift: float) -> np.ndarray:
    """(NUM_SIMULATIONS, 4) p of McNemar, sign flips and bootstrap, and the MDE; binary answers, one per image."""
    rng = np.random.default_rng(9)
    ones = np.ones((NUM_ITEMS, 1, 1))
    found = []
    for seed in range(NUM_SIMULATIONS):
        ease = rng.random(NUM_ITEMS)
        arms = [right(rng, ease, level).astype(float) for level in (LEVEL, LEVEL + shift)]
        sums = [np.concatenate([arm[:, None, None], ones], axis=2) for arm in arms]
        task = Paired(*sums, lambda sums: sums[..., 0] / sums[..., 1])
        difference = arms[1] - arms[0]
        resampled = differences(task, seed, num=RESAMPLES)
        found.append(
            (
                statistics.mcnemar_p(int((difference > 0).sum()), int((difference < 0).sum())),
                statistics.sign_flip_p(task, num_resamples=RESAMPLES, seed=seed),
                statistics.bootstrap_p(resampled, difference.mean()),
                statistics.minimum_detectable(resampled, 0.95),
            )
        )
    return np.array(found)


def test_a_planted_null_is_flagged_one_time_in_twenty():
    mcnemar, flips, bootstrap = (simulate(0.0)[:, :3] <= 0.05).sum(axis=0)
    assert mcnemar <= scipy.stats.binom.ppf(0.999, NUM_SIMULATIONS, 0.05)  # exact, so conservative
    assert 0.02 * NUM_SIMULATIONS < flips <= scipy.stats.binom.ppf(0.999, NUM_SIMULATIONS, 0.05)
    assert agrees(bootstrap, 0.05)


def test_a_planted_shift_of_the_detectable_size_is_found_four_times_in_five():
    shift = 0.1038
    both_right = SHARED**2 * LEVEL + (1 - SHARED**2) * LEVEL * (LEVEL + shift)
    variance = LEVEL + (LEVEL + shift) - 2 * both_right - shift**2  # of one item's difference
    power = scipy.stats.norm.cdf(shift / np.sqrt(variance / NUM_ITEMS) - 1.96)
    assert power == pytest.approx(0.8, abs=0.01)
    found = simulate(shift)
    mcnemar, flips, bootstrap = (found[:, :3] <= 0.05).sum(axis=0)
    assert agrees(bootstrap, power)
    assert agrees(flips, power - 0.02) and agrees(mcnemar, power - 0.05)  # exact tests pay a little
    assert found[:, 3].mean() == pytest.approx(shift, rel=0.03)  # and this size is what is reported as detectable


def test_a_planted_null_of_f1_with_several_questions_per_image_is_flagged_one_time_in_twenty():
    rng = np.random.default_rng(10)
    images = np.repeat(np.arange(100), 4)
    formula = measure(lmms_results.pope([("yes", "yes")]), "pope_f1_score").formula
    flags = np.zeros(3)
    for seed in range(NUM_SIMULATIONS):
        truth = rng.random(400) < 0.5
        # an image is easy or hard with all its questions
        ease = np.where(rng.random(400) < 0.6, rng.random(100)[images], rng.random(400))
        arms = []
        for _ in range(2):
            luck = rng.random(100) < 0.3  # and a model may fail on all questions about an image
            is_right = right(rng, ease, 0.7) & ~luck[images]
            columns = np.stack([truth & is_right, ~truth & ~is_right, truth & ~is_right], axis=1)
            arms.append(np.concatenate([columns, np.zeros_like(columns)], axis=1).astype(float))
        by_image = [arm.reshape(100, 4, 6).sum(axis=1)[:, None] for arm in arms]
        task = Paired(*by_image, formula)
        alone = Paired(*(arm[:, None] for arm in arms), formula)
        value = task.metrics()[1] - task.metrics()[0]
        flags += (
            statistics.sign_flip_p(task, num_resamples=RESAMPLES, seed=seed) <= 0.05,
            statistics.bootstrap_p(differences(task, seed, num=RESAMPLES), value) <= 0.05,
            statistics.sign_flip_p(alone, num_resamples=RESAMPLES, seed=seed) <= 0.05,
        )
    assert agrees(flags[0], 0.05) and agrees(flags[1], 0.055)
    assert flags[2] > 0.1 * NUM_SIMULATIONS  # what not caring for images would give


@pytest.mark.parametrize("num_seeds", [2, 3])
def test_a_planted_null_with_noisy_training_is_flagged_at_most_one_time_in_twenty(num_seeds):
    rng = np.random.default_rng(11)
    flagged = ignored = 0
    for seed in range(NUM_SIMULATIONS):
        ease = rng.random(200)
        levels = LEVEL + 0.1 * rng.standard_normal((2, num_seeds))  # what training adds, from run to run
        arms = [np.stack([right(rng, ease, level).astype(float) for level in of_arm], axis=1) for of_arm in levels]
        sums = [np.stack([arm, np.ones_like(arm)], axis=2) for arm in arms]
        task = Paired(*sums, lambda sums: sums[..., 0] / sums[..., 1])
        value = task.metrics()[1] - task.metrics()[0]
        flagged += statistics.bootstrap_p(differences(task, seed, num=RESAMPLES), value) <= 0.05
        mean = Paired(*(arm.mean(axis=1, keepdims=True) for arm in sums), task.formula)
        ignored += statistics.bootstrap_p(differences(mean, seed, num=RESAMPLES), value) <= 0.05
    assert flagged <= scipy.stats.binom.ppf(0.999, NUM_SIMULATIONS, 0.05)
    assert ignored > 0.25 * NUM_SIMULATIONS  # what not caring for training noise would give


@pytest.mark.parametrize("same_models", [False, True])
@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_p_of_several_seeds_holds_at_small_levels_too(num_seeds, same_models):
    """Resampled metrics are made up here: training noise twice that of images, no difference."""
    rng = np.random.default_rng(14)
    p = []
    for seed in range(4000):
        found = rng.standard_normal((2, num_seeds)) * np.hypot(2, 1)
        baseline, candidate = found[:, None] + rng.standard_normal((2, 999, num_seeds))
        resampled = statistics.seed_differences(baseline, candidate, seed=seed, same_models=same_models)
        p.append(statistics.bootstrap_p(resampled, found[1].mean() - found[0].mean()))
    for level in (0.05, 0.005):  # Holm's correction asks for the latter
        assert (np.array(p) <= level).sum() <= scipy.stats.binom.ppf(0.999, len(p), level)
    assert np.mean(np.array(p) <= 0.05) > 0.01  # and it is not out of reach


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (0, 1), (0, 4), (2, 5), (30, 40)])
def test_the_lower_end_is_close_to_the_exact_one_however_few_answers_flip(wins, losses):
    answers = np.repeat([1.0, -1.0, 0.0], [wins, losses, 400 - wins - losses])
    task = means(np.maximum(-answers, 0), np.maximum(answers, 0))
    share = statistics.unseen_share([[task]], size=10_000, seed=0)
    lost, won = statistics.with_unseen(differences(task), 1, share)
    low, high = statistics.interval(lost, 0.9)[0], statistics.interval(won, 0.9)[1]
    if not wins:
        assert low == pytest.approx(-scipy.stats.beta.ppf(0.95, losses + 1, 400 - losses), rel=0.06)
    # Fay & Lumbard (2021): bounds of the share that flips and of the wins among them, melded
    rng = np.random.default_rng(15)
    flips = rng.beta(wins + losses + 1, 400 - wins - losses, 100_000)
    wins_among = rng.beta(wins, losses + 1, 100_000) if wins else np.zeros(100_000)
    assert low == pytest.approx(np.percentile(flips * (2 * wins_among - 1), 5), rel=0.06)
    assert high > max(0, (wins - losses) / 400)


def test_the_p_of_equivalence_holds_where_few_answers_flip():
    rng = np.random.default_rng(16)
    ones = np.ones((400, 1, 1))
    flagged = ignored = 0
    for seed in range(NUM_SIMULATIONS):
        lost = (rng.random((400, 1, 1)) < 0.01).astype(float)  # the true loss is just the margin
        sums = [np.concatenate([arm, ones], axis=2) for arm in (lost, 0 * lost)]
        task = Paired(*sums, lambda sums: sums[..., 0] / sums[..., 1])
        found = differences(task, seed, num=RESAMPLES)
        share = statistics.unseen_share([[task]], size=RESAMPLES, seed=seed)
        flagged += statistics.equivalence_p(*statistics.with_unseen(found, 1, share), 0.01) <= 0.05
        ignored += statistics.equivalence_p(found, found, 0.01) <= 0.05
    assert flagged <= scipy.stats.binom.ppf(0.999, NUM_SIMULATIONS, 0.05)
    assert ignored > 0.07 * NUM_SIMULATIONS  # what not caring for the unseen would give


def test_what_is_detectable_with_several_seeds_follows_students_distribution():
    found = np.array([0.31, 0.35, 0.42])
    resampled = statistics.seed_differences(np.zeros((200_000, 1)), np.tile(found, (200_000, 1)), seed=0)
    expected = scipy.stats.t.ppf([0.975, 0.8], 2).sum() * found.std(ddof=1) / np.sqrt(3)
    assert statistics.minimum_detectable(resampled, 0.95, long_tails=True) == pytest.approx(expected, rel=0.02)


def test_one_model_asked_in_two_ways_may_differ_from_itself():
    rng = np.random.default_rng(12)
    arms = [[scored(answers) for answers in rng.integers(2, size=(3, 80)).astype(float)] for _ in range(2)]
    task = Paired.of(*arms, np.arange(80), same_models=True)
    found = differences(task, num=500)
    low, high = statistics.interval(found, 0.95)
    assert low < task.metrics()[1] - task.metrics()[0] < high and found.std() > 0.01
