"""The command `hyperjax`: data, train, sweep, evaluate, join, export, report."""

import importlib
import sys

from hyperjax.errors import check_choice

COMMANDS = {
    "data": "show what the data of a config are, and who has which",
    "train": "train one method on one federation, or continue a run",
    "sweep": "train many runs: seeds, values of fields, methods side by side",
    "evaluate": "serve a client of whom only unlabelled inputs are known",
    "join": "let the unseen clients of a run join it",
    "export": "write clients' networks to files that need no hyperjax",
    "report": "make pages about runs, finished or not",
}


def main() -> None:
    """Runs the command that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print("usage: hyperjax COMMAND [--help] [flags]\n")
        for name, what in COMMANDS.items():
            print(f"  {name:10}{what}")
        sys.exit(0 if len(sys.argv) > 1 else 2)
    name = sys.argv.pop(1)
    try:
        check_choice("command", name, COMMANDS)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if sys.stderr.isatty() and "--help" not in sys.argv:
        print("Loading JAX ...", file=sys.stderr, flush=True)
    sys.path.insert(0, "")  # as with `python -m`: your configs and networks
    command = importlib.import_module(f"hyperjax.launch.{name}")
    sys.modules["__main__"].__doc__ = command.__doc__  # what --help shows
    command.launch()
