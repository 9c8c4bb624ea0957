"""Results in the layout of lmms-eval, for its viewers and for whatever else reads its logs.

As lmms-eval writes them, a folder for the model holds `<date>_results.json` and, for each task,
`<date>_samples_<task>.jsonl`. Examples of a data file are a task of their own, such as `choice_blink`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.compare import load_results, prompt_texts
from mirage_vlm.evaluation.intervals import wilson
from mirage_vlm.formats import atomic_writer, read_data
from mirage_vlm.tasks import Score, score
from mirage_vlm.trajectory import Trajectory

METRIC, FILTER = "exact_match", "none"


def write_lmms(results: str | Path, trajectories: str | Path, out: str | Path) -> list[Path]:
    """Write what `mirage eval --out --trajectories` has kept in the layout of lmms-eval.

    Files of another evaluation of the same second are left as they are: a number is then put after the date.

    Args:
        results: `results.json`.
        trajectories: the decoded trajectories of the same evaluation.
        out: the folder that holds a folder for each model.

    Returns:
        The files: first the results, then the samples of each task.

    Raises:
        MirageError: a file cannot be read or written, or the two are not of the same evaluation.
    """
    found = load_results(results)
    decoded = read_data(trajectories, check_files=False)
    aggregated, samples = to_lmms(found, decoded, f"{results} and {trajectories}")
    folder = Path(out) / str(aggregated["model_name_sanitized"])
    date = str(found.get("date", "")).partition("+")[0].replace("-", "").replace(":", "").replace("T", "_") or "undated"
    texts = {"results.json": json.dumps(aggregated, indent=2, ensure_ascii=False).encode()}
    for task, lines in samples.items():
        dumped = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        texts[f"samples_{_plain(task)}.jsonl"] = dumped.encode()
    files = _free(folder, date, texts)
    for path, text in files.items():
        with atomic_writer(path) as file:
            file.write(text)
    return list(files)


def _free(folder: Path, date: str, texts: Mapping[str, bytes]) -> dict[Path, bytes]:
    """Paths at which nothing lies, or these very texts."""
    stamps = itertools.chain([date], (f"{date}-{number}" for number in itertools.count(2)))
    for stamp in stamps:
        files = {folder / f"{stamp}_{name}": text for name, text in texts.items()}
        if all(not path.exists() or path.read_bytes() == text for path, text in files.items()):
            break
    return files


def to_lmms(
    results: Mapping[str, Any], trajectories: Sequence[Trajectory], where: str = "the evaluation"
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The aggregated results and the samples of each task, as lmms-eval has them.

    Args:
        results: what `results.json` holds.
        trajectories: the decoded trajectories, in the same order as the results' items.
        where: what an error message names.

    Raises:
        MirageError: there are more or fewer trajectories than items, one is not decoded, or one comes out otherwise.
    """
    items = results["items"]
    if len(items) != len(trajectories):
        raise MirageError(f"{where}: {len(items)} items, but {len(trajectories)} trajectories")
    samples: dict[str, list[dict[str, Any]]] = {}
    path = results.get("data", {}).get("path")
    of_file = f"_{Path(path).stem}" if path else ""
    for i, (item, trajectory) in enumerate(zip(items, trajectories, strict=True)):
        reason = item.get("error")
        found = score(trajectory) if reason is None else Score(False, False, None, f"error: {reason}")
        if trajectory.decoding is None or found.correct != item["correct"]:
            raise MirageError(f"{where}: example {i}: they are not of the same evaluation")
        of_task = samples.setdefault(f"{trajectory.task or 'none'}{of_file}", [])
        of_task.append(_sample(len(of_task), trajectory, found, results.get("generation", {})))
    return _aggregated(results, samples), samples


def _sample(doc_id: int, trajectory: Trajectory, found: Score, generation: Mapping[str, Any]) -> dict[str, Any]:
    prompt, target = "\n".join(prompt_texts(trajectory)), " | ".join(trajectory.answers)
    document = {"prompt": prompt, "answer": target, "meta": trajectory.meta}
    return {
        "doc_id": doc_id,
        "target": target,
        "filtered_resps": [trajectory.text],  # as `resps` would be, which lmms-eval then leaves out
        "doc_hash": _hash(json.dumps(document, indent=2, ensure_ascii=False)),
        "prompt_hash": _hash(prompt),
        "target_hash": _hash(target),
        METRIC: float(found.correct),
        "verdict": found.verdict,
        "latents": sum(span.k or 0 for span in trajectory.spans),
        "input": prompt,
    }


def _aggregated(results: Mapping[str, Any], samples: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    rows, tasks, version = {}, list(samples), results.get("versions", {}).get("mirage_vlm")
    for task, lines in samples.items():
        n, right = len(lines), sum(line[METRIC] for line in lines)
        accuracy = right / n
        rows[task] = {
            "alias": task,
            f"{METRIC},{FILTER}": accuracy,
            # of a sample's mean, with n - 1 as lmms-eval has it
            f"{METRIC}_stderr,{FILTER}": (accuracy * (1 - accuracy) / (n - 1)) ** 0.5 if n > 1 else "N/A",
            f"{METRIC}_ci95,{FILTER}": list(wilson(int(right), n)),
        }
    generation, data = results.get("generation", {}), results.get("data", {})
    model = str(results["model"])
    return {
        "results": rows,
        "group_subtasks": {task: [] for task in tasks},
        "configs": {
            task: {
                "task": task,
                "dataset_path": str(data.get("path") or data.get("task") or ""),
                "output_type": "generate_until",
                "generation_kwargs": generation,
                "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
                "metadata": {"version": version},
            }
            for task in tasks
        },
        "versions": {task: version for task in tasks},
        "n-shot": {task: 0 for task in tasks},
        "higher_is_better": {task: {METRIC: True} for task in tasks},
        "n-samples": {task: {"original": len(lines), "effective": len(lines)} for task, lines in samples.items()},
        "config": {
            "model": "mirage_vlm",
            "model_args": f"pretrained={model}",
            "batch_size": results.get("engine", {}).get("max_rows"),
            "device": results.get("machine", {}).get("device"),
            "limit": data.get("limit"),
            "gen_kwargs": generation,
            "random_seed": results.get("seed"),
        },
        "date": results.get("date"),
        "task_hashes": {
            task: _hash("".join(f"sample_{i}{line['doc_hash']}" for i, line in enumerate(lines)))
            for task, lines in samples.items()
        },
        "model_source": "mirage_vlm",
        "model_name": model,
        "model_name_sanitized": _plain(model.strip("/")),
        "total_evaluation_time_seconds": str(results.get("seconds")),
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(name: str) -> str:
    """A name that can be a file's, as lmms-eval writes it: `org/model` → `org__model`."""
    return re.sub(r"[\"<>:/|\\?*\[\]]+", "__", name)
