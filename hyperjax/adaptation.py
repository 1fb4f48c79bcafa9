"""Test-time adaptation: what a deployed client makes of its unlabelled inputs.

`with_adaptation(alg, "bn(prior=16)")` returns a method whose clients adapt what they
are deployed with, and training does not change. All of a client's inputs are looked at
before the first is predicted, where the papers go batch by batch. An unseen client
sends nothing and needs no label. "em", "bbse" (see `label_shift`) and "atp" are told
what participants find out first, on samples that nobody trained on.

Each refuses, by name, networks that it can do nothing for.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hyperjax import calls, label_shift, tree
from hyperjax.algorithms.fedbn import normalisation
from hyperjax.data import clients
from hyperjax.data.shift import turned
from hyperjax.errors import check_at_least, check_choice, check_number
from hyperjax.models import memory
from hyperjax.models.linen import cross_entropy, masked_mean, sizes
from hyperjax.priors import outputs_of
from hyperjax.types import (
    Algorithm,
    Array,
    Batch,
    ClientData,
    ClientSide,
    Fit,
    Key,
    Model,
    Outputs,
    PyTree,
)
from hyperjax.wrappers import adapting

SUPPORTS = "supports"  # in memory: T3A's classifier, [K, L]
VIEWS = "views"  # in memory: MEMO's degrees and pixels down and across, [V, 3]
_HEAD = r"params/(.*/)?head/.*"


FIELD = "evaluation.adapt"


def with_adaptation(alg: Algorithm, text: str, field: str = FIELD) -> Algorithm:
    """Returns a method whose deployed clients adapt to their inputs.

    Args:
      alg: with or without families.
      text: a key of `ADAPTATIONS` with options, such as "bn(prior=16)".
      field: for what, for messages.

    Raises:
      ValueError: an unknown name or option, or a network that it cannot adapt.
    """
    make = factory(text, field)
    sides = {family: make(side) for family, side in alg.by_family(alg.client).items()}
    return alg._replace(client=alg.as_given(sides))


def factory(text: str, field: str = FIELD) -> Callable[[ClientSide], ClientSide]:
    """Returns what changes a client, of a text; see `with_adaptation`."""
    name, options = calls.parse(field, text)
    check_choice(field, name, ADAPTATIONS)
    return calls.call(field, ADAPTATIONS[name], **options)


def check_held_out(text: str, validation_fraction: float) -> None:
    """Refuses an adaptation that needs samples which participants did not set aside.

    Raises:
      ValueError: naming it and the field that sets them aside.
    """
    name, _ = calls.parse(FIELD, text)
    if name in FITTED and not validation_fraction:
        raise ValueError(
            f"evaluation.adapt={name!r} asks participants for what they find out on "
            "samples that they did not train on, and data.validation_fraction=0 sets "
            "none aside; accepted: a share above 0, such as "
            "--config.data.validation_fraction=0.2"
        )


def bn(*, prior: float = 0.0) -> Callable[[ClientSide], ClientSide]:
    """Normalises by the inputs' own moments.

    Schneider et al. 2020 (arXiv:2006.16971), equation 3: moments are means of those of
    training and of the n inputs, weighted N to n. Layer by layer, each after those
    below it. Inputs of few classes have the moments of these classes.

    Args:
      prior: N, how many samples those of training count for; very large: FedAvg.

    Raises:
      ValueError: the prior is negative, or the network has no running statistics.
    """
    check_number(at_least=0, prior=prior)

    def change(side: ClientSide) -> ClientSide:
        _check_statistics(side.model, "bn")

        def adapt(key, variables, inputs):
            return _with_statistics(side.model, key, variables, inputs, prior)

        return adapting(side, adapt)

    return change


def tent(
    *, learning_rate: float = 1e-3, batch_size: int = 200, epochs: int = 1
) -> Callable[[ClientSide], ClientSide]:
    """Descends along the entropy of predictions by scales and biases of batch-norm.

    Tent, Wang et al. 2021 (arXiv:2006.10726): statistics are the inputs' own, the
    optimizer is Adam. With few inputs, or inputs of one class, it collapses.

    Args:
      learning_rate: of Adam.
      batch_size: inputs in a step.
      epochs: passes over the inputs.

    Raises:
      ValueError: a number is out of range, or the network has no batch-norm.
    """
    check_number(above=0, learning_rate=learning_rate)
    check_at_least(1, batch_size=batch_size, epochs=epochs)

    def change(side: ClientSide) -> ClientSide:
        template = _check_statistics(side.model, "tent")
        trained = normalisation(template)
        if not trained:
            raise ValueError("adapt='tent' needs batch-norm with scale and bias")

        def adapt(key, variables, inputs):
            context = side.model.visit.context(variables, inputs)

            def objective(key, variables, batch):
                logits = side.model.loss(key, variables, batch, context)[1].logits
                return masked_mean(_entropy(logits), batch.mask)

            moved = _descend(
                optax.adam(learning_rate),
                objective,
                tree.splitter({"params": template["params"]}, trained),
                (key, variables, inputs),
                (batch_size, epochs),
            )
            return _with_statistics(side.model, key, moved, inputs, 0.0)

        return adapting(side, adapt)

    return change


def shot(
    *,
    learning_rate: float = 1e-2,
    batch_size: int = 64,
    epochs: int = 15,
    beta: float = 0.3,
) -> Callable[[ClientSide], ClientSide]:
    """Trains all but the head for certain, diverse predictions.

    SHOT, Liang et al. 2020 (arXiv:2002.08546), equations 3 to 6: mean entropy minus the
    entropy of the mean, and beta times the cross-entropy with the class of the nearest
    of the features' class centroids, which are found once, as is then refined once. The
    diversity assumes that all classes are equally frequent.

    Deviations: no bottleneck with batch-norm, no weight normalisation; pseudo-labels
    are found once; one rate for all layers.

    Args:
      learning_rate: of SGD with momentum 0.9.
      batch_size: inputs in a step.
      epochs: passes over the inputs.
      beta: weight of pseudo-labels.

    Raises:
      ValueError: a number is out of range, or the network has no head.
    """
    check_number(above=0, learning_rate=learning_rate)
    check_number(at_least=0, beta=beta)
    check_at_least(1, batch_size=batch_size, epochs=epochs)

    def change(side: ClientSide) -> ClientSide:
        model = side.model
        template = _check_head(model, "shot")
        # The head stays, and all else moves.
        rest = tree.splitter({"params": template["params"]}, r".*", without=_HEAD)

        def adapt(key, variables, inputs):
            mask, seen = outputs_of(model, variables, inputs)
            pseudo = _pseudo_labels(seen, mask)
            # By row of the pool, as batches know samples.
            labels = jnp.zeros(inputs.pool.y.shape, jnp.int32)
            labels = labels.at[jnp.where(mask > 0, inputs.rows, len(labels))].set(
                pseudo, mode="drop"
            )
            known = inputs._replace(pool=inputs.pool._replace(y=labels))

            def objective(key, variables, batch):
                logits = model.predict(variables, batch.x)
                probs = jax.nn.softmax(logits)
                mean = _masked_rows(probs, batch.mask)
                diversity = -jnp.sum(mean * jnp.log(mean + 1e-12))
                nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.y)
                uncertain = masked_mean(_entropy(logits) + beta * nll, batch.mask)
                return uncertain - diversity

            return _descend(
                optax.sgd(learning_rate, momentum=0.9),
                objective,
                rest,
                (key, variables, known),
                (batch_size, epochs),
            )

        return adapting(side, adapt)

    return change


def t3a(*, keep: int = 20) -> Callable[[ClientSide], ClientSide]:
    """Classifies by the mean direction of the features that were surest of a class.

    T3A, Iwasawa, Matsuo 2021 (NeurIPS): supports of a class are its row of the
    classifier, and inputs that were predicted as it, of which those of least entropy
    are kept. Outputs are features times the normalised sum of normalised supports, so
    the head's bias is gone.

    Args:
      keep: supports of a class; 0: all.

    Raises:
      ValueError: the number is out of range, or the network has no head.
    """
    check_at_least(0, keep=keep)

    def change(side: ClientSide) -> ClientSide:
        model = side.model
        _check_head(model, "t3a")

        def adapt(key, variables, inputs):
            mask, seen = outputs_of(model, variables, inputs)
            head = model.serve.export(variables)["params"]["head"]
            rows = head["kernel"].T
            logits = rows @ head["kernel"] + head.get("bias", 0.0)
            features: Any = seen.features
            found = Outputs(
                jnp.concatenate([logits, seen.logits]),
                jnp.concatenate([rows, features]),
            )
            mask = jnp.concatenate([jnp.ones(len(rows)), mask])
            return memory.put(variables, SUPPORTS, _supports(found, mask, keep))

        def apply(variables, x):
            supports = memory.get(variables, SUPPORTS)
            outputs = model.apply(memory.without(variables, SUPPORTS), x)
            if isinstance(supports, tuple):
                return outputs
            return outputs._replace(logits=outputs.features @ supports.T)

        changed = adapting(side, adapt)
        return changed._replace(model=model._replace(apply=apply))

    return change


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


def atp(
    *,
    learning_rate: float = 0.1,
    rounds: int = 200,
    share: float = 0.25,
    batch_size: int = 20,
) -> Callable[[ClientSide], ClientSide]:
    """Moves every tensor at a rate of its own, which participants have learned.

    ATP, Bao, Wei, Wang, He 2023 (NeurIPS, arXiv:2310.18816): tensor l of a network, its
    running statistics among them, goes to w_l - a_l u_l with u_l the gradient of the
    inputs' mean entropy, or the statistic minus that of the inputs. Participants
    descend along a_l by the labelled loss of what they adapted to a batch, step
    `learning_rate` over the root of the tensor's size; the server takes plain means.
    Rates begin at 0 and may become negative, as labels that are skewed want it.

    Without batch-norm there are only weights to move. An unseen client adapts once, by
    the mean u over batches of all its inputs, which is where the paper's online form
    arrives. Deviation: what normalises below a layer is the batch's, not the running
    one.

    Args:
      learning_rate: of rates.
      rounds: of learning them, an epoch each.
      share: of participants in a round.
      batch_size: inputs in a u.

    Raises:
      ValueError: a number is out of range.
    """
    check_number(above=0, learning_rate=learning_rate)
    check_number(above=0, at_most=1, share=share)
    check_at_least(0, rounds=rounds)
    check_at_least(1, batch_size=batch_size)

    def change(side: ClientSide) -> ClientSide:
        model = side.model
        template = _moving(_template(model))
        split = tree.splitter(template, r".*")
        tensors = {
            path: leaf
            for path, leaf in split.split(template)[0].items()
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        }

        def directions(key, variables, batch, context):
            def uncertain(params):
                logits = model.predict({**variables, "params": params}, batch.x)
                return masked_mean(_entropy(logits), batch.mask)

            found = {"params": jax.grad(uncertain)(variables["params"])}
            if jax.tree.leaves(variables["stats"]):
                own = _statistics_of(model, key, variables, batch, context, 0.0)
                found["stats"] = tree.sub(variables["stats"], own)
            every = split.split({**_moving(variables), **found})[0]
            return {path: every[path] for path in tensors}

        def moved(variables, rates, along):
            before, rest = split.split(_moving(variables))
            after = {k: before[k] - rates[k] * along[k] for k in tensors}
            after |= {
                k: jnp.maximum(w, 0.0) for k, w in after.items() if k.endswith("/var")
            }
            return {**variables, **split.merge({**before, **after}, rest)}

        def send(key, rates, variables, held):
            context = model.visit.context(variables, held)
            key_order, key_steps = jax.random.split(key)
            order = clients.shuffled(key_order, held)

            def step(i, rates):
                batch = clients.take(held, order, i, batch_size)
                key = jax.random.fold_in(key_steps, i)
                along = directions(key, variables, batch, context)

                def loss(rates):
                    logits = model.predict(moved(variables, rates, along), batch.x)
                    return cross_entropy(logits, batch)

                grads = jax.grad(loss)(rates)
                return {
                    k: a - learning_rate * grads[k] / math.sqrt(tensors[k].size)
                    for k, a in rates.items()
                }

            num = clients.num_batches(held.size, batch_size)
            return jax.lax.fori_loop(0, num, step, rates)

        def adapt(key, variables, inputs, rates):
            context = model.visit.context(variables, inputs)

            def step(total, batch):
                along = directions(key, variables, batch, context)
                return tree.add(total, tree.scale(along, jnp.sum(batch.mask)))

            total = clients.fold(step, tree.zeros_like(tensors), inputs, batch_size)
            mean = tree.scale(total, 1 / jnp.maximum(inputs.size, 1))
            return moved(variables, rates, mean)

        def start():
            return {path: jnp.float32(0) for path in tensors}

        def absorb(rates, sent):
            return {k: jnp.mean(a) for k, a in sent.items()}

        return adapting(side, adapt, Fit(start, send, absorb, rounds, share))

    return change


# Those that are told what participants find out first.
FITTED = ("em", "bbse", "atp")
# Text in a config -> factory of what changes a client.
ADAPTATIONS: dict[str, Callable[..., Callable[[ClientSide], ClientSide]]] = {
    "bn": bn,
    "tent": tent,
    "shot": shot,
    "t3a": t3a,
    "memo": memo,
    "em": label_shift.em,
    "bbse": label_shift.bbse,
    "atp": atp,
}


# Pieces ------------------------------------------------------------------------------


def _template(model: Model) -> PyTree:
    return jax.eval_shape(model.init, jax.random.key(0))


def _check_statistics(model: Model, name: str) -> PyTree:
    """Returns abstract variables; refuses a network without running statistics."""
    template = _template(model)
    if not jax.tree.leaves(template["stats"]):
        raise ValueError(
            f"adapt={name!r} adapts batch-norm, and this network has no running "
            "statistics; accepted: a network with batch-norm, such as mlp_bn, or "
            "another adaptation: t3a, shot"
        )
    return template


def _check_head(model: Model, name: str) -> PyTree:
    """Returns abstract variables; refuses a network without a linear head."""
    template = _template(model)
    try:
        sizes(model)
        head = jax.eval_shape(model.serve.export, template)["params"]["head"]
        head["kernel"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"adapt={name!r} needs a network whose last layer is linear and is named "
            "'head'"
        ) from error
    return template


def _moving(variables: PyTree) -> PyTree:
    """Parameters and running statistics."""
    return {k: variables[k] for k in ("params", "stats") if k in variables}


def _with_statistics(
    model: Model, key: Key, variables: PyTree, inputs: ClientData, prior: float
) -> PyTree:
    """Variables whose running statistics are those of all inputs at once."""
    context = model.visit.context(variables, inputs)
    order = jnp.arange(inputs.rows.shape[0])
    batch = clients.take(inputs, order, 0, inputs.rows.shape[0])
    stats = _statistics_of(model, key, variables, batch, context, prior)
    return {**variables, "stats": stats}


def _statistics_of(
    model: Model,
    key: Key,
    variables: PyTree,
    batch: Batch,
    context: PyTree,
    prior: float,
) -> PyTree:
    """Running statistics mixed with those of a batch, which count for its samples."""

    def after(stats):
        return model.loss(key, {**variables, "stats": stats}, batch, context)[1].stats

    # A training step leaves m s + (1 - m) b of statistics s and the batch's b. What
    # normalises in it is b, whatever s is: two steps tell m and b apart.
    from_zero = after(jax.tree.map(jnp.zeros_like, variables["stats"]))
    from_one = after(jax.tree.map(jnp.ones_like, variables["stats"]))
    size = jnp.sum(batch.mask)

    def one(own, zero, first):
        kept = first - zero
        batch_own = zero / jnp.maximum(1 - kept, 1e-12)
        mixed = (prior * own + size * batch_own) / jnp.maximum(prior + size, 1e-12)
        moves = (kept < 1) & (size > 0)
        return jnp.where(moves, mixed, own).astype(own.dtype)

    return jax.tree.map(one, variables["stats"], from_zero, from_one)


def _descend(
    optimizer: optax.GradientTransformation,
    objective: Callable[[Key, PyTree, Batch], Array],
    split: tree.Splitter,
    of: tuple[Key, PyTree, ClientData],
    length: tuple[int, int],
) -> PyTree:
    """Minimises an objective over a client's inputs; returns its variables.

    `split` divides {"params": ...} into what moves and the rest; `length` is the size
    of a batch and the number of passes.
    """
    key, variables, inputs = of
    batch_size, epochs = length
    moving, still = split.split({"params": variables["params"]})

    def whole(moving):
        return {**variables, **split.merge(moving, still)}

    def step(key, carry, batch):
        moving, state = carry
        grads = jax.grad(lambda m: objective(key, whole(m), batch))(moving)
        updates, state = optimizer.update(grads, state, moving)
        return optax.apply_updates(moving, updates), state

    def one_pass(epoch, carry):
        key_order, key_steps = jax.random.split(jax.random.fold_in(key, epoch))
        order = clients.shuffled(key_order, inputs)

        def one(i, carry):
            batch = clients.take(inputs, order, i, batch_size)
            return step(jax.random.fold_in(key_steps, i), carry, batch)

        num = clients.num_batches(inputs.size, batch_size)
        return jax.lax.fori_loop(0, num, one, carry)

    start = moving, optimizer.init(moving)
    return whole(jax.lax.fori_loop(0, epochs, one_pass, start)[0])


def _entropy(logits: Array) -> Array:
    """Of predictions, in nats, [B]."""
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_probs) * log_probs, -1)


def _masked_rows(values: Array, mask: Array) -> Array:
    """Mean of real rows, [B, K] -> [K]."""
    total = jnp.sum(jnp.where(mask[:, None] > 0, values, 0.0), 0)
    return total / jnp.maximum(jnp.sum(mask), 1.0)


def _normalised(rows: Any) -> Array:
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _pseudo_labels(seen: Outputs, mask: Array) -> Array:
    """Classes [n] of the nearest centroid by cosine, refined once."""
    z = _normalised(seen.features)
    share = jax.nn.softmax(seen.logits) * mask[:, None]
    for _ in range(2):
        centroids = _normalised(share.T @ z / (share.sum(0)[:, None] + 1e-8))
        # A class of no sample has no centroid that anything is near.
        near = jnp.where(share.sum(0) > 0, z @ centroids.T, -2.0)
        labels = jnp.argmax(near, -1)
        share = jax.nn.one_hot(labels, share.shape[1]) * mask[:, None]
    return labels


def _supports(seen: Outputs, mask: Array, keep: int) -> Array:
    """Directions of classes, [K, L], of the surest real rows predicted as each."""
    num_classes = seen.logits.shape[1]
    predicted = jnp.argmax(seen.logits, -1)
    one_hot = jax.nn.one_hot(predicted, num_classes) * mask[:, None]
    if keep:
        order = jnp.argsort(jnp.where(mask > 0, _entropy(seen.logits), jnp.inf))
        rank = jnp.cumsum(one_hot[order], 0)  # 1 for the surest of its class
        kept = jnp.zeros_like(one_hot).at[order].set(rank <= keep)
        one_hot = one_hot * kept
    return _normalised(one_hot.T @ _normalised(seen.features))
