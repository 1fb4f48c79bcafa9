"""pfl-research's simulated backend, one process."""

from workload import LEARNING_RATE, cohort, given, images, normalised, timed

work = given()

import importlib.metadata  # noqa: E402
import itertools  # noqa: E402

import torch  # noqa: E402
from networks_torch import loss_of, network, tensors  # noqa: E402
from pfl.aggregate.simulate import SimulatedBackend  # noqa: E402
from pfl.aggregate.weighting import WeightByUser  # noqa: E402
from pfl.algorithm.base import NNAlgorithmParams  # noqa: E402
from pfl.algorithm.federated_averaging import FederatedAveraging  # noqa: E402
from pfl.data.dataset import Dataset  # noqa: E402
from pfl.data.federated_dataset import FederatedDataset  # noqa: E402
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams  # noqa: E402
from pfl.metrics import Weighted  # noqa: E402
from pfl.model.pytorch import PyTorchModel  # noqa: E402
from torch.nn import functional as F  # noqa: E402

x, y = images(work)
x, y = tensors(normalised(x), y)
net = network(work.network)
net.loss = lambda a, b, **options: F.cross_entropy(net(a), b)
net.metrics = lambda a, b, **options: {"loss": Weighted(net.loss(a, b).item(), 1)}
order = itertools.chain.from_iterable(cohort(work, t) for t in itertools.count())
data = FederatedDataset(
    lambda user: Dataset(raw_data=[x[user], y[user]], user_id=str(user)),
    lambda: next(order),
)
model = PyTorchModel(
    net,
    local_optimizer_create=torch.optim.SGD,
    central_optimizer=torch.optim.SGD(net.parameters(), 1.0),
)
backend = SimulatedBackend(
    training_data=data, val_data=data, postprocessors=[WeightByUser()]
)
how = dict(local_learning_rate=LEARNING_RATE, local_num_epochs=work.epochs)


def one_round(t):
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=1,
            evaluation_frequency=10**9,
            train_cohort_size=work.cohort,
            val_cohort_size=0,
        ),
        backend=backend,
        model=model,
        model_train_params=NNTrainHyperParams(local_batch_size=work.batch, **how),
        model_eval_params=NNEvalHyperParams(local_batch_size=1000),
        callbacks=[],
    )


about = {"version": importlib.metadata.version("pfl")}
timed(work, one_round, lambda: loss_of(net, x[0], y[0]), about)
