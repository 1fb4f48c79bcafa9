"""What a client remembers, which its model must not notice."""

import chex
import federated
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hyperjax import tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.engine import comm
from hyperjax.models import MLP, from_linen, memory
from hyperjax.models.linen import sizes
from hyperjax.training import Local, no_adjustment, trainer
from hyperjax.types import Batch, ClientData, Model, Outputs, Serve, Trained, Visit

ZEROS = np.zeros((1, 7))
KEY = jax.random.key(0)
BATCH = Batch(jnp.ones((2, 3)), jnp.array([0, 1]), jnp.ones(2))


def plain() -> Model:
    """A model all of whose functions show what they were given."""

    def told(name):
        return lambda variables, *rest: (name, variables)

    def moved(by):
        def hook(variables):
            return {**variables, "params": variables["params"] + by}

        return hook

    def loss(key, variables, batch, context):
        stats = {"seen": variables["stats"]["seen"] + 1}
        return variables["params"], Trained(stats, {"loss": 0.0}, "logits", "seen")

    return Model(
        sample_shape=(3,),
        init=lambda key: {"params": jnp.float32(2), "stats": {"seen": jnp.float32(0)}},
        loss=loss,
        apply=told("apply"),
        visit=Visit(
            arrive=lambda key, variables: moved(10)(variables),
            enter=moved(20),
            context=told("context"),
            leave=moved(40),
        ),
        serve=Serve(told("condition"), told("export"), told("inspect")),
    )


def both(deployed=None) -> tuple[Model, dict]:
    more = {} if deployed is None else {"deployed": deployed}
    model = memory.with_entry(
        plain(), "more", lambda key, v: {"x": v["params"] + 1}, **more
    )
    return model, model.init(KEY)


def test_an_entry_is_cut_out_and_put_back():
    _, variables = both()
    ours, entry = memory.without(variables, "more"), memory.get(variables, "more")
    assert entry == {"x": 3} and ours == plain().init(KEY)
    assert memory.put(ours, "more", entry) == variables
    assert memory.get(ours, "more") == () and memory.get(ours, "more", 7) == 7
    both_entries = memory.put(variables, "other", 5)
    assert memory.without(both_entries, "more", "unknown")["memory"] == {"other": 5}


def test_no_function_of_the_model_sees_it():
    model, variables = both()
    ours = plain().init(KEY)
    functions = {"apply": model.apply, "context": model.visit.context}
    for name, function in {**functions, **model.serve._asdict()}.items():
        assert function(variables, BATCH) == (name, ours)
    value, trained = model.loss(KEY, variables, BATCH, ())
    assert value == 2 and trained.stats == {"seen": 1}
    assert trained[1:] == plain().loss(KEY, ours, BATCH, ())[1][1:]


@pytest.mark.parametrize(("name", "by"), [("arrive", 10), ("enter", 20), ("leave", 40)])
def test_it_passes_through_what_a_client_does_to_its_variables(name, by):
    model, variables = both()
    key = (KEY,) if name == "arrive" else ()
    after = getattr(model.visit, name)(*key, variables)
    chex.assert_trees_all_equal(after, {**variables, "params": jnp.float32(2 + by)})


@pytest.mark.parametrize("bn_stats", ["average", "local"])
def test_it_stays_at_home_by_definition(bn_stats):
    model = federated.normed()
    start = lambda key, variables: {"x": jnp.ones(3)}  # noqa: E731
    whole = memory.with_entry(model, "more", start)
    local = federated.make_local()
    alg, plain = (fedavg(m, local=local, bn_stats=bn_stats) for m in (whole, model))
    found, expected = comm.describe(alg), comm.describe(plain)
    assert tree.paths(found.uplink) == tree.paths(expected.uplink)
    assert set(found.client.kept) - set(expected.client.kept) == {"memory/more/x"}


def test_a_step_may_leave_it_otherwise():
    model = from_linen(MLP(3, hidden=(4,)), (4, 4, 1), 3)
    inner = memory.with_entry(model, "count", lambda key, variables: jnp.float32(0))

    def loss(key, variables, batch, context):
        value, trained = inner.loss(key, variables, batch, context)
        seen = memory.get(variables, "count") + jnp.sum(batch.mask)
        return value, trained._replace(memory={"count": seen})

    whole = inner._replace(loss=loss)
    data = ClientData(jnp.arange(8), jnp.int32(7), federated.tiny().pool)
    train = trainer(whole, Local(optax.sgd(0.1), batch_size=3))
    start = memory.put(whole.init(KEY), "other", jnp.float32(5))
    after, _ = train(KEY, start, data, jnp.int32(0), no_adjustment)
    assert after["memory"] == {"count": 7, "other": 5}


def test_it_may_be_what_is_deployed():
    model, variables = both(lambda ours, entry: {**ours, "params": entry["x"]})
    assert model.apply(variables, BATCH)[1]["params"] == 3
    assert model.serve.export(variables)[1]["params"] == 3
    # Not so in training.
    assert model.loss(KEY, variables, BATCH, ())[0] == 2
    assert model.visit.context(variables, BATCH)[1]["params"] == 2


def test_sizes_of_classes_and_features():
    model = plain()._replace(visit=Visit())
    with pytest.raises(ValueError, match="no layer named 'head'"):
        sizes(model._replace(apply=lambda v, x: Outputs(jnp.zeros((len(x), 5)))))
    wide = model._replace(apply=lambda v, x: Outputs(jnp.zeros((len(x), 5)), ZEROS))

    def loss(outputs):
        return lambda *_: (0.0, Trained((), {}, **outputs))

    assert sizes(wide._replace(loss=loss({"features": ZEROS}))) == (5, 7)
    with pytest.raises(ValueError, match="does not give its features in training"):
        sizes(wide._replace(loss=loss({"logits": ZEROS})))
