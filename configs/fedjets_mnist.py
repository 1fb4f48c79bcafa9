r"""FedJETs on HyperFedZero's first experiment: MNIST, MLP, 10 + 5 clients.

python -m experiments.train --config=configs/fedjets_mnist.py --workdir=runs/fedjets

Traffic as published, 2 experts each way: `--config.method.num_sent=2`; clients never
seen in training then have 2 experts to choose from.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, alpha (of the Dirichlet partition), smoke."""
    config, _ = common.zero_shot(arg)
    config.method = dict(
        name="fedjets",
        num_experts=5,  # M
        top_k=2,  # K, trained and sent by a client
        num_sent=5,  # experts that a client is sent: K to M
        anchors_per_expert=1,  # 0: no anchors
    )
    return config
