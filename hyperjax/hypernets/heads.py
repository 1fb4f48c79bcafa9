"""pFedHN's hypernetwork: a trunk, and one linear head per tensor of the target.

Shamsian, Navon, Fetaya, Chechik 2021, "Personalized Federated Learning using
Hypernetworks", ICML (arXiv:2103.04628), after the authors' code:

    a = Linear(... ReLU(Linear(ReLU(Linear(v)))))     theta_j = W_j a + b_j

The last layer of the trunk has no ReLU, so that it and the heads compose linearly.
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
    """[d] to [hidden_size]: a linear layer, then `num_hidden` times ReLU and linear."""

    hidden_size: int
    num_hidden: int

    @nn.compact
    def __call__(self, v: Array) -> Array:
        x = Dense(self.hidden_size)(v)
        for _ in range(self.num_hidden):
            x = Dense(self.hidden_size)(nn.relu(x))
        return x


def per_tensor(
    template: PyTree,
    *,
    condition_size: int,
    hidden_size: int = 100,
    num_hidden: int = 3,
) -> HyperNet:
    """Returns a hypernetwork that emits each leaf of `template` by a head of its own.

    Its parameters are {"trunk", "heads": {path: linear}}; for K target parameters,
    (hidden_size + 1) K + trunk.

    Args:
      template: the target's leaves, abstract or concrete.
      condition_size: d.
      hidden_size: width of the trunk.
      num_hidden: its layers after the first.

    Raises:
      ValueError: a size below 1.
    """
    check_at_least(1, condition_size=condition_size, hidden_size=hidden_size)
    check_at_least(0, num_hidden=num_hidden)
    leaves, structure = jax.tree.flatten(template)
    names = tree.paths(template)
    trunk = Trunk(hidden_size, num_hidden)
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
