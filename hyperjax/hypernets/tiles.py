"""HyperFedNet's filter generator: convolutions put together from generated tiles.

Chen, Huang, Xie, Pang 2024, "HyperFedNet: Communication-Efficient Personalized
Federated Learning Via Hypernetwork" (arXiv:2402.18445), after Ha, Dai, Le 2017
(arXiv:1609.09106). A tile is a 3x3 kernel with 16 inputs and 16 outputs. From an
embedding v [n],

    a_i = W_i v + B_i          for each of the 16 input channels,
    F_i = W_out a_i + B_out    the 3x3x16 numbers that leave channel i,

two linear maps without a nonlinearity, the second shared by all channels. A kernel of
C_in x C_out channels is a grid of C_in / 16 rows and C_out / 16 columns of tiles.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hyperjax import tree
from hyperjax.errors import check_at_least, check_choice
from hyperjax.types import Array, PyTree, in_one_line

INITS = ("variance", "normal")
SLICES = ("input", "output")


class TileNet(NamedTuple):
    """A generator of kernels.

    Attributes:
      targets: path -> shape (k, k, C_in, C_out) of the generated kernels.
      num_tiles: embeddings that one network takes.
      init: `(key) -> phi`.
      init_embeddings: `(key) -> {path: [C_in / tile, C_out / tile, n]}`.
      generate: `(phi, embeddings) -> {path: kernel}`.
    """

    targets: dict[str, tuple[int, ...]]
    num_tiles: int
    init: Callable
    init_embeddings: Callable
    generate: Callable

    def __repr__(self) -> str:
        return in_one_line(self)


def tile_net(
    template: PyTree,
    *,
    embedding_size: int,
    tile: int = 16,
    size: int = 3,
    hidden_size: int | None = None,
    init: str = "variance",
    slices: str = "input",
) -> TileNet:
    """Builds the generator of all kernels that tiles fit.

    phi = {"in": {"w" [tile, d, n], "b" [tile, d]}, "out": {"w" [size^2 tile, d], "b"
    [size^2 tile]}} with d = n, so that |phi| = 16 n^2 + 160 n + 144 for 3x3 tiles of
    16. Methods that mix models by layer see two.

    Args:
      template: the target's parameters; leaves [size, size, C_in, C_out] with both
        channel numbers multiples of `tile` are generated.
      embedding_size: n.
      tile: channels of a tile, in and out.
      size: its width and height.
      hidden_size: d; None for n, as published.
      init: "variance" gives each kernel the variance 2 / (size^2 C_in) of He's
        initialisation; "normal" draws everything from N(0, 1) cut off at 2, as the
        code does that the method descends from (its kernels are 400 times too large
        for a network without normalisation).
      slices: the channel that i counts: "input", as published, or "output".

    Raises:
      ValueError: a size below 1, an unknown choice, or no kernel that tiles fit.
    """
    check_at_least(1, embedding_size=embedding_size, tile=tile, size=size)
    check_choice("init", init, INITS)
    check_choice("slices", slices, SLICES)
    n = embedding_size
    d = n if hidden_size is None else hidden_size
    check_at_least(1, hidden_size=d)
    shapes = zip(tree.paths(template), jax.tree.leaves(template), strict=True)
    targets = {
        path: leaf.shape
        for path, leaf in shapes
        if leaf.shape[:2] == (size, size)
        and leaf.ndim == 4
        and all(channels % tile == 0 for channels in leaf.shape[2:])
    }
    if not targets:
        raise ValueError(
            f"no kernel of the model is made of tiles {size}x{size}x{tile}x{tile}, as "
            "those of resnet8 and other residual networks are; weights of any network "
            "are emitted by hypernet='chunked_mlp', or one of yours (leaves are "
            f"{', '.join(tree.paths(template)[:8])})"
        )
    grids = {path: (s[2] // tile, s[3] // tile) for path, s in targets.items()}
    counts = {path: math.prod(grid) for path, grid in grids.items()}

    def draw(key, shape, deviation):
        if init == "normal":
            return jax.random.truncated_normal(key, -2.0, 2.0, shape)
        return deviation * jax.random.normal(key, shape)

    def init_phi(key):
        keys = jax.random.split(key, 4)
        # Variance 1 / fan_in keeps what the embedding's variance is.
        return {
            "in": {
                "w": draw(keys[0], (tile, d, n), n**-0.5),
                "b": draw(keys[1], (tile, d), 0.0),
            },
            "out": {
                "w": draw(keys[2], (size * size * tile, d), d**-0.5),
                "b": draw(keys[3], (size * size * tile,), 0.0),
            },
        }

    def init_embeddings(key):
        keys = jax.random.split(key, len(targets))

        def one(key, path):
            deviation = (2.0 / (size * size * targets[path][2])) ** 0.5
            return draw(key, (*grids[path], n), deviation)

        return {path: one(key, path) for key, path in zip(keys, targets, strict=True)}

    def generate(phi, embeddings):
        vectors = jnp.concatenate([embeddings[p].reshape(-1, n) for p in targets])
        first_map, second_map = phi["in"], phi["out"]
        hidden = jnp.einsum("tn,cdn->tcd", vectors, first_map["w"]) + first_map["b"]
        numbers = jnp.einsum("tcd,od->tco", hidden, second_map["w"]) + second_map["b"]
        kernels, first = {}, 0
        for path, shape in targets.items():
            part = jax.lax.slice_in_dim(numbers, first, first + counts[path])
            kernels[path] = assemble(part, grids[path]).reshape(shape)
            first += counts[path]
        return kernels

    def assemble(numbers: Array, grid: tuple[int, int]) -> Array:
        """[tiles, channel, size * size * channel] -> [size, size, C_in, C_out]."""
        tiles = numbers.reshape(*grid, tile, size, size, tile)  # row, col, i, k, k, o
        order = (3, 4, 0, 2, 1, 5) if slices == "input" else (3, 4, 0, 5, 1, 2)
        rows, columns = grid
        return tiles.transpose(order).reshape(size, size, rows * tile, columns * tile)

    return TileNet(targets, sum(counts.values()), init_phi, init_embeddings, generate)


def of_all_weights(template: PyTree, emit: Callable, embedding_size: int) -> TileNet:
    """Returns a generator of all weights but the head's, from one embedding.

    Args:
      template: the target's parameters; leaves of two axes and more are generated.
      emit: from them, by path, to the `HyperNet` that emits them.
      embedding_size: n.

    Raises:
      ValueError: a size below 1, or there is no weight but the head's.
    """
    check_at_least(1, embedding_size=embedding_size)
    weights = {
        path: leaf
        for path, leaf in tree.by_path(template).items()
        if leaf.ndim >= 2 and not path.startswith("head/")
    }
    if not weights:
        raise ValueError("the model has no weights but those of its head")
    net = emit(weights)
    return TileNet(
        {path: leaf.shape for path, leaf in weights.items()},
        1,
        net.init,
        lambda key: {"weights": jax.random.normal(key, (embedding_size,))},
        lambda phi, embeddings: net.generate(phi, embeddings["weights"]),
    )
