"""Where a model is put: what a user names, or what there is."""

from __future__ import annotations

import torch

from mirage_vlm.errors import MirageError


def choose_device(wanted: str | int | torch.device | None = None) -> torch.device:
    """The device of that name; by default CUDA where there is one, else the CPU.

    Raises:
        MirageError: torch does not know it, or it is not here.
    """
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = ", ".join(_there())
    try:
        device = torch.device(wanted)
    except (RuntimeError, ValueError) as fault:
        raise MirageError(f"--device: torch knows no device {wanted!r}; there is {there}") from fault
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MirageError(f"--device {wanted}: torch finds no CUDA device here; there is {there}")
    if device.type == "meta":  # which holds no numbers
        raise MirageError(f"--device: nothing can be computed on meta; there is {there}")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, AttributeError) as fault:
        raise MirageError(f"--device: there is no {wanted} here; there is {there}") from fault
    return device


def _there() -> list[str]:
    """Names of the devices of this machine."""
    cards = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["cpu", *cards, *(["mps"] if torch.backends.mps.is_available() else [])]
