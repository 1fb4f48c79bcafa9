"""Runs that differ in seeds, numbers and who has which samples, as one program.

All of those are arguments of a program, so the runs of a group are traced and compiled
once and then take turns. Index tables are padded to one width, which changes nothing:
a run has the same states in a group as alone, bit for bit.
"""

from collections.abc import Callable, Sequence

import ml_collections

from hyperjax.data import federation as federations
from hyperjax.data import sources
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
# Of the data, what `build.make_algorithm` goes by.
_POPULATION = {
    f"data.{name}" for name in ("num_clients", "num_novel", "newcomers", "pooled")
}
_TRAINED = ("trainers", "train", "novel_train")  # the rest is predicted
# What `build.load_source` goes by.
_READ = (
    *("name", "data_dir", "download", "split", "test_split", "shrink", "resize"),
    *("image_key", "label_key", "client_key", "kind"),
)


class Reader:
    """Reads the data sets of runs; neighbours that have one data set read it once.

    At most twice: images that will be shifted are not brought to size yet.
    """

    def __init__(self) -> None:
        self._asked: object = None
        self._forms: dict[bool, sources.Source] = {}

    def __call__(self, data: ml_collections.ConfigDict) -> sources.Source:
        """Returns what `build.load_source` does."""
        shifted = data.shift != "none"
        asked = tuple(data[name] for name in _READ)
        if self._asked != asked:
            self._forms.clear()  # before another is in memory
            self._asked = asked
        if shifted not in self._forms:
            self._forms[shifted] = build.load_source(data)
        return self._forms[shifted]


def key(config: ml_collections.ConfigDict) -> tuple[tuple[str, str], ...]:
    """Returns what runs of one program have in common: fields and their values."""
    return _without(config, {*FREE, *fields.arguments(config)})


def setting(config: ml_collections.ConfigDict) -> tuple[tuple[str, str], ...]:
    """Returns a config's fields and values but for who has which samples, and seeds."""
    return _without(config, set(FREE))


def built_of(config: ml_collections.ConfigDict) -> tuple[tuple[str, str], ...]:
    """Returns what network and method are built of, beside samples' shape and classes.

    Of the data that is how many clients there are.
    """
    data = {f"data.{name}" for name in config.data} - _POPULATION
    return _without(config, {*FREE, *data})


def _without(
    config: ml_collections.ConfigDict, free: set[str]
) -> tuple[tuple[str, str], ...]:
    """Returns a config's other fields, and their values as text."""
    return tuple(
        sorted((k, repr(v)) for k, v in common.flat(config).items() if k not in free)
    )


def experiments(
    configs: Sequence[ml_collections.ConfigDict],
    one_device: bool = False,
    read: Callable[[ml_collections.ConfigDict], sources.Source] | None = None,
) -> list[Experiment]:
    """Builds the experiments of configs with one key, with programs in common.

    What is read of the data is read once, and is on the device once; of shifted images
    every federation has its own. With `one_device` clients are all on one, whatever
    `engine.devices` is. `read` is `build.load_source` by default, or a `Reader`.

    Raises:
      ValueError and others: as `build.build`; or the keys differ.
    """
    configs = [common.filled(config) for config in configs]
    _check_alike(configs)
    for config in configs:
        if one_device:
            config.engine.devices = 1
        build.check(config)
        build.warn_of_the_end(config)
    source = (read or build.load_source)(configs[0].data)
    dealt: list[Federation] = []
    for config in configs:
        one = build.federate(source, config)
        if dealt and one.shift is None:  # or else clients' pixels are their own
            shared = dict(x=dealt[0].pool.x, y=dealt[0].pool.y)
            one = one._replace(pool=one.pool._replace(**shared))
        dealt.append(one)
    found: list[Experiment] = []
    for config, one in zip(configs, dealt, strict=True):
        # With the same numbers the method is the same too.
        numbers = fields.arguments(config)
        alike = (e for e in found if e.hyper and e.hyper.values == numbers)
        like = next(alike, found[0] if found else None)
        widths = _widths(config, one, dealt)
        found.append(build.assemble(config, one, like=like, widths=widths))
    return found


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
