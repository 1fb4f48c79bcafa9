"""Figures for a paper: what is drawn, and that equal results give equal files."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
from made_runs import make_run
from PIL import Image

from hyperjax.sweeps import figures, long, statistics, tables

BY = ["method", "data.alpha"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two methods x three settings x two seeds: their tables."""
    folder = tmp_path_factory.mktemp("sweep")
    for i, method in enumerate(("fedavg", "hyperfedzero")):
        for alpha in (0.1, 1.0, 10.0):
            for seed in range(2):
                make_run(
                    folder / f"{method}{alpha}{seed}",
                    method=method,
                    rounds=8,
                    seed=seed,
                    shift=-4.0 * seed - 6 * i,
                    settings={"data.alpha": alpha},
                )
    points = long.points(folder)
    table = long.table_of(points)
    return table, long.last(points, table), long.clients_of(points)


@pytest.fixture(scope="module")
def drawn(results):
    return dict(figures.all_of(*results, BY))


def test_there_is_a_figure_for_everything_there_is(drawn):
    assert list(drawn) == [
        *("curves_round", "curves_bytes", "curves_seconds", "by_data_alpha"),
        *("clients", "pacc_zacc"),
    ]


def test_curves_are_means_with_the_deviation_over_seeds(drawn, results):
    pacc = drawn["curves_bytes"].axes[1]
    assert pacc.get_title() == "pACC, %" and "bytes" in pacc.get_xlabel()
    line = pacc.get_lines()[0]
    # Rounds 0, 4 and 8 at 12000 bytes each.
    assert list(line.get_xdata()) == [0, 48000, 96000]
    table = results[0]
    last = table[(table["metric"] == "pacc") & (table["round"] == 8)]
    first = last[(last["method"] == "fedavg") & (last["data.alpha"] == 0.1)]["value"]
    assert line.get_ydata()[-1] == pytest.approx(first.mean())
    band = pacc.collections[0].get_paths()[0].vertices
    top = band[band[:, 0] == 96000][:, 1].max()
    assert top == pytest.approx(first.mean() + np.std(first, ddof=1))
    (legend,) = drawn["curves_bytes"].legends
    title = legend.get_title().get_text()
    assert title == "mean over 2 seeds; band: ± sample deviation (n - 1)"
    words = [text.get_text() for text in legend.get_texts()]
    assert words == ["fedavg", "hyperfedzero", "alpha=0.1", "alpha=1", "alpha=10"]


def test_groups_of_different_numbers_of_seeds_say_so(results):
    wide = results[1].iloc[:-1]
    said = figures._over_seeds(wide, BY, "bars")
    assert said.startswith("mean over 1 to 2 seeds")
    assert figures._over_seeds(wide[wide["seed"] == 0], BY, "bars") == "one seed"


def test_bytes_that_lie_decades_apart_have_a_logarithmic_axis(drawn, results):
    assert drawn["curves_bytes"].axes[0].get_xscale() == "linear"
    table, wide, _ = results
    table = table.copy()
    table.loc[table["method"] == "hyperfedzero", "bytes"] *= 100
    look = figures.looks(statistics.groups_of(wide, BY))
    figure = figures.curves(table, BY, ["pacc"], "bytes", look)
    axis = figure.axes[0]
    assert axis.get_xscale() == "log"
    assert min(axis.get_lines()[0].get_xdata()) == 48000  # not 0


def test_a_swept_number_has_a_logarithmic_axis_where_its_values_say_so(drawn):
    axis = drawn["by_data_alpha"].axes[0]
    places = axis.transData.transform([(v, 50.0) for v in (0.1, 1.0, 10.0)])[:, 0]
    np.testing.assert_allclose(*np.diff(places), rtol=1e-6)
    assert axis.get_xlabel() == "data.alpha"
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0.1", "1", "10"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 10], 1),
        ([0, 1, 2], None),
        ([-1, 1, 10], None),
        ([1, 2], None),
        ([0.1, 10], 0.1),
        ([10, 20, 30], None),
        ([0], None),
    ],
)
def test_from_where_on_an_axis_is_logarithmic(values, expected):
    assert figures.logarithmic_from(values) == expected


def test_groups_stand_beside_each_other_at_every_value():
    for values in ([0, 0.01, 0.1, 1], [0.01, 0.1, 1], [1, 2, 3]):
        left, right = (figures._beside(values, values, i, 2) for i in (0, 1))
        assert np.all(np.array(left) < values) and np.all(np.array(right) > values)


def test_groups_look_different():
    sizes = [{"method": "a", "size": v} for v in (2, 4, 8, 16)]
    scale = figures.looks(sizes)
    assert len({look.color for look in scale.of.values()}) == 4
    assert {look.line for look in scale.of.values()} == {"-"}
    many = figures.looks([{"method": f"m{i}"} for i in range(20)])
    assert len(set(many.of.values())) == 20
    uneven = [{"method": m, "size": v} for m, v in (("a", None), ("b", 1), ("b", 2))]
    assert len(set(figures.looks(uneven).of.values())) == 3


def test_only_what_looks_alike_is_not_drawn(results):
    many = [{"method": f"m{i}"} for i in range(figures.MOST + 1)]
    assert figures.looks(many[:-1]).are_told and not figures.looks(many).are_told
    # Values of one number are shades, however many.
    sizes = [{"method": "a", "size": v} for v in range(2 * figures.MOST)]
    assert figures.looks(sizes).are_told
    # Against the number that two methods are swept in there are two lines.
    table, wide, clients = results
    wide = pd.concat(
        [wide.assign(**{"data.alpha": 2.0**k}) for k in range(figures.MOST)],
        ignore_index=True,
    )
    names = [name for name, _ in figures.all_of(table, wide, clients[:0], BY)]
    assert names == ["by_data_alpha"]


def test_more_groups_than_colours_have_panels_by_a_setting():
    methods = [f"m{i}" for i in range(9)]
    groups = [{"method": m, "split": v} for v in ("iid", "skewed") for m in methods]
    look = figures.looks(groups)
    assert look.apart == "split" and len(look.legend) == 9
    for value in ("iid", "skewed"):
        own = {look.of[f"{m}, split={value}"] for m in methods}
        assert len(own) == 9  # told apart in their panel
    rows = pd.DataFrame(groups)
    parts = look.panels(rows)
    assert [title for title, _ in parts] == [", split=iid", ", split=skewed"]
    assert all(len(part) == 9 for _, part in parts)
    few = figures.looks([g for g in groups if g["method"] < "m7"])
    assert few.apart is None and [title for title, _ in few.panels(rows)] == [""]


def test_the_method_of_all_is_left_out_of_the_legend():
    look = figures.looks([{"method": "a", "size": v} for v in (2, 4)])
    assert [words for words, _ in look.legend] == ["size=2", "size=4"]
    assert look.method == "a"
    look = figures.looks([{"method": "a", "size": 2}, {"method": "b", "size": 2}])
    assert [words for words, _ in look.legend] == ["a, size=2", "b, size=2"]
    assert look.method == "" == figures.looks([{"method": "a"}]).method


def test_the_method_of_all_stands_over_the_legend(results):
    table, wide, clients = (of[of["method"] == "fedavg"] for of in results)
    for name, figure in figures.all_of(table, wide, clients, BY):
        words = [t.get_text() for legend in figure.legends for t in legend.texts]
        titles = [legend.get_title().get_text() for legend in figure.legends]
        # Either over the legend, or in it where it has no other entry.
        said = [*(title.split("\n")[0] for title in titles), *words]
        assert said.count("fedavg") == len(titles), (name, said)
        if name != "by_data_alpha":
            assert all(title.startswith("fedavg\nmean over 2") for title in titles)
            assert not titles or words[0] == "alpha=0.1"
        if name == "clients":
            assert figure.get_supxlabel().startswith("fedavg; accuracy of clients")


def test_a_swept_number_is_shown_beside_what_is_sent(results):
    done = results[1].copy()
    done["down_numbers"] = 100 * done["data.alpha"].astype(float)
    axes = figures.against_field(done, BY, ["pacc"], "data.alpha").axes
    assert [axis.get_title() for axis in axes] == [
        *("pACC, %", "numbers per client and round"),
    ]
    lines = [line for line in axes[1].get_lines() if len(line.get_xdata()) == 3]
    np.testing.assert_allclose(lines[0].get_ydata(orig=False), [1010, 1100, 2000])
    # Two methods stand side by side at a value.
    a, b = (bars.lines[0].get_xdata(orig=False) for bars in axes[0].containers)
    assert np.all(a < b) and np.all(b < 1.1 * a)


@pytest.mark.slow
def test_equal_results_give_equal_files_without_a_date(results, drawn):
    table, wide, clients = results
    again = dict(figures.all_of(table, wide, clients, BY))["pacc_zacc"]
    for form in figures.FORMATS:
        content = figures.rendered(again, form)
        assert content == figures.rendered(drawn["pacc_zacc"], form)
        assert b"CreationDate" not in content and b"<dc:date>" not in content
    width = Image.open(io.BytesIO(content)).width
    assert width == pytest.approx(figures.WIDTH / 2 * 220, abs=1)


def test_long_names_lose_what_says_little():
    rest = {"data.shift": "rotation", "data.validation_fraction": 0.2}
    own = [("fedavg", ""), ("fedavg", "em"), ("flux", ""), ("feroma", "")]
    groups = [{"method": m, **rest, "evaluation.adapt": a} for m, a in own]
    names = ["fedavg", "fedavg, adapt=em", "flux", "feroma"]
    assert tables.telling(groups) == names
    # Two that would be called alike keep what they are.
    groups.append({**groups[2], "method.num": 3})
    groups = [{"method.num": None, **group} for group in groups]
    assert len(set(tables.telling(groups))) == 5


def test_a_long_legend_has_room_below_the_panel():
    tall = figures.participants_and_unseen(*many_methods(30))
    low = figures.participants_and_unseen(*many_methods(3))
    assert tall.get_figheight() > low.get_figheight() + 2


def many_methods(num):
    rows = [
        dict(
            method=f"one_of_a_long_name_{i}", seed=seed, pacc=80.0 + i, zacc=70.0 + seed
        )
        for i in range(num)
        for seed in (0, 1)
    ]
    done = pd.DataFrame(rows)
    groups = statistics.groups_of(done, ["method"])
    return done, ["method"], figures.looks(groups)
