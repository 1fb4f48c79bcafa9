"""What a notebook shows of an object: a line without pixels and addresses."""

import jax.numpy as jnp
import optax
import quadratics as q

import hyperjax
from hyperjax import aggregators, channels, corrections, types
from hyperjax.runs.recipe import Recipe


def test_objects_are_a_line_each():
    data = hyperjax.federate(hyperjax.load("digits"), num_clients=4, num_novel=1)
    model = q.model()
    local = hyperjax.Local(optax.sgd(0.1), 32)
    method = hyperjax.fedavg(model, local=local)
    messages = hyperjax.describe(method)
    every = [
        *(data, data.pool, data.train, hyperjax.load("digits"), model, *model),
        *(local, hyperjax.Phase(), hyperjax.trainer(model, local)),
        *(method, method.server, method.client, messages, hyperjax.cost(messages)),
        *(aggregators.weighted_mean(), corrections.prox(0.1), channels.topk(0.5)),
        Recipe(method, None, data, local, None, "", None, {}, {}),
        types.HyperNet(q.model, q.model),
    ]
    shown = [repr(one) for one in every if not callable(one) or hasattr(one, "_fields")]
    for text in shown:
        assert "\n" not in text and len(text) <= 400, text
        assert " at 0x" not in text and "rray(" not in text, text
    assert repr(method.server) == "ServerSide(of fedavg, mean_only=True)"
    assert repr(data.train) == "Table(rows=int32[4, 256], size=int32[4])"
    assert repr(messages) == (
        "Messages(a client is sent 2 numbers a round and sends 2; it keeps 0, the "
        "server 2)"
    )


def test_trees_are_told_by_their_size():
    down = types.Downlink(
        {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}, round=jnp.int32(0)
    )
    assert repr(down) == "Downlink(shared=8 numbers, round=int32[])"
