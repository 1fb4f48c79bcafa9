"""DrJAX: its broadcast, map and mean around a local loop, which it leaves to users."""

from workload import LEARNING_RATE, cohort, given, images, normalised, timed

work = given()

import importlib.metadata  # noqa: E402

import drjax  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import networks_jax  # noqa: E402

x, y = images(work)
x, y = jnp.asarray(normalised(x)), jnp.asarray(y)
server, name = networks_jax.init(work.network), work.network


def client(start, images, labels, key):
    def loss(p, rows):
        return networks_jax.loss(name, p, images[rows], labels[rows])

    def step(p, rows):
        grads = jax.grad(loss)(p, rows)
        return jax.tree.map(lambda w, g: w - LEARNING_RATE * g, p, grads), None

    keys = jax.random.split(key, work.epochs)
    orders = jax.vmap(lambda k: jax.random.permutation(k, work.samples))(keys)
    return jax.lax.scan(step, start, orders.reshape(-1, work.batch))[0]


@jax.jit
@drjax.program(partition_size=work.cohort)
def averaged(server, images, labels, keys):
    sent = drjax.broadcast(server)
    return drjax.reduce_mean(drjax.map_fn(client, (sent, images, labels, keys)))


def one_round(t):
    global server
    members = jnp.asarray(cohort(work, t))
    keys = jax.random.split(jax.random.key(t), work.cohort)
    server = jax.block_until_ready(averaged(server, x[members], y[members], keys))


about = {"version": importlib.metadata.version("drjax"), "jax": jax.__version__}
timed(work, one_round, lambda: networks_jax.loss(name, server, x[0], y[0]), about)
