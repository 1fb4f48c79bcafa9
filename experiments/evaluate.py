"""Runs `hyperjax evaluate`."""

from hyperjax.launch import evaluate

__doc__ = evaluate.__doc__  # what --help shows

if __name__ == "__main__":
    evaluate.launch()
