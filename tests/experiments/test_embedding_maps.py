"""Embeddings over rounds: what is kept of them, and the maps."""

import base64
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from made_runs import make_run, undrawn

from hyperjax.data import picture
from hyperjax.launch import embedding_maps, report, workdir


def values(scale: float, ours: int = 3, unseen: int = 2, size: int = 2):
    rng = np.random.default_rng(0)
    return {
        "pacc": {"embedding": scale * rng.normal(size=(ours, size)).astype("f4")},
        "zacc": {"embedding": scale * rng.normal(size=(unseen, size)).astype("f4")},
        "gacc": {"accuracy": np.ones(1)},
    }


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A folder with embeddings of eight rounds."""
    for t in range(8):
        embedding_maps.keep(tmp_path, 5 * t, values(1.0 + t), 10)
    return tmp_path


def test_embeddings_are_kept_by_client_and_round(kept: Path) -> None:
    records = embedding_maps.read(kept)
    assert [record["round"] for record in records] == list(range(0, 40, 5))
    assert records[3]["client"] == [0, 1, 2, 10, 11]
    assert records[3]["participating"] == [True] * 3 + [False] * 2
    expected = np.concatenate([values(4.0)[m]["embedding"] for m in ("pacc", "zacc")])
    np.testing.assert_allclose(records[3]["embedding"], expected, rtol=1e-5)


def test_a_run_that_goes_on_keeps_what_is_before(kept: Path) -> None:
    with open(kept / workdir.EMBEDDINGS, "a") as file:
        file.write('{"round": 40, "cli')  # a kill
    embedding_maps.begin(kept, 20)
    embedding_maps.keep(kept, 20, values(9.0), 10)  # evaluated once more
    records = embedding_maps.read(kept)
    assert [record["round"] for record in records] == [0, 5, 10, 15, 20]
    assert records[-1]["embedding"][0][0] == pytest.approx(
        9 * records[0]["embedding"][0][0], rel=1e-4
    )
    embedding_maps.begin(kept, -1)
    assert embedding_maps.read(kept) == []


def test_an_embedding_is_kept_by_whichever_name_it_has(tmp_path: Path) -> None:
    given = values(2.0)
    for metric in ("pacc", "zacc"):
        given[metric]["shift_embedding"] = given[metric].pop("embedding")
    embedding_maps.keep(tmp_path, 0, given, 10)
    embedding_maps.keep(tmp_path, 5, values(2.0), 10)
    first, second = embedding_maps.read(tmp_path)
    assert {**first, "round": 5} == second


def test_methods_without_embeddings_leave_no_file(tmp_path: Path) -> None:
    embedding_maps.begin(tmp_path, 5)
    embedding_maps.keep(tmp_path, 0, {"pacc": {"accuracy": np.ones(3)}}, 3)
    assert not list(tmp_path.iterdir()) and embedding_maps.read(tmp_path) == []


def test_of_many_clients_some_are_kept_by_their_own_numbers(tmp_path: Path) -> None:
    whom = {"pacc": np.arange(0, 1000, 7), "zacc": np.array([3, 8])}
    embedding_maps.keep(tmp_path, 0, values(1.0, 143), 1000, whom)
    (record,) = embedding_maps.read(tmp_path)
    most = embedding_maps.MOST
    assert record["client"] == [*range(0, 7 * most, 7), 1003, 1008]
    assert len(record["embedding"]) == most + 2


def test_rounds_that_are_not_finite_are_left_out(kept: Path) -> None:
    broken = values(1.0)
    broken["zacc"]["embedding"][0, 1] = np.nan
    embedding_maps.keep(kept, 40, broken, 10)
    assert len(embedding_maps.read(kept)) == 8


def test_a_client_is_where_it_was_up_to_a_turn(kept: Path) -> None:
    """Of two numbers the main components are a turn of them: distances stay."""
    records = embedding_maps.read(kept)
    figure = embedding_maps.picture(records)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [f"round {t}" for t in (0, 5, 15, 20, 30, 35)]
    first, last = (
        np.array([line.get_xydata()[0] for line in figure.axes[i].get_lines()])
        for i in (0, -1)
    )
    np.testing.assert_allclose(
        np.linalg.norm(last[0] - last[4]),
        np.linalg.norm(np.subtract(*np.array(records[-1]["embedding"])[[0, 4]])),
    )
    np.testing.assert_allclose(last[1] - last[2], 8 * (first[1] - first[2]), rtol=1e-4)


def test_a_client_keeps_its_colour_and_unseen_ones_have_another_mark(
    kept: Path,
) -> None:
    figure = embedding_maps.picture(embedding_maps.read(kept))
    by_panel = [axis.get_lines() for axis in figure.axes]
    for lines in zip(*by_panel, strict=True):
        assert len({tuple(line.get_color()) for line in lines}) == 1
    assert len({tuple(line.get_color()) for line in by_panel[0]}) == 5
    assert [line.get_marker() for line in by_panel[0]] == ["o"] * 3 + ["^"] * 2
    (legend,) = figure.legends
    words = [text.get_text() for text in legend.get_texts()]
    assert words == ["0", "1", "2", "10", "11"]


def test_of_many_clients_the_legend_names_the_two_kinds(tmp_path: Path) -> None:
    embedding_maps.keep(tmp_path, 0, values(1.0, 40), 40)
    (legend,) = embedding_maps.picture(embedding_maps.read(tmp_path)).legends
    words = [text.get_text() for text in legend.get_texts()]
    assert words == ["participating", "unseen"]


def test_one_component_is_enough(tmp_path: Path) -> None:
    embedding_maps.keep(tmp_path, 0, values(1.0, size=1), 3)
    svg = picture.figure_svg(embedding_maps.picture(embedding_maps.read(tmp_path)))
    assert "component 2 (0 %)" in svg


def test_the_page_of_a_run_shows_the_maps(tmp_path: Path) -> None:
    run = Path(make_run(tmp_path / "run"))
    for t in range(3):
        embedding_maps.keep(run, t, values(1.0 + t, size=6), 10)
    text = Path(report.run_report(str(run))).read_text()
    assert "Embeddings over rounds" in text
    packed = text.partition('class="svg">')[2].partition("<")[0]
    assert "round 2" in gzip.decompress(base64.b64decode(packed)).decode()
    assert "embeddings.jsonl" in text  # among its files
    same = json.loads((run / workdir.EMBEDDINGS).read_text().splitlines()[0])
    same["embedding"] = [[0.5] * 6] * 5
    lines = [json.dumps({**same, "round": t}) + "\n" for t in range(3)]
    (run / workdir.EMBEDDINGS).write_text("".join(lines))
    with undrawn():
        text = Path(report.run_report(str(run))).read_text()
    assert "Embeddings over rounds" not in text
