"""Networks, and the way from any flax.linen module to a `Model`.

`HEAD` and `NORM` are path patterns: the last linear layer of every network of the zoo,
and the parameters and statistics of every normalisation, also of Flax's own modules.
"""

from hyperjax.models.convolutions import RULES as CONV_RULES
from hyperjax.models.convolutions import check_rule
from hyperjax.models.convolutions import in_plan as rule_in_plan
from hyperjax.models.linen import from_linen
from hyperjax.models.resnet import ResNet, ResNet20
from hyperjax.models.squeezenet import SqueezeNet
from hyperjax.models.zoo import (
    GRU,
    MLP,
    VGG8,
    ZOO,
    AttackLeNet,
    LeNet,
    LeNetS,
    ZenkeNet,
)

HEAD = r"params/head/.*"
NORM = r".*[Nn]orm[^/]*/[^/]*"

__all__ = [
    "CONV_RULES",
    "GRU",
    "HEAD",
    "MLP",
    "NORM",
    "VGG8",
    "ZOO",
    "AttackLeNet",
    "LeNet",
    "LeNetS",
    "ResNet",
    "ResNet20",
    "SqueezeNet",
    "ZenkeNet",
    "check_rule",
    "from_linen",
    "rule_in_plan",
]
