"""Shows what the data of a config are, before anything is trained.

python -m experiments.data --config=zero_shot:data=digits
python -m experiments.data --config=zero_shot --config.data.name=mine.npz --out=looked

A table of what was read and how it is dealt out, who has how much of which class, and
some samples as clients see them. Nothing is written but with `--out`, a folder, which
then has partition.png, samples.png of images, and data.json, the table.
"""

import contextlib
import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from hyperjax.data import own, picture, shift
from hyperjax.data.arrays import is_tokens
from hyperjax.data.federation import Federation
from hyperjax.engine import checkpoint, log
from hyperjax.launch import build, cli, outputs
from hyperjax.protocols import common

WIDTH = 80
CLIENTS = 24  # rows of a picture in the terminal
SAMPLES = 5  # shown there
_LEVELS, _PLAIN = " ░▒▓█", " .:*#"  # of a terminal without Unicode


# What `train` says of it.
BRIEF = (
    *("data set", "read", "ids", "networks see", "classes"),
    *("participants", "unseen", "left out"),
)


def brief(federation: Federation, width: int = WIDTH) -> str:
    """Returns the table's main rows, cut at a line each."""
    rows = federation.facts()
    lines: list[str] = []
    for name in (name for name in BRIEF if name in rows):
        most = 2 if name == "left out" else 1
        lines += _row(name, rows[name], width, most)
    return "\n".join(lines)


def _row(name: str, words: str, width: int, most: int) -> list[str]:
    """A row of the table, in at most so many lines."""
    return textwrap.wrap(
        f"{name:14}{words}",
        width,
        subsequent_indent=" " * 14,
        max_lines=most,
        break_long_words=True,
        placeholder=" ...",
    )


# In a terminal -----------------------------------------------------------------------


def text(rows: dict[str, str], federation: Federation, width: int, levels: str) -> str:
    """Returns all that is shown, in lines of so many columns."""
    lines: list[str] = []
    for name, words in rows.items():
        lines += _row(name, words, width, 4)
    shown = [*lines, "", *_partition(federation, width, levels), ""]
    return "\n".join([*shown, *_samples(federation, width, levels)])


def _partition(federation: Federation, width: int, levels: str) -> list[str]:
    """Who has how much of which class: a row a client, a field a class."""
    counts, n = np.asarray(federation.counts), federation.num_clients
    num_clients, num_classes = counts.shape
    room = width - 24
    together = -(-num_classes // room)  # classes in a field
    cell = max(1, min(4, room * together // num_classes))
    padded = np.pad(counts, ((0, 0), (0, -num_classes % together)))
    merged = padded.reshape(num_clients, -1, together).sum(2)
    most = max(int(merged.max()), 1)
    what = "classes from left to right" + (f", {together} a field" * (together > 1))
    lines = textwrap.wrap(f"Clients and their {what}; darkest: {most:,} samples", width)
    novel = range(n, num_clients)
    few = max(CLIENTS - min(len(novel), CLIENTS // 3), 1)
    for name, ids in (("client", range(n)), ("unseen", novel)):
        limit = few if name == "client" else CLIENTS // 3
        for k in ids[:limit]:
            # Whatever there is shows; so the first level is of nothing alone.
            level = np.ceil(merged[k] / most * (len(levels) - 1)).astype(int)
            bar = "".join(levels[i] * cell for i in level)
            lines.append(f"{name} {k:<6}|{bar}|{counts[k].sum():>8,}")
        if len(ids) > limit:
            lines.append(f"{name} ... and {len(ids) - limit:,} more")
    return lines


def _samples(federation: Federation, width: int, levels: str) -> list[str]:
    """Some samples of the first clients: images, texts, or columns of a table."""
    pool, names = federation.pool, federation.label_names
    rows = [int(row[0]) for row in federation.train.rows[:SAMPLES]]
    x = np.asarray(pool.x[np.array(rows)])
    labels = [names[k] for k in np.asarray(pool.y)[rows]]
    if x.ndim == 4:
        side = (width - 2 * (SAMPLES - 1)) // SAMPLES
        tall = max(1, min(side // 2, x.shape[1]))
        wide = min(side, 2 * tall)
        low, high = float(x.min()), float(x.max())
        grey = (x.mean(-1, dtype=np.float64) - low) / max(high - low, 1e-12)
        grey = _averaged(_averaged(grey, tall, 1), wide, 2)
        level = np.rint(grey * (len(levels) - 1)).astype(int)
        heads = [f"client {k}: {c}"[:wide].ljust(wide) for k, c in enumerate(labels)]
        lines = ["  ".join(heads).rstrip()]
        for i in range(tall):
            parts = ("".join(levels[j] for j in image[i]) for image in level)
            lines.append("  ".join(parts).rstrip())
        return ["A sample of each of the first clients", *lines]
    if is_tokens(x):
        lines = ["A sample of each of the first clients, and its class"]
        for k, (tokens, label) in enumerate(zip(x, labels, strict=True)):
            said = _read(tokens.tolist())
            lines.append(f"client {k}: {said}"[: width - 12] + f" -> {label}")
        return lines
    every = np.asarray(pool.x)
    lines = [f"{'column':>8}{'least':>14}{'mean':>14}{'greatest':>14}"]
    for j in range(min(every.shape[1], 10)):
        column = every[:, j]
        numbers = (column.min(), column.mean(), column.max())
        lines.append(f"{j:>8}" + "".join(f"{v:>14.5g}" for v in numbers))
    if every.shape[1] > 10:
        lines.append(f"     ... and {every.shape[1] - 10:,} more")
    return lines


def _read(tokens: list[int]) -> str:
    """Tokens as the text whose bytes they are, or else as numbers."""
    with contextlib.suppress(ValueError):  # larger than a byte, or not of UTF-8
        text = bytes(tokens).rstrip(b"\0").decode()
        if text and text.replace("\n", " ").replace("\t", " ").isprintable():
            return repr(text)
    return str(tokens)


def _averaged(x: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Means over equal parts of an axis; where they are too few, values repeat."""
    length = x.shape[axis]
    starts = np.arange(size) * length // size
    if size > length:
        return x.take(starts, axis)
    found = np.add.reduceat(x, starts, axis)
    widths = np.diff(np.append(starts, length)).reshape((-1,) + (1,) * (2 - axis))
    return found / widths


# In files ----------------------------------------------------------------------------


def samples_picture(federation: Federation, clients: int = 8, each: int = 8) -> Any:
    """Returns a figure of images as clients see them: a row for each of some clients.

    Participants come first, and some of the rows are of unseen clients, if there are
    any.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    novel = federation.novel
    extra = min(federation.num_novel, clients // 3)
    ours = [(k, federation.train, k) for k in range(federation.num_clients)]
    rows = ours[: clients - extra]
    if novel is not None:
        rows += [(federation.num_clients + k, novel, k) for k in range(extra)]
    size = 0.8
    figure = Figure(figsize=(size * each + 1.1, size * len(rows)))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(rows), each, left=1.1 / (size * each + 1.1), right=1, top=1, bottom=0
    )
    x = np.asarray(federation.pool.x)
    low, high = (0, 255) if x.dtype == np.uint8 else (x.min(), x.max())
    for i, (number, table, place) in enumerate(rows):
        for j in range(min(each, int(table.size[place]))):
            axes = figure.add_subplot(grid[i, j])
            image = (x[table.rows[place, j]].astype(np.float64) - low) / max(
                high - low, 1e-12
            )
            grey = image.shape[-1] != 3
            axes.imshow(image.mean(-1) if grey else image, "gray", vmin=0, vmax=1)
            axes.axis("off")
        colour = picture.PARTICIPATING if table is federation.train else picture.NOVEL
        middle = 1 - (i + 0.5) / len(rows)
        word = "client" if table is federation.train else "unseen"
        figure.text(0.01, middle, f"{word} {number}", color=colour, va="center")
    return figure


def write(folder: Path, rows: dict[str, str], federation: Federation) -> list[Path]:
    """Writes the pictures and the table; returns their paths."""
    found = [folder / "partition.png"]
    takes_part = np.arange(len(federation.counts)) < federation.num_clients
    name = rows["data set"]
    title = Path(name).name if any(map(own.is_path, own.expand(name))) else name
    title, *names = (
        text.replace("$", r"\$") for text in (title, *federation.label_names)
    )
    changes = {} if federation.shift is None else shift.varying(federation.shift)
    figure = picture.partition_picture(
        federation.counts, takes_part, names, title, changes
    )
    picture.figure_png(figure, found[0])
    if federation.pool.x.ndim == 4:
        found.append(folder / "samples.png")
        picture.figure_png(samples_picture(federation), found[-1])
    found.append(folder / "data.json")
    content: dict[str, Any] = {**rows, "counts": federation.counts.tolist()}
    checkpoint.write_atomically(
        found[-1], json.dumps(log.jsonable(content), indent=2) + "\n"
    )
    return found


def main(config: ml_collections.ConfigDict, out: str | None) -> int:
    """Shows, and with `out` writes; returns the exit code."""
    config = common.filled(config)
    build.check(config)
    folder = None if out is None else outputs.folder("out", out)
    with cli.doing("data", f"reading {config.data.name}") as shown:
        source = build.load_source(config.data)
        shown.stage("dealing it out")
        federation = build.federate(source, config)
    rows = federation.facts()
    width = min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH)
    print(text(rows, federation, width, _levels()))
    if folder is not None:
        with outputs.room("out", folder) as room:
            print(
                "\nWritten: "
                + "\n         ".join(map(str, write(room, rows, federation)))
            )
    return 0


def _levels() -> str:
    """Shades that the terminal has."""
    try:
        _LEVELS.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return _PLAIN
    return _LEVELS


def launch() -> None:
    """Runs the command with what the command line says."""
    config = cli.define_config()
    out = cli.define_path("out", None, "Folder for pictures and the table.")
    cli.run(lambda: main(config.value, out.value), needs=("config",))
