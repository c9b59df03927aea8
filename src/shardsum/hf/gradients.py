"""The sum of parameters' gradients over ranks, the same bits on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from ..collectives import sum_scatter
from ..comm import Communicator, agree
from ..problem import state_dtype

# Large enough that a message's latency does not count, small enough to be a fraction of any model.
BUCKET_BYTES = 32 << 20


def sum_gradients(
    comm: Communicator, parameters: Iterable[nn.Parameter], bucket_bytes: int = BUCKET_BYTES
) -> None:
    """Replace each parameter's gradient by its sum over all ranks, in float32 or wider.

    A parameter that has a gradient on some ranks only (an expert that no token of the others went to) counts as
    zero on the others; one that has none on any rank keeps none.

    Numerics: each element is added in rank order on one rank, and travels to the others: equal bits everywhere.
    Traffic: 64 bytes and a byte for each parameter to each other rank; then each rank sends 2 (N - 1) / N of the
    gradients' bytes in float32, in buckets of about `bucket_bytes`, two rounds each.
    Raises: Mismatch where ranks have other parameters.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    sizes = [[*parameter.shape] for parameter in trained]
    agree(comm, {"call": "hf.sum_gradients", "parameters": len(sizes), "elements": sum(map(_elements, sizes))})
    if comm.size == 1 or not trained:
        return
    present = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.uint8)
    on_some_rank = torch.stack(comm.all_gather(present)).any(dim=0).tolist()
    summed = [parameter for parameter, found in zip(trained, on_some_rank, strict=True) if found]
    for bucket in _buckets(summed, bucket_bytes):
        _sum_bucket(comm, bucket)


def _sum_bucket(comm: Communicator, bucket: Sequence[nn.Parameter]) -> None:
    dtype = state_dtype(bucket[0].dtype)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
    flat = torch.cat([gradient.detach().to(dtype).reshape(-1) for gradient in gradients])
    parts = flat.tensor_split(comm.size)
    own = sum_scatter(comm, parts)
    whole = torch.cat(comm.all_gather(own, [part.shape for part in parts]))
    pieces = whole.split([gradient.numel() for gradient in gradients])
    for parameter, gradient, piece in zip(bucket, gradients, pieces, strict=True):
        parameter.grad = gradient.copy_(piece.view_as(gradient))


def _buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Gather neighbours of one dtype and device, until they are more than `bucket_bytes` together."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        same = not bucket or (bucket[0].dtype, bucket[0].device) == (parameter.dtype, parameter.device)
        if bucket and (size >= bucket_bytes or not same):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel() * state_dtype(parameter.dtype).itemsize
    if bucket:
        yield bucket


def _elements(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
