"""One federation: a data set dealt out to participating and novel clients.

Of the source, a random `test_fraction` is the global test set; the rest is partitioned
once over N + M clients, so the last M, which never train, follow the same law as the
others but other draws of it. Inside each of the first N, `eval_fraction` is held out;
the last M keep all their samples for evaluation (arXiv:2508.12673, splits after the
authors' earlier harness). Theirs are split in the same way too, to measure what a
novel client gains by fine-tuning. Of what is left to train on, a participant may set
`validation_fraction` aside to choose a round by. There may be no test set, no
validation and no novel clients.

Where clients have samples in common ("bootstrap"), a random `eval_fraction` of all
samples is what any of them holds out, and nobody trains on these.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hyperjax import tree
from hyperjax.data import clients, files, own, sources
from hyperjax.data import partition as partitions
from hyperjax.data import shift as shifts
from hyperjax.data.arrays import check_known, described, is_tokens, vocabulary
from hyperjax.data.clients import Table
from hyperjax.data.ragged import Ragged, Rows
from hyperjax.data.shift import Shift
from hyperjax.data.sources import Source
from hyperjax.errors import check_at_least, check_choice, check_number
from hyperjax.types import Pool

TABLES = (
    "train",
    "held_out",
    "validation",
    "novel",
    "novel_train",
    "novel_held_out",
    "test",
)

# Tables are as wide as a multiple of this, so that federations of nearly equal sizes
# (other seeds of one experiment) find their programs in the compilation cache.
_WIDTH = 32

# A larger share of samples that belong to nobody is worth a warning.
_MANY_UNASSIGNED = 0.01


class Federation(NamedTuple):
    """The samples, and which of them is whose: ids 0..N-1 train, N..N+M-1 never do.

    The N participants are usually the clients that train, T = N. `pooled` puts one
    client in their place, T = 1, and leaves every other table as it is.
    """

    pool: Pool
    train: Table  # [N, ...]
    held_out: Table  # [N, ...], the participants' own evaluation split
    validation: Table | None  # [N, ...], set aside to choose a round by
    novel: Table | None  # [M, ...], all samples of the novel clients; None if M = 0
    novel_train: Table | None  # [M, ...], `novel` split like the participants' samples
    novel_held_out: Table | None  # [M, ...]
    test: Table | None  # [1, ...]
    trainers: Table  # [T, ...], what each client that trains trains on
    counts: np.ndarray  # [N + M, K] samples per client and class
    label_names: tuple[str, ...]
    unassigned: int = 0  # samples that the partition left to nobody
    shift: np.ndarray | None = None  # [N + M, S] what images went through, see `shift`
    signed: bool = False  # whether inputs have `standardise="signed"`
    origin: tuple[tuple[str, str], ...] = ()  # see `facts`

    def __repr__(self) -> str:
        what = f"{described(self.pool.x)}, {self.num_classes} classes"
        return f"Federation({self.who}, {what})"

    def facts(self) -> dict[str, str]:
        """Returns what was read, who has it and what is left out, in words by name.

        The rows of the table that `hyperjax data` prints.
        """
        found = dict(self.origin)
        last = {k: found.pop(k) for k in ("left out", "scaled by") if k in found}
        tables: dict[str, tuple[Table | None, str]] = {
            "participants": (self.train, "to train on"),
            "held out": (self.held_out, "by each of them"),
            "validation": (self.validation, "by each of them"),
            "unseen": (self.novel, "in all"),
        }
        for name, (table, of) in tables.items():
            if table is not None:
                size = np.asarray(table.size)
                who = (
                    f"{len(size):,} with " if name in ("participants", "unseen") else ""
                )
                words = f"{who}{spread(size)} samples {of}, {size.sum():,} together"
                found[name] = words
        test = self.test
        found["global test"] = f"{int(test.size.sum()):,} samples" if test else "none"
        return found | last

    @property
    def who(self) -> str:
        """How many there are, for people: "20 clients + 5 unseen"."""
        novel = f" + {self.num_novel} unseen" if self.num_novel else ""
        return f"{self.num_clients} clients{novel}"

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.label_names)

    @property
    def vocabulary(self) -> int:
        """How many different tokens samples are made of; 0 of others."""
        return vocabulary(self.pool.x)

    @property
    def num_clients(self) -> int:
        """N."""
        return len(self.train.size)

    @property
    def num_novel(self) -> int:
        """M."""
        return 0 if self.novel is None else len(self.novel.size)

    @property
    def num_trainers(self) -> int:
        """T."""
        return len(self.trainers.size)

    @property
    def trainer_ids(self) -> np.ndarray:
        """Whose trained state each participant deploys, [N] int32."""
        return np.arange(self.num_clients, dtype=np.int32) % self.num_trainers

    def pooled(self) -> "Federation":
        """Returns the federation of centralised training.

        One client, number 0, trains on the training samples of all participants; each
        participant deploys its state and is still evaluated on its own samples.
        """
        everything = clients.table([_parts(self.train).flat], _WIDTH)
        return self._replace(trainers=everything)

    def widened(self, widths: Mapping[str, int]) -> "Federation":
        """Returns the same federation with tables of at least so many columns, by name.

        Nothing is added but padding.
        """

        def widen(table: Table, width: int) -> Table:
            if isinstance(table.rows, Rows):
                return Table(table.rows.widened(width), table.size)
            missing = max(0, width - table.rows.shape[1])
            return Table(np.pad(table.rows, ((0, 0), (0, missing))), table.size)

        tables: dict[str, Any] = {name: getattr(self, name) for name in widths}
        tables = {k: t and widen(t, widths[k]) for k, t in tables.items()}
        return self._replace(**tables)

    def of_novel(self) -> "Federation":
        """Returns the federation of the novel clients, who now take part.

        Client 0 is the first novel one, and so on. Pixels are normalised as before;
        there are no further novel clients, and no samples for validation.

        Raises:
          ValueError: there are no novel clients.
        """
        if self.novel_train is None or self.novel_held_out is None:
            raise ValueError(
                "there are no unseen clients that could join: num_novel is 0"
            )
        return self._replace(
            train=self.novel_train,
            held_out=self.novel_held_out,
            validation=None,
            novel=None,
            novel_train=None,
            novel_held_out=None,
            trainers=self.novel_train,
            counts=self.counts[self.num_clients :],
            shift=None if self.shift is None else self.shift[self.num_clients :],
        )

    @property
    def source_prior(self) -> np.ndarray:
        """Class shares over all participants' training samples, [K]."""
        labels = np.asarray(self.pool.y)
        counts = np.zeros(self.num_classes, np.int64)
        for piece in _parts(self.train).pieces():
            counts += np.bincount(labels[piece.flat], minlength=self.num_classes)
        return counts / counts.sum()


def federate(
    source: Any,
    y: Any = None,
    *,
    num_clients: int | None = None,
    num_novel: int = 0,
    partition: str | None = None,
    seed: int = 0,
    test_fraction: float = 0.2,
    eval_fraction: float = 0.2,
    validation_fraction: float = 0.0,
    stratified: bool = False,
    client_ids: np.ndarray | None = None,
    shift: str | Shift = "none",
    after_shift: Callable[[Source], Source] = lambda source: source,
    standardise: str = "pool",
    kind: str = "",
    pool: str = "device",
    **options: Any,
) -> Federation:
    """Deals a data set out; warns if much of it becomes nobody's.

    Args:
      source: all samples, a `Source`; or samples alone, with labels in `y`; or what is
        already divided, {client: (x, y)} or {client: ((x, y), (x_test, y_test))}, see
        `own.from_clients`.
      y: [n] labels: integers, or names; see `sources.from_arrays`.
      num_clients: N; None: all whom the source names.
      num_novel: M; 0 for none.
      partition: a key of `data.partition.PARTITIONERS`. By default "by_client_id" for
        what is already divided, or has ids, and "iid" for others.
      seed: of the splits and the partition; independent of the model's seed.
      test_fraction: share of the global test set, in [0, 1); 0 for none. A source's
        own test part takes its place.
      eval_fraction: share each client holds out, in (0, 1). By "by_client_id" it is the
        client's own test part where clients have one; then there is no global one. By
        "bootstrap" that share of all samples is for clients to hold out.
      validation_fraction: share of the rest that participants set aside to choose a
        round by, in [0, 1); 0 for none.
      stratified: whether a client holds out the same share of each of its classes. Of
        a class with n_k of the client's n samples, h of which are held out, that is
        h n_k / n rounded down; the samples missing to h are of the classes that lost
        most, ties by label. Otherwise samples are held out at random. Likewise for
        validation.
      client_ids: [n] given ids, integers or names, for "by_client_id" alone; by default
        the source's.
      shift: how clients' images differ: a kind of `data.shift.KINDS`, or what
        `data.shift.shift` returns. The global test set stays as it is.
      after_shift: what is then done to all images, such as to average their pixels.
      standardise: inputs by the moments of all participants' training pixels ("pool"),
        by each client's own ("client"), by these with a sign, so that negatives are
        like positives ("signed", of images), or as they are ("none", bytes in [0, 1]).
        Columns of features are scaled each by its own; tokens are left as they are.
      kind: of samples [n, d]: "features", "tokens" or "images", see
        `sources.from_arrays`.
      pool: where samples are kept, "device" or "host", see `clients.make_pool`.
      **options: of the partitioner.

    Raises:
      ValueError: arrays that are no labelled samples, a size or fraction out of range,
        more clients than samples, or a client with fewer than two samples.
    """
    if y is not None:
        source = sources.from_arrays(source, y, kind=kind)
    elif isinstance(source, Source):
        check_choice(f"kind of {source!r}", kind, ("",))
    if isinstance(source, Mapping):
        source = own.from_clients(source, kind=kind)
    source = sources.checked(source)
    check_known(client_ids, source.test)
    known = client_ids is not None or source.client_ids is not None
    partition = partition or ("by_client_id" if known else "iid")
    if client_ids is None and partition == "by_client_id":
        client_ids = source.client_ids
    check_at_least(0, num_novel=num_novel, seed=seed)
    check_choice("standardise", standardise, clients.STANDARDISE)
    shift = shifts.shift(shift) if isinstance(shift, str) else shift
    _check_possible(source, shift.kind, standardise)
    if partition in partitions.SHARED:
        _check_shared(
            partition,
            num_novel=num_novel,
            validation_fraction=validation_fraction,
            stratified=stratified,
            shift=shift.kind,
            standardise=standardise,
        )
    check_number(
        test_fraction=test_fraction,
        eval_fraction=eval_fraction,
        validation_fraction=validation_fraction,
    )
    if not 0 <= test_fraction < 1:
        raise ValueError(
            f"test_fraction={test_fraction} must lie between 0 and 1, 1 exclusive; 0 "
            "means no test set"
        )
    if not 0 < eval_fraction < 1:
        raise ValueError(
            f"eval_fraction={eval_fraction} must lie between 0 and 1, exclusive"
        )
    if not 0 <= validation_fraction < 1:
        raise ValueError(
            f"validation_fraction={validation_fraction} must lie between 0 and 1, 1 "
            "exclusive; 0 means no validation samples"
        )
    rng = np.random.default_rng(seed)
    total, seen, plain = len(source.y), source.x.shape[1:], options
    order = rng.permutation(total)
    num_test = max(1, round(test_fraction * total)) if test_fraction else 0
    test, rest = order[:num_test], order[num_test:]
    ids = None if client_ids is None else partitions.check_ids(client_ids, total)
    marked = source.test
    origin = _read(source, ids)
    if marked is not None:
        # Of clients who train, or of others.
        theirs = ids is not None and np.isin(ids[marked], ids[~marked]).any()
        marked = marked if theirs else None
        test = order[:0] if theirs else order[source.test[order]]
        rest = order if theirs else order[~source.test[order]]
    if ids is not None:
        options = {**options, "client_ids": ids[rest]}
    if partition in partitions.SHARED:
        marked = np.zeros(total, bool)
        for k in np.unique(source.y[rest]):  # clients need both of every class
            mine = rest[source.y[rest] == k]
            marked[mine[: max(1, round(eval_fraction * len(mine)))]] = True
        options = {**options, "apart": marked[rest]}
    if num_clients is None:
        num_clients = _everybody(options.get("client_ids"), num_novel)
    check_at_least(1, num_clients=num_clients)
    everyone = num_clients + num_novel
    labels = source.y[rest]
    if everyone > len(labels) and partition not in partitions.SHARED:
        raise ValueError(
            f"num_clients={num_clients} and num_novel={num_novel} must not be more "
            f"than the {len(labels)} samples for them; partition='bootstrap' deals a "
            "sample to several clients"
        )
    places = partitions.partition(partition, rng, labels, everyone, **options)
    number = np.int32 if total < 2**31 else np.int64
    parts = Ragged.of(places).map(lambda place: rest[place], number)
    del places  # of a million clients it is large
    for client in np.flatnonzero(parts.size < 2)[:1]:
        raise ValueError(
            f"client {client} has {len(parts[client])} sample(s); a client needs one "
            "to train and one to hold out: lower num_clients or num_novel, or raise "
            "min_size"
        )

    drawn = None
    if shift.kind != "none":
        drawn = shift.draw(seed, num_clients, num_novel)
        named = shifts.relabelled(source.y, parts, drawn, seed, source.num_classes)
        source = source._replace(y=named)
    counts = partitions.class_counts(source.y, parts, source.num_classes)
    dealt = np.zeros(total, bool)
    for piece in parts.pieces():
        dealt[piece.flat] = True
    unassigned = len(rest) - int(dealt.sum())
    nobodys = _nobodys(source, labels, counts, options.get("client_ids"), everyone)
    asked = options.get("samples_per_client")  # whoever caps it knows
    if unassigned > _MANY_UNASSIGNED * len(rest) and not asked:
        from absl import logging

        logging.warning(
            "%s of the %s samples of %r that partition=%r could deal out (%.1f %%) "
            "belong to no client%s.",
            *(f"{unassigned:,}", f"{len(rest):,}", source.name, partition),
            *(100 * unassigned / len(rest), "".join(f"; {part}" for part in nobodys)),
        )

    def set_apart(parts, fraction):
        return _set_apart(parts, source.y if stratified else None, fraction)

    if marked is None:
        train, held_out = set_apart(parts, eval_fraction)
    else:
        train, held_out = _own_parts(parts, marked)
    mine, others = slice(num_clients), slice(num_clients, None)
    validation, trained_on = None, train[mine]
    if validation_fraction:
        for client in np.flatnonzero(trained_on.size < 2)[:1]:
            raise ValueError(
                f"client {client} is left with one sample to train on, and none for"
                f" validation_fraction={validation_fraction}"
            )
        trained_on, apart = set_apart(trained_on, validation_fraction)
        validation = clients.table(apart, _WIDTH)
    own_train = clients.table(trained_on, _WIDTH)
    if drawn is not None:
        shown = shifts.apply(source.x, parts, drawn, seed, source.y, source.num_classes)
        source = after_shift(source._replace(x=shown))
    samples = clients.make_pool(
        source.x,
        source.y,
        trained_on.flat,
        standardise=standardise,
        owners=parts,
        shift=drawn,
        on=pool,
    )
    if source.x.shape[1:] != seen:
        origin["networks see"] = f"{described(source.x)}, {spread(source.x)}"
    given = [f"{k}={v}" for k, v in plain.items() if v is not None]
    origin["partition"] = ", ".join([partition, *given, f"seed {seed}"])
    origin["shift"] = shift.kind
    if drawn is not None:
        each = shifts.varying(drawn).items()
        origin["shift"] += "".join(f", {name} {spread(v)}" for name, v in each)
    lost = [f"{unassigned:,} of {len(rest):,} samples"] if unassigned else []
    origin["left out"] = "; ".join([*lost, *nobodys]) or "nothing"
    origin["scaled by"] = {
        "pool": "moments of all participants' training samples",
        "client": "moments of each client's own samples",
        "signed": "moments of each client's own samples, negatives like positives",
        "none": "nothing",
    }["none" if is_tokens(source.x) else standardise]
    return Federation(
        pool=samples,
        train=own_train,
        held_out=clients.table(held_out[mine], _WIDTH),
        validation=validation,
        novel=clients.table(parts[others], _WIDTH) if num_novel else None,
        novel_train=clients.table(train[others], _WIDTH) if num_novel else None,
        novel_held_out=clients.table(held_out[others], _WIDTH) if num_novel else None,
        test=clients.table([test], _WIDTH) if len(test) else None,
        trainers=own_train,
        counts=counts,
        label_names=source.label_names,
        unassigned=unassigned,
        shift=drawn,
        signed=standardise == "signed",
        origin=tuple(origin.items()),
    )


def spread(values: Any) -> str:
    """Returns least and greatest, "1 to 5", or the one number that all are."""
    low, high = np.asarray(values).min(), np.asarray(values).max()
    first, last = (
        f"{v:,}" if isinstance(v, np.integer) else f"{v:.4g}" for v in (low, high)
    )
    return first if low == high else f"{first} to {last}"


# Samples of more bytes are not gone through for their least and greatest value, which
# would read a file that is mapped to memory twice before anything else happens.
_RANGED = 2**29


def _read(source: Source, ids: np.ndarray | None) -> dict[str, str]:
    """What was read, in words by name; with whose it is, if that is looked at."""
    per_class = np.bincount(source.y, minlength=source.num_classes)
    ranged = f", {spread(source.x)}" if source.x.nbytes <= _RANGED else ""
    found = {
        "data set": source.name,
        "read": f"{described(source.x)}, {source.x.dtype}{ranged}",
        "classes": f"{source.num_classes}: {', '.join(source.label_names)}",
        "of a class": f"{spread(per_class)} samples",
    }
    if source.test is not None:
        found["test part"] = f"{int(source.test.sum()):,} samples, the set's own"
    known = source.client_ids if ids is None else ids
    if known is not None:
        each, sizes = np.unique(known, return_counts=True)
        found["ids"] = f"{len(each):,} whose samples are {spread(sizes)} each" + (
            "; the partition does not look at them" if ids is None else ""
        )
    return found


def _check_possible(source: Source, shift: str, standardise: str) -> None:
    """Refuses what has no meaning for samples that are no images."""
    if not set(shifts.KINDS[shift]) <= set(shifts.BY_CLASS) and source.x.ndim != 4:
        raise ValueError(
            f"shift={shift!r} is done to images; {source.name!r} has "
            f"{described(source.x)}; accepted: none, label_swap"
        )
    if standardise in ("client", "signed") and is_tokens(source.x):
        raise ValueError(
            f"standardise={standardise!r}: {source.name!r} has {described(source.x)}, "
            "which have no moments; accepted: pool, none (tokens are left as they are)"
        )
    if standardise == "signed" and source.x.ndim != 4:
        raise ValueError(
            f"standardise='signed' is of images and their negatives; {source.name!r} "
            f"has {described(source.x)}; accepted: pool, client, none"
        )


# What has a meaning where clients have samples in common: nobody is unseen, and a
# sample has no owner.
_OF_SHARED: dict[str, tuple[Any, ...]] = {
    "num_novel": (0,),
    "validation_fraction": (0,),
    "stratified": (False,),
    "shift": ("none",),
    "standardise": ("pool", "none"),
}


def _check_shared(partition: str, **given: Any) -> None:
    """Refuses the rest of it."""
    for name, value in given.items():
        if value not in _OF_SHARED[name]:
            raise ValueError(
                f"{name}={value!r} does not go with partition={partition!r}, whose "
                "clients have samples in common; accepted: "
                + " or ".join(map(repr, _OF_SHARED[name]))
            )


def _everybody(client_ids: np.ndarray | None, num_novel: int) -> int:
    """How many take part if nobody says so."""
    if client_ids is None:
        raise ValueError("num_clients is needed: the samples are not divided yet")
    return len(np.unique(client_ids)) - num_novel


def _own_parts(parts: Ragged, marked: np.ndarray) -> tuple[Ragged, Ragged]:
    """What clients train on and hold out, where the set itself says so."""
    apart = parts.map(lambda rows: marked[rows], bool).flat
    train, held_out = parts.where(~apart), parts.where(apart)
    fewest = np.minimum(train.size, held_out.size)
    for client in np.flatnonzero(fewest == 0)[:1]:
        raise ValueError(
            f"client {client} has {train.size[client]} samples to train on and "
            f"{held_out.size[client]} in its test part, where others have both"
        )
    return train, held_out


def save_tables(federation: Federation, path: str | Path) -> None:
    """Writes index tables, class counts, shifts and pixel moments to an .npz file.

    Tables that the federation does not have are left out; the file is never half
    written.
    """
    tables: dict[str, Any] = {}
    for name in TABLES:
        table = getattr(federation, name)
        if table is not None:
            tables |= {f"{name}_rows": table.rows, f"{name}_size": table.size}
    if federation.shift is not None:
        tables["shift"] = federation.shift
        tables["shift_names"] = np.array(list(shifts.PARAMETERS))
    participating = np.arange(len(federation.counts)) < federation.num_clients
    files.write_npz(
        path,
        counts=federation.counts,
        participating=participating,
        num_trainers=federation.num_trainers,
        label_names=np.array(federation.label_names),
        unassigned=federation.unassigned,
        sample_shape=np.array(federation.pool.x.shape[1:]),
        sample_dtype=np.array(np.dtype(federation.pool.x.dtype).name),
        vocabulary=federation.vocabulary,
        mean=np.asarray(federation.pool.mean),
        std=np.asarray(federation.pool.std),
        source_prior=federation.source_prior,
        **tables,
    )


def _nobodys(
    source: Source,
    y: np.ndarray,
    counts: np.ndarray,
    client_ids: np.ndarray | None,
    num_clients: int,
) -> list[str]:
    """Says what else than samples, whose labels are `y`, no client has any of."""
    dealt, there = counts.sum(axis=0), np.bincount(y, minlength=source.num_classes)
    unused = [source.label_names[k] for k in np.flatnonzero((dealt == 0) & (there > 0))]
    found = []
    if client_ids is not None:
        distinct = len(np.unique(client_ids))
        if distinct > num_clients:
            left = distinct - num_clients
            found.append(f"{left} of {distinct} client_ids are not drawn")
    if unused:
        shown = ", ".join(unused[:5]) + ", ..." * (len(unused) > 5)
        found.append(f"no client has any of {len(unused)} classes ({shown})")
    return found


def digests(federation: Federation) -> dict[str, str]:
    """Returns the SHA-256 of the pixels, of the labels, and of who has which sample."""
    tables = {name: getattr(federation, name) for name in (*TABLES, "trainers")}
    parts = dict(pixels=federation.pool.x, labels=federation.pool.y, partition=tables)
    return {name: tree.sha256(part) for name, part in parts.items()}


def _parts(table: Table) -> Ragged:
    """The numbers in a table, without its padding."""
    if isinstance(table.rows, Rows):
        return table.rows.parts
    there = np.arange(table.rows.shape[1]) < table.size[:, None]
    return Ragged.sized(table.rows[there], table.size)


def _set_apart(
    parts: Ragged, y: np.ndarray | None, fraction: float
) -> tuple[Ragged, Ragged]:
    """Returns the training and the held-out samples of clients, 1 of each at least.

    Parts are in random order, so their first samples are random ones; with labels `y`
    of all samples, the first of each class are held out.
    """
    size = parts.size
    num = np.minimum(np.maximum(1, np.rint(fraction * size)), size - 1).astype(int)
    if y is None:
        place = np.arange(len(parts.flat)) - np.repeat(parts.ends[:-1], size)
        held_out = place < np.repeat(num, size)
    else:
        each = (_of_each_class(y[part], n) for part, n in zip(parts, num, strict=True))
        held_out = np.concatenate(list(each))
    return parts.where(~held_out), parts.where(held_out)


def _of_each_class(y: np.ndarray, num: int) -> np.ndarray:
    """Which `num` of a client's samples are held out, its shares of classes kept."""
    held_out, n = np.zeros(len(y), bool), len(y)
    position, sizes = np.unique(y, return_inverse=True, return_counts=True)[1:]
    quota, lost = np.divmod(num * sizes, n)
    missing = num - quota.sum()
    quota[np.argsort(-lost, kind="stable")[:missing]] += 1
    for k, number in enumerate(quota):
        places = np.flatnonzero(position == k)
        held_out[places] = np.arange(len(places)) < number
    return held_out
