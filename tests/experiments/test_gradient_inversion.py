"""The study of gradient inversion: its networks, attackers, records and mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import gradient_inversion as study
from hyperjax import attacks, rng, tree
from hyperjax.data.sources import Source

SHAPE, CLASSES = (8, 8, 1), 4
SMALL = study.Scale(images=3, steps=2, restarts=2, embedding_size=8)


@pytest.mark.parametrize(
    ("n", "shape", "numbers"),
    [(64, (28, 28, 1), 69_420), (128, (32, 32, 3), 236_844)],
)
def test_what_hyperfednet_sends(n, shape, numbers):
    model = study.network("hyperfednet", shape, 10, n)
    params = jax.jit(model.init)(jax.random.key(0))["params"]
    sent, kept = attacks.victim(model, study.GENERATOR).split(params)
    assert tree.count(sent) == numbers
    plain = study.network("fedavg", shape, 10, n)
    whole = jax.eval_shape(plain.init, jax.random.key(0))["params"]
    made = 2 * 12 * 12 * 5 * 5
    assert tree.count(kept) == tree.count(whole) - made + 2 * n
    # Nothing but the two kernels is made, and they vary as the plain ones do.
    exported = model.serve.export({"params": params, "stats": {}})["params"]
    for name in ("conv2", "conv3"):
        kernel = np.asarray(exported[name]["kernel"])
        np.testing.assert_allclose(kernel.std(), 12**-0.5, rtol=0.35)


def test_what_hyperfl_sends():
    model = study.network("hyperfl", (28, 28, 1), 10, 64)
    params = jax.jit(model.init)(jax.random.key(0))["params"]
    sent, kept = attacks.victim(model, study.SENT["hyperfl"]).split(params)
    exported = model.serve.export({"params": params, "stats": {}})["params"]
    head = exported.pop("head")
    made = np.concatenate([np.ravel(x) for x in jax.tree.leaves(exported)])
    assert made.size == 312 + 2 * 3_612
    assert tree.count(sent) == 64 * 128 + 128 + 129 * made.size
    assert tree.count(kept) == tree.count(head) + 64
    np.testing.assert_allclose(made.std(), 12**-0.5, rtol=1e-4)


def test_what_hyperfl_sends_holds_the_gradient_of_the_network_that_it_makes():
    """The numbers made are linear in the last biases, one each."""
    plain, model = (study.network(m, SHAPE, CLASSES, 8) for m in ("fedavg", "hyperfl"))
    victims = attacks.victim(plain), attacks.victim(model, study.SENT["hyperfl"])
    x, target = keys_and_images(1)[1][0], jax.nn.one_hot(1, CLASSES)

    @jax.jit
    def both(key):
        params = model.init(key)["params"]
        made = model.serve.export({"params": params, "stats": {}})["params"]
        parts = victims[0].split(made), victims[1].split(params)
        return [v.gradient(*p, x, target) for v, p in zip(victims, parts, strict=True)]

    network, sent = both(jax.random.key(0))
    for path in ("conv1/kernel", "conv2/bias", "conv3/kernel"):
        own = sent[f"hypernetwork/heads/{path}/bias"].reshape(network[path].shape)
        np.testing.assert_allclose(own, network[path], rtol=1e-5, atol=1e-7)


def keys_and_images(num):
    keys = rng.client_keys(jax.random.key(5), jnp.arange(num))
    x = jax.random.uniform(jax.random.key(6), (num, *SHAPE))
    return keys, x, jnp.arange(num, dtype=jnp.int32) % CLASSES


@pytest.mark.slow
def test_a_generators_gradient_gives_the_image_away_to_who_knows_the_rest():
    scale = SMALL._replace(steps=150, restarts=1)
    attack = study.ATTACKS["HFN, white box"]
    run = jax.jit(study.attacker(attack, SHAPE, CLASSES, scale))
    found = [run(*one) for one in zip(*keys_and_images(4), strict=True)]
    values = np.array([psnr for _, psnr, _, _ in found])
    assert np.sum(values > study.RECOVERED) >= 3, values
    right = [bool(named) for _, psnr, _, named in found if psnr > study.RECOVERED]
    assert all(right)


def test_one_step_of_several_is_the_gradient():
    """The mean gradient of one step, by way of the parameters that it leads to."""
    model = study.network("hyperfednet", SHAPE, CLASSES, 8)
    victim = attacks.victim(model, study.GENERATOR)
    target = jax.nn.one_hot(1, CLASSES)
    x = keys_and_images(1)[1][0]

    @jax.jit
    def both(key):
        parts = victim.split(model.init(key)["params"])
        after, _ = victim.step(*parts, x, target, study.RATE)
        moved = jax.tree.map(lambda a, b: (a - b) / study.RATE, parts[0], after)
        return moved, victim.gradient(*parts, x, target)

    moved, gradient = both(jax.random.key(0))
    for path, leaf in gradient.items():
        np.testing.assert_allclose(moved[path], leaf, rtol=1e-3, atol=1e-5)


def test_a_stopped_study_continues(tmp_path, monkeypatch, capsys):
    shape = (CLASSES * 2, *SHAPE)
    x = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    source = Source("x", x, np.arange(8) % CLASSES, CLASSES, tuple("abcd"))
    label = "FedAvg, iDLG"
    first = study.inverted(label, source, SMALL, tmp_path)
    assert "image 3/3 | PSNR" in capsys.readouterr().err
    monkeypatch.setattr(study, "attacker", None)
    again = study.inverted(label, source, SMALL, tmp_path)
    assert not any(capsys.readouterr())
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
    with pytest.raises(TypeError):  # of another scale nothing is there
        study.inverted(label, source, SMALL._replace(steps=3), tmp_path)
    rows = np.random.default_rng(0).permutation(8)[:3]
    np.testing.assert_allclose(first["x"], x[rows] / 255.0, rtol=1e-6)
    assert first["label_right"].all()  # read off, not looked for
    row = study.row_of(label, first)
    np.testing.assert_allclose(row["psnr"][0], first["psnr"].mean(), rtol=1e-5)
    assert row["label_right"] == 100.0 and len(row["per_image"]) == 3
    assert "FedAvg, iDLG" in study.as_text({"rows": [row]})
    text = study.gallery({label: first})
    assert text.startswith("<svg") and text == study.gallery({label: first})
