"""MH-pFedHN's hypernetwork: a shared extractor and heads shared by clients of a size.

Zhang, Li, Liu, Jiang, Wang 2025, "Hypernetworks for Model-Heterogeneous Personalized
Federated Learning" (arXiv:2507.22330), after the authors' code. A client whose network
has K parameters has m = ceil(K / O) embeddings V [m, d]:

    A = g(V)                              [m, hidden], each row on its own
    theta = concat_r(A_r W_r + b_r)[:K]   W [m, hidden, O], b [m, O]

The extractor g is shared by all, (W, b) by all clients with the same m: it knows sizes
and nothing else of the networks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax.errors import check_at_least, check_number
from hyperjax.models.layers import Dense, torch_uniform
from hyperjax.types import Array, in_one_line


class Extractor(nn.Module):
    """[..., d] to [..., hidden]: linear layers with ReLU after every one."""

    hidden_size: int
    num_layers: int

    @nn.compact
    def __call__(self, v: Array) -> Array:
        for _ in range(self.num_layers):
            v = nn.relu(Dense(self.hidden_size)(v))
        return v


class MultiHead(NamedTuple):
    """A hypernetwork for target networks of several sizes.

    Attributes:
      positions: number of parameters K -> number of embeddings m.
      init: `(key) -> {"extractor", "heads": {str(m): {"w", "b"}}}`.
      init_embeddings: `(key, num_clients, size) -> [num_clients, m, d]`.
      generate: `(extractor, head, embeddings [m, d], size) -> [K]`.
    """

    positions: Mapping[int, int]
    init: Callable
    init_embeddings: Callable
    generate: Callable

    def __repr__(self) -> str:
        return in_one_line(self)


def multi_head(
    sizes: Sequence[int],
    *,
    output_size: int = 3072,
    embedding_size: int = 64,
    hidden_size: int = 128,
    num_layers: int = 3,
    embedding_deviation: float = 0.002,
) -> MultiHead:
    """Builds the hypernetwork.

    Args:
      sizes: numbers of parameters K of the networks there are.
      output_size: O, numbers that an embedding gives rise to.
      embedding_size: d.
      hidden_size: of the extractor.
      num_layers: of the extractor.
      embedding_deviation: standard deviation of embeddings at first.

    Raises:
      ValueError: a size below 1.
    """
    check_at_least(
        1,
        output_size=output_size,
        embedding_size=embedding_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        size=min(sizes),
    )
    check_number(at_least=0, embedding_deviation=embedding_deviation)
    positions = {size: math.ceil(size / output_size) for size in sizes}
    extractor = Extractor(hidden_size, num_layers)

    def init(key):
        key_extractor, key_heads = jax.random.split(key)
        draw = torch_uniform(hidden_size)
        heads = {}
        for m in sorted(set(positions.values())):
            # By m itself: another set of sizes leaves this head's draw as it is.
            key_w, key_b = jax.random.split(jax.random.fold_in(key_heads, m))
            heads[str(m)] = {
                "w": draw(key_w, (m, hidden_size, output_size)),
                "b": draw(key_b, (m, output_size)),
            }
        first = extractor.init(key_extractor, jnp.zeros(embedding_size))["params"]
        return {"extractor": first, "heads": heads}

    def init_embeddings(key, num_clients, size):
        shape = (num_clients, positions[size], embedding_size)
        return embedding_deviation * jax.random.normal(key, shape)

    def generate(shared, head, embeddings, size):
        a = extractor.apply({"params": shared}, embeddings)
        numbers = jnp.einsum("mh,mho->mo", a, head["w"]) + head["b"]
        return numbers.reshape(-1)[:size]

    return MultiHead(positions, init, init_embeddings, generate)
