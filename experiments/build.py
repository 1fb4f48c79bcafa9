"""From a config to objects; every mistake in it is found here, before any work."""

import ast
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from hyperjax import (
    algorithms,
    channels,
    corrections,
    local,
    models,
    server_optimizers,
)
from hyperjax.data import federation as federations
from hyperjax.data import partition, sources
from hyperjax.data.clients import Table
from hyperjax.data.federation import Federation
from hyperjax.engine import comm, evaluate, families, joint, schedule, sharding
from hyperjax.errors import check_at_least, check_choice
from hyperjax.types import Algorithm, Model


class Experiment(NamedTuple):
    """Everything a run needs."""

    federation: Federation
    algorithm: Algorithm
    simulator: schedule.Simulator
    evaluator: evaluate.Evaluator
    cohort_size: int
    plan: dict[str, Any]
    members: families.Families | None  # who has which network, if they differ


def build(
    config: ml_collections.ConfigDict, store_dir: str | None = None
) -> Experiment:
    """Builds a run.

    Args:
      config: see `configs.common.defaults`; with `config.method`.
      store_dir: where a memory-mapped host store keeps its files.

    Raises:
      ValueError, TypeError, FileNotFoundError, ImportError: naming the field, what was
        given and what is accepted.
    """
    check(config)
    source = load_source(config.data)
    federation = federate(source, config)
    model = make_model(config, source.x.shape[1:], source.num_classes)
    algorithm = make_algorithm(config, model)
    members = None
    if isinstance(model, dict):
        members = families.families(assigned(model, federation.num_clients))
    cohort_size = (
        federation.num_trainers
        if config.server.sampler == "full"
        else config.server.cohort_size
    )
    engine = config.engine
    backend = jax.default_backend()
    mapper = sharding.resolve_mapper(engine.mapper, engine.block_size, backend)
    mesh = sharding.client_mesh(cohort_size, engine.devices)
    if config.server.sequential:
        mesh = None  # one client at a time
    sizes = federation.trainers.size
    simulator = schedule.simulator(
        algorithm,
        federation.trainers,
        federation.pool,
        weight=sizes if config.server.weights == "size" else np.ones_like(sizes),
        cohort_size=cohort_size,
        members=members,
        sampler=config.server.sampler,
        sequential=config.server.sequential,
        mapper=mapper,
        mesh=mesh,
        store=engine.store,
        store_dir=store_dir if engine.memory_map else None,
    )
    plan = dict(
        backend=backend,
        device=jax.local_devices()[0].device_kind,
        devices=1 if mesh is None else mesh.size,
        mapper=mapper,
        store=engine.store,
        conv_rule=engine.conv_rule,
        rounds_per_call=engine.rounds_per_call or config.evaluation.every,
    )
    return Experiment(
        federation,
        algorithm,
        simulator,
        make_evaluator(config, federation, algorithm, members),
        cohort_size,
        plan,
        members,
    )


def check(config: ml_collections.ConfigDict) -> None:
    """Checks every number and name that needs no data to be judged."""
    check_at_least(
        0,
        rounds=config.rounds,
        seed=config.seed,
        devices=config.engine.devices,
        **{"data.num_novel": config.data.num_novel},
    )
    check_at_least(-1, **{"data.seed": config.data.seed})
    check_at_least(
        1,
        **{
            "data.num_clients": config.data.num_clients,
            "local.batch_size": config.local.batch_size,
            "evaluation.every": config.evaluation.every,
            "evaluation.batch_size": config.evaluation.batch_size,
            "evaluation.clients_per_call": config.evaluation.clients_per_call,
            "checkpoint.keep": config.checkpoint.keep,
        },
    )
    check_at_least(
        0,
        **{
            "local.epochs": config.local.epochs,
            "local.weight_decay": config.local.weight_decay,
            "local.learning_rate": config.local.learning_rate,
            "server.learning_rate": config.server.learning_rate,
            "engine.rounds_per_call": config.engine.rounds_per_call,
            "evaluation.finetune_epochs": min(
                config.evaluation.finetune_epochs, default=0
            ),
        },
    )
    if config.data.partition == "dirichlet" and config.data.alpha <= 0:
        raise ValueError(f"data.alpha={config.data.alpha} must be positive")
    check_choice("data.partition", config.data.partition, partition.PARTITIONERS)
    check_choice("server.weights", config.server.weights, ("size", "uniform"))
    check_choice("server.sampler", config.server.sampler, schedule.SAMPLERS)
    check_choice("engine.store", config.engine.store, schedule.STORES)
    check_choice("engine.mapper", config.engine.mapper, sharding.MAPPERS)
    check_choice("engine.conv_rule", config.engine.conv_rule, models.CONV_RULES)
    check_choice("method.name", config.method.name, method_names())
    for name in config.families or (config.model.name,):
        if ":" not in name:
            field = "families" if config.families else "model.name"
            check_choice(field, name, models.ZOO)
    if config.families and not takes_families(config.method.name):
        able = [name for name in method_names() if takes_families(name)]
        raise ValueError(
            f"method.name={config.method.name!r} needs one network for all clients; "
            f"families={tuple(config.families)} goes with: {', '.join(able)}"
        )
    most, field = population_size(config)
    if (
        config.server.sampler == "uniform"
        and not 1 <= config.server.cohort_size <= most
    ):
        raise ValueError(
            f"server.cohort_size={config.server.cohort_size} must be between 1 and "
            f"{field}={most}"
        )
    if config.data.newcomers and config.data.pooled:
        raise ValueError("data.newcomers and data.pooled exclude each other")
    local_optimizer(config.local)
    server_optimizer(config.server)


# Data ------------------------------------------------------------------------------


def load_source(data: ml_collections.ConfigDict) -> sources.Source:
    """Reads the data set."""
    source = sources.load(
        data.name, data_dir=data.data_dir, split=data.split, download=data.download
    )
    return sources.shrink(source, data.shrink)


def federate(source: sources.Source, config: ml_collections.ConfigDict) -> Federation:
    """Deals it out."""
    data = config.data
    options: dict[str, Any] = {
        "iid": {},
        "dirichlet": dict(alpha=data.alpha, min_size=data.min_size, capped=data.capped),
        "pathological": dict(classes_per_client=data.classes_per_client),
        "class_shares": dict(classes_per_client=data.classes_per_client),
        "by_client_id": {},
    }[data.partition]
    client_ids = None
    if data.partition == "by_client_id":
        client_ids = _load_ids(data.client_ids)
    federation = federations.federate(
        source,
        num_clients=data.num_clients,
        num_novel=data.num_novel,
        partition_name=data.partition,
        seed=config.seed if data.seed < 0 else data.seed,
        test_fraction=data.test_fraction,
        eval_fraction=data.eval_fraction,
        validation_fraction=data.validation_fraction,
        stratified=data.stratified,
        client_ids=client_ids,
        **options,
    )
    if data.newcomers:
        return federation.newcomers()
    return federation.pooled() if data.pooled else federation


def population_size(config: ml_collections.ConfigDict) -> tuple[int, str]:
    """Returns how many clients take part, and the field that says so."""
    field = "num_novel" if config.data.newcomers else "num_clients"
    return config.data[field], f"data.{field}"


def _load_ids(given: str | None) -> np.ndarray:
    """Reads "ids.npy" or "file.npz:key"."""
    if not given:
        raise ValueError(
            "data.partition='by_client_id' needs data.client_ids: ids.npy, or "
            "file.npz:key, one id per sample"
        )
    path, _, key = given.partition(".npz:")
    path = path + ".npz" if key else path
    if not Path(path).is_file():
        raise FileNotFoundError(f"data.client_ids={given!r}: there is no file {path!r}")
    content = np.load(path)
    if not key:
        return content
    check_choice("key of data.client_ids", key, content.files)
    return content[key]


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


# Model and method ------------------------------------------------------------------


def make_model(
    config: ml_collections.ConfigDict, input_shape: tuple[int, ...], num_classes: int
) -> Model | dict[str, Model]:
    """Builds `config.model`, or one network per family, for inputs [H, W, c].

    Methods that are made for families are given a mapping in any case.
    """

    def one(name):
        return _make_model(config, name, input_shape, num_classes)

    if not config.families and not needs_families(config.method.name):
        return one(config.model.name)
    names = config.families or (config.model.name,)
    return {f"{i:02d}_{name.split(':')[-1]}": one(name) for i, name in enumerate(names)}


def takes_families(method: str) -> bool:
    """Whether a method is for clients with different networks."""
    return "family_sizes" in inspect.signature(find_method(method)).parameters


def needs_families(method: str) -> bool:
    """Whether a method takes a mapping of networks only."""
    found = inspect.signature(find_method(method)).parameters.get("family_sizes")
    return found is not None and found.default is inspect.Parameter.empty


def assigned(names: Iterable[str], num_clients: int) -> dict[str, np.ndarray]:
    """Returns the clients of each family: equal blocks, leftovers to the first."""
    names = list(names)
    if num_clients < len(names):
        raise ValueError(
            f"{num_clients} clients take part: less than the {len(names)} families"
        )
    blocks = np.array_split(np.arange(num_clients, dtype=np.int32), len(names))
    return dict(zip(names, blocks, strict=True))


def _make_model(
    config: ml_collections.ConfigDict,
    name: str,
    input_shape: tuple[int, ...],
    num_classes: int,
) -> Model:
    """Builds one network; "package.module:Class" is yours."""
    cls = _import_module_class(name) if ":" in name else models.ZOO[name]
    fields = inspect.signature(cls).parameters
    options = {k: v for k, v in config.model.items() if k != "name" and v != ()}
    if "conv_rule" in fields:
        options["conv_rule"] = config.engine.conv_rule
    module = call("model", cls, num_classes=num_classes, **options)
    return models.from_linen(module, input_shape, num_classes)


def _import_module_class(name: str):
    module_name, _, class_name = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"model.name={name!r}: expected package.module:Class of a linen module "
            f"({error})"
        ) from error


def method_names() -> list[str]:
    """Names of all methods: the modules of `hyperjax.algorithms`."""
    return sorted(m.name for m in pkgutil.iter_modules(algorithms.__path__))


def find_method(name: str) -> Callable[..., Algorithm]:
    """Returns a method's factory."""
    return getattr(importlib.import_module(f"hyperjax.algorithms.{name}"), name)


def _population(name: str, config: ml_collections.ConfigDict) -> dict[str, int]:
    """The number of clients, for methods whose server keeps something of each."""
    takes = "num_clients" in inspect.signature(find_method(name)).parameters
    trainers = 1 if config.data.pooled else population_size(config)[0]
    return dict(num_clients=trainers) if takes else {}


def make_algorithm(
    config: ml_collections.ConfigDict, model: Model | dict[str, Model]
) -> Algorithm:
    """Builds `config.method` around a model, or one per family."""
    name = config.method.name
    check_choice("method.name", name, method_names())
    factory = find_method(name)
    options: dict[str, Any] = _population(name, config)
    if isinstance(model, dict):
        blocks = assigned(model, population_size(config)[0])
        options["family_sizes"] = {k: len(ids) for k, ids in blocks.items()}
    options |= {k: v for k, v in config.method.items() if k != "name"}
    if options.get("correction"):
        options["correction"] = make_correction(options["correction"])
    if "base" in options:  # HyperFedNet + X: "fedprox(mu=0.1)"
        base, base_options = parse_call("method.base", options["base"])
        check_choice("method.base", base, method_names())
        base_options |= _population(base, config)
        options |= dict(base=base, base_options=base_options)
    alg = call(
        "method",
        factory,
        model,
        local=make_local(config.local),
        server_opt=server_optimizer(config.server),
        **options,
    )
    return through_channel(alg, config.uplink) if config.uplink else alg


def through_channel(alg: Algorithm, text: str) -> Algorithm:
    """Sends a method's uplink through a channel such as "topk(fraction=0.3)"."""
    name, options = parse_call("uplink", text)
    check_choice("uplink", name, channels.CHANNELS)
    channel = call("uplink", channels.CHANNELS[name], **options)

    def uplink(family: str):
        return comm.describe(families.view(alg, family)).uplink

    return channels.with_uplink(alg, channel, uplink)


def make_correction(texts: str | Sequence[str]) -> corrections.Correction:
    """Builds a correction from "prox(mu=0.1)", or a chain of several."""
    found = []
    for text in (texts,) if isinstance(texts, str) else texts:
        name, options = parse_call("method.correction", text)
        check_choice("method.correction", name, corrections.CORRECTIONS)
        made = call("method.correction", corrections.CORRECTIONS[name], **options)
        found.append(made)
    return found[0] if len(found) == 1 else corrections.chain(*found)


def options_of(factory: Callable) -> dict[str, inspect.Parameter]:
    """Returns what a factory takes or hands on: `**x_options` are those of x."""
    found = dict(inspect.signature(factory).parameters)
    for name in [k for k, p in found.items() if p.kind is p.VAR_KEYWORD]:
        del found[name]
        found |= options_of(find_method(name.removesuffix("_options")))
    return found


def call(field: str, factory, *args, **options):
    """Calls a factory with a config's options; names those it does not take."""
    parameters = options_of(factory)
    for option in options:
        check_choice(f"option of {field}", option, parameters)
    try:
        return factory(*args, **options)
    except TypeError as error:
        raise TypeError(f"{field}: {error}") from error


def make_local(config: ml_collections.ConfigDict):
    """Returns the builder of the local training loop: model -> train function."""
    phase = local.Phase(
        epochs=config.epochs if config.steps is None else None, steps=config.steps
    )
    milestones = jnp.asarray(config.milestones or (0,), jnp.int32)

    def schedule_fn(round):
        factor = config.learning_rate_decay ** round.astype(jnp.float32)
        if config.milestones:
            passed = jnp.sum(round >= milestones).astype(jnp.float32)
            factor = factor * config.milestone_factor**passed
        return factor

    return functools.partial(
        local.trainer,
        optimizer=local_optimizer(config),
        batch_size=config.batch_size,
        phases=(phase,),
        clip_norm=config.clip_norm,
        schedule=schedule_fn,
    )


def local_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Returns the clients' optimizer; weight decay joins the gradient first."""
    optimizer = make_optimizer(
        "local.optimizer", config.optimizer, config.learning_rate, {}
    )
    if config.weight_decay:
        decay = optax.add_decayed_weights(config.weight_decay)
        return optax.chain(decay, optimizer)
    return optimizer


def server_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Returns the server's optimizer."""
    return make_optimizer(
        "server.optimizer",
        config.optimizer,
        config.learning_rate,
        server_optimizers.FEDOPT,
    )


def make_optimizer(
    field: str, text: str, learning_rate: float, extra: dict[str, Any]
) -> optax.GradientTransformation:
    """Builds an optimizer from "name" or "name(option=value, ...)".

    Raises:
      ValueError: unknown name or option, or values the optimizer does not accept.
    """
    name, options = parse_call(field, text)
    known = {**_optax_optimizers(), **extra}
    check_choice(field, name, known)
    parameters = inspect.signature(known[name]).parameters
    for option in options:
        check_choice(f"option of {field}={name}", option, parameters)
    try:
        optimizer = known[name](learning_rate=learning_rate, **options)
        trial = {"w": jnp.zeros(2)}
        jax.eval_shape(lambda w: optimizer.update(w, optimizer.init(w), w), trial)
    except Exception as error:
        raise ValueError(f"{field}={text!r}: {error}") from error
    return optimizer


def parse_call(field: str, text: str) -> tuple[str, dict[str, Any]]:
    """Parses "name" or "name(option=literal, ...)"."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and not node.args
            and all(k.arg for k in node.keywords)
        ):
            options = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
            return node.func.id, options
    except (SyntaxError, ValueError):
        pass
    raise ValueError(
        f"{field}={text!r} is not of the form name or name(option=value, ...)"
    )


@functools.cache
def _optax_optimizers() -> dict[str, Any]:
    """Optax's optimizers: public functions with a `learning_rate`."""
    found = {}
    for name, value in vars(optax).items():
        if name.startswith("_") or not inspect.isfunction(value):
            continue
        parameters = inspect.signature(value).parameters
        if "learning_rate" in parameters and "optimizer" not in parameters:
            found[name] = value
    return found


def make_evaluator(
    config: ml_collections.ConfigDict,
    federation: Federation,
    algorithm: Algorithm,
    members: families.Families | None = None,
) -> evaluate.Evaluator:
    """Builds the evaluation of a run."""
    most = max(federation.num_clients, federation.num_novel)
    clients_per_call = min(config.evaluation.clients_per_call, most)
    whom = populations(federation)
    build_it: Callable[..., evaluate.Evaluator] = evaluate.evaluator
    if members is not None:
        # The global test set belongs to no family.
        whom = {metric: p for metric, p in whom.items() if metric != "gacc"}
        strangers = [
            np.full(len(ids), i)
            for i, ids in enumerate(
                np.array_split(np.arange(federation.num_novel), len(members.names))
            )
        ]
        build_it = functools.partial(
            joint.evaluator,
            members=members,
            family=np.concatenate([members.family, *strangers]),
        )
    return build_it(
        algorithm,
        federation.pool,
        whom,
        source_prior=federation.source_prior,
        tuned=tuned_populations(federation),
        batch_size=config.evaluation.batch_size,
        clients_per_call=clients_per_call,
        mesh=sharding.client_mesh(clients_per_call, config.engine.devices),
    )
