"""FedAvg as a plain PyTorch loop, nothing around it."""

import copy

import torch
from torch.nn import functional as F
from workload import LEARNING_RATE, cohort


def averaging(work, server, x, y, wrapped=lambda net: net):
    """Returns `(round) -> None`, which trains `server` on its own device.

    Args:
      work: the `Workload`.
      server: a network.
      x: [clients, samples, c, H, W] float32, where the network is.
      y: [clients, samples] int64, likewise.
      wrapped: gives what is called in place of a client's network.
    """
    local = copy.deepcopy(server)
    forward = wrapped(local)

    def one_round(t):
        members = cohort(work, t)
        total = [torch.zeros_like(p) for p in server.parameters()]
        for client in members:
            local.load_state_dict(server.state_dict())
            optimizer = torch.optim.SGD(local.parameters(), LEARNING_RATE)
            for _ in range(work.epochs):
                order = torch.randperm(work.samples, device=x.device)
                for rows in order.split(work.batch):
                    optimizer.zero_grad()
                    F.cross_entropy(
                        forward(x[client, rows]), y[client, rows]
                    ).backward()
                    optimizer.step()
            with torch.no_grad():
                torch._foreach_add_(total, list(local.parameters()))
        with torch.no_grad():
            for parameter, summed in zip(server.parameters(), total, strict=True):
                parameter.copy_(summed / len(members))

    return one_round
