"""Launchers: train, evaluate, compare; the only place that sees everything."""

import sys

# While `python -m experiments.x` looks for x, before seconds of imports.
if sys.argv[:1] == ["-m"] and sys.stderr.isatty() and "--help" not in sys.orig_argv:
    print("Loading JAX ...", file=sys.stderr, flush=True)
