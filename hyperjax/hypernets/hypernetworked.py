"""A network whose convolutions come out of a tile generator, as a `Model`."""

import re

import jax

from hyperjax import tree
from hyperjax.errors import check_choice
from hyperjax.hypernets.tiles import TileNet
from hyperjax.types import Model, PyTree, Visit, cannot_rebuild

REGENERATE = ("every_step", "per_round")
EMBEDDING_INITS = ("own", "common")


def hypernetworked(
    model: Model,
    net: TileNet,
    *,
    regenerate: str = "every_step",
    embedding_init: str = "common",
) -> Model:
    """Returns `model` with the kernels of `net.targets` generated from embeddings.

    Its parameters are {"hyper": phi, "embed": {path: [rows, columns, n]}, "network":
    {path: leaf} of all that is not generated}, its statistics the model's.

    Args:
      model: the network underneath.
      net: the generator.
      regenerate: "every_step" generates the kernels in every forward pass, so that
        generator and embeddings are trained end to end. "per_round" is the listing of
        arXiv:2402.18445, algorithm 1, line by line: kernels are generated at the start
        of a visit and then trained as independent arrays ("generated"), while generator
        and embeddings follow by the chain rule; what became of the kernels is used for
        nothing (but stays in the client's state until the next visit). The two agree in
        the first step of a visit.
      embedding_init: every client starts from the "common" draw, or draws its "own" on
        its first visit.

    Raises:
      ValueError: an unknown choice, or a model that changes its variables itself when
        a client arrives, comes or goes.
    """
    check_choice("regenerate", regenerate, REGENERATE)
    check_choice("embedding_init", embedding_init, EMBEDDING_INITS)
    # They are for variables that exist only while a network is generated.
    model.check_without("a hypernetwork", "arrive", "enter", "leave")
    per_round = regenerate == "per_round"
    template = jax.eval_shape(model.init, jax.random.key(0))["params"]
    cut = tree.splitter(template, [re.escape(path) for path in net.targets])

    def kernels(params):
        return net.generate(params["hyper"], params["embed"])

    def init(key):
        key_model, key_hyper, key_embed = jax.random.split(key, 3)
        plain = model.init(key_model)
        params = {
            "hyper": net.init(key_hyper),
            "embed": net.init_embeddings(key_embed),
            "network": cut.split(plain["params"])[1],
        }
        return enter({"params": params, "stats": plain["stats"]})

    def enter(variables):
        params = variables["params"]
        if not per_round:
            return variables
        return {**variables, "params": {**params, "generated": kernels(params)}}

    def network_of(variables: PyTree, generated=None) -> PyTree:
        """The variables of the network itself."""
        params = variables["params"]
        generated = kernels(params) if generated is None else generated
        whole = cut.merge(generated, params["network"])
        return {**variables, "params": whole}

    def in_training(variables):
        if not per_round:
            return network_of(variables)
        params = variables["params"]
        fresh = kernels(params)
        # The value of the independent kernels, the derivative of both.
        passed_on = tree.sub(fresh, jax.lax.stop_gradient(fresh))
        return network_of(variables, tree.add(params["generated"], passed_on))

    def arrive(key, variables):
        if embedding_init == "common":
            return variables
        params = {**variables["params"], "embed": net.init_embeddings(key)}
        return enter({**variables, "params": params})

    def loss(key, variables, batch, context):
        return model.loss(key, in_training(variables), batch, context)

    return model.around(
        "sample_shape",
        init=init,
        loss=loss,
        apply=lambda variables, x: model.apply(network_of(variables), x),
        visit=Visit(
            arrive,
            enter,
            lambda variables, data: model.visit.context(network_of(variables), data),
        ),
        serve=model.serve.seen(network_of),
        with_shape=cannot_rebuild,
    )
