"""Copy the runs of recipes/tasks into the package: weights, recipes and logs (the model card is written by hand).

Weights are stored in bfloat16, half the size, and loaded as the float32 that config.json names.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent.parent
RUNS = ROOT / "runs" / "tasks"
TARGET = ROOT / "src" / "mirage_vlm" / "assets" / "tasks-small"
WEIGHTS = "model.safetensors"
LAST, EARLIER = "base-4", ("base", "base-2", "base-3")


def main() -> None:
    TARGET.mkdir(parents=True, exist_ok=True)
    final = RUNS / LAST / "final"
    for path in final.iterdir():
        if path.name != WEIGHTS:
            shutil.copy(path, TARGET / path.name)
    kept = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(final / WEIGHTS).items()}
    save_file(kept, TARGET / WEIGHTS, metadata={"format": "pt"})
    shutil.copy(RUNS / LAST / "metrics.jsonl", TARGET / "metrics.jsonl")
    for before in EARLIER:
        shutil.copy(RUNS / before / "metrics.jsonl", TARGET / f"{before}-metrics.jsonl")
        shutil.copy(RUNS / before / "recipe.json", TARGET / f"{before}-recipe.json")
    size = sum(path.stat().st_size for path in TARGET.iterdir())
    print(f"{TARGET.relative_to(ROOT)}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
