"""Runs that differ in seeds, numbers and who has which samples, as one program.

All of those are arguments of a program, so the runs of a group are traced and compiled
once and then take turns. Index tables are padded to one width, which changes nothing:
a run has the same states in a group as alone, bit for bit.
"""

from collections.abc import Callable, Sequence

import ml_collections

from hyperjax.data import federation as federations
from hyperjax.data.federation import Federation
from hyperjax.launch import build, fields
from hyperjax.protocols import common
from hyperjax.runs.experiment import Experiment

# What decides who has which samples, but not of what shape anything else is.
_DEALT = (
    "partition",
    "seed",
    "test_fraction",
    "eval_fraction",
    "validation_fraction",
    "stratified",
    *{name for names in fields.PARTITIONS.values() for name in names},
)
FREE = ("seed", *(f"data.{name}" for name in _DEALT))
_TRAINED = ("trainers", "train", "novel_train")  # the rest is predicted


def key(config: ml_collections.ConfigDict) -> tuple[tuple[str, str], ...]:
    """Returns what runs of one program have in common: fields and their values."""
    free = {*FREE, *fields.arguments(config)}
    return tuple(
        sorted((k, repr(v)) for k, v in fields.flat(config).items() if k not in free)
    )


def builder(
    configs: Sequence[ml_collections.ConfigDict],
) -> Callable[..., Experiment]:
    """Returns `build.build` for configs with one key, with programs in common.

    The data set is read once and on the device once. What is built is compiled when the
    first of the runs is at work.

    Raises:
      ValueError and others: as `build.build`; or the keys differ.
    """
    configs = [common.filled(config) for config in configs]
    for config in configs:
        build.check(config)
    _check_alike(configs)
    names = [fields.flat(config) for config in configs]
    source = build.load_source(configs[0].data)
    dealt: list[Federation] = []
    for config in configs:
        one = build.federate(source, config)
        if dealt:
            shared = dict(x=dealt[0].pool.x, y=dealt[0].pool.y)
            one = one._replace(pool=one.pool._replace(**shared))
        dealt.append(one)
    first: list[Experiment] = []

    def build_one(
        config: ml_collections.ConfigDict, store_dir: str | None = None
    ) -> Experiment:
        build.warn_of_the_end(config)
        one = dealt[names.index(fields.flat(common.filled(config)))]
        found = build.assemble(
            config,
            one,
            store_dir,
            like=first[0] if first else None,
            widths=_widths(config, one, dealt),
        )
        first.append(found)
        return found

    return build_one


def experiments(configs: Sequence[ml_collections.ConfigDict]) -> list[Experiment]:
    """Builds the experiments of configs with one key, see `builder`."""
    build_one = builder(configs)
    return [build_one(config) for config in configs]


def _check_alike(configs: Sequence[ml_collections.ConfigDict]) -> None:
    """Refuses configs whose keys differ."""
    first = dict(key(configs[0]))
    for config in configs:
        other = dict(key(config))
        differ = sorted(
            k for k in first.keys() | other.keys() if first.get(k) != other.get(k)
        )
        if differ:
            raise ValueError(
                f"configs of a group differ in what a program is made of: "
                f"{', '.join(differ)}"
            )


def _widths(
    config: ml_collections.ConfigDict, one: Federation, dealt: Sequence[Federation]
) -> dict[str, int]:
    """How wide the tables of a federation are to be, by name.

    A batch has no more rows than there are columns. A table narrower than a batch stays
    as it is: other shapes of batches might round differently.
    """
    found: dict[str, int] = {}
    for name in (*federations.TABLES, "trainers"):
        tables = [getattr(other, name) for other in dealt]
        own = getattr(one, name)
        if own is None:
            continue
        batch = (config.local if name in _TRAINED else config.evaluation).batch_size
        if own.rows.shape[1] >= batch:
            found[name] = max(t.rows.shape[1] for t in tables if t is not None)
    return found
