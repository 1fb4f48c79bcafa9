r"""FML in MH-pFedHN's experiment: five networks on CIFAR-10.

python -m experiments.train --config=configs/fml_cifar10.py --workdir=runs/fml

See `configs/mh_pfedhn_cifar10.py`.
"""

from configs import mh_pfedhn_cifar10


def get_config(arg: str = ""):
    """Arguments: data, clients, smoke."""
    config = mh_pfedhn_cifar10.federation(arg)
    config.method = dict(
        name="fml",
        alpha=0.5,
        beta=0.5,
        bn_stats="average",  # of the shared network; the own one's stay at home
    )
    return config
