"""What `import hyperjax` has but for the methods; the package imports it when asked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hyperjax import models
from hyperjax.data import partition, sources
from hyperjax.data.federation import Federation, federate
from hyperjax.data.sources import Source, load
from hyperjax.engine.comm import cost, describe
from hyperjax.engine.schedule import simulator
from hyperjax.models.linen import from_linen
from hyperjax.registry import methods, options
from hyperjax.runs.run import Run, run
from hyperjax.training import Local, Phase, trainer
from hyperjax.types import Algorithm, ClientSide, Model, ServerSide

__all__ = [
    "Algorithm",
    "ClientSide",
    "Federation",
    "Local",
    "Model",
    "Phase",
    "Run",
    "ServerSide",
    "Source",
    "cost",
    "data_sets",
    "describe",
    "evaluate",
    "export",
    "federate",
    "from_linen",
    "load",
    "load_run",
    "methods",
    "networks",
    "options",
    "partitions",
    "run",
    "simulator",
    "table",
    "trainer",
]


def load_run(path: Any) -> Run:
    """Returns the run in a folder: what `Run.save` or `hyperjax train` left there.

    A saved run is read by cloudpickle, which runs the code in it: load your own alone.

    Raises:
      ValueError: there is no run, it is damaged, or it has no checkpoint yet.
      FileNotFoundError: its data set is not where it was.
    """
    from hyperjax.launch import notebook

    return notebook.load_run(path)


def evaluate(
    run: Any, x: Any = None, y: Any = None, client: int | None = None
) -> dict[str, float]:
    """Returns accuracies in per cent: of a run's clients, or of somebody's samples.

    Args:
      run: what `hyperjax.run` returned, or the folder of a run, see `load_run`.
      x: samples, as they were given to `federate`; None: those of the run's clients,
        see `Run.scores`.
      y: labels of x, names or numbers.
      client: whose network is asked about x; None: that of somebody who is no client of
        the run, and of whom only x is known.

    Returns:
      What `Run.scores` has; or {"accuracy": ...} of x.

    Raises:
      ValueError: x or y is missing, or not what the run was made for; or there is no
        run, or no such client.
      FloatingPointError: the network's outputs for x are not finite.
    """
    found = run if isinstance(run, Run) else load_run(run)
    if x is None and y is None and client is None:
        return found.scores()
    if x is None or y is None:
        raise ValueError("give x and y, or neither and no client")
    return {"accuracy": found.accuracy(client, x, y)}


def export(
    run: Any,
    path: Any,
    client: int | None = None,
    format: str = "npz",
    x: Any = None,
) -> Path:
    """Writes a client's network to a file that needs no hyperjax to be read.

    Args:
      run: what `hyperjax.run` returned, or the folder of a run, see `load_run`.
      path, client, format, x: see `Run.export`.

    Returns:
      The file's path.

    Raises:
      ValueError: an unknown format, or there is no run, or no such client.
      FloatingPointError: the network's outputs are not finite.
    """
    found = run if isinstance(run, Run) else load_run(run)
    return found.export(path, client, format, x)


def table(folders: Any, fields: Sequence[str] = ()) -> Any:
    """Returns the results of runs, finished or not, as one long DataFrame.

    See `hyperjax.sweeps.long.table`.

    Raises:
      ValueError: a file of a run is damaged.
      FileNotFoundError: there is no run.
    """
    from hyperjax.sweeps import long

    return long.table(folders, fields)


def networks() -> list[str]:
    """Returns the names of networks that `run` takes."""
    return list(models.ZOO)


def partitions() -> list[str]:
    """Returns the ways in which `federate` deals samples out."""
    return list(partition.PARTITIONERS)


def data_sets() -> list[str]:
    """Returns the names that `load` takes without reading anything.

    Others are those of TensorFlow Datasets, and files and functions of yours.
    """
    return list(sources.EMBEDDED)
