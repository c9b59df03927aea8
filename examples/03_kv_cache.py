"""Decoding over a KV cache whose positions lie on three processes: prefill, then token by token."""

import torch

import shardsum


def decode(comm: shardsum.Communicator) -> dict:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 6, 3000, 16), torch.randn(1, 2, 3000, 16), torch.randn(1, 2, 3000, 16)
    cache = shardsum.KVCache(comm=comm, layers=1, kv_heads=2, head_dim=16)
    prompt = [shardsum.shard(x[:, :, :2990], comm=comm, layout="zigzag") for x in (k, v)]
    cache.append(0, *prompt, layout="zigzag")  # each rank brings its part of the prompt, and keeps it
    sent = comm.traffic.snapshot()
    for t in range(2990, 3000):  # every rank makes the same new token; one of them keeps it
        cache.append(0, k[:, :, t : t + 1], v[:, :, t : t + 1])
        out = cache.attend(0, q[:, :, t : t + 1])
    per_token = (comm.traffic - sent).sent_bytes // 10
    return {"out": out, "bytes held": cache.bytes_held, "bytes sent per token": per_token}


if __name__ == "__main__":
    alone = shardsum.launch(decode, ranks=1, transport="threads")[0]
    ranks = shardsum.launch(decode, ranks=3)  # processes, over MPI if it is installed, else Gloo
    print("same output on every rank:", all(torch.equal(ranks[0]["out"], rank["out"]) for rank in ranks))
    print("as one rank alone:", torch.allclose(ranks[0]["out"], alone["out"], atol=1e-6))
    print("a third of the memory:", all(rank["bytes held"] < alone["bytes held"] * 0.35 for rank in ranks))
    print("bytes sent per token:", ranks[0]["bytes sent per token"])

# Output:
# same output on every rank: True
# as one rank alone: True
# a third of the memory: True
# bytes sent per token: 944
