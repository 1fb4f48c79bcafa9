"""What clients with different networks send, next to the published figures."""

import pytest

from benchmarks import family_table
from hyperjax.protocols.families import FAMILIES


@pytest.mark.parametrize(
    "method", ["mh_pfedhn", pytest.param("mh_pfedhngd", marks=pytest.mark.slow)]
)
def test_counts_on_cifar100_are_the_papers(method):
    records = family_table.measure("cifar100", [method])
    assert [r["family"] for r in records] == [*FAMILIES, *FAMILIES]
    known = [r for r in records if r["published"] is not None]
    assert len(known) == 2 * len(FAMILIES)  # dense and sparse
    for record in known:
        assert record["down"] == record["published"]
        assert record["down_bytes"] == 4 * record["down"]
        if "topk" not in record["method"]:
            assert record["up"] == record["down"]
    up = {(r["method"], r["family"]): r["up_bytes"] for r in records}
    # floor(0.3 K) values and as many indices; the copy of the global model whole.
    sparse = 8 * (3 * 571_236 // 10)
    copy = {"mh_pfedhn": 0, "mh_pfedhngd": 4 * 239_856}[method]
    assert up[f"{method}, {family_table.TOP_K}", "mh_resnet18"] == sparse + copy


def test_whom_it_counts(monkeypatch):
    assert {"local_only", "pfedhn", "mh_pfedhn"} < set(family_table.able())
    with pytest.raises(ValueError, match="methods='fedprox' is unknown"):
        family_table.measure("cifar10", ["fedprox"])
    monkeypatch.setattr(family_table, "FAMILIES", ("mh_cnn",))
    monkeypatch.setattr(family_table, "SIZES", {"mh_cnn": 1})
    (record,) = family_table.measure("cifar10", ["local_only"])
    assert (record["family"], record["up"]) == ("mh_cnn", 0)
