"""A study: many recipes from the same bases, each with several seeds, tested alike, in one file.

    <output>/<row>/seed-<s>/<recipe>/          the training run
    <output>/<row>/seed-<s>/results.json       its evaluation
    <output>/<row>/seed-<s>/results-<test>.json  that of each further test

Whatever is there already is not done again, and a run that was killed goes on from its newest checkpoint. Several
processes may work at a study at once: each takes the runs that no other is at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from mirage_vlm.decoding import EngineConfig, GenerationConfig
from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.hashes import data_sha256
from mirage_vlm.evaluation.replace import REPLACEMENTS, chosen
from mirage_vlm.evaluation.run import Settings, Source, plan, run_all
from mirage_vlm.formats import read_data
from mirage_vlm.rl.run import run_recipe
from mirage_vlm.settings import PATH, read_settings
from mirage_vlm.tasks import from_record, get_task
from mirage_vlm.tasks.make import DRAWN_AS, GeneratedDataset
from mirage_vlm.training.checkpoints import METRICS_FILE, RECIPE_FILE
from mirage_vlm.training.recipe import Recipe, load_recipe
from mirage_vlm.training.run import FINAL
from mirage_vlm.trajectory import Trajectory

if TYPE_CHECKING:
    from mirage_vlm.modeling import LatentVLM

RESULTS = "results.json"
HELPER = {  # what a row is told of what the helper image shows, and how a table says so
    "no": "no",
    "words": "no (in words)",
    "regions": "no (as regions)",
    "training": "in training",
    "both": "in training and test",
}


class Taken(MirageError):
    """A run that another process is at."""


@dataclass(frozen=True)
class Test:
    """What all rows are tested on, the same for every row and seed: fresh held-out examples, or those of a data file.

    Attributes:
        task, levels, n, seed: of what fresh examples are made; of a data file `n` alone, the first so many, 0 for all.
        max_new_tokens: most positions of a response.
        name: of a further test, in tables and files.
        data: a data file in place of a task. A row's style words the plain maps in it; other prompts stay as they are.
    """

    __test__ = False  # not pytest's

    task: str = ""
    levels: tuple[int, ...] = ()
    n: int = 0
    seed: int | None = None
    max_new_tokens: int = 64
    name: str = ""
    data: str = ""

    def examples(self, style: str) -> Sequence[Trajectory]:
        """Its examples, worded for a row of that style.

        Raises:
            MirageError: the data file cannot be read.
        """
        if self.data:
            found = read_data(self.data, plain=partial(from_record, style=style))
            return found[: self.n or None]
        made = GeneratedDataset(self.task, self.levels, self.n, self.seed or 0, style, "test", drawn_as=DRAWN_AS)
        return [made[i] for i in range(self.n)]


@dataclass(frozen=True)
class Base:
    """A checkpoint that rows start from."""

    name: str
    path: str = field(metadata=PATH)


@dataclass(frozen=True)
class Row:
    """One way of training.

    Attributes:
        name: in tables and folders.
        base: name of the checkpoint it starts from.
        style: of the responses it is trained on and tested with.
        recipes: files, each starting from the model of the one before; none = the base as it is, for one seed.
        about: one line for readers.
        helper: where it sees the helper image: `no`, in `training`, or in `both` training and test; or what it is told
            in training in its place: the same in `words`, or as `regions` of the prompt's picture.
        overrides: of every recipe, as on the command line.
        replacements: names for the replacement test; none = it is not run.
        against: names of rows that it is compared with.
        max_new_tokens: most positions of its responses, where the tests' would cut them short.
    """

    name: str
    base: str
    style: str
    recipes: tuple[str, ...] = field(metadata=PATH)
    about: str = ""
    helper: str = "no"
    overrides: tuple[str, ...] = ()
    replacements: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    max_new_tokens: int | None = None

    def longest(self, test: Test) -> int:
        """Most positions of its responses in a test."""
        return test.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens


@dataclass(frozen=True)
class Study:
    """The whole.

    Attributes:
        output: folder of all runs.
        test: the test of the main table, with replacements.
        also: further tests with a name each, such as maps of sides that were not trained on; without replacements.
        seeds: each row is trained once with each.
        title: of its page.
        summary: what is to be read out of it, in Markdown, for the head of its page.
        figure: names of the rows that its figure shows; none = all.
    """

    output: str = field(metadata=PATH)
    bases: tuple[Base, ...]
    test: Test
    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (1, 2, 3)
    also: tuple[Test, ...] = ()
    title: str = "Results"
    summary: str = ""
    figure: tuple[str, ...] = ()

    def row(self, name: str) -> Row:
        """The row of that name.

        Raises:
            MirageError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise MirageError(f"there is no row {name!r}; choose from {', '.join(row.name for row in self.rows)}")

    def base_of(self, row: Row) -> str:
        """The checkpoint that a row starts from."""
        return next(base.path for base in self.bases if base.name == row.base)

    def seeds_of(self, row: Row) -> tuple[int, ...]:
        """The seeds that a row is trained with; a base as it is has only one."""
        return self.seeds if row.recipes else self.seeds[:1]

    def folder(self, row: Row, seed: int) -> Path:
        """Where one run of a row is."""
        return Path(self.output) / row.name / f"seed-{seed}"

    def results(self, row: Row, seed: int, test: Test) -> Path:
        """The results of one run of a row in a test."""
        return self.folder(row, seed) / (f"results-{test.name}.json" if test.name else RESULTS)


def load_study(path: str | Path) -> Study:
    """Read a study file and check it with all its recipes.

    Raises:
        MirageError: a file cannot be read or something in it is wrong; the message names file, line and key.
    """
    study, where = read_settings(Study, path, (), "the study")

    def require(holds: bool, key: str, message: str) -> None:
        if not holds:
            raise MirageError(f"{where(key)}: {key}: {message}")

    names, bases = [row.name for row in study.rows], [base.name for base in study.bases]
    require(bool(study.seeds), "seeds", "give at least one")
    require(not study.test.name, "test.name", "only further tests have one")
    for i, test in enumerate(study.also):
        key = f"also[{i}].name"
        require(re.fullmatch(r"[\w-]+", test.name) is not None, key, "give one, of letters, digits, - and _")
        require([t.name for t in study.also].count(test.name) == 1, key, f"{test.name!r} is there twice")
    for key, test in (("test", study.test), *((f"also[{i}]", test) for i, test in enumerate(study.also))):
        if test.data:
            require(not test.task, f"{key}.task", "give either a task or data, a file")
            require(
                not test.levels and test.seed is None, key, "data has neither levels nor seed; only n, of its first"
            )
            require(test.n >= 0, f"{key}.n", "must not be negative")
            require(Path(test.data).exists(), f"{key}.data", f"{test.data}: no such file or folder")
        else:
            lacking = [name for name in ("task", "levels") if not getattr(test, name)]
            lacking += ["n"] if test.n < 1 else []
            lacking += ["seed"] if test.seed is None else []
            require(not lacking, key, f"missing {', '.join(lacking)} (or data, a file to test on)")
    tasks = [get_task(test.task) for test in (study.test, *study.also) if not test.data]
    for name in study.figure:
        require(name in names, "figure", f"there is no row {name!r}")
    for i, row in enumerate(study.rows):
        key = f"rows[{i}]"
        require(names.count(row.name) == 1, f"{key}.name", f"{row.name!r} is there twice")
        require(row.base in bases, f"{key}.base", f"there is no base {row.base!r}")
        require(row.max_new_tokens is None or row.max_new_tokens > 0, f"{key}.max_new_tokens", "must be positive")
        require(row.helper in HELPER, f"{key}.helper", f"{row.helper!r} is not one of {', '.join(HELPER)}")
        for task in tasks:
            require(row.style in task.styles, f"{key}.style", f"{row.style!r} is not one of {', '.join(task.styles)}")
        unknown = [name for name in row.replacements if name not in (*REPLACEMENTS, "all")]
        require(not unknown, f"{key}.replacements", f"there is no {', '.join(unknown)}")
        for other in row.against:
            require(other in names and other != row.name, f"{key}.against", f"there is no other row {other!r}")
        for recipe in row.recipes:
            load_recipe(recipe, row.overrides)
    return study


def recipes_of(study: Study, row: Row, seed: int) -> list[Recipe]:
    """The recipes of one run: each starts from the one before, with data and order of the seed."""
    path = study.base_of(row)
    found = []
    for i, file in enumerate(row.recipes, start=1):
        recipe = load_recipe(file, row.overrides)
        output = study.folder(row, seed) / f"{i}-{Path(file).stem}"
        found.append(
            replace(
                recipe,
                output_dir=str(output),
                model=replace(recipe.model, path=path, scratch=None),
                data=tuple(replace(source, seed=source.seed + 1000 * seed) for source in recipe.data),
                train=replace(recipe.train, seed=seed),
            )
        )
        path = str(output / FINAL)
    return found


def run_row(
    study: Study, row: Row, seed: int, load: Callable[[str], LatentVLM], tell: Callable[[str], None] = print
) -> Path:
    """Train and test one row with one seed, as far as it is not done.

    Args:
        load: a checkpoint by its name.
        tell: called with a line before each thing that is done.

    Returns:
        Its results.json.

    Raises:
        Taken: another process is at it.
        MirageError: as `train` and `run_all`.
    """
    folder = study.folder(row, seed)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):  # the system takes it back from a process that dies
            return _run_row(study, row, seed, load, tell)
    except Timeout as fault:
        raise Taken(f"{folder}: another process is at it") from fault


def _run_row(study: Study, row: Row, seed: int, load: Callable[[str], LatentVLM], tell: Callable[[str], None]) -> Path:
    recipes = recipes_of(study, row, seed)
    missing = []
    for test in (study.test, *study.also):
        results = study.results(row, seed, test)
        if results.exists():
            _load_done(row, recipes, results, test)
            tell(f"{results}: is there")
        else:
            missing.append(test)
    for recipe in recipes if missing else ():
        if (Path(recipe.output_dir) / FINAL).exists():
            _check_recipe(recipe)
        else:
            tell(f"{recipe.output_dir}: training")
            run_recipe(recipe, resume=True)
    model = str(Path(recipes[-1].output_dir) / FINAL) if recipes else study.base_of(row)
    evicted = bool(recipes) and recipes[-1].train.visibility == "evict"  # decoded as it was trained
    for test in missing:
        results = study.results(row, seed, test)
        tell(f"{results}: testing")
        source = Source(_origin(row, test), test.examples(row.style))
        settings = Settings(
            GenerationConfig(max_new_tokens=row.longest(test), evict_images=evicted),
            EngineConfig(),
            _replacements(row, test),
        )
        list(run_all(plan([model], [source], results), settings, load))
    return study.results(row, seed, study.test)


def _origin(row: Row, test: Test) -> dict[str, Any]:
    if test.data:
        return {"path": test.data, "style": row.style, "limit": test.n or None}
    return {"task": test.task, "levels": list(test.levels), "n": test.n, "seed": test.seed, "style": row.style}


def _replacements(row: Row, test: Test) -> tuple[str, ...]:
    """What is put in the place of a row's latents: in the main test, which has no name, alone."""
    return chosen(row.replacements) if row.replacements and not test.name else ()


def _check_recipe(recipe: Recipe) -> None:
    """Refuse a model that another recipe has made; settings newer than that model had their usual values."""
    made = load_recipe(Path(recipe.output_dir) / FINAL / RECIPE_FILE).to_dict()
    wanted = recipe.to_dict()
    if made != wanted:
        parts = [key for key in wanted if made.get(key) != wanted[key]]
        raise MirageError(
            f"{recipe.output_dir}: was trained by another recipe ({', '.join(parts)} differ); remove the folder to "
            "train anew, or give the study another output"
        )


def _load_done(row: Row, recipes: Sequence[Recipe], file: Path, test: Test) -> dict[str, Any]:
    """Results that are there; refuses those of other recipes or of another test."""
    for recipe in recipes:
        _check_recipe(recipe)
    results = json.loads(file.read_text(encoding="utf-8"))
    if results["data"] != _origin(row, test) or results["generation"]["max_new_tokens"] != row.longest(test):
        raise MirageError(f"{file}: is of another test than the study's; remove it to test anew")
    if test.data and Path(test.data).exists() and results["sha256"]["data"] != data_sha256(Path(test.data)):
        raise MirageError(f"{file}: {test.data} has changed since it was tested on; remove the results to test anew")
    if lacking := [name for name in _replacements(row, test) if name not in results.get("replacements", {})]:
        raise MirageError(f"{file}: has no {', '.join(lacking)} in the place of latents; remove it to test anew")
    return results


@dataclass(frozen=True)
class Outcome:
    """What one run of a row came to.

    Attributes:
        results: its results.json.
        steps: optimisation steps of all its recipes.
        seconds: of training, as the runs themselves measured them.
        examples: different training examples of its last recipe.
    """

    seed: int
    results: dict[str, Any]
    steps: int
    seconds: float
    examples: int


def outcomes(study: Study, row: Row, test: Test | None = None) -> list[Outcome]:
    """The runs of a row that are done, one for each seed, as a test found them; by default the main one."""
    test = study.test if test is None else test
    found = []
    for seed in study.seeds_of(row):
        file = study.results(row, seed, test)
        if not file.exists():
            continue
        recipes = recipes_of(study, row, seed)
        results = _load_done(row, recipes, file, test)
        lasts = [_last_line(Path(recipe.output_dir) / METRICS_FILE) for recipe in recipes]
        found.append(
            Outcome(
                seed,
                results,
                sum(last["step"] for last in lasts),
                sum(last["seconds"] for last in lasts),
                lasts[-1]["examples"] if lasts else 0,
            )
        )
    return found


def _last_line(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])


def correct(results: dict[str, Any], replacement: str = "self") -> Sequence[bool]:
    """Which items came out right, in order; with a replacement in place of the latents."""
    if replacement == "self":
        return [item["correct"] for item in results["items"]]
    return [mark == "1" for mark in results["replacements"][replacement]["correct"]]
