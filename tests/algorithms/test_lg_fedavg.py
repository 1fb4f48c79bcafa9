"""LG-FedAvg is FedPer with the roles of head and body exchanged."""

import jax
import numpy as np
import pytest
import quadratics as q

from hyperjax.algorithms.fedper import fedper
from hyperjax.algorithms.lg_fedavg import lg_fedavg
from hyperjax.engine import comm

TRAIN = q.training(q.DECAYING)


@pytest.mark.parametrize(("share", "home"), [(q.HEAD, q.BODY), (q.BODY, q.HEAD)])
def test_equals_fedper_of_the_other_part(share, home):
    alg = lg_fedavg(q.model(), local=TRAIN, share=share)
    ours = q.play(alg, *q.PARTIAL)
    mirror = q.play(fedper(q.model(), local=TRAIN, head=home), *q.PARTIAL)
    jax.tree.map(np.testing.assert_array_equal, (ours[:2]), (mirror[:2]))


def test_shares_the_head_alone():
    alg = lg_fedavg(q.model(), local=TRAIN)
    assert set(q.start(alg).server.theta) == {"params/head/w"}
    costs = comm.cost(comm.describe(alg))
    assert costs.up_numbers == costs.down_numbers == 1


def test_share_without_match():
    with pytest.raises(ValueError, match=r"params/top.*paths are: params/body/w"):
        lg_fedavg(q.model(), local=TRAIN, share="params/top/.*")
