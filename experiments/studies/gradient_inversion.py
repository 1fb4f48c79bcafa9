"""Gradient inversion of FedAvg, HyperFedNet and HyperFL, under three attackers.

python -m experiments.studies.gradient_inversion --workdir=runs/inversion \
    [--data=mnist5k] [--images=50] [--embedding_size=64] [--methods=hyperfl]

HyperFedNet's figure 6 (arXiv:2402.18445) with the network of the published attacks, its
parameters fresh draws, one image at a time. FedAvg sends the gradient of the whole
network. HyperFedNet sends that of its generator, which makes the two 12x12x5x5 kernels
from one tile each (with the variance of the plain ones); the rest stays home. HyperFL
sends that of a hypernetwork which makes all three (of that variance too); embedding and
last layer stay home. What papers' attackers know of the rest is not said, so there are
three:

  blind      private parameters are unknown; a random draw takes their place;
  joint      they are looked for together with the image, from a random draw;
  white box  they are known: what the generator's gradient gives away by itself.

The label is looked for as a soft one (DLG), read off the last layer's gradient (iDLG,
FedAvg only), or known. Every attack starts from several random images and keeps the
guess with the least mismatch, which is all that an attacker sees. The folder gets the
record, `gradient_inversion.json`, and a picture; a study that was stopped continues.
"""

import datetime
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.studies.study import cpu
from hyperjax import attacks, models, rng
from hyperjax.algorithms import hyperfl
from hyperjax.data import picture, sources
from hyperjax.engine import log
from hyperjax.engine.checkpoint import read_npz, write_atomically
from hyperjax.engine.progress import Progress
from hyperjax.errors import check_at_least, check_choice
from hyperjax.hypernets import hypernetworked, tiles
from hyperjax.launch import cli, origin, outputs
from hyperjax.launch.pages import text_table
from hyperjax.types import Array, Key, Model, PyTree

RECOVERED = 25.0  # dB
TILE, SIZE = 12, 5
PLAIN_VARIANCE = 1.0 / 12.0  # of what is uniform on [-0.5, 0.5]
CHUNK = 10  # images between two lines of progress
GENERATOR = r"hyper/.*"
RATE = 0.1  # of the victim's steps, if there are several


class Attack(NamedTuple):
    """Whom it is on, what the attacker knows, and how the label is found."""

    method: str
    knows: str
    label: str


ATTACKS = {
    "FedAvg, DLG": Attack("fedavg", "all", "soft"),
    "FedAvg, iDLG": Attack("fedavg", "all", "inferred"),
    "HFN, blind": Attack("hyperfednet", "nothing", "soft"),
    "HFN, blind, label known": Attack("hyperfednet", "nothing", "known"),
    "HFN, joint": Attack("hyperfednet", "looks", "soft"),
    "HFN, joint, label known": Attack("hyperfednet", "looks", "known"),
    "HFN, white box": Attack("hyperfednet", "all", "soft"),
    "HFN, white box, label known": Attack("hyperfednet", "all", "known"),
    "HyperFL, blind": Attack("hyperfl", "nothing", "soft"),
    "HyperFL, blind, label known": Attack("hyperfl", "nothing", "known"),
    "HyperFL, joint": Attack("hyperfl", "looks", "soft"),
    "HyperFL, joint, label known": Attack("hyperfl", "looks", "known"),
    "HyperFL, white box": Attack("hyperfl", "all", "soft"),
    "HyperFL, white box, label known": Attack("hyperfl", "all", "known"),
}
# Of a network's parameters those that a method sends.
SENT = {"fedavg": r".*", "hyperfednet": GENERATOR, "hyperfl": hyperfl.SHARED}


class Scale(NamedTuple):
    """How much is done, see `WORDS`."""

    images: int = 50
    steps: int = 300
    restarts: int = 2
    embedding_size: int = 64
    local_steps: int = 1
    seed: int = 0


WORDS = {
    "images": "Images that are attacked.",
    "steps": "Iterations of an attack.",
    "restarts": "Random starts of an attack.",
    "embedding_size": "Of HyperFedNet.",
    "local_steps": "Steps of the client; an attacker takes them for one.",
    "seed": "Of images, networks and guesses.",
}


def network(method: str, shape: tuple[int, ...], num_classes: int, n: int) -> Model:
    """Returns the attacked network for images [H, W, c]; `n` numbers an embedding."""
    # Second derivatives of one image: the plain rule is the fastest.
    module = models.AttackLeNet(num_classes, conv_rule="xla")
    plain = models.from_linen(module, shape, num_classes)
    if method == "fedavg":
        return plain
    if method == "hyperfl":
        return _with_usual_variance(hyperfl.generated(plain))
    template = jax.eval_shape(plain.init, jax.random.key(0))["params"]
    net = tiles.tile_net(template, embedding_size=n, tile=TILE, size=SIZE)
    usual = 2.0 / (SIZE * SIZE * TILE)

    def init_embeddings(key: Key) -> PyTree:
        # Kernels are linear in embeddings at first.
        factor = (PLAIN_VARIANCE / usual) ** 0.5
        return jax.tree.map(lambda v: factor * v, net.init_embeddings(key))

    wide = net._replace(init_embeddings=init_embeddings)
    return hypernetworked.hypernetworked(plain, wide)


def _with_usual_variance(model: Model) -> Model:
    """HyperFL's, whose hypernetwork makes parameters that vary as the plain ones do."""

    def init(key: Key) -> PyTree:
        variables = model.init(key)
        made = dict(model.serve.export(variables)["params"])
        del made["head"]
        numbers = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(made)])
        factor = jnp.sqrt(PLAIN_VARIANCE / jnp.var(numbers))
        params = variables["params"]
        # The numbers are linear in the parameters of these heads.
        heads = jax.tree.map(lambda x: factor * x, params["hypernetwork"]["heads"])
        phi = {**params["hypernetwork"], "heads": heads}
        return {**variables, "params": {**params, "hypernetwork": phi}}

    return model._replace(init=init)


def attacker(
    attack: Attack, shape: tuple[int, ...], num_classes: int, scale: Scale
) -> Callable:
    """Returns `(key, x [H, W, c], y []) -> (x found, PSNR, mismatch, label is right)`.

    All but the first are []; `key` draws the network and the guesses.
    """
    model = network(attack.method, shape, num_classes, scale.embedding_size)
    victim = attacks.victim(model, SENT[attack.method])

    def update(shared: PyTree, private: PyTree, x: Array, target: Array) -> PyTree:
        """What the server makes of the victim's message: its mean gradient."""
        if scale.local_steps == 1:
            return victim.gradient(shared, private, x, target)
        after = shared, private
        for _ in range(scale.local_steps):
            after = victim.step(*after, x, target, RATE)
        factor = 1.0 / (RATE * scale.local_steps)
        return jax.tree.map(lambda a, b: factor * (a - b), shared, after[0])

    def run(key: Key, x: Array, y: Array):
        shared, private = victim.split(model.init(rng.stream(key, "network"))["params"])
        observed = update(shared, private, x, jax.nn.one_hot(y, num_classes))
        label = attacks.label_of(observed["head/kernel"]) if not private else y

        def restart(i):
            key_draw, key_start = jax.random.split(jax.random.fold_in(key, i))
            drawn = victim.split(model.init(key_draw)["params"])[1]

            def mismatch(guess: attacks.Guess) -> Array:
                known = jax.nn.one_hot(label, num_classes)
                target = known if guess.label is None else jax.nn.softmax(guess.label)
                theirs = drawn if attack.knows == "nothing" else private
                theirs = theirs if guess.private is None else guess.private
                ours = victim.gradient(shared, theirs, guess.x, target)
                return attacks.distance(ours, observed)

            like = attacks.Guess(
                x,
                jnp.zeros(num_classes) if attack.label == "soft" else None,
                drawn if attack.knows == "looks" else None,
            )
            start = attacks.first_guess(key_start, like)
            return attacks.invert(mismatch, start, steps=scale.steps)

        every = jax.lax.map(restart, jnp.arange(scale.restarts))
        best = jax.tree.map(lambda leaf: leaf[jnp.argmin(every.mismatch)], every)
        guess = best.guess
        named = label if guess.label is None else jnp.argmax(guess.label)
        return guess.x, attacks.psnr(x, guess.x), best.mismatch, named == y

    return run


def inverted(
    label: str, source: sources.Source, scale: Scale, folder: Path
) -> dict[str, np.ndarray]:
    """Runs one attack on every image, or reads what it found with the same scale."""
    name = "_".join(map(str, (label, source.name, *scale)))
    path = folder / f"{re.sub('[^a-z0-9]+', '_', name.lower())}.npz"
    if path.exists():
        return read_npz(path, "remove it: the same command writes it anew")
    order = np.random.default_rng(scale.seed).permutation(len(source.y))
    rows = order[: scale.images]
    x = jnp.asarray(source.x[rows], jnp.float32) / 255.0
    y = jnp.asarray(source.y[rows], jnp.int32)
    run = attacker(ATTACKS[label], source.x.shape[1:], source.num_classes, scale)
    every = jax.jit(lambda *columns: jax.lax.map(lambda one: run(*one), columns))
    # Images draw keys of their own: the first ten are the same among fifty.
    keys = rng.client_keys(jax.random.key(scale.seed), jnp.arange(scale.images))
    parts = []
    with Progress(label, scale.images, unit="image") as progress:
        progress.stage("compiling the attack, and attacking the first images")
        for first in range(0, scale.images, CHUNK):
            part = slice(first, first + CHUNK)
            parts.append(jax.device_get(every(keys[part], x[part], y[part])))
            done = np.concatenate([found[1] for found in parts])
            progress.stage("attacking")
            progress.update(len(done), {"PSNR": f"{done.mean():.1f} dB"})
    names = ("found", "psnr", "mismatch", "label_right")
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    result = dict(zip(names, columns, strict=True)) | {"x": np.asarray(x)}
    unfinished = path.with_suffix(".part.npz")
    np.savez(unfinished, **result)  # type: ignore[arg-type]
    unfinished.replace(path)
    return result


def row_of(label: str, result: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the record of one attack: mean and deviation over images, and the rest.

    `recovered` and `label_right` are in percent.
    """
    values = result["psnr"].astype(float)
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return dict(
        method=label,
        psnr=[float(values.mean()), spread],
        median=float(np.median(values)),
        recovered=100.0 * float(np.mean(values > RECOVERED)),
        label_right=100.0 * float(np.mean(result["label_right"])),
        mismatch=float(np.median(result["mismatch"])),
        per_image=[round(value, 2) for value in values.tolist()],
    )


COLUMNS = (
    ("method", "attack"),
    ("psnr", "PSNR, dB"),
    ("median", "median"),
    ("recovered", f"above {RECOVERED:.0f} dB, %"),
    ("label_right", "label right, %"),
    ("mismatch", "mismatch, median"),
)


def as_text(record: dict[str, Any]) -> str:
    """Returns the table of all attacks."""
    rows = []
    for row in record["rows"]:
        shown = {k: row[k] for k, _ in COLUMNS}
        shown["psnr"] = "{:.2f} ± {:.2f}".format(*row["psnr"])
        rows.append(shown | {"mismatch": f"{row['mismatch']:.1e}"})
    return text_table(rows, COLUMNS)


def gallery(results: dict[str, dict[str, np.ndarray]], num: int = 6) -> str:
    """Returns the first images and what each attack made of them, as SVG text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = next(iter(results.values()))
    num = min(num, len(first["x"]))
    lines = {"original": first["x"]} | {k: v["found"] for k, v in results.items()}
    figure = Figure(figsize=(2.2 + 0.8 * num, 0.9 * len(lines)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(lines), num, squeeze=False)
    for (label, images), row in zip(lines.items(), axes, strict=True):
        for i, axis in enumerate(row):
            # Not resampled, which keeps the file small.
            pixels = np.clip(images[i].squeeze(), 0, 1)
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="none")
            axis.set(xticks=[], yticks=[])
            if label != "original":
                axis.set_xlabel(f"{results[label]['psnr'][i]:.1f} dB", fontsize=7)
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return picture.figure_svg(figure)


def main(
    path: str,
    scale: Scale,
    data: str,
    data_dir: str | None,
    methods: Sequence[str] = tuple(SENT),
) -> int:
    """Runs the attacks on `methods`; prints the table, writes record and picture."""
    for method in methods:
        check_choice("--methods", method, SENT)
    check_at_least(0, seed=scale.seed)
    check_at_least(1, **{k: v for k, v in scale._asdict().items() if k != "seed"})
    folder = outputs.folder("workdir", path)
    source = sources.load(data, data_dir=data_dir)
    if scale.images > len(source.y):
        raise ValueError(f"images={scale.images}: {data!r} has only {len(source.y)}")
    folder.mkdir(parents=True, exist_ok=True)
    labels = [label for label, attack in ATTACKS.items() if attack.method in methods]
    results = {label: inverted(label, source, scale, folder) for label in labels}
    record = dict(
        settings={"data": data, **scale._asdict()},
        commit=origin.commit(),
        date=datetime.date.today().isoformat(),
        machine=cpu(cli.num_cores()),
        versions={name: origin.version(name) for name in origin.PACKAGES},
        rows=[row_of(label, result) for label, result in results.items()],
    )
    print(as_text(record))
    for name, text in (
        ("gradient_inversion.json", json.dumps(log.jsonable(record), indent=1)),
        ("gradient_inversion.svg", gallery(results)),
    ):
        write_atomically(folder / name, text + "\n")
        print(folder / name)
    return 0


if __name__ == "__main__":
    _WORKDIR = cli.define_path("workdir", "runs/inversion", "Folder of results.")
    _DATA = flags.DEFINE_string("data", "mnist5k", "Data set.")
    _DATA_DIR = cli.define_path("data_dir", None, "Folder of prepared TFDS sets.")
    _METHODS = flags.DEFINE_list("methods", list(SENT), "Whose attacks are run.")
    _SCALE = {
        name: flags.DEFINE_integer(name, default, WORDS[name])
        for name, default in Scale()._asdict().items()
    }
    cli.run(
        lambda: main(
            str(_WORKDIR.value),
            Scale(*(int(flag.value or 0) for flag in _SCALE.values())),
            data=_DATA.value,
            data_dir=_DATA_DIR.value,
            methods=_METHODS.value,
        )
    )
