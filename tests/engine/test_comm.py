"""What is said of a method's messages, from the messages themselves."""

import pytest
import quadratics as q
from federated import make_local, tiny

from hyperjax.algorithms.fedavg import fedavg
from hyperjax.engine import comm


def test_a_method_says_in_a_line_what_is_sent():
    # Both parameters of the quadratics; of one that stays home nothing is said.
    alg = fedavg(q.model(), local=make_local())
    assert repr(alg) == "Algorithm(a client is sent 2 numbers a round and sends 2)"
    kept = fedavg(q.model(), local=make_local(), keep=r"params/head/.*")
    assert "sent 1 numbers a round and sends 1" in repr(kept)
    # Both exchanges of a round that has two.
    twice = alg._replace(opening=kept)
    assert "sent 3 numbers a round and sends 3" in repr(twice)
    costs = comm.cost(comm.describe(twice))
    assert costs == (3, 3, 12, 12)


def test_a_method_that_cannot_be_described_has_a_line_too():
    alg = fedavg(tiny().model, local=make_local())
    families = alg._replace(client={"b": alg.client, "a": alg.client})
    assert repr(families) == "Algorithm(clients of the families a, b)"
    with pytest.raises(ValueError, match=r"has the families \['a', 'b'\]"):
        comm.describe(families)
    broken = alg._replace(server=alg.server._replace(update=None))
    assert repr(broken) == "Algorithm(of messages that cannot be evaluated)"
