r"""pFedHN's experiment: a few clients with two classes each, validation among them.

python -m experiments.train --config=configs/pfedhn.py --workdir=runs/pfedhn
python -m experiments.train --config=configs/pfedhn.py:pfedhn_pc,clients=50 \
    --workdir=runs/pc
python -m experiments.train --config=configs/pfedhn.py:fedper,data=digits \
    --workdir=runs/fedper
"""

from hyperjax.protocols.pfedhn import get_config

__all__ = ["get_config"]
