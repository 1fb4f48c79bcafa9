"""Networks, and the way from any flax.linen module to a `Model`."""

from hyperjax.models.layers import CONV_RULES
from hyperjax.models.linen import from_linen
from hyperjax.models.zoo import MLP, ZOO, LeNet, LeNetS

__all__ = ["CONV_RULES", "MLP", "ZOO", "LeNet", "LeNetS", "from_linen"]
