"""Runs of a group share what is compiled, and each is the run that it is alone."""

import chex
import jax
import pytest

from hyperjax import tree
from hyperjax.launch import build, fields
from hyperjax.protocols import zero_shot
from hyperjax.runs import loop
from hyperjax.sweeps import group, runner
from hyperjax.sweeps.points import Point

SMALL = {
    "rounds": 2,
    "data.name": "digits",
    "data.shrink": 4,
    "data.num_clients": 3,
    "data.num_novel": 1,
    "data.alpha": 0.1,  # skewed: tables of other widths for other seeds
    "local.batch_size": 8,
    "evaluation.every": 1,
    "evaluation.batch_size": 16,
}


def config(method="fedavg", **fields):
    """A tiny run with some fields changed; `a__b=1` sets `a.b`."""
    found = zero_shot.get_config(method)
    found.model.hidden = (4,)
    changed = {name.replace("__", "."): value for name, value in fields.items()}
    found.update_from_flattened_dict({**SMALL, **changed})
    return found


def outcome(experiment):
    """The state's digest after the run, and all values per client on the way."""
    seed, state = experiment.settings.seed, loop.start(experiment)
    values = [experiment.evaluator.evaluate(seed, state.carry, 0)]
    for call in loop.rounds(experiment, state):
        state = call.state
        values.append(experiment.evaluator.evaluate(seed, state.carry, state.round))
    return tree.sha256(jax.device_get(state.carry)), values


def programs(experiment) -> int:
    parts = experiment.simulator, experiment.evaluator
    return sum(len(part.program._programs) for part in parts)


def test_runs_of_a_group_are_compiled_once_and_have_the_bits_of_runs_alone():
    other = dict(local__learning_rate=0.2, local__weight_decay=0.1, method__mu=2.0)
    configs = [
        config("fedprox", local__weight_decay=0.01),
        config("fedprox", seed=1, data__partition="iid", **other),
    ]
    alone = [build.build(one) for one in configs]
    first, second = (len(one.federation.train.rows[0]) for one in alone)
    assert first != second
    together = group.experiments(configs)
    found = [outcome(one) for one in together]
    assert programs(together[0]) == programs(together[1]) == 3  # all there are
    assert together[0].simulator.program is together[1].simulator.program
    assert found[0][0] != found[1][0]
    for (state, values), one in zip(found, alone, strict=True):
        expected, expected_values = outcome(one)
        assert state == expected
        # Losses are sums over padded rows, and the order of these is the compiler's.
        chex.assert_trees_all_close(values, expected_values, rtol=1e-6)
    pixels = {one.federation.pool.x.unsafe_buffer_pointer() for one in together}
    assert len(pixels) == 1


def test_a_table_narrower_than_a_batch_stays_as_it_is():
    one = config()
    source = build.load_source(one.data)
    dealt = []
    for seed in (0, 2):
        one.seed = seed
        dealt.append(build.federate(source, one))
    first, second = (len(each.train.rows[0]) for each in dealt)
    for batch, expected in ((second - 1, first), (second, first), (second + 1, None)):
        one.local.batch_size = batch
        assert first > second
        assert group._widths(one, dealt[1], dealt).get("train") == expected


def test_neighbours_read_a_data_set_once(monkeypatch):
    read, names = group.Reader(), []
    load = build.load_source

    def counted(data):
        names.append(data.name)
        return load(data)

    monkeypatch.setattr(build, "load_source", counted)
    shifts = [config(data__shift=kind).data for kind in ("rotation", "blur", "none")]
    first, second, plain = map(read, shifts)
    assert first is second and len(names) == 2  # unshifted images are scaled first
    assert read(shifts[0]) is first and len(names) == 2
    assert plain is read(config(seed=3, data__alpha=2.0).data)
    read(config(data__shrink=2).data)
    assert len(names) == 3
    found = group.experiments([config()], read=read)
    assert len(names) == 4 and len(found) == 1


def test_what_is_checked_once_has_one_setting():
    one = group.setting(config())
    assert group.setting(config(seed=3, data__alpha=2.0)) == one
    for field in ("rounds", "local__learning_rate", "local__batch_size"):
        assert group.setting(config(**{field: 7})) != one, field


def test_a_method_is_built_once_whatever_its_clients_have(monkeypatch):
    configs, make = [], build.make_algorithm

    def counted(config, *args):
        configs.append(config)
        return make(config, *args)

    monkeypatch.setattr(build, "make_algorithm", counted)
    alike = [
        config(),
        config(data__shift="rotation"),
        config(data__standardise="client"),
    ]
    others = [
        config(data__num_clients=5),
        config(data__shrink=2),  # images are smaller
        config(local__batch_size=7),
    ]
    points = [Point(str(i), {}, one) for i, one in enumerate([*alike, *others])]
    runner.check(points, group.Reader())
    assert configs == [alike[0], *others]


def test_the_key_is_what_a_program_is_made_of():
    dealt = dict(data__seed=4, data__partition="iid", data__alpha=2.0)
    numbers = dict(local__learning_rate=0.2, server__learning_rate=0.5)
    expected = group.key(config())
    assert group.key(config(seed=3, **dealt, **numbers)) == expected
    for field in ("rounds", "data__num_clients", "local__batch_size", "data__shrink"):
        assert group.key(config(**{field: 7})) != expected, field
    for field in ("local__weight_decay", "local__clip_norm"):  # steps of their own
        one, other = (group.key(config(**{field: x})) for x in (0.1, 0.2))
        assert one == other != expected, field
    with pytest.raises(ValueError, match="differ in what a program is made of: rounds"):
        group.experiments([config(), config(rounds=3)])


def test_numbers_that_set_shapes_are_built_in():
    one, other = (config("pfedsim", method__warmup=x) for x in (0.1, 0.2))
    assert group.key(one) != group.key(other)
    one, other = (config("fedamp", method__lam=x) for x in (0.1, 0.2))
    assert group.key(one) == group.key(other)


def test_a_method_of_ones_own_has_its_numbers_built_in(tmp_path, monkeypatch):
    text = """
from hyperjax.algorithms.fedprox import fedprox

def mine(model, *, local, mu: float = 0.1):
    return fedprox(model, local=local, mu=mu if mu > 0 else 0.0)
"""
    (tmp_path / "my_method.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = config()
    found.method = {"name": "my_method:mine"}
    assert fields.arguments(found) == {}
    assert build.build(found).hyper.values == {}
