"""Corrections alone, on one scalar parameter and by hand."""

import jax.numpy as jnp
import pytest

from hyperjax import corrections
from hyperjax.corrections import Means, chain, dyn, none, prox, scaffold

# At theta = 3, received 1, gradient 10; client memory 2, sent 5.
GRADS, THETA, ANCHOR, MEMORY, SENT = (
    {"w": jnp.float32(x)} for x in (10.0, 3.0, 1.0, 2.0, 5.0)
)
INFO = {"displacement": jnp.float32(0.5), "steps": jnp.float32(5)}


def means(delta, extra, participation=0.25):
    return Means({"w": jnp.float32(delta)}, extra, jnp.float32(participation))


def adjusted(correction, sent=SENT, memory=MEMORY):
    return float(correction.adjust(GRADS, THETA, ANCHOR, sent, memory)["w"])


def test_none_changes_nothing():
    plain = none()
    assert adjusted(plain) == 10
    assert plain.init_server(THETA) == plain.init_client(THETA) == plain.send(()) == ()
    assert plain.finish(THETA, ANCHOR, (), (), INFO) == ((), ())
    assert plain.absorb((), THETA, means(1.0, ())) == ((), THETA)


def test_prox_by_hand():
    # d/dw mu/2 (w - 1)^2 = 0.3 * 2
    assert adjusted(prox(0.3)) == pytest.approx(10.6)
    assert adjusted(prox(0.0)) == 10


def test_dyn_by_hand():
    alpha = 0.3
    # d/dw [-g w + alpha/2 (w - 1)^2] = -2 + 0.3 * 2
    assert adjusted(dyn(alpha)) == pytest.approx(8.6)
    memory, extra = dyn(alpha).finish(THETA, ANCHOR, (), MEMORY, INFO)
    assert float(memory["w"]) == pytest.approx(2 - alpha * 2) and extra == ()
    # h = 0.7 - alpha * 0.25 * 4 = 0.4; theta = 3 - 0.4 / 0.3.
    h, theta = dyn(alpha).absorb({"w": jnp.float32(0.7)}, THETA, means(4.0, ()))
    assert float(h["w"]) == pytest.approx(0.4)
    assert float(theta["w"]) == pytest.approx(3 - 0.4 / 0.3)
    assert dyn(alpha).send(h) == ()


def test_scaffold_by_hand():
    # 10 - 2 + 5
    assert adjusted(scaffold()) == 13
    # The change by displacement, (1 - 3) / 0.5 = -4 less what was sent: -9.
    memory, extra = scaffold().finish(THETA, ANCHOR, SENT, MEMORY, INFO)
    assert float(extra["w"]) == pytest.approx(-9)
    assert float(memory["w"]) == pytest.approx(-7)
    still = {"displacement": jnp.float32(0)}
    memory, extra = scaffold().finish(ANCHOR, ANCHOR, SENT, MEMORY, still)
    assert memory == MEMORY and float(extra["w"]) == 0
    c, theta = scaffold().absorb(SENT, THETA, means(4.0, {"w": jnp.float32(-9)}))
    assert float(c["w"]) == pytest.approx(5 - 0.25 * 9) and theta == THETA
    assert scaffold().send(c) == c


def test_only_trained_leaves_are_adjusted():
    # A memory of more leaves than are being trained: a frozen one has no gradient.
    more = {**MEMORY, "frozen": jnp.float32(1)}
    for correction in (prox(0.1), dyn(0.1), scaffold()):
        args = (GRADS, more, {**ANCHOR, "frozen": more["frozen"]}, more, more)
        assert set(correction.adjust(*args)) == {"w"}


def test_chain_adds_terms_and_keeps_states_apart():
    both = chain(prox(0.3), dyn(0.3), scaffold())
    assert both.probe and not chain(prox(0.3), dyn(0.3)).probe
    found = adjusted(both, sent=((), (), SENT), memory=((), MEMORY, MEMORY))
    assert found == pytest.approx(10 + 0.6 - 1.4 + 3)
    server = both.init_server(THETA)
    assert server == both.init_client(THETA) == ((), {"w": 0.0}, {"w": 0.0})
    assert both.send(server) == ((), (), {"w": 0.0})
    memory, extra = both.finish(
        THETA, ANCHOR, both.send(server), ((), MEMORY, MEMORY), INFO
    )
    assert extra[:2] == ((), ()) and float(extra[2]["w"]) == pytest.approx(-4)
    assert float(memory[1]["w"]) == pytest.approx(1.4)
    assert float(memory[2]["w"]) == pytest.approx(-2)
    state, theta = both.absorb(server, THETA, means(4.0, extra))
    assert float(state[1]["w"]) == pytest.approx(-0.3)
    assert float(state[2]["w"]) == pytest.approx(-1)
    assert float(theta["w"]) == pytest.approx(3 + 1)  # dyn: h / alpha = -1


def test_chain_of_nothing_is_none():
    empty = chain()
    assert adjusted(empty, sent=(), memory=()) == 10
    assert empty.init_server(THETA) == () and not empty.probe


def test_a_missing_state_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        adjusted(chain(prox(0.1), scaffold()), sent=(SENT,), memory=(MEMORY,))


@pytest.mark.parametrize("mu", [-1e-3, float("nan")])
def test_bad_mu(mu):
    with pytest.raises(ValueError, match=f"mu={mu} must be.* at least 0"):
        prox(mu)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match=f"alpha={alpha} must be.* positive"):
        dyn(alpha)


def test_names_of_configs():
    assert set(corrections.CORRECTIONS) == {"none", "prox", "dyn", "scaffold"}
