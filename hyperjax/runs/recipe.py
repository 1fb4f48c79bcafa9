"""What an experiment is made of in a notebook, and how it is made."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

from hyperjax import augmentation, calls, channels, models, registry
from hyperjax.adaptation import with_adaptation
from hyperjax.data.federation import Federation
from hyperjax.engine import comm, families
from hyperjax.errors import check_choice
from hyperjax.runs.experiment import Experiment, Settings, blocks, experiment
from hyperjax.training import Local
from hyperjax.types import Algorithm, Model, in_one_line


class Recipe(NamedTuple):
    """An experiment's parts as they were given: this is what can be saved."""

    method: str | Algorithm | Callable[..., Algorithm]
    network: Any
    data: Federation
    local: Local
    server_opt: optax.GradientTransformation | None
    uplink: str
    settings: Settings
    options: dict[str, Any]
    engine: dict[str, Any]
    adapt: str = ""
    augment: str = ""

    def __repr__(self) -> str:
        return in_one_line(self)

    def build(self) -> Experiment:
        """Makes it."""
        if isinstance(self.method, Algorithm):
            algorithm = self.method
        else:
            algorithm = _algorithm(
                self.method,
                self.network,
                self.data,
                self.local,
                self.server_opt,
                self.settings.rounds,
                dict(self.options),
            )
        if self.augment:
            augmentation.check_images(self.data.pool.x, "augment")
            algorithm = augmentation.with_augmentation(
                algorithm, self.augment, "augment"
            )
        if self.uplink:
            algorithm = through_channel(algorithm, self.uplink)
        if self.adapt:
            algorithm = with_adaptation(algorithm, self.adapt, "adapt")
        return experiment(
            self.data,
            algorithm,
            self.settings,
            balanced=self.local.balanced,
            **self.engine,
        )

    def networks(self, data: Federation) -> Model | dict[str, Model] | None:
        """Returns the networks that the method is around, by family if there are any.

        Those of an `Algorithm` are not known.
        """
        if isinstance(self.method, Algorithm):
            return None
        return _networks(self.network, data)


def _function(method: Any) -> Any:
    return registry.find(method) if isinstance(method, str) else method


def _algorithm(
    method: str | Callable[..., Algorithm],
    network: Any,
    data: Federation,
    local: Local,
    server_opt: optax.GradientTransformation | None,
    rounds: int,
    options: dict[str, Any],
) -> Algorithm:
    """Builds a method around networks for a federation."""
    function = _function(method)
    takes = inspect.signature(function).parameters
    several = registry.families(function) == "several"
    networks = _networks(network, data)
    if isinstance(networks, Model) and several:
        networks = {"network": networks}
    supplied: dict[str, Any] = dict(
        num_clients=data.num_trainers, num_rounds=rounds, server_opt=server_opt
    )
    if isinstance(networks, dict):
        if "family_sizes" not in takes:
            raise ValueError(
                f"network: {getattr(function, '__name__', method)} needs one network "
                f"for all clients, and {len(networks)} are given"
            )
        members = blocks(networks, data.num_clients)
        supplied["family_sizes"] = {k: len(ids) for k, ids in members.items()}
    if server_opt is not None and "server_opt" not in takes:
        raise ValueError("server_opt: the server of this method has no optimizer")
    known = registry.options(function)
    for option in options:
        if option not in takes:
            check_choice("option", option, known)
    options |= {k: v for k, v in supplied.items() if k in takes and v is not None}
    return calls.call("method", function, networks, local=local, **options)


def _networks(network: Any, data: Federation) -> Model | dict[str, Model]:
    """Returns a model for the federation's samples, or several by name."""
    if isinstance(network, Mapping):
        found = {str(name): _networks(one, data) for name, one in network.items()}
        return {name: one for name, one in found.items() if isinstance(one, Model)}
    if isinstance(network, (list, tuple)) and not isinstance(network, Model):
        names = [n if isinstance(n, str) else type(n).__name__ for n in network]
        pairs = enumerate(zip(names, network, strict=True))
        return _networks({f"{i:02d}_{name}": one for i, (name, one) in pairs}, data)
    if isinstance(network, Model):
        return network
    shape, num_classes = data.pool.x.shape[1:], data.num_classes
    if isinstance(network, str):
        check_choice("network", network, models.ZOO)
        network = models.ZOO[network](num_classes)
    if network is None:
        raise ValueError(
            "network: give a linen module, a hyperjax.Model or the name of a network: "
            f"{', '.join(models.ZOO)}"
        )
    return models.from_linen(network, shape, num_classes, vocabulary=data.vocabulary)


def through_channel(algorithm: Algorithm, text: str) -> Algorithm:
    """Sends a method's uplink through a channel such as "topk(fraction=0.3)"."""
    name, options = calls.parse("uplink", text)
    check_choice("uplink", name, channels.CHANNELS)
    channel = calls.call("uplink", channels.CHANNELS[name], **options)

    def uplink(family: str):
        return comm.describe(families.view(algorithm, family)).uplink

    return channels.with_uplink(algorithm, channel, uplink)
