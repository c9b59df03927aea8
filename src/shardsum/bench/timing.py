"""Timing sides that do the same work, alternating, and the machine that it was done on."""

from __future__ import annotations

import datetime
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..extension import instruction_sets


def alternate(
    sides: Mapping[str, Callable[[], object]], repetitions: int, before_each: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each repetition of every side, after one to warm up; the sides take turns.

    In each repetition in another order, the same on every rank: a side that follows a slow one finds cold caches.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for repetition in range(repetitions + 1):
        for name in random.Random(repetition).sample(names, len(names)):
            before_each()
            start = time.perf_counter()
            sides[name]()
            if repetition:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(slower: list[float], faster: list[float]) -> dict[str, float]:
    """How many times as long one side took as the other, repetition by repetition: median, smallest, largest."""
    ratios = [one / other for one, other in zip(slower, faster, strict=True)]
    return {name: round(of(ratios), 3) for name, of in (("median", statistics.median), ("min", min), ("max", max))}


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, instruction sets, cores, load, versions, date."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu or platform.processor(),
        "instruction_sets": instruction_sets(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "shardsum": __version__,
    }
