"""Serves a new client from a trained run: its classifier and predictions, no training.

python -m experiments.evaluate --workdir=runs/x --data=new_client.npz [--out=folder]
python -m experiments.evaluate --workdir=runs/x --client=12

The .npz file holds `image` or `x`, [n, H, W] or [n, H, W, c], or for a run on features
or tokens [n, d]; and it may hold `label` [n], integers or names, which are used for
scoring only. A folder of images does too. Images of other sizes than the run's are
scaled as its own were. `--client` takes an unseen client of the run itself. In the
output folder: classifier.npz (path -> array: what would run on the client),
predictions.npz (label, probability, and of a folder each image's name) and result.json.

It also says how unlike the participants the client is: of which share of them the run
is surer, and, of a method that embeds clients, which share is nearer to the others. A
client beyond all of them is of a kind that the run may never have met; `auroc_*` in the
run's summary say what either sign is worth there.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from hyperjax import registry, tree
from hyperjax.data import clients
from hyperjax.engine import checkpoint, deploy, log, scoring
from hyperjax.launch import (
    build,
    cli,
    finished,
    fits,
    inputs,
    origin,
    outputs,
    saved,
)
from hyperjax.launch.saved import Run
from hyperjax.runs import likeness
from hyperjax.types import Array, ClientData, PyTree


class Served(NamedTuple):
    """What a client gets."""

    classifier: PyTree  # variables of the network that runs on the client
    probability: np.ndarray  # [n, K] float32
    label: np.ndarray  # [n] int32
    about: Mapping[str, Array]  # what the method reports of the client


def load_run(path: str) -> Run:
    """Reads a run's folder; needs neither its data set nor its clients.

    Raises:
      ValueError: there is no run, no intact checkpoint in it, or its method serves
        nobody without training; JAX has settings with which other numbers are drawn.
    """
    run = saved.load(path)
    origin.check_settings(run.folder, origin.read(run.folder))
    if run.algorithm.has_families:
        method = run.config.method.name
        join = "; `python -m experiments.join` trains an embedding for unseen clients"
        raise ValueError(
            f"workdir={path!r}: clients of this run of {method!r} have different "
            "networks, and what one that it never met would get is not defined without "
            f"training{join if registry.traits(method).joins else ''}"
        )
    return run


def serve(run: Run, images: np.ndarray, client: int | None = None) -> Served:
    """Deploys the run's method on a client of whom only inputs are known.

    It is deployed as `Evaluator.evaluate` does after the newest checkpoint's round: on
    its own inputs, an unseen client of the run gets the classifier that was scored.

    Args:
      run: from `load_run`.
      images: [n, H, W, c], or other samples, of the run's type.
      client: an unseen client of the run, or None for somebody else.

    Raises:
      FloatingPointError: outputs for some of them are not finite, so that they have no
        class.
      ValueError: its clients adapt by what participants find out, see `fits.read`.
    """
    facts, n = run.facts, len(images)
    nobody = len(facts["counts"])
    shift = facts.get("shift", ())
    signed = run.config.data.standardise == "signed"
    pool = clients.pool_of_one(
        images, facts["mean"], facts["std"], shift, signed=signed
    )
    inputs = ClientData(jnp.arange(n)[None], jnp.full(1, n), pool)
    give = deploy.deployer(run.algorithm, batch_size=run.config.evaluation.batch_size)
    fit = run.algorithm.client.fit
    fitted = fit and {"": fits.read(run.folder, run.restored.round, fit)}
    (deployed,) = give(
        run.config.seed,
        run.restored.carry,
        run.restored.round,
        [nobody if client is None else client],
        inputs,
        fitted=fitted,
    )
    bad = ~np.asarray(scoring.usable(deployed.logits))
    if bad.any():
        raise FloatingPointError(
            f"the network's outputs for {int(bad.sum())} of {n} inputs are not "
            "finite, so these have no class; nothing is written"
        )
    probability = np.asarray(jax.nn.softmax(deployed.logits))
    label = probability.argmax(-1).astype(np.int32)
    return Served(deployed.network, probability, label, deployed.about)


def strangeness(run: Run, served: Served) -> dict[str, float]:
    """Returns how unlike the participants a client is, as shares of these, %.

    "less_sure_than": of whose inputs the outputs are surer. "farther_out_than": whose
    embeddings are nearer to the others', of a method that has some. Nothing of a run
    that has not ended.
    """
    rows = [r for r in finished.read(str(run.folder)).clients if r["participating"]]
    found = {}
    sure = [r["confidence"] for r in rows if r.get("confidence") is not None]
    if sure:
        own = float(served.probability.max(-1).mean())
        found["less_sure_than"] = 100.0 * float(np.mean(np.array(sure) > own))
    ours = [each for row in rows if (each := likeness.embedding_of(row)) is not None]
    embedding = likeness.embedding_of(served.about)
    if embedding is not None and len(ours) > 2:
        away = likeness.strangeness(np.array(ours), np.asarray(embedding))
        found["farther_out_than"] = 100.0 * away
    return found


def read_inputs(path: str, run: Run) -> dict[str, np.ndarray]:
    """Reads a client's file or folder, see `inputs.read`; labels are classes, int32.

    Labels that are all names of classes, as numbers may be, are these; other integers
    are places among them.

    Raises:
      ValueError, FileNotFoundError: not such a file, or not what the run was made for.
    """
    shape = tuple(int(n) for n in run.facts["sample_shape"])
    dtype = np.dtype(str(run.facts.get("sample_dtype", "uint8")))
    found = inputs.read(path, shape, dtype, run.config.data)
    if "label" not in found:
        return found
    labels, names = found["label"], [str(n) for n in run.facts["label_names"]]
    place = {name: k for k, name in enumerate(names)}
    if labels.shape != (len(found["x"]),) or labels.dtype.kind not in "iuU":
        raise ValueError(
            f"data={path!r}: `label` is {labels.dtype}{labels.shape}; one integer or "
            "name per input is expected"
        )
    if all(str(label) in place for label in labels):
        labels = np.array([place[str(label)] for label in labels])
    elif labels.dtype.kind == "U" or labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(
            f"data={path!r}: labels must lie in 0..{len(names) - 1}, or be the run's: "
            f"{', '.join(names[:10])}{', ...' * (len(names) > 10)}"
        )
    return {**found, "label": labels.astype(np.int32)}


def own_client(run: Run, client: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images and labels of an unseen client of the run itself."""
    first = int(run.facts["participating"].sum())
    last = len(run.facts["counts"]) - 1
    if first > last:
        raise ValueError(f"client={client}: this run has no unseen clients")
    if not first <= client <= last:
        raise ValueError(
            f"client={client}: unseen clients of this run: {first}..{last}; `hyperjax "
            "export` writes a participant's network"
        )
    source = build.load_source(run.config.data)
    images, labels = source.x, source.y
    if run.config.data.shift != "none":  # which may be of labels too
        pool = build.federate(source, run.config).pool
        images, labels = np.asarray(pool.x), np.asarray(pool.y)
    if (
        tuple(run.facts["sample_shape"]) != images.shape[1:]
        or run.facts["novel_rows"].max() >= len(source.y)
        or run.pixels not in (None, tree.sha256(images))
    ):
        raise ValueError(
            f"the data set {run.config.data.name!r} is not what it was when the run "
            f"{str(run.folder)!r} began: client={client} cannot be found in it"
        )
    size = run.facts["novel_size"][client - first]
    rows = run.facts["novel_rows"][client - first, :size]
    return images[rows], labels[rows]


def write(
    out: Path,
    served: Served,
    labels: np.ndarray | None,
    run: Run,
    names: np.ndarray | None = None,
) -> dict:
    """Writes the three files; returns the content of result.json."""
    out.mkdir(parents=True, exist_ok=True)
    arrays = jax.tree.leaves(served.classifier)
    named = dict(zip(tree.paths(served.classifier), arrays, strict=True))
    np.savez(str(out / "classifier.npz"), **named)
    said: dict[str, Any] = dict(label=served.label, probability=served.probability)
    if names is not None:
        said["name"] = names
    np.savez(str(out / "predictions.npz"), **said)
    counts = np.bincount(served.label, minlength=len(run.facts["label_names"]))
    result: dict[str, Any] = dict(
        samples=len(served.label),
        rounds=run.restored.round,
        predicted=dict(zip(map(str, run.facts["label_names"]), counts, strict=True)),
        classifier_numbers=tree.count(served.classifier),
    )
    result |= strangeness(run, served)
    if labels is not None:
        result["zacc"] = 100.0 * float(np.mean(served.label == labels))
    result = log.jsonable(result)
    checkpoint.write_atomically(
        out / "result.json", json.dumps(result, indent=2) + "\n"
    )
    return result


def main(path: str, data: str | None, client: int | None, out: str | None) -> int:
    """Serves one client; returns the exit code."""
    if (data is None) == (client is None):
        raise ValueError("give either --data=file.npz or --client=number")
    with cli.doing("evaluate", f"reading {path}") as shown:
        run = load_run(path)
        if data is not None:
            name = Path(data).stem
            found = read_inputs(data, run)
        else:
            name = f"client_{client}"
            found = dict(
                zip(("x", "label"), own_client(run, int(client or 0)), strict=True)
            )
        labels, names = found.get("label"), found.get("name")
        shown.stage(f"serving {name}")
        with outputs.room("out", out or run.folder / "served" / name) as folder:
            result = write(folder, serve(run, found["x"], client), labels, run, names)
    accuracy = f", zACC {result['zacc']:.2f}" if "zacc" in result else ""
    print(
        f"{result['samples']} inputs served after round {result['rounds']}{accuracy}; "
        f"classifier, predictions, result: {folder}"
    )
    unlike = {
        words: result[name]
        for name, words in (
            ("less_sure_than", "less sure of its outputs than"),
            ("farther_out_than", "by its embedding farther out than"),
        )
        if name in result
    }
    if unlike:
        said = ", ".join(f"{k} {share:.0f} %" for k, share in unlike.items())
        told = ": unlike anybody in training" if 100 in unlike.values() else ""
        print(f"Beside participants: {said} of them{told}")
    return 0


def launch() -> None:
    """Runs the command with what the command line says."""
    workdir = cli.define_path("workdir", None, "Folder of a run.")
    data = cli.define_path(
        "data", None, "A client's file.npz (image, label), or a folder."
    )
    client = flags.DEFINE_integer("client", None, "An unseen client of the run.")
    out = cli.define_path("out", None, "Folder to write to.")
    cli.run(
        lambda: main(str(workdir.value), data.value, client.value, out.value),
        needs=("workdir",),
    )
