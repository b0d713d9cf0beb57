"""Who else was there: how much of the two cores was taken by what is no part of the benchmark."""

from __future__ import annotations

import contextlib
import gzip
import platform
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import psutil


def taken_by_others(cores: tuple[int, ...]) -> float:
    """Return the seconds in which these cores ran neither this process nor its descendants. Steal is among them."""
    busy = 0.0
    for core in (psutil.cpu_times(percpu=True)[number] for number in cores):
        busy += core.user + core.nice + core.system + core.steal
        if interrupts_are_charged():
            busy += core.irq + core.softirq
    this = psutil.Process()
    # The parent knows of those that have ended, such as wrk.
    return busy - sum(this.cpu_times()[:4]) - used(this.children(recursive=True))


def used(processes: Iterable[psutil.Process]) -> float:
    """Return the processor seconds, user and system, of those that are still there."""
    seconds = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            seconds += sum(process.cpu_times()[:2])
    return seconds


@cache
def interrupts_are_charged() -> bool:
    """Return whether the time of interrupts, such as the network's, counts as that of the process they came upon.

    Most distributions compile the kernel with IRQ_TIME_ACCOUNTING, and then it does not.
    """
    for path in (Path("/proc/config.gz"), Path(f"/boot/config-{platform.release()}")):
        if path.exists():
            said = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            return b"\nCONFIG_IRQ_TIME_ACCOUNTING=y" not in said
    return False
