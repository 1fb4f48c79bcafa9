"""Sweeps: many runs from one command, each an ordinary run's folder."""
