"""A method has one set of defaults: its factory's, which configs repeat or say why not.

A notebook that calls a factory and a launcher that reads a config run one method.
"""

import importlib
import inspect
from pathlib import Path

import pytest

from hyperjax import registry

CONFIGS = sorted(
    path.stem
    for path in (Path(__file__).parents[2] / "configs").glob("*.py")
    if path.stem not in ("__init__", "common")
)
# Values of an experiment's own, and why they are not the method's.
OWN = {
    ("hyperfedzero_mnist", "hidden"): "as many parameters as the classifier",
    ("hyperfedzero_digits", "hidden"): "as many parameters as a small classifier",
    ("hyperfedzero_digits", "chunk_size"): "for a small classifier",
    ("constant_embedding_mnist", "hidden"): "as HyperFedZero, whose control it is",
    ("hyperfednet_mnist", "embedding_size"): "64 for MNIST in the paper",
    ("fedrep_mnist", "head_epochs"): "HyperFedNet's experiment has 4 epochs in all",
    ("fedjets_mnist", "num_sent"): "unseen clients choose from the whole pool",
    ("pfedhn_pc_cifar10", "keep"): "this is what PC means",
    ("pfedhn_pc_cifar10", "persist_optimizer"): "this is what PC means",
}


def plain(value):
    """Values that mean the same in a config and in Python look the same."""
    if value is None or value == "none":
        return ()
    return (value,) if isinstance(value, str) else value


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_has_the_factorys_values_or_says_why_not(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    options = inspect.signature(registry.find(config.method.name)).parameters
    differ = set()
    for option, value in config.method.items():
        if option == "name":
            continue
        default = options[option].default
        if default is inspect.Parameter.empty or plain(default) != plain(value):
            differ.add((name, option))
    assert differ == {key for key in OWN if key[0] == name}
