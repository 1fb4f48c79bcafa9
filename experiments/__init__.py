"""Launchers: train, evaluate, compare; the only place that sees everything."""

import signal
import sys

# A signal that comes before there is somebody to hear it waits; see `hosts.joined`.
if any(text.startswith(("--coordinator", "--distributed")) for text in sys.orig_argv):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
# While `python -m experiments.x` looks for x, before seconds of imports.
if sys.argv[:1] == ["-m"] and sys.stderr.isatty() and "--help" not in sys.orig_argv:
    print("Loading JAX ...", file=sys.stderr, flush=True)
