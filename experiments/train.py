"""Runs `hyperjax train`."""

from hyperjax.launch import train

__doc__ = train.__doc__  # what --help shows

if __name__ == "__main__":
    train.launch()
