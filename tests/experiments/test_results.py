"""From per-client values to reported numbers, by hand."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from made_runs import undrawn

import hyperjax.protocols.common
from hyperjax.launch import train
from hyperjax.runs import reach, results


def values(**extra):
    """Two participants and two unseen clients; one test set."""
    two = dict(size=np.array([1, 3]), accuracy=np.array([1.0, 0.5]))
    one = dict(size=np.array([10]), accuracy=np.array([0.7]))
    return {
        "pacc": {**two, **extra},
        "zacc": {**two, **extra},
        "gacc": {**one, **{k: v[:1] for k, v in extra.items()}},
    }


def test_accuracies_are_percentages_weighted_by_samples():
    found = results.record(values())
    for metric in ("pacc", "zacc"):
        assert found[metric] == pytest.approx(62.5)
        assert found[f"{metric}_mean"] == pytest.approx(75.0)
        assert found[f"{metric}_std"] == pytest.approx(25.0)
        assert found[f"{metric}_p10"] == pytest.approx(55.0)
    assert found["gacc"] == found["gacc_mean"] == pytest.approx(70.0)
    assert len(found) == 12


@pytest.mark.parametrize("missing", [("zacc",), ("gacc",), ("zacc", "gacc")])
def test_what_a_federation_does_not_have_is_not_reported(missing):
    extra = embedded([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0])
    del extra["size"]
    whole = results.record(values(**extra))
    some = {k: v for k, v in values(**extra).items() if k not in missing}
    gone = (*missing, "collapse_novel") if "zacc" in missing else missing
    expected = {k: v for k, v in whole.items() if not k.startswith(gone)}
    assert results.record(some) == expected


def test_a_client_without_an_accuracy_leaves_its_population_without():
    nan = float("nan")
    found = results.record(values(accuracy=np.array([nan, 0.5])))
    assert np.isnan([found[f"zacc{k}"] for k in ("", "_mean", "_std", "_p10")]).all()
    assert found["zacc_not_finite"] == found["pacc_not_finite"] == 1
    assert found["gacc_not_finite"] == 1
    several = values()
    several["zacc"]["accuracy"] = np.array([1.0, nan])
    found = results.record(several)
    assert found["pacc"] == 62.5 and "pacc_not_finite" not in found
    assert results.not_finite(several, "_ft4") == (
        "not finite, so without a value: zacc_ft4 (outputs for 1 of 2 clients)"
    )
    assert results.not_finite(values()) is None


def test_controls_are_weighted_alike():
    found = results.record(
        values(
            accuracy_em=np.array([0.0, 1.0]),
            accuracy_oracle=np.array([1.0, 1.0]),
            accuracy_swapped=np.array([1.0, 0.0]),
            distance_swapped=np.array([0.1, 0.3]),
        )
    )
    assert found["pacc_em"] == pytest.approx(75.0)
    assert found["pacc_oracle"] == pytest.approx(100.0)
    assert found["pacc_swapped"] == pytest.approx(25.0)
    assert found["pacc_distance"] == pytest.approx(0.2)
    assert found["gacc_em"] == 0.0


def test_one_client_has_nobody_to_swap_with():
    found = results.record(
        values(accuracy_swapped=np.ones(2), distance_swapped=np.ones(2))
    )
    assert "zacc_swapped" in found and "zacc_distance" in found
    assert "gacc_swapped" not in found and "gacc_distance" not in found


def embedded(embedding, entropy):
    return dict(
        size=np.array([1, 3]),
        embedding=np.array(embedding),
        embedding_entropy=np.array(entropy),
    )


@pytest.mark.parametrize(
    ("embedding", "entropy", "expected"),
    [
        # Every input of a client says the same, and clients differ: H(1/4, 3/4).
        (
            [[1.0, 0.0], [0.0, 1.0]],
            [0.0, 0.0],
            -0.25 * math.log(0.25) - 0.75 * math.log(0.75),
        ),
        # Uniform everywhere: ln 2 - ln 2.
        ([[0.5, 0.5], [0.5, 0.5]], [math.log(2), math.log(2)], 0.0),
        # Sharp inputs, half of each kind at each client: ln 2 - 0, the maximum.
        ([[0.5, 0.5], [0.5, 0.5]], [0.0, 0.0], math.log(2)),
    ],
)
def test_collapse_by_hand(embedding, entropy, expected):
    found = results.collapse(embedded(embedding, entropy))
    assert found == pytest.approx(expected, abs=1e-9)


def test_collapse_of_embeddings_that_are_not_finite_is_not_nothing():
    nan = float("nan")
    for entropy in ([nan, 0.0], [0.0, 0.0]):
        embedding = [[1.0, 0.0], [0.0, 1.0]] if entropy[0] else [[nan, nan], [0, 1.0]]
        assert math.isnan(results.collapse(embedded(embedding, entropy)))


def test_collapse_is_reported_for_participants_and_unseen_clients():
    extra = embedded([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0])
    del extra["size"]
    found = results.record(values(**extra))
    assert found["collapse_participating"] == found["collapse_novel"] > 0.5
    assert not [name for name in found if "embedding" in name]


def test_rows_of_clients():
    federation = SimpleNamespace(
        num_clients=2, train=SimpleNamespace(size=np.array([5, 6]))
    )
    found = results.per_client(
        values(accuracy_em=np.array([0.5, 0.25]), loss=np.array([1.5, 2.5])), federation
    )
    assert [row["client"] for row in found] == [0, 1, 2, 3]
    assert found[1] == dict(
        client=1,
        participating=True,
        train_samples=6,
        eval_samples=3,
        accuracy=50.0,
        accuracy_em=25.0,
        loss=2.5,
    )
    assert found[3] == {
        **found[1],
        "client": 3,
        "participating": False,
        "train_samples": 0,
    }
    alone = {"pacc": values(loss=np.array([1.5, 2.5]))["pacc"]}
    assert [row["client"] for row in results.per_client(alone, federation)] == [0, 1]
    # Two of five participants, two of nine unseen ones.
    federation = SimpleNamespace(
        num_clients=5, train=SimpleNamespace(size=np.arange(10, 15))
    )
    whom = {"pacc": np.array([1, 4]), "zacc": np.array([0, 7])}
    rows = results.per_client(values(), federation, whom)
    assert [row["client"] for row in rows] == [1, 4, 5, 12]
    assert [row["train_samples"] for row in rows] == [11, 14, 0, 0]


# What a run makes of them -------------------------------------------------------------


def test_rounds_without_an_accuracy_are_passed_over():
    records = [
        dict(round=0, vacc=90.0, pacc=90.0),
        dict(round=5, vacc=None, pacc=None),
        dict(round=10, vacc=91.0, pacc=96.0, loss=0.5),
        dict(round=15, vacc=91.0, pacc=97.0),
    ]
    best = results.best_by_validation(records)
    assert best == dict(round=10, vacc=91.0, pacc=96.0)
    (first, *_, last) = reach.of_records(records, 100, (50, 60, 95))
    assert first["threshold"] == 50 and first["round"] == last["round"] == 9
    # Round 5 (index 4) says nothing, and the start is not counted.
    assert (first["missed"], first["least_cost"], first["cost"]) == (-1, 0, 900)
    assert results.best_by_validation([dict(round=0, vacc=None)]) is None


def test_the_outcome_in_words():
    summary = dict(pacc=62.5, pacc_mean=75.0, zacc=None, zacc_mean=None, gacc=1.0)
    assert train.outcome(summary) == (
        "gACC 1.00, pACC 62.50, zACC -\nmeans over clients: pACC 75.00, zACC -"
    )
    assert train.outcome(dict(pacc=50.0)) == "pACC 50.00"


def test_copies_that_diverge_while_fine_tuned_have_no_accuracy(tmp_path, caplog):
    config = hyperjax.protocols.common.defaults()
    config.method = dict(name="fedavg", keep=())
    config.rounds, config.tensorboard = 0, False
    config.data.update(name="synthetic", num_clients=2, num_novel=1, min_size=4)
    config.model.hidden = (4,)
    config.engine.devices = 1
    config.local.update(batch_size=8, learning_rate=1e30)
    config.evaluation.finetune_epochs = (0, 3)
    with undrawn(), caplog.at_level("WARNING", logger="absl"):
        summary = train.train(config, str(tmp_path / "run"))
    whole = json.loads((tmp_path / "run" / "summary.json").read_text())
    for found in (summary, whole):
        assert found["pacc"] is not None and found["pacc_ft0"] is not None
        for name in ("pacc_ft3", "pacc_ft3_mean", "zacc_ft3", "zacc_ft3_mean"):
            assert found[name] is None
        assert found["pacc_ft3_not_finite"] == 2 and found["zacc_ft3_not_finite"] == 1
    (warning,) = [
        r.getMessage() for r in caplog.records if "not finite" in r.msg % r.args
    ]
    assert "round 0" in warning
    assert "pacc_ft3 (outputs for 2 of 2 clients)" in warning
    assert "zacc_ft3 (outputs for 1 of 1 clients)" in warning
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<td" in page and "None" not in page and "nan" not in page.lower().split()
