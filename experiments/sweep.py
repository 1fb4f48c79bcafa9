"""Runs `hyperjax sweep`."""

from hyperjax.launch import sweep

__doc__ = sweep.__doc__  # what --help shows

if __name__ == "__main__":
    sweep.launch()
