"""Runs `hyperjax report`."""

from hyperjax.launch import report

__doc__ = report.__doc__  # what --help shows

if __name__ == "__main__":
    report.launch()
