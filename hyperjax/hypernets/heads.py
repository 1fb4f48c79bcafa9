"""Hypernetworks with one linear head per tensor of the target: pFedHN's, pFedLHN's.

Shamsian, Navon, Fetaya, Chechik 2021, "Personalized Federated Learning using
Hypernetworks", ICML (arXiv:2103.04628), after the authors' code:

    a = Linear(... ReLU(Linear(ReLU(Linear(v)))))     theta_j = W_j a + b_j

The last layer of the trunk has no ReLU, so that it and the heads compose linearly.

pFedLHN, "Layer-wise personalized federated learning with hypernetwork" (Neural
Processing Letters 2023), has an embedding for every tensor, mixed of a few that all
clients share.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax import tree
from hyperjax.errors import check_at_least
from hyperjax.models.layers import Dense
from hyperjax.types import Array, HyperNet, PyTree


class Trunk(nn.Module):
    """[d] to [hidden_size]: a linear layer, then `num_hidden` times ReLU and linear.

    `activated`: and a ReLU at the end.
    """

    hidden_size: int
    num_hidden: int
    activated: bool = False

    @nn.compact
    def __call__(self, v: Array) -> Array:
        x = Dense(self.hidden_size)(v)
        for _ in range(self.num_hidden):
            x = Dense(self.hidden_size)(nn.relu(x))
        return nn.relu(x) if self.activated else x


def per_tensor(
    template: PyTree,
    *,
    condition_size: int,
    hidden_size: int = 100,
    num_hidden: int = 3,
    activated: bool = False,
) -> HyperNet:
    """Returns a hypernetwork that emits each leaf of `template` by a head of its own.

    Its parameters are {"trunk", "heads": {path: linear}}; for K target parameters,
    (hidden_size + 1) K + trunk.

    Args:
      template: the target's leaves, abstract or concrete.
      condition_size: d.
      hidden_size: width of the trunk.
      num_hidden: its layers after the first.
      activated: it ends in a ReLU, so that it and the heads do not compose linearly.

    Raises:
      ValueError: a size below 1.
    """
    check_at_least(1, condition_size=condition_size, hidden_size=hidden_size)
    check_at_least(0, num_hidden=num_hidden)
    leaves, structure = jax.tree.flatten(template)
    names = tree.paths(template)
    trunk = Trunk(hidden_size, num_hidden, activated)
    heads = [Dense(math.prod(leaf.shape)) for leaf in leaves]

    def init(key):
        key_trunk, *keys = jax.random.split(key, len(leaves) + 1)
        a = jnp.zeros(hidden_size)
        every = zip(names, heads, keys, strict=True)
        return {
            "trunk": trunk.init(key_trunk, jnp.zeros(condition_size))["params"],
            "heads": {name: head.init(key, a)["params"] for name, head, key in every},
        }

    def generate(phi, v):
        a = trunk.apply({"params": phi["trunk"]}, v)
        found = []
        for name, head, leaf in zip(names, heads, leaves, strict=True):
            numbers: Any = head.apply({"params": phi["heads"][name]}, a)
            found.append(numbers.reshape(leaf.shape))
        return jax.tree.unflatten(structure, found)

    return HyperNet(init, generate)


def per_layer(
    template: PyTree,
    *,
    num_bases: int = 5,
    basis_size: int = 40,
    hidden_size: int = 128,
    one_row: bool = False,
) -> tuple[HyperNet, int]:
    """Returns pFedLHN's hypernetwork, and the size of what conditions it.

    The conditions of T leaves are the rows of A [T, num_bases], given as one vector:
    theta_j = W_j (W a_j E + b) + b_j, linear from end to end. Its parameters are
    {"bases": E [num_bases, basis_size], "trunk", "heads": {path: linear}}.

    Args:
      template: the target's leaves, abstract or concrete.
      num_bases: rows of E, which mix to what a leaf is emitted from.
      basis_size: their length.
      hidden_size: width of the layer that all leaves share.
      one_row: A has one row, for all leaves.

    Raises:
      ValueError: a size below 1.
    """
    check_at_least(
        1, num_bases=num_bases, basis_size=basis_size, hidden_size=hidden_size
    )
    leaves, structure = jax.tree.flatten(template)
    names = tree.paths(template)
    trunk = Dense(hidden_size)
    heads = [Dense(math.prod(leaf.shape)) for leaf in leaves]
    num_rows = 1 if one_row else len(leaves)

    def init(key):
        key_bases, key_trunk, *keys = jax.random.split(key, len(leaves) + 2)
        a = jnp.zeros(hidden_size)
        every = zip(names, heads, keys, strict=True)
        return {
            "bases": jax.random.normal(key_bases, (num_bases, basis_size)),
            "trunk": trunk.init(key_trunk, jnp.zeros(basis_size))["params"],
            "heads": {name: head.init(key, a)["params"] for name, head, key in every},
        }

    def generate(phi, v):
        mixed = v.reshape(num_rows, num_bases) @ phi["bases"]
        hidden: Any = trunk.apply({"params": phi["trunk"]}, mixed)
        hidden = jnp.broadcast_to(hidden, (len(leaves), hidden_size))
        found = []
        for name, head, leaf, a in zip(names, heads, leaves, hidden, strict=True):
            numbers: Any = head.apply({"params": phi["heads"][name]}, a)
            found.append(numbers.reshape(leaf.shape))
        return jax.tree.unflatten(structure, found)

    return HyperNet(init, generate), num_rows * num_bases


def check_emitted(theta: PyTree) -> None:
    """Refuses running statistics among what a hypernetwork is to emit.

    Raises:
      ValueError: there are some.
    """
    if tree.parameters(theta)[1]:
        raise ValueError(
            "bn_stats='average' would have the hypernetwork emit running variances, "
            "negative ones too; use 'local'"
        )
