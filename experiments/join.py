"""Runs `hyperjax join`."""

from hyperjax.launch import join

__doc__ = join.__doc__  # what --help shows

if __name__ == "__main__":
    join.launch()
