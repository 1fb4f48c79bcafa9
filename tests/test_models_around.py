"""Every model that a method makes of another, found by discovery."""

import ast
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated import BATCH, NUM_CLASSES, SLOW, STACKS, method, normed, tiny

import hyperjax
from hyperjax.data import clients
from hyperjax.models import memory, personal
from hyperjax.types import Batch, ClientData, Model, Visit

KEY = jax.random.key(0)
# Whose predictions are not those of one plain network.
NO_SINGLE_NETWORK = ("fedjets", "fedthe", "hyperfedzero+sample", "opt1")


def base(stack) -> Model:
    return normed() if stack.startswith(("hyperfednet", "fedbn")) else tiny().model


def data() -> ClientData:
    table = clients.table([np.arange(5)])
    pool = jax.tree.map(jnp.asarray, tiny().pool)
    return ClientData(jnp.asarray(table.rows[0]), jnp.asarray(table.size[0]), pool)


def batch() -> Batch:
    # Of the client's first samples, with padding.
    return clients.take(data(), jnp.arange(5), 1, BATCH)


# HyperFedZero's are by default those of its plain form.
ALIKE = ("constant_embedding", "hyperfedzero+sample", "hyperfedzero+client")
MARKED = [
    pytest.param(s, marks=pytest.mark.slow) if s in (*SLOW, *ALIKE) else s
    for s in STACKS
]


@pytest.fixture(scope="module", params=MARKED)
def stack(request):
    if method(request.param).client.model in (tiny().model, normed()):
        pytest.skip("trains the network that it was given")
    return request.param


def prepared(model):
    """Variables as they are deployed, and moved so that no two sets are alike."""
    variables, draw = model.init(KEY), np.random.default_rng(0)

    def moved(x):
        noise = np.float32(0.1 * np.abs(draw.normal(size=jnp.shape(x))))
        return x + noise if jnp.issubdtype(x.dtype, jnp.floating) else x

    variables = jax.tree.map(moved, variables)
    return memory.put(variables, "condition", model.serve.condition(variables, data()))


@pytest.fixture(scope="module")
def found(stack):
    model, plain = method(stack).client.model, base(stack)

    def run():
        variables = prepared(model)
        exported = model.serve.export(variables)
        same = jax.tree.structure({k: exported[k] for k in ("params", "stats")})
        is_plain = same == jax.tree.structure(plain.init(KEY))
        x = batch().x
        trained = memory.without(variables, "condition")
        context = model.visit.context(trained, data())
        out = {
            "predicted": model.predict(variables, x),
            "features": model.features(variables, x),
            "loss": model.loss(KEY, trained, batch(), context),
            "hooks": [h(trained) for h in (model.visit.enter, model.visit.leave)]
            + [model.visit.arrive(KEY, trained)],
            "trained": trained,
        }
        if is_plain:
            out["plain"] = plain.apply(exported, x)
        return out

    return jax.jit(run)()


def test_predictions_are_those_of_the_exported_network(stack, found):
    assert ("plain" in found) == (stack not in NO_SINGLE_NETWORK)
    if "plain" in found:
        logits, features = found["plain"]
        np.testing.assert_allclose(found["predicted"], logits, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found["features"], features, rtol=1e-5, atol=1e-6)
    assert found["predicted"].shape == (BATCH, NUM_CLASSES)
    assert found["features"].shape[0] == BATCH


def test_training_leaves_variables_alike(found):
    value, trained = found["loss"]
    assert np.isfinite(value)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        trained.stats, found["trained"]["stats"]
    )
    for name in ("logits", "features"):
        if not isinstance(getattr(trained, name), tuple):
            assert (
                getattr(trained, name).shape
                == found["predicted" if name == "logits" else name].shape
            )
    for after in found["hooks"]:
        chex.assert_trees_all_equal_shapes_and_dtypes(after, found["trained"])


def test_outputs_of_training_are_the_predicting_networks():
    # Neither dropout nor statistics: a pass is the same in training and outside it.
    for stack in ("ditto", "apfl", "moon", "fedgen", "pfedme"):
        model = method(stack).client.model

        def run(model=model, stack=stack):
            variables = prepared(model)
            context = model.visit.context(variables, data())
            trained = model.loss(KEY, variables, batch(), context)[1]
            if stack == "pfedme":  # whose personal model is found anew for each batch
                personal = trained.memory["personal"]
                variables = memory.put(variables, "personal", personal)
            return trained, model.apply(variables, batch().x)

        trained, (predicted, features) = jax.jit(run)()
        np.testing.assert_allclose(trained.logits, predicted, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(trained.features, features, rtol=1e-5, atol=1e-6)


def test_a_doubled_model_is_two_in_training_and_the_personal_one_outside():
    model = personal.doubled(normed())

    def run():
        variables = prepared(model)
        apart = personal.without(variables), personal.only(variables)
        losses = [normed().loss(KEY, v, batch(), ()) for v in apart]
        return variables, losses, model.loss(KEY, variables, batch(), ())

    variables, losses, (value, trained) = jax.jit(run)()
    np.testing.assert_allclose(value, losses[0][0] + losses[1][0], rtol=1e-6)
    np.testing.assert_allclose(trained.logits, losses[1][1].logits, rtol=1e-6)
    np.testing.assert_allclose(trained.features, losses[1][1].features, rtol=1e-6)
    alone = {"params": {}, "stats": trained.stats}
    alone["params"] = variables["params"]
    found = personal.only(alone)["stats"]
    chex.assert_trees_all_close(found, losses[1][1].stats, rtol=1e-6)


def test_a_model_around_another_leaves_no_field_unsaid():
    model = tiny().model
    with pytest.raises(TypeError, match=r"missing are \['apply', .*'with_shape'\]"):
        model.around("sample_shape", init=model.init)
    with pytest.raises(TypeError, match="gives each field once"):
        model.around(*model._fields, init=model.init)
    assert model.around(*model._fields) == model


def test_models_are_made_of_nothing_in_one_place_only():
    # The constructor loses what it is not given: elsewhere it is `Model.around`.
    root = pathlib.Path(hyperjax.__file__).parent
    makers = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Model":
                makers.add(path.relative_to(root).as_posix())
    assert makers == {"models/linen.py"}


def test_what_a_wrapper_cannot_carry_is_refused():
    told = Visit(context=lambda variables, data: data.size)
    held = tiny().model._replace(visit=told)
    with pytest.raises(ValueError, match=r"fedjets cannot wrap .* its 'context'"):
        held.check_without("fedjets", "arrive", "context")
    tiny().model.check_without("fedjets", "arrive", "context")
