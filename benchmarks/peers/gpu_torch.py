"""A plain PyTorch loop on an accelerator: as it is, compiled, or as CUDA graphs.

python gpu_torch.py '["mlp", 32, 480, 25, 4, 5, 100]' eager highest

"highest" is float32, "bfloat16" autocast, any other TF32 where the card has it.
"""

import json
import statistics
import sys
import time

import torch
from loop_torch import averaging
from networks_torch import network, tensors
from workload import Workload, images, normalised

work, (way, precision) = Workload(*json.loads(sys.argv[1])), sys.argv[2:]
rounded = precision != "highest"
torch.set_float32_matmul_precision("high" if rounded else "highest")
torch.backends.cudnn.allow_tf32 = rounded
device = "cuda" if torch.cuda.is_available() else "cpu"
x, y = images(work)
x, y = (each.to(device) for each in tensors(normalised(x), y))
server = network(work.network).to(device)
modes = {"graphs": "reduce-overhead", "compiled": "default"}


def wrapped(net):
    net = torch.compile(net, mode=modes[way]) if way in modes else net
    if precision != "bfloat16":
        return net

    def half(x):
        with torch.autocast(device, torch.bfloat16):
            return net(x).float()

    return half


one_round = averaging(work, server, x, y, wrapped)
seconds = []
for t in range(work.rounds + 1):
    began = time.perf_counter()
    one_round(t)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - began)
record = {
    "seconds": statistics.median(seconds[1:]),
    "start_seconds": seconds[0],
    "version": torch.__version__,
    "device": torch.cuda.get_device_name() if device == "cuda" else device,
}
print(json.dumps(record), flush=True)
