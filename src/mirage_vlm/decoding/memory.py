"""How much memory is free: what a budget for the cache is a share of."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

CGROUPS = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device.

    On CUDA what torch holds and does not use counts as free, for it gives that out again. On the CPU a container's
    limit counts, which the machine's own figures do not know.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return min([psutil.virtual_memory().available, *_left_in_container()])


def _left_in_container() -> list[int]:
    """Bytes below each limit of this process' control group (version 2, or 1); none where there is no limit."""
    found = []
    for folder, limit, used in (
        (CGROUPS, "memory.max", "memory.current"),
        (CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most, now = ((folder / name).read_text().strip() for name in (limit, used))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # no such group, or it may not be read
        if most.isdigit() and now.isdigit():
            found.append(max(0, int(most) - int(now) + int(stat.get("inactive_file", 0))))  # kept files give way
    return found
