"""The paired bootstrap: exact on itself, finds what is planted, seldom finds what is not, agrees with scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from llm2clip_eval.statistics import QueryHits, over_seeds, paired_bootstrap, statement


def simulate(rng: np.random.Generator, i2t: float, t2i: float, owner: np.ndarray) -> QueryHits:
    num_images = owner.max() + 1
    return QueryHits(rng.random(num_images) < i2t, rng.random(len(owner)) < t2i, owner)


@pytest.fixture
def owner() -> np.ndarray:
    return np.repeat(np.arange(200), np.arange(200) % 3 + 1)


def test_hits_come_from_zero_based_ranks():
    hits = QueryHits.from_ranks([0, 3], [1, 0, 5], [0, 0, 1], k=2)
    assert hits.i2t.tolist() == [True, False]
    assert hits.t2i.tolist() == [True, True, False]


def test_a_model_against_itself_differs_by_exactly_zero(owner):
    hits = simulate(np.random.default_rng(0), 0.4, 0.3, owner)
    result = paired_bootstrap([hits], [hits])
    assert (result.difference, result.low, result.high) == (0.0, 0.0, 0.0)
    assert (result.wins, result.losses, result.verdict) == (0, 0, "undecided")
    assert "exactly the same" in statement(result, "A", "B")


def test_the_mean_is_over_directions_not_over_queries():
    hits = QueryHits(np.array([True, True]), np.zeros(6, bool), np.array([0, 0, 0, 1, 1, 1]))
    assert paired_bootstrap([hits], [hits]).target_recall == 50.0


def test_a_planted_shift_is_found_on_the_right_side(owner):
    rng = np.random.default_rng(1)
    strong, weak = simulate(rng, 0.6, 0.6, owner), simulate(rng, 0.4, 0.4, owner)
    better, worse = paired_bootstrap([strong], [weak]), paired_bootstrap([weak], [strong])
    assert better.verdict == "better" and better.low > 0 and better.low < 20 < better.high
    assert worse.verdict == "worse"
    assert worse.difference == pytest.approx(-better.difference)
    assert statement(better, "LLM2CLIP", "CLIP").startswith("LLM2CLIP is better than CLIP by ")
    assert statement(worse, "CLIP", "LLM2CLIP").startswith("CLIP is worse than LLM2CLIP by ")


def test_a_planted_null_is_flagged_about_one_time_in_twenty():
    rng = np.random.default_rng(2)
    owner = np.repeat(np.arange(120), 2)
    flagged = 0
    for seed in range(400):
        first, second = simulate(rng, 0.5, 0.5, owner), simulate(rng, 0.5, 0.5, owner)
        flagged += paired_bootstrap([first], [second], num_resamples=400, seed=seed).verdict != "undecided"
    # 400 trials at 5 %: expected 20, standard deviation 4.4
    assert 7 <= flagged <= 36


def test_captions_of_one_image_are_one_observation():
    """Ten copies of the same caption carry no more evidence than one."""
    rng = np.random.default_rng(3)
    ours, theirs = rng.random(100) < 0.6, rng.random(100) < 0.5
    widths = []
    for copies in (1, 10):
        owner = np.repeat(np.arange(100), copies)
        first, second = (QueryHits(hits, np.repeat(hits, copies), owner) for hits in (ours, theirs))
        result = paired_bootstrap([first], [second])
        widths.append(result.high - result.low)
    assert widths[0] == pytest.approx(widths[1], rel=1e-9)


def test_interval_agrees_with_scipy(owner):
    rng = np.random.default_rng(4)
    ours, theirs = simulate(rng, 0.5, 0.5, owner), simulate(rng, 0.45, 0.4, owner)

    def difference(i2t, t2i, captions, axis=-1):
        return 50 * (i2t.mean(axis=axis) + t2i.sum(axis=axis) / captions.sum(axis=axis))

    per_image = (
        ours.i2t.astype(float) - theirs.i2t,
        np.bincount(owner, weights=ours.t2i.astype(float) - theirs.t2i),
        np.bincount(owner).astype(float),
    )
    expected = scipy.stats.bootstrap(
        per_image, difference, paired=True, vectorized=True, n_resamples=10_000, method="percentile", rng=5
    ).confidence_interval
    result = paired_bootstrap([ours], [theirs])
    assert result.difference == pytest.approx(difference(*per_image))
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high), abs=0.5)


def test_the_same_seed_gives_the_same_interval(owner):
    rng = np.random.default_rng(5)
    ours, theirs = simulate(rng, 0.5, 0.5, owner), simulate(rng, 0.4, 0.5, owner)
    first, again, other = (paired_bootstrap([ours], [theirs], seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_seeds_that_disagree_widen_the_interval(owner):
    rng = np.random.default_rng(6)
    baseline = simulate(rng, 0.4, 0.4, owner)
    steady = [simulate(rng, 0.5, 0.5, owner)] * 3
    erratic = [simulate(rng, level, level, owner) for level in (0.2, 0.5, 0.8)]
    one, three = paired_bootstrap(steady, [baseline]), paired_bootstrap(erratic, [baseline])
    assert three.num_seeds == (3, 1)
    assert three.high - three.low > 2 * (one.high - one.low)
    assert three.target_recall == pytest.approx(
        np.mean([paired_bootstrap([arm], [baseline]).target_recall for arm in erratic])
    )


@pytest.mark.parametrize("num_seeds", [2, 3])
def test_a_planted_null_with_noisy_training_is_flagged_at_most_one_time_in_twenty(num_seeds):
    rng = np.random.default_rng(9)
    owner = np.arange(150)
    flagged = 0
    for seed in range(400):
        levels = 0.5 + 0.08 * rng.standard_normal((2, num_seeds))  # what training adds, from run to run
        ours, theirs = ([simulate(rng, level, level, owner) for level in of_arm] for of_arm in levels)
        flagged += paired_bootstrap(ours, theirs, num_resamples=400, seed=seed).verdict != "undecided"
    assert flagged <= scipy.stats.binom.ppf(0.999, 400, 0.05)


def test_the_noise_of_training_is_that_of_students_t_test():
    ours, theirs = np.array([0.31, 0.35, 0.42]), np.array([0.24, 0.29, 0.26])
    drawn, other = (np.tile(arm, (200_000, 1)) for arm in (ours, theirs))  # the images make no difference
    expected = scipy.stats.ttest_1samp(ours, 0).confidence_interval()
    assert np.percentile(over_seeds(drawn, seed=0), [2.5, 97.5]) == pytest.approx(expected, abs=0.004)

    def p(found: np.ndarray) -> float:
        return float(2 * min((found < 0).mean(), (found > 0).mean()))

    welch, paired = scipy.stats.ttest_ind(ours, theirs, equal_var=False), scipy.stats.ttest_rel(ours, theirs)
    assert p(over_seeds(drawn, other, seed=0)) == pytest.approx(welch.pvalue, rel=0.05)
    assert p(over_seeds(drawn - other, seed=0)) == pytest.approx(paired.pvalue, rel=0.05)
    once = scipy.stats.ttest_1samp(ours, 0.24)  # an arm that was trained once adds no noise
    assert p(over_seeds(drawn, other[:, :1], seed=0)) == pytest.approx(once.pvalue, rel=0.05)
    assert (over_seeds(drawn[:, :1], other[:, :1], seed=0) == ours[0] - theirs[0]).all()


def test_an_undecided_comparison_says_so(owner):
    rng = np.random.default_rng(7)
    result = paired_bootstrap([simulate(rng, 0.5, 0.5, owner)], [simulate(rng, 0.5, 0.5, owner)])
    assert result.verdict == "undecided"
    text = statement(result, "A", "B")
    assert "No difference shown" in text and "includes zero" in text


def test_different_pools_are_refused(owner):
    rng = np.random.default_rng(8)
    with pytest.raises(ValueError, match="different pools"):
        paired_bootstrap([simulate(rng, 0.5, 0.5, owner)], [simulate(rng, 0.5, 0.5, np.arange(200))])
