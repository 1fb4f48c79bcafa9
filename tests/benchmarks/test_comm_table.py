"""What is sent, against the counts that HyperFedNet's paper charged."""

import functools
import json

import federated
import pytest
from absl import flags

from benchmarks import comm_table
from benchmarks.comm_table import Row
from hyperjax.engine import comm

SHARED = {
    "none": {},
    "convs": dict(share_aux="convs"),
    "convs_and_bn": dict(share_aux="convs_and_bn"),
    "averaged": dict(share_aux="convs_and_bn", bn_stats="average"),
}
REPRODUCED = (
    "fedavg",
    "fedbabu",
    "feddyn",
    "fedgen",
    "fedper",
    "fedprox",
    "fedrep",
    "hyperfednet",
    "pfedla",
    "pfedsim",
)
# Methods that send what another one sends: it stands for them but in slow tests.
LIKE = {
    **dict.fromkeys(("fedprox", "feddyn", "pfedla", "pfedsim"), "fedavg"),
    **dict.fromkeys(("fedbabu", "fedrep"), "fedper"),
}
HYPER = [Row(label, "hyperfednet", options) for label, options in SHARED.items()]


MADE = functools.cache(comm_table.make_model)
HOLLOW = functools.cache(comm_table.hollow)


@pytest.fixture(autouse=True)
def networks_are_made_once(monkeypatch):
    monkeypatch.setattr(comm_table, "make_model", MADE)
    monkeypatch.setattr(comm_table, "hollow", HOLLOW)


def round_trips(network, lines):
    records, refused = comm_table.measure(network, lines)
    assert not refused
    return {r["method"]: r["cpr"] for r in records}


@functools.cache
def on_cifar10():
    """Counts of the paper's methods that the package has."""
    lines = [row for row in comm_table.rows() if row.label in comm_table.TABLE_III]
    records, refused = comm_table.measure("cifar10", lines)
    assert not refused
    return records


@functools.cache
def some_on_cifar10():
    """Their counts, of which those of one stand for those of its like."""
    names = {*comm_table.TABLE_III} - {*LIKE}
    lines = [row for row in comm_table.rows() if row.label in names]
    records, refused = comm_table.measure("cifar10", lines)
    assert not refused
    measured = {record["method"]: record for record in records}
    like = [{**measured[one], "method": name} for name, one in LIKE.items()]
    return records + like


def test_those_that_send_the_same_do():
    network = comm_table.Network("on normed()", (4, 4, 1), federated.NUM_CLASSES, 4)
    sent = {}
    for name in {*LIKE, *LIKE.values()}:
        alg = comm_table.make_method(Row(name, name, {}), network, federated.normed())
        sent[name] = comm.cost(comm.describe(alg))
    for name, one in LIKE.items():
        assert sent[name] == sent[one], name


@pytest.mark.parametrize(
    "network, counts",
    [
        # 2 phi; + 2 (stem + shortcuts); + 2 scales and biases; + 2 means and variances.
        ("mnist", (151_840, 157_248, 158_208, 159_168)),
        pytest.param(
            *("fashion_mnist", (565_536, 570_944, 576_384, 581_824)),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("cifar10", (565_536, 571_520, 576_960, 582_400)), marks=pytest.mark.slow
        ),
        pytest.param(
            *("cifar100", (565_536, 587_744, 598_624, 609_504)),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_hyperfednet_with_everything_it_may_share(network, counts):
    assert tuple(round_trips(network, HYPER).values()) == counts


@pytest.mark.parametrize(
    "network, full",
    [
        ("mnist", 155_124),
        pytest.param("cifar100", 4_519_432, marks=pytest.mark.slow),
    ],
)
def test_two_models_a_round_trip(network, full):
    lines = [Row("fedavg", "fedavg", {}), Row("scaffold", "scaffold", {})]
    counts = round_trips(network, lines)
    assert counts == {"fedavg": full, "scaffold": 2 * full}


ONE = 75_920  # each way; SCAFFOLD sends as many controls, FedFomo five more down


@pytest.mark.parametrize(
    "expected",
    [
        {
            "feddyn": 2 * ONE,
            "scaffold": 4 * ONE,
            "fedfomo": 7 * ONE + 5,  # and the scores of the five
        },
        # Of the kind of FedDyn.
        pytest.param(
            {"fedprox": 2 * ONE, "ditto": 2 * ONE, "pfedla": 2 * ONE},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_fusions_send_generators_and_nothing_else(expected):
    labels = [f"hyperfednet + {base}" for base in expected]
    lines = [row for row in comm_table.EXTRA if row.label in labels]
    assert round_trips("mnist", lines) == dict(
        zip(labels, expected.values(), strict=True)
    )


def test_smallest_generator_and_averaged_statistics():
    names = (comm_table.SMALLEST, comm_table.AVERAGED)
    counts = round_trips("mnist", [r for r in comm_table.EXTRA if r.label in names])
    # 16 + 16 + 144 + 144 numbers each way; 240 means and 240 variances each way more.
    assert [counts[name] for name in names] == [640, 155_124 + 2 * 480]


@pytest.mark.slow
def test_all_of_cifar10_are_counted_as_those_they_are_like():
    found, expected = on_cifar10(), some_on_cifar10()
    costs = [{r["method"]: r["cpr"] for r in records} for records in (found, expected)]
    assert costs[0] == costs[1]


@pytest.mark.slow
def test_counts_of_cifar10_are_the_papers_but_for_two_that_are_explained():
    records = {r["method"]: r for r in on_cifar10()}
    assert {*REPRODUCED, "fedbn", "fedfomo"} == set(records) == {*comm_table.TABLE_III}
    for method in REPRODUCED:
        assert records[method]["cpr"] == records[method]["published"], method
    assert records["fedbn"]["cpr"] == 1_127_860 - 2 * 2_720
    assert comm_table.note(records["fedbn"]).startswith("-5,440: scales and biases")
    # Own and five models down, own and five scores up.
    down_up = records["fedfomo"]["down"], records["fedfomo"]["up"]
    assert down_up == (6 * 563_930, 563_930 + 5)
    assert comm_table.note(records["fedfomo"]).startswith("+5: the scores of five")
    # Generator and, up, how many samples of each label.
    assert records["fedgen"]["down"] - 563_930 == 3_552
    assert records["fedgen"]["up"] - 563_930 == 10
    assert comm_table.note(records["fedavg"]) == ""
    # The specification's stricter counts, of clients that keep what is theirs.
    saved = comm_table.savings(list(records.values()))
    assert saved["pfedsim"].startswith("1,127,210 if")
    assert saved["fedfomo"].startswith(f"{6 * 563_930 + 5:,} if")
    for record in records.values():
        for way in ("down", "up"):
            assert record[f"{way}_bytes"] == 4 * record[way]


def test_table_iii_digit_for_digit():
    table = comm_table.table_iii(some_on_cifar10())
    lines = {line["method"]: line for line in table}
    fedbn = lines["fedbn"]
    assert " ".join(fedbn["cells"]) == "1.12 4.49 15.71 46.02 46.02 90.92"
    assert (fedbn["same"], fedbn["of"]) == (0, 6)
    # Five more numbers a round trip do not show in FedFomo's cells.
    for method in (*REPRODUCED, "fedfomo", "fedbn, charged as fedavg"):
        assert lines[method]["same"] == lines[method]["of"], method
    assert comm_table.tally(table) == (
        "64 of 70 cells as printed from our own counts; 6 of 6 of fedbn, charged as "
        "fedavg"
    )


def test_the_five_prices_reproduce_all_70_cells():
    # With the numbers per round trip that the paper charged, of whatever method.
    count = 0
    for method in comm_table.TABLE_III:
        printed = comm_table.printed_costs(method)
        cpr = comm_table.PUBLISHED["cifar10", method]
        assert comm_table.costs(method, cpr) == [cost for _, cost in printed], method
        count += len(printed)
    assert count == 70


def test_methods_that_are_missing_or_refuse_are_said_to():
    lines = comm_table.cost_rows(comm_table.table_iii([]))
    assert {line["cells"] for line in lines} == {"not in the package"}
    wrong = [Row("wrong", "hyperfednet", dict(tile=7))]
    records, refused = comm_table.measure("mnist", wrong)
    assert records == [] and "no kernel of the model" in refused["wrong"]
    with pytest.raises(ValueError, match="did you mean 'cifar10'"):
        comm_table.measure("cifar11")


@pytest.mark.parametrize(
    "method",
    [
        "hyperfednet",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("fedavg", "moon", "opt1")),
    ],
)
def test_a_hollow_model_is_counted_as_the_model(method):
    network = comm_table.NETWORKS["mnist"]
    real = comm_table.make_model(network)
    row = Row(method, method, {})
    counts = [
        comm.cost(comm.describe(comm_table.make_method(row, network, model)))
        for model in (real, comm_table.hollow(real))
    ]
    assert counts[0] == counts[1]


def test_the_command_prints_and_writes(tmp_path, monkeypatch, capsys):
    path = tmp_path / "comm.json"
    values = flags.FlagValues()
    flags.DEFINE_list("networks", ["mnist"], "", flag_values=values)
    flags.DEFINE_string("json", str(path), "", flag_values=values)
    values(["comm_table"])
    monkeypatch.setattr(flags, "FLAGS", values)
    few = [row for row in comm_table.rows() if row.label in ("fedavg", "fedbn")]
    monkeypatch.setattr(comm_table, "rows", lambda: few)
    assert comm_table.main() == 0
    shown = capsys.readouterr().out
    assert "mnist: resnet8" in shown and "155,124" in shown
    fedavg, fedbn = json.loads(path.read_text())
    assert fedavg == {
        "method": "fedavg",
        "network": "mnist",
        "down": 77_562,
        "up": 77_562,
        "cpr": 155_124,
        "down_bytes": 310_248,
        "up_bytes": 310_248,
        "published": 155_000,
    }
    assert (fedbn["cpr"], fedbn["published"]) == (154_164, None)


def test_every_method_is_a_line_of_its_own():
    labels = [row.label for row in comm_table.rows()]
    assert len(labels) == len(set(labels))
    for name in ("local_only", "hyperfedzero", "pfedme", "fednova"):
        assert name in labels
