"""One script for every launcher. Run it alone, or as one rank of several:

python examples/04_any_launcher.py
mpiexec -n 2 python examples/04_any_launcher.py
torchrun --nproc-per-node 2 examples/04_any_launcher.py
"""

import torch

import shardsum

comm = shardsum.connect()
weights, values = torch.arange(12.0), torch.ones(12, 2)
mine = shardsum.Layout("contiguous").positions(12, comm.rank, comm.size)
total = shardsum.weighted_sum(weights[mine], values[mine], comm=comm)
if comm.rank == 0:
    print("sum over all ranks:", total.tolist())

# Output:
# sum over all ranks: [66.0, 66.0]
