"""Tree arithmetic, masked rows, splitting by path, counting, digests."""

import functools
import hashlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import tree

TREE = {
    "params": {
        "body": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)},
        "head": {"kernel": jnp.full((3, 2), 2.0)},
    },
    "stats": {"mean": jnp.zeros(3)},
}
PATHS = [
    "params/body/bias",
    "params/body/kernel",
    "params/head/kernel",
    "stats/mean",
]


def test_parts_without_a_name_are_left_out_of_paths():
    assert tree.paths({"rows": {"": {"w": 1}}, "": {"": 2}}) == ["", "rows/w"]
    assert tree.paths(3) == [""]


def test_arithmetic():
    a = {"x": jnp.array([3.0, 5.0]), "y": jnp.float32(2)}
    b = {"x": jnp.array([1.0, -1.0]), "y": jnp.float32(0.5)}
    chex.assert_trees_all_equal(
        tree.sub(a, b), {"x": jnp.array([2.0, 6.0]), "y": jnp.float32(1.5)}
    )
    chex.assert_trees_all_equal(
        tree.add(a, b), {"x": jnp.array([4.0, 4.0]), "y": jnp.float32(2.5)}
    )
    chex.assert_trees_all_equal(
        tree.zeros_like(a), {"x": jnp.zeros(2), "y": jnp.float32(0)}
    )


def test_scale_keeps_dtypes():
    a = {"half": jnp.array([1.5, -2.0], jnp.bfloat16), "int": jnp.array([3], jnp.int8)}
    out = tree.scale(a, jnp.float32(2))
    chex.assert_trees_all_equal_dtypes(a, out)
    assert out["half"].tolist() == [3.0, -4.0]
    assert out["int"].tolist() == [6]


def test_where_rows_masks_every_rank_and_stops_nan():
    mask = jnp.array([True, False, True])

    def filled(value):
        return {
            "r1": jnp.full(3, value),
            "r2": jnp.full((3, 2), value),
            "r3": jnp.full((3, 2, 1), value),
        }

    bad = jax.tree.map(lambda x: x.at[1].set(jnp.nan), filled(1.0))
    out = tree.where_rows(mask, bad, filled(-1.0))
    for leaf in jax.tree.leaves(out):
        np.testing.assert_array_equal(leaf[0], np.ones(leaf.shape[1:]))
        np.testing.assert_array_equal(leaf[1], -np.ones(leaf.shape[1:]))
        np.testing.assert_array_equal(leaf[2], np.ones(leaf.shape[1:]))


def test_norm():
    # 3^2 + 4^2 + 12^2 = 13^2
    a = {"a": jnp.array([3.0, 4.0]), "b": {"c": jnp.float32(12)}}
    assert float(tree.norm(a)) == 13.0
    assert float(tree.norm({})) == 0.0
    assert tree.norm(a).dtype == jnp.float32


def test_clip():
    a = {"a": jnp.array([3.0, 4.0]), "b": {"c": jnp.float32(12)}}
    short, before = tree.clip(a, 6.5)
    assert float(before) == 13.0
    expected = {"a": jnp.array([1.5, 2.0]), "b": {"c": jnp.float32(6)}}
    chex.assert_trees_all_close(short, expected, rtol=1e-6)
    # As PyTorch has it, 13 / (13 + 1e-6), which one of 6.5 shows in float32 no more.
    assert float(tree.clip({"a": jnp.float32(1e-3)}, 1e-3)[0]["a"]) < 0.9995e-3
    chex.assert_trees_all_equal(tree.clip(a, 20.0)[0], a)
    zeros = tree.zeros_like(a)
    chex.assert_trees_all_equal(tree.clip(zeros, 1.0)[0], zeros)


def test_parameters_are_what_has_their_prefix():
    theta = {"params/w": 1, "stats/params/w": 2, "params/b": 3, "paramsx": 4}
    params, rest = tree.parameters(theta)
    assert list(params.items()) == [("params/w", 1), ("params/b", 3)]
    assert rest == {"stats/params/w": 2, "paramsx": 4}


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_finite_finds_one_bad_entry(bad):
    good = {"x": jnp.ones((2, 2)), "n": jnp.array([2**31 - 1], jnp.int32)}
    assert bool(tree.finite(good))
    assert not bool(tree.finite({**good, "x": good["x"].at[1, 0].set(bad)}))


def test_finite_without_floats():
    assert bool(tree.finite({}))
    assert bool(tree.finite({"n": jnp.arange(3)}))


def test_count_and_bytes_of_abstract_leaves():
    spec = {
        "f32": jax.ShapeDtypeStruct((3, 5), jnp.float32),
        "bf16": jax.ShapeDtypeStruct((7,), jnp.bfloat16),
        "int8": jax.ShapeDtypeStruct((2, 2, 2), jnp.int8),
        "scalar": jax.ShapeDtypeStruct((), jnp.int32),
        "empty": jax.ShapeDtypeStruct((0, 9), jnp.float32),
    }
    assert tree.count(spec) == 15 + 7 + 8 + 1
    assert tree.num_bytes(spec) == 4 * 15 + 2 * 7 + 8 + 4
    concrete = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), spec)
    assert tree.count(concrete) == tree.count(spec)
    assert tree.num_bytes(concrete) == tree.num_bytes(spec)
    assert isinstance(tree.count(concrete), int)
    assert tree.count(()) == tree.num_bytes(()) == 0


# Digests ---------------------------------------------------------------------------


def test_sha256_is_stable():
    # Path, dtype and shape as text, then the eight bytes of [1, 2].
    message = b"a|<f4|(2,)|" + bytes.fromhex("0000803f00000040")
    golden = hashlib.sha256(message).hexdigest()
    assert tree.sha256({"a": jnp.array([1.0, 2.0])}) == golden
    assert tree.sha256({"a": np.array([1.0, 2.0], np.float32)}) == golden
    # Memory order is no part of the value.
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert tree.sha256({"a": a}) == tree.sha256({"a": np.asfortranarray(a)})


def test_sha256_sees_bits_paths_dtypes_and_shapes():
    a = np.array([0.0, 1.0], np.float32)
    trees = [
        {"a": a},
        {"b": a},
        {"a": {"a": a}},
        {"a": a, "b": a},
        {"a": np.array([-0.0, 1.0], np.float32)},
        {"a": np.array([0.0, np.nextafter(np.float32(1), np.float32(2))], np.float32)},
        {"a": a.view(np.int32)},
        {"a": a.astype(np.float64)},
        {"a": a[None]},
        {"a": a[:, None]},
    ]
    assert len({tree.sha256(x) for x in trees}) == len(trees)


# Splitting -------------------------------------------------------------------------


def test_paths():
    assert tree.paths(TREE) == PATHS
    by_path = tree.by_path(TREE)
    assert list(by_path) == PATHS
    chex.assert_trees_all_equal([*by_path.values()], jax.tree.leaves(TREE))


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        (None, []),
        ((), []),
        (r"params/head/.*", PATHS[2:3]),
        ((r"params/body/.*", r".*mean"), [*PATHS[:2], PATHS[3]]),
        ((r".*kernel", r"params/.*"), PATHS[:3]),  # chosen twice, once in the result
        (r".*", PATHS),
    ],
)
def test_split_and_merge_are_inverse(patterns, chosen):
    parts = tree.splitter(TREE, patterns)
    a, b = parts.split(TREE)
    assert sorted(a) == chosen
    assert sorted(b) == [p for p in PATHS if p not in chosen]
    chex.assert_trees_all_equal(parts.merge(a, b), TREE)


def test_split_of_abstract_trees():
    spec = jax.eval_shape(lambda: TREE)
    parts = tree.splitter(spec, r"params/head/.*")
    a, b = parts.split(spec)
    assert tree.count(a) == 6 and tree.count(b) == 12
    assert parts.merge(a, b) == spec
    # Built from shapes, used on values.
    chex.assert_trees_all_equal(parts.merge(*parts.split(TREE)), TREE)


def test_patterns_match_whole_paths():
    with pytest.raises(ValueError, match="matches no variable"):
        tree.splitter(TREE, "head")
    with pytest.raises(ValueError, match="matches no variable"):
        tree.splitter(TREE, "params/hea")


def test_unmatched_pattern_lists_paths():
    with pytest.raises(ValueError) as error:
        tree.splitter(TREE, (r"params/.*", r"params/neck/.*"))
    assert repr(r"params/neck/.*") in str(error.value)
    assert all(path in str(error.value) for path in PATHS)
    many = {f"leaf{i}": jnp.zeros(1) for i in range(9)}
    with pytest.raises(ValueError, match=r"leaf7, \.\.\.$"):
        tree.splitter(many, "x")


def test_split_of_another_structure_fails():
    parts = tree.splitter(TREE, r"params/head/.*")
    with pytest.raises(ValueError):
        parts.split({"params": TREE["params"]})


@pytest.mark.parametrize("patterns", ["(", ("params/.*", "*"), (3,)])
def test_a_pattern_that_is_none_is_named(patterns):
    with pytest.raises(ValueError, match="is no regular expression on paths"):
        tree.splitter({"a": jnp.zeros(1)}, patterns)


def test_a_state_that_has_another_form_is_refused():
    state = {"count": jnp.int32(0), "key": jax.random.key(1), "none": ()}
    later = {**state, "count": jnp.int32(7)}
    tree.check_kept("the state", state, later)
    jax.jit(functools.partial(tree.check_kept, "the state", later))(state)
    for other, words in {
        "none": r"'none': \(\)\} to .*'none': 'float32\[2\]'\}; accepted",
        "count": r"'count': 'int32\[\]'.* to \{'count': 'float32\[2\]'",
    }.items():
        changed = {**state, other: jnp.zeros(2)}
        with pytest.raises(ValueError, match=f"^the state changed from .*{words}"):
            tree.check_kept("the state", state, changed)
