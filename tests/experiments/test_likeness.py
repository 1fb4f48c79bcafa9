"""How well unseen clients are told from participants, by hand."""

import math

import numpy as np
import pytest

from hyperjax.runs import likeness


def test_an_area_counts_pairs():
    assert likeness.auroc(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 1.0
    assert likeness.auroc(np.array([1.0, 2.0]), np.array([0.0, 2.0])) == 0.375
    assert likeness.auroc(np.ones(3), np.ones(5)) == 0.5
    assert math.isnan(likeness.auroc(np.array([1.0, np.nan]), np.ones(2)))


def test_a_participant_is_held_against_the_others():
    ours = np.array([[0.0], [2.0], [4.0]])
    among, away = likeness.distances(ours, np.array([[6.0], [2.0]]))
    # 0 beside 2 and 4, whose mean is 3 and whose deviation sqrt 2; 2 beside 0 and 4.
    np.testing.assert_allclose(among, [3 / math.sqrt(2), 0.0, 3 / math.sqrt(2)])
    np.testing.assert_allclose(away, [2.0, 0.0])


def test_how_far_out_a_client_is():
    ours = np.array([[0.0], [1.0], [2.0], [4.0]])
    assert likeness.strangeness(ours, np.array([1.8])) == 0.0
    assert likeness.strangeness(ours, np.array([9.0])) == 1.0
    assert likeness.strangeness(ours, np.array([2.5])) == 0.25  # but for that at 1


def test_clients_of_one_law_are_not_told_apart():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(400, 8)), rng.normal(size=(400, 8))
    assert likeness.auroc(*likeness.distances(ours, theirs)) == pytest.approx(
        0.5, abs=0.05
    )
    assert likeness.auroc(*likeness.distances(ours, 3 + theirs)) > 0.99


def test_signs_are_scored_that_are_there():
    one = {
        "confidence": np.array([0.9, 0.8, 0.9]),
        "energy": np.array([-5.0, -6.0, -7.0]),
    }
    two = {"confidence": np.array([0.5]), "energy": np.array([-8.0])}
    found = likeness.scores({"pacc": one, "zacc": two})
    assert found == {"auroc_confidence": 100.0, "auroc_energy": 0.0}
    one["shift_embedding"] = np.array([[0.0], [2.0], [4.0]])
    two["shift_embedding"] = np.array([[9.0]])
    assert likeness.scores({"pacc": one, "zacc": two})["auroc_embedding"] == 100.0
    assert likeness.scores({"pacc": one}) == {}
