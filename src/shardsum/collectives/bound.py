"""The least that any all-reduce must send: what an algorithm's declared cost is to be seen beside."""

from __future__ import annotations


def least_bytes(size: int, buffer_bytes: int) -> int:
    """Bytes that all ranks together send at least to reduce buffers of so many bytes over `size` ranks.

    Every number has to come from all ranks and to reach all ranks, which takes 2 (size - 1) one-way messages.
    Source: Harary and Schwenk 1974 (the communication problem on graphs and digraphs); Patarasuk and Yuan 2009
    (section 3: at least 2 (size - 1) / size of the buffer on some rank).
    """
    return 2 * (size - 1) * buffer_bytes


def least_messages(size: int) -> int:
    """Messages that all ranks together send at least. Source: as for `least_bytes`."""
    return 2 * (size - 1)


def least_rounds(size: int, messages_at_once: int = 1) -> int:
    """Rounds in which all ranks' numbers can reach one rank, if it receives so many messages in each.

    What a rank knows of grows at most (messages_at_once + 1) times in a round.
    Source: Chan et al. 2007 (section 4.1).
    """
    rounds, reached = 0, 1
    while reached < size:
        rounds, reached = rounds + 1, reached * (messages_at_once + 1)
    return rounds
