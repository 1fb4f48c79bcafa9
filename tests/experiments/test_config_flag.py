"""--config and its fields: experiments by name, methods and networks with options."""

import flax.linen as nn
import pytest
from absl import flags
from ml_collections import config_flags

from hyperjax import protocols
from hyperjax.launch import cli
from hyperjax.protocols import common, zero_shot

PLAIN = """
from configs import common

def get_config():
    config = common.defaults()
    config.rounds, config.server.learning_rate = 7, 0.5
    config.method = dict(name="fedavg", keep="a")
    return config
"""
WRAPPED = """
from hyperjax.protocols import zero_shot

def get_config(arg=""):
    config = zero_shot.get_config(arg)
    config.rounds = 7
    return config
"""
FIXED = """
from hyperjax.protocols import zero_shot

def get_config():
    config = zero_shot.get_config("hyperfedzero,data=digits")
    config.rounds = 7
    return config
"""


class Net(nn.Module):
    """A network of a user's own."""

    num_classes: int
    width: int = 3

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(x.reshape(len(x), -1))


def parsed(path, **chosen):
    parser = cli.ConfigParser("config")
    parser.chosen = chosen
    config = parser.parse(str(path))
    assert config.is_locked
    return config.unlock()


def given(*argv):
    """The config that a command line makes."""
    values = flags.FlagValues()
    kept, chosen = cli._split_names(["x", *argv])
    holder = config_flags.DEFINE_config_file(
        "config", None, flag_values=values, sys_argv=kept
    )
    values["config"].parser = cli.ConfigParser("config")
    values["config"].parser.chosen = chosen
    values(kept)
    return holder.value


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A folder without configs, as where a wheel is installed."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", ["zero_shot", "configs/zero_shot.py", "zero_shot.py"])
def test_experiments_of_the_package_need_no_file(path, nowhere):
    config = parsed(f"{path}:fedprox,data=digits")
    assert config == zero_shot.get_config("fedprox,data=digits")
    assert parsed(path) == zero_shot.get_config()
    (nowhere / "zero_shot.py").write_text(PLAIN)  # a file goes before
    assert (parsed(path).rounds == 7) == (path == "zero_shot.py")


def test_the_files_are_the_experiments_of_the_package(repository, monkeypatch):
    monkeypatch.chdir(repository)
    for name in protocols.NAMES:
        file = f"configs/{name}.py:local_only,data=digits"
        assert parsed(file) == protocols.find(name).get_config("local_only,data=digits")
    found = {path.stem for path in (repository / "configs").glob("*.py")}
    assert found == {*protocols.NAMES, "common"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("fedprox", "'fedprox' is a method; .*as in zero_shot:fedprox"),
        ("fedyogi:data=digits", "'fedyogi' is a method"),
        ("zeroshot:fedprox", "no such experiment; did you mean 'zero_shot'"),
        ("configs/nothing.py", "no file 'configs/nothing.py' .*experiments: zero_shot"),
        ("mine/zero_shot.py", "no file 'mine/zero_shot.py'"),
    ],
)
def test_what_is_neither_is_refused(path, message, nowhere):
    with pytest.raises(ValueError, match=message):
        parsed(path)


def test_a_method_brings_what_the_experiment_has_for_it():
    for name in (
        "scaffold",
        "fedyogi",
        "hyperfedzero",
        "hyperjax.algorithms.moon:moon",
    ):
        expected = zero_shot.get_config(f"{name},data=digits,alpha=0.1")
        assert (
            parsed("zero_shot:fedjets,data=digits,alpha=0.1", method=name) == expected
        )
        again = parsed("zero_shot:method=fedjets,data=digits,alpha=0.1", method=name)
        assert again == expected
    with pytest.raises(ValueError, match=r"'fedprx' is unknown.*'fedprox'"):
        parsed("zero_shot:data=digits", method="fedprx")
    config = parsed("zero_shot:data=digits", model="lenet")
    assert config.model == common.filled(_named("lenet")).model


def _named(network):
    config = common.defaults()
    config.model.name = network
    return config


def test_weights_of_a_fusion_follow_its_base():
    base = "--config.method.base=scaffold"
    assert given("--config=personalised").server.weights == "size"
    assert given("--config=personalised", base).server.weights == "uniform"
    own = "--config.server.weights=size"  # A flag wins, before it or after.
    assert given("--config=personalised", own, base).server.weights == "size"
    assert given("--config=personalised", base, own).server.weights == "size"
    # The method says what is wrong with a base, when it is built.
    wrong = given("--config=personalised", "--config.method.base=scafold(")
    assert wrong.server.weights == "size"


def test_files_of_ones_own_take_methods_too(nowhere):
    for text in (PLAIN, WRAPPED, FIXED):
        (nowhere / "own.py").write_text(text)
        config = parsed("own.py", method="fedprox", model="lenet")
        assert config.rounds == 7
        assert (config.method.mu, config.model.hidden) == (0.1, (500,))
        assert "keep" in config.method and config.method.keep == ()
        # Their own file knows no fields of the package's experiments.
        is_wrapped = text is not PLAIN
        assert (config.server.learning_rate == 0.5) != is_wrapped
    (nowhere / "own.py").write_text(WRAPPED)
    config = parsed("own.py:data=digits", method="scaffold")
    assert (config.rounds, config.server.weights) == (7, "uniform")
    (nowhere / "own.py").write_text(PLAIN)
    config = parsed("own.py", method="fedyogi")
    assert config.method.name == "fedavg" and "fedyogi" in config.server.optimizer


def test_names_are_taken_out_of_the_command_line():
    argv = ["x", "--config=a", "--config.method.name=b", "--config.rounds=1"]
    assert cli._split_names(argv) == (["x", "--config=a", argv[3]], {"method": "b"})
    argv = ["x", "-config.model.name", "b", "--config.model.name=c"]
    assert cli._split_names(argv) == (["x"], {"model": "c"})
    argv = ["x", "--config.method.names=b", "--config.data.name=c"]
    assert cli._split_names(argv) == (argv, {})


@pytest.mark.parametrize(
    ("flag", "option", "value"),
    [
        ("keep=('a','b')", "keep", ("a", "b")),
        ("keep=params/head/.*", "keep", "params/head/.*"),
        ("finetune=('a',)", "finetune", ("a",)),
        ("mu=1", "mu", 1.0),
        ("persist_optimizer=kept", "persist_optimizer", "kept"),
        ("clip_kept=False", "clip_kept", False),
    ],
)
def test_every_option_can_be_set_by_a_flag(flag, option, value):
    config = given(
        "--config=zero_shot:hyperfedzero,data=digits",
        "--config.method.name=fedprox",
        f"--config.method.{flag}",
    )
    assert config.method[option] == value
    assert type(config.method[option]) is type(value)


def test_options_that_may_be_none_and_corrections():
    config = given("--config=personalised", "--config.method.hidden_size=7")
    assert config.method.hidden_size == 7
    config = given("--config=personalised", "--config.method.correction=prox(mu=0.1)")
    assert config.method.correction == "prox(mu=0.1)"
    several = "--config.method.correction=('prox(mu=0.1)','scaffold')"
    config = given("--config=zero_shot:fedavg", several)
    assert config.method.correction == ("prox(mu=0.1)", "scaffold")
    with pytest.raises(flags.IllegalFlagValueError):
        given("--config=personalised", "--config.method.hidden_size=wide")


def test_options_of_networks_can_be_set_by_flags():
    own = f"--config.model.name={__name__}:Net"
    config = given("--config=zero_shot:fedavg", own, "--config.model.width=9")
    assert config.model.to_dict() == {"name": f"{__name__}:Net", "width": 9}
    config = given(
        "--config=personalised", "--config.model.blocks=2", "--config.model.width=8"
    )
    assert (config.model.blocks, config.model.width) == (2, 8)
    config = given("--config=personalised", "--config.model.blocks=(1,2,3)")
    assert config.model.blocks == (1, 2, 3)
    config = given("--config=zero_shot", "--config.model.hidden=(5,)")
    assert config.model.hidden == (5,)


def test_a_refusal_of_a_config_file_is_its_sentence():
    said = "Traceback (most recent call last):\n  ...\nValueError: alpha=3 is too much"
    assert cli.explain(ValueError(said)) == "alpha=3 is too much"
