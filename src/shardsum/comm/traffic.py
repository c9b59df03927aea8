"""The count of what a rank has sent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Traffic:
    """What one rank has sent to other ranks so far: payload bytes, messages, and rounds of communication.

    An all-gather counts as one message to each other rank, whatever algorithm the library below uses.
    """

    sent_bytes: int = 0
    messages: int = 0
    rounds: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.sent_bytes + other.sent_bytes, self.messages + other.messages, self.rounds + other.rounds
        )

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.sent_bytes - other.sent_bytes, self.messages - other.messages, self.rounds - other.rounds
        )

    def snapshot(self) -> Traffic:
        return Traffic(self.sent_bytes, self.messages, self.rounds)
