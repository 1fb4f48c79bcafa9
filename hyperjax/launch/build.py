"""From a config to objects; every mistake in it is found here, before any work."""

import inspect
import re
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np
import optax
from absl import logging

from hyperjax import (
    adaptation,
    augmentation,
    calls,
    compiling,
    models,
    registry,
)
from hyperjax.data import clients, files, partition, shift, sources
from hyperjax.data import federation as federations
from hyperjax.data.federation import Federation
from hyperjax.engine import cohorts, comm, families, schedule, sharding
from hyperjax.engine.compiled import Hyper
from hyperjax.errors import check_choice, check_number
from hyperjax.launch import factories, fields
from hyperjax.protocols import common
from hyperjax.runs.experiment import (
    Experiment,
    Settings,
    blocks,
    experiment,
    make_evaluator,
)
from hyperjax.runs.recipe import through_channel
from hyperjax.training import round_at
from hyperjax.types import Algorithm, Model
from hyperjax.wrappers import with_few_inputs


def build(
    config: ml_collections.ConfigDict, store_dir: str | None = None
) -> Experiment:
    """Makes the experiment of a config, which stays as it is.

    Args:
      config: see `protocols.common.defaults`; with `config.method`.
      store_dir: where a memory-mapped host store keeps its files.

    Raises:
      ValueError, TypeError, FileNotFoundError, ImportError: naming the field, what was
        given and what is accepted.
    """
    config = common.filled(config)
    check(config)
    return make_experiment(config, store_dir)


def make_experiment(
    config: ml_collections.ConfigDict, store_dir: str | None = None
) -> Experiment:
    """Makes the experiment of a config that is checked and complete."""
    warn_of_the_end(config)
    federation = federate(load_source(config.data), config)
    return assemble(config, federation, store_dir)


def assemble(
    config: ml_collections.ConfigDict,
    federation: Federation,
    store_dir: str | None = None,
    *,
    like: Experiment | None = None,
    widths: Mapping[str, int] | None = None,
) -> Experiment:
    """Builds what a config says around a federation.

    Args:
      config: that was checked.
      federation: dealt out as it says.
      store_dir: see `build`.
      like: see `runs.experiment.experiment`.
      widths: likewise.
    """
    model = make_model(
        config,
        federation.pool.x.shape[1:],
        federation.num_classes,
        federation.vocabulary,
    )
    if config.local.augment:
        augmentation.check_images(federation.pool.x)
    hyper = make_hyper(config, model)
    same = like and like.hyper and like.hyper.values == hyper.values
    algorithm = like.algorithm if like and same else make_algorithm(config, model)
    engine, evaluation = config.engine, config.evaluation
    numerics = compiling.Numerics(engine.precision, engine.deterministic)
    found = experiment(
        federation,
        algorithm,
        settings(config),
        sampler=config.server.sampler,
        cohort_size=config.server.cohort_size,
        weights=config.server.weights,
        sequential=config.server.sequential,
        mapper=engine.mapper,
        block_size=engine.block_size,
        devices=engine.devices,
        streaming=engine.streaming,
        numerics=numerics,
        pool_mb=engine.pool_mb,
        store=engine.store,
        store_dir=store_dir if engine.memory_map else None,
        eval_batch_size=evaluation.batch_size,
        eval_clients=evaluation.clients,
        clients_per_call=evaluation.clients_per_call,
        like=like,
        widths=widths,
        hyper=hyper,
        balanced=config.local.balanced,
    )
    conv_rule = models.rule_in_plan(engine.conv_rule)
    found.plan.update(conv_rule=conv_rule, marks=marks(config))
    if not evaluation.sample_level or "deploy_granularity" not in config.method:
        return found
    other = like and like.by_sample
    by_sample = make_evaluator(
        federation.widened(widths or {})._replace(pool=found.evaluator.pool),
        make_algorithm(config, model, deploy_granularity="sample"),
        found.members,
        found.whom,
        evaluation.batch_size,
        evaluation.clients_per_call,
        engine.devices,
        program=other and other.program,
        numerics=numerics,
        hyper=make_hyper(config, model, deploy_granularity="sample"),
        balanced=config.local.balanced,
        pool_mb=engine.pool_mb,
        held=found.simulator.held,
        mapper=found.plan["mapper"],
    )
    return found._replace(by_sample=by_sample)


def settings(config: ml_collections.ConfigDict) -> Settings:
    """Returns what the loop and the summary of a run ask of its config."""
    return Settings(
        seed=config.seed,
        rounds=config.rounds,
        every=config.evaluation.every,
        rounds_per_call=config.engine.rounds_per_call,
        finetune_epochs=tuple(config.evaluation.finetune_epochs),
        thresholds=tuple(config.evaluation.thresholds),
        pooled=config.data.pooled,
    )


def check(config: ml_collections.ConfigDict) -> None:
    """Checks every number and name that needs no data to be judged.

    Raises:
      ValueError: naming the field, what was given and what is accepted.
    """
    fields.check(config)
    method = config.method.name
    check_choice("data.partition", config.data.partition, partition.PARTITIONERS)
    check_choice("data.standardise", config.data.standardise, clients.STANDARDISE)
    check_choice("data.shift", config.data.shift, shift.KINDS)
    _shift(config.data)
    if config.evaluation.adapt:
        adaptation.factory(config.evaluation.adapt)
        adaptation.check_held_out(
            config.evaluation.adapt, config.data.validation_fraction
        )
    if config.local.augment:
        augmentation.factory(config.local.augment)
    check_choice("server.weights", config.server.weights, ("size", "uniform"))
    check_choice("server.sampler", config.server.sampler, cohorts.SAMPLERS)
    check_choice("engine.store", config.engine.store, schedule.STORES)
    check_choice("engine.pool", config.engine.pool, clients.POOLS)
    if config.engine.pool == "host" and config.engine.store != "host":
        raise ValueError(
            "engine.pool='host' moves a cohort's samples with its state; accepted: "
            "engine.store='host' with it, or engine.pool='device'"
        )
    check_choice("engine.mapper", config.engine.mapper, sharding.MAPPERS)
    check_choice("engine.precision", config.engine.precision, compiling.PRECISIONS)
    check_choice("engine.conv_rule", config.engine.conv_rule, models.CONV_RULES)
    models.check_rule(config.engine.conv_rule, "engine.conv_rule")
    known = registry.options(registry.find(method, "method.name"))
    for option in config.method:
        if option != "name":
            check_choice(f"option of method={method}", option, known)
    for name in config.families:
        if ":" not in name:
            check_choice("families", name, models.ZOO)
    if not config.families:
        common.find_network(config.model.name)
    if config.families and registry.families(method) == "one":
        able = [name for name in registry.methods() if registry.families(name) != "one"]
        raise ValueError(
            f"method.name={config.method.name!r} needs one network for all clients; "
            f"families={tuple(config.families)} goes with: {', '.join(able)}"
        )
    most, field = population_size(config)
    if len(config.families) > most:
        raise ValueError(
            f"{field}={most} is less than the {len(config.families)} families"
        )
    for pattern in config.start.take:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"start.take has {pattern!r}: {error}") from error
    if (
        config.server.sampler == "uniform"
        and not 1 <= config.server.cohort_size <= most
    ):
        raise ValueError(
            f"server.cohort_size={config.server.cohort_size} must be between 1 and "
            f"{field}={most}"
        )
    if config.data.pooled:
        several = config.families or registry.families(config.method.name) == "several"
        if several or config.data.newcomers:
            raise ValueError(
                "data.pooled=True trains one network in one place; it does not go with "
                f"families={tuple(config.families)}, newcomers="
                f"{config.data.newcomers} and method.name={config.method.name!r}"
            )
    for name in ("epochs", "steps"):
        if config.local[name] is not None and registry.traits(method).own_length:
            raise ValueError(
                f"local.{name}={config.local[name]} would change nothing: how long "
                f"clients of method.name={method!r} train is among the method's "
                "options; accepted: None"
            )
    factories.local_optimizer(config.local)
    factories.server_optimizer(config.server)


def marks(config: ml_collections.ConfigDict) -> dict[str, list[int]]:
    """Returns the rounds from which on a run goes on otherwise, by what says so."""
    found = {"local.milestones": factories.milestones(config.local, config.rounds)}
    options = registry.options(config.method.name)
    if "warmup" in options:
        warmup = config.method.get("warmup", options["warmup"].default)
        check_number(at_least=0, at_most=1, **{"method.warmup": warmup})
        found["method.warmup"] = [round_at(warmup, config.rounds)]
    return {field: rounds for field, rounds in found.items() if rounds}


def warn_of_the_end(config: ml_collections.ConfigDict) -> None:
    """Warns of what would begin when the run is over."""
    for field, rounds in marks(config).items():
        late = [round for round in rounds if round >= config.rounds > 0]
        if late:
            logging.warning(
                "What %s says begins after round %s, and the run ends after round %d: "
                "it changes nothing.",
                field,
                " and ".join(map(str, late)),
                config.rounds,
            )


# Data ------------------------------------------------------------------------------


def load_source(data: ml_collections.ConfigDict) -> sources.Source:
    """Reads the data set; images that will be shifted have all their pixels yet."""
    source = sources.load(
        data.name,
        data_dir=data.data_dir,
        split=data.split,
        download=data.download,
        test_split=data.test_split,
        keys=sources.Keys(data.image_key, data.label_key, data.client_key, data.kind),
        size=data.resize if data.shrink == 1 else 0,
    )
    return source if data.shift != "none" else scaled(source, data)


def scaled(source: sources.Source, data: ml_collections.ConfigDict) -> sources.Source:
    """Brings images to the size that networks are given."""
    try:
        source = sources.shrink(source, data.shrink)
    except ValueError as error:
        raise ValueError(f"data.shrink={data.shrink}: {error}") from error
    return sources.resize(source, data.resize)


def sample_shape(
    source: sources.Source, data: ml_collections.ConfigDict
) -> tuple[int, ...]:
    """Returns the shape of what networks are given."""
    if data.shift == "none":
        return source.x.shape[1:]
    return scaled(source._replace(x=source.x[:1], y=source.y[:1]), data).x.shape[1:]


def federate(source: sources.Source, config: ml_collections.ConfigDict) -> Federation:
    """Deals it out."""
    data = config.data
    options = {name: data[name] for name in fields.PARTITIONS[data.partition]}
    if "client_ids" in options:
        options["client_ids"] = _load_ids(data.client_ids, source)
    elif source.client_ids is not None:
        logging.warning(
            "%r says whose each sample is (%d ids), and data.partition=%r deals them "
            "out anew; data.partition=by_client_id leaves them whose they are.",
            *(source.name, len(np.unique(source.client_ids)), data.partition),
        )
    federation = federations.federate(
        source,
        num_clients=data.num_clients,
        num_novel=data.num_novel,
        partition=data.partition,
        seed=config.seed if data.seed < 0 else data.seed,
        test_fraction=data.test_fraction,
        eval_fraction=data.eval_fraction,
        validation_fraction=data.validation_fraction,
        stratified=data.stratified,
        shift=_shift(data),
        after_shift=lambda shifted: scaled(shifted, data),
        standardise=data.standardise,
        pool=config.engine.pool,
        **options,
    )
    if data.newcomers:
        return federation.of_novel()
    return federation.pooled() if data.pooled else federation


def _shift(data: ml_collections.ConfigDict) -> shift.Shift:
    return shift.shift(
        data.shift,
        strength=data.shift_strength,
        novel=data.shift_novel,
        classes=data.shift_classes,
    )


def population_size(config: ml_collections.ConfigDict) -> tuple[int, str]:
    """Returns how many clients take part, and the field that says so."""
    field = "num_novel" if config.data.get("newcomers") else "num_clients"
    return config.data[field], f"data.{field}"


def _load_ids(given: str | None, source: sources.Source) -> np.ndarray:
    """Reads "ids.npy" or "file.npz:key"; or takes the ids that the set has."""
    if given:
        ids, test = files.read_array(given, "data.client_ids"), source.test
        if test is None or ids.shape != (int((~test).sum()),):
            return ids
        # Whose the set's own test part is nobody says: it is the federation's.
        whole = ids.dtype.kind in "iu"
        ids = ids.astype(np.int64 if whole else str)
        found = np.full(len(test), -1 if whole else "", ids.dtype)
        found[~test] = ids
        return found
    if source.client_ids is None:
        raise ValueError(
            "data.partition='by_client_id' needs data.client_ids: ids.npy, or "
            "file.npz:key, one id per sample; or data.client_key, an array or feature "
            f"of {source.name!r}"
        )
    return source.client_ids


# Model and method ------------------------------------------------------------------


def make_model(
    config: ml_collections.ConfigDict,
    input_shape: tuple[int, ...],
    num_classes: int,
    vocabulary: int = 0,
) -> Model | dict[str, Model]:
    """Builds `config.model`, or one network per family, for inputs of a shape.

    `vocabulary` is how many different tokens they are made of, 0 for others.

    Methods that are made for families are given a mapping in any case. The networks of
    families have their own options; those of `config.model` are its network's.
    """

    def one(name, **options):
        try:
            return factories.make_network(
                config, name, options, input_shape, num_classes, vocabulary
            )
        except ValueError as error:
            if len(input_shape) == 3 and "does not accept inputs" in str(error):
                raise ValueError(
                    f"{error}; data.resize=32 would make them 32x32"
                ) from error
            raise

    if config.families:
        return {_family(i, name): one(name) for i, name in enumerate(config.families)}
    model = one(**config.model)
    several = registry.families(config.method.name) == "several"
    return {_family(0, config.model.name): model} if several else model


def _family(number: int, name: str) -> str:
    return f"{number:02d}_{name.split(':')[-1]}"


def make_algorithm(
    config: ml_collections.ConfigDict, model: Model | dict[str, Model], **instead: Any
) -> Algorithm:
    """Builds `config.method` around a model, or one per family.

    Args:
      config: checked.
      model: from `make_model`.
      **instead: options of the method that go before those of the config.

    Raises:
      ValueError: an unknown method or option, or a server optimizer that the method's
        server would never call.
    """
    server_opt, uses = factories.watched(factories.server_optimizer(config.server))
    alg = _put_together(config, model, server_opt, **instead)
    chosen = config.server.optimizer, config.server.learning_rate
    if chosen != ("sgd", 1.0):
        family = min(model) if isinstance(model, dict) else families.ALONE
        comm.describe(families.view(alg, family))
        if not uses:
            raise ValueError(
                f"server.optimizer={chosen[0]!r} with server.learning_rate={chosen[1]} "
                "would change nothing: the server of "
                f"method.name={config.method.name!r} has no optimizer; accepted: sgd, "
                "1.0"
            )
    return _dressed(alg, config)


def _dressed(alg: Algorithm, config: ml_collections.ConfigDict) -> Algorithm:
    """A method with what its messages go through, and what its clients then do."""
    alg = through_channel(alg, config.uplink) if config.uplink else alg
    augment = config.local.augment
    alg = augmentation.with_augmentation(alg, augment) if augment else alg
    adapt = config.evaluation.adapt
    alg = adaptation.with_adaptation(alg, adapt) if adapt else alg
    few = config.evaluation.context
    return with_few_inputs(alg, few) if few else alg


def make_hyper(
    config: ml_collections.ConfigDict, model: Model | dict[str, Model], **instead: Any
) -> Hyper:
    """Returns how `make_algorithm` follows from the numbers of `fields.arguments`."""

    def method(values: Mapping[str, Any]) -> Algorithm:
        found = config.copy_and_resolve_references()
        with found.unlocked(), found.ignore_type():
            for field, value in values.items():
                group, name = field.split(".")
                found[group][name] = value
        server_opt = factories.server_optimizer(found.server)
        alg = _put_together(found, model, server_opt, **instead)
        return _dressed(alg, found)

    return Hyper(fields.arguments(config), method)


def _put_together(
    config: ml_collections.ConfigDict,
    model: Model | dict[str, Model],
    server_opt: optax.GradientTransformation,
    **instead: Any,
) -> Algorithm:
    """The method of a config, whose numbers may be traced, before its uplink."""
    name = config.method.name
    factory = registry.find(name, "method.name")
    known = registry.options(name)
    options = {
        k: value
        for k, value in {**config.method, **instead}.items()
        if k != "name" and not (value is None and _must_be_given(known.get(k)))
    }
    for option in options:
        check_choice(f"option of method={name}", option, known)
    if "correction" in options:
        options["correction"] = factories.make_correction(options["correction"])
    trainers = 1 if config.data.pooled else population_size(config)[0]
    supplied: dict[str, Any] = dict(num_clients=trainers, num_rounds=config.rounds)
    if isinstance(model, dict):
        members = blocks(model, population_size(config)[0])
        supplied["family_sizes"] = {k: len(ids) for k, ids in members.items()}
    supplied["server_opt"] = server_opt
    takes = inspect.signature(factory).parameters
    options |= {k: value for k, value in supplied.items() if k in takes}
    loop = factories.make_local(config.local, config.rounds)
    return calls.call("method", factory, model, local=loop, **options)


def _must_be_given(option: registry.Option | None) -> bool:
    return option is not None and option.default is inspect.Parameter.empty
