"""Sections of the page about one run, each a function of what the run has left."""

from hyperjax.launch.report_about import (
    communication,
    configuration,
    headline,
)
from hyperjax.launch.report_clients import (
    MANY_CLIENTS,
    MANY_DOTS,
    clients,
    families,
    partition,
)
from hyperjax.launch.report_embeddings import embeddings
from hyperjax.launch.report_rounds import QUANTITIES, curves, training
from hyperjax.launch.report_scores import (
    COLUMNS,
    MEANINGS,
    METRICS,
    accuracies,
    cards,
    fine_tuning,
)

__all__ = [
    "COLUMNS",
    "MANY_CLIENTS",
    "MANY_DOTS",
    "MEANINGS",
    "METRICS",
    "QUANTITIES",
    "accuracies",
    "cards",
    "clients",
    "communication",
    "configuration",
    "curves",
    "embeddings",
    "families",
    "fine_tuning",
    "headline",
    "partition",
    "training",
]
