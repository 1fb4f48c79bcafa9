r"""MH-pFedHN's experiment: clients with different networks.

python -m experiments.train --config=configs/families.py --workdir=runs/mh
python -m experiments.train --config=configs/families.py:fedproto,data=digits \
    --workdir=runs/fedproto
python -m experiments.train --config=configs/families.py:mh_pfedhngd,averaged \
    --workdir=runs/gd --config.families="('mlp','mh_cnn')"
"""

from hyperjax.protocols.families import get_config

__all__ = ["get_config"]
