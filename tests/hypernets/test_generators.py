"""Hypernetworks of a method by name, and those of a user."""

import functools
import re
import sys
import types

import federated
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import from_linen, registry, tree
from hyperjax.engine import comm
from hyperjax.hypernets import generators, mlp
from hyperjax.types import HyperNet

TEMPLATE = {
    "w": jax.ShapeDtypeStruct((2, 3), jnp.float32),
    "b": jax.ShapeDtypeStruct((3,), jnp.float32),
}
TAKERS = ("hyperfedzero", "constant_embedding", "pfedhn", "hyperfednet")


@pytest.fixture(scope="module")
def contributing(repository):
    """What the example of CONTRIBUTING.md defines, as a module `own_nets`."""
    text = (repository / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (example,) = (
        code
        for code in re.findall(r"```python\n(.*?)```", text, re.S)
        if "def mixture(" in code
    )
    module = types.ModuleType("own_nets")
    exec(example, module.__dict__)
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def test_the_example_is_a_base_and_a_mixture(contributing):
    net = generators.generator("own_nets:mixture(rank=2)", TEMPLATE, 5)
    phi = net.init(jax.random.key(0))
    assert tree.count(phi) == 9 + 5 * 2 + 2 * 9
    e = np.arange(5, dtype=np.float32)
    found = net.generate(phi, e)
    vector = phi["base"] + e @ phi["mix"] @ phi["directions"]
    np.testing.assert_allclose(found["b"], vector[:3], rtol=1e-6)
    np.testing.assert_allclose(found["w"], vector[3:].reshape(2, 3), rtol=1e-6)


@pytest.mark.parametrize("method", TAKERS)
def test_it_takes_the_place_of_each_method_s_own(contributing, method):
    """Given as a function or named, the messages are those of the mixture."""
    build = functools.partial(federated.build, method)
    plain, own = build(), build(hypernet="own_nets:mixture(rank=2)")
    assert federated.messages(own) != federated.messages(plain)
    same = build(hypernet=functools.partial(contributing.mixture, rank=2))
    assert federated.messages(own) == federated.messages(same)
    names = [path for path, *_ in federated.messages(own)]
    assert any(path.endswith("directions") for path in names)


def test_the_chunked_one_by_name_is_the_default():
    sizes = "chunk_size=16,chunk_embedding_size=3,hidden=(4,)"
    named = federated.build("hyperfedzero", hypernet=f"chunked_mlp({sizes})")
    assert federated.messages(named) == federated.messages(
        federated.build("hyperfedzero")
    )


def test_hyperfednet_shares_a_generator_of_dense_weights():
    """What it sends is |phi| and no more: embedding, biases and head stay home."""

    class Dense(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(6, name="body")(x.reshape(x.shape[0], -1))
            return nn.Dense(3, name="head")(x)

    model = from_linen(Dense(), (4, 4, 1), 3)
    build = functools.partial(
        registry.find("hyperfednet"),
        model,
        local=federated.make_local(),
        embedding_size=4,
    )
    with pytest.raises(ValueError, match=r"hypernet='chunked_mlp'"):
        build()
    alg = build(hypernet="chunked_mlp(chunk_size=8,hidden=(5,))")
    weights = {"body/kernel": jax.ShapeDtypeStruct((16, 6), jnp.float32)}
    net = mlp.chunked_mlp(weights, condition_size=4, chunk_size=8, hidden=(5,))
    cost = comm.cost(comm.describe(alg))
    assert cost.up_numbers == cost.down_numbers == mlp.num_parameters(net)


def named_wrongly(template, *, embedding_size):
    """Takes the size of a condition by another name."""


def nothing_at_all(template, *, condition_size):
    """Returns no hypernetwork."""


class Nothing:
    def __call__(self, template, *, condition_size):
        """Returns no hypernetwork either."""


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("per_tenor", ValueError, "hypernet='per_tenor'.*per_tensor"),
        ("per_tensor(width=3)", ValueError, "width"),
        ("no_such:thing", ValueError, "expected package.module:function"),
        (3, ValueError, "hypernet=3 is no function"),
        (named_wrongly, ValueError, "hypernet=named_wrongly is no function"),
        (nothing_at_all, TypeError, "hypernet=nothing_at_all returns NoneType"),
        (
            functools.partial(nothing_at_all),
            TypeError,
            "hypernet=nothing_at_all returns",
        ),
        (Nothing(), TypeError, "hypernet=<Nothing> returns"),
        (lambda template, *, condition_size: template, TypeError, "returns dict"),
        (
            lambda template, *, condition_size: HyperNet(
                lambda key: 1.0, lambda phi, e: {"b": e[:3], "w": jnp.zeros((3, 2))}
            ),
            ValueError,
            r"emits float32\(3, 2\) for 'w'; the template has float32\(2, 3\)",
        ),
    ],
)
def test_what_is_none_is_refused_by_name(given, error, words):
    with pytest.raises(error, match=words):
        generators.generator(given, TEMPLATE, 4)
