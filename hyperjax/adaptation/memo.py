"""Adaptation to each input alone, by views of it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hyperjax import tree
from hyperjax.data.shift import turned
from hyperjax.errors import check_at_least, check_number
from hyperjax.models import memory
from hyperjax.types import ClientSide
from hyperjax.wrappers import adapting

VIEWS = "views"  # in memory: MEMO's degrees and pixels down and across, [V, 3]


def memo(
    *,
    learning_rate: float = 5e-4,
    steps: int = 3,
    views: int = 16,
    degrees: float = 15.0,
    moved: float = 0.1,
) -> Callable[[ClientSide], ClientSide]:
    """Trains the network on views of an input, predicts it, and forgets.

    MEMO, Zhang, Levine, Finn 2022 (NeurIPS, arXiv:2110.09506): for each input alone,
    steps of SGD along the entropy of the mean prediction over views of it. Defaults are
    FedTHE's, whose client with it is FedTHE+ (arXiv:2205.10920). An input takes as much
    time as training on `steps` batches of so many views.

    Deviation: views are turned and moved, where the authors have chains of AugMix; all
    inputs of a client have the same ones, so that their order changes nothing.

    Args:
      learning_rate: of SGD.
      steps: of it, for each input.
      views: of an input.
      degrees: how far a view is turned at most.
      moved: how far it is moved at most, share of its sides.

    Raises:
      ValueError: a number is out of range, or inputs are no images.
    """
    check_number(above=0, learning_rate=learning_rate)
    check_number(at_least=0, degrees=degrees, moved=moved)
    check_at_least(0, steps=steps)
    check_at_least(1, views=views)

    def change(side: ClientSide) -> ClientSide:
        model = side.model
        if len(model.sample_shape) != 3:
            raise ValueError(
                "adapt='memo' turns and moves images [H, W, c], and inputs are "
                f"{list(model.sample_shape)}; accepted: images, or another adaptation"
            )
        most = jnp.array([degrees, *(moved * side for side in model.sample_shape[:2])])

        def adapt(key, variables, inputs):
            draws = jax.random.uniform(key, (views, 3), minval=-1.0)
            return memory.put(variables, VIEWS, draws * most)

        def apply(variables, x):
            drawn = memory.get(variables, VIEWS)
            variables = memory.without(variables, VIEWS)
            if isinstance(drawn, tuple):
                return model.apply(variables, x)

            def one(image):
                seen = jax.vmap(
                    lambda view: turned(image, view[0], view[1:], outside="nearest")
                )(drawn)

                def uncertain(params):
                    logits = model.predict({**variables, "params": params}, seen)
                    mean = jax.nn.logsumexp(jax.nn.log_softmax(logits), 0, 1 / views)
                    return -jnp.sum(jnp.exp(mean) * mean)

                def step(params, _):
                    grads = jax.grad(uncertain)(params)
                    return tree.sub(params, tree.scale(grads, learning_rate)), None

                params = jax.lax.scan(step, variables["params"], None, steps)[0]
                own = model.apply({**variables, "params": params}, image[None])
                return jax.tree.map(lambda x: x[0], own)

            return jax.lax.map(one, x)

        changed = adapting(side, adapt)
        return changed._replace(model=model._replace(apply=apply))

    return change
