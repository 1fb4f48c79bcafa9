"""A method's messages between processes: the simulator's states, exact bytes."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hyperjax import flower, models, tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.hyperfednet import hyperfednet
from hyperjax.algorithms.mh_pfedhngd import mh_pfedhngd
from hyperjax.algorithms.pfedhn import pfedhn
from hyperjax.algorithms.scaffold import scaffold
from hyperjax.data.federation import federate
from hyperjax.data.sources import load
from hyperjax.engine import comm, schedule
from hyperjax.models import layers
from hyperjax.training import Local
from hyperjax.types import ClientData

CLIENTS, ROUNDS = 3, 2


class Convolutions(models.LeNet):
    """The smallest network with kernels that are made of tiles."""

    channels: tuple[int, ...] = (2, 2)
    hidden: tuple[int, ...] = ()
    size: int = 3
    padding: layers.Padding = "SAME"


def federation():
    source = load("synthetic", num_samples=60, num_classes=3, shape=(4, 4, 1))
    return federate(source, num_clients=CLIENTS, seed=1)


def own_data(number):
    """The samples of a client: in its process none of the others is looked at."""
    data = federation()
    rows, size = data.train.rows[number], data.train.size[number]
    return ClientData(jnp.asarray(rows), jnp.asarray(size), data.pool)


def method(name):
    """A method, and whether its server steps after every client."""
    local = Local(optax.sgd(0.1), 8)
    plain = models.from_linen(models.MLP(3, (4,)), (4, 4, 1), 3)
    if name == "hyperfednet":
        network = models.from_linen(Convolutions(3), (4, 4, 1), 3)
        return hyperfednet(network, local=local, embedding_size=4, tile=2), False
    if name == "pfedhn":
        small = dict(embedding_size=3, hidden_size=4, num_hidden=1)
        return pfedhn(plain, local=local, num_clients=CLIENTS, **small), True
    return {"fedavg": fedavg, "scaffold": scaffold}[name](plain, local=local), False


def simulated(alg, sequential):
    """The server and the clients after training in the simulator."""
    data = federation()
    sim = schedule.simulator(
        alg,
        data.train,
        data.pool,
        weight=data.train.size,
        cohort_size=CLIENTS,
        sequential=sequential,
    )
    carry, _ = sim.run(0, sim.init(0), 0, ROUNDS)
    return carry.server, next(iter(carry.rows.values()))


def assert_close(found, expected):
    for path, a, b in zip(
        tree.paths(expected), *map(jax.tree.leaves, (found, expected)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=path)


def test_a_message_is_its_arrays_and_nothing_else():
    message = {"w": jnp.arange(6.0).reshape(2, 3), "n": (jnp.int8(3), jnp.bfloat16(2))}
    arrays = flower.to_arrays(message)
    assert sum(array.nbytes for array in arrays) == tree.num_bytes(message) == 27
    like = jax.eval_shape(lambda: message)
    # NumPy's files give bfloat16 back as bytes without a name.
    arrays = [a.view("V2") if a.dtype == jnp.bfloat16 else a for a in arrays]
    again = flower.from_arrays(arrays, like)
    assert tree.sha256(again) == tree.sha256(message)
    with pytest.raises(ValueError, match="has 2 arrays where 3 are expected"):
        flower.from_arrays(arrays[:2], like)
    arrays[-1] = arrays[-1].T
    with pytest.raises(ValueError, match=r"w of a message is float32\(3, 2\); float32"):
        flower.from_arrays(arrays, like)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("fedavg", marks=pytest.mark.slow),
        "scaffold",
        pytest.param("hyperfednet", marks=pytest.mark.slow),
        "pfedhn",
    ],
)
def test_both_sides_give_the_simulators_state_by_the_counted_bytes(name):
    alg, sequential = method(name)
    cost, kept, visits = comm.cost(comm.describe(alg)), {}, []

    def send(round, messages):
        found = {}
        for client, down in messages.items():
            assert sum(a.nbytes for a in down) == cost.down_bytes
            up, kept[client] = flower.visit(
                alg,
                client,
                own_data(client),
                round,
                down,
                kept.get(client),
                alone=sequential,
            )
            assert sum(a.nbytes for a in up) == cost.up_bytes
            found[client] = up
            visits.append(client)
        return found

    weight = federation().train.size
    server = flower.serve(alg, weight, ROUNDS, send, sequential=sequential)
    assert sorted(visits) == sorted(list(range(CLIENTS)) * ROUNDS)
    expected, rows = simulated(alg, sequential)
    assert_close(server, expected)
    spec = comm.describe(alg).client
    for client, state in kept.items():
        own = jax.tree.map(lambda x, i=client: x[i], rows)
        assert_close(flower.from_arrays(state, spec), own)


def test_who_does_not_answer_has_dropped_out():
    alg, _ = method("fedavg")
    start = flower.serve(alg, [1.0, 1.0], 0, lambda round, messages: {})
    same = flower.serve(alg, [1.0, 1.0], 1, lambda round, messages: {})
    assert_close(same, start)


def test_methods_of_several_exchanges_or_networks_are_refused():
    local = Local(optax.sgd(0.1), 8)
    plain = models.from_linen(models.MLP(3, (4,)), (4, 4, 1), 3)
    several = mh_pfedhngd({"a": plain}, local=local, family_sizes={"a": 2})
    with pytest.raises(ValueError, match="families of clients"):
        flower.serve(several, [1.0, 1.0], 1, lambda round, messages: {})


@pytest.mark.skipif("flwr" in sys.modules, reason="flwr is here")
def test_without_flower_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr", None)
    with pytest.raises(ImportError, match=r"pip install 'hyperjax\[flower\]'"):
        flower.client_app(method("fedavg")[0], own_data)


# By Flower, in processes --------------------------------------------------------------

APP = """
import sys
sys.path[:0] = {path!r}
import test_flower
from hyperjax import flower

METHOD, SEQUENTIAL = test_flower.method({name!r})
server = flower.server_app(
    METHOD, num_clients=3, rounds=2, sequential=SEQUENTIAL, out={out!r}, timeout=900
)
client = flower.client_app(METHOD, test_flower.own_data)
"""
PAGE = Path(__file__).parents[1] / "docs/reference/api/flower.md"


def block(caption):
    """A file that the documentation shows."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(f":caption: {caption}\n")
    return rest.partition("```")[0]


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for(port, server, seconds=300):
    """Returns when somebody listens; on a busy machine programs start slowly."""
    for _ in range(seconds):
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None, "the server has ended"
        time.sleep(1)
    raise AssertionError(f"nobody listens at port {port}")


@pytest.fixture(scope="module")
def superlink(tmp_path_factory):
    """A server and three clients of Flower, on this machine; yields its environment."""
    pytest.importorskip("flwr", reason="pip install 'hyperjax[flower]'")
    home = tmp_path_factory.mktemp("flower")
    own = str(Path(sys.executable).parent)  # Flower looks its helpers up by the PATH
    root = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": own + os.pathsep + os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]),
    }
    main, *ports = free_ports(1 + CLIENTS)
    address = f"127.0.0.1:{main}"
    config = block("config.toml").replace("127.0.0.1:8000", address)
    (home / "config.toml").write_text(config)
    commands = [
        f"flower-superlink --insecure --host 127.0.0.1 --port {main} "
        "--disable-runtime-dependency-installation --database :flwr-in-memory:".split()
    ]
    for i, port in enumerate(ports):
        node = f"flower-supernode --insecure --superlink {address} --port {port}"
        commands.append([*node.split(), "--node-config", f"partition-id={i}"])
    running = []
    try:
        for i, command in enumerate(commands):
            log = (home / f"{i}.log").open("w")
            running.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            )
            if i == 0:
                wait_for(main, running[0])
        yield environment
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(timeout=30)


def test_the_documented_app_is_of_a_method_that_can_be_deployed(monkeypatch):
    made = {}
    monkeypatch.setattr(flower, "server_app", lambda alg, **given: made.update(given))
    monkeypatch.setattr(flower, "client_app", lambda alg, data: flower.check(alg))
    names = {}
    exec(compile(block("my_app.py"), "my_app.py", "exec"), names)
    assert made["num_clients"] == 3 and int(names["own_data"](2).size) > 300


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavg", "scaffold", "hyperfednet", "pfedhn"])
def test_a_deployment_by_flower_gives_the_simulators_state(name, superlink, tmp_path):
    out = tmp_path / "server.npz"
    path = superlink["PYTHONPATH"].split(os.pathsep)
    text = APP.format(name=name, out=str(out), path=path)
    (tmp_path / "my_app.py").write_text(text)
    (tmp_path / "pyproject.toml").write_text(block("pyproject.toml"))
    flwr = shutil.which("flwr", path=superlink["PATH"])
    done = subprocess.run(
        [flwr, "run", str(tmp_path), "loop", "--stream"],
        env=superlink,
        capture_output=True,
        text=True,
        timeout=1500,  # every visit is a process that imports JAX anew
        check=False,
    )
    said = done.stdout + done.stderr
    assert out.exists(), said
    alg, sequential = method(name)
    expected = tree.by_path(simulated(alg, sequential)[0])
    with np.load(out) as file:
        assert_close({k: file[k] for k in expected}, expected)
