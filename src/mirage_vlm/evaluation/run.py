"""Whole evaluations: checkpoints on sets of examples, each with its files, and resumed where one was killed."""

from __future__ import annotations

import json
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from mirage_vlm import __version__
from mirage_vlm.decoding import EngineConfig, GenerationConfig
from mirage_vlm.differences import differences
from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.compare import items, load_results
from mirage_vlm.evaluation.evaluate import Scored, evaluate, row_of, summarise, write_json
from mirage_vlm.evaluation.hashes import data_sha256, examples_sha256, model_sha256
from mirage_vlm.evaluation.kept import Kept
from mirage_vlm.evaluation.plots import check_figure, replacement_bars
from mirage_vlm.evaluation.refusals import refusals, told
from mirage_vlm.evaluation.replace import replacement_test, summarise_replacements, verdict
from mirage_vlm.formats import write_jsonl
from mirage_vlm.modeling.bundled import resolve
from mirage_vlm.modeling.checkpoint import has_latents
from mirage_vlm.trajectory import Trajectory

if TYPE_CHECKING:
    from mirage_vlm.modeling import LatentVLM

# fields of results on which the responses depend; of the engine's, these only say how fast they come
DEPENDS_ON = ("model", "data", "generation", "engine", "pictures", "seed", "sha256", "versions")
SPEED = {"max_rows", "max_batch_tokens", "memory_fraction", "block_size", "prefill_tokens", "image_cache", "look_every"}
SPEED |= {"native", "compile"}


@dataclass(frozen=True)
class Source:
    """Examples to evaluate on.

    Attributes:
        origin: where they come from, as `results.json` has it: a `path`, or a `task` with what it was made of.
        examples: what to decode.
    """

    origin: Mapping[str, Any]
    examples: Sequence[Trajectory]

    @property
    def label(self) -> str:
        """The path of the data file, or the name of the task."""
        return str(self.origin.get("path") or self.origin["task"])


@dataclass(frozen=True)
class Settings:
    """What is the same for all evaluations of a command.

    Attributes:
        generation: how to decode.
        engine: what may be used.
        replacements: names for the replacement test, `self` first; empty where it is not run.
        seed: of noise, the shuffle and the bootstrap.
        pictures: `min_pixels` and `max_pixels` that the checkpoints are loaded with; None is the checkpoint's own.
        strict: an example that cannot be decoded or scored ends the evaluation.
    """

    generation: GenerationConfig
    engine: EngineConfig
    replacements: Sequence[str] = ()
    seed: int = 0
    pictures: Mapping[str, int | None] = field(default_factory=dict)
    strict: bool = True


@dataclass(frozen=True)
class Run:
    """One checkpoint on one set of examples, and the files to write: results, trajectories and a figure."""

    model: str
    source: Source
    out: Path | None = None
    trajectories: Path | None = None
    figure: Path | None = None

    @property
    def partial(self) -> Path | None:
        """Where finished responses are kept until the results are written."""
        return None if self.out is None else self.out.with_name(f"{self.out.name}.partial")


def plan(
    models: Sequence[str],
    sources: Sequence[Source],
    out: Path | None = None,
    trajectories: Path | None = None,
    figure: Path | None = None,
) -> list[Run]:
    """Every checkpoint on every set of examples, the checkpoints one after the other.

    With one run, `out`, `trajectories` and `figure` are its files. With several they are folders, in which each run has
    a file `<model>-<data>` of its own.

    Raises:
        MirageError: something is named twice, a file is a folder or the other way round, two files are the same, or no
            figure can be drawn.
    """
    if empty := next((source.label for source in sources if not source.examples), None):
        raise MirageError(f"{empty}: there is nothing to evaluate")
    for option, names in (("--model", models), ("--data or --task", [source.label for source in sources])):
        places = [str(Path(name).resolve()) if Path(name).exists() else name for name in names]
        if twice := next((name for name, place in zip(names, places, strict=True) if places.count(place) > 1), None):
            raise MirageError(f"{option}: {twice} is named twice")
    several = len(models) * len(sources) > 1
    for option, path in (("--out", out), ("--trajectories", trajectories), ("--figure", figure)):
        if path is not None and several and path.exists() and not path.is_dir():
            n = len(models) * len(sources)
            raise MirageError(f"{option}: {path} is a file, but {n} evaluations are written to a folder")
        if path is not None and not several and path.is_dir():
            raise MirageError(f"{option}: {path} is a folder; name a file in it")
    if figure is not None:
        check_figure(figure / "x.png" if several else figure)
    if not several:
        given = [path.resolve() for path in (out, trajectories, figure) if path is not None]
        if len(set(given)) < len(given):
            raise MirageError("--out, --trajectories and --figure must be different files")
        return [Run(models[0], sources[0], out, trajectories, figure)]
    pairs = [(model, source) for model in models for source in sources]
    names = _file_names([(model, source.label) for model, source in pairs])
    runs = []
    for (model, source), name in zip(pairs, names, strict=True):
        files = (
            folder and folder / f"{name}{suffix}"
            for folder, suffix in ((out, ".json"), (trajectories, ".jsonl"), (figure, ".png"))
        )
        runs.append(Run(model, source, *files))
    return runs


def _file_names(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """A file name for each checkpoint and data, which any file system takes; no two are the same in small letters."""
    short: list[dict[str, str]] = []
    for labels in zip(*pairs, strict=True):
        last = {label: _plain(Path(label).name) for label in labels}
        often = Counter(name.lower() for name in last.values())
        short.append({label: name if often[name.lower()] == 1 else _plain(label) for label, name in last.items()})
    found: list[str] = []
    taken: set[str] = set()
    for model, data in pairs:
        name = f"{short[0][model]}-{short[1][data]}"
        numbered = (f"{name}-{i}" if i > 1 else name for i in count(1))
        found.append(next(name for name in numbered if name.lower() not in taken))
        taken.add(found[-1].lower())
    return found


def _plain(label: str) -> str:
    """The end of a path or name, without what a file name cannot hold."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", label.removesuffix(".jsonl")).strip("-.")[-100:] or "x"


def run_all(
    runs: Sequence[Run],
    settings: Settings,
    load: Callable[[str], LatentVLM],
    *,
    restart: bool = False,
    progress: Callable[[int], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Evaluate, write the files of each run, and yield its results as it is finished.

    Among several runs, one whose results are there already, of the same settings, is not repeated. A single one is,
    and replaces its file.

    Args:
        runs: of `plan`, those of a checkpoint together.
        load: a checkpoint by its name; called once for each that has something to do.
        restart: start over, whatever earlier processes have left.
        progress: called with the number of responses that were finished; each run has its examples × replacements.
        tell: called with a line for people about what was found and is not repeated.

    Raises:
        MirageError: as `evaluate` and `replacement_test`; a file of earlier results is of other settings, or cannot be
            read or written.
    """
    models = list(dict.fromkeys(run.model for run in runs))
    if len(models) > 1 and (lacking := [model for model in models if not has_latents(resolve(model))]):
        raise MirageError(f"{lacking[0]}: has no latent tokens, so it cannot be evaluated")
    vlm: LatentVLM | None = None
    loaded, sha256 = "", None
    for run in runs:
        if loaded != run.model:
            vlm, loaded = None, run.model  # the one before is let go of first
            sha256 = model_sha256(run.model)
            if sha256 is None:
                vlm = load(run.model)  # which may have to fetch it
                sha256 = model_sha256(run.model)
        known = settings_of(run, settings, sha256)
        if len(runs) > 1 and not restart and (found := _finished(run, settings, known)) is not None:
            if progress is not None:
                progress(len(run.source.examples) * max(1, len(settings.replacements)))
            if tell is not None:
                tell(f"{run.out}: is there already and was not measured again")
        else:
            vlm = vlm if vlm is not None else load(run.model)
            found = _run(run, vlm, settings, known, restart, progress, tell)
        if run.figure is not None:
            replacement_bars(found["replacements"], found["verdict"], run.figure)
        yield found


def settings_of(run: Run, settings: Settings, model: Mapping[str, str] | None) -> dict[str, Any]:
    """The fields of `results.json` on which the responses depend, `DEPENDS_ON`, before anything is decoded.

    Args:
        model: `model_sha256` of the checkpoint.
    """
    generation = asdict(replace(settings.generation, latent_hook=None))
    generation.pop("latent_hook")
    generation["return_latents"] = bool(settings.replacements) or run.trajectories is not None
    source = run.source
    sha256: dict[str, Any] = {
        "model": model,
        "data": data_sha256(Path(source.origin["path"])) if "path" in source.origin else None,
        "examples": examples_sha256(source.examples),
    }
    if model is None:
        sha256["remark"] = "the files of the model were not found on this machine"
    versions = {
        "mirage_vlm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    limits = {name: value for name, value in settings.pictures.items() if value is not None}
    return {
        "model": run.model,
        "data": dict(source.origin),
        "generation": generation,
        "engine": _engine(asdict(settings.engine)),
        **({"pictures": limits} if limits else {}),  # else as the checkpoint's own files say, whose hashes are here
        "seed": settings.seed,
        "sha256": sha256,
        "versions": versions,
    }


def _engine(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in SPEED}


def _finished(run: Run, settings: Settings, known: Mapping[str, Any]) -> dict[str, Any] | None:
    """The results of a run that are there, if they are those that are asked for."""
    if run.out is None or not run.out.exists():
        return None
    found = load_results(run.out)
    there = {key: found.get(key) for key in DEPENDS_ON}
    there["engine"] = _engine(there["engine"] or {})
    there["generation"] = {"spans": "free", **(there["generation"] or {})}  # which older results do not say
    lacking = list(differences(there, json.loads(json.dumps(known))))
    lacking += [f"{name} is not in it" for name in settings.replacements if name not in found.get("replacements", {})]
    if run.trajectories is not None and not run.trajectories.exists():
        lacking.append(f"{run.trajectories} is missing")
    if lacking:
        raise MirageError(
            f"{run.out}: holds another evaluation ({'; '.join(lacking[:3])}): name another folder, or replace it with "
            "--restart"
        )
    return found


def _run(
    run: Run,
    vlm: LatentVLM,
    settings: Settings,
    known: Mapping[str, Any],
    restart: bool,
    progress: Callable[[int], None] | None,
    tell: Callable[[str], None] | None,
) -> dict[str, Any]:
    started = time.perf_counter()
    kept = Kept(run.partial, known, restart)
    earlier = kept.seconds()
    examples, names = run.source.examples, settings.replacements
    if kept.resumed and tell is not None:
        of = len(examples) * max(1, len(names))
        failed = f", {kept.failed} of them failed (--restart tries all again)" if kept.failed else ""
        tell(f"{run.partial}: goes on after {kept.resumed} of {of} responses{failed}")
    refused = refusals(examples, vlm.encoder)
    if refused and settings.strict:
        raise MirageError(told(examples, refused).summary())
    for i, faults in refused.items():
        if ("self", i) not in kept:
            kept.fail("self", i, str(faults[0]))
    generation = replace(settings.generation, return_latents=run.trajectories is not None and not names)
    if names:  # which keeps the latents of `self` by itself
        replaced = replacement_test(
            vlm, examples, names, generation, settings.engine, progress, settings.seed, kept, settings.strict
        )
        scored = replaced["self"]
    else:
        replaced, scored = (
            {},
            evaluate(vlm, examples, generation, settings.engine, progress, kept, strict=settings.strict),
        )
    seconds = (round(kept.seconds("self"), 2), round(earlier + time.perf_counter() - started, 2))
    results = _report(run, vlm, settings, known, scored, replaced, seconds)
    if run.trajectories is not None:
        write_jsonl(run.trajectories, [each.trajectory for each in scored])
    if run.out is not None:
        write_json(run.out, results)
    kept.discard()
    return results


def _report(
    run: Run,
    vlm: LatentVLM,
    settings: Settings,
    known: Mapping[str, Any],
    scored: Sequence[Scored],
    replaced: Mapping[str, Sequence[Scored]],
    seconds: tuple[float, float],
) -> dict[str, Any]:
    """`results.json`: the measures, and everything needed to get them again."""
    device = torch.cuda.get_device_name(vlm.device) if vlm.device.type == "cuda" else str(vlm.device)
    results = {
        "model": run.model,
        "data": known["data"],
        **summarise(scored),
        "failed": [
            {"row": i + 1, "where": row_of(each.trajectory, i), "reason": each.error}
            for i, each in enumerate(scored)
            if each.error is not None
        ],
        "seconds": seconds[0],
        "seconds_in_all": seconds[1],
        "generation": known["generation"],
        "engine": asdict(settings.engine),
        **({"pictures": known["pictures"]} if "pictures" in known else {}),
        "seed": known["seed"],
        "sha256": known["sha256"],
        "versions": known["versions"],
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "device": device},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if replaced:
        results["replacements"] = summarise_replacements(replaced, settings.seed)
        results["verdict"] = verdict(results["replacements"])
    return results | {"items": items(scored)}
