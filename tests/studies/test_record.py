"""Records of studies: what they are made of, what they refuse, what a page shows."""

import json

import pytest

from experiments.studies import record, results, table_iv
from experiments.studies.study import Study

STUDY = Study(
    "Which is better?",
    {"pacc": "pACC", "extra": "extra"},
    {"A": {"method.name": "fedavg"}, "B": {"method.name": "fedprox"}},
    baseline="A",
    published={("mnist", "dirichlet", "B"): {"pacc": 95.0}},
    measure=lambda folder: {"extra": len(folder.name)},
)
COMMIT = "c" * 40
COMMAND = (
    "hyperjax sweep --config=experiments/studies/x.py --workdir=/some/where "
    "--config.data.data_dir=/else/where --sweep=which --sweep=seed=0..2"
)


def config(method, seed):
    return {
        "seed": seed,
        "rounds": 3,
        "data": {"name": "mnist5k", "partition": "dirichlet", "data_dir": "/x"},
        "method": {"name": method},
        "local": {"learning_rate": 0.25},
        "engine": {"devices": 2},
    }


def sweep(root, accuracies, commit=COMMIT, **status):
    """Writes the folder of a sweep: {method: accuracies by seed}."""
    entries = []
    for method, values in accuracies.items():
        for seed, value in enumerate(values):
            name = f"{method}_{seed}"
            fields = {"method.name": method, "local.clip_norm": 1.0, "seed": seed}
            entry = dict(name=name, fields=fields)
            entry["status"] = status.get(name, "finished")
            entries.append(entry)
            (root / name).mkdir(parents=True)
            about = dict(
                config=config(method, seed),
                commit=commit,
                device="cpu",
                plan={"devices": 1},
                versions={"jax": "1"},
            )
            (root / name / "config.json").write_text(json.dumps(about))
            summary = dict(pacc=value, seconds=2.4, finished=True)
            (root / name / "summary.json").write_text(json.dumps(summary))
    found = dict(format=1, command=COMMAND, points=entries)
    (root / "sweep.json").write_text(json.dumps(found))
    return str(root)


@pytest.fixture(autouse=True)
def study(monkeypatch):
    monkeypatch.setattr(record, "studies_of", lambda config: {"which": STUDY})


def test_a_record_and_its_table(tmp_path):
    folder = sweep(
        tmp_path / "s", {"fedavg": [90.0, 91.0, 92.0], "fedprox": [91.0, 93.0, 95.0]}
    )
    found = record.record(folder)
    assert (found["study"], found["seeds"]) == ("which", [0, 1, 2])
    assert found["scale"] == "small"
    assert found["hardware"].endswith(" CPU, 1 core")  # what the runs had
    assert (found["commit"], found["config"]) == (COMMIT, "experiments/studies/x.py")
    assert "where" not in found["command"] and "--sweep=which" in found["command"]
    # What all points change is a setting; where it was made is none.
    assert found["settings"]["rounds"] == 3
    assert not {"data.data_dir", "seed", "method.name"} & set(found["settings"])
    a, b = found["rows"]
    assert (a["label"], b["label"], b["settings"]) == ("A", "B", "")
    assert b["pacc"]["mean"] == 93.0 and b["pacc"]["std"] == 2.0
    assert b["pacc"]["per_seed"] == {0: 91.0, 1: 93.0, 2: 95.0}
    assert b["extra"]["mean"] == len("fedprox_0")
    assert (a["published"], b["published"]) == ({}, {"pacc": 95.0})
    # Differences 1, 2, 3: deviation 1, half-width 4.303 / sqrt(3).
    assert b["difference"]["difference"] == 2.0
    assert b["difference"]["low"] == pytest.approx(2 - 4.3027 / 3**0.5, abs=1e-3)
    assert "difference" not in a
    text = results.markdown(json.loads(json.dumps(found)), ["pacc"])
    heading, _, first, second, _, source = text.strip().splitlines()
    assert heading == "| method | pACC | paper: pACC | pACC - paper | pACC - A's |"
    assert first == "| A | 91.00 ± 1.00 | – | – | – |"
    assert second == "| B | 93.00 ± 2.00 | 95 | -2.00 | +2.00 [-0.48, +4.48] |"
    assert "seeds 0, 1, 2" in source and COMMIT[:9] in source


def test_what_is_published_may_be_of_settings_too():
    of = Study(
        "How many?",
        {"pacc": "pACC"},
        published={
            ("mnist", "dirichlet", "A"): {"pacc": 1.0},
            ("mnist", "dirichlet", "B, num_clients=50"): {"pacc": 2.0},
        },
    )
    runs = [
        record.Run(group, {}, dict(config=config("a", 0)), dict(pacc=9.0, seconds=1.0))
        for group in (("A", "num_clients=10"), ("B", "num_clients=50"), ("B", ""))
    ]
    rows = record.rows_of(runs, of)
    assert [row["published"] for row in rows] == [{"pacc": 1.0}, {"pacc": 2.0}, {}]


def test_what_diverged_is_counted_and_has_no_mean(tmp_path):
    runs = {"fedavg": [90.0, 91.0], "fedprox": [91.0, None]}
    folder = sweep(tmp_path / "s", runs, fedavg_1="diverged")
    a, b = record.record(folder)["rows"]
    assert a["diverged"] == 1 and a["pacc"]["n"] == 1 and a["pacc"]["std"] is None
    assert b["diverged"] == 0 and "pacc" not in b
    text = results.markdown(record.record(folder), ["pacc"])
    assert "| A (1 diverged) | 90.00 |" in text and "| B | – |" in text


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (dict(fedavg_0="running"), "1 points have not ended well, such as 'fedavg_0'"),
        (dict(fedavg_0="failed"), "1 points have not ended well"),
        (dict(commit=COMMIT + "+"), "files that are no commit"),
        (dict(commit=None), "files that are no commit"),
    ],
)
def test_there_is_no_record_of_what_is_unfinished_or_changed(given, match, tmp_path):
    folder = sweep(tmp_path / "s", {"fedavg": [90.0]}, **given)
    with pytest.raises(ValueError, match=match):
        record.main(folder, str(tmp_path / "r.json"), None)
    assert not (tmp_path / "r.json").exists()


def test_a_folder_without_a_sweep_or_a_study(tmp_path):
    with pytest.raises(ValueError, match="holds no sweep"):
        record.record(str(tmp_path / "none"))
    folder = sweep(tmp_path / "s", {"fedavg": [90.0]})
    with pytest.raises(ValueError, match=r"study='whith'.*which"):
        record.record(folder, "whith")


def test_only_tables_between_marks_are_written_anew(tmp_path):
    folder = sweep(tmp_path / "s", {"fedavg": [90.0]})
    assert record.main(folder, str(tmp_path / "r.json"), None) == 0
    text = "before\n<!-- record: r.json pacc -->\nold\n<!-- end -->\nafter\n"
    once = results.rewritten(text, tmp_path)
    assert once.startswith("before\n<!-- record: r.json pacc -->\n| method | pACC |")
    assert once.endswith("<!-- end -->\nafter\n") and "old" not in once
    assert results.rewritten(once, tmp_path) == once
    with pytest.raises(ValueError, match=r"column='no'.*pacc"):
        results.rewritten(text.replace(" pacc ", " no "), tmp_path)


def test_a_table_of_methods_by_settings(tmp_path):
    def row(label, setting, mean, holm=None):
        found = dict(label=label, settings=setting, pacc=mean and dict(mean=mean))
        return found | (dict(difference=dict(holm=holm)) if holm else {})

    rows = [row("A", "shift=blur, partition=iid", 90.04), row("A", "alpha=1", 80.0)]
    rows += [row("B", "alpha=1", 85.0, 0.04), row("C", "alpha=1", None)]
    about = dict(columns={"pacc": "pACC"}, compared="pacc", rows=rows, seeds=[0])
    about |= dict(command="c", hardware="h", date="d", commit="abc")
    text = results.across(about, "pacc")
    assert text.splitlines() == [
        "| pACC | blur, iid | alpha=1 |",
        "|---|---|---|",
        "| A | **90.0** | 80.0 |",
        r"| B | – | **85.0**\* |",
        "| C | – | – |",
        *("", "`c`; seed 0; h; d; commit abc."),
    ]
    with pytest.raises(ValueError, match="column='no'"):
        results.across(about, "no")
    (tmp_path / "r.json").write_text(json.dumps(about))
    marked = "<!-- across: r.json pacc -->\n{}<!-- end -->\n"
    assert results.rewritten(marked.format("old"), tmp_path) == marked.format(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (151840.0, "151,840"),
        (98.67, "98.67"),
        (-0.9, "-0.9"),
        (93.6, "93.6"),
    ],
)
def test_numbers_are_short(value, text):
    assert results.number(value) == text


def test_a_deviation_has_the_digits_of_its_mean():
    assert results.spread(dict(mean=0.9, std=0.0057)) == "0.900 ± 0.006"
    assert results.spread(dict(mean=95.0, std=0.0057)) == "95.00 ± 0.01"
    assert results.spread(dict(mean=1e-4, std=0.0)) == "1.0e-04"
    assert results.spread(dict(mean=90.0, std=None)) == "90.00"
    assert results.spread(dict(mean=14811.0, std=0.3)) == "14,811"
    assert results.spread(dict(mean=14811.0, std=3.0)) == "14,811 ± 3"


def test_a_record_names_files_and_no_folder_of_a_machine():
    told = {
        "command": "hyperjax sweep --sweep=writers:/a/b.c/ids.npz:key --config=e/f.py",
        "rows": [{"data.client_ids": "/a/ids.npz:key", "n": 3}, "0.5/s"],
    }
    assert record.without_folders(told) == {
        "command": "hyperjax sweep --sweep=writers:ids.npz:key --config=e/f.py",
        "rows": [{"data.client_ids": "ids.npz:key", "n": 3}, "0.5/s"],
    }


def test_table_iv_of_older_runs():
    row = {"curve": {"0": 40.0, "2": 70.0, "4": 60.0, "6": 60.0}, "cpr": 2_000_000}
    # The last accuracy was first met after the third round.
    assert table_iv.to_final(row) == 6.0
    older = json.loads(table_iv.OLDER.read_text(encoding="utf-8"))
    found = json.loads((results.RECORDS / "hyperfednet_table_iv.json").read_text())
    assert json.loads(json.dumps(table_iv.record(older))) == found
    fused = found["rows"][0]
    assert fused["label"] == "HFN" and fused["settings"] == "mnist, Dirichlet(0.5)"
    assert fused["published"] == {"gain": -1.02, "communication": 15.15}
