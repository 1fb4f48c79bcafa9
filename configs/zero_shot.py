r"""HyperFedZero's experiment: clients never seen in training, served without any.

python -m experiments.train --config=configs/zero_shot.py --workdir=runs/hfz
python -m experiments.train --config=configs/zero_shot.py:data=digits --workdir=runs/try
python -m experiments.train --config=configs/zero_shot.py:fedprox,data=mnist,alpha=0.1 \
    --workdir=runs/prox --config.method.mu=0.01
"""

from hyperjax.protocols.zero_shot import get_config

__all__ = ["get_config"]
