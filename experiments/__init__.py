"""Launchers: train, evaluate, compare; the only place that sees everything."""
