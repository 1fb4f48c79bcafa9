"""A plain PyTorch loop on an accelerator: as it is, compiled, or as CUDA graphs.

python gpu_torch.py '["mlp", 32, 480, 25, 4, 5, 100]' eager highest

"highest" is float32, any other precision TF32 where the card has it.
"""

import copy
import json
import statistics
import sys
import time

import torch
from networks_torch import network, tensors
from torch.nn import functional as F
from workload import LEARNING_RATE, Workload, cohort, images, normalised

work, (way, precision) = Workload(*json.loads(sys.argv[1])), sys.argv[2:]
rounded = precision != "highest"
torch.set_float32_matmul_precision("high" if rounded else "highest")
torch.backends.cudnn.allow_tf32 = rounded
device = "cuda" if torch.cuda.is_available() else "cpu"
x, y = images(work)
x, y = (each.to(device) for each in tensors(normalised(x), y))
server = network(work.network).to(device)
local = copy.deepcopy(server)
forward = local
if way != "eager":
    mode = "reduce-overhead" if way == "graphs" else "default"
    forward = torch.compile(local, mode=mode)


def one_round(t):
    members = cohort(work, t)
    total = [torch.zeros_like(p) for p in server.parameters()]
    for client in members:
        local.load_state_dict(server.state_dict())
        optimizer = torch.optim.SGD(local.parameters(), LEARNING_RATE)
        for _ in range(work.epochs):
            order = torch.randperm(work.samples, device=device)
            for rows in order.split(work.batch):
                optimizer.zero_grad()
                F.cross_entropy(forward(x[client, rows]), y[client, rows]).backward()
                optimizer.step()
        with torch.no_grad():
            torch._foreach_add_(total, list(local.parameters()))
    with torch.no_grad():
        for parameter, summed in zip(server.parameters(), total, strict=True):
            parameter.copy_(summed / len(members))
    if device == "cuda":
        torch.cuda.synchronize()


seconds = []
for t in range(work.rounds + 1):
    began = time.perf_counter()
    one_round(t)
    seconds.append(time.perf_counter() - began)
record = {
    "seconds": statistics.median(seconds[1:]),
    "start_seconds": seconds[0],
    "version": torch.__version__,
    "device": torch.cuda.get_device_name() if device == "cuda" else device,
}
print(json.dumps(record), flush=True)
