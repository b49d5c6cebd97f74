"""Items forgotten and gained: by hand, and with simulated guessing."""

import numpy as np
import pytest

from recall_merge.maths.metrics import item_changes


def test_items_that_change_places_are_counted_though_the_mean_stays():
    changes = item_changes([1, 1, 0, 0, 1], [0, 0, 1, 1, 1])
    assert (changes.forgotten, changes.gained, changes.chance) == (0.4, 0.4, 0.0)


def test_items_in_between_count_by_the_part_they_lost():
    changes = item_changes([1.0, 0.5, 0.2], [0.25, 0.5, 0.8])
    assert changes.forgotten == pytest.approx(0.75 / 3)
    assert changes.gained == pytest.approx(0.6 / 3)


def test_chance_is_subtracted_and_nothing_goes_below_zero():
    changes = item_changes([1, 1, 1, 0, 0], [0, 0, 1, 0, 1], choices=4)
    assert changes.chance == pytest.approx((2 / 5) * (3 / 5) / 3)
    assert changes.forgotten == pytest.approx(2 / 5 - 0.08)
    assert changes.gained == pytest.approx(1 / 5 - 0.08)
    assert item_changes([1, 0], [1, 0], choices=2).forgotten == 0.0


def test_choices_may_differ_from_item_to_item():
    before, after = [1, 0, 1, 0, 0], [0, 0, 1, 1, 0]
    by_group = 2 / 5 * (1 / 2 * 2 / 2) / 1 + 3 / 5 * (2 / 3 * 1 / 3) / 3
    assert item_changes(before, after, choices=[2, 2, 4, 4, 4]).chance == pytest.approx(by_group)


def test_guessing_comes_out_as_nothing_forgotten():
    k, n = 4, 200_000
    rng = np.random.default_rng(0)
    before, after = rng.random((2, n)) < 1 / k
    assert item_changes(before, after).forgotten == pytest.approx(3 / 16, abs=0.003)
    assert item_changes(before, after, choices=k).forgotten == pytest.approx(0, abs=0.003)
    knew, knows = rng.random((2, n)) < 0.3  # independently of each other: 1 -> 0 is then lost knowledge, but for guess and guess
    before, after = (np.where(known, 1, rng.random(n) < 1 / k) for known in (knew, knows))
    guessed = (before == 1) & (after == 0) & ~knew & ~knows
    corrected = item_changes(before, after, choices=k)
    assert corrected.forgotten == pytest.approx(item_changes(before, after).forgotten - guessed.mean(), abs=0.003)


def test_items_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="the same items"):
        item_changes([1, 0], [1])
    with pytest.raises(ValueError, match="at least two choices"):
        item_changes([1, 0], [1, 0], choices=1)
