"""The bundled model in lmms-eval itself, on held-out maps, against `mirage eval` and `vlm.generate`."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from mirage_vlm.adapters.messages import sampling_seed
from mirage_vlm.evaluation.lmms_layout import write_lmms
from mirage_vlm.formats import read_data
from mirage_vlm.modeling import LatentVLM
from mirage_vlm.modeling.bundled import resolve
from mirage_vlm.trajectory import Message, Trajectory, assistant_turn, user_turn

pytestmark = pytest.mark.harness

HERE = Path(__file__).parent
TASKS = HERE / "lmms_tasks"
N, MOST = 8, 160  # maps, and positions of a response, as in the tasks


@dataclass(frozen=True)
class Ran:
    """The folder in which the commands ran, and what `lmms-eval` wrote and printed."""

    folder: Path
    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]
    printed: str

    def resps(self, task: str) -> list[Any]:
        """What was answered; lmms-eval has no `resps` of its own where nothing was filtered."""
        return [sample.get("resps", sample["filtered_resps"]) for sample in self.samples[task]]


def command(folder: Path, *words: str | Path) -> str:
    """What a command prints; it has no network, and keeps its cache in the folder."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    environment = {**os.environ, **offline, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    words = (sys.executable, "-m", *words)
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def lmms_eval(folder: Path, tasks: str, *more: str) -> Ran:
    words = ["--model", "mirage_vlm", "--model_args", "pretrained=bundled,device=cpu,statistics=spans.json"]
    words += ["--tasks", tasks, "--include_path", str(TASKS), "--batch_size", "1"]
    out = f"results{len([*folder.glob('results*')])}"
    words += ["--log_samples", "--output_path", out, *more]
    printed = command(folder, "lmms_eval", *words)
    found = [*(folder / out).glob("*/*_results.json")]
    assert len(found) == 1, printed  # lmms-eval ends with 0 after a fault, too
    (results,) = found
    samples = {}
    for task in tasks.split(","):
        (path,) = results.parent.glob(f"*_samples_{task}.jsonl")
        samples[task] = [json.loads(line) for line in path.read_text().splitlines()]
    return Ran(folder, json.loads(results.read_text()), samples, printed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `mazes/test.jsonl`, and what `mirage eval` says of it."""
    made = tmp_path_factory.mktemp("harness")
    maps = ["--levels", "3,4,5,6", "--n", "0", "--n-test", str(N), "--style", "cot", "--seed", "5"]
    command(made, "mirage_vlm.cli.main", "data", "make", "vsp-planning", "--out", "mazes", *maps)
    kept = ["--out", "eval.json", "--trajectories", "eval.jsonl", "--max-new-tokens", str(MOST), "--device", "cpu"]
    command(made, "mirage_vlm.cli.main", "eval", "--data", "mazes/test.jsonl", *kept)
    return made


@pytest.fixture(scope="module")
def ran(folder: Path) -> Ran:
    return lmms_eval(folder, "mirage_mazes,mirage_mazes_chat,mirage_mazes_rounds")


@pytest.fixture(scope="module")
def vlm() -> LatentVLM:
    return LatentVLM.from_pretrained(resolve("bundled"))


def prompts(folder: Path) -> list[tuple[Message, ...]]:
    return [trajectory.messages[:1] for trajectory in read_data(folder / "mazes/test.jsonl")]


def decoded(folder: Path) -> list[Trajectory]:
    return read_data(folder / "eval.jsonl", check_files=False)


@pytest.mark.parametrize("task", ["mirage_mazes", "mirage_mazes_chat"])
def test_texts_and_accuracy_are_those_of_mirage_eval(ran, folder, task):
    ours = json.loads((folder / "eval.json").read_text())
    texts = [trajectory.text for trajectory in decoded(folder)]
    assert len(set(texts)) > 1 and len(texts) == N
    assert ran.resps(task) == texts
    assert [sample["right"] == 1.0 for sample in ran.samples[task]] == [item["correct"] for item in ours["items"]]
    accuracy = ran.results["results"][task]["right,none"]
    assert accuracy == pytest.approx(ours["accuracy"])
    assert 0 < accuracy < 1, "these maps have one that it gets wrong"


def test_rounds_are_those_of_generate(ran, folder, vlm):
    firsts = [trajectory.text for trajectory in decoded(folder)]
    again = user_turn("The same moves once more, please.")
    asked = [(*prompt, assistant_turn(said), again) for prompt, said in zip(prompts(folder), firsts, strict=True)]
    seconds = [row.text for row in vlm.generate(asked, max_new_tokens=MOST)]
    said = ran.resps("mirage_mazes_rounds")
    assert [list(rounds) for rounds in said] == [list(pair) for pair in zip(firsts, seconds, strict=True)]


def test_latents_are_counted(ran, folder):
    latents = [sum(span.k or 0 for span in row.spans) for row in decoded(folder)]
    lengths = [len(row.decoding.token_ids) for row in decoded(folder)]
    assert min(latents) > 0
    counted = [sample["token_counts"][0] for sample in ran.samples["mirage_mazes"]]
    assert [counts["reasoning_tokens"] for counts in counted] == latents
    assert [counts["output_tokens"] for counts in counted] == lengths
    assert ran.results["throughput"]["avg_latent_rate"] == 1.0
    told = json.loads((folder / "spans.json").read_text())
    of_task = {row["document"]: row["latents"] for row in told["requests"] if row["task"] == "mirage_mazes"}
    assert [of_task[doc_id] for doc_id in range(N)] == latents
    assert told["summary"]["n"] == 4 * N, "two tasks of one round, one task of two"


def test_settings_of_the_command_line_reach_the_engine(folder, vlm):
    """Sampling, few tokens, a stop string, other latents."""
    settings = "max_new_tokens=40,temperature=0.9,do_sample=true,latent_size=2,until=Path"
    more = ["--gen_kwargs", settings, "--limit", "3"]
    cut = lmms_eval(folder, "mirage_mazes", *more)
    assert len(cut.resps("mirage_mazes")) == 3
    for doc_id, said in enumerate(cut.resps("mirage_mazes")):
        seed = sampling_seed(0, "mirage_mazes", "test", doc_id, 0, 0)
        asked = [prompts(folder)[doc_id]]
        (row,) = vlm.generate(asked, max_new_tokens=40, temperature=0.9, latent_size=2, seed=seed)
        assert said == row.text.partition("Path")[0]


def test_the_entry_point_is_found():
    from lmms_eval.models import get_model

    from mirage_vlm.adapters.lmms_eval import MirageVLM

    assert get_model("mirage_vlm") is MirageVLM


def test_our_own_log_has_the_layout_of_lmms_evals(ran, folder):
    ours_results, ours_samples = write_lmms(folder / "eval.json", folder / "eval.jsonl", folder / "ours")
    ours = json.loads(ours_results.read_text())
    assert set(ours) <= set(ran.results)
    assert set(ours["config"]) <= set(ran.results["config"])
    (row,) = ours["results"].values()
    theirs = {key.replace("right", "exact_match") for key in ran.results["results"]["mirage_mazes"]}
    assert set(row) - theirs == {"exact_match_ci95,none"}
    sample = json.loads(ours_samples.read_text().splitlines()[0])
    (known, *_) = ran.samples["mirage_mazes"]
    assert set(sample) - set(known) == {"exact_match", "latents", "verdict", "prompt_hash", "target_hash"}


# -- the stand-in of the other tests ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stand_in() -> Any:
    """`tests/adapters/harnesses.py`."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("stand_in", HERE.parent / "adapters" / "harnesses.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look
    spec.loader.exec_module(module)
    return module


def named(field: Field) -> tuple[str, bool]:
    return field.name, field.default is not MISSING or field.default_factory is not MISSING


def test_the_stand_in_has_the_fields_of_lmms_eval(stand_in):
    from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
    from lmms_eval.models.registry_v2 import ModelManifest

    for real in (TokenCounts, GenerationResult, ModelManifest, Instance):
        ours = [named(field) for field in fields(getattr(stand_in, real.__name__))]
        assert ours == [named(field) for field in fields(real)][: len(ours)], real.__name__
        if real is not Instance:
            assert len(ours) == len(fields(real)), real.__name__


def test_the_stand_in_has_the_methods_of_lmms_eval(stand_in):
    from lmms_eval.api.model import CacheHook, lmms
    from lmms_eval.models.model_utils.gen_metrics import log_metrics

    for ours, real in ((stand_in.lmms, lmms), (stand_in.CacheHook, CacheHook)):
        for name, made in vars(ours).items():
            if not callable(getattr(made, "__func__", made)) or name == "__init__":
                continue
            theirs = inspect.signature(getattr(real, name)).parameters
            assert list(inspect.signature(getattr(ours, name)).parameters) == list(theirs), f"{ours.__name__}.{name}"
    assert list(inspect.signature(stand_in.log_metrics).parameters) == list(inspect.signature(log_metrics).parameters)
    model = vars(bare(stand_in.lmms))
    assert lmms.__abstractmethods__ == stand_in.lmms.__abstractmethods__
    assert set(model) == set(vars(bare(lmms))) and lmms.is_simple == stand_in.lmms.is_simple


def bare(real: type) -> Any:
    """One of lmms-eval's models that does nothing."""
    return type("Bare", (real,), dict.fromkeys(real.__abstractmethods__, lambda self, requests: []))()


def test_the_stand_in_reads_model_arguments_as_lmms_eval_does(stand_in):
    from lmms_eval.utils import simple_parse_args_string

    texts = [
        "",
        "a=1,b=-1,c=1.5,d=1e-3",
        "e=TRUE,f=false, g=none ,h=/a/b=c,",
        'i={"a":1,"b":[2,3]},j=", "',
        "k=auto,l=",
    ]
    for text in texts:
        assert stand_in.parsed(text) == simple_parse_args_string(text), text
