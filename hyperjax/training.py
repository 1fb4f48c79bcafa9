"""The one local-training loop: epochs or steps, any optax optimizer, phases, clipping.

Every loop has a traced number of iterations, so a client trains for exactly its own
number of steps; under `vmap` clients that are done wait, their carry untouched.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperjax import rng, tree
from hyperjax.data import clients
from hyperjax.errors import (
    check_at_least,
    check_choice,
    check_made,
    check_number,
    shown,
)
from hyperjax.models import memory
from hyperjax.models.linen import cross_entropy, num_classes
from hyperjax.tree import Patterns
from hyperjax.types import Array, Batch, ClientData, Key, Model, PyTree, in_one_line

BATCHES = ("passes", "fresh")
OPTIMIZER = "optimizer"  # in a client's memory
LOSS_BATCH = 64  # samples at a time where nothing is trained


def constant(round: Array) -> Array:
    """The schedule that leaves the learning rate as it is."""
    return jnp.float32(1.0)


class Phase(NamedTuple):
    """A stretch of local training of one part of the parameters.

    Attributes:
      epochs: passes over the client's samples; or
      steps: minibatch steps.
      train: patterns on paths of trained leaves ("params/..."); None trains all. The
        rest is absent from gradient and optimizer: neither momentum nor decay moves it.
      freeze: patterns on paths of leaves that are not trained, whatever `train` says.
    """

    epochs: int | None = None
    steps: int | None = None
    train: Patterns | None = None
    freeze: Patterns | None = None

    def __repr__(self) -> str:
        given = {k: v for k, v in self._asdict().items() if v is not None}
        return f"Phase({', '.join(f'{k}={v!r}' for k, v in given.items())})"


class Local(NamedTuple):
    """How clients train; a method that wants it otherwise changes it by `_replace`.

    Attributes:
      optimizer: made anew at every visit, unless its state is one of the variables;
        its learning rate is that of round 0.
      batch_size: B; a batch with fewer samples is masked, not dropped.
      phases: run in order.
      freeze: patterns of leaves that no phase trains which does not set its own.
      clip_norm: bound on the global norm of the (corrected) gradient.
      batches: "passes" through reshuffled samples, of which the last batch may be
        short, or "fresh": every step draws B from all samples (all, if there are less).
      schedule: round [] int32 -> factor [] on every update, which is a factor on the
        learning rate for all optimizers that end in a multiplication by it. The rate
        itself is known to the optimizer alone; `trainer`'s probe measures what it does.
      balanced: whether the cross-entropy is that of logits plus the logarithm of the
        client's own class shares (Menon et al. 2021, arXiv:2007.07314, equation 10,
        with each client's shares): what is trained predicts under a uniform prior.
    """

    optimizer: optax.GradientTransformation
    batch_size: int
    phases: Sequence[Phase] = (Phase(epochs=1),)
    freeze: Patterns | None = None
    clip_norm: float | None = None
    batches: str = "passes"
    schedule: Callable[[Array], Array] = constant
    balanced: bool = False

    def __repr__(self) -> str:
        # What is always of interest, and what is not as usual; functions have no words.
        usual = self._field_defaults
        given = {
            k: v
            for k, v in self._asdict().items()
            if k in ("batch_size", "phases") or v != usual.get(k, v)
        }
        given.pop("schedule", None)
        return f"Local({', '.join(f'{k}={v!r}' for k, v in given.items())})"


class Trainer(NamedTuple):
    """Local training of one client; calling it is calling `train`.

    Attributes:
      train: `(key, variables, data, round, adjust, epochs=None) -> (variables, info)`.
        `adjust(grads, params) -> grads` adds corrections (both are dicts from path to
        leaf, of the leaves being trained). `epochs` [] int32, traced, takes the place
        of the length of every phase. The entry "optimizer" of memory has states to go
        on with.
        Info holds sample-weighted means over the visit of what `model.loss` reports,
        with "steps" and "samples" [] float32.
      init_optimizer: `(variables) -> states`, of which memory holds all or some:
        {"all": state}, or {"apart": state, "others": state}.
    """

    train: Callable
    init_optimizer: Callable

    def __repr__(self) -> str:
        return in_one_line(self)

    def __call__(self, *args, **options):
        return self.train(*args, **options)


def check_given(model: Any, local: Any) -> None:
    """Raises unless a method was given a `Model` and a `Local`, or some by family.

    Every method says so, before it takes anything from them.

    Raises:
      TypeError: one of them is something else, such as a network that is no
        `Model` yet.
      ValueError: the optimizer of the local training is a factory or something else.
    """
    for one in _each(model):
        if not isinstance(one, Model):
            raise TypeError(
                f"model must be a hyperjax.Model; got {shown(one)}, of which "
                "hyperjax.from_linen(network, sample_shape, num_classes) makes one"
            )
    for one in _each(local):
        if not isinstance(one, Local):
            raise TypeError(f"local must be a hyperjax.Local; got {shown(one)}")
        parts = ("init", "update")
        check_made("local.optimizer", one.optimizer, parts, "optax.sgd(0.1)")


def _each(given: Any) -> Iterable[Any]:
    return given.values() if isinstance(given, Mapping) else (given,)


def trainer(
    model: Model,
    local: Local,
    *,
    apart: Patterns | None = None,
    clip_apart: bool = True,
    probe: bool = False,
) -> Trainer:
    """Builds the function that trains one client.

    Args:
      model: what is trained.
      local: how.
      apart: patterns of leaves with an optimizer of their own, of the same kind, with
        a state of its own.
      clip_apart: whether leaves that are apart are clipped, together with the others.
      probe: also report info["displacement"] [] float32, how far the visit's steps
        move a parameter whose gradient is always -1. For SGD with any momentum and
        schedule it is the sum of the weights that the change of a parameter gives to
        the gradients of all steps, before they are clipped; other optimizers give none.

    Raises:
      TypeError: `model` or `local` is something else.
      ValueError: no optimizer, a number is out of range, an unknown choice, a phase
        has not exactly one length, or a `probe` is asked of phases that train different
        leaves (so is an optimizer state by `init_optimizer`) or of an optimizer whose
        steps are not linear in the gradients.
    """
    check_given(model, local)
    optimizer, batch_size, phases = local.optimizer, local.batch_size, local.phases
    # Above, counting samples would overflow.
    check_number(at_least=1, at_most=2**30, whole=True, batch_size=batch_size)
    check_choice("batches", local.batches, BATCHES)
    clip = optax.identity()
    if local.clip_norm is not None:
        check_number(above=0, clip_norm=local.clip_norm)
        clip = optax.clip_by_global_norm(local.clip_norm)
    for phase in phases:
        lengths = {k: n for k, n in phase._asdict().items() if k in ("epochs", "steps")}
        given = {k: n for k, n in lengths.items() if n is not None}
        if len(given) != 1:
            raise ValueError(f"a phase has either epochs or steps; got {phase}")
        check_at_least(0, **given)

    classes = num_classes(model) if local.balanced else 0

    def check_alike(what):
        trained = {
            (tree.as_patterns(p.train), tree.as_patterns(p.freeze)) for p in phases
        }
        if len(trained) > 1:
            raise ValueError(
                f"{what} belongs to one set of parameters, but the phases of the local "
                "training (as of fedrep) train different ones"
            )

    if probe:
        check_alike("the displacement that SCAFFOLD and FedNova measure")
        _check_linear(optimizer)

    def by_optimizer(leaves):
        """Paths -> leaves, by which optimizer they belong to."""
        if apart is None:
            return {"all": leaves}
        theirs = {k: x for k, x in leaves.items() if tree.matches(apart, k)}
        ours = {k: x for k, x in leaves.items() if k not in theirs}
        return {"apart": theirs, "others": ours}

    def descend(grads, opt, active):
        """The updates of all leaves, and the optimizers' states."""
        whole = clip_apart or apart is None
        clipped = grads if whole else by_optimizer(grads)["others"]
        grads = {**grads, **clip.update(clipped, clip.init(clipped))[0]}
        updates: dict[str, Array] = {}
        after = {}
        for name, params in by_optimizer(active).items():
            mine = {k: grads[k] for k in params}
            moved, after[name] = optimizer.update(mine, opt[name], params)
            updates |= moved
        return updates, after

    def cut(phase, variables):
        """Paths -> leaves of what a phase trains, and the splitter."""
        params = {"params": variables["params"]}
        frozen = local.freeze if phase.freeze is None else phase.freeze
        split = tree.splitter(
            params, r".*" if phase.train is None else phase.train, without=frozen
        )
        return split, *split.split(params)

    def init_optimizer(variables):
        check_alike("an optimizer state that is kept between visits")
        active = cut(phases[0], variables)[1]
        return {k: optimizer.init(params) for k, params in by_optimizer(active).items()}

    def train(key, variables, data: ClientData, round, adjust, epochs=None):
        context = model.visit.context(variables, data)
        factor = local.schedule(round)
        totals = _zero_totals(model, variables, data, batch_size, context)
        if probe:
            totals["displacement"] = jnp.float32(0)
        for number, phase in enumerate(phases):
            variables, totals = run_phase(
                rng.stream(key, f"phase_{number}"),
                phase if epochs is None else phase._replace(epochs=epochs, steps=None),
                variables,
                totals,
                data,
                context,
                factor,
                adjust,
            )
        samples = jnp.maximum(totals["samples"], 1.0)
        means = {name: x / samples for name, x in totals.pop("sums").items()}
        return variables, {**means, **totals}

    def run_phase(key, phase, variables, totals, data, context, factor, adjust):
        split, active, frozen = cut(phase, variables)

        def loss(active, stats, entries, key, batch):
            whole = {**split.merge(active, frozen), "stats": stats}
            whole |= {"memory": entries} if entries else {}
            return model.loss(key, whole, batch, context)

        def step(i, carry, batch, key):
            active, stats, entries, opt, totals, probed = carry
            (_, trained), grads = jax.value_and_grad(loss, has_aux=True)(
                active, stats, entries, jax.random.fold_in(key, i), batch
            )
            stats, info = trained.stats, trained.info
            entries = {**entries, **dict(trained.memory)}
            updates, opt = descend(adjust(grads, active), opt, active)
            active = optax.apply_updates(active, tree.scale(updates, factor))
            totals = _count(totals, info, batch)
            if probe:
                moved, state = optimizer.update(jnp.float32(-1), *probed)
                probed = (state, probed[1] + factor * moved)
            return active, stats, entries, opt, totals, probed

        def one_pass(epoch, carry):
            key_order, key_steps = jax.random.split(jax.random.fold_in(key, epoch))
            batch = _drawn(key_order, data, local, classes)
            length = per_pass
            if phase.steps is not None:
                length = jnp.minimum(per_pass, phase.steps - epoch * per_pass)
            return jax.lax.fori_loop(
                0, length, lambda i, c: step(i, c, batch(i), key_steps), carry
            )

        per_pass = clients.num_batches(data.size, batch_size)
        passes = phase.epochs
        if phase.steps is not None:
            # A client without samples takes no step.
            full = clients.num_batches(phase.steps, jnp.maximum(per_pass, 1))
            passes = jnp.where(per_pass > 0, full, 0)
        zero = jnp.float32(0)
        probed = (optimizer.init(zero), zero) if probe else ()
        kept = memory.get(variables, OPTIMIZER, {})
        entries = memory.without(variables, OPTIMIZER).get("memory", {})
        opt = {k: optimizer.init(params) for k, params in by_optimizer(active).items()}
        opt |= kept
        carry = (active, variables["stats"], entries, opt, totals, probed)
        carry = jax.lax.fori_loop(0, passes, one_pass, carry)
        active, stats, entries, opt, totals, probed = carry
        if probe:
            totals["displacement"] += probed[1]
        after = {**variables, **split.merge(active, frozen), "stats": stats}
        after |= {"memory": entries} if entries else {}
        if kept:
            after = memory.put(after, OPTIMIZER, {name: opt[name] for name in kept})
        return after, totals

    return Trainer(train, init_optimizer)


def tuner(
    model: Model,
    local: Local,
    train: Patterns | None = None,
) -> Callable:
    """Returns a `ClientSide.tune`: plain local training on the client's own samples.

    Args:
      model: what `deploy`'s variables belong to.
      local: how clients train; its phases and what it freezes do not matter.
      train: patterns of the leaves that are tuned; None, or none, tunes all.

    Raises:
      ValueError: a pattern matches no parameter.
    """
    if train:
        template = jax.eval_shape(model.init, jax.random.key(0))["params"]
        tree.splitter({"params": template}, train)
    # Not to freeze is a choice here: fine-tuning moves the head that FedBABU froze.
    phase = Phase(epochs=1, train=train or None, freeze=())
    run = trainer(model, local._replace(phases=(phase,)))

    def tune(key, variables, data, round, epochs):
        # Fine-tuning starts with an optimizer of its own, and nothing it trains on is
        # what it is deployed for.
        start = model.visit.enter(memory.without(variables, OPTIMIZER, "condition"))
        after, _ = run(key, start, data.train, round, no_adjustment, epochs)
        for name in (OPTIMIZER, "condition"):
            if jax.tree.leaves(entry := memory.get(variables, name)):
                after = memory.put(after, name, entry)
        if jax.tree.leaves(memory.get(after, "condition")):
            condition = model.serve.condition(after, data.inputs)
            after = memory.put(after, "condition", condition)
        return after

    return tune


def _check_linear(optimizer: optax.GradientTransformation) -> None:
    """Refuses an optimizer whose steps are no weighted sums of gradients, by trying it.

    Raises:
      ValueError: they are not, or differ between parameters with equal gradients.
    """
    num_steps, size = 4, 3
    draw = np.random.default_rng(0)
    first, second = draw.normal(size=(2, num_steps, size)).astype(np.float32)

    @jax.jit
    def moved(grads):
        """Where each step of descent from zero arrives, [num_steps, size]."""
        params = jnp.zeros(size)
        state, places = optimizer.init(params), []
        for gradient in grads:
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            places.append(params)
        return jnp.stack(places)

    with jax.ensure_compile_time_eval():
        together = moved(2 * first - 3 * second)
        apart = 2 * moved(first) - 3 * moved(second)
        alike = moved(np.full_like(first, -1))
    if isinstance(together, jax.core.Tracer):
        return  # of traced numbers: with others it was tried before
    scale = np.max(np.abs(apart))
    if not (
        np.allclose(together, apart, rtol=0, atol=1e-4 * scale)
        and np.allclose(alike, alike[:, :1], rtol=1e-4)
    ):
        raise ValueError(
            "SCAFFOLD and FedNova weigh the gradients of a visit as the local "
            "optimizer does, which is defined for steps that are weighted sums of "
            "gradients: sgd, with any momentum, Nesterov's or weight decay. This "
            "optimizer's are not (as those of adam and its kin)"
        )


def _drawn(
    key: Key, data: ClientData, local: Local, classes: int
) -> Callable[[Array], Batch]:
    """Returns what gives the batch of a step of one pass, by the step's number."""
    if local.balanced:
        shares = clients.class_shares(data, classes)
        drawn = _drawn(key, data, local._replace(balanced=False), classes)
        return lambda i: drawn(i)._replace(prior=shares)
    if local.batches == "fresh":

        def fresh(i):
            order = clients.shuffled(jax.random.fold_in(key, i), data)
            return clients.take(data, order, 0, local.batch_size)

        return fresh
    order = clients.shuffled(key, data)
    return lambda i: clients.take(data, order, i, local.batch_size)


def _zero_totals(model, variables, data, batch_size, context) -> PyTree:
    """Running sums of what the loss reports, found by abstract evaluation."""

    def report(variables, data, context):
        batch = clients.take(data, jnp.arange(data.rows.shape[0]), 0, batch_size)
        return model.loss(jax.random.key(0), variables, batch, context)[1].info

    info = jax.eval_shape(report, variables, data, context)
    zero = jnp.float32(0)
    return {"sums": {k: zero for k in info}, "steps": zero, "samples": zero}


def _count(totals: PyTree, info: dict[str, Array], batch) -> PyTree:
    size = jnp.sum(batch.mask)
    return {
        **totals,
        "sums": {k: totals["sums"][k] + size * info[k] for k in info},
        "steps": totals["steps"] + 1.0,
        "samples": totals["samples"] + size,
    }


def mean_loss(model: Model, variables: PyTree, data: ClientData) -> Array:
    """Returns the mean cross-entropy of what a model predicts of a client, [].

    Nothing is trained: what a method wants to know of a model that a client received.
    0 for a client without samples.
    """

    def step(total, batch):
        logits = model.predict(variables, batch.x)
        return total + cross_entropy(logits, batch) * jnp.sum(batch.mask)

    total = clients.fold(step, jnp.float32(0), data, LOSS_BATCH)
    return total / jnp.maximum(data.size, 1)


def no_adjustment(grads: PyTree, params: PyTree) -> PyTree:
    """The `adjust` of plain training."""
    return grads


def round_at(fraction: float, num_rounds: int) -> int:
    """Returns the round at a fraction of a run's rounds, rounded down.

    Example:
      >>> round_at(1 / 3, 90)
      30
    """
    return math.floor(fraction * num_rounds + 1e-6)  # 1 / 3 is a little less
