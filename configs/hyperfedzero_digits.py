r"""HyperFedZero in seconds: 1,797 8x8 digits, a small MLP, 10 + 5 clients.

python -m experiments.train --config=configs/hyperfedzero_digits.py --workdir=runs/try

For trying things out; the numbers mean nothing.
"""

from configs import hyperfedzero_mnist
from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: alpha (of the Dirichlet partition), smoke."""
    common.parse_arg(arg, alpha=1.0, smoke=False)  # refuses other data
    config = hyperfedzero_mnist.get_config(arg)
    config.data.name = "digits"
    config.data.min_size = 4
    config.model.hidden = (32,)
    config.method.hidden = (32, 32)
    config.method.chunk_size = 64
    config.local.batch_size = 16
    config.local.learning_rate = 0.05
    config.rounds = min(config.rounds, 40)
    return config
