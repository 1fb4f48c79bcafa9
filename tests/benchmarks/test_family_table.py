"""What clients with different networks send, next to the published figures."""

import pytest

from benchmarks import family_table
from hyperjax.protocols.families import FAMILIES


def test_counts_on_cifar100_are_the_papers():
    records = family_table.measure("cifar100", ["mh_pfedhn", "mh_pfedhngd"])
    known = [r for r in records if r["published"] is not None]
    assert len(known) == 4 * len(FAMILIES)  # two methods, dense and sparse
    for record in known:
        assert record["down"] == record["published"]
        assert record["down_bytes"] == 4 * record["down"]
        if "topk" not in record["method"]:
            assert record["up"] == record["down"]
    up = {(r["method"], r["family"]): r["up_bytes"] for r in records}
    # floor(0.3 K) values and as many indices; the copy of the global model whole.
    sparse = 8 * (3 * 571_236 // 10)
    name = family_table.TOP_K
    assert up[f"mh_pfedhn, {name}", "mh_resnet18"] == sparse
    assert up[f"mh_pfedhngd, {name}", "mh_resnet18"] == sparse + 4 * 239_856


def test_whom_it_counts():
    assert {"local_only", "pfedhn", "mh_pfedhn"} < set(family_table.able())
    with pytest.raises(ValueError, match="methods='fedprox' is unknown"):
        family_table.measure("cifar10", ["fedprox"])
    records = family_table.measure("cifar10", ["local_only"])
    assert {r["up"] for r in records} == {0}
    assert [r["family"] for r in records] == list(FAMILIES)
