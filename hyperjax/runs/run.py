"""A run as an object: train, score, serve, go on, save; for notebooks and scripts."""

import json
import logging
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperjax import registry
from hyperjax.data import clients, sources
from hyperjax.data.federation import Federation
from hyperjax.engine import checkpoint, families, log, schedule, scoring
from hyperjax.engine.deploy import Deployed
from hyperjax.engine.progress import Progress, Silent
from hyperjax.errors import check_at_least, check_choice, check_made, first_line
from hyperjax.runs import export, loop, results
from hyperjax.runs.experiment import Experiment, Settings
from hyperjax.runs.loop import State
from hyperjax.runs.recipe import Recipe
from hyperjax.training import Local, Phase
from hyperjax.types import Algorithm, ClientData

RECIPE, ABOUT, CHECKPOINTS = "run.pkl", "run.json", "checkpoints"


def run(
    method: str | Algorithm | Callable[..., Algorithm],
    network: Any = None,
    data: Federation | None = None,
    *,
    rounds: int,
    optimizer: optax.GradientTransformation | None = None,
    batch_size: int = 32,
    epochs: int = 1,
    local: Local | None = None,
    server_opt: optax.GradientTransformation | None = None,
    cohort_size: int | None = None,
    weights: str | None = None,
    sequential: bool = False,
    uplink: str = "",
    adapt: str = "",
    augment: str = "",
    seed: int = 0,
    every: int | None = None,
    finetune_epochs: Sequence[int] = (),
    mapper: str = "auto",
    devices: int = 0,
    progress: bool = True,
    **options: Any,
) -> "Run":
    """Trains a method on a federation; evaluates as it goes.

    Args:
      method: a name of `hyperjax.methods()`, "package.module:function", such a function
        itself, or an `Algorithm` that is ready, which has its own network and training.
      network: a linen module, a `Model`, or the name of a network ("mlp"); several of
        them, in a list or by name, for methods whose clients differ: these are dealt
        out in equal blocks.
      data: from `federate`.
      rounds: how many.
      optimizer: of the clients; default: SGD with learning rate 0.1.
      batch_size: of the clients.
      epochs: of a client's training in a round.
      local: the clients' training in full, instead of these three.
      server_opt: of the server; default: the method's own.
      cohort_size: clients that take part in a round, drawn each time; None: all.
      weights: of clients in the mean: "size", their training samples, or "uniform";
        default: the method's own.
      sequential: the server steps after every client of a round.
      uplink: what clients send goes through: "topk(fraction=0.3)".
      adapt: what deployed clients make of their unlabelled inputs: "bn(prior=16)",
        "t3a", ...; "em", "bbse" and "atp" need a federation with validation samples.
      augment: at each visit a client's training images are shifted once more:
        "rotation360", "rotation(each='image')", ...; see `hyperjax.augmentation`.
      seed: of the run; the federation has one of its own.
      every: rounds between evaluations; default: a tenth of all.
      finetune_epochs: `scores` also has copies that are fine-tuned so long.
      mapper: "map", "vmap" or "auto": by what clients are trained.
      devices: at most so many; 0: all that help.
      progress: shows what is done.
      **options: of the method; `hyperjax.options(method)` lists them.

    Returns:
      The run. Interrupted, by Ctrl-C or the notebook's button, it is returned as far
      as it came, and `resume` goes on.

    Raises:
      ValueError, TypeError: naming what was given and what is accepted, before any
        work.
      Diverged: a loss or the state is not finite.
    """
    check_at_least(0, rounds=rounds)
    if not isinstance(data, Federation):
        raise ValueError(
            f"data is {type(data).__name__}; accepted: what hyperjax.federate returns"
        )
    settings = Settings(
        seed=seed,
        rounds=rounds,
        every=every or max(1, math.ceil(rounds / 10)),
        finetune_epochs=tuple(finetune_epochs),
    )
    if isinstance(method, Algorithm):
        name = "algorithm"
        given = dict(network=network, optimizer=optimizer, local=local, **options)
        if extra := [k for k, v in given.items() if v is not None]:
            raise ValueError(f"{', '.join(extra)}: an Algorithm has its own already")
    else:
        name = method if isinstance(method, str) else method.__name__
        if local is not None and optimizer is not None:
            raise ValueError("give optimizer, or local, which has one")
    if local is None:
        optimizer = optax.sgd(0.1) if optimizer is None else optimizer
        check_made("optimizer", optimizer, ("init", "update"), "optax.sgd(0.1)")
        local = Local(optimizer, batch_size, phases=(Phase(epochs=epochs),))
    recipe = Recipe(
        method,
        network,
        data,
        local,
        server_opt,
        uplink,
        settings,
        options,
        dict(
            sampler="full" if cohort_size is None else "uniform",
            cohort_size=cohort_size,
            weights=registry.weights(method, options) if weights is None else weights,
            sequential=sequential,
            mapper=mapper,
            devices=devices,
            # Where samples stay in host memory, clients' state does too.
            **({"store": "host"} if clients.is_on_host(data.pool) else {}),
        ),
        adapt,
        augment,
    )
    built = recipe.build()
    fresh = Run(name, recipe, built, loop.start(built), ())
    return fresh.resume(rounds, progress=progress)


class Run(NamedTuple):
    """A method that was trained on a federation, as far as it has come.

    A value: what goes on from it is another one, and it stays as it is. Clients are
    numbers: participants 0 to N - 1, unseen ones N to N + M - 1; N + M stands for
    somebody who is none of them.
    """

    name: str
    recipe: Any  # has build() -> Experiment
    experiment: Experiment
    state: State
    records: tuple[dict[str, Any], ...]  # one for each evaluated round

    def __repr__(self) -> str:
        data, best = self.experiment.federation, self.records[-1:]
        shown = [
            f"{label} {record[metric]:.2f}"
            for record in best
            for metric, label in results.SHOWN.items()
            if record.get(metric) is not None
        ]
        parts = [self.name, data.who, f"round {self.state.round}", *shown]
        return f"Run({', '.join(parts)})"

    # Training ------------------------------------------------------------------------

    def resume(self, rounds: int, *, progress: bool = True) -> "Run":
        """Returns the run after `rounds` rounds in all; this one stays as it is.

        The bits are those of a run that was never interrupted, if both were evaluated
        after the same rounds.

        Raises:
          ValueError: it has come further already.
          Diverged: a loss or the state is not finite.
        """
        if rounds < self.state.round:
            raise ValueError(
                f"rounds={rounds}: the run has {self.state.round} behind it; accepted: "
                "as many or more"
            )
        settings = self.experiment.settings._replace(rounds=rounds)
        current = self._replace(experiment=self.experiment._replace(settings=settings))
        with Progress(self.name, rounds) if progress else Silent() as shown:
            for part in (current.experiment.simulator, current.experiment.evaluator):
                part.program.watcher = shown.compiling
            try:
                if not current.records:
                    current = current._scored(shown, {})
                shown.stage("training")
                for call in loop.rounds(current.experiment, current.state):
                    current = current._replace(state=call.state)
                    if loop.is_due(settings, call.state.round):
                        current = current._scored(shown, call.last)
                    shown.stage("training")
            except KeyboardInterrupt:
                logging.warning(
                    "Stopped after round %d of %d; `resume` goes on from there.",
                    current.state.round,
                    rounds,
                )
        return current

    def _scored(self, shown: Any, info: Mapping[str, Any]) -> "Run":
        """The run with a record of its present state."""
        shown.stage("evaluating")
        seed, (round, carry) = self.experiment.settings.seed, self.state
        values = self.experiment.evaluator.evaluate(seed, carry, round)
        record: dict[str, Any] = dict(round=round, loss=info.get("loss"))
        record |= results.record(values)
        record |= self.experiment.totals(seed, round)
        record |= {k: v for k, v in info.items() if k != "loss" and np.ndim(v) == 0}
        record = log.jsonable(record)
        words = {
            label: f"{record[metric]:.2f}"
            for metric, label in results.SHOWN.items()
            if record.get(metric) is not None
        }
        shown.update(round, words)
        kept = (r for r in self.records if r["round"] < round)
        return self._replace(records=(*kept, record))

    # Results -------------------------------------------------------------------------

    @property
    def curves(self) -> Any:
        """A pandas DataFrame of the evaluated rounds, by round."""
        import pandas

        return pandas.DataFrame(self.records).set_index("round")

    def scores(self) -> dict[str, float]:
        """Returns accuracies in per cent of the present state.

        "pacc" is that of participants on what they hold out, "zacc" of unseen clients
        without any training, "gacc" on the global test set: by samples, with "_mean",
        "_std" and "_p10" over clients; "_em" and "_oracle" with an estimated and the
        true class prior, "_swapped" with the next client's network. With
        `finetune_epochs` also "pacc_ft5" and so on, after 5 epochs.
        """
        seed, (round, carry) = self.experiment.settings.seed, self.state
        evaluator, where = self.experiment.evaluator, (seed, carry, round)
        fitted = evaluator.fit(*where)
        found = results.record(evaluator.evaluate(*where, fitted))
        for epochs in self.experiment.settings.finetune_epochs:
            tuned = evaluator.tune(*where, epochs, fitted)
            found |= results.fine_tuned(tuned, f"_ft{epochs}")
        return found

    # Serving -------------------------------------------------------------------------

    def variables(self, client: int | None = None) -> dict[str, Any]:
        """Returns the variables of the network that a client runs, {"params": ...}.

        They are for `module.apply`, with the client's own inputs, if there are any, as
        what the network is conditioned on; it is the network that was scored.

        Args:
          client: a number; None for somebody who is none of them.
        """
        data = self.experiment.federation
        return _applied(self._deploy(client, self._own_inputs(client, data)).network)

    def network(self, client: int | None = None, x: Any = None) -> export.Network:
        """Returns what runs on a client, with what to do to its inputs.

        Args:
          client: a number; None for somebody who is none of them.
          x: inputs as of `predict`, on which the network may be conditioned; None: the
            client's own; of somebody who is none of them the global test set, or if
            there is none what all participants hold out.

        Raises:
          FloatingPointError: the network's outputs are not finite.
        """
        data, n = self.experiment.federation, self.experiment.federation.num_clients
        inputs = self._own_inputs(client, data) if x is None else self._inputs(x)
        found = self._deploy(client, inputs)
        if not np.all(scoring.usable(found.logits)):
            raise FloatingPointError("the network's outputs are not finite")
        number = n + data.num_novel if client is None else int(client)
        family = self._family(number)
        alg = self.experiment.algorithm
        model = families.clients(alg)[family].model
        size = min(int(inputs.size[0]), 256)
        seen = clients.gather(
            inputs.pool, jnp.asarray(inputs.rows)[0, :size], jnp.ones(size)
        ).x
        networks = self.recipe.networks(data)
        bare = networks.get(family) if isinstance(networks, dict) else networks
        alone = export.plain(bare, found.network, seen, found.logits[:size])
        pool = inputs.pool
        mean, std = (
            np.asarray(part if part.ndim == 1 else part[number if x is None else 0])
            for part in (pool.mean, pool.std)
        )
        dtype = np.dtype(pool.x.dtype)
        header: dict[str, Any] = dict(
            method=self.name,
            client=client,
            round=self.state.round,
            family=family if alg.has_families else None,
            input=dict(dtype=dtype.name, shape=["n", *pool.x.shape[1:]]),
            classes=list(data.label_names),
            preprocessing=dict(formula="x")  # tokens
            if data.vocabulary
            else dict(
                formula="(x / scale - mean) / std",
                scale=255.0 if dtype == np.uint8 else 1.0,
                mean=mean.tolist(),
                std=std.tolist(),
            ),
            # Whether the network alone predicts what the method does.
            plain=alone is not None,
        )

        def predict(x):
            return model.predict(found.variables, x)

        return export.Network(
            _applied(found.network),
            alone or predict,
            mean,
            std,
            tuple(pool.x.shape[1:]),
            dtype,
            header,
        )

    def export(
        self, path: str | Path, client: int | None = None, format: str = "npz", x=None
    ) -> Path:
        """Writes a client's network to a file that needs no hyperjax to be read.

        Args:
          path: of the file; the format's ending is added where it is missing.
          client, x: see `network`.
          format: "flax", "npz", "safetensors" or "stablehlo", see `runs.export`.

        Returns:
          The file's path.
        """
        check_choice("format", format, export.ENDINGS)
        return export.write(self.network(client, x), path, format)

    def _family(self, number: int) -> str:
        members, data = self.experiment.members, self.experiment.federation
        if members is None:
            return families.ALONE
        if number < data.num_clients:
            return members.names[members.family[number]]
        parts = np.array_split(np.arange(data.num_novel), len(members.names))
        whose = [i for i, ids in enumerate(parts) for _ in ids]
        return members.names[whose[number - data.num_clients]]

    def predict(self, client: int | None, x: Any) -> np.ndarray:
        """Returns the classes of a client's inputs, [n] int32.

        Args:
          client: a number; None for somebody who is none of them.
          x: [n, H, W], [n, H, W, C], [n, d] or [n] texts, as they were given to
            `federate`: normalisation is done here. All of them together are what the
            client's network may be conditioned on.

        Raises:
          FloatingPointError: the network's outputs are not finite.
        """
        return self.probabilities(client, x).argmax(-1).astype(np.int32)

    def probabilities(self, client: int | None, x: Any) -> np.ndarray:
        """Returns class probabilities [n, K] float32; see `predict`."""
        logits = self._deploy(client, self._inputs(x)).logits
        if not np.all(scoring.usable(logits)):
            raise FloatingPointError("the network's outputs for x are not finite")
        return np.asarray(jax.nn.softmax(logits))

    def accuracy(self, client: int | None, x: Any, y: Any) -> float:
        """Returns how many of a client's inputs are told rightly, in per cent.

        Args:
          client, x: see `predict`.
          y: [n], the names of classes, or their numbers.

        Raises:
          ValueError: y does not go with x, or has other classes than the run.
        """
        names = list(map(str, self.experiment.federation.label_names))
        given, right = np.asarray(y).reshape(-1), self.predict(client, x)
        if len(given) != len(right):
            raise ValueError(f"x has {len(right)} samples, y {len(given)} labels")
        if {*map(str, given)} <= {*names}:
            given = np.array([names.index(str(label)) for label in given])
        elif given.dtype.kind not in "iu" or {*given.tolist()} - {*range(len(names))}:
            unknown = next(text for text in map(str, given) if text not in names)
            raise ValueError(
                f"y has {unknown!r}; classes of this run: {', '.join(names[:10])}, or "
                f"numbers 0..{len(names) - 1}"
            )
        return 100.0 * float(np.mean(given == right))

    def _inputs(self, x: Any) -> ClientData:
        """Somebody's samples, as they were given to `federate`."""
        data = self.experiment.federation
        pool = data.pool
        kind = sources.kind_like(x, pool.x.shape[1:], pool.x.dtype)
        found = sources.check_samples(sources.as_samples(x, "x", kind), "x")
        if found.dtype != pool.x.dtype or found.shape[1:] != pool.x.shape[1:]:
            shape = ", ".join(map(str, pool.x.shape[1:]))
            raise ValueError(
                f"x is {found.dtype} of shape {found.shape}; this run takes "
                f"{pool.x.dtype} [n, {shape}]"
            )
        own = clients.pool_of_one(
            found, pool.mean, pool.std, pool.shift, signed=data.signed
        )
        rows = jnp.arange(len(found), dtype=jnp.int32)[None]
        return ClientData(rows, jnp.array([len(found)], jnp.int32), own)

    def _own_inputs(self, client: int | None, data: Federation) -> ClientData:
        """What a client is scored on."""
        n, m = data.num_clients, data.num_novel
        if client is not None and 0 <= client < n:
            table, row = data.held_out, client
        elif client is not None and n <= client < n + m and data.novel is not None:
            table, row = data.novel, client - n
        elif data.test is not None:
            table, row = data.test, 0
        else:
            apart = zip(data.held_out.rows, data.held_out.size, strict=True)
            table, row = clients.table([np.concatenate([r[:n] for r, n in apart])]), 0
        return ClientData(
            jnp.asarray(table.rows[row : row + 1]),
            jnp.asarray(table.size[row : row + 1]),
            data.pool,
        )

    def _deploy(self, client: int | None, inputs: ClientData) -> Deployed:
        data = self.experiment.federation
        n, m = data.num_clients, data.num_novel
        number = n + m if client is None else client
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
            raise ValueError(f"client={client!r} must be a whole number, or None")
        if not 0 <= number <= n + m:
            raise ValueError(
                f"client={client}: participants are 0..{n - 1}, unseen clients "
                f"{n}..{n + m - 1}, and {n + m} is somebody else"
            )
        if number == n + m and self.experiment.members:
            names = ", ".join(self.experiment.members.names)
            raise ValueError(
                "somebody who is no client has no network in this run, whose clients "
                f"have different ones ({names}); clients are 0..{n + m - 1}"
            )
        train = None
        if number < n:
            own = slice(number, number + 1)
            train = ClientData(
                jnp.asarray(data.train.rows[own]),
                jnp.asarray(data.train.size[own]),
                data.pool,
            )
        whose = data.trainer_ids[number] if number < n else number
        seed, (round, carry) = self.experiment.settings.seed, self.state
        deploy = self.experiment.evaluator.deploy
        (found,) = deploy(seed, carry, round, [int(whose)], inputs, train)
        return found

    # Keeping -------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Writes the run to a new or empty folder, for `load_run`.

        run.json says what it is; checkpoints/ has its state, leaves by path; run.pkl
        has what it is made of (data, network, method) by cloudpickle. Like every pickle
        it runs code when it is read: load your own runs alone.

        Raises:
          ValueError: there is something in the folder.
        """
        import cloudpickle

        folder = Path(path).expanduser()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"path={str(path)!r} is not a new or empty folder")
        settings = self.experiment.settings
        try:
            recipe = cloudpickle.dumps((self.name, self.recipe, settings))
        except Exception as error:
            raise ValueError(
                f"what this run was made of cannot be saved ({first_line(error)}); a "
                "method by name or as a function, and a linen module, can"
            ) from error
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECIPE).write_bytes(recipe)
        checkpoint.save(folder / CHECKPOINTS, self.state.round, self.state.carry, 1)
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        checkpoint.write_atomically(folder / log.METRICS, lines)
        about = dict(
            method=self.name,
            run=repr(self),
            settings=settings._asdict(),
            plan=self.experiment.plan,
            python=platform.python_version(),
            jax=jax.__version__,
        )
        # Written last: a folder that has it is whole.
        checkpoint.write_atomically(
            folder / ABOUT, json.dumps(about, indent=2, default=str) + "\n"
        )


def _applied(variables: Any) -> dict[str, Any]:
    """Variables as `module.apply` takes them."""
    stats = variables.get("stats", {})
    return {"params": variables["params"], **(stats if isinstance(stats, dict) else {})}


def load_saved(path: str | Path) -> Run:
    """Reads what `Run.save` wrote, which runs the code that is pickled there.

    Raises:
      ValueError: there is no run, or it is damaged.
    """
    import cloudpickle

    folder = Path(path).expanduser()
    if not (folder / ABOUT).exists():
        raise ValueError(f"path={str(path)!r} holds no run (no {ABOUT})")
    name, recipe, settings = cloudpickle.loads((folder / RECIPE).read_bytes())
    built = recipe.build()._replace(settings=settings)
    members = built.members or built.federation.num_trainers
    template = schedule.abstract_carry(built.algorithm, members)
    restored = checkpoint.restore(folder / CHECKPOINTS, template)
    if restored is None:
        raise ValueError(f"path={str(path)!r} has no intact checkpoint")
    state = State(restored.round, built.simulator.load(restored.carry))
    records = tuple(log.read_lines(folder / log.METRICS))
    return Run(name, recipe, built, state, records)
