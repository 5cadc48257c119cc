"""Figures checked against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from core.evaluation.metrics import distinct, entropy, mean_length, ngrams, slope


def test_ngrams_do_not_cross_texts() -> None:
    assert ngrams(["a b c", "c d"], 2) == {("a", "b"): 1, ("b", "c"): 1, ("c", "d"): 1}
    assert ngrams(["a"], 2) == {}


def test_entropy_of_equal_counts_is_their_logarithm() -> None:
    assert entropy(["a b c d"], 1) == pytest.approx(math.log(4))
    assert entropy(["a a a"], 1) == 0
    assert entropy(["a b", "a b", "c d", "e f"], 2) == pytest.approx(-0.5 * math.log(0.5) - 0.5 * math.log(0.25))
    assert entropy([]) == 0


def test_distinct_is_a_share() -> None:
    assert distinct(["a b", "a b"], 1) == 0.5
    assert distinct(["a b c"], 2) == 1
    assert distinct([], 1) == 0


def test_length_and_slope() -> None:
    assert mean_length(["a b c", "d"]) == 2
    assert mean_length([]) == 0
    assert slope([1, 3, 5]) == pytest.approx(2)
    assert slope([4]) == 0
