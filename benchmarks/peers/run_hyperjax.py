"""hyperjax: the engine as a run has it, a round in a call, on one device."""

import sys
from pathlib import Path

from workload import CLASSES, LEARNING_RATE, given, images, timed

work = given()
sys.path.insert(0, str(Path(__file__).parents[2]))

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from hyperjax import models, native, tree  # noqa: E402
from hyperjax.algorithms.fedavg import fedavg  # noqa: E402
from hyperjax.data import clients  # noqa: E402
from hyperjax.engine import schedule  # noqa: E402
from hyperjax.launch import cli  # noqa: E402
from hyperjax.models import layers  # noqa: E402
from hyperjax.training import Local, Phase  # noqa: E402


class ResNet20(nn.Module):
    """16, 32, 64 channels, three blocks each, GroupNorm of 8 groups."""

    @nn.compact
    def __call__(self, x):
        def conv(features, size, stride=1):
            padding = ((size // 2, size // 2),) * 2
            return layers.Conv(features, size, stride, padding, use_bias=False)

        x = nn.relu(nn.GroupNorm(8)(conv(16, 3)(x)))
        for group, features in enumerate((16, 32, 64)):
            for block in range(3):
                stride = 2 if group and not block else 1
                y = nn.relu(nn.GroupNorm(8)(conv(features, 3, stride)(x)))
                y = nn.GroupNorm(8)(conv(features, 3)(y))
                x = nn.relu(y + (conv(features, 1, stride)(x) if stride == 2 else x))
        return layers.Dense(CLASSES)(x.mean((1, 2)))


NETWORKS = {
    "mlp": models.ZOO["mlp"](CLASSES),
    "lenet": models.LeNet(CLASSES, channels=(6, 16), hidden=(120, 84)),
    "cnn": models.LeNet(CLASSES, channels=(32, 64), hidden=(512,), padding="SAME"),
    "resnet": ResNet20(),
}

cli.keep_programs()
x, y = images(work)
pool = clients.make_pool(x.reshape(-1, *work.shape), y.ravel(), np.arange(y.size))
model = models.from_linen(NETWORKS[work.network], work.shape, CLASSES)
local = Local(optax.sgd(LEARNING_RATE), work.batch, phases=(Phase(epochs=work.epochs),))
table = clients.Table(
    np.arange(y.size, dtype=np.int32).reshape(y.shape),
    np.full(len(y), work.samples, np.int32),
)
sim = schedule.simulator(
    fedavg(model, local=local),
    table,
    pool,
    weight=np.ones(work.clients),
    cohort_size=work.cohort,
    sampler="uniform",
    # 50 uplinks of 2.2 million numbers would wait for the server.
    streaming=work.network == "cnn",
)
carry = sim.init(0)


def one_round(t):
    global carry
    carry, info = sim.run(0, carry, t, 1, donate=True)
    jax.block_until_ready((carry, info))
    assert int(info["steps"][0]) == work.cohort * work.steps


def loss():
    variables = jax.eval_shape(model.init, jax.random.key(0))
    merged = tree.splitter(variables, ".*").merge(dict(carry.server.theta), {})
    mean, std = np.asarray(pool.mean), np.asarray(pool.std)
    pixels = jnp.asarray((x[0].astype(np.float32) / 255 - mean) / std)
    logits = model.predict(merged, pixels)
    labels = jnp.asarray(y[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


about = {"version": jax.__version__, "mapper": "map", "onednn": native.version()}
timed(work, one_round, loss, about)
