"""Accuracies with cluster-bootstrap intervals: closed forms, coverage, pairing, agreement with scipy; verdicts."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from llm2clip_eval.answer_statistics import ClusterBootstrap, Estimate, statement, verdict


def answers(rng: np.random.Generator, level: float, num: int) -> np.ndarray:
    """One model's scores, (1, num)."""
    return (rng.random((1, num)) < level).astype(float)


def test_always_right_and_always_wrong_leave_no_doubt():
    images = np.arange(50) // 3
    bootstrap = ClusterBootstrap({"right": np.ones((1, 50)), "wrong": np.zeros((1, 50))}, images, num_resamples=300)
    assert bootstrap.mean("right") == (1, 1, 1)
    assert bootstrap.mean("wrong") == (0, 0, 0)
    assert bootstrap.difference("right", "wrong") == (1, 1, 1)


def test_a_model_against_itself_differs_by_exactly_zero():
    scores = answers(np.random.default_rng(0), 0.4, 200)
    bootstrap = ClusterBootstrap({"one": scores, "same": scores.copy()}, np.arange(200) // 2, num_resamples=500)
    assert bootstrap.difference("one", "same") == (0, 0, 0)


def test_the_mean_is_over_questions_not_over_images():
    scores = np.array([[1.0, 0, 0, 0]])
    assert ClusterBootstrap({"a": scores}, ["x", "y", "y", "y"], num_resamples=10).mean("a").value == 0.25


def test_the_interval_of_a_share_is_as_wide_as_the_binomial_says():
    scores = np.zeros((1, 400))
    scores[0, :120] = 1
    found = ClusterBootstrap({"a": scores}, np.arange(400)).mean("a")
    half = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert found == pytest.approx((0.3, 0.3 - half, 0.3 + half), abs=0.004)


def test_intervals_hold_the_truth_about_19_times_in_20():
    rng = np.random.default_rng(1)
    images = np.arange(300) // 2
    covered = 0
    for seed in range(300):
        # questions about one image are right or wrong together, half of the time
        both = rng.random(150) < 0.4
        scores = np.where(rng.random(300) < 0.5, both[images], rng.random(300) < 0.4).astype(float)[None]
        found = ClusterBootstrap({"a": scores}, images, num_resamples=300, seed=seed).mean("a")
        covered += found.low <= 0.4 <= found.high
    assert 270 <= covered <= 297  # 300 trials at 95 %: expected 285, standard deviation 3.8; percentile: slightly less


def test_copies_of_a_question_about_one_image_are_no_evidence():
    once = answers(np.random.default_rng(2), 0.5, 100)
    single = ClusterBootstrap({"a": once}, np.arange(100)).mean("a")
    copied = ClusterBootstrap({"a": np.repeat(once, 10, axis=1)}, np.repeat(np.arange(100), 10)).mean("a")
    assert copied == pytest.approx(single, abs=1e-12)
    ignored = ClusterBootstrap({"a": np.repeat(once, 10, axis=1)}, np.arange(1000)).mean("a")
    assert ignored.high - ignored.low < 0.5 * (single.high - single.low)


def test_a_difference_is_paired_and_agrees_with_scipy():
    rng = np.random.default_rng(3)
    easy = rng.random(300)
    scores = {"ours": (easy < 0.6).astype(float)[None], "theirs": (easy < 0.5).astype(float)[None]}
    found = ClusterBootstrap(scores, np.arange(300)).difference("ours", "theirs")
    expected = scipy.stats.bootstrap(
        (scores["ours"][0] - scores["theirs"][0],), np.mean, n_resamples=10_000, method="percentile", rng=4
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.004)
    unpaired = ClusterBootstrap({**scores, "ours": scores["ours"][:, ::-1]}, np.arange(300))
    other = unpaired.difference("ours", "theirs")
    assert other.high - other.low > 1.5 * (found.high - found.low)


def test_models_that_disagree_widen_the_interval_unless_they_do_so_alike():
    rng = np.random.default_rng(5)
    erratic = np.concatenate([answers(rng, level, 400) for level in (0.2, 0.5, 0.8)])
    blind = np.clip(erratic - (rng.random((3, 400)) < 0.1), 0, 1)
    bootstrap = ClusterBootstrap({"sees": erratic, "blind": blind, "one": erratic[1:2]}, np.arange(400))
    assert bootstrap.mean("sees").value == pytest.approx(erratic.mean())
    width = {name: np.ptp(bootstrap.mean(name)[1:]) for name in ("sees", "one")}
    assert width["sees"] > 2 * width["one"]
    together = bootstrap.difference("sees", "blind", same_models=True)
    assert np.ptp(together[1:]) < 0.3 * np.ptp(bootstrap.difference("sees", "blind")[1:])


@pytest.mark.parametrize("num_seeds", [2, 3])
def test_intervals_cover_the_noise_of_training(num_seeds):
    rng = np.random.default_rng(7)
    missed = np.zeros(3)
    for seed in range(400):
        levels = 0.5 + 0.08 * rng.standard_normal((2, num_seeds))  # what training adds, from run to run
        ours, theirs = (np.concatenate([answers(rng, level, 150) for level in of_arm]) for of_arm in levels)
        blind = np.where(rng.random(ours.shape) < 0.3 + 0.1 * rng.standard_normal((num_seeds, 1)), 0, ours)
        scores = {"ours": ours, "theirs": theirs, "blind": blind}
        bootstrap = ClusterBootstrap(scores, np.arange(150), num_resamples=400, seed=seed)
        found = bootstrap.mean("ours"), bootstrap.difference("ours", "theirs")
        over_blind = bootstrap.difference("ours", "blind", same_models=True)
        missed += [not e.low <= t <= e.high for e, t in zip((*found, over_blind), (0.5, 0, 0.15), strict=True)]
    assert (missed <= scipy.stats.binom.ppf(0.999, 400, 0.05)).all()


def test_the_same_seed_gives_the_same_interval():
    scores = answers(np.random.default_rng(6), 0.5, 80)
    first, again, other = (
        ClusterBootstrap({"a": scores}, np.arange(80), num_resamples=700, seed=seed).mean("a") for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_scores_of_another_number_of_questions_are_refused():
    with pytest.raises(ValueError, match="scores of 3 questions, clusters of 2"):
        ClusterBootstrap({"a": np.ones((1, 3))}, ["x", "y"])


def test_a_verdict_needs_the_whole_interval():
    high, low, near = Estimate(0.5, 0.4, 0.6), Estimate(0.1, 0.05, 0.15), Estimate(0.3, 0.2, 0.4)
    gain, loss, nothing = Estimate(0.2, 0.1, 0.3), Estimate(-0.2, -0.3, -0.1), Estimate(0.1, 0.0, 0.2)
    assert verdict(high, 0.25, gain) == "above chance and above the blind baseline"
    assert verdict(high, 0.4, gain) == "not shown to be above chance but above the blind baseline"
    assert verdict(high, 0.25, nothing) == "above chance but not shown to be above the blind baseline"
    assert verdict(near, 0.25, nothing) == "not shown to be above chance and not shown to be above the blind baseline"
    assert verdict(low, 0.25, loss) == "below chance and below the blind baseline"
    assert verdict(high, 0.25, None) == "above chance; no blind baseline"


def test_a_statement_says_what_the_interval_says():
    better = statement("A", "B", (0.5, 0.4), Estimate(0.1, 0.02, 0.18), 0.95)
    assert (
        better
        == "A is better than B by 10.0 points (50.0 % against 40.0 %; 95 % interval +2.0 to +18.0, excludes zero)."
    )
    assert statement("A", "B", (0.4, 0.5), Estimate(-0.1, -0.18, -0.02), 0.9).startswith("A is worse than B by 10.0")
    undecided = statement("A", "B", (0.5, 0.49), Estimate(0.01, -0.02, 0.04), 0.95)
    assert undecided.startswith("No difference shown between A and B: +1.0 points") and "includes zero" in undecided
    assert "equally often" in statement("A", "B", (0.5, 0.5), Estimate(0.0, 0.0, 0.0), 0.95)
