"""FedJAX's federated averaging, with its default, a compiled step for each batch."""

from workload import LEARNING_RATE, cohort, given, images, normalised, timed

work = given()

import importlib.metadata  # noqa: E402

import fedjax  # noqa: E402
import jax  # noqa: E402
import networks_jax  # noqa: E402

x, y = images(work)
x, name = normalised(x), work.network
names = [f"{client:04}".encode() for client in range(work.clients)]
data = fedjax.InMemoryFederatedData(
    {names[i]: {"x": x[i], "y": y[i]} for i in range(work.clients)}
)
grad = jax.grad(lambda p, batch: networks_jax.loss(name, p, batch["x"], batch["y"]))
algorithm = fedjax.algorithms.fed_avg.federated_averaging(
    grad_fn=lambda p, batch, key: grad(p, batch),
    client_optimizer=fedjax.optimizers.sgd(LEARNING_RATE),
    server_optimizer=fedjax.optimizers.sgd(1.0),
    client_batch_hparams=fedjax.ShuffleRepeatBatchHParams(
        batch_size=work.batch, num_epochs=work.epochs, drop_remainder=True
    ),
)
state = algorithm.init(networks_jax.init(name))


def one_round(t):
    global state
    members = data.get_clients([names[i] for i in cohort(work, t)])
    keys = jax.random.split(jax.random.PRNGKey(t), work.cohort)
    given = [(c, d, k) for (c, d), k in zip(members, keys, strict=True)]
    state, _ = algorithm.apply(state, given)
    jax.block_until_ready(state.params)


about = {"version": importlib.metadata.version("fedjax"), "jax": jax.__version__}
timed(work, one_round, lambda: networks_jax.loss(name, state.params, x[0], y[0]), about)
