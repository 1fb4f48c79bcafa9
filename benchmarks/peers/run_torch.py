"""A plain PyTorch loop, nothing around it: the best case of whoever builds on it."""

from workload import given, images, normalised, timed

work = given()

import torch  # noqa: E402
from loop_torch import averaging  # noqa: E402
from networks_torch import loss_of, network, tensors  # noqa: E402

x, y = images(work)
x, y = tensors(normalised(x), y)
server = network(work.network)
about = {"version": torch.__version__}
one_round = averaging(work, server, x, y)
timed(work, one_round, lambda: loss_of(server, x[0], y[0]), about)
