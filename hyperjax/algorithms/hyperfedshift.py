"""HyperFedShift: classifiers for clients whose inputs are shifted, from inputs alone.

Of this package. FedAvg of a classifier whose parameters depend on what a client's
unlabelled inputs look like, through a learned basis of directions in weight space:

    z     = mean of f(x) over a context of the client's inputs     [E]
    e     = (z - mu) / sigma
    theta = theta_0 + sum_k a_k Delta_k,      a = tanh(e R + r) / sqrt(K)

Delta = 0 at the start, so that training begins as FedAvg's. A step has one e for its
batch, of a context that is drawn apart from it; an unseen client's is that of all its
inputs, once, and one classifier as large as theta_0 is what it runs. mu and sigma are
moments over clients of z: each sends, beside its change, z of all its inputs under what
it has trained, and the server keeps running moments, which it sends with theta. They
are constants to the gradient, which runs through z into f.

The loss is the usual one; with `local.balanced`, label-shift EM starts from a uniform
prior. Two things keep z from standing for a label mix: `virtual` mixes each step's
labels anew, and with `even` z is the mean over a client's classes of their inputs'
means,

    z = sum_k w_k z_k / sum_k w_k,   w_k = min(1, share of class k / 2 %)

Participants know classes by their labels. An unseen client, in two passes, by what the
network of its last e takes each input for.

Controls: e = 0 always ("constant"), e the true parameters of the client's shift
("oracle", see `data.shift`), f fixed: means of pixels and of their squares on a grid of
4 x 4 ("moments"). Where it stands beside FedAvg, and where it gains nothing, is in
RESULTS.md.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax import rng, tree, wrappers
from hyperjax.algorithms.fedavg import fedavg, told
from hyperjax.data import clients, shift
from hyperjax.errors import check_at_least, check_choice, check_number
from hyperjax.hypernets import basis
from hyperjax.hypernets.embedding import Trunk, mean_embedding
from hyperjax.models import layers, memory
from hyperjax.registry import hands_on
from hyperjax.training import Local, check_given
from hyperjax.types import (
    Algorithm,
    Array,
    Batch,
    ClientData,
    Downlink,
    HyperNet,
    Key,
    Model,
    PyTree,
    Serve,
    ServerSide,
    Visit,
    cannot_rebuild,
)

FORMS = ("lowrank", "full", "chunked")
EMBEDDINGS = ("learned", "constant", "oracle", "moments")
EXTRACTORS = ("mlp", "conv")
MOMENTS = "moments"  # in memory: {"mean": [E], "deviation": [E]} of z over clients
GRID = 4
_AT_ONCE = 256  # inputs looked at at a time outside training
_FLOOR = 1e-3  # of a deviation
_SHARE_FLOOR = 1e-4  # of a class that a client has
_RARE = 0.02  # share below which a class counts less where classes count evenly
_PASSES = 2  # of an unseen client's e by its own predictions


@hands_on(fedavg)
def hyperfedshift(
    model: Model,
    *,
    local: Local,
    form: str = "lowrank",
    num_directions: int = 8,
    rank: int = 4,
    chunk_size: int = 512,
    chunk_batch_size: int = 0,
    width: int = 64,
    embedding: str = "learned",
    embedding_size: int = 16,
    extractor: str = "mlp",
    extractor_size: int = 64,
    context: int = 64,
    virtual: bool = False,
    even: bool = False,
    moving: float = 0.2,
    **fedavg_options,
) -> Algorithm:
    """Returns HyperFedShift around the classifier `model`.

    Args:
      model: the classifier, theta_0 at the start.
      local: how clients train, see `fedavg`.
      form: how directions are written: matrices of them as products ("lowrank"), in
        "full", or emitted by chunks that e gates ("chunked"), for large networks.
      num_directions: K, of "lowrank" and "full".
      rank: of "lowrank".
      chunk_size: numbers in a chunk, of "chunked".
      chunk_batch_size: chunks at a time, of "chunked"; 0: all.
      width: of a chunk's embedding, of "chunked".
      embedding: what e is: "learned", or one of the controls "constant", "oracle" and
        "moments".
      embedding_size: E, of "learned".
      extractor: f: one hidden layer ("mlp"), or strided convolutions ("conv").
      extractor_size: of the hidden layer of "mlp".
      context: inputs that a training step's e is of, drawn with replacement.
      virtual: whether steps have batch and context of class shares drawn anew from the
        simplex of the classes that the client has.
      even: whether a client's classes count evenly in z, whatever their shares.
      moving: share of a round's moments in the running ones, in (0, 1].
      **fedavg_options: of `fedavg`.

    Raises:
      ValueError: an unknown choice, a number out of range, or a model that has a
        condition or hooks already.
    """
    check_given(model, local)
    if len(model.sample_shape) != 3:
        raise ValueError(
            "HyperFedShift is for images, [n, H, W, c]; inputs here have the shape "
            f"{model.sample_shape}"
        )
    check_choice("form", form, FORMS)
    check_choice("embedding", embedding, EMBEDDINGS)
    check_choice("extractor", extractor, EXTRACTORS)
    # Also of another form, or of a control: a number that is none is a mistake.
    check_at_least(
        1,
        num_directions=num_directions,
        rank=rank,
        chunk_size=chunk_size,
        width=width,
        embedding_size=embedding_size,
        extractor_size=extractor_size,
        context=context,
    )
    check_at_least(0, chunk_batch_size=chunk_batch_size)
    check_number(above=0, at_most=1, moving=moving)
    model.check_without("hyperfedshift", *Visit._fields, "condition")
    view = _view(model, embedding, embedding_size, extractor, extractor_size)
    template = jax.eval_shape(model.init, jax.random.key(0))["params"]
    if form == "chunked":
        net = basis.gated(
            template,
            condition_size=view.size,
            chunk_size=chunk_size,
            width=width,
            chunk_batch_size=chunk_batch_size,
        )
    else:
        net = basis.directions(
            template,
            condition_size=view.size,
            num_directions=num_directions,
            rank=rank if form == "lowrank" else 0,
        )
    num_classes = _num_classes(model)
    whole = shifted(model, view, net, num_classes, context, virtual, even)
    alg = fedavg(whole, local=local, **fedavg_options)
    if not view.moving:
        return alg
    return _with_moments(alg, view, moving, num_classes if even else 0)


# What a client looks like ------------------------------------------------------------


class View(NamedTuple):
    """How clients are described: functions of the extractor's parameters.

    `features` is of inputs [B, ...], [B, E]; a description z is their mean. `told` is
    of a client itself, [E], for clients that need not be looked at.
    """

    size: int  # E
    init: Callable  # (key) -> parameters
    features: Any = None  # (parameters, x) -> [B, E]
    told: Any = None  # (ClientData) -> [E]

    @property
    def moving(self) -> bool:
        """Whether z is what inputs say, and so has moments over clients."""
        return self.features is not None

    def mean(self, params: PyTree, data: ClientData) -> Array:
        """Returns z of all of a client's inputs, [E]; 0 of none."""

        def step(total, batch):
            z = mean_embedding(self.features(params, batch.x), batch.mask)
            return total + jnp.sum(batch.mask) * z

        total = clients.fold(step, jnp.zeros(self.size), data, _AT_ONCE)
        return total / jnp.maximum(data.size, 1)

    def even_mean(
        self,
        params: PyTree,
        data: ClientData,
        classes: Callable[[Batch], Array],
        num_classes: int,
    ) -> Array:
        """Returns z with classes counting evenly, [E]; `classes` of a batch: [B, K]."""

        def step(carry, batch):
            sums, counts = carry
            share = classes(batch) * batch.mask[:, None]
            features = self.features(params, batch.x)
            return sums + share.T @ features, counts + jnp.sum(share, 0)

        start = jnp.zeros((num_classes, self.size)), jnp.zeros(num_classes)
        sums, counts = clients.fold(step, start, data, _AT_ONCE)
        each = sums / jnp.maximum(counts, 1e-12)[:, None]
        return _evenly(counts / jnp.maximum(data.size, 1)) @ each


class Extractor(nn.Module):
    """f, without normalisation, which would tell inputs of each other: [B, E]."""

    kind: str
    hidden: int
    size: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        he, zeros = nn.initializers.he_normal(), nn.initializers.zeros
        if self.kind == "conv":
            features = Trunk(name="trunk")(x)
        else:
            x = x.reshape(x.shape[0], -1)
            features = nn.relu(layers.Dense(self.hidden, he, zeros, name="hidden")(x))
        return layers.Dense(self.size, he, zeros, name="out")(features)


def learned(model: Model, size: int, extractor: str, hidden: int) -> View:
    """Returns the view of inputs of `model` through an `Extractor`."""
    module = Extractor(extractor, hidden, size)
    x = jnp.zeros((1, *model.sample_shape))

    def features(params, x):
        return module.apply({"params": params}, x)

    return View(size, lambda key: module.init(key, x)["params"], features)


def _evenly(shares: Array) -> Array:
    """Weights of classes [K], of sum 1: the same but for rare ones; 0 of nobody's."""
    weight = jnp.minimum(shares / _RARE, 1.0)
    return weight / jnp.maximum(jnp.sum(weight), 1e-12)


def _num_classes(model: Model) -> int:
    start = jax.eval_shape(model.init, jax.random.key(0))
    blank = jax.ShapeDtypeStruct((1, *model.sample_shape), jnp.float32)
    return jax.eval_shape(model.predict, start, blank).shape[-1]


def _view(model: Model, embedding: str, size: int, extractor: str, hidden: int) -> View:
    if embedding == "learned":
        return learned(model, size, extractor, hidden)
    if embedding == "moments":
        trial = jax.eval_shape(_pixel_moments, jnp.zeros((1, *model.sample_shape)))
        return View(trial.shape[1], lambda key: {}, lambda params, x: _pixel_moments(x))
    if embedding == "oracle":
        size = len(_true_shift(jnp.asarray(shift.IDENTITY)))
        return View(size, lambda key: {}, told=_oracle)
    return View(1, lambda key: {}, told=lambda data: jnp.zeros(1))


def _pixel_moments(x: Array) -> Array:
    """Means of pixels and of their squares in GRID x GRID fields, [B, 2 GRID^2 c]."""
    x = x.reshape(x.shape[0], x.shape[1], -1, x.shape[-1])
    down, across = (
        jax.nn.one_hot(jnp.arange(n) * GRID // n, GRID) for n in x.shape[1:3]
    )
    down, across = (w / jnp.maximum(w.sum(0), 1.0) for w in (down, across))
    both = jnp.stack([x, x**2], 1)
    found = jnp.einsum("bshwc,hi,wj->bsijc", both, down, across)
    return found.reshape(x.shape[0], -1)


def _true_shift(values: Array) -> Array:
    """The parameters of a shift as numbers near 0 or 1, without a seam at 360."""
    own = dict(zip(shift.PARAMETERS, values, strict=True))
    own = {name: x for name, x in own.items() if name not in shift.BY_CLASS}
    angle = jnp.deg2rad(own.pop("angle"))
    return jnp.stack([jnp.sin(angle), jnp.cos(angle), *own.values()])


def _oracle(data: ClientData) -> Array:
    pool = data.pool
    if isinstance(pool.shift, tuple):  # nobody's images are shifted
        return _true_shift(jnp.asarray(shift.IDENTITY))
    return _true_shift(pool.shift[pool.owner[data.rows[0]]])


# The model ---------------------------------------------------------------------------


def shifted(
    model: Model,
    view: View,
    net: HyperNet,
    num_classes: int,
    context: int,
    virtual: bool,
    even: bool,
) -> Model:
    """Returns `model` under a condition: {"network", "basis", "extractor"}.

    Args:
      model: the network underneath.
      view: what the condition is computed by.
      net: emits, of a condition [E], what is added to the network's parameters.
      num_classes: K.
      context: inputs that a training step's condition is of.
      virtual: see `hyperfedshift`.
      even: likewise.
    """

    def init(key):
        # The network's own draw: it starts where FedAvg's does.
        plain = model.init(key)
        key_basis, key_view = jax.random.split(rng.stream(key, "shifted"))
        params = {"network": plain["params"], "basis": net.init(key_basis)}
        params |= {"extractor": view.init(key_view)}
        variables = {"params": params, "stats": plain["stats"]}
        if not view.moving:
            return variables
        entry = {"mean": jnp.zeros(view.size), "deviation": jnp.ones(view.size)}
        return memory.put(variables, MOMENTS, entry)

    def standardised(variables, z):
        entry = memory.get(variables, MOMENTS)
        return (z - entry["mean"]) / entry["deviation"]

    def plain(variables, e):
        params = variables["params"]
        delta = net.generate(params["basis"], e)
        return {
            "params": tree.add(params["network"], delta),
            "stats": variables["stats"],
        }

    def loss(key, variables, batch, data):
        key_mix, key_batch, key_context, key_model = jax.random.split(key, 4)
        draw = with_replacement(data)
        if virtual:
            shares = _mixed(key_mix, data, num_classes)
            draw = _by_class(data, shares)
            batch = _redrawn(key_batch, batch, data, draw, shares)
        if view.features is None:
            e = view.told(data)
        else:
            if even:
                draw = _by_class(data, _evenly(clients.class_shares(data, num_classes)))
            seen = clients.gather(
                data.pool, draw(key_context, context), jnp.ones(context)
            )
            features = view.features(variables["params"]["extractor"], seen.x)
            e = standardised(variables, jnp.mean(features, 0))
        return model.loss(key_model, plain(variables, e), batch, ())

    def condition(variables, inputs):
        if view.features is None:
            return view.told(inputs)
        extractor = variables["params"]["extractor"]
        e = standardised(variables, view.mean(extractor, inputs))
        for _ in range(_PASSES if even else 0):
            own = plain(variables, e)

            def taken_for(batch, own=own):
                return jax.nn.softmax(model.predict(own, batch.x))

            z = view.even_mean(extractor, inputs, taken_for, num_classes)
            e = standardised(variables, z)
        return jnp.where(inputs.size > 0, e, 0.0)  # of nothing: a client in the middle

    def network(variables):
        e = memory.get(variables, "condition")
        return plain(variables, jnp.zeros(view.size) if isinstance(e, tuple) else e)

    def inspect(variables, inputs):
        return {"shift_embedding": condition(variables, inputs)}

    constant = view.features is None and view.size == 1
    return model.around(
        "sample_shape",
        init=init,
        loss=loss,
        apply=lambda variables, x: model.apply(network(variables), x),
        visit=Visit(context=lambda variables, data: data),
        serve=Serve(export=network) if constant else Serve(condition, network, inspect),
        with_shape=cannot_rebuild,
    )


def with_replacement(data: ClientData) -> Callable[[Key, int], Array]:
    """Returns `(key, num) -> rows [num]` drawn with replacement."""

    def draw(key, num):
        place = jax.random.randint(key, (num,), 0, jnp.maximum(data.size, 1))
        return data.rows[place]

    return draw


def _mixed(key: Key, data: ClientData, num_classes: int) -> Array:
    """Class shares [K] uniform on the simplex of the classes that a client has."""
    has = clients.class_shares(data, num_classes) > 0
    draw = jax.random.exponential(key, (num_classes,))
    draw = jnp.where(has, draw / jnp.maximum(jnp.sum(draw * has), 1e-12), 0.0)
    draw = jnp.where(has, draw + _SHARE_FLOOR, 0.0)
    return draw / jnp.maximum(jnp.sum(draw), 1e-12)


def _by_class(data: ClientData, shares: Array) -> Callable[[Key, int], Array]:
    """Returns `(key, num) -> rows [num]` of classes in the given shares [K]."""
    mask = jnp.arange(data.rows.shape[0]) < data.size
    labels = data.pool.y[data.rows]
    count = clients.class_shares(data, len(shares)) * data.size
    each = jnp.where(mask, shares[labels] / jnp.maximum(count[labels], 1), 0.0)
    cumulated = jnp.cumsum(each)

    def draw(key, num):
        at = jax.random.uniform(key, (num,)) * cumulated[-1]
        place = jnp.searchsorted(cumulated, at, side="right")
        return data.rows[jnp.minimum(place, jnp.maximum(data.size - 1, 0))]

    return draw


def _redrawn(
    key: Key, batch: Batch, data: ClientData, draw: Callable, shares: Array
) -> Batch:
    """A batch of the same size from a virtual client; balanced by its shares."""
    rows = draw(key, batch.mask.shape[0])
    found = clients.gather(data.pool, rows, batch.mask)
    balanced = not isinstance(batch.prior, tuple)
    return found._replace(prior=shares if balanced else ())


# Moments of descriptions -------------------------------------------------------------


class State(NamedTuple):
    """Server state: FedAvg's, and running moments over clients of z, [E] each."""

    inner: PyTree
    mean: Array
    deviation: Array
    started: Array  # [] float32, 1 once somebody has sent z


class Sent(NamedTuple):
    """What clients are sent: FedAvg's message and the moments."""

    inner: PyTree
    mean: Array
    deviation: Array


class Uplink(NamedTuple):
    """What a client sends: FedAvg's message, and z of all its inputs."""

    inner: PyTree
    description: Array  # [E]


def _with_moments(alg: Algorithm, view: View, moving: float, even: int) -> Algorithm:
    """Returns FedAvg of a shifted model whose server keeps the moments of z.

    `even` is K where classes count evenly in z, and 0 where they do not.
    """
    inner, inside = alg.server, alg.client

    def received(down):
        return Downlink(shared=down.shared.inner, round=down.round)

    def informed(down, state):
        entry = {"mean": down.shared.mean, "deviation": down.shared.deviation}
        return told(state, {MOMENTS: entry})

    side = wrappers.through(inside, received, informed)

    def init(common):
        zeros = jnp.zeros(view.size)
        return State(inner.init(common), zeros, zeros + 1, jnp.float32(0))

    def downlink(key, server, cohort):
        down = inner.downlink(key, server.inner, cohort)
        return Downlink(shared=Sent(down.shared, server.mean, server.deviation))

    def update(key, down, state, data):
        message, state, info = side.update(key, down, state, data)
        anchor, sent = down.shared.inner
        theta = tree.add(anchor, message.delta)
        after = inside.deploy(Downlink(shared=(theta, sent), round=down.round), state)
        extractor = after["params"]["extractor"]
        if even:

            def classes(batch):
                return jax.nn.one_hot(batch.y, even)

            z = view.even_mean(extractor, data, classes, even)
        else:
            z = view.mean(extractor, data)
        return Uplink(message, z), state, info

    def absorb(key, server, uplink, cohort):
        state, info = inner.update(key, server.inner, uplink.inner, cohort)
        weight = cohort.weight * cohort.active
        share = weight / jnp.maximum(jnp.sum(weight), 1e-12)
        z = uplink.description
        mean = share @ z
        deviation = jnp.sqrt(share @ (z - mean) ** 2) + _FLOOR
        # The first moments are taken whole; one client alone has no deviation.
        step = jnp.where(server.started > 0, moving, 1.0)
        some, several = jnp.sum(weight) > 0, jnp.sum(weight > 0) > 1
        new = State(
            state,
            server.mean + jnp.where(some, step, 0.0) * (mean - server.mean),
            server.deviation
            + jnp.where(several, step, 0.0) * (deviation - server.deviation),
            jnp.where(some, 1.0, server.started),
        )
        return new, info

    exact = (r"description", *(f"inner/{pattern}" for pattern in alg.exact))
    return alg._replace(
        server=ServerSide(init, downlink, absorb),
        client=side._replace(update=update),
        exact=exact,
    )
