"""Peak memory of a piece of work: on a CPU in a process of its own, which has done nothing else.

Run as a module it does the work that its argument names, and prints what it found as JSON.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mirage_vlm.benchmarks.harness import Way


def on_card(way: Way, device: torch.device) -> dict[str, int]:
    """Bytes that PyTorch held on the card before the work and at its peak."""
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    way()
    torch.cuda.synchronize(device)
    return {"before": before, "peak": torch.cuda.max_memory_allocated(device)}


def in_process(way: Way) -> dict[str, int] | None:
    """Bytes of this process's memory before the work and at its peak; None where the system doesn't say (Linux does).

    The peak is one since the process began, unless the system lets it be reset.
    """
    if _status("VmHWM") is None:
        return None
    gc.collect()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    way()
    peak = _status("VmHWM")
    assert before is not None and peak is not None
    return {"before": before, "peak": peak}


def elsewhere(work: dict[str, Any]) -> dict[str, int] | None:
    """The same in a fresh process, for work that is described by plain values (see `mirage_vlm.benchmarks.train`)."""
    done = subprocess.run(
        [sys.executable, "-m", "mirage_vlm.benchmarks.memory", json.dumps(work)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"measuring memory failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _status(name: str) -> int | None:
    """A size in /proc/self/status, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(name + ":")]
    return 1024 * int(found[0]) if found else None


def main() -> None:
    from mirage_vlm.benchmarks.train import work_of

    print(json.dumps(in_process(work_of(json.loads(sys.argv[1])))))


if __name__ == "__main__":
    main()
