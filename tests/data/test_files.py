"""Arrays in files: whatever is wrong with one, its name is in the message."""

import numpy as np
import pytest

from hyperjax.data import files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files of every kind; also the home and the working folder."""
    np.save(tmp_path / "ids.npy", np.arange(5))
    np.savez(tmp_path / "two sets.npz", users=np.arange(5), days=np.arange(3))
    np.save(tmp_path / "objects.npy", np.array([{}, None], object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", users=np.array([{}, None], object))
    (tmp_path / "empty.npy").touch()
    (tmp_path / "empty.npz").touch()
    (tmp_path / "text.npy").write_text("0\n1\n")
    whole = (tmp_path / "two sets.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.npy").write_bytes((tmp_path / "ids.npy").read_bytes()[:-9])
    (tmp_path / "folder.npy").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("start", ["", "./", "~/", "{}/", "../{.name}/"])
@pytest.mark.parametrize("name", ["ids.npy", "two sets.npz:users"])
def test_paths_are_read_as_people_type_them(start, name, folder):
    found = files.read_array(start.format(folder) + name, "ids")
    np.testing.assert_array_equal(found, np.arange(5))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("empty.npy", "cannot be read as .npy or .npz"),
        ("empty.npz:users", "cannot be read as .npy or .npz"),
        ("text.npy", "cannot be read as .npy or .npz"),
        ("cut.npy", "cannot be read as .npy or .npz"),
        ("cut.npz:users", "cannot be read as .npy or .npz"),
        ("objects.npy", "without objects"),
        ("objects.npz:users", "without objects"),
        ("ids.npy.npz:users", "there is no file 'ids.npy.npz'"),
        ("folder.npy", "there is no file 'folder.npy'"),
        ("nowhere.npy", "there is no file 'nowhere.npy'"),
        ("two sets.npz", "accepted: two sets.npz:users, two sets.npz:days"),
        ("two sets.npz:", "accepted: two sets.npz:users, two sets.npz:days"),
        ("two sets.npz:user", "did you mean 'users'"),
    ],
)
def test_what_cannot_be_read_is_named(name, match, folder):
    with pytest.raises((ValueError, FileNotFoundError), match=match) as caught:
        files.read_array(name, "data.client_ids")
    message = str(caught.value)
    assert "data.client_ids" in message
    if "user" not in match:
        assert name.partition(":")[0] in message
