"""`hyperjax data`: what is read and who has it, before anything is trained."""

import io
import json

import numpy as np
import pytest

from hyperjax import federate
from hyperjax.launch import data
from hyperjax.protocols import zero_shot
from hyperjax.sweeps import live


def config(name, **fields):
    found = zero_shot.get_config("fedavg,data=digits")
    found.data.name = name
    for field, value in fields.items():
        found.data[field] = value
    return found


@pytest.fixture
def look(capsys, monkeypatch):
    """Shows a data set; returns what is printed."""
    monkeypatch.setenv("COLUMNS", "80")

    def shown(*args, out=None, **fields):
        assert data.main(config(*args, **fields), out) == 0
        text = capsys.readouterr().out
        # Paths are not broken.
        assert max(map(len, text.partition("Written")[0].splitlines())) <= 80
        return text

    return shown


def test_a_table_of_what_was_read_and_a_row_for_each_client(look):
    text = look("digits", num_clients=30, num_novel=2)
    assert "read          1,797 images of 8x8x1, uint8, 0 to 255" in text
    assert "of a class    174 to 183 samples" in text
    assert "participants  30 with" in text and "unseen        2 with" in text
    assert "global test   359 samples" in text
    rows = [line for line in text.splitlines() if line.endswith(tuple("0123456789"))]
    rows = [line.split("|") for line in rows if line.count("|") == 2]
    assert [row[0].strip() for row in rows[:2]] == ["client 0", "client 1"]
    assert rows[-1][0].strip() == "unseen 31" and len(rows) == 24
    assert "client ... and 8 more" in text
    assert "█" in text


def test_training_says_the_main_rows_a_line_each(tmp_path):
    ids, x = np.arange(600) % 20, np.zeros((600, 8, 8), np.uint8)
    x[:, 0] = 7
    names = [f"a class with the long name number {k % 9}" for k in range(600)]
    kept = dict(num_clients=6, num_novel=2, test_fraction=0.0)
    found = data.brief(federate(x, names, client_ids=ids, **kept))
    lines = found.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) <= 8
    assert lines[1] == "read          600 images of 8x8x1, uint8, 0 to 7"
    assert lines[2] == "ids           20 whose samples are 30 each"
    assert lines[3].startswith("classes       9: a class") and lines[3].endswith("...")
    assert lines[4:] == [
        "participants  6 with 24 samples to train on, 144 together",
        "unseen        2 with 30 samples in all, 60 together",
        "left out      360 of 600 samples; 12 of 20 client_ids are not drawn",
    ]


def test_points_of_a_sweep_tell_what_others_have_not(capsys):
    show = live.Shown({"a": 0, "b": 0, "c": 1})
    for name, text in (("a", "digits"), ("b", "digits"), ("c", "mnist")):
        with show.point(name, 2) as progress:
            progress.say(text)
    assert capsys.readouterr().err == "digits\nmnist\n"


def test_no_more_shades_than_the_terminal_has(monkeypatch):
    assert data._levels().endswith("█")
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(data.sys, "stdout", plain)
    assert data._levels().isascii()


def test_large_images_are_averaged_and_narrow_ones_repeat():
    x = np.arange(24.0).reshape(1, 4, 6)
    found = data._averaged(data._averaged(x, 2, 1), 3, 2)
    np.testing.assert_array_equal(found, [[[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]]])
    assert data._averaged(x, 12, 2)[0, 0, :4].tolist() == [0, 0, 1, 1]


def test_tokens_are_read_where_they_are_text():
    for text in ("a line\n", "né", ""):
        tokens = [*text.encode(), 0, 0]
        assert data._read(tokens) == (repr(text) if text else str(tokens))
    for tokens in ([1, 2, 3], [300, 65], [0xC3]):
        assert data._read(tokens) == str(tokens)


def test_features_have_columns_and_texts_are_read(look):
    text = look("sklearn:wine", num_clients=3, num_novel=1)
    assert "178 rows of 13 features, float32, 0.13 to 1680" in text
    assert "... and 3 more" in text
    text = look("pydoc", partition="by_client_id", num_clients=3, num_novel=1)
    assert "ids           79 whose samples are" in text
    assert "scaled by     nothing" in text
    assert "client 0: '" in text and " -> " in text


def test_what_is_asked_for_is_written(look, tmp_path):
    out = tmp_path / "looked"
    assert "Written: " in look("digits", out=str(out), shift="rotation")
    written = sorted(path.name for path in out.iterdir())
    assert written == ["data.json", "partition.png", "samples.png"]
    found = json.loads((out / "data.json").read_text())
    assert found["shift"].startswith("rotation, angle ")
    assert np.sum(found["counts"]) == 1797 - 359


def test_mistakes_leave_nothing_behind(tmp_path):
    out = tmp_path / "looked"
    with pytest.raises(ValueError, match="shift='blur' is done to images"):
        data.main(config("sklearn:iris", shift="blur", num_novel=1), str(out))
    with pytest.raises(ValueError, match=r"data\.num_clients=0"):
        data.main(config("digits", num_clients=0), str(out))
    assert not out.exists()
