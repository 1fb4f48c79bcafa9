r"""HyperFedNet on MNIST.

python -m experiments.train --config=configs/hyperfednet_mnist.py --workdir=runs/hfn

Fusions need no code: `--config.method.base='fedprox(mu=0.1)'`, feddyn(alpha=0.01),
scaffold, ditto(lam=1.0), ...; HyperFedNet + FedBN is `--config.method.share_aux=convs`.
feddyn and scaffold average without weights: add `--config.server.weights=uniform`.
"""

from hyperjax.protocols import common


def get_config(arg: str = "", data: str = "mnist5k"):
    """Arguments: data, iid, novel, smoke."""
    config = common.personalised(arg, data)
    config.method = dict(
        name="hyperfednet",
        embedding_size=64 if config.data.name in ("mnist", "mnist5k") else 128,
        share_aux="none",  # or convs, convs_and_bn
        regenerate="every_step",  # or per_round
        init="variance",  # or normal
        slices="input",  # or output
        embedding_init="common",  # or own
        base="fedavg",
        bn_stats="local",  # or average, with share_aux="convs_and_bn"
        persist_optimizer="none",  # or kept, all
        finetune=(),  # patterns; (): everything, (r"params/network/head/.*",): the head
    )
    return config
