"""Runs `hyperjax export`."""

from hyperjax.launch import export

__doc__ = export.__doc__  # what --help shows

if __name__ == "__main__":
    export.launch()
