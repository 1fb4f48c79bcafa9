"""Networks as files: what reads them knows nothing of hyperjax."""

import json
import struct
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import serialization

import hyperjax as hj
from hyperjax.launch import export as launcher
from hyperjax.runs import export


class Net(nn.Module):
    num_classes: int = 3

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(2, (3, 3))(x)).reshape(x.shape[0], -1)
        return nn.Dense(self.num_classes, name="head")(x)


class Small(Net):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes, name="head")(x.reshape(x.shape[0], -1))


SOURCE = hj.load("synthetic", num_samples=90, num_classes=3, shape=(4, 4, 1))
X = SOURCE.x[:9]
DATA = hj.federate(SOURCE, num_clients=4, num_novel=2, seed=1)


def train(method, network=None, rounds=0, **options):
    return hj.run(
        method,
        Net() if network is None else network,
        DATA,
        rounds=rounds,
        optimizer=optax.sgd(0.1),
        batch_size=8,
        progress=False,
        **options,
    )


SMALL = dict(hidden=(4,), chunk_size=32, embedding_size=2)


@pytest.fixture(scope="module")
def run():
    return train("ditto", rounds=1)


@pytest.fixture(scope="module")
def generated():
    return train("hyperfedzero", Small(), **SMALL)


ALONE = """
import sys
import numpy as np
from jax import export

predict = export.deserialize(bytearray(open(sys.argv[1], "rb").read())).call
x = np.load(sys.argv[2])
np.save(sys.argv[3], np.stack([predict(x), np.concatenate([predict(x[:4]),
                                                           predict(x[4:])])]))
assert not [name for name in sys.modules if name.startswith(("hyperjax", "flax"))]
"""


@pytest.mark.parametrize(
    "which", [pytest.param("run", marks=pytest.mark.slow), "generated"]
)
def test_a_program_of_jax_alone_predicts_the_same(which, tmp_path, request):
    run = request.getfixturevalue(which)
    # What a network is conditioned on are the client's own inputs.
    network = run.network(3)
    assert network.header["plain"]
    path = run.export(tmp_path / "net", 3, "stablehlo")
    assert path.name == "net.stablehlo"
    np.save(tmp_path / "x.npy", X)
    command = [sys.executable, "-c", ALONE, path, tmp_path / "x.npy", tmp_path / "p"]
    subprocess.run(command, check=True, cwd=tmp_path)
    whole, parts = np.load(tmp_path / "p.npy")
    here = jax.export.deserialize(bytearray(path.read_bytes())).call
    np.testing.assert_array_equal(whole, here(X))
    expected = np.asarray(network.probabilities(X))
    np.testing.assert_allclose(whole, expected, rtol=1e-5)
    np.testing.assert_allclose(parts, expected, rtol=1e-5)
    if which == "run":
        np.testing.assert_array_equal(whole.argmax(-1), run.predict(3, X))


def by_hand(header, x):
    """What a header says is done to inputs."""
    how = header["preprocessing"]
    return np.float32((x / how["scale"] - how["mean"]) / how["std"])


@pytest.mark.parametrize("client", [1, 5, None])
def test_flax_reads_variables_for_its_module(run, client, tmp_path):
    path = run.export(tmp_path / "net.msgpack", client, "flax")
    found = serialization.msgpack_restore(path.read_bytes())
    header = json.loads(found["header"])
    assert header["client"] == client and header["classes"] == ["0", "1", "2"]
    assert header["input"] == {"dtype": "uint8", "shape": ["n", 4, 4, 1]}
    logits = Net().apply(found["variables"], by_hand(header, X))
    np.testing.assert_allclose(nn.softmax(logits), run.probabilities(client, X), 1e-5)


def test_npz_and_safetensors_hold_the_same_arrays(run, tmp_path):
    npz = dict(np.load(run.export(tmp_path / "net", 2, "npz")))
    header = json.loads(str(npz.pop("header")))
    expected = run.variables(2)["params"]["head"]["kernel"]
    np.testing.assert_array_equal(npz["params/head/kernel"], expected)
    content = run.export(tmp_path / "net", 2, "safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    about, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    assert length % 8 == 0
    told = about.pop("__metadata__")
    assert json.loads(told["preprocessing"]) == header["preprocessing"]
    assert all(isinstance(value, str) for value in told.values())
    assert about.keys() == npz.keys()
    for name, entry in about.items():
        begin, end = entry["data_offsets"]
        array = np.frombuffer(body[begin:end], np.float32).reshape(entry["shape"])
        assert entry["dtype"] == "F32"
        np.testing.assert_array_equal(array, npz[name])
    assert end == len(body)


def test_somebody_new_gets_the_network_for_its_inputs(generated, tmp_path):
    ours = generated.network(None, X).variables["params"]["head"]["kernel"]
    others = generated.network(None, 255 - X).variables["params"]["head"]["kernel"]
    assert not np.array_equal(ours, others)
    network = generated.network(None, X)
    logits = Small().apply(network.variables, by_hand(network.header, X))
    expected = generated.probabilities(None, X)
    np.testing.assert_allclose(nn.softmax(logits), expected, rtol=1e-4)


@pytest.mark.parametrize(
    "method", [pytest.param("ditto", marks=pytest.mark.slow), "hyperfedzero"]
)
def test_somebodys_network_needs_no_global_test_set(method, tmp_path):
    data = hj.federate(SOURCE, num_clients=4, num_novel=2, seed=1, test_fraction=0.0)
    assert data.test is None
    options = SMALL if method == "hyperfedzero" else {}
    run = hj.run(method, Small(), data, rounds=0, progress=False, **options)
    path = run.export(tmp_path / "shared", format="stablehlo")
    predict = jax.export.deserialize(bytearray(path.read_bytes())).call
    apart = np.concatenate([r[:n] for r, n in zip(*data.held_out, strict=True)])
    x = np.asarray(data.pool.x)[apart]  # what it is conditioned on
    np.testing.assert_array_equal(predict(x), run.probabilities(None, x))


def test_clients_of_families_get_theirs(tmp_path):
    run = train("local_only", {"a": Net(), "b": Small()})
    for client, family, module in (
        (0, "a", Net()),
        (3, "b", Small()),
        (5, "b", Small()),
    ):
        network = run.network(client)
        assert network.header["family"] == family and network.header["plain"]
        logits = module.apply(network.variables, by_hand(network.header, X))
        found = nn.softmax(logits).argmax(-1)
        np.testing.assert_array_equal(found, run.predict(client, X))
    nobody = r"somebody who is no client has no network.*\(a, b\); clients are 0\.\.5"
    for ask in (run.network, run.variables, lambda client: run.predict(client, X)):
        with pytest.raises(ValueError, match=nobody):
            ask(None)
    run.save(tmp_path / "run")
    np.savez(tmp_path / "visitor.npz", image=X[..., 0])
    for client, data, message in (
        ("shared", None, "client='shared': .* 4..5; their networks are different"),
        (None, str(tmp_path / "visitor.npz"), nobody),
    ):
        with pytest.raises(ValueError, match=message):
            launcher.main(str(tmp_path / "run"), client, False, data, "npz")
    assert not (tmp_path / "run" / launcher.FOLDER).exists()


def test_a_rule_of_its_own_is_said(tmp_path):
    options = dict(deploy_granularity="sample", **SMALL)
    run = train("hyperfedzero", Small(), **options)
    network = run.network(1)
    assert not network.header["plain"]
    with pytest.raises(ValueError, match=r"by the number of inputs.*cannot be written"):
        run.export(tmp_path / "net", 1, "stablehlo")
    assert not list(tmp_path.iterdir())


# The command -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "ditto"
    run.save(path)
    return str(path)


def test_the_command_prints_paths_the_last_one_last(folder, capsys):
    assert launcher.main(folder, "3", False, None, "npz") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"{folder}/exports/client_3.npz"
    assert launcher.main(folder, None, True, None, "flax") == 0
    names = [line.rpartition("/")[2] for line in capsys.readouterr().out.splitlines()]
    assert names == [f"client_{k}.msgpack" for k in range(6)] + ["shared.msgpack"]


def test_the_command_takes_somebodys_inputs(folder, tmp_path, capsys):
    np.savez(tmp_path / "visitor.npz", image=X[..., 0])
    assert launcher.main(folder, None, False, str(tmp_path / "visitor.npz"), "npz") == 0
    assert capsys.readouterr().out.strip().endswith("exports/visitor.npz")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("6", False, None, "npz"), r"client='6'.*participants 0..3 and unseen.*4..5"),
        (("-1", False, None, "npz"), "client='-1'"),
        (("first", False, None, "npz"), "client='first'.*'shared'"),
        (("3", False, None, "onnx"), "format='onnx' is unknown.*'stablehlo'"),
        ((None, False, None, "npz"), "give one of --client=number"),
        (("3", True, None, "npz"), "give one of --client=number"),
        ((None, False, "nowhere.npz", "npz"), "'nowhere.npz': there is no such file"),
    ],
)
def test_the_command_refuses_by_name(arguments, match, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        launcher.main(folder, *arguments)
    with pytest.raises(ValueError, match=f"^workdir='{tmp_path}' holds no run"):
        launcher.main(str(tmp_path), "0", False, None, "npz")
    assert not list(tmp_path.iterdir())


def test_what_is_not_finite_is_not_written(run, tmp_path):
    def broken(x):
        return x * np.nan if x.dtype == np.float32 else x

    state = run.state._replace(carry=jax.tree.map(broken, run.state.carry))
    with pytest.raises(FloatingPointError, match="outputs are not finite"):
        run._replace(state=state).export(tmp_path / "net", 0)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs flatbuffers"):
        run.export(tmp_path / "net", 0, "stablehlo")
    assert not list(tmp_path.iterdir())
