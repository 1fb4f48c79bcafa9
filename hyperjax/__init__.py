"""Federated learning with hypernetworks, simulated in JAX."""

__version__ = "0.1.0"
