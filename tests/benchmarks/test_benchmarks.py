"""The benchmarks run in tiny form and write what they measured; no times are judged."""

import json
import re
import types

import pytest
from launched import launch

from benchmarks import generation, memory, roofline, round_time, throughput
from benchmarks.peers.workload import PRESETS

# One worker starts the processes of all files.
pytestmark = pytest.mark.xdist_group("launcher")


def _run(repository, tmp_path, module: str, *arguments: str) -> list[dict]:
    """Runs a benchmark in a process of its own and returns its records."""
    path = tmp_path / "records.json"
    argv = (f"--json={path}", *arguments)
    said = tmp_path / "said"
    done = launch(said, f"benchmarks.{module}", argv, repository).result()
    assert done.code == 0, done.err
    return json.loads(path.read_text())


@pytest.mark.slow
def test_round_time_reports_every_plan(repository, tmp_path):
    sizes = ("--clients=2", "--cohort=2", "--samples=5", "--batch=4", "--epochs=1")
    plans = ("--models=mlp,lenet", "--mappers=map", "--devices=1", "--rounds=1")
    records = _run(repository, tmp_path, "round_time", *sizes, *plans)
    assert [(r["model"], r["parameters"], r["mapper"]) for r in records] == [
        ("mlp", 199_210, "map"),
        ("lenet", 44_426, "map"),
    ]
    for record in records:
        assert record["tax_one_device"] == record["tax"] > 0
        for name in (
            "seconds_median",
            "seconds_min",
            "samples_per_second",
            "central_samples_per_second",
            "tax_of_minima",
            "cpu_tax",
            "peak_mb",
            "compile_seconds",
            "devices",
        ):
            assert record[name] > 0, name
        for name in ("jax", "jaxlib", "backend", "device"):
            assert record[name], name
        assert record["machine"]["cores"] > 0


def test_throughputs_clients_train_on_what_the_preset_says():
    work = PRESETS["B32"]._replace(clients=3, samples=40)
    found = throughput.federation(work)
    assert found.train.size.tolist() == [40] * 3 and found.num_novel == 1
    assert found.pool.x.shape == (4 * 50, 28, 28, 1)


@pytest.mark.slow
def test_throughput_tells_each_method(repository, tmp_path):
    argv = ("--preset=B32q", "--methods=fedavg,mh_pfedhn", "--devices=1")
    records = _run(repository, tmp_path, "throughput", *argv)
    assert [r["method"] for r in records] == ["fedavg", "mh_pfedhn"]
    for record in records:
        work = record["workload"]
        samples = work["cohort"] * work["samples"] * work["epochs"]
        rate = samples / record["seconds"]
        assert record["samples_per_second"] == pytest.approx(rate)
        assert record["share"] > 0 and record["compile_seconds"] > 0
    # Forwards, and backwards but for the first layer's inputs: 6 FLOPs a weight less 2
    # of each of that layer's.
    weights = 784 * 200 + 200 * 200 + 200 * 10
    each = records[0]["gflops_per_second"] / records[0]["samples_per_second"] * 1e9
    assert each == pytest.approx(6 * weights - 2 * 784 * 200, rel=0.01)


@pytest.mark.slow
def test_seeds_together_have_the_states_of_seeds_alone(repository, tmp_path):
    small = ("--method=fedavg", "--seeds=2", "--rounds=1", "--plans=sequence")
    alone, together = _run(repository, tmp_path, "seeds", *small)
    assert (alone["runs"], together["runs"]) == (1, 2)
    assert together["state_sha256"][0] == alone["state_sha256"][0]
    assert alone["times"] == 1 and together["times"] > 0
    for record in (alone, together):
        parts = ("build", "compile", "run")
        whole = sum(record[f"{part}_seconds"] for part in parts)
        assert whole == pytest.approx(record["seconds"])


@pytest.mark.slow
def test_device_memory_does_not_grow_with_state_kept_on_the_host(repository, tmp_path):
    sizes = ("--clients=4,400", "--cohort=2", "--samples=5", "--exchanges=1")
    records = _run(repository, tmp_path, "memory", *sizes)
    found = {(r["store"], r["clients"], r["how"]): r for r in records}
    small, large = (found["host", n, "measured"] for n in (4, 400))
    # One float32 aggregation weight per client, and no state.
    grown = large["device_mb"] - small["device_mb"]
    assert grown == pytest.approx(4 * 396 / 2**20)
    # What is computed of the device store is what is measured, but for a few scalars.
    computed = memory.device_store(small)["device_mb"]
    measured = found["device", 4, "measured"]["device_mb"]
    assert measured == pytest.approx(computed, abs=1e-3)
    assert found["device", 400, "computed"]["device_mb"] > large["state_mb"] > 3
    for record in records:
        assert record["peak_mb"] is None or record["peak_mb"] > 0
        for name in ("state_mb", "table_mb", "device_mb"):
            assert record[name] > 0, name


@pytest.mark.slow
def test_a_round_that_sums_up_puts_less_aside(repository, tmp_path):
    sizes = ("--networks=mlp", "--cohorts=20", "--samples=2", "--batch=2")
    kept, summed, *counts = _run(repository, tmp_path, "cohort", *sizes)
    assert (kept["streaming"], summed["streaming"]) == (False, True)
    assert kept["stack_mb"] == summed["stack_mb"] > 10
    assert kept["temporary_mb"] > kept["stack_mb"] > 2 * summed["temporary_mb"]
    assert [(r["alpha"], r["batch"]) for r in counts[::2]] == [(0.5, 32), (0.1, 32)]
    for record in counts:
        assert 1 < record["block"] < 0.9 * record["as_drawn"] < 0.9 * record["vmap"]


@pytest.mark.slow
def test_generation_reports_every_plan(repository, tmp_path):
    sizes = ("--parameters=3000", "--chunk_batches=0,2", "--calls=1")
    records = _run(repository, tmp_path, "generation", *sizes)
    assert [(r["program"], r["chunk_batch"]) for r in records] == [
        ("forward", 0),
        ("forward", 2),
        ("gradient", 0),
        ("gradient", 2),
    ]
    for record in records:
        assert record["parameters"] == 6 * 22 * 23  # 6 x 21 x 22 would be 2,772
        assert record["floor_mb"] == pytest.approx(4 * 3036 / 2**20)
        assert 0 < record["embeddings_mb"] < record["phi_mb"]
        assert record["difference"] < 1e-4
        # A cotangent is not an array of the program's own, but is counted.
        own = record["temporary_mb"] + record["results_mb"]
        cotangent = record["floor_mb"] * (record["program"] == "gradient")
        assert record["compiled_mb"] == pytest.approx(own + cotangent)
        assert record["compiled_mb"] > record["floor_mb"]
        assert record["measured_mb"] >= 0
        assert record["seconds"] > 0 and record["gb_per_second"] > 0
        assert record["jax"] and record["machine"]["cores"] > 0


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--parameters=0", "parameters=0 must be at least 1"),
        ("--calls=0", "calls=0 must be at least 1"),
        ("--chunk_batches=all", "chunk_batches='all' must be integers such as 0,64"),
        ("--chunk_batches=", "chunk_batches='' must be integers"),
        ("--programs=backward", "programs='backward' is unknown"),
        ("--chunk_batches=8,-1", "chunk_batches=-1 must be at least 0"),
    ],
)
def test_generation_refuses(argument, message, monkeypatch):
    name, _, value = argument[2:].partition("=")
    given = {"parameters": 1, "calls": 1, "chunk_batches": ["0"], "json": None}
    given |= {"programs": ["forward"]}
    given[name] = int(value) if name in ("parameters", "calls") else value.split(",")
    monkeypatch.setattr(generation.flags, "FLAGS", types.SimpleNamespace(**given))
    with pytest.raises(ValueError, match=re.escape(message)):
        generation.main()


@pytest.mark.slow
def test_scaling_counts_what_a_population_costs(repository, tmp_path):
    sizes = ("--methods=scaffold", "--clients=20,5000", "--cohorts=3", "--rounds=2")
    few, many = _run(repository, tmp_path, "scaling", *sizes, "--checkpoint")
    assert (few["clients"], many["clients"]) == (20, 5000)
    assert few["milliseconds"] > 0 and few["peak_mb"] > 0
    assert many["tables_mb"] == 250 * few["tables_mb"]
    assert many["state_mb"] == pytest.approx(250 * few["state_mb"])
    # What is written are clients who took part, not those outside.
    for record in (few, many):
        assert 0 < record["checkpoint_mb"] < 0.05


@pytest.mark.slow
def test_scaling_shares_a_cohort_between_devices_and_processes(repository, tmp_path):
    sizes = ("--methods=scaffold", "--clients=20", "--cohorts=2,4", "--rounds=1")
    records = _run(repository, tmp_path, "scaling", *sizes, "--layouts=1x1,1x2,2x1")
    assert [(r["cohort"], r["layout"]) for r in records] == [
        (cohort, layout) for cohort in (2, 4) for layout in ("1x1", "1x2", "2x1")
    ]
    assert all(r["milliseconds"] > 0 and r["state_mb"] > 0 for r in records)


def test_sizes_of_clients_differ_and_sum_up_to_those_of_equal_ones():
    of = dict(clients=25, cohort=25, samples=480, rounds=1, rounds_per_call=1)
    work = round_time.Workload("mlp", True, 32, epochs=1, alpha=0.1, **of)
    sizes = round_time.sizes_of(work)
    assert sizes.sum() == 25 * 480 and sizes.min() >= 1 and sizes.max() > 5 * 480
    assert round_time.sizes_of(work._replace(alpha=0.0)).tolist() == [480] * 25


def test_a_roofline_counts_operations_and_products():
    found = roofline.step("hyperfedzero", "mlp")
    # 6 FLOPs a weight and row of the generator's last two layers, of 346 chunks of 576
    # numbers, and of the MLP less its inputs' gradient; the rest is a third of these.
    emitted = 6 * 346 * (220 * 220 + 220 * 576)
    used = 128 * (6 * (784 * 200 + 200 * 200 + 200 * 10) - 2 * 784 * 200)
    assert emitted + used < found["flops"] < 1.4 * (emitted + used)
    assert found["floor_bytes"] < found["fused_bytes"] < found["unfused_bytes"]
    whole = roofline.of_round("hyperfedzero", [found])
    assert whole["steps"] == 10 * 20
    assert whole["flops"] == 200 * found["flops"]


@pytest.mark.slow
def test_a_step_of_a_hypernetwork_method_beside_fedavg(repository, tmp_path):
    small = ("--methods=hyperfedzero", "--steps=1", "--repeats=1", "--nosweeps")
    (record,) = _run(repository, tmp_path, "hypernet", *small)
    assert record["parameters"] == 195_656  # 1.8 % below the 199,210 it emits
    ratio = record["milliseconds"] / record["fedavg"]
    assert record["over_fedavg"] == pytest.approx(ratio)
    assert "bar" not in record  # PyTorch was not given


@pytest.mark.slow
def test_an_accelerator_is_asked_for_and_tried_without_one(repository, tmp_path):
    narrow = ("--networks=lenet", "--plans=patches", "--precisions=highest")
    said = launch(tmp_path / "listed", "benchmarks.gpu", narrow, repository).result()
    assert said.code == 0 and "no accelerator" in said.out
    assert "lenet, map, highest" in said.out and "lenet, patches, h" in said.out
    reference, other = _run(repository, tmp_path, "gpu", *narrow, "--smoke")
    assert (reference["plan"], other["plan"]) == ("map", "patches")
    assert float(reference["distance"]) == 0 and float(other["distance"]) < 1e-3
    for record in (reference, other):
        assert record["equal"] == "yes" and record["samples_per_second"] > 0
        assert not {"first", "last"} & record.keys()
