"""The partition picture: what is drawn, that it repeats, that nothing global moves."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from hyperjax.data import picture

COUNTS = np.array([[4, 0, 1], [0, 2, 0], [3, 3, 3], [0, 0, 4]])
PARTICIPATING = np.array([True, False, True, True])


def dots(figure):
    """Rows (x, y, area) of the dots, by x and y, without the legend's empty ones."""
    rows = [
        (*offset, collection.get_sizes()[0])
        for collection in figure.axes[0].collections
        if hasattr(collection, "get_sizes")
        for offset in collection.get_offsets()
    ]
    return np.array(sorted(rows))


def test_areas_are_proportional_and_participants_come_first():
    figure = picture.partition_picture(COUNTS, PARTICIPATING)
    x, y, area = dots(figure).T
    order = [0, 2, 3, 1]
    expected = COUNTS[order]
    assert np.array_equal(np.stack([x, y]), np.stack(np.nonzero(expected)))
    np.testing.assert_allclose(area / area.max(), expected[expected > 0] / 4)
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert ticks == [str(client) for client in order]


def test_legend_names_both_groups_and_the_biggest_dot():
    figure = picture.partition_picture(COUNTS, PARTICIPATING)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["participating", "not participating", "4 samples"]


@pytest.mark.parametrize(("participating", "lines"), [(PARTICIPATING, 1), ([1] * 4, 0)])
def test_a_line_separates_the_groups(participating, lines):
    figure = picture.partition_picture(COUNTS, np.array(participating, bool))
    drawn = figure.axes[0].lines
    assert len(drawn) == lines
    assert all(line.get_xdata()[0] == 2.5 for line in drawn)


def test_svg_is_one_element_with_its_text_and_repeats():
    first, again = (
        picture.partition_picture(COUNTS, PARTICIPATING, ["ant", "bee", "cow"], "Zoo")
        for _ in range(2)
    )
    text = picture.figure_svg(first)
    assert text == picture.figure_svg(first) == picture.figure_svg(again)
    assert ET.fromstring(text).tag.endswith("svg")
    assert all(f">{word}<" in text for word in ("ant", "bee", "cow", "Zoo"))
    assert "date" not in text
    assert not re.search(r'(?: x| d)="[^"]*\d\.\d{3}', text)
    named = picture.partition_picture(COUNTS, PARTICIPATING, ["0.12345", "b", "c"])
    assert ">0.12345<" in picture.figure_svg(named)


def test_png_repeats(tmp_path):
    files = [tmp_path / "first.png", tmp_path / "again.png"]
    for file in files:
        picture.figure_png(picture.partition_picture(COUNTS, PARTICIPATING), file)
    first, again = (file.read_bytes() for file in files)
    assert first == again and first.startswith(b"\x89PNG")


def test_dots_stay_apart_for_100_clients_and_100_classes():
    counts = np.full((100, 100), 7)
    figure = picture.partition_picture(counts, np.arange(100) < 80)
    axes = figure.axes[0]
    # Points between the centres of neighbours.
    pitch = np.diff(axes.transData.transform([(0, 0), (1, 0)])[:, 0])[0]
    diameter = np.sqrt(dots(figure)[:, 2].max()) * figure.dpi / 72
    assert 0.6 * pitch < diameter < pitch


def test_empty_counts_are_drawn():
    figure = picture.partition_picture(np.zeros((2, 3), int), np.zeros(2, bool))
    assert len(dots(figure)) == 0 and picture.figure_svg(figure)


@pytest.mark.parametrize(
    ("counts", "participating", "names", "match"),
    [
        (COUNTS, PARTICIPATING[:3], None, r"\(4, 3\) and \(3,\)"),
        (COUNTS[0], PARTICIPATING, None, r"counts must be \[N, K\]"),
        (COUNTS, PARTICIPATING, ["ant"], "1 label_names for 3 classes"),
    ],
)
def test_shapes_must_fit(counts, participating, names, match):
    with pytest.raises(ValueError, match=match):
        picture.partition_picture(counts, participating, names)


def test_pyplot_is_never_imported():
    code = (
        "import sys, numpy as np; from hyperjax.data import picture;"
        "assert 'matplotlib' not in sys.modules;"
        "picture.figure_svg(picture.partition_picture(np.eye(2), np.ones(2, bool)));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
