"""A run as an object: what a notebook needs from `import hyperjax` alone."""

import os
import subprocess
import sys

import federated
import flax.linen as nn
import numpy as np
import optax
import pytest

import hyperjax as hj
from hyperjax import tree
from hyperjax.runs import loop
from hyperjax.runs.experiment import Settings


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(4)(x)))


def arrays():
    """Images [n, H, W] whose classes have names."""
    source = hj.load("synthetic", num_samples=90, num_classes=3, shape=(4, 4, 1))
    return source.x[..., 0], np.array(["ant", "bee", "cat"])[source.y]


@pytest.fixture(scope="module")
def data():
    return hj.federate(*arrays(), num_clients=4, num_novel=2, seed=1)


@pytest.fixture(scope="module")
def few():
    """Of participants alone: fewer programs evaluate them."""
    return participants()


def participants(**options):
    return hj.federate(*arrays(), num_clients=4, seed=1, test_fraction=0.0, **options)


def train(data, method="ditto", network=None, rounds=2, **options):
    options = dict(optimizer=optax.sgd(0.1), batch_size=8, every=1) | options
    network = Net() if network is None else network
    return hj.run(method, network, data, rounds=rounds, progress=False, **options)


@pytest.fixture(scope="module")
def run(data):
    return train(data)


def same_state(one, other):
    carries = one.state.carry, other.state.carry
    return tree.sha256(carries[0]) == tree.sha256(carries[1])


def test_scores_and_curves(run):
    assert {"gacc", "pacc", "zacc", "pacc_mean", "zacc_em"} <= run.scores().keys()
    assert list(run.curves.index) == [0, 1, 2]
    assert run.curves.pacc[2] == pytest.approx(run.scores()["pacc"], rel=1e-5)
    assert repr(run).startswith("Run(ditto, 4 clients + 2 unseen, round 2, gACC ")


@pytest.mark.parametrize("client", [3, 5, None])
def test_the_networks_variables_predict_what_the_run_does(run, data, client):
    images, _ = arrays()
    x = (images[:9, ..., None] / 255 - data.pool.mean) / data.pool.std
    logits = Net().apply(run.variables(client), np.float32(x))
    np.testing.assert_array_equal(run.predict(client, images[:9]), logits.argmax(-1))
    shares = run.probabilities(client=client, x=images[:9])
    np.testing.assert_allclose(shares, nn.softmax(logits), rtol=1e-5)


class Sure(nn.Module):
    """A network whose first logit is always the same."""

    value: float

    @nn.compact
    def __call__(self, x):
        return Net()(x).at[:, 0].set(self.value)


def test_infinite_logits_rule_a_class_out_and_nothing_in(few):
    x = arrays()[0][:9]
    without = train(few, "fedavg", Sure(-np.inf), rounds=0)
    assert (without.probabilities(None, x)[:, 0] == 0).all()
    certain = train(few, "fedavg", Sure(np.inf), rounds=0)
    with pytest.raises(FloatingPointError, match="outputs for x are not finite"):
        certain.predict(None, x)


def test_a_client_is_served_the_network_that_was_scored(run, data):
    rows = data.held_out.rows[1, : data.held_out.size[1]]
    right = run.predict(1, np.asarray(data.pool.x)[rows]) == data.pool.y[rows]
    seed, (round, carry) = 0, run.state
    values = run.experiment.evaluator.evaluate(seed, carry, round)
    assert np.mean(right) == pytest.approx(values["pacc"]["accuracy"][1])


def test_somebodys_samples_are_scored_by_names_or_numbers(run, tmp_path):
    """From a run and from its folder; and its file is that of the run's own export."""
    x, y = arrays()
    right = 100 * np.mean(np.array(["ant", "bee", "cat"])[run.predict(5, x)] == y)
    assert hj.evaluate(run, x, y, client=5) == {"accuracy": pytest.approx(right)}
    numbers = np.searchsorted(["ant", "bee", "cat"], y)
    run.save(tmp_path / "run")
    found = hj.evaluate(tmp_path / "run", x, numbers, client=5)
    assert found == {"accuracy": pytest.approx(right)}
    assert hj.evaluate(run) == run.scores()
    path = hj.export(run, tmp_path / "five", client=5)
    assert path == tmp_path / "five.npz" and "five.npz" in os.listdir(tmp_path)
    for labels, words in (
        (y[:-1], "x has 90 samples, y 89"),
        (np.where(y == "ant", "dog", y), "y has 'dog'; classes of this run: ant, bee"),
        (numbers + 1, "y has '"),
        (None, "give x and y"),
    ):
        with pytest.raises(ValueError, match=words):
            hj.evaluate(run, x, labels)


def test_going_on_is_having_gone_on(run, data):
    longer = run.resume(3, progress=False)
    assert run.state.round == 2 and longer.state.round == 3
    assert same_state(longer, train(data, rounds=3))
    run.scores()  # its state is not consumed
    with pytest.raises(ValueError, match=r"rounds=1: the run has 2 behind it"):
        run.resume(1)


@pytest.mark.slow
def test_a_saved_run_is_loaded_in_another_process(run, tmp_path):
    run.save(tmp_path / "run")
    images, _ = arrays()
    np.save(tmp_path / "x.npy", images[:5])
    program = """
import sys, numpy, hyperjax
run = hyperjax.load_run(sys.argv[1] + "/run")
print(run)
print(*run.predict(4, numpy.load(sys.argv[1] + "/x.npy")))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},  # Net is here
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == repr(run)
    assert second == " ".join(map(str, run.predict(4, images[:5])))
    again = hj.load_run(tmp_path / "run")
    assert same_state(run, again) and again.records == run.records
    with pytest.raises(ValueError, match="not a new or empty folder"):
        run.save(tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds no run \(neither run.json"):
        hj.load_run(tmp_path)


@pytest.mark.slow
def test_several_networks(data):
    run = train(data, "local_only", {"small": Net(), "zoo": "mlp"}, rounds=0)
    assert run.experiment.members.names == ("small", "zoo")
    assert "head" in run.variables(0)["params"] and run.predict(3, arrays()[0]).size


def test_methods_of_ones_own_and_ready_ones(few):
    def mine(model, *, local, rate: float = 0.5):
        return hj.fedavg(model, local=local)

    named = train(few, mine, rounds=1, rate=0.1)
    model = hj.from_linen(Net(), (4, 4, 1), 3)
    ready = hj.fedavg(model, local=hj.Local(optax.sgd(0.1), 8))
    given = hj.run(ready, data=few, rounds=1, progress=False)
    assert same_state(named, given)
    with pytest.raises(ValueError, match="an Algorithm has its own"):
        hj.run(ready, Net(), few, rounds=1)


def test_deployed_clients_adapt_to_their_inputs(few):
    adapted = train(few, "fedavg", rounds=0, adapt="t3a")
    found = adapted._deploy(3, adapted._inputs(few.pool.x[:5]))
    assert found.variables["memory"].keys() == {"supports"}


def test_participants_images_may_be_turned_once_more(few):
    plain, *turned = (
        train(few, "fedavg", rounds=1, augment=text) for text in ("", *["rotation"] * 2)
    )
    assert same_state(*turned) and not same_state(plain, turned[0])


def test_weights_belong_to_the_method(few):
    assert hj.registry.traits("scaffold").weights == "uniform"
    run = train(few, "scaffold", rounds=0)
    assert run.recipe.engine["weights"] == "uniform"
    # And of a fusion to its base, given by name with options or by a path.
    weights, base = hj.registry.weights, "hyperjax.algorithms.scaffold:scaffold"
    for name in ("scaffold", "feddyn(alpha=0.1)", base):
        assert weights("hyperfednet", {"base": name}) == "uniform"
    assert weights("hyperfednet", {}) == weights(hj.fedavg, {"base": 3}) == "size"
    with pytest.raises(ValueError, match=r"base='scafold' is unknown; .*'scaffold'"):
        weights("hyperfednet", {"base": "scafold"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(method="dito"), "did you mean 'ditto'"),
        (dict(lamb=1.0), r"option='lamb' is unknown; did you mean 'lam'"),
        (dict(lam="much"), "method.lam='much' must be a finite number"),
        (dict(network=object()), "^<object> is not an instance of a flax.linen module"),
        (dict(network="mpl"), "network='mpl' is unknown; did you mean 'mlp'"),
        (dict(network=[Net(), Net()]), "needs one network for all clients"),
        (dict(local=hj.Local(optax.sgd(0.1), 8)), "give optimizer, or local"),
        (dict(optimizer=optax.sgd), r"optimizer=sgd must be made, such as optax\.sgd"),
        (dict(rounds=-1), "rounds=-1 must be"),
        (dict(uplink="topq(fraction=1)"), "uplink='topq' is unknown"),
        (dict(augment="rotatoin"), "augment='rotatoin' is unknown; did you mean"),
        (dict(adapt="t4a"), "adapt='t4a' is unknown; did you mean 't3a'"),
        (dict(adapt="bbse"), "validation_fraction above 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(data, change, message):
    with pytest.raises(ValueError, match=message):
        train(data, **change)


def test_data_and_clients_that_are_none(run, data):
    with pytest.raises(
        ValueError, match=r"data is Source; accepted: what hyperjax.fed"
    ):
        train(hj.load("digits"))
    with pytest.raises(ValueError, match=r"client=9: participants are 0\.\.3, unseen"):
        run.predict(9, arrays()[0])
    with pytest.raises(ValueError, match=r"x is float32 .*this run takes uint8 \[n, 4"):
        run.predict(0, np.zeros((2, 4, 4)))


def test_float_images_on_any_scale_are_normalised():
    x, y = arrays()
    bytes_, floats = (
        hj.federate(images, y, num_clients=3).pool for images in (x, x / 255.0 * 7 - 3)
    )
    assert floats.x.dtype == np.float32 and floats.x.shape == (90, 4, 4, 1)
    np.testing.assert_allclose(floats.mean, bytes_.mean * 7 - 3, rtol=1e-5)
    np.testing.assert_allclose(floats.std, bytes_.std * 7, rtol=1e-5)
    rows, mask = np.arange(5), np.ones(5, np.float32)
    of = (hj.data.clients.gather(pool, rows, mask).x for pool in (bytes_, floats))
    np.testing.assert_allclose(next(of), next(of), atol=1e-4)


def test_an_interrupted_run_comes_back_as_far_as_it_came(run, monkeypatch):
    really = loop.rounds

    def interrupted(*args):
        yield next(really(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "rounds", interrupted)
    stopped = run.resume(9, progress=False)
    assert stopped.state.round == 3 and len(stopped.records) == 4


def test_calls_end_on_a_grid():
    settings = Settings(rounds=23, every=10, rounds_per_call=4)
    stops, round = [], 0
    while round < 23:
        round = loop.next_stop(settings, round)
        stops.append(round)
    assert stops == [4, 8, 10, 14, 18, 20, 23]
    assert loop.next_stop(settings, 9) == 10
    assert [r for r in range(24) if loop.is_due(settings, r)] == [0, 10, 20, 23]


def test_every_method_is_an_attribute_of_the_package():
    assert hj.methods() == federated.METHODS
    assert all(callable(getattr(hj, name)) for name in hj.methods())
    assert {"mlp", "lenet", "gru"} < set(hj.networks())
    assert {"dirichlet", "iid"} < set(hj.partitions())
    # All of them are there at once.
    names = hj.data_sets()
    assert {"digits", "pydoc"} < set(names)
    assert all(hj.load(name).num_classes > 1 for name in names)
    assert "fedprox" in dir(hj) and not hasattr(hj, "fedprx")


def test_samples_may_stay_in_host_memory(few):
    options = dict(method="fedavg", cohort_size=2, every=2)
    found = train(participants(pool="host"), **options)
    assert same_state(found, train(few, **options))
    x = arrays()[0][:3]
    flat = found.predict(3, x.reshape(3, -1))
    np.testing.assert_array_equal(flat, found.predict(3, x))
