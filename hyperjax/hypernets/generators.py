"""The hypernetwork of a method by name, or one of yours: its option `hypernet`.

A generator is `function(template, *, condition_size, **options) -> HyperNet`: of the
target's leaves, which are abstract (shapes and dtypes), and the numbers of a condition.
It is named in text, "chunked_mlp(hidden=(32,))" or "package.module:function(rank=4)",
or given as it is.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax

from hyperjax import calls, registry, tree
from hyperjax.errors import check_choice, shown
from hyperjax.hypernets import heads, mlp
from hyperjax.types import HyperNet, PyTree

GENERATORS = {"chunked_mlp": mlp.chunked_mlp, "per_tensor": heads.per_tensor}


def generator(hypernet: str | Callable, template: PyTree, size: int) -> HyperNet:
    """Returns the hypernetwork that `hypernet` names, for a target.

    Args:
      hypernet: see above.
      template: the target's leaves, abstract or concrete.
      size: d, numbers of a condition.

    Raises:
      ValueError, TypeError: there is none of this name, or it does not take these
        options, or what it emits for a condition [d] is not of the template's form.
    """
    options: dict[str, Any] = {}
    function: Any = hypernet
    if isinstance(hypernet, str):
        name, options = calls.parse("hypernet", hypernet)
        if ":" in name:
            what = "function(template, *, condition_size, ...)"
            function = registry.find_object(name, "hypernet", what)
        else:
            check_choice("hypernet", name, GENERATORS)
            function = GENERATORS[name]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), template)
    if not _takes_a_condition(function):
        raise ValueError(
            f"hypernet={shown(hypernet)} is no "
            "function(template, *, condition_size, ...)"
        )
    options = {"condition_size": size, **options}
    net = calls.call("hypernet", function, shapes, **options)
    if not isinstance(net, HyperNet):
        raise TypeError(
            f"hypernet={shown(hypernet)} returns {type(net).__name__}; expected a "
            "hyperjax.types.HyperNet(init, generate)"
        )
    phi = jax.eval_shape(net.init, jax.random.key(0))
    condition = jax.ShapeDtypeStruct((size,), "float32")
    expected = _forms(shapes)
    emitted = _forms(jax.eval_shape(net.generate, phi, condition))
    for path in {**expected, **emitted}:
        if emitted.get(path) != expected.get(path):
            raise ValueError(
                f"hypernet={shown(hypernet)} emits {emitted.get(path, 'nothing')} for "
                f"{path!r}; the template has {expected.get(path, 'no such leaf')}"
            )
    return net


def _takes_a_condition(function: Any) -> bool:
    try:
        return "condition_size" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # nothing to call, or it does not say what it takes
        return False


def _forms(leaves: PyTree) -> dict[str, str]:
    """Shapes and dtypes by path."""
    return {k: f"{v.dtype}{v.shape}" for k, v in tree.by_path(leaves).items()}
