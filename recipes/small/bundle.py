"""Copy the runs of recipes/small into the package: weights, recipes and logs (model cards are written by hand)."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RUNS = ROOT / "runs" / "small"
ASSETS = ROOT / "src" / "mirage_vlm" / "assets"

# package folder -> the run whose final model it is, and the runs before it whose logs it keeps
MODELS = {"vsp-small-base": ("base", ()), "vsp-small": ("stage2-last", ("stage1", "stage2", "stage2-larger"))}


def main() -> None:
    for name, (run, earlier) in MODELS.items():
        target = ASSETS / name
        target.mkdir(parents=True, exist_ok=True)
        for path in (RUNS / run / "final").iterdir():
            shutil.copy(path, target / path.name)
        shutil.copy(RUNS / run / "metrics.jsonl", target / "metrics.jsonl")
        for before in earlier:
            shutil.copy(RUNS / before / "metrics.jsonl", target / f"{before}-metrics.jsonl")
            shutil.copy(RUNS / before / "recipe.json", target / f"{before}-recipe.json")
        size = sum(path.stat().st_size for path in target.iterdir())
        print(f"{target.relative_to(ROOT)}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
