"""Federated methods: module `name` defines a function `name` that builds it."""
