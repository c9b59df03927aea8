"""The command `shardsum` from its first moment: a signal ends it in one line while torch is being imported."""

from __future__ import annotations

import os
import signal
from typing import NoReturn

# What ends the command, the word for it, and the exit status of shells: 128 and the signal's number.
ENDINGS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def main() -> NoReturn:
    """Import the command and run it; from then on it hears signals itself."""
    for number in ENDINGS:
        signal.signal(number, _end)
    from shardsum.cli import main as run

    run()


def _end(number: int, _: object) -> NoReturn:
    os.write(2, f"shardsum: {ENDINGS[signal.Signals(number)]}\n".encode())
    os._exit(128 + number)
