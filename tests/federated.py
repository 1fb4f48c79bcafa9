"""A tiny federation and every method of the package on it, found by discovery."""

import functools
import inspect
import os
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax

from hyperjax import compiling, models, registry, server_optimizers, training, tree
from hyperjax.data import clients
from hyperjax.data.sources import load
from hyperjax.engine import comm, families
from hyperjax.models import layers
from hyperjax.types import Algorithm, ClientSide, Model, Pool

NUM_CLIENTS, NUM_CLASSES, BATCH = 8, 3, 4
SIZES = (3, 4, 5, 8, 9, 2, 6, 7)  # ragged: less than, equal to, more than a batch


class Tiny(NamedTuple):
    """Eight ragged clients of 4x4 images in three classes."""

    pool: Pool
    table: clients.Table
    model: Model


@functools.cache
def tiny() -> Tiny:
    source = load(
        "synthetic", num_samples=sum(SIZES), num_classes=NUM_CLASSES, shape=(4, 4, 1)
    )
    rows = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
    pool = clients.make_pool(source.x, source.y, np.arange(sum(SIZES)))
    network = models.MLP(NUM_CLASSES, hidden=(4,))
    model = models.from_linen(network, (4, 4, 1), NUM_CLASSES)
    return Tiny(pool, clients.table(rows), model)


@functools.cache
def normed() -> Model:
    """The model with normalisation, on the same images."""
    return models.from_linen(Norms(), (4, 4, 1), NUM_CLASSES)


# Arguments that shrink a method, for those that take them.
SMALL = dict(
    embedding_size=4,
    hidden=(4,),
    chunk_size=16,
    chunk_embedding_size=3,
    tile=2,
    head_epochs=2,
    num_clients=NUM_CLIENTS,
    num_rounds=4,
    hidden_size=4,
    num_models=2,
    num_hidden=1,
    num_layers=1,
    output_size=32,
)


class Norms(nn.Module):
    """Two 3x3 convolutions with batch-norm, for methods that ask for either."""

    @nn.compact
    def __call__(self, x, train=False, mask=None):
        x = layers.Conv(2, 3, padding="SAME", use_bias=False, name="stem")(x)
        x = layers.BatchNorm(name="stem_norm")(x, train, mask)
        x = layers.Conv(4, 3, padding="SAME", use_bias=False, name="conv")(nn.relu(x))
        x = layers.BatchNorm(name="norm")(x, train, mask)
        x = nn.relu(x).mean((1, 2))
        return layers.Dense(NUM_CLASSES, name="head")(x)


class Normed(nn.Module):
    """Batch-norm, then one linear layer: has statistics and is soon compiled."""

    @nn.compact
    def __call__(self, x, train=False, mask=None):
        x = layers.BatchNorm(name="norm")(x, train, mask)
        return layers.Dense(NUM_CLASSES, name="head")(x.reshape(x.shape[0], -1))


# Methods that are tested on a network with convolutions and normalisation.
ON_NORMS = ("hyperfednet", "fedbn")

# Stacks beyond every method's defaults: client state, server optimizer state.
EXTRA = {
    "fedavg+fedadam": ("fedavg", dict(server_opt=server_optimizers.fedadam(0.1))),
    "pfedhn+pc": (
        "pfedhn",
        dict(keep=r"params/head/.*", persist_optimizer="kept"),
    ),
    "hyperfednet+feddyn": ("hyperfednet", dict(base="feddyn")),
    "hyperfednet+ditto": ("hyperfednet", dict(base="ditto", share_aux="convs")),
    "hyperfednet+per_round": ("hyperfednet", dict(regenerate="per_round")),
    "fedavg+persist": ("fedavg", dict(persist_optimizer="all")),
    "hyperfedzero+sample": (
        "hyperfedzero",
        dict(embed_granularity="sample", deploy_granularity="sample"),
    ),
    "hyperfedzero+client": ("hyperfedzero", dict(embed_granularity="client")),
}
# Stacks that every law is tested on by default, one of each kind. For the others laws
# that need programs of their own are slow tests, as all laws are for those in SLOW.
# YOURS is a method of another package, which the environment names.
YOURS = [name for name in [os.environ.get("METHOD")] if name]  # package.module:function
THOROUGH = ("fedavg", "fedfomo", *YOURS)
SLOW = (
    *("hyperfednet+feddyn", "hyperfednet+ditto", "hyperfednet+per_round"),
    *("pefll+opening", "pefll+closing"),
)
# What opens or closes a round is a method of its own, under the same laws.
BESIDE = ("+opening", "+closing")
METHODS = registry.methods()
STACKS = [
    *METHODS,
    *EXTRA,
    *YOURS,
    "mh_pfedhngd+opening",
    "pefll+opening",
    "pefll+closing",
]


def make_local(**options):
    """The local training of the tests: momentum and decay on, to catch leaks."""
    optimizer = optax.chain(
        optax.add_decayed_weights(1e-2), optax.sgd(0.1, momentum=0.9)
    )
    usual = dict(
        optimizer=optimizer, batch_size=BATCH, phases=(training.Phase(epochs=2),)
    )
    return training.Local(**{**usual, **options})


@functools.cache
def method(stack: str) -> Algorithm:
    """Builds a method, or an extra stack, on the tiny model."""
    for suffix in BESIDE:
        if stack.endswith(suffix):
            whole = method(stack.removesuffix(suffix))
            return getattr(whole, suffix.removeprefix("+"))
    name, options = EXTRA.get(stack, (stack, {}))
    return traced_once(build(name, **options))


def traced_once(alg: Algorithm) -> Algorithm:
    """A method that Python goes through once for all programs of a test file."""

    def of(side: ClientSide) -> ClientSide:
        return side._replace(
            update=compiling.traced_once(side.update),
            tune=compiling.traced_once(side.tune),
        )

    return alg.with_clients(of)._replace(
        opening=alg.opening and traced_once(alg.opening),
        closing=alg.closing and traced_once(alg.closing),
    )


def build(name: str, model: Any = None, local: Any = None, **options) -> Algorithm:
    """Builds a method on the tiny model; of families it is as one of two sees it."""
    local = local or make_local()
    factory = registry.find(name)
    takes = inspect.signature(factory).parameters
    small = {k: v for k, v in SMALL.items() if k in takes}
    if registry.families(name) == "several":
        sizes = {"a": NUM_CLIENTS, "b": 3}
        both = {"a": model or tiny().model, "b": normed()}
        alg = factory(both, local=local, family_sizes=sizes, **small, **options)
        return families.view(alg, "a")
    model = model or (normed() if name in ON_NORMS else tiny().model)
    return factory(model, local=local, **small, **options)


def messages(alg: Algorithm) -> list[tuple]:
    """Returns path, shape and dtype of everything that a method keeps and sends."""
    leaves = tree.by_path(comm.describe(alg)._asdict())
    return [(path, leaf.shape, leaf.dtype) for path, leaf in leaves.items()]


def weights() -> jnp.ndarray:
    """Aggregation weights of the tiny federation."""
    return jnp.asarray(tiny().table.size, jnp.float32)
