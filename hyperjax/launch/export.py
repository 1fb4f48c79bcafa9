"""Writes clients' networks to files that need no hyperjax to be read.

python -m experiments.export --workdir=runs/x --client=3 [--format=npz]
python -m experiments.export --workdir=runs/x --client=shared --format=stablehlo
python -m experiments.export --workdir=runs/x --data=new_client.npz
python -m experiments.export --workdir=runs/x --all

Clients are numbers: participants first, then those that were never seen in training,
each as it is scored. `shared` is what somebody who is none of them gets, and with
`--data` (a file or folder, as of `evaluate`) that from these inputs. Formats are
flax, npz, safetensors (variables by path, with a header that says what is done to
inputs) and stablehlo (the whole prediction, by jax.export: images in, probabilities
out). Files are in the run's folder, exports/client_3.npz; their paths are printed, one
a line.
"""

from pathlib import Path

from absl import flags

from hyperjax.errors import check_choice
from hyperjax.launch import cli, inputs, notebook, outputs
from hyperjax.runs import export
from hyperjax.runs.run import Run

FOLDER = "exports"
SHARED = "shared"


def numbers(client: str | None, everybody: bool, run: Run) -> dict[str, int | None]:
    """Returns whose networks are asked for, by the name of the file.

    Raises:
      ValueError: there is no such client.
    """
    data = run.experiment.federation
    most = data.num_clients + data.num_novel
    # Where clients have different networks nobody else has one.
    shared = {} if run.experiment.members else {SHARED: None}
    if everybody:
        return {**{f"client_{k}": k for k in range(most)}, **shared}
    if client in shared:
        return {SHARED: None}
    if client is None or not client.isdecimal() or int(client) >= most:
        novel = f" and unseen ones {data.num_clients}..{most - 1}"
        raise ValueError(
            f"client={client!r}: this run has participants 0.."
            f"{data.num_clients - 1}{novel if data.num_novel else ''}"
            f"{f', and {SHARED!r}' if shared else '; their networks are different'}"
        )
    return {f"client_{int(client)}": int(client)}


def main(
    path: str, client: str | None, everybody: bool, data: str | None, format: str
) -> int:
    """Writes the files; returns the exit code."""
    check_choice("format", format, export.ENDINGS)
    given = [client is not None, everybody, data is not None]
    if sum(given) != 1:
        raise ValueError(
            "give one of --client=number, --client=shared, --data=file.npz and --all"
        )
    if data is not None and not Path(data).exists():
        raise FileNotFoundError(f"data={data!r}: there is no such file or folder")
    x = None
    with cli.doing("export", f"reading {path}"):
        run = notebook.load_run(path, "workdir")
    if data is not None:
        pool, config = (
            run.experiment.federation.pool,
            getattr(run.recipe, "config", None),
        )
        x = inputs.read(data, pool.x.shape[1:], pool.x.dtype, config and config.data)[
            "x"
        ]
        wanted: dict[str, int | None] = {Path(data).stem: None}
    else:
        wanted = numbers(client, everybody, run)
    with outputs.room("workdir", Path(path).expanduser() / FOLDER) as folder:
        for name, number in wanted.items():
            with cli.doing("export", f"writing {name}"):
                file = run.export(folder / name, number, format, x)
            print(file, flush=True)
    return 0


def launch() -> None:
    """Runs the command with what the command line says."""
    workdir = cli.define_path("workdir", None, "Folder of a run.")
    client = flags.DEFINE_string("client", None, "A client's number, or shared.")
    everybody = flags.DEFINE_bool("all", False, "Every client's, and the shared one.")
    data = cli.define_path("data", None, "Inputs of somebody new: file.npz or folder/.")
    format = flags.DEFINE_enum("format", "npz", list(export.ENDINGS), "Of the files.")
    cli.run(
        lambda: main(
            str(workdir.value), client.value, everybody.value, data.value, format.value
        ),
        needs=("workdir",),
    )
