"""For config files of your own: `from configs import common`, `common.defaults()`."""

from hyperjax.protocols.common import change, defaults, fill, filled

__all__ = ["change", "defaults", "fill", "filled"]
