"""Data of one's own: every form is read, or refused by name."""

import importlib
import json

import numpy as np
import pytest

from hyperjax import protocols
from hyperjax.data import own, sources
from hyperjax.data.federation import federate
from hyperjax.launch import build
from hyperjax.protocols import common

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (60, 6, 5), np.uint8)
Y = np.arange(60) % 3
NAMES = np.array(["ant", "bee", "cow"])
USERS = np.arange(60) // 10


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def check(source, num=60, x=X, y=Y):
    assert source.x.shape == (num, 6, 5, 1) and source.num_classes == 3
    np.testing.assert_array_equal(source.x[..., 0], x)
    np.testing.assert_array_equal(source.y, y)


@pytest.mark.parametrize("keys", [("image", "label"), ("x", "y"), ("data", "target")])
def test_an_npz_file_is_read_by_its_usual_names(keys, here):
    np.savez("mine.npz", **dict(zip(keys, (X, Y), strict=True)))
    check(sources.load("mine.npz"))
    check(sources.load(str(here / "mine.npz"), split="train+test"))


def test_arrays_of_other_names_are_named(here):
    np.savez("mine.npz", pictures=X, species=NAMES[Y], farm=USERS)
    keys = sources.Keys("pictures", "species", "farm")
    found = sources.load("mine.npz", keys=keys)
    check(found)
    assert found.label_names == tuple(NAMES)
    np.testing.assert_array_equal(found.client_ids, USERS)


def test_floats_stay_floats_through_every_scaling(here):
    np.savez("mine.npz", image=X / 255, label=Y)
    found = sources.load("mine.npz")
    assert found.x.dtype == np.float32
    assert sources.resize(found, 3).x.max() <= 1
    even = found._replace(x=found.x[:, :, :4])
    halves = sources.shrink(even, 2).x[..., 0]
    expected = (X[:, :, :4] / 255).reshape(60, 3, 2, 2, 2).mean((2, 4))
    np.testing.assert_allclose(halves, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "keys", [("x_train", "y_train", "x_test", "y_test"), ("x", "y", "x_test", "y_test")]
)
def test_a_test_part_is_the_global_test_set(keys, here):
    arrays = (X[:50], NAMES[Y[:50]], X[50:], NAMES[Y[50:]])
    np.savez("mine.npz", **dict(zip(keys, arrays, strict=True)))
    found = sources.load("mine.npz")
    check(found)
    dealt = federate(found, num_clients=2, num_novel=1, test_fraction=0.5)
    (rows,) = dealt.test.rows
    assert set(rows[: dealt.test.size[0]]) == set(range(50, 60))
    assert dealt.counts.sum() == 50
    assert sources.load("mine.npz", split="train+test").test is None


def pictures(root, x=X, y=NAMES[Y]):
    image = pytest.importorskip("PIL.Image")
    for i, (pixels, cls) in enumerate(zip(x, y, strict=True)):
        (root / cls).mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels).save(root / cls / f"{i:03d}.png")


def test_a_folder_of_images_is_read_by_class(here):
    pictures(here / "zoo")
    (here / "zoo" / "readme.txt").write_text("of animals")
    order = np.argsort(Y, kind="stable")
    check(sources.load("zoo/"), x=X[order], y=Y[order])


def test_a_folder_may_have_a_test_part(here):
    pictures(here / "zoo" / "train", X[:50], NAMES[Y[:50]])
    pictures(here / "zoo" / "test", X[50:], NAMES[Y[50:]])
    assert sources.load("zoo/").test.sum() == 10


def test_images_of_many_sizes_and_colours_are_made_alike(here):
    image = pytest.importorskip("PIL.Image")
    pictures(here / "zoo")
    wide = np.full((3, 9, 3), (200, 100, 0), np.uint8)
    image.fromarray(wide).save(here / "zoo" / "cow" / "wide.jpg", quality=100)
    with pytest.raises(ValueError, match=r"2 sizes, from 3x9 to 6x5: data.resize=32"):
        sources.load("zoo/")
    found = sources.load("zoo/", size=4)
    assert found.x.shape == (61, 4, 4, 3) and found.x.dtype == np.uint8
    grey, coloured = found.x[0], found.x[-1]
    assert (grey[..., :1] == grey).all()
    assert np.abs(coloured.astype(int) - (200, 100, 0)).max() < 8


def test_a_function_may_return_any_of_these(here):
    np.savez(here / "arrays.npz", x=X, y=Y)
    (here / "my_animals.py").write_text(
        "import numpy as np\n"
        "from hyperjax import Source\n"
        "file = np.load('arrays.npz')\n"
        "x, y = file['x'], file['y']\n"
        "def pair(): return x, y\n"
        "def parts(): return (x[:50], y[:50]), (x[50:], y[50:])\n"
        "def named(): return {'image': x, 'label': y}\n"
        "def source(): return Source('zoo', x[..., None], y, 3, ('a', 'b', 'c'))\n"
        "def number(): return 3\n"
        "nothing = 3\n"
    )
    for name in ("pair", "parts", "named", "source"):
        found = sources.load(f"my_animals:{name}")
        check(found)
        assert (found.test is not None) == (name == "parts")
    for name, match in (
        ("number", "returns int; accepted: a pair"),
        ("nothing", "is int: no function"),
        ("cats", "expected package.module:function"),
    ):
        with pytest.raises(ValueError, match=f"my_animals:{name}.*{match}"):
            sources.load(f"my_animals:{name}")


def test_a_set_of_the_hub_is_pointed_to_by_its_name():
    with pytest.raises(ValueError, match=r"hf:mnist.*written 'huggingface:mnist'"):
        sources.load("hf:mnist")


# Divided already ---------------------------------------------------------------------


def rows(table):
    return [set(r[:n]) for r, n in zip(table.rows, table.size, strict=True)]


def test_an_id_of_every_sample_makes_the_clients(here, monkeypatch):
    np.savez("mine.npz", image=X, label=Y, user=USERS)
    config = protocols.find("zero_shot").get_config("fedavg,data=mine.npz")
    config.data.update(
        client_key="user",
        partition="by_client_id",
        num_clients=4,
        num_novel=2,
        min_size=2,
    )
    dealt = build.federate(build.load_source(config.data), config)
    assert dealt.num_clients == 4
    for own_rows in rows(dealt.train) + rows(dealt.novel):
        assert len({USERS[row] for row in own_rows}) == 1
    assert federate(build.load_source(config.data)).num_clients == 6  # by ids
    said = []
    monkeypatch.setattr(build.logging, "warning", lambda *text: said.append(text))
    config.data.update(partition="iid")
    build.federate(build.load_source(config.data), config)
    ((text, _, ids, name),) = said
    assert "by_client_id leaves them" in text and (ids, name) == (6, "iid")
    config.data.update(client_key="", partition="by_client_id")
    with pytest.raises(ValueError, match=r"needs data.client_ids.*or data.client_key"):
        build.federate(build.load_source(config.data), config)


def test_who_has_too_few_samples_is_not_drawn():
    ids = np.r_[np.zeros(58, int), 1, 2]
    with pytest.raises(ValueError, match="3 distinct ids, of which 1 have 5 samples"):
        federate(X, Y, num_clients=2, partition="by_client_id", client_ids=ids,
                 min_size=5)  # fmt: skip


def parts(n, test=0):
    """Of n users, those with test samples or without."""
    found = {}
    for user in range(n):
        mine = np.flatnonzero(user == USERS)
        cut = len(mine) - test
        pairs = [(X[mine[:cut]], Y[mine[:cut]]), (X[mine[cut:]], Y[mine[cut:]])]
        found[f"u{user}"] = tuple(pairs) if test else pairs[0]
    return found


def check_own_parts(dealt):
    assert dealt.num_clients == 4 and dealt.num_novel == 2 and dealt.test is None
    assert dealt.held_out.size.tolist() == [3] * 4
    assert dealt.train.size.tolist() == [7] * 4
    assert dealt.novel_held_out.size.tolist() == [3] * 2
    train = np.asarray(dealt.pool.x)[dealt.train.rows[0, :7], ..., 0]
    np.testing.assert_array_equal(np.sort(train, 0), np.sort(X[:7], 0))


def test_clients_in_a_dict_keep_what_is_theirs():
    assert federate(parts(6), num_novel=1).num_clients == 5
    check_own_parts(federate(parts(6, test=3), num_novel=2))
    named = {
        user: dict(x=x, y=y, x_test=a, y_test=b)
        for user, ((x, y), (a, b)) in parts(6, test=3).items()
    }
    check_own_parts(federate(named, num_novel=2))


def test_clients_in_files_keep_what_is_theirs(here):
    for user, pairs in parts(6, test=3).items():
        for part, (x, y) in zip(("train", "test"), pairs, strict=True):
            (here / "clients" / part).mkdir(parents=True, exist_ok=True)
            np.savez(here / "clients" / part / f"{user}.npz", image=x, label=y)
    found = sources.load("clients/", split="train+test")
    check_own_parts(federate(found, num_novel=2, partition="by_client_id"))


def test_leafs_format_is_read(here, caplog):
    for part, k in (("train", 0), ("test", 1)):
        data = {
            user: dict(x=(pair[k][0] / 255).tolist(), y=pair[k][1].tolist())
            for user, pair in parts(6, test=3).items()
        }
        data["none" if part == "train" else "late"] = (
            dict(x=[], y=[]) if part == "train" else data["u0"]
        )
        (here / "leaf" / part).mkdir(parents=True)
        content = dict(users=[*data], user_data=data)
        (here / "leaf" / part / "all.json").write_text(json.dumps(content))
    dealt = federate(sources.load("leaf/"), num_novel=2, partition="by_client_id")
    said = "clients without training samples are left out, 2: late, none"
    assert [said in r.getMessage() for r in caplog.records] == [True]
    assert dealt.held_out.size.tolist() == [3] * 4 and dealt.test is None
    assert dealt.pool.x.dtype == np.float32
    alone = sources.load("leaf/train/all.json")
    assert len(set(alone.client_ids)) == 6 and alone.test is None


def test_several_sets_are_domains(here):
    for name in ("amazon", "webcam"):
        np.savez(f"office_{name}.npz", image=X, label=Y)
    found = sources.load("office_{amazon,webcam}.npz")
    check(found, 120, np.r_[X, X], np.r_[Y, Y])
    domains = ["office_amazon.npz"] * 60 + ["office_webcam.npz"] * 60
    assert found.client_ids.tolist() == domains
    np.savez("office_dslr.npz", image=X, label=Y + 5)
    with pytest.raises(ValueError, match=r"differ in their label names: .*'5', '6'"):
        sources.load("office_{amazon,dslr}.npz")


@pytest.mark.parametrize("name", ["{a,b", "a,b}", "{a,}", "{}", "{{a},b}"])
def test_braces_say_several_names(name):
    with pytest.raises(ValueError, match="braces have names with commas between"):
        own.expand(name)


# What cannot be read -----------------------------------------------------------------

FAULTS = {
    "nowhere.npz": "there is no file 'nowhere.npz'",
    "nowhere/": "there is no such folder",
    "nowhere.json": "there is no such file",
    "alone.npy": r"one array.*numpy.savez\('mine.npz', image=x, label=y\)",
    "text.npz": "cannot be read as .npy or .npz",
    "unnamed.npz": r"no array of images by a usual name.*data.image_key: a, b",
    "labelless.npz": r"no array of labels by a usual name.*data.label_key: x, b",
    "short.npz": r"short.npz', x='x', y='y': there are 60 samples and 55 labels",
    "half.npz": "'x_test' without its counterpart",
    "other.npz": r"the test part has the shape \(5, 4, 4\)",
    "uneven.npz": "lengths differ: 'x_test' has 5, 'y_test' has 4",
    "truth.npz": "x is bool.*images must be uint8",
    "halves.npz": "labels must be integers or names",
    "empty/": "neither folders of images.*nor .npz or .json files",
    "broken/": "0.png' cannot be read",
    "clients/": r"samples of client 'b' are uint8 of shape \(4, 4\)",
    "leafless/": "is not LEAF's JSON, with user_data",
    "run/": r"is the folder of a run, which hyperjax\.load_run reads",
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_no_data_set_is_refused_by_name(name, here):
    small = X[:5, :4, :4]
    content = {
        "unnamed.npz": dict(a=X, b=Y),
        "labelless.npz": dict(x=X, b=Y),
        "short.npz": dict(x=X, y=Y[:-5]),
        "half.npz": dict(x=X, y=Y, x_test=X),
        "other.npz": dict(x=X, y=Y, x_test=small, y_test=Y[:5]),
        "uneven.npz": dict(x=X, y=Y, x_test=X[:5], y_test=Y[:4]),
        "truth.npz": dict(x=X > 9, y=Y),
        "halves.npz": dict(x=X, y=Y / 2),
    }
    if name in content:
        np.savez(name, **content[name])
    for folder in ("empty", "broken/a", "clients", "leafless", "run/checkpoints"):
        (here / folder).mkdir(parents=True)
    np.save("alone.npy", X)
    (here / "text.npz").write_text("0 1")
    (here / "broken/a/0.png").write_text("no picture")
    np.savez("clients/a.npz", x=X, y=Y)
    np.savez("clients/b.npz", x=small, y=Y[:5])
    (here / "leafless/a.json").write_text('{"users": []}')
    with pytest.raises((ValueError, FileNotFoundError), match=FAULTS[name]) as caught:
        sources.load(name)
    assert name.strip("/").partition(".")[0] in str(caught.value) or "client" in name


@pytest.mark.parametrize(
    ("option", "match"),
    [
        (dict(split="validation"), "data.split='validation' is unknown"),
        (dict(test_split="validation"), "data.test_split='validation' is unknown"),
        (dict(keys=sources.Keys("pixels")), "data.image_key of 'mine.npz'='pixels'"),
        (dict(keys=sources.Keys(label="z")), "data.label_key of 'mine.npz'='z'"),
        (dict(keys=sources.Keys(client="z")), "data.client_key of 'mine.npz'='z'"),
    ],
)
def test_options_of_files_are_checked(option, match, here):
    np.savez("mine.npz", image=X, label=Y)
    with pytest.raises(ValueError, match=match):
        sources.load("mine.npz", **option)


def test_embedded_sets_have_no_names_to_choose_from():
    with pytest.raises(ValueError, match=r"client='writer'.*'digits' has no names"):
        sources.load("digits", keys=sources.Keys(client="writer"))


def test_a_folder_by_a_bare_name_is_pointed_to(here):
    pytest.importorskip("tensorflow_datasets")
    (here / "zoo").mkdir()
    with pytest.raises(ValueError, match=r"of your own: file.npz.*write 'zoo/'"):
        sources.load("zoo", data_dir=str(here))


def test_a_hub_without_its_package_names_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"'huggingface:mnist'.*pip install datasets"):
        sources.load("huggingface:mnist")


# Configs -----------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", protocols.NAMES)
def test_every_experiment_takes_a_file(experiment, here):
    np.savez("mine.npz", image=X, label=Y)
    get = protocols.find(experiment).get_config
    by_argument, by_flag = get("data=mine.npz"), get("data=mnist5k")
    by_flag.data.name = "mine.npz"
    assert common.flat(by_argument) == common.flat(by_flag)
    config = common.filled(by_argument)
    assert config.data.name == str(here / "mine.npz")
    check(build.load_source(config.data))


def test_networks_for_larger_images_say_what_helps():
    config = protocols.find("pfedhn").get_config("data=mnist5k")
    with pytest.raises(ValueError, match=r"data.resize=32 would make them 32x32"):
        build.make_model(config, (8, 8, 1), 3)
    build.make_model(config, (32, 32, 1), 3)


def write_csv(path, **columns):
    rows = zip(*columns.values(), strict=True)
    lines = [",".join(columns), *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def test_a_csv_file_is_a_table(here):
    width, height = RNG.normal(size=(2, 60)).astype(np.float32)
    table = dict(width=width, farm=NAMES[Y], height=height, label=NAMES[Y])
    write_csv(here / "mine.csv", **table)
    found = sources.load("mine.csv", keys=sources.Keys(client="farm"))
    np.testing.assert_allclose(found.x, np.stack([width, height], 1), rtol=1e-6)
    assert found.x.dtype == np.float32 and found.label_names == tuple(NAMES)
    np.testing.assert_array_equal(found.y, Y)
    np.testing.assert_array_equal(found.client_ids, NAMES[Y])
    with pytest.raises(ValueError, match=r"'farm' is text among 2 others.*client_key"):
        sources.load("mine.csv")
    texts = [f"{name} {i}" for i, name in enumerate(NAMES[Y])]
    write_csv(here / "texts.csv", text=texts, y=Y)
    found = sources.load("texts.csv")
    assert bytes(found.x[0].tolist()).rstrip(b"\0").decode() == "ant 0"


def test_images_may_be_rows_of_a_csv_file(here):
    x = RNG.integers(0, 256, (60, 16))
    columns = {f"pixel{i}": x[:, i] for i in range(16)}
    write_csv(here / "mine.csv", label=Y, **columns)
    found = sources.load("mine.csv", keys=sources.Keys(kind="images"))
    assert found.x.dtype == np.uint8
    np.testing.assert_array_equal(found.x, x.reshape(60, 4, 4, 1))
    assert sources.load("mine.csv").x.dtype == np.float32  # features


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a,b\n1,2\n", "no array of labels by a usual name.*label_key: a, b"),
        (",a,label\n0,1,2\n", "column 1 has no name.*index=False"),
        ("a,label\n1,2\n,3\n,4\n", "column 'a' has no value in row 2 and 1 others"),
        ("label\n1\n", "no column beside 'label'"),
        ("", "cannot be read as CSV"),
        ("a,label\n1,0.5\n", "y='label': y is float64; labels must be"),
    ],
)
def test_what_is_no_table_is_refused_by_name(text, match, here):
    (here / "mine.csv").write_text(text)
    with pytest.raises(ValueError, match=match):
        sources.load("mine.csv")
    with pytest.raises(FileNotFoundError, match=r"no file 'other\.csv'"):
        sources.load("other.csv")


@pytest.mark.parametrize(
    "y",
    [["a", None, "b", ""], ["a", float("nan"), "b", None], [0, np.nan, 1, np.nan]],
)
def test_what_is_missing_is_refused_where_it_is(y, here):
    x, whole = X[:4], [0, 1, 0, 1]
    where = r"2 of 4 values are missing, at 1, 3 \(counted from 0\)"
    with pytest.raises(ValueError, match=f"^y: {where}"):
        federate(x, y)
    with pytest.raises(ValueError, match=r"^client_ids: 2 of 4 values are missing"):
        federate(x, whole, client_ids=y)
    with pytest.raises(ValueError, match="client 'me', labels: 2 of 4 values"):
        federate({"me": (x, y)})
    (here / "holes.py").write_text(
        "import numpy as np\n\n\ndef load():\n"
        "    return dict(x=np.zeros((4, 6, 5), 'uint8'), y=GIVEN)\n"
    )
    holes = importlib.import_module("holes")
    holes.GIVEN = y
    with pytest.raises(ValueError, match="'holes:load', 'y': 2 of 4 values"):
        sources.load("holes:load")


def test_pandas_objects_are_taken_or_refused():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"a": [1, 2, 3], "b": [0.5, 1.0, 2.0]})
    y = pandas.Series(["ant", "bee", "ant"])
    found = sources.from_arrays(table, y)
    assert found.x.shape == (3, 2) and found.x.dtype == np.float32
    assert sources.from_arrays(table[["a"]], y).x.dtype == np.float32
    with pytest.raises(ValueError, match="columns 'c' are no numbers"):
        sources.from_arrays(table.assign(c=["x", "y", "z"]), y)
    for labels in (
        pandas.Series([0, 1, None], dtype="Int64"),
        pandas.Series(["a", "b", None], dtype="string"),
        pandas.Series(["a", "b", None], dtype="category"),
    ):
        with pytest.raises(ValueError, match=r"^y: 1 of 3 values are missing, at 2"):
            sources.from_arrays(table, labels)
