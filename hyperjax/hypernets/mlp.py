"""The chunked multilayer perceptron: one small network, applied once per chunk.

Chunked hypernetworks: von Oswald et al. 2020 (arXiv:1906.00695); this form, with
chunk embeddings and a shared output layer, is the one HyperFedZero's parameter budget
points to (arXiv:2508.12673):

    u_k = [condition, chunk embedding k] -> Linear H1 -> ReLU -> ... -> Linear S
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax import tree
from hyperjax.calls import Fixed
from hyperjax.errors import check_at_least, check_choice, check_number
from hyperjax.hypernets import layout
from hyperjax.models import layers
from hyperjax.types import Array, HyperNet, PyTree

OUT_SCALES = ("none", "fan_in")


class ChunkMLP(nn.Module):
    """[n_ch, d] inputs to [n_ch, S] chunks."""

    hidden: tuple[int, ...]
    chunk_size: int

    @nn.compact
    def __call__(self, u: Array) -> Array:
        for size in self.hidden:
            u = nn.relu(layers.Dense(size)(u))
        return layers.Dense(self.chunk_size)(u)


def chunked_mlp(
    template: PyTree,
    *,
    condition_size: int,
    chunk_size: int = 576,
    chunk_embedding_size: int = 16,
    hidden: tuple[int, ...] = (300, 300),
    out_scale: str = "none",
    norm_scale_offset: Fixed = 0.0,
    chunk_batch_size: int = 0,
) -> HyperNet:
    """Returns a hypernetwork that emits a whole parameter tree chunk by chunk.

    Its parameters are {"chunks": [n_ch, d_c], "mlp": ...}: chunk embeddings N(0, 1),
    linear layers with PyTorch's default initialisation; |phi| = n_ch d_c + (P + d_c)
    H1 + H1 + H1 H2 + H2 + H2 S + S for two hidden layers.

    Args:
      template: the target's parameters (concrete if `out_scale` is "fan_in").
      condition_size: P.
      chunk_size: S.
      chunk_embedding_size: d_c.
      hidden: widths H1, H2, ...
      out_scale: "fan_in" multiplies each tensor by the constant that gives it the
        standard deviation it has in `template`; "none" leaves all alike (about 0.08).
      norm_scale_offset: added to generated leaves named "scale" (normalisation).
      chunk_batch_size: chunks generated at a time, in sequence, for large targets, and
        one more for those that cross a border; 0 generates all in one product.

    Raises:
      ValueError: a size below 1 or an unknown `out_scale`.
    """
    check_at_least(
        1, condition_size=condition_size, chunk_embedding_size=chunk_embedding_size
    )
    for width in hidden:
        check_at_least(1, hidden=width)
    check_number(norm_scale_offset=norm_scale_offset)
    check_at_least(0, chunk_batch_size=chunk_batch_size)
    check_choice("out_scale", out_scale, OUT_SCALES)
    chunks = layout.flat(template, chunk_size)
    module = ChunkMLP(tuple(hidden), chunk_size)
    input_size = condition_size + chunk_embedding_size

    def init(key):
        key_chunks, key_mlp = jax.random.split(key)
        shape = (chunks.num_chunks, chunk_embedding_size)
        mlp = module.init(key_mlp, jnp.zeros((1, input_size)))["params"]
        return {"chunks": jax.random.normal(key_chunks, shape), "mlp": mlp}

    def emit(shared, embeddings):
        weights, condition = shared
        repeated = jnp.broadcast_to(condition, (embeddings.shape[0], condition_size))
        u = jnp.concatenate([repeated, embeddings], axis=1)
        return module.apply({"params": weights}, u)

    def raw(phi, condition):
        shared, embeddings = (phi["mlp"], condition), phi["chunks"]
        if chunk_batch_size == 0:
            return chunks.assemble(emit(shared, embeddings))
        return chunks.stream(emit, shared, embeddings, chunk_batch_size)

    offsets = jax.tree.unflatten(
        jax.tree.structure(template),
        [
            norm_scale_offset * (path.split("/")[-1] == "scale")
            for path in tree.paths(template)
        ],
    )
    factors = _factors(raw, init, template, condition_size, out_scale)

    def generate(phi, condition):
        target = raw(phi, condition)
        if factors is not None:
            target = jax.tree.map(jnp.multiply, target, factors)
        if norm_scale_offset:
            target = jax.tree.map(jnp.add, target, offsets)
        return target

    return HyperNet(init, generate)


def _factors(raw, init, template, condition_size: int, out_scale: str) -> PyTree | None:
    """Fixed factor per tensor: its own initial deviation over the generated one."""
    if out_scale == "none":
        return None

    def factor(own):
        deviation = float(jnp.std(own))
        # Constant tensors (zero biases, unit scales) have no deviation to match.
        return deviation / float(jnp.std(entries)) if deviation > 0 else 1.0

    with jax.ensure_compile_time_eval():
        key = jax.random.key(0)
        uniform = jnp.full(condition_size, 1.0 / condition_size)
        generated = jax.jit(raw)(init(key), uniform)
        entries = jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(generated)])
        return jax.tree.map(factor, template)


def num_parameters(net: HyperNet) -> int:
    """Returns |phi|."""
    return tree.count(jax.eval_shape(net.init, jax.random.key(0)))
