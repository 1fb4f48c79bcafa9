"""Everything that a run needs, put together from objects: no config, no folder."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from hyperjax import compiling, hosts
from hyperjax.data.clients import Table, is_on_host
from hyperjax.data.federation import Federation
from hyperjax.engine import comm, evaluate, families, schedule, sharding, stores
from hyperjax.engine.compiled import Compiled, Hyper
from hyperjax.errors import check_choice
from hyperjax.types import Algorithm

WEIGHTS = ("size", "uniform")
EVALUATED = 16  # clients at a time on an accelerator
_SAMPLE = 0xE7A1  # the stream of draws of `sample`


class Settings(NamedTuple):
    """What a loop and a summary ask of an experiment, beside its parts."""

    seed: int = 0
    rounds: int = 100
    every: int = 5  # rounds between evaluations
    rounds_per_call: int = 0  # of the compiled program; 0: all between evaluations
    finetune_epochs: tuple[int, ...] = ()  # at the end, copies after so many epochs
    thresholds: tuple[float, ...] = ()  # % pACC whose cost is told
    pooled: bool = False  # all samples are in one place, and nothing is sent


class Experiment(NamedTuple):
    """A method on a federation, ready to run."""

    federation: Federation
    algorithm: Algorithm
    members: families.Families | None  # who has which network, if they differ
    simulator: schedule.Simulator
    evaluator: evaluate.Evaluator
    costs: dict[str, comm.Cost]  # of one exchange with a client, by family
    settings: Settings
    plan: dict[str, Any]  # what was chosen: mapper, devices, store, cohort_size, ...
    whom: Mapping[str, np.ndarray]  # places of who is evaluated, by metric
    by_sample: evaluate.Evaluator | None = None  # with one classifier per input
    hyper: Hyper | None = None  # what of the method its programs do not have built in

    def __repr__(self) -> str:
        return f"Experiment({self.federation!r}, {self.algorithm!r})"

    @property
    def cost(self) -> comm.Cost:
        """Of one exchange, the mean over clients; whole numbers for one family."""
        if self.members is None:
            return next(iter(self.costs.values()))
        weight = [self.members.size(name) for name in self.costs]
        columns = np.average(list(self.costs.values()), axis=0, weights=weight)
        return comm.Cost(*columns.tolist())

    def totals(self, root: Any, rounds: int) -> dict[str, int]:
        """Returns the bytes of all clients in so many rounds, in Python integers."""
        visits = self.simulator.visits(root, rounds)
        return {
            f"{way}_bytes_total": sum(
                getattr(cost, f"{way}_bytes") * visits[name]
                for name, cost in self.costs.items()
            )
            for way in ("up", "down")
        }

    @property
    def sampled(self) -> dict[str, tuple[int, int]]:
        """Returns how many clients a metric is of, and of how many they are drawn."""
        data = self.federation
        nums = dict(pacc=data.num_clients, vacc=data.num_clients, zacc=data.num_novel)
        pairs = {m: (len(whom), nums[m]) for m, whom in self.whom.items()}
        return {m: (num, of) for m, (num, of) in pairs.items() if num < of}

    @property
    def fit_totals(self) -> dict[str, int]:
        """Returns the bytes of what all participants find out before a deployment.

        They are beside those of training, see `types.Fit`; empty where there are none.
        """
        found = dict(fit_up_bytes_total=0, fit_down_bytes_total=0)
        sides = families.clients(self.algorithm)
        for name, side in sides.items():
            if side.fit is None:
                continue
            members, num = self.members, self.federation.num_trainers
            drawn = side.fit.drawn(members.size(name) if members else num)
            cost = comm.fitting(families.view(self.algorithm, name))
            for way in ("up", "down"):
                each = getattr(cost, f"{way}_bytes")
                found[f"fit_{way}_bytes_total"] += side.fit.rounds * drawn * each
        return found if any(side.fit for side in sides.values()) else {}


def experiment(
    federation: Federation,
    algorithm: Algorithm,
    settings: Settings,
    *,
    sampler: str = "full",
    cohort_size: int | None = None,
    weights: str = "size",
    sequential: bool = False,
    mapper: str = "auto",
    block_size: int = 5,
    devices: int = 0,
    store: str = "device",
    store_dir: str | None = None,
    pool_mb: int = 0,
    streaming: bool = False,
    numerics: compiling.Numerics = compiling.Numerics(),
    eval_batch_size: int = 256,
    eval_clients: int = 0,
    clients_per_call: int = 64,
    like: Experiment | None = None,
    widths: Mapping[str, int] | None = None,
    hyper: Hyper | None = None,
    balanced: bool = False,
) -> Experiment:
    """Puts a run together.

    Args:
      federation: who has which samples.
      algorithm: the method. Where it has several networks, clients have them in equal
        blocks, see `blocks`.
      settings: how long, how often.
      sampler: "full" (all clients every round) or "uniform" (some, drawn each round).
      cohort_size: of the sampler "uniform".
      weights: of clients in the mean: "size", their training samples, or "uniform".
      sequential: the server steps after every client of a round.
      mapper: "map", "vmap", "block" or "auto", see `sharding.resolve_mapper`.
      block_size: of "block".
      devices: at most so many; 0: all that help.
      store: of clients' state and row numbers: "device" or "host".
      store_dir: folder of a host store in files.
      pool_mb: see `schedule.simulator`.
      streaming: uplinks are summed up as clients finish, see `schedule.simulator`.
      numerics: how programs round.
      eval_batch_size: inputs predicted at a time.
      eval_clients: of participants, and of unseen clients, so many are evaluated, the
        same at every evaluation; 0: all.
      clients_per_call: clients evaluated at a time.
      like: an experiment with the same arguments but for seed, federation and values of
        hyper-parameters; what was compiled for it serves this one too, where tables
        are as wide.
      widths: how wide tables of the federation are on the device at least, by name.
      hyper: see `schedule.simulator`.
      balanced: whether the method is trained to predict under a uniform prior, see
        `training.Local`; then label-shift EM starts from it.

    Raises:
      ValueError: an unknown choice, or parts that do not go together.
    """
    check_choice("weights", weights, WEIGHTS)
    members = None
    if algorithm.has_families:
        names = families.clients(algorithm)
        members = families.families(blocks(names, federation.num_clients))
    num = federation.num_trainers
    cohort_size = num if sampler == "full" else (cohort_size or num)
    backend = jax.default_backend()
    if streaming and mapper == "auto" and backend != "cpu":
        mapper = "block"  # all at once there would be nothing to sum up
    sizes = federation.trainers.size
    resolved = sharding.resolve_mapper(mapper, block_size, backend, sizes)
    resolved = like.plan["mapper"] if like else resolved  # it has the programs
    # One client at a time needs one device.
    mesh = None if sequential else sharding.client_mesh(cohort_size, devices)
    wide = federation.widened(widths or {})
    if not is_on_host(wide.pool):  # once, for training and for evaluation
        wide = wide._replace(pool=sharding.replicate(wide.pool, mesh))
    simulator = schedule.simulator(
        algorithm,
        wide.trainers,
        wide.pool,
        weight=sizes if weights == "size" else np.ones_like(sizes),
        cohort_size=cohort_size,
        members=members,
        sampler=sampler,
        sequential=sequential,
        mapper=resolved,
        mesh=mesh,
        store=store,
        store_dir=store_dir,
        pool_mb=pool_mb,
        streaming=streaming,
        program=like.simulator.program if like else Compiled(mesh, numerics),
        hyper=hyper,
    )
    whom = sample(federation, eval_clients, settings.seed)
    evaluator = make_evaluator(
        wide,
        algorithm,
        members,
        whom,
        eval_batch_size,
        clients_per_call,
        devices,
        program=like and like.evaluator.program,
        numerics=numerics,
        hyper=hyper,
        balanced=balanced,
        pool_mb=pool_mb,
        held=simulator.held,
        mapper=resolved,
    )
    plan = dict(
        backend=backend,
        device=jax.local_devices()[0].device_kind,
        devices=1 if mesh is None else mesh.size,
        processes=hosts.count(),
        mapper=resolved,
        store=store,
        rounds_per_call=settings.rounds_per_call or settings.every,
        cohort_size=cohort_size,
        compiler_level=compiling.level(),
        **({"streaming": True} if streaming else {}),
        **({"pool": "host"} if is_on_host(federation.pool) else {}),
        **{name: x for name, x in numerics._asdict().items() if x},
    )
    costs = {}
    for name in families.clients(algorithm):
        messages = comm.describe(families.view(algorithm, name))
        free = comm.Cost(0, 0, 0, 0)  # in one place nothing is sent
        costs[name] = free if settings.pooled else comm.cost(messages)
    return Experiment(
        federation,
        algorithm,
        members,
        simulator,
        evaluator,
        costs,
        settings,
        plan,
        whom,
        hyper=hyper,
    )


def blocks(names: Iterable[str], num_clients: int) -> dict[str, np.ndarray]:
    """Returns the clients of each family: equal blocks, leftovers to the first.

    Raises:
      ValueError: there are fewer clients than families.
    """
    names = list(names)
    if num_clients < len(names):
        raise ValueError(
            f"{num_clients} clients take part: less than the {len(names)} families"
        )
    ids = np.array_split(np.arange(num_clients, dtype=np.int32), len(names))
    return dict(zip(names, ids, strict=True))


# Who is evaluated -------------------------------------------------------------------


def sample(federation: Federation, most: int, seed: int) -> dict[str, np.ndarray]:
    """Draws whom to evaluate, {metric: places}: at most so many; 0: everybody."""

    def draw(stream: int, num: int) -> np.ndarray:
        if not most or num <= most:
            return np.arange(num)
        draws = np.random.default_rng([seed, _SAMPLE, stream])
        return np.sort(draws.choice(num, most, replace=False))

    participants = draw(0, federation.num_clients)
    unseen = draw(1, federation.num_novel)
    return {"pacc": participants, "vacc": participants, "zacc": unseen}


def populations(federation: Federation) -> dict[str, evaluate.Population]:
    """Who is evaluated for each metric: participants, unseen clients, everybody."""
    n, m = federation.num_clients, federation.num_novel

    def untrained(inputs: Table, first_id: int) -> evaluate.Population:
        num = len(inputs.size)
        empty = Table(np.zeros((num, 1), np.int32), np.zeros(num, np.int32))
        ids = np.arange(first_id, first_id + num, dtype=np.int32)
        return evaluate.Population(ids, empty, inputs)

    found = {
        "pacc": evaluate.Population(
            federation.trainer_ids, federation.train, federation.held_out
        )
    }
    if federation.validation is not None:
        found["vacc"] = found["pacc"]._replace(inputs=federation.validation)
    if federation.novel is not None:
        found["zacc"] = untrained(federation.novel, n)
    if federation.test is not None:
        found["gacc"] = untrained(federation.test, n + m)
    return found


def _drawn(
    everybody: Mapping[str, evaluate.Population], whom: Mapping[str, np.ndarray]
) -> dict[str, evaluate.Population]:
    """The populations, but for those who are not evaluated."""

    found = dict(everybody)
    for metric, places in whom.items():
        if metric in found:
            found[metric] = jax.tree.map(lambda x, i=places: x[i], found[metric])
    return found


def tuned_populations(federation: Federation) -> dict[str, evaluate.Population]:
    """Who is fine-tuned, on what, and scored on what: participants, unseen clients."""
    found = {"pacc": populations(federation)["pacc"]}
    if federation.novel_train is not None and federation.novel_held_out is not None:
        n, m = federation.num_clients, federation.num_novel
        found["zacc"] = evaluate.Population(
            np.arange(n, n + m, dtype=np.int32),
            federation.novel_train,
            federation.novel_held_out,
        )
    return found


def make_evaluator(
    federation: Federation,
    algorithm: Algorithm,
    members: families.Families | None,
    whom: Mapping[str, np.ndarray],
    batch_size: int = 256,
    clients_per_call: int = 64,
    devices: int = 0,
    program: Compiled | None = None,
    numerics: compiling.Numerics = compiling.Numerics(),
    hyper: Hyper | None = None,
    balanced: bool = False,
    pool_mb: int = 0,
    held: Mapping[str, stores.Held] | None = None,
    mapper: str | int = "map",
) -> evaluate.Evaluator:
    """Builds the evaluation of a run; arguments as of `experiment`, `evaluator`.

    `mapper` is that of training. On an accelerator clients are evaluated in blocks,
    unless they are trained one after another.
    """
    if mapper != "map":
        mapper = "map" if jax.default_backend() == "cpu" else EVALUATED
    clients_per_call = min(clients_per_call, max(map(len, whom.values())))
    everybody = populations(federation)
    scored = _drawn(everybody, whom)
    novel = np.zeros(0, np.int32)
    prior = federation.source_prior
    prior = np.full(len(prior), 1 / len(prior)) if balanced else prior
    if members is not None:
        # The global test set belongs to no family.
        scored.pop("gacc", None)
        parts = np.array_split(np.arange(federation.num_novel), len(members.names))
        novel = np.repeat(np.arange(len(parts)), [len(ids) for ids in parts])
    mesh = sharding.client_mesh(clients_per_call, devices)
    return evaluate.evaluator(
        algorithm,
        federation.pool,
        scored,
        members=members,
        novel=novel,
        source_prior=prior,
        tuned=_drawn(tuned_populations(federation), whom),
        fitting=everybody.get("vacc"),
        batch_size=batch_size,
        clients_per_call=clients_per_call,
        mapper=mapper,
        mesh=mesh,
        pool_mb=pool_mb,
        held=held,
        program=program or Compiled(mesh, numerics),
        hyper=hyper,
    )
