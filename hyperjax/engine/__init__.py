"""Runs any `Algorithm`: maps over clients, stores their state, evaluates, records."""
