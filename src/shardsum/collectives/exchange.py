"""Groups of ranks exchange what they have, then groups of such groups, until everyone has everything."""

from __future__ import annotations

import functools
import math

from torch import Tensor

from ..comm import Communicator, Ranks, Traffic
from .base import Collective
from .fold import Fold
from .operations import Operation, combine_all


class KaryExchange(Collective):
    """In each round, groups of up to `radix` ranks send each other all they have so far.

    Any number of ranks: the surplus over the largest product of factors up to `radix` is folded in and out.
    Source: Chan et al. 2007 (section 7.2, bidirectional exchange in more than one dimension at a time).
    """

    def __init__(self, radix: int = 4) -> None:
        if radix < 2:
            raise ValueError(f"radix must be 2 or more: got {radix}.")
        self._radix = radix
        self.name = "k_ary" if radix == 4 else f"k_ary, radix {radix}"

    def _all_reduce(self, comm: Communicator, rows: Tensor, operation: Operation) -> None:
        factors = _factors(comm.size, self._radix)
        fold = Fold.of(comm.rank, comm.size, math.prod(factors))
        fold.enter(comm, rows, operation)
        if fold.index is not None:
            inside = 1  # so many neighbours have the same partial result
            for factor in factors:
                self._round(comm, fold, rows, operation, inside, factor)
                inside *= factor
        fold.leave(comm, rows)

    def _round(
        self, comm: Communicator, fold: Fold, rows: Tensor, operation: Operation, inside: int, factor: int
    ) -> None:
        assert fold.index is not None
        own = fold.index // inside % factor
        first = fold.index - own * inside
        pieces = comm.buffers.get(rows, factor - 1)[1]
        peers = [fold.rank_of(first + place * inside) for place in range(factor)]
        messages = []
        for step in range(1, factor):
            to, source = (own + step) % factor, (own - step) % factor
            messages.append((rows, peers[to], pieces[source - (source > own)], peers[source]))
        comm.start(*messages)()
        combine_all([*pieces[:own], rows, *pieces[own:]], operation, rows)

    def _traffic(self, ranks: Ranks, rows: int, row_bytes: int) -> Traffic:
        factors = _factors(ranks.size, self._radix)
        fold = Fold.of(ranks.rank, ranks.size, math.prod(factors))
        folded = fold.traffic(rows * row_bytes)
        if fold.index is None:
            return folded
        messages = sum(factors) - len(factors)
        return folded + Traffic(rows * row_bytes * messages, messages, len(factors))

    def _rounds(self, ranks: Ranks, rows: int, row_bytes: int) -> int:
        factors = _factors(ranks.size, self._radix)
        return len(factors) + Fold.of(ranks.rank, ranks.size, math.prod(factors)).rounds

    def messages_at_once(self, ranks: Ranks) -> int:
        return max(_factors(ranks.size, self._radix), default=1) - 1


class RecursiveDoubling(KaryExchange):
    """In each round, pairs of ranks exchange what they have: log2 of the ranks rounds, all bytes in each.

    Source: Thakur, Rabenseifner, Gropp 2005 (section 4.4).
    """

    def __init__(self) -> None:
        super().__init__(2)
        self.name = "recursive_doubling"


@functools.lru_cache
def _factors(size: int, radix: int) -> list[int]:
    """Few factors of 2 to `radix` whose product is the largest possible up to `size`."""
    products = {1}
    for factor in range(2, radix + 1):
        longer = products
        while longer:
            longer = {product * factor for product in longer if product * factor <= size} - products
            products |= longer
    factors, rest = [], max(products)
    for factor in range(radix, 1, -1):
        while rest % factor == 0:
            factors.append(factor)
            rest //= factor
    return factors
