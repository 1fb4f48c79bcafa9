r"""HyperFedNet's experiment: personalised models, and what they cost to send.

python -m experiments.train --config=configs/personalised.py --workdir=runs/hfn
python -m experiments.train --config=configs/personalised.py:ditto,iid --workdir=runs/d
python -m experiments.train --config=configs/personalised.py:scaffold,data=cifar10 \
    --workdir=runs/scaffold --config.data.data_dir=...
"""

from hyperjax.protocols.personalised import get_config

__all__ = ["get_config"]
