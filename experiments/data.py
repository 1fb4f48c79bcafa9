"""Runs `hyperjax data`."""

from hyperjax.launch import data

__doc__ = data.__doc__  # what --help shows

if __name__ == "__main__":
    data.launch()
