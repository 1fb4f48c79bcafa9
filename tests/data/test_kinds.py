"""Samples that are no images: features of a table, and tokens of a text."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperjax as hj
from hyperjax import models
from hyperjax.algorithms.hyperfednet import hyperfednet
from hyperjax.algorithms.hyperfedshift import hyperfedshift
from hyperjax.algorithms.hyperfedzero import hyperfedzero
from hyperjax.algorithms.opt1 import opt1
from hyperjax.data import arrays, clients, sources
from hyperjax.data.own import from_clients
from hyperjax.hypernets.embedding import Trunk, distribution_embedding
from hyperjax.training import Local

DRAW = np.random.default_rng(0)
Y = np.arange(60) % 3
FEATURES = (DRAW.normal(size=(60, 4)) + 2 * Y[:, None]) * [1, 1e-5, 1e3, 1]
TOKENS = (DRAW.integers(3, size=(60, 5)) + 3 * Y[:, None]).astype(np.int64)


class Words(nn.Module):
    """A network of one's own: `nn.Embed` takes integers alone."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes, name="head")(nn.Embed(9, 4)(x).mean(1))


class Columns(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(x)


def train(data, network, method="fedavg", **options):
    return hj.run(
        method,
        network,
        data,
        rounds=3,
        optimizer=optax.sgd(1.0),
        batch_size=8,
        every=3,
        progress=False,
        **options,
    )


@pytest.mark.parametrize(
    ("name", "rows", "columns", "classes"),
    [("breast_cancer", 569, 30, 2), ("iris", 150, 4, 3), ("wine", 178, 13, 3)],
)
def test_tables_of_scikit_learn(name, rows, columns, classes):
    found = hj.load(f"sklearn:{name}")
    assert found.x.shape == (rows, columns) and found.x.dtype == np.float32
    assert found.num_classes == classes == len(set(found.y.tolist()))
    what = f"{rows} rows of {columns} features, {classes} classes"
    assert repr(found) == f"Source('sklearn:{name}', {what})"


def test_the_text_that_comes_with_python_goes_on():
    found = hj.load("pydoc")
    assert found.x.shape == (len(found.y), 32) and found.x.dtype == np.int32
    text = bytes(found.x[found.client_ids == "assert"][0].tolist()).decode()
    assert text == 'The "assert" statement\n*********'
    assert found.label_names[found.y[found.client_ids == "assert"][0]] == "*"
    assert len(np.unique(found.client_ids)) > 70
    with pytest.raises(ValueError, match=r"accepted: .*'?sklearn:wine"):
        hj.load("sklearn:nothing")


def test_each_column_is_scaled_by_training_samples_and_constants_are_not():
    x = np.concatenate([FEATURES, np.full((60, 1), 7.1)], axis=1)
    data = hj.federate(x, Y, num_clients=3, test_fraction=0.5)
    rows = np.concatenate(
        [r[:n] for r, n in zip(data.train.rows, data.train.size, strict=True)]
    )
    seen = clients.gather(data.pool, jnp.asarray(rows), jnp.ones(len(rows))).x
    np.testing.assert_allclose(seen.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(seen.std(0), [1, 1, 1, 1, 0], atol=1e-4)
    assert repr(data) == "Federation(3 clients, 60 rows of 5 features, 3 classes)"


def test_a_client_may_be_scaled_by_its_own_columns():
    data = hj.federate(FEATURES, Y, num_clients=3, standardise="client")
    rows = jnp.asarray(data.train.rows[1, : data.train.size[1]])
    all_ = np.concatenate([rows, data.held_out.rows[1, : data.held_out.size[1]]])
    seen = clients.gather(data.pool, jnp.asarray(all_), jnp.ones(len(all_))).x
    np.testing.assert_allclose(seen.std(0), 1, atol=1e-4)
    alone = clients.pool_of_one(FEATURES[all_].astype(np.float32), *data.pool[2:4])
    again = clients.gather(alone, jnp.arange(len(all_)), jnp.ones(len(all_))).x
    np.testing.assert_allclose(again, seen, rtol=1e-4, atol=1e-4)


def test_whole_numbers_are_what_one_says_they_are():
    for given in (TOKENS, TOKENS.astype(np.uint8), TOKENS > 3):
        with pytest.raises(ValueError, match="kind='tokens', 'features' or 'images'"):
            hj.federate(given, Y, num_clients=3)
    tokens = hj.federate(TOKENS, Y, num_clients=3, kind="tokens")
    assert tokens.pool.x.dtype == jnp.int32 and tokens.vocabulary == 9
    assert repr(tokens) == "Federation(3 clients, 60 texts of 5 tokens, 3 classes)"
    assert np.array_equal(
        clients.gather(tokens.pool, jnp.arange(60), jnp.ones(60)).x, TOKENS
    )
    columns = hj.federate(TOKENS, Y, num_clients=3, kind="features")
    assert columns.pool.x.dtype == jnp.float32 and columns.vocabulary == 0
    by_id = from_clients({"a": (TOKENS, Y), "b": (TOKENS, Y)}, kind="tokens")
    assert by_id.x.shape == (120, 5) and by_id.x.dtype == np.int32


def test_flat_images_are_square_again():
    x = DRAW.integers(0, 256, (60, 36)).astype(np.uint8)
    for given in (x, x.tolist(), x / 255):
        found = from_clients({"a": (given, Y)}, kind="images").x
        assert found.shape == (60, 6, 6, 1)
        assert found.dtype == (np.float32 if found.max() <= 1 else np.uint8)
        np.testing.assert_allclose(found.reshape(60, 36), given, rtol=1e-6)


def test_texts_are_their_bytes():
    found = sources.from_arrays(["ab", "c", "é"], [0, 1, 0])
    assert found.x.tolist() == [[97, 98], [99, 0], [195, 169]]
    parts = {"x": (["to be", "or"], ["a", "b"]), "y": (["not"], ["a"])}
    assert from_clients(parts).x.shape == (3, 5)


@pytest.mark.parametrize(
    ("x", "kind", "words"),
    [
        (FEATURES, "words", "kind='words' is unknown"),
        (np.zeros((3, 2, 2)), "tokens", r"kind='tokens': x has the shape \(3, 2, 2\)"),
        (FEATURES, "tokens", None),  # floats are no tokens, and say so
        (np.full((3, 2), np.nan), "", "not finite"),
        (np.full((3, 2), -1), "tokens", "holds the token -1"),
        (np.zeros((3, 0)), "", "nothing in it"),
        (np.zeros((3, 5)), "images", "and square, and 5 is no square number"),
    ],
)
def test_what_is_neither_is_refused(x, kind, words):
    with pytest.raises(ValueError, match=words or "floats are no tokens"):
        sources.from_arrays(x, np.zeros(len(x), int), kind=kind)


def test_a_source_of_ones_own_says_it_by_the_type():
    names = ("a", "b", "c")
    checked = arrays.checked(hj.Source("t", TOKENS.astype(np.int32), Y, 3, names))
    assert sources.vocabulary(checked.x) == 9
    with pytest.raises(ValueError, match=r"tokens int32, x.astype\(np.int32\)"):
        arrays.checked(hj.Source("t", TOKENS, Y, 3, names))


def test_files_hold_them_too(tmp_path):
    path = str(tmp_path / "mine.npz")
    np.savez(path, x=FEATURES, y=Y)
    assert hj.load(path).x.dtype == np.float32
    np.savez(path, x=TOKENS, y=Y)
    with pytest.raises(ValueError, match=r"in a config data\.kind"):
        hj.load(path)
    assert hj.load(path, keys=arrays.Keys(kind="tokens")).x.dtype == np.int32


def test_what_is_done_to_images_is_refused():
    data = dict(num_clients=3)
    with pytest.raises(ValueError, match="shift='rotation' is done to images; 'arrays"):
        hj.federate(FEATURES, Y, shift="rotation", **data)
    with pytest.raises(ValueError, match=r"standardise='client': .* no moments"):
        hj.federate(TOKENS, Y, kind="tokens", standardise="client", **data)
    with pytest.raises(ValueError, match=r"standardise='signed' is of images and .*"):
        hj.federate(FEATURES, Y, standardise="signed", **data)
    with pytest.raises(ValueError, match="178 rows of 13 features, and no pixels"):
        sources.shrink(hj.load("sklearn:wine"), 2)


def test_a_network_must_know_the_tokens():
    with pytest.raises(ValueError, match="knows vocabulary=8 different tokens"):
        models.from_linen(models.GRU(3, vocabulary=8), (5,), 3, vocabulary=9)
    with pytest.raises(ValueError, match=r"takes tokens, .* the data have none"):
        models.from_linen(models.GRU(3), (5,), 3)
    with pytest.raises(ValueError, match=r"tokens have the shape \(L,\)"):
        models.from_linen(Words(), (5, 5, 1), 3, vocabulary=9)


def test_the_recurrent_network_reads_in_order_and_knows_no_unknown_tokens():
    model = models.from_linen(models.GRU(3, 9, 2, 4), (5,), 3, vocabulary=9)
    variables = model.init(jax.random.key(0))
    x = jnp.array([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [9, 1, 2, 3, 4]], jnp.float32)
    first, turned, unknown = np.asarray(model.predict(variables, x))
    assert not np.allclose(first, turned) and np.isfinite(unknown).all()


def test_the_extractor_looks_at_which_tokens_there_are():
    trunk = Trunk(9)
    x = jnp.array([[0, 1, 2, 2], [2, 1, 2, 0], [0, 1, 2, 3]], jnp.float32)
    variables = trunk.init(jax.random.key(0), x)
    first, turned, other = np.asarray(trunk.apply(variables, x))
    assert np.array_equal(first, turned) and not np.allclose(first, other)
    sizes = jax.eval_shape(distribution_embedding((4,), 9).init, jax.random.key(0))[
        "trunk"
    ]["Dense_0"]["kernel"]
    assert sizes.shape == (9, 32)


@pytest.fixture(scope="module")
def read():
    """A run on tokens, with a network of one's own."""
    data = hj.federate(TOKENS, Y, num_clients=3, num_novel=1, kind="tokens")
    return train(data, Words())


def test_a_run_on_tokens_is_served_and_exported(read, tmp_path):
    assert read.scores()["zacc"] > 60
    rows = TOKENS[:4]
    found = read.predict(3, rows)
    assert np.array_equal(found, read.predict(None, rows.astype(np.uint8)))
    for wrong in (rows.astype(float), rows[:, :2], rows - 1):
        with pytest.raises(ValueError, match=r"x (is|holds)"):
            read.predict(3, wrong)
    path = read.export(tmp_path / "client", 0)
    with np.load(path) as file:
        assert '"preprocessing": {"formula": "x"}' in str(file["header"])
        kernel, bias = file["params/head/kernel"], file["params/head/bias"]
        logits = file["params/Embed_0/embedding"][rows].mean(1) @ kernel + bias
    assert np.array_equal(logits.argmax(-1), read.predict(0, rows))


def test_a_run_on_features_is_served_too(tmp_path):
    data = hj.federate(FEATURES, Y, num_clients=3, num_novel=1)
    run = train(data, Columns())
    assert run.scores()["zacc"] > 60
    assert run.predict(3, FEATURES[:4]).shape == (4,)


def test_methods_of_images_alone_say_so_and_hyperfedzero_is_none():
    local = Local(optax.sgd(0.1), 8)
    small = dict(hidden=(4,), chunk_size=32, embedding_size=2)
    for network, shape, vocabulary in (
        (models.MLP(3, (4,)), (4,), 0),
        (models.GRU(3, 9, 2, 4), (5,), 9),
    ):
        model = models.from_linen(network, shape, 3, vocabulary=vocabulary)
        algorithm = hyperfedzero(model, local=local, **small)
        assert algorithm.messages().uplink  # it can be traced as a whole
        assert algorithm.client.model.vocabulary == vocabulary
        with pytest.raises(ValueError, match="HyperFedShift is for images"):
            hyperfedshift(model, local=local)
        with pytest.raises(ValueError, match="made of tiles"):
            hyperfednet(model, local=local)
    with pytest.raises(ValueError, match="tokens, which a condition cannot be joined"):
        opt1(model, local=local)


def test_lists_of_bytes_are_images_of_bytes():
    x = np.arange(48).reshape(3, 4, 4)
    found = hj.federate(x.tolist() * 4, [0, 1, 2] * 4, num_clients=2)
    assert found.pool.x.dtype == np.uint8
    np.testing.assert_array_equal(found.pool.x[:3, ..., 0], x)
    with pytest.raises(ValueError, match=r"int64.*then x.astype\(np.uint8\)$"):
        hj.federate(x, [0, 1, 2], num_clients=1)
    with pytest.raises(ValueError, match="or float: scale them to 0 to 255"):
        hj.federate((x + 300).tolist(), [0, 1, 2], num_clients=1)
    with pytest.raises(ValueError, match=r"source is tuple.*federate\(x, y, ...\)"):
        hj.federate((x, [0, 1, 2]), num_clients=1)
