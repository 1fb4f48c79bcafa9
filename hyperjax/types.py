"""The contract between a federated method and the engine: named tuples of functions.

A method is an `Algorithm`: what the server does and what one client does. They talk
only through messages (`Downlink` and an uplink tree of the method's choice), so the
size of a message *is* the cost of communication. Client functions are written for one
client; the engine adds the client axis, stores client state and counts bytes.

Glossary of shapes: N clients in the population, C in the cohort, B in a batch,
K classes.
"""

import math
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any
Key: TypeAlias = jax.Array

ALONE = ""  # the only family of a method without families; a part of no path and no key


def in_one_line(self) -> str:
    """The `__repr__` of named tuples: who made the functions, and what else there is.

    A function that nobody but its own module calls is the module's.
    Arrays are told by type and shape, other trees of them by how many numbers they
    have, and what is as usual is left out.

    Example:
      >>> HyperNet(print, print)
      HyperNet(of print)
    """
    usual, makers, parts = self._field_defaults, [], []
    for name, value in self._asdict().items():
        maker = getattr(value, "__qualname__", "").partition(".<locals>")[0]
        if callable(value) and not isinstance(value, tuple):
            if maker.startswith("_"):
                maker = value.__module__.rpartition(".")[2]
            makers += [maker] if maker not in ("", "<lambda>") else []
        elif not (value is None or value is usual.get(name, ...) or _is_empty(value)):
            parts.append(f"{name}={_told(value)}")
    who = ", ".join(dict.fromkeys(makers))
    return f"{type(self).__name__}({', '.join([f'of {who}'] * bool(who) + parts)})"


def _is_empty(value: Any) -> bool:
    return isinstance(value, tuple | dict) and not value


def _told(value: Any) -> str:
    """What a field holds, in a few words."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    if type(value).__repr__ not in (tuple.__repr__, dict.__repr__, object.__repr__):
        return textwrap.shorten(repr(value), 100, placeholder=" ...")
    leaves = jax.tree.leaves(value)
    if leaves and all(hasattr(leaf, "shape") for leaf in leaves):
        return f"{_count(value):,} numbers"
    plain = all(isinstance(leaf, bool | int | float | str) for leaf in leaves)
    if plain and not isinstance(value, Mapping):
        return textwrap.shorten(repr(value), 60, placeholder=" ...")
    return (
        f"{len(value)} entries" if hasattr(value, "__len__") else type(value).__name__
    )


def _count(tree: PyTree) -> int:  # as `hyperjax.tree.count`, which needs this file
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


# Data ------------------------------------------------------------------------------


class Pool(NamedTuple):
    """All samples of a run, once on the device; clients hold rows of it.

    A batch is `(x[rows] / 255 - mean) / std`, computed where it is needed; pixels that
    are float32 are not divided by 255. Tokens have mean 0 and deviation 1. Where
    clients differ in more than their samples, samples have owners, and owners' rows are
    [N + M + 1, ...], the last for nobody's.
    """

    x: Array  # [n, H, W, ch] uint8 or float32; [n, d] float32; or [n, L] int32 tokens
    y: Array  # [n] int32; -1 where a label is withheld
    mean: Array  # [ch] or [owners, ch] float32, of uint8 pixels in units of [0, 1]
    std: Array  # [ch] or [owners, ch] float32
    owner: Array | tuple[()] = ()  # [n] int32
    shift: Array | tuple[()] = ()  # [owners, S] float32, see `data.shift`

    def __repr__(self) -> str:
        return in_one_line(self)


class ClientData(NamedTuple):
    """The samples of one client: row numbers of a pool that all clients share."""

    rows: Array  # [n_max] int32; the first `size` count, the rest is padding
    size: Array  # [] int32
    pool: Pool

    def __repr__(self) -> str:
        return in_one_line(self)


class Batch(NamedTuple):
    """A minibatch; `mask` is 0 for padding, and losses average over the mask."""

    x: Array  # [B, H, W, ch], [B, d] or [B, L] float32; tokens are whole numbers
    y: Array  # [B] int32
    mask: Array  # [B] float32
    prior: Array | tuple[()] = ()  # [K], of classes; a balanced loss accounts for it

    def __repr__(self) -> str:
        return in_one_line(self)


class AdaptData(NamedTuple):
    """What a client may look at before it is deployed."""

    train: ClientData  # labelled local samples; size 0 for a zero-shot client
    inputs: ClientData  # the inputs it will predict on, every label withheld (-1)
    fitted: PyTree = ()  # what participants have found out together, see `Fit`

    def __repr__(self) -> str:
        return in_one_line(self)


# Messages --------------------------------------------------------------------------


class Downlink(NamedTuple):
    """Server to clients. `round` is the public clock: known to all, never counted."""

    shared: PyTree = ()  # one copy for the whole cohort, no client axis
    own: PyTree = ()  # different for each client, leading axis [C]
    round: Array | tuple[()] = ()  # [] int32, filled in by the engine

    def __repr__(self) -> str:
        return in_one_line(self)


class Messages(NamedTuple):
    """Abstract server state, downlink, state and uplink of one client."""

    server: PyTree
    shared: PyTree
    own: PyTree
    client: PyTree
    uplink: PyTree
    opening: "Messages | None" = None  # of the exchange that opens a round
    closing: "Messages | None" = None  # and of that which closes it

    def __repr__(self) -> str:
        down, up = map(_count, self.sent())
        return (
            f"Messages(a client is sent {down:,} numbers a round and sends {up:,}; it "
            f"keeps {_count(self.client):,}, the server {_count(self.server):,})"
        )

    @property
    def alone(self) -> "Messages":
        """Those of the exchange itself."""
        return self._replace(opening=None, closing=None)

    def sent(self) -> tuple[PyTree, PyTree]:
        """Returns what a client is sent in a round, and what it sends."""
        every = [one for one in (self.alone, self.opening, self.closing) if one]
        return [(one.shared, one.own) for one in every], [one.uplink for one in every]


class Cohort(NamedTuple):
    """Who takes part in one exchange; public metadata only."""

    ids: Array  # [C] int32; padding rows hold the number of clients
    active: Array  # [C] float32; 0 for padding and for drop-outs
    weight: Array  # [C] float32; registered once (number of samples, or ones)
    round: Array  # [] int32
    population: Array  # [] float32; N, how many clients there are in all

    def __repr__(self) -> str:
        return in_one_line(self)


# Sides -----------------------------------------------------------------------------


def cannot_rebuild(sample_shape):
    """The `with_shape` of a model that has none."""
    raise ValueError("this model cannot be rebuilt for inputs of another shape")


class Outputs(NamedTuple):
    """What a network says of a batch outside training."""

    logits: Array  # [B, K] float32
    features: Array | tuple[()] = ()  # [B, L], the input of the layer named "head"

    def __repr__(self) -> str:
        return in_one_line(self)


class Trained(NamedTuple):
    """What the one pass of a training step gives beside its loss.

    Outputs carry gradients, so that a loss with more terms needs no second pass; they
    are those of the network that predicts, and () where a model has none to give.
    """

    stats: PyTree  # the variables' statistics after the step
    info: dict[str, Array]  # logged quantities, means over the batch
    logits: Array | tuple[()] = ()  # [B, K]
    features: Array | tuple[()] = ()  # [B, L], the input of the layer named "head"
    memory: PyTree = ()  # {name: entry} of what the step leaves otherwise in memory

    def __repr__(self) -> str:
        return in_one_line(self)


class Visit(NamedTuple):
    """What a client does around the training of a visit; by default nothing.

    Attributes:
      arrive: `(key, variables) -> variables` on its first visit, when it holds what it
        received in the place of shared variables and a draw of its own of the others.
      enter: `(variables) -> variables` before the training of every visit.
      context: `(variables, data) -> tree` as training begins; every `loss` of the visit
        is given it.
      leave: `(variables) -> variables` after it.
    """

    arrive: Callable = lambda key, variables: variables
    enter: Callable = lambda variables: variables
    context: Callable = lambda variables, data: ()
    leave: Callable = lambda variables: variables

    def __repr__(self) -> str:
        return in_one_line(self)


class Serve(NamedTuple):
    """What a trained model is asked beside its outputs; `inputs` have no labels.

    Attributes:
      condition: `(variables, inputs) -> tree`, the label-free description of a client
        by which it is served; `apply` finds it in memory, as "condition".
      export: `(variables) -> variables` of the plain network that predicts.
      inspect: `(variables, inputs) -> {name: array}`, logged in evaluation.
    """

    condition: Callable = lambda variables, inputs: ()
    export: Callable = lambda variables: variables
    inspect: Callable = lambda variables, inputs: {}

    def __repr__(self) -> str:
        return in_one_line(self)

    def seen(self, view: Callable) -> "Serve":
        """Returns these functions of what `view` makes of the variables."""

        def of(function):
            return lambda variables, *inputs: function(view(variables), *inputs)

        return Serve(*map(of, self))


class Model(NamedTuple):
    """A network (or a generator of networks) as pure functions.

    `variables` is `{"params": tree, "stats": tree}`, and "memory" where a client
    remembers or is told something, see `models.memory`.

    Attributes:
      sample_shape: (H, W, ch) of one input, or (d,) of features, (L,) of tokens.
      init: `(key) -> variables`.
      loss: `(key, variables, batch, context) -> (loss [], Trained)`, a training step's.
      apply: `(variables, x [B, ...]) -> Outputs`, outside training.
      visit: what a client does around the training of a visit.
      serve: what a trained model is asked beside its outputs.
      with_shape: `(sample_shape) -> Model`, the same one rebuilt for other inputs.
      vocabulary: how many different tokens inputs are made of; 0: they are numbers.
    """

    sample_shape: tuple[int, ...]
    init: Callable
    loss: Callable
    apply: Callable
    visit: Visit = Visit()
    serve: Serve = Serve()
    with_shape: Callable = cannot_rebuild
    vocabulary: int = 0

    def __repr__(self) -> str:
        inputs = "x".join(map(str, self.sample_shape))
        try:
            params = jax.eval_shape(self.init, jax.random.key(0))["params"]
        except Exception:  # a model that cannot be drawn can be looked at all the same
            return f"Model(of inputs {inputs})"
        return f"Model({_count(params):,} parameters, of inputs {inputs})"

    def predict(self, variables: PyTree, x: Array) -> Array:
        """Returns the logits of inputs x [B, ...], [B, K]."""
        return self.apply(variables, x).logits

    def features(self, variables: PyTree, x: Array) -> Array:
        """Returns the input of the layer named "head" for inputs x [B, ...], [B, L].

        Raises:
          ValueError: there is no such layer.
        """
        found = self.apply(variables, x).features
        if isinstance(found, tuple):
            raise ValueError(
                "this model has no layer named 'head' to take the input of"
            )
        return found

    def around(self, *kept: str, **functions) -> "Model":
        """Returns a model of other variables that has this one inside.

        Every field is either given anew or named among those that are `kept`, since the
        constructor loses and `_replace` inherits what nobody has thought of. What
        inputs are made of goes with their shape.

        Raises:
          TypeError: a field is neither given nor kept, or both.
        """
        named = sorted([*kept, *functions])
        fields = set(self._fields) - ({"vocabulary"} - set(named))
        if named != sorted(fields):
            missing = sorted(fields - set(named))
            raise TypeError(
                f"a model around another gives each field once or keeps it; missing "
                f"are {missing}, of {named}"
            )
        return self._replace(**functions)

    def check_without(self, wrapper: str, *names: str) -> None:
        """Raises ValueError if a model does of itself what a wrapper cannot carry.

        Args:
          wrapper: for the message.
          *names: of fields of `Visit` and `Serve`.
        """
        mine = {**self.visit._asdict(), **self.serve._asdict()}
        nothing = {**Visit()._asdict(), **Serve()._asdict()}
        for name in names:
            if mine[name] is not nothing[name]:
                raise ValueError(f"{wrapper} cannot wrap a model that has its {name!r}")


class HyperNet(NamedTuple):
    """A function from a condition to a parameter tree, with its own parameters phi."""

    init: Callable  # (key) -> phi
    generate: Callable  # (phi, condition [d]) -> target parameter tree

    def __repr__(self) -> str:
        return in_one_line(self)


class ServerSide(NamedTuple):
    """What the server does.

    `release` is by what clients are deployed, where that is not what they are sent to
    train on: a server that would answer what a newcomer sends it hands over what the
    answer is made by. With `mean_only` the server asks for the weighted mean of the
    uplinks alone: one client that sends the mean is as good as the cohort. A server
    that asks for several sums over the cohort has `sums`, which takes them of any part
    of it; `update` then also accepts `Sums` of the cohort in place of the uplinks.
    """

    init: Callable  # (common) -> server
    downlink: Callable  # (key, server, cohort) -> Downlink
    update: Callable  # (key, server, uplink [C, ...], cohort) -> (server, info)
    release: Callable | None = None  # (key, server, cohort) -> Downlink
    mean_only: bool = False
    sums: Callable | None = None  # (uplink [B, ...], cohort of B) -> tree of sums

    def __repr__(self) -> str:
        return in_one_line(self)


class Sums(NamedTuple):
    """What `ServerSide.sums` of a cohort's parts add up to, float32."""

    of: PyTree

    def __repr__(self) -> str:
        return in_one_line(self)


class Fit(NamedTuple):
    """What participants find out together of a trained model, for all who deploy it.

    They take rounds of their own, on samples that nobody trained on, whenever clients
    are scored; what they found last is kept beside a run, for whoever comes. In a round
    some of them are sent what is known so far, answer, and the server makes more of the
    answers.

    Attributes:
      start: `() -> fitted`, what is known before the first round.
      send: `(key, fitted, down, client, data, held) -> message` of one participant:
        `held` are the labelled samples whose inputs are those of `data`.
      absorb: `(fitted, messages [C, ...]) -> fitted`.
      rounds: how many.
      share: of the participants, drawn anew in each round.
    """

    start: Callable
    send: Callable
    absorb: Callable
    rounds: int = 1
    share: float = 1.0

    def __repr__(self) -> str:
        return in_one_line(self)

    def drawn(self, num_clients: int) -> int:
        """Returns how many of the participants a round has."""
        return max(1, round(self.share * num_clients))


class ClientSide(NamedTuple):
    """What ONE client does; never sees the client axis.

    `adapt` prepares a copy for deployment: its result goes to `deploy` and is never
    stored, so it may differ in structure from the state that `update` returns.
    `model` is the one `deploy`'s variables belong to: it predicts, and methods with a
    prediction rule of their own replace its `apply`.
    `tune` goes on from deployed variables with `epochs` (traced, [] int32) passes over
    the client's labelled samples; like `adapt` it works on a copy and sends nothing.
    `fit` is what `adapt` needs to be told first, as `AdaptData.fitted`.
    """

    init: Callable  # (key, common, down) -> client, on its first visit
    update: Callable  # (key, down, client, data) -> (uplink, client, info)
    adapt: Callable  # (key, down, client, AdaptData) -> adapted client; sends nothing
    deploy: Callable  # (down, adapted client) -> variables
    tune: Callable  # (key, variables, AdaptData, round, epochs) -> variables
    model: Model
    fit: Fit | None = None

    def __repr__(self) -> str:
        return in_one_line(self)


class Algorithm(NamedTuple):
    """A federated method.

    Where models differ between clients, `client` is a mapping from the name of a family
    of clients to what they do, and the server takes and gives mappings with the same
    keys (of cohorts, downlinks and uplinks), for any subset of the families.

    Where a round has more exchanges, `opening` is a method on the same state of server
    and clients: its exchange with the whole cohort comes first in every round, also in
    rounds that otherwise deal with one client after another. `closing` likewise comes
    last. Their messages are exact.
    """

    server: ServerSide
    client: Any  # ClientSide, or Mapping[str, ClientSide]
    exact: tuple[str, ...] = ()  # paths of the uplink that no lossy channel touches
    opening: "Algorithm | None" = None
    closing: "Algorithm | None" = None

    @property
    def has_families(self) -> bool:
        """Whether `client` is a mapping, and the server speaks in mappings."""
        return not isinstance(self.client, ClientSide)

    def by_family(self, given: PyTree) -> Mapping[str, PyTree]:
        """Returns something of this method's form as a mapping, of ALONE if need be."""
        return given if self.has_families else {ALONE: given}

    def as_given(self, by_family: Mapping[str, PyTree]) -> PyTree:
        """Undoes `by_family`."""
        return by_family if self.has_families else by_family[ALONE]

    def with_clients(
        self, change: Callable[["ClientSide"], "ClientSide"]
    ) -> "Algorithm":
        """Returns the method with what its clients do changed, in all families."""
        sides = {name: change(one) for name, one in self.by_family(self.client).items()}
        return self._replace(client=self.as_given(sides))

    def messages(self) -> Messages:
        """Returns those of a round with one client, by abstract evaluation.

        The server's update is part of it, so what a method cannot do raises here. For
        methods without families; `describe` is the same, once for each method.
        """
        return jax.eval_shape(self._exchange, jax.random.key(0))._replace(
            opening=self.opening and self.opening.messages(),
            closing=self.closing and self.closing.messages(),
        )

    def _exchange(self, key: Key) -> Messages:
        shape = self.client.model.sample_shape
        images = jnp.zeros((1, *shape), jnp.uint8)
        no, one = jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.float32)
        pool = Pool(images, no, jnp.zeros(shape[-1]), jnp.ones(shape[-1]))
        data = ClientData(no, jnp.int32(1), pool)
        server = self.server.init(key)
        cohort = Cohort(no, one, one, jnp.int32(0), jnp.float32(1))
        down = self.server.downlink(key, server, cohort)
        shared, own = down.shared, jax.tree.map(lambda x: x[0], down.own)
        down = down._replace(own=own, round=cohort.round)
        client = self.client.init(key, key, down)
        uplink, _, _ = self.client.update(key, down, client, data)
        self.server.update(key, server, jax.tree.map(lambda x: x[None], uplink), cohort)
        return Messages(server, shared, own, client, uplink)

    def __repr__(self) -> str:
        if self.has_families:
            return (
                f"Algorithm(clients of the families {', '.join(sorted(self.client))})"
            )
        try:
            down, up = map(_count, self.messages().sent())
        except Exception:  # a method that does not run can be looked at all the same
            return "Algorithm(of messages that cannot be evaluated)"
        return f"Algorithm(a client is sent {down:,} numbers a round and sends {up:,})"
