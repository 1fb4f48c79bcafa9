"""pFedLHN is pFedHN of another hypernetwork, and the published numbers."""

import chex
import federated
import jax
import jax.numpy as jnp
import numpy as np
import optax
import quadratics as q

from hyperjax import tree
from hyperjax.algorithms.pfedhn import pfedhn
from hyperjax.algorithms.pfedlhn import SPREAD, pfedlhn
from hyperjax.engine import comm
from hyperjax.models import ZOO, from_linen

PLAIN = optax.sgd(0.02, momentum=0.9)


def alike():
    """Both methods where their hypernetworks are one: a row for all, bases of unity."""
    common = dict(local=q.training(q.DECAYING), num_clients=q.N, server_opt=PLAIN)
    common["clip_norm"] = 0.5
    layered = pfedlhn(
        q.model(),
        num_bases=2,
        basis_size=2,
        hidden_size=3,
        one_row=True,
        freeze="bases",
        **common,
    )
    plain = pfedhn(
        q.model(),
        embedding_size=2,
        hidden_size=3,
        num_hidden=0,
        weight_decay=0.0,
        **common,
    )
    return layered, plain


def test_with_one_row_and_bases_of_unity_it_is_pfedhn():
    layered, plain = alike()
    start = q.start(plain)
    theirs = q.start(layered)
    phi = {
        "bases": jnp.eye(2),
        "trunk": start.server.phi["trunk"]["Dense_0"],
        "heads": start.server.phi["heads"],
    }
    server = theirs.server._replace(phi=phi, table=start.server.table)
    found = q.play(layered, *q.PARTIAL, state=theirs._replace(server=server)).server
    expected = q.play(plain, *q.PARTIAL, state=start).server
    np.testing.assert_array_equal(found.phi["bases"], np.eye(2))
    chex.assert_trees_all_close(found.table, expected.table, **q.CLOSE)
    chex.assert_trees_all_close(found.phi["heads"], expected.phi["heads"], **q.CLOSE)
    moved = tree.norm(tree.sub(expected.phi["heads"], phi["heads"]))
    assert moved > 0.01


def test_published_numbers():
    model = from_linen(ZOO["pfedhn_cnn"](10), (32, 32, 3), 10)
    local = federated.make_local()
    messages = comm.describe(pfedlhn(model, local=local, num_clients=50))
    cost = comm.cost(messages)
    assert cost.down_numbers == cost.up_numbers == 121_182
    # The network has ten tensors: 50 numbers a client.
    assert messages.server.table.shape == (50, 10 * 5)
    sizes = 5 * 40 + (40 + 1) * 128 + (128 + 1) * 121_182
    assert tree.count(messages.server.phi) == sizes


def test_clients_start_close_to_each_other():
    alg = pfedlhn(q.model(), local=q.training(), num_clients=1000)
    table = alg.server.init(jax.random.key(0)).table
    np.testing.assert_allclose(np.std(table), SPREAD, rtol=0.05)
