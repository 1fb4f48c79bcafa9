"""Four experiments take every method: what they have for it, and what it builds."""

import pytest

from hyperjax import protocols, registry
from hyperjax.data import partition
from hyperjax.launch import build, fields
from hyperjax.protocols import arguments, common, methods

EXPERIMENTS = {name: protocols.find(name) for name in protocols.NAMES}
SHAPE, NUM_CLASSES = (8, 8, 1), 10  # of the digits

# Where a method makes no sense, and what is said.
REFUSED = {
    ("zero_shot", "hyperfednet"): "no kernel of the model is made of tiles",
    ("pfedhn", "hyperfednet"): "no kernel of the model is made of tiles",
}


def get_config(experiment, arg=""):
    return EXPERIMENTS[experiment].get_config(arg)


def differing(config, other):
    """{field: value} of what a config has otherwise than another."""
    ours, theirs = common.flat(config), common.flat(other)
    return {k: v for k, v in ours.items() if theirs.get(k) != v}


# Methods x experiments ---------------------------------------------------------------


@pytest.mark.parametrize("name", registry.methods())
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_method_builds_in_every_experiment_or_is_refused(experiment, name):
    config = get_config(experiment, f"{name},data=digits")
    assert (config.experiment, config.method.name) == (experiment, name)
    message = REFUSED.get((experiment, name))
    if experiment == "families" and registry.families(name) == "one":
        with pytest.raises(ValueError, match=r"needs one network for all.*'mh_mlp'"):
            build.check(config)
        return
    build.check(config)
    model = build.make_model(config, SHAPE, NUM_CLASSES)
    is_mapping = experiment == "families" or registry.families(name) == "several"
    assert isinstance(model, dict) == is_mapping
    if message:
        with pytest.raises(ValueError, match=message):
            build.make_algorithm(config, model)
    else:
        build.make_algorithm(config, model)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_digits_are_dealt_out(experiment):
    config = get_config(experiment, "data=digits")
    source = build.load_source(config.data)
    federation = build.federate(source, config)
    assert federation.num_clients == config.data.num_clients
    assert federation.num_novel == config.data.num_novel


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_field_is_there_and_every_number_has_bounds(experiment):
    for name in registry.methods():
        config = get_config(experiment, name)
        fields.check(config)
        assert set(common.flat(config)) - set(common.FIELDS) == {
            *(f"method.{option}" for option in common.Method.known(name)),
            *(f"model.{option}" for option in common.Model.known(config.model.name)),
            "method.name",
        }


# What belongs to an experiment, and to a method in it --------------------------------

GOLDEN = {
    "zero_shot": {
        "model.name": "mlp",
        "model.hidden": (200, 200),
        "rounds": 100,
        "data.num_clients": 10,
        "data.num_novel": 5,
        "data.partition": "dirichlet",
        "data.alpha": 1.0,
        "data.min_size": 10,
        "local.learning_rate": 0.01,
        "local.learning_rate_decay": 0.99,
        "local.batch_size": 128,
        "local.clip_norm": 10.0,
        "method.hidden": (220, 220),
        "server.sampler": "full",
        "server.weights": "size",
    },
    "zero_shot:digits": {
        "model.hidden": (32,),
        "rounds": 40,
        "data.min_size": 4,
        "local.learning_rate": 0.05,
        "local.batch_size": 16,
        "local.clip_norm": 10.0,
        "method.hidden": (32, 32),
        "method.chunk_size": 64,
    },
    "personalised": {
        "model.name": "resnet8",
        "rounds": 90,
        "data.split": "train",
        "data.num_clients": 20,
        "data.num_novel": 5,
        "data.alpha": 0.5,
        "data.min_size": 40,
        "data.capped": True,
        "data.test_fraction": 0.0,
        "local.epochs": 4,
        "local.optimizer": "sgd(momentum=0.9, nesterov=True)",
        "local.learning_rate": 0.1,
        "local.learning_rate_decay": 1.0,
        "local.milestones": (1 / 3, 2 / 3),
        "local.weight_decay": 5e-4,
        "local.clip_norm": None,
        "server.sampler": "uniform",
        "server.cohort_size": 5,
        "evaluation.finetune_epochs": (0, 4),
        "method.embedding_size": 64,
    },
    "personalised:cifar10": {
        "model.name": "resnet38",
        "model.blocks": 6,
        "rounds": 150,
        "data.split": "train+test",
        "data.num_clients": 100,
        "data.num_novel": 0,
        "local.milestones": (4 / 15, 8 / 15),
        "server.cohort_size": 25,
        "method.embedding_size": 128,
    },
    "personalised:digits": {
        "model.name": "lenet",
        "model.channels": (16, 16),
        "rounds": 20,
        "local.learning_rate": 0.02,
        "server.cohort_size": 3,
        "method.embedding_size": 64,
    },
    "personalised:cifar100": {"model.name": "resnet38x2", "model.width": 32},
    "personalised:fashion_mnist": {"model.name": "resnet38", "rounds": 90},
    "pfedhn": {
        "model.name": "pfedhn_cnn",
        "rounds": 5000,
        "evaluation.every": 100,
        "data.split": "train+test",
        "data.num_clients": 10,
        "data.num_novel": 0,
        "data.partition": "class_shares",
        "data.classes_per_client": 2,
        "data.eval_fraction": 1 / 6,
        "data.validation_fraction": 0.2,
        "data.stratified": True,
        "local.steps": 50,
        "local.batches": "fresh",
        "local.batch_size": 64,
        "local.optimizer": "sgd(momentum=0.9)",
        "local.learning_rate": 5e-3,
        "local.weight_decay": 5e-5,
        "local.clip_norm": 50.0,
        "server.optimizer": "sgd(momentum=0.9)",
        "server.learning_rate": 1e-2,
        "server.sampler": "uniform",
        "server.cohort_size": 1,
        "server.sequential": False,
    },
    "pfedhn:cifar100": {"data.classes_per_client": 10, "data.split": "train+test"},
    "families": {
        "families": ("mh_cnn", "vgg8", "mh_resnet10", "mh_resnet12", "mh_resnet18"),
        "rounds": 500,
        "data.split": "train",
        "data.num_clients": 50,
        "data.partition": "class_draws",
        "data.classes_per_client": 2,
        "data.eval_fraction": 0.25,
        "local.epochs": 1,
        "local.batch_size": 64,
        "local.optimizer": "sgd(momentum=0.9)",
        "local.learning_rate": 5e-3,
        "local.weight_decay": 5e-4,
        "local.clip_norm": 50.0,
        "server.optimizer": "adam",
        "server.learning_rate": 2e-4,
        "server.sequential": True,
        "evaluation.finetune_epochs": (0, 1),
    },
    "families:tiny_imagenet": {"data.classes_per_client": 20},
    "families:emnist": {"data.classes_per_client": 6},
}


@pytest.mark.parametrize("name", GOLDEN)
def test_an_experiment_is_what_was_published(name):
    experiment, _, data = name.partition(":")
    found = common.flat(get_config(experiment, f"data={data}" if data else ""))
    assert {k: found[k] for k in GOLDEN[name]} == GOLDEN[name]


_ADAM = {"server.optimizer": "adam", "server.learning_rate": 2e-4}
_HEADS = {**_ADAM, "server.sequential": True}
_PFEDHN = {"server.optimizer": "sgd(momentum=0.9)", "server.learning_rate": 1e-2}
_REP = {"local.epochs": None, "local.steps": None}
# Fields of the experiment that are others than FedAvg's, by method and variant.
_PEFLL = {
    "server.optimizer": "adam",
    "server.learning_rate": 2e-4,
    "server.weights": "uniform",
}
APART = {
    "constant_embedding": {"local.clip_norm": 10.0},
    "feddyn": {"server.weights": "uniform", "local.clip_norm": 10.0},
    "fedrep": _REP,
    "hyperfedzero": {"local.clip_norm": 10.0},
    "hyperfl": _REP,
    "mh_pfedhn": _HEADS,
    "mh_pfedhngd": _HEADS,
    "odpfl_hn": _PEFLL,
    "pefll": _PEFLL,
    "pfedhn": {**_PFEDHN, "server.sequential": True},
    "pfedla": {"server.sequential": True},
    "pfedlhn": {
        "server.optimizer": "adamw",
        "server.learning_rate": 3e-4,
        "server.sequential": True,
    },
    "pfedme": {"local.optimizer": "sgd", "local.learning_rate": 0.005},
    "scaffold": {"server.weights": "uniform"},
    "centre": {
        "data.pooled": True,
        "local.epochs": 1,
        "local.steps": None,
        "server.sampler": "full",
    },
    "fedavg_ft": {"evaluation.finetune_epochs": (0, 4)},
    "fedavgm": {"server.optimizer": "fedavgm(beta=0.9)"},
    "fedadagrad": {
        "server.optimizer": "fedadagrad(tau=1e-3)",
        "server.learning_rate": 0.1,
    },
    "fedadam": {
        "server.optimizer": "fedadam(b1=0.9, b2=0.99, tau=1e-3)",
        "server.learning_rate": 0.1,
    },
    "fedyogi": {
        "server.optimizer": "fedyogi(b1=0.9, b2=0.99, tau=1e-3)",
        "server.learning_rate": 0.01,
    },
    "pfedhn_families": {**_PFEDHN, "server.sequential": True},
    "pfedhn_pc": {**_PFEDHN, "server.learning_rate": 5e-2, "server.sequential": True},
    "pfedhn_synchronous": {"server.optimizer": "sgd(momentum=0.9)"},
}
# In pFedHN's own experiment one client is visited a round.
VISITING = ("pfedhn", "pfedhn_families", "pfedhn_pc", "pfedlhn")
VISITS = {"rounds": 5000, "evaluation.every": 100, "server.sampler": "uniform"}


@pytest.mark.parametrize("name", [*registry.methods(), *methods.ALIASES])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_what_belongs_to_a_method_in_an_experiment(experiment, name):
    config, other = get_config(experiment, name), get_config(experiment, "fedavg")
    known = common.flat(other)
    expected = dict(APART.get(name, {}))
    if name == "pfedhn_synchronous":  # the step grows with the clients
        expected["server.learning_rate"] = 1e-2 * config.data.num_clients
        expected["server.sampler"] = "full"
    if experiment == "pfedhn" and name in VISITING:
        expected |= {**VISITS, "server.sequential": False}
    if (experiment, name) == ("zero_shot", "pefll"):  # unseen clients with labels
        expected["evaluation.finetune_epochs"] = (0,)
    expected = {k: v for k, v in expected.items() if known[k] != v}
    found = {
        k: v for k, v in differing(config, other).items() if not k.startswith("method.")
    }
    assert found == expected


@pytest.mark.parametrize(
    ("experiment", "arg", "options"),
    [
        ("zero_shot", "fedjets", {"num_sent": 5}),
        ("zero_shot", "constant_embedding", {"hidden": (220, 220)}),
        ("personalised", "fedjets", {"num_sent": None}),
        ("personalised", "fedrep", {"head_epochs": 3, "body_epochs": 1}),
        ("zero_shot", "fedrep", {"head_epochs": 1, "body_epochs": 1}),
        ("personalised", "hyperfednet,data=mnist", {"embedding_size": 64}),
        ("personalised", "hyperfednet,data=cifar10", {"embedding_size": 128}),
        ("families", "mh_pfedhn", {"output_size": 3072}),
        ("families", "mh_pfedhn,data=digits", {"output_size": 2048}),
        (
            "pfedhn",
            "pfedhn_pc",
            {"keep": ("params/head/.*",), "persist_optimizer": "kept"},
        ),
    ],
)
def test_options_of_a_method_in_an_experiment(experiment, arg, options):
    found = get_config(experiment, arg).method
    assert {k: found[k] for k in options} == options


def test_all_other_options_are_the_methods_own():
    for experiment, module in EXPERIMENTS.items():
        for name in registry.methods():
            config = get_config(experiment, name)
            tuned = module.TUNED.get(name, methods.Tuned({}, ""))
            own = {**tuned.fields, **tuned.on.get("cifar10", {})}
            for option, (default, _) in common.Method.known(name).items():
                if f"method.{option}" not in {*own, *tuned.on.get("mnist5k", {})}:
                    assert config.method[option] == default, (experiment, name, option)


def test_tables_name_what_there_is_and_say_where_it_is_from():
    for module in EXPERIMENTS.values():
        for name, tuned in module.TUNED.items():
            known = {*common.FIELDS, *_options(name)}
            assert len(tuned.origin) > 10
            assert set(tuned.on) <= set(module.PRESETS)
            for part in (tuned.fields, *tuned.on.values()):
                assert set(part) <= known
        assert {"digits", "mnist5k"} <= set(module.PRESETS)
        for preset in module.PRESETS.values():
            own = (k for k in preset if not k.startswith("model."))
            assert set(own) <= set(common.FIELDS)
    for alias in methods.ALIASES.values():
        assert set(alias.fields) <= {*common.FIELDS, *_options(alias.method)}
        assert alias.words.endswith(".")
    assert not set(methods.ALIASES) & set(registry.methods())


def _options(name):
    return {f"method.{option}" for option in common.Method.known(name)}


def test_numbers_follow_the_rounds_and_clients_they_come_from():
    for experiment in EXPERIMENTS:
        for name in ("fedavg", "pfedsim", "pfedhn", "pfedhn_synchronous"):
            whole, found = get_config(experiment, name), get_config(experiment, name)
            is_quarter = found.server.cohort_size * 4 == found.data.num_clients
            found.update_from_flattened_dict({"rounds": 30, "data.num_clients": 8})
            marks = build.marks(found)
            assert set(marks) == set(build.marks(whole))
            for field, rounds in marks.items():
                shares = [mark / whole.rounds for mark in build.marks(whole)[field]]
                assert rounds == pytest.approx([30 * x for x in shares], abs=1)
                assert all(0 < round < 30 for round in rounds)
            assert is_quarter == (experiment == "personalised")
            if is_quarter:
                assert found.server.cohort_size == 2


def test_all_clients_at_once_make_as_many_visits_at_the_same_rate():
    for name in ("pfedhn_synchronous", "fedavg"):
        given, flagged = (
            get_config("pfedhn", f"{name},clients=50"),
            get_config("pfedhn", name),
        )
        flagged.data.num_clients = 50
        for found in (given, flagged):
            assert found.rounds == 5000 // 50 and found.evaluation.every == 2
            if name != "fedavg":
                assert found.server.learning_rate == pytest.approx(50 * 1e-2)


# Arguments ---------------------------------------------------------------------------

VALUES = {
    "method": "fedprox",
    "data": "digits",
    "alpha": "0.3",
    "novel": "3",
    "clients": "7",
    "iid": "True",
    "smoke": "True",
    "shift": "hybrid",
    "tuned": "True",
    "averaged": "True",
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_argument_counts_or_is_refused(experiment):
    module = EXPERIMENTS[experiment]
    name = "fedavg" if experiment == "zero_shot" else module.DEFAULT  # for `tuned`
    before = get_config(experiment, name).to_dict()
    for argument in {**arguments.SHARED, **module.EXTRA}:
        given = f"{argument}={VALUES[argument]}"
        assert get_config(experiment, f"{name},{given}").to_dict() != before
        wrong = [f"{argument}=", f"{given},", f",{given}", ","]
        if argument != "method":
            wrong.append(f"{given},{given}")
        if argument not in ("data", "method"):  # text
            wrong += [f"{argument}=1.5x", f"{argument}=None", f"{argument}=()"]
        for text in wrong:
            with pytest.raises(ValueError, match="argument"):
                get_config(experiment, text)
    with pytest.raises(ValueError, match=r"unknown config argument 'colour'; acc.*iid"):
        get_config(experiment, "colour=3")
    with pytest.raises(ValueError, match="smoke must be bool"):
        get_config(experiment, "smoke=wide")


def test_the_method_is_the_first_bare_name_or_what_method_says():
    for arg, name in {
        "": "hyperfedzero",
        "fedprox": "fedprox",
        "data=digits,fedprox": "fedprox",
        "smoke,fedprox": "fedprox",
        "method=fedprox": "fedprox",
        "ditto,method=fedprox": "fedprox",
        "method=ditto,method=fedprox": "fedprox",
        "hyperjax.algorithms.fedprox:fedprox,data=digits": (
            "hyperjax.algorithms.fedprox:fedprox"
        ),
        "fedyogi": "fedavg",
    }.items():
        config = get_config("zero_shot", arg)
        assert config.method.name == name
        assert "mu" in config.method or "fedprox" not in arg
    with pytest.raises(ValueError, match=r"method='fedprx' is unknown.*'fedprox'"):
        get_config("zero_shot", "fedprx,data=digits")
    with pytest.raises(ValueError, match=r"method='smoked'.*mean 'smoke'"):
        get_config("zero_shot", "smoked")
    with pytest.raises(ValueError, match="unknown config argument 'ditto'"):
        get_config("zero_shot", "fedprox,ditto")
    with pytest.raises(
        ValueError, match=r"method='zzz' is unknown .accepted: apfl.*fed"
    ):
        get_config("zero_shot", "zzz")


def test_arguments_reach_the_fields():
    config = get_config("personalised", "data=cifar10,iid,novel=7,clients=40")
    assert config.data.partition == "iid" and config.data.num_novel == 7
    assert (config.data.num_clients, config.server.cohort_size) == (40, 10)
    assert build.marks(config) == {"local.milestones": [40, 80]}
    assert get_config("zero_shot", "alpha=1").data.alpha == 1.0
    config = get_config("families", "alpha=0.3,averaged")
    assert (config.data.partition, config.data.alpha) == ("dirichlet", 0.3)
    assert not config.server.sequential
    assert get_config("zero_shot", "fedavg,tuned").local.learning_rate == 0.3
    for arg, message in {
        "hyperfedzero,tuned": "tuned: no rate was chosen for 'hyperfedzero'",
        "iid,alpha=3": "iid and alpha",
    }.items():
        with pytest.raises(ValueError, match=message):
            get_config("zero_shot", arg)
    with pytest.raises(ValueError, match=r"averaged would change nothing.*'fml'"):
        get_config("families", "fml,averaged")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_smoke_run_is_two_short_rounds(experiment):
    for name in (*registry.methods(), *methods.ALIASES):
        config = get_config(experiment, f"{name},smoke")
        assert config.rounds == 2
        assert {config.local.epochs, config.local.steps} <= {1, None}


def test_numbers_of_arguments_are_checked_as_their_fields_are():
    for experiment in EXPERIMENTS:
        for text in ("alpha=-1", "alpha=1e999", "clients=0", "clients=-3", "novel=-2"):
            with pytest.raises(ValueError, match=r"data\.(alpha|num_\w+)="):
                build.check(get_config(experiment, text))


@pytest.mark.parametrize(
    ("data", "like"),
    [
        ("mnist", "mnist"),
        ("kmnist", "mnist"),
        ("emnist/byclass", "mnist"),
        ("fashion_mnist:3.0.1", "fashion_mnist"),
        ("cifar100", "cifar100"),
        ("cifar10_corrupted/fog_1", "cifar10"),
        ("svhn_cropped", "cifar10"),
        ("mine.npz", "mnist5k"),
        ("synthetic", "digits"),
    ],
)
def test_other_data_sets_are_run_like_the_nearest(data, like):
    found, known = (get_config("personalised", f"data={name}") for name in (data, like))
    assert found.data.name == data
    found.data.name = like
    assert found == known


def test_partitions_of_the_experiments_are_known():
    for experiment in EXPERIMENTS:
        assert get_config(experiment).data.partition in partition.PARTITIONERS


# Shifts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arg", "fields"),
    [
        ("shift=rotation", {"data.shift": "rotation", "data.partition": "iid"}),
        ("shift=none", {"data.shift": "none", "data.partition": "iid"}),
        (
            "shift=hybrid",
            {
                "data.shift": "rotation",
                "data.partition": "dirichlet",
                "data.alpha": 0.3,
            },
        ),
        ("shift=labels,alpha=0.7", {"data.shift": "none", "data.alpha": 0.7}),
        ("iid,shift=hybrid", {"data.shift": "rotation", "data.partition": "iid"}),
        ("shift=outside", {"data.shift_novel": "outside"}),
    ],
)
def test_a_shift_is_of_images_and_labels(arg, fields):
    config = get_config("zero_shot", f"fedavg,data=digits,{arg}")
    found = common.flat(config)
    assert {k: found[k] for k in fields} == fields
    build.check(config)


@pytest.mark.parametrize("data", ["mnist14", "fashion14"])
def test_small_images_are_shifted_before_they_are_small(data):
    config = get_config("zero_shot", f"fedavg,data={data},shift=hybrid")
    assert config.data.name == {"mnist14": "mnist"}.get(data, "fashion_mnist")
    assert config.data.partition == "mixtures"
    build.check(config)
    # On the digits of 8x8 pixels, who are then seen at 4x4.
    config.data.update(name="digits", samples_per_client=20)
    source = build.load_source(config.data)
    assert source.x.shape[1:] == SHAPE
    assert build.sample_shape(source, config.data) == (4, 4, 1)
    found = build.federate(source, config)
    assert found.pool.x.shape[1:] == (4, 4, 1)
    assert set(found.train.size) == {16} and set(found.novel.size) == {20}


def test_an_unknown_shift_is_refused_before_any_work():
    with pytest.raises(ValueError, match=r"shift='rotatoin'.*mean 'rotation'"):
        get_config("zero_shot", "fedavg,shift=rotatoin")
    config = get_config("zero_shot", "fedavg,data=digits")
    config.data.shift = "inversion"
    config.data.shift_novel = "outside"
    with pytest.raises(ValueError, match="shift_novel='outside' has no meaning"):
        build.check(config)


def test_em_of_a_balanced_method_starts_from_the_uniform_prior(monkeypatch):
    given = []

    def evaluator(*args, source_prior, **options):
        given.append(source_prior)

    monkeypatch.setattr("hyperjax.engine.evaluate.evaluator", evaluator)
    config = get_config("zero_shot", "fedavg,data=digits,alpha=0.3")
    source = build.load_source(config.data)
    for balanced in (False, True):
        config.local.balanced = balanced
        build.assemble(config, build.federate(source, config))
    assert given[0].std() > 0.01 and set(given[1]) == {0.1}
