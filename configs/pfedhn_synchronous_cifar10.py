r"""pFedHN with all clients in every round, in pFedHN's experiment on CIFAR-10.

python -m experiments.train --config=configs/pfedhn_synchronous_cifar10.py \
    --workdir=runs/pfedhn_synchronous

Another algorithm than the published one: the server steps once for all clients, on the
mean of their gradients. A round is as many visits as there are clients, so there are
fewer rounds, and the server's learning rate is larger by the same factor.
"""

from configs import pfedhn_cifar10


def get_config(arg: str = ""):
    """Arguments: data (CIFAR-10, CIFAR-100 or an embedded set), clients, smoke."""
    config = pfedhn_cifar10.get_config(arg)
    clients = config.data.get_ref("num_clients")  # also if a flag sets it
    if config.rounds > 2:  # not the smoke run
        config.rounds = (config.rounds - 1) // clients + 1
    config.server.sampler = "full"
    config.server.learning_rate = config.server.learning_rate * clients.to_float()
    config.evaluation.every = (config.evaluation.every - 1) // clients + 1
    return config
