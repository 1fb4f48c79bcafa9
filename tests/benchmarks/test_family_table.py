"""What clients with different networks send, next to the published figures."""

import pytest

from benchmarks import family_table
from hyperjax.protocols.families import FAMILIES


def few(monkeypatch, *names):
    monkeypatch.setattr(family_table, "FAMILIES", names)
    monkeypatch.setattr(family_table, "SIZES", dict.fromkeys(names, 10))


@pytest.mark.parametrize(
    ("method", "names"),
    [
        # A server knows only their sizes: tests/models/test_networks.py has all.
        ("mh_pfedhn", ("mh_cnn", "vgg8")),
        pytest.param("mh_pfedhn", FAMILIES, marks=pytest.mark.slow),
        pytest.param("mh_pfedhngd", FAMILIES, marks=pytest.mark.slow),
    ],
)
def test_counts_on_cifar100_are_the_papers(method, names, monkeypatch):
    few(monkeypatch, *names)
    records = family_table.measure("cifar100", [method])
    assert [r["family"] for r in records] == [*names, *names]
    known = [r for r in records if r["published"] is not None]
    assert len(known) == 2 * len(names)  # dense and sparse
    for record in known:
        assert record["down"] == record["published"]
        assert record["down_bytes"] == 4 * record["down"]
        if "topk" not in record["method"]:
            assert record["up"] == record["down"]
    up = {(r["method"], r["family"]): r["up_bytes"] for r in records}
    # floor(0.3 K) values and as many indices; the copy of the global model whole.
    sparse = 8 * (3 * family_table.PUBLISHED[names[-1]] // 10)
    copy = {"mh_pfedhn": 0, "mh_pfedhngd": 4 * 239_856}[method]
    assert up[f"{method}, {family_table.TOP_K}", names[-1]] == sparse + copy


def test_what_the_papers_code_sends_is_known_of_every_family():
    # The parameters of tests/models/test_networks.py.
    assert {name: family_table.published("mh_pfedhn", name) for name in FAMILIES} == {
        "mh_cnn": 239_856,
        "vgg8": 274_664,
        "mh_resnet10": 353_028,
        "mh_resnet12": 529_092,
        "mh_resnet18": 571_236,
    }
    assert family_table.published("mh_pfedhngd", "mh_resnet18") == 571_236 + 239_856


def test_whom_it_counts(monkeypatch):
    assert {"local_only", "pfedhn", "mh_pfedhn"} < set(family_table.able())
    with pytest.raises(ValueError, match="methods='fedprox' is unknown"):
        family_table.measure("cifar10", ["fedprox"])
    few(monkeypatch, "mh_cnn")
    (record,) = family_table.measure("cifar10", ["local_only"])
    assert (record["family"], record["up"]) == ("mh_cnn", 0)
