"""A plain PyTorch loop, nothing around it: the best case of whoever builds on it."""

from workload import LEARNING_RATE, cohort, given, images, normalised, timed

work = given()

import copy  # noqa: E402

import torch  # noqa: E402
from networks_torch import loss_of, network, tensors  # noqa: E402
from torch.nn import functional as F  # noqa: E402

x, y = images(work)
x, y = tensors(normalised(x), y)
server = network(work.network)
local = copy.deepcopy(server)


def one_round(t):
    members = cohort(work, t)
    total = [torch.zeros_like(p) for p in server.parameters()]
    for client in members:
        local.load_state_dict(server.state_dict())
        optimizer = torch.optim.SGD(local.parameters(), LEARNING_RATE)
        for _ in range(work.epochs):
            for rows in torch.randperm(work.samples).split(work.batch):
                optimizer.zero_grad()
                F.cross_entropy(local(x[client, rows]), y[client, rows]).backward()
                optimizer.step()
        with torch.no_grad():
            torch._foreach_add_(total, list(local.parameters()))
    with torch.no_grad():
        for parameter, summed in zip(server.parameters(), total, strict=True):
            parameter.copy_(summed / len(members))


about = {"version": torch.__version__}
timed(work, one_round, lambda: loss_of(server, x[0], y[0]), about)
