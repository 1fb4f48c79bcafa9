"""A finished run serves clients it has never seen."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_runs import undrawn
from PIL import Image

from hyperjax import rng
from hyperjax.launch import build, evaluate, fits, train, workdir
from hyperjax.protocols import zero_shot
from hyperjax.types import Outputs, Serve


@pytest.fixture(scope="module", autouse=True)
def pages():
    with undrawn():
        yield


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    config = zero_shot.get_config("data=digits")
    config.rounds = 2
    config.evaluation.every = 2
    config.evaluation.finetune_epochs = ()
    config.method.hidden, config.local.steps = (8,), 4
    config.tensorboard = False
    folder = tmp_path_factory.mktemp("served") / "run"
    train.train(config, str(folder))
    return folder


_really_load = evaluate.load_run


@pytest.fixture(scope="module")
def run(run_folder):
    return _really_load(str(run_folder))


@pytest.fixture
def read_once(run, run_folder, monkeypatch):
    """The command takes the run that the tests have read."""

    def load(path):
        assert path == str(run_folder)
        return run

    monkeypatch.setattr(evaluate, "load_run", load)


def test_an_unseen_client_gets_the_accuracy_the_run_reports(run_folder):
    assert evaluate.main(str(run_folder), None, 12, None) == 0
    result = json.loads((run_folder / "served/client_12/result.json").read_text())
    rows = json.loads((run_folder / "clients.json").read_text())
    (reported,) = [row for row in rows if row["client"] == 12]
    assert result["samples"] == reported["eval_samples"]
    assert result["zacc"] == pytest.approx(reported["accuracy"], abs=1e-3)


def test_a_client_is_told_what_participants_found_out(tmp_path):
    config = zero_shot.get_config("fedavg,data=digits,smoke")
    config.evaluation.adapt, config.data.validation_fraction = "em", 0.3
    config.tensorboard, config.model.hidden = False, (4,)
    folder = tmp_path / "run"
    train.train(config, str(folder))
    run = _really_load(str(folder))
    images, labels = evaluate.own_client(run, 12)
    served = evaluate.serve(run, images, 12)
    rows = json.loads((folder / "clients.json").read_text())
    (reported,) = [row for row in rows if row["client"] == 12]
    accuracy = 100 * np.mean(served.label == labels)
    assert accuracy == pytest.approx(reported["accuracy"], abs=1e-3)
    # It is of a round, and not of one that was never scored.
    with pytest.raises(ValueError, match="has none of round 7"):
        fits.read(folder, 7, run.algorithm.client.fit)
    (folder / workdir.FITTED).write_bytes(b"half")
    with pytest.raises(ValueError, match="the command that made the run writes both"):
        evaluate.serve(run, images, 12)
    for name in (workdir.FITTED, workdir.SUMMARY):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="what participants find out"):
        evaluate.serve(run, images, 12)
    train.train(config, str(folder))
    again = evaluate.serve(run, images, 12)
    np.testing.assert_array_equal(again.probability, served.probability)


@pytest.fixture
def served_once(monkeypatch):
    """The same inputs are served once: each time has programs of its own."""
    really, known = evaluate.serve, {}

    def serve(run, images, client=None):
        key = images.tobytes(), client
        if key not in known:
            known[key] = really(run, images, client)
        return known[key]

    monkeypatch.setattr(evaluate, "serve", serve)


def test_a_client_is_told_how_unlike_the_others_it_is(
    run, run_folder, read_once, served_once, capsys
):
    rows = json.loads((run_folder / "clients.json").read_text())
    (row,) = [row for row in rows if row["client"] == 12]
    images, _ = evaluate.own_client(run, 12)
    served = evaluate.serve(run, images, 12)
    np.testing.assert_allclose(served.about["embedding"], row["embedding"], atol=1e-5)
    surer = [r["confidence"] > row["confidence"] for r in rows if r["participating"]]
    found = evaluate.strangeness(run, served)
    assert found["less_sure_than"] == pytest.approx(100 * np.mean(surer))
    assert 0 <= found["farther_out_than"] <= 100
    stranger = served._replace(
        about={"embedding": served.about["embedding"] + 10.0},
        probability=np.full_like(served.probability, 0.1),
    )
    assert set(evaluate.strangeness(run, stranger).values()) == {100.0}
    plain = evaluate.strangeness(run, served._replace(about={}))
    assert list(plain) == ["less_sure_than"]
    assert evaluate.main(str(run_folder), None, 12, None) == 0
    assert "less sure of its outputs than" in capsys.readouterr().out


def test_a_client_is_served_with_the_keys_it_is_scored_with(run):
    images, _ = evaluate.own_client(run, 12)
    side = run.algorithm.client
    drawn = side._replace(
        adapt=lambda key, down, state, data: jax.random.normal(key),
        deploy=lambda down, noise: {"noise": noise},
        model=side.model._replace(
            apply=lambda variables, x: Outputs(
                jnp.outer(x[:, 0, 0, 0], jnp.arange(10.0))
            ),
            serve=Serve(),
        ),
    )
    run = run._replace(algorithm=run.algorithm._replace(client=drawn))
    key = rng.stream(jax.random.key(run.config.seed), "evaluate")
    key = rng.stream(jax.random.fold_in(key, run.restored.round), "adapt")
    # Somebody else has the number after all clients, as the global test set does.
    for client, number in ((12, 12), (None, 15)):
        expected = jax.random.normal(jax.random.fold_in(key, number))
        found = evaluate.serve(run, images, client).classifier["noise"]
        assert found == pytest.approx(float(expected))


def test_labels_of_a_shift_are_the_runs(tmp_path):
    config = zero_shot.get_config("fedavg,data=digits,smoke")
    config.data.shift, config.rounds = "label_swap", 0
    config.tensorboard, config.model.hidden = False, (4,)
    train.train(config, str(tmp_path / "run"))
    run = evaluate.load_run(str(tmp_path / "run"))
    _, labels = evaluate.own_client(run, 10)
    counts = run.facts["counts"]
    np.testing.assert_array_equal(np.bincount(labels, minlength=10), counts[10])


def test_the_classifier_it_writes_is_the_network_that_predicts(run, tmp_path):
    images, labels = evaluate.own_client(run, 11)
    served = evaluate.serve(run, images)
    evaluate.write(tmp_path / "out", served, labels, run)
    arrays = dict(np.load(tmp_path / "out" / "classifier.npz"))
    x = (images.astype(np.float32) / 255 - run.facts["mean"]) / run.facts["std"]
    hidden = x.reshape(len(x), -1) @ arrays["params/Dense_0/kernel"]
    hidden = np.maximum(hidden + arrays["params/Dense_0/bias"], 0)
    logits = hidden @ arrays["params/head/kernel"] + arrays["params/head/bias"]
    predictions = np.load(tmp_path / "out" / "predictions.npz")
    np.testing.assert_array_equal(predictions["label"], logits.argmax(-1))
    np.testing.assert_allclose(
        predictions["probability"], jax.nn.softmax(logits), atol=1e-4
    )


def test_labels_are_optional_and_change_nothing_but_the_score(
    run, run_folder, read_once, served_once, tmp_path
):
    images, labels = evaluate.own_client(run, 10)
    np.savez(tmp_path / "plain.npz", image=images[..., 0])
    np.savez(tmp_path / "scored.npz", image=images, label=labels)
    for name in ("plain", "scored"):
        file = str(tmp_path / f"{name}.npz")
        evaluate.main(str(run_folder), file, None, str(tmp_path / name))
    predictions = [
        dict(np.load(tmp_path / name / "predictions.npz"))
        for name in ("plain", "scored")
    ]
    np.testing.assert_array_equal(predictions[0]["label"], predictions[1]["label"])
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(pictures / f"{i:03}.png")
    evaluate.main(str(run_folder), str(pictures), None, str(tmp_path / "seen"))
    seen = dict(np.load(tmp_path / "seen/predictions.npz"))
    assert seen["name"].tolist() == [f"{i:03}.png" for i in range(len(images))]
    np.testing.assert_array_equal(seen["probability"], predictions[0]["probability"])
    assert "zacc" not in json.loads((tmp_path / "plain/result.json").read_text())
    assert "zacc" in json.loads((tmp_path / "scored/result.json").read_text())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(image=np.zeros((3, 9, 9, 1), np.uint8)), r"uint8\(n, 8, 8, 1\)"),
        (dict(image=np.zeros((3, 8, 8, 1))), "float64"),
        (dict(image=np.zeros((0, 8, 8, 1), np.uint8)), "at least 1"),
        (dict(images=np.zeros((3, 8, 8, 1), np.uint8)), "'image'"),
        (
            dict(image=np.zeros((2, 8, 8), np.uint8), label=np.array([0, 10])),
            r"0\.\.9",
        ),
        (dict(image=np.zeros((2, 8, 8), np.uint8), label=np.zeros(3, int)), "label"),
    ],
)
def test_unfit_files_are_refused_by_name(run, tmp_path, arrays, message):
    np.savez(tmp_path / "client.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        evaluate.read_inputs(str(tmp_path / "client.npz"), run)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "No data left"),
        (b"PK\x03\x04 cut off", "not a zip file"),
        (b"image,label", "pickled"),
        (
            dict(image=np.array([np.zeros((8, 8), np.uint8), None], object)),
            "Object arr",
        ),
        (dict(image=np.zeros((2, 8, 8), np.int64)), r"int64\(2, 8, 8, 1\)"),
        (dict(image=np.zeros((2, 8, 8, 3), np.uint8)), r"uint8\(2, 8, 8, 3\)"),
        (dict(image=np.uint8(3)), r"uint8\(\)"),
        (dict(image=np.zeros((2, 8, 8), np.uint8), label=np.zeros(2)), "float64"),
        (
            dict(image=np.zeros((2, 8, 8), np.uint8), label=np.array(["a", "b"])),
            "the run's",
        ),
        (
            dict(image=np.zeros((2, 8, 8), np.uint8), label=np.zeros((2, 1), int)),
            "label",
        ),
    ],
)
def test_files_of_another_kind_are_named(run, tmp_path, content, message):
    path = tmp_path / "client.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(ValueError, match=f"client.npz'.*{message}"):
        evaluate.read_inputs(str(path), run)


def test_an_unseen_client_is_not_looked_for_in_other_data(run, monkeypatch):
    source = build.load_source(run.config.data)
    for other in (
        source._replace(x=255 - source.x),
        source._replace(x=source.x[:100], y=source.y[:100]),
        source._replace(x=np.repeat(source.x, 3, axis=-1)),
    ):
        monkeypatch.setattr(build, "load_source", lambda data, other=other: other)
        with pytest.raises(ValueError, match="'digits' is not what it was"):
            evaluate.own_client(run, 12)


def test_a_place_that_cannot_be_written_is_named(
    run_folder, read_once, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("mine")

    def serve(*args):
        raise ValueError("not like this")

    for out, words in (
        ("file", "--out='.*file': '.*file' is not a folder"),
        ("file/below", "--out='.*below': '.*file' is not a folder"),
        ("new/er", "not like this"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(evaluate, "serve", serve)
            with pytest.raises(ValueError, match=words):
                evaluate.main(str(run_folder), None, 12, str(tmp_path / out))
        assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_run_of_other_random_numbers_is_not_served(run_folder):
    now = jax.config.jax_default_prng_impl
    jax.config.update("jax_default_prng_impl", "rbg")
    try:
        with pytest.raises(ValueError, match="prng_impl: threefry2x32 there"):
            evaluate.load_run(str(run_folder))
    finally:
        jax.config.update("jax_default_prng_impl", now)


def test_what_an_older_version_cannot_know_is_filled_in(run_folder, tmp_path):
    for name in ("partition.npz", "checkpoints"):
        (tmp_path / name).symlink_to(run_folder / name)
    record = json.loads((run_folder / "config.json").read_text())
    for field in ("uplink", "families", "start"):
        del record["config"][field]
    record["commit"] = "abc"
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert evaluate.load_run(str(tmp_path)).restored.round == 2
    record["config"]["method"]["gone"] = 3  # an option that there is no more
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"'gone' is unknown.*older .* commit abc"):
        evaluate.load_run(str(tmp_path))


def test_mistakes_are_named(run, run_folder, tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        evaluate.load_run(str(tmp_path))
    with pytest.raises(ValueError, match=r"10\.\.14"):
        evaluate.own_client(run, 3)
    with pytest.raises(FileNotFoundError, match="absent"):
        evaluate.read_inputs(str(tmp_path / "absent.npz"), run)
    with pytest.raises(ValueError, match="either --data"):
        evaluate.main(str(run_folder), None, None, None)


def test_the_run_is_read_without_its_data_set(run_folder, monkeypatch):
    monkeypatch.setattr(build, "load_source", None)
    images = np.zeros((3, 8, 8, 1), np.uint8)
    served = evaluate.serve(evaluate.load_run(str(run_folder)), images)
    assert served.probability.shape == (3, 10)


def test_outputs_that_are_not_finite_are_not_served(run):
    images, _ = evaluate.own_client(run, 10)
    bad = jax.tree.map(lambda x: np.full_like(x, np.nan), run.restored.carry.server)
    carry = run.restored.carry._replace(server=bad)
    run = run._replace(restored=run.restored._replace(carry=carry))
    said = rf"outputs for {len(images)} of {len(images)} inputs are not finite"
    with pytest.raises(FloatingPointError, match=said):
        evaluate.serve(run, images)


@pytest.mark.slow
def test_a_run_on_tokens_is_saved_and_serves_texts_it_never_saw(tmp_path):
    x = np.arange(160).reshape(40, 4) % 7
    np.savez(tmp_path / "mine.npz", x=x, y=np.arange(40) % 2)
    config = zero_shot.get_config("fedavg")
    config.update(rounds=0, tensorboard=False)
    config.data.update(name=str(tmp_path / "mine.npz"), kind="tokens", partition="iid")
    config.data.update(num_clients=2, num_novel=1)
    config.model.name = "gru"
    config.model.update(embedding=2, units=4)
    folder = str(tmp_path / "run")
    train.train(config, folder)
    np.savez(tmp_path / "new.npz", x=x[:3].astype(np.uint8))
    for data, client, rows in ((str(tmp_path / "new.npz"), None, 3), (None, 2, 10)):
        out = tmp_path / "out"
        assert evaluate.main(folder, data, client, str(out)) == 0
        assert json.loads((out / "result.json").read_text())["samples"] == rows


@pytest.mark.parametrize(
    ("dtype", "x", "message"),
    [
        ("int32", [[1.0, 2.0]], "x is float64: floats are no tokens"),
        ("int32", [[1]], r"`x` is int32\(1, 1\); this run takes int32\(n, 2\)"),
        ("int32", [[-1, 2]], "holds the token -1"),
        ("float32", [[1, 2]], None),
        ("int32", [[1, 2]], None),
    ],
)
def test_a_run_on_rows_takes_rows(dtype, x, message, tmp_path):
    facts = dict(sample_shape=np.array([2]), sample_dtype=np.array(dtype))
    run = SimpleNamespace(facts=facts, config=SimpleNamespace(data=None))
    path = str(tmp_path / "new.npz")
    np.savez(path, x=np.array(x))
    if message is None:
        found = evaluate.read_inputs(path, run)
        assert found["x"].dtype == dtype and found["x"].tolist() == x
        assert set(found) == {"x"}
    else:
        with pytest.raises(ValueError, match=message):
            evaluate.read_inputs(path, run)


def reads(tmp_path, names, shape=(4, 4, 1), dtype="uint8", **fields):
    """What a run of such classes and samples reads of files there."""
    facts = dict(sample_shape=np.array(shape), sample_dtype=np.array(dtype))
    data = SimpleNamespace(**{"shrink": 1, "resize": 0, **fields})
    config = SimpleNamespace(data=data)
    run = SimpleNamespace(
        facts={**facts, "label_names": np.array(names)}, config=config
    )
    return lambda name: evaluate.read_inputs(str(tmp_path / name), run)


@pytest.mark.parametrize(
    ("names", "label", "classes"),
    [
        (["cat", "dog"], ["dog", "cat", "dog"], [1, 0, 1]),
        (["cat", "dog"], [1, 0, 1], [1, 0, 1]),
        (["1", "2", "10"], [10, 1, 2], [2, 0, 1]),  # as they were numbered
        (["0", "1"], [1, 0, 1], [1, 0, 1]),
    ],
)
def test_labels_are_what_they_were_in_training(names, label, classes, tmp_path):
    x = np.zeros((3, 4, 4), np.uint8)
    np.savez(tmp_path / "new.npz", x=x, label=np.array(label))
    found = reads(tmp_path, names)("new.npz")
    assert found["label"].tolist() == classes and found["label"].dtype == np.int32


def test_images_of_other_sizes_are_scaled_as_the_runs_were(tmp_path):
    x = np.arange(128, dtype=np.uint8).reshape(2, 8, 8)
    np.savez(tmp_path / "new.npz", image=x)
    found = reads(tmp_path, "ab", shrink=2)("new.npz")["x"]
    means = x.reshape(2, 4, 2, 4, 2).mean((2, 4))
    np.testing.assert_array_equal(found[..., 0], np.rint(means))
    assert reads(tmp_path, "ab", resize=4)("new.npz")["x"].shape == (2, 4, 4, 1)
    np.savez(tmp_path / "floats.npz", image=x / 255)
    floats = reads(tmp_path, "ab", dtype="float32", shrink=2)("floats.npz")["x"]
    np.testing.assert_allclose(floats[..., 0], means / 255, rtol=1e-5)


def test_a_folder_of_images_is_a_client(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    read = reads(tmp_path, "ab", (4, 4, 3), resize=4)
    with pytest.raises(ValueError, match="new' has no images in it"):
        read("new")
    for name, mode, size in (("b.png", "L", (9, 7)), ("a.png", "RGB", (4, 4))):
        Image.new(mode, size, 7 if mode == "L" else (1, 2, 3)).save(folder / name)
    found = read("new")
    assert found["name"].tolist() == ["a.png", "b.png"]
    assert found["x"][:, 0, 0].tolist() == [[1, 2, 3], [7, 7, 7]]
    with pytest.raises(ValueError, match="has images of 2 sizes"):
        reads(tmp_path, "ab", (4, 4, 3))("new")
    with pytest.raises(ValueError, match=r"uint8\(2, 4, 4, 3\); this run takes"):
        reads(tmp_path, "ab", (4, 4, 1), resize=4)("new")
    with pytest.raises(ValueError, match="is a folder; this run takes features"):
        reads(tmp_path, "ab", (4,), "float32")("new")
