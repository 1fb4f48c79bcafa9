"""HyperFL: what stays home, what a visit trains first, and the published numbers."""

import jax
import numpy as np
import pytest
from federated import NUM_CLASSES, make_local, tiny

from hyperjax import tree
from hyperjax.algorithms.hyperfl import hyperfl
from hyperjax.data.clients import withhold_labels
from hyperjax.engine import comm
from hyperjax.types import AdaptData, ClientData, Downlink

SMALL = dict(embedding_size=3, hidden_size=4)


def alg(**options):
    return hyperfl(tiny().model, local=make_local(), **{**SMALL, **options})


def test_the_hypernetwork_alone_is_sent():
    body = 16 * 4 + 4
    costs = comm.cost(comm.describe(alg()))
    assert costs.up_numbers == costs.down_numbers == (3 + 1) * 4 + (4 + 1) * body
    # As published: 64 -> 128, and 129 numbers for each of the extractor's.
    published = alg(embedding_size=64, hidden_size=128)
    assert comm.cost(comm.describe(published)).up_numbers == 8320 + 129 * body


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epochs", "still"), [((1, 0), ("hypernetwork", "embedding")), ((0, 1), ("head",))]
)
def test_phases_train_the_classifier_and_then_the_rest(epochs, still):
    ours = alg(head_epochs=epochs[0], body_epochs=epochs[1])
    key = jax.random.key(0)
    server = ours.server.init(key)
    down = ours.server.downlink(key, server, None)._replace(round=0)
    first = ours.client.init(key, key, down)
    data = ClientData(*(x[3] for x in tiny().table), tiny().pool)
    uplink, after, _ = jax.jit(ours.client.update)(key, down, first, data)
    changed = {
        name
        for name in ("embedding", "head")
        for k, x in first.kept.items()
        if name in k and np.any(x != after.kept[k])
    }
    changed |= {"hypernetwork"} if tree.norm(uplink.delta) > 0 else set()
    assert changed == {"hypernetwork", "embedding", "head"} - set(still)


def test_clients_have_embeddings_of_their_own():
    ours, key = alg(), jax.random.key(0)
    down = ours.server.downlink(key, ours.server.init(key), None)
    down = Downlink(*down[:2], 0)
    one, two = (ours.client.init(jax.random.key(i), key, down) for i in range(2))
    assert np.any(one.kept["params/embedding"] != two.kept["params/embedding"])
    np.testing.assert_array_equal(
        one.kept["params/head/kernel"], two.kept["params/head/kernel"]
    )
    data = ClientData(*(x[3] for x in tiny().table), tiny().pool)
    ready = ours.client.adapt(key, down, one, AdaptData(data, withhold_labels(data)))
    model = ours.client.model
    network = model.serve.export(ours.client.deploy(down, ready))
    shapes = jax.eval_shape(tiny().model.init, key)
    assert jax.tree.map(np.shape, network) == jax.tree.map(lambda x: x.shape, shapes)
    assert network["params"]["head"]["kernel"].shape[1] == NUM_CLASSES
