"""Causal attention over 1,000 tokens that lie on four ranks, by three strategies, equal to one process."""

import torch
import torch.nn.functional as F

import shardsum


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)  # not torch.manual_seed: these ranks are threads and share it
    return [torch.randn(1, 8, 1000, 64, generator=generator) for _ in range(3)]


def attend(comm: shardsum.Communicator, strategy: str) -> torch.Tensor:
    q, k, v = (shardsum.shard(x, comm=comm, layout="zigzag") for x in inputs())
    out = shardsum.attention(q, k, v, comm=comm, layout="zigzag", strategy=strategy, causal=True)
    return shardsum.unshard(out, comm=comm, layout="zigzag")


if __name__ == "__main__":
    expected = F.scaled_dot_product_attention(*inputs(), is_causal=True)
    for strategy in ("all_reduce", "all_gather", "ring"):
        outs = shardsum.launch(attend, ranks=4, transport="threads", args=(strategy,))
        right = all(torch.allclose(out, expected, atol=1e-5) for out in outs)
        print(f"{strategy}: right on every rank: {right}")

# Output:
# all_reduce: right on every rank: True
# all_gather: right on every rank: True
# ring: right on every rank: True
