"""`mirage bench train`: both stages, beside the published way of stage 2 and plain fine-tuning by transformers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainingArguments

from mirage_vlm.benchmarks.harness import Disagreement, Result, Sheet, Tell, Timed, Way, interleave, over
from mirage_vlm.benchmarks.memory import elsewhere, on_card
from mirage_vlm.benchmarks.published import stage2_one
from mirage_vlm.benchmarks.workload import LEVELS, bundled, drawn
from mirage_vlm.modeling.encoding import IGNORED
from mirage_vlm.modeling.latent_vlm import LatentVLM
from mirage_vlm.tasks.make import GeneratedDataset
from mirage_vlm.training.data import BucketSampler, Collator, Examples
from mirage_vlm.training.recipe import LossRecipe, ModelRecipe, Recipe, TrainRecipe
from mirage_vlm.training.rollout import Batch, forward_given
from mirage_vlm.training.run import on_one_card
from mirage_vlm.training.trainer import LatentTrainer, StageModule

NEAR = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}  # relative, of losses and gradient norms


@dataclass(frozen=True)
class TrainSettings:
    """Sizes of the benchmark.

    Attributes:
        batch: examples of a batch.
        batches: of a repetition, drawn from `pool` examples as the trainer draws them.
        epochs: times that the two Trainers go over the batches in a repetition, after one that is not counted.
        memory: ways whose peak memory is measured.
    """

    batch: int = 16
    batches: int = 2
    pool: int = 800
    repetitions: int = 5
    warmups: int = 1
    epochs: int = 2
    memory: tuple[str, ...] = ("stage1_b1", "stage2_b1", "stage1_b16", "stage2_b16", "stage2_sequential", "trainer_sft")
    levels: tuple[int, ...] = LEVELS
    device: str = "cpu"
    dtype: str = "float32"

    @classmethod
    def quick(cls) -> TrainSettings:
        """Enough to see that it works."""
        return cls(batches=1, pool=64, repetitions=1, warmups=0, epochs=1, memory=("stage2_b16",), levels=(3,))


def run(settings: TrainSettings, tell: Tell, model: Callable[..., LatentVLM] = bundled) -> Result:
    """Measure.

    Args:
        model: called with device and dtype.

    Raises:
        Disagreement: the published way has another loss or another gradient.
    """
    result = Result("train", asdict(settings))
    device = torch.device(settings.device)
    peaks: dict[str, Any] = {}
    if device.type == "cpu":  # first, so that no second large process stands beside what is timed
        for way in settings.memory:
            tell(f"peak memory: {way}")
            peaks[way] = elsewhere({"settings": asdict(settings), "way": way})
    tell("loading")
    work = Work(settings, model(device, getattr(torch, settings.dtype)))
    ways = work.ways()
    runs = interleave(ways, settings.repetitions, settings.warmups, device, tell)
    if device.type == "cuda":
        peaks = {way: on_card(ways[way], device) for way in settings.memory}
    result.checks += work.checks({way: run.output for way, run in runs.items()})
    b, found = settings.batch, {}
    sheet = Sheet("train: examples a second", ("way", "examples/s", "ms/example", "peak MiB", "above the model MiB"))
    result.sheets.append(sheet)
    for way, run_ in runs.items():
        examples = b * settings.batches * (settings.epochs if way.startswith("trainer_") else 1)
        found[way] = examples / run_.median
        peak = peaks.get(way)
        result.measurements.append(
            {
                "way": way,
                "examples": examples,
                "seconds": run_.seconds,
                "median": run_.median,
                "examples_per_second": found[way],
                "memory": peak,
            }
        )
        memory = (peak["peak"] / 2**20, (peak["peak"] - peak["before"]) / 2**20) if peak else (None, None)
        sheet.rows.append((way, found[way], 1e3 / found[way], *memory))
    result.ratios |= {
        f"train_stage2_b{b}_over_sequential": over(found[f"stage2_b{b}"], found["stage2_sequential"]),
        f"train_stage2_b{b}_over_b1": over(found[f"stage2_b{b}"], found["stage2_b1"]),
        f"train_stage1_b{b}_over_b1": over(found[f"stage1_b{b}"], found["stage1_b1"]),
        "train_stage2_over_stage1": over(found["stage2_pass"], found["stage1_pass"]),
        "train_stage2_over_one_pass": over(found["stage2_pass"], found["one_pass"]),
        "train_stage1_over_sft": over(found["trainer_stage1"], found["trainer_sft"]),
        "train_stage2_over_sft": over(found["trainer_stage2"], found["trainer_sft"]),
    }
    return result


def work_of(described: dict[str, Any]) -> Way:
    """The way that a process of its own is asked to run; see `mirage_vlm.benchmarks.memory`."""
    settings = TrainSettings(**described["settings"])
    model = bundled(torch.device(settings.device), getattr(torch, settings.dtype))
    return Work(settings, model).ways()[described["way"]]


class Work:
    """Batches, and every way of training on them.

    The learning rate is zero, so that all repetitions do the very same; an optimiser's step costs the same with it.
    """

    def __init__(self, settings: TrainSettings, vlm: LatentVLM):
        self.settings = settings
        self.vlm = vlm.train()
        vlm.vision_tower.requires_grad_(False)
        source = GeneratedDataset("vsp-planning", settings.levels, settings.pool, 0, "cot", "train")
        examples = Examples([source])
        order = iter(BucketSampler(examples.sizes, settings.batch, seed=0))
        collate = Collator(vlm.encoder, targets=True)
        self.batches: list[dict[str, Any]] = []
        self.rows: list[list[dict[str, Any]]] = []  # of each batch, alone and without padding
        for _ in range(settings.batches):
            chosen = [drawn(examples[i]) for i in islice(order, settings.batch)]
            self.batches.append(self._on_device(collate(chosen)))
            self.rows.append([self._on_device(collate([example])) for example in chosen])
        self.trained = [parameter for parameter in vlm.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, weight_decay=0.0, fused=True)

    def _on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {name: value.to(self.vlm.device) for name, value in batch.items()}

    def ways(self) -> dict[str, Way]:
        """Each goes over all batches once, or as often as the settings say."""
        b = self.settings.batch
        singles = [row for rows in self.rows for row in rows]
        return {
            "stage1_b1": partial(self._steps, "stage1", singles),
            "stage2_b1": partial(self._steps, "stage2", singles),
            f"stage1_b{b}": partial(self._steps, "stage1", self.batches),
            f"stage2_b{b}": partial(self._steps, "stage2", self.batches),
            "stage2_sequential": self._sequential,
            "stage1_pass": partial(self._passes, "stage1"),
            "stage2_pass": partial(self._passes, "stage2"),
            "one_pass": self._one_pass,
            "trainer_stage1": partial(self._trainer, "stage1"),
            "trainer_stage2": partial(self._trainer, "stage2"),
            "trainer_sft": self._sft,
        }

    # -- steps: forward, backward, optimiser -------------------------------------------------------------------

    def _steps(self, stage: str, batches: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
        """A step for each batch, as `LatentTrainer` takes it; cross-entropy and gradient norm of each."""
        module = StageModule(self.vlm, stage)
        found = []
        for batch in batches:
            sums = module(**batch)
            tokens, latents = labelled(batch), max(1, int((batch["input_ids"] == self.vlm.config.pad_id).sum()))
            weighted(stage, sums["ce_sum"] / tokens, sums["align_sum"] / latents).backward()
            found.append((float(sums["ce_sum"].detach()) / tokens, self._update()))
        return found

    def _sequential(self) -> list[tuple[float, float]]:
        """Stage 2 one example at a time, gradients added up over each batch."""
        found = []
        for batch, rows in zip(self.batches, self.rows, strict=True):
            tokens, total = labelled(batch), 0.0
            for row in rows:
                loss = stage2_one(self.vlm, Batch(**row)) / tokens
                loss.backward()
                total += float(loss.detach())
            found.append((total, self._update()))
        return found

    def _update(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    # -- forward and backward alone ----------------------------------------------------------------------------

    def _passes(self, stage: str) -> None:
        module = StageModule(self.vlm, stage)
        for batch in self.batches:
            forward_backward(module, batch)

    def _one_pass(self) -> None:
        """One pass over the same tokens with given latents, which cost nothing: what stage 2 could cost at least."""
        for batch in self.batches:
            given = Batch(**batch)
            latents = torch.zeros(
                int((given.input_ids == self.vlm.config.pad_id).sum()), self.vlm.width, device=self.vlm.device
            )
            hidden = forward_given(self.vlm, given, latents)
            labels = given.labels[:, 1:]
            asked = labels != IGNORED
            logits = self.vlm.logits(hidden[:, :-1][asked]).float()
            torch.nn.functional.cross_entropy(logits, labels[asked]).backward()
            self.optimizer.zero_grad()

    # -- whole Trainers ----------------------------------------------------------------------------------------

    def _trainer(self, stage: str) -> Timed:
        """`LatentTrainer` on the collated batches."""
        with tempfile.TemporaryDirectory() as folder:
            recipe = Recipe(stage, folder, ModelRecipe(path="none"), (), train=TrainRecipe(bucket=False))
            make = partial(LatentTrainer, self.vlm, recipe)
            return self._timed(make, folder, self.batches)

    def _sft(self) -> Timed:
        """transformers' own Trainer and loss on the same tokens, latents as the words that hold their places."""
        image = self.vlm.family.image_token_id
        batches = [
            {
                "input_ids": batch["input_ids"],
                "attention_mask": batch["attention_mask"],
                "labels": batch["labels"],
                "pixel_values": batch["pixel_values"],
                "image_grid_thw": batch["grid_thw"],
                "mm_token_type_ids": (batch["input_ids"] == image).int(),
                "use_cache": False,
            }
            for batch in self.batches
        ]
        with tempfile.TemporaryDirectory() as folder:
            return self._timed(partial(transformers.Trainer, self.vlm.model), folder, batches)

    def _timed(self, make: Callable[..., Any], folder: str, batches: list[dict[str, Any]]) -> Timed:
        """A run over all batches, `epochs` times after a first that is not counted."""
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=len(batches) * (1 + self.settings.epochs),
            per_device_train_batch_size=1,  # an item of the data is a whole batch
            learning_rate=0.0,
            lr_scheduler_type="constant",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            use_cpu=self.vlm.device.type == "cpu",
            dataloader_pin_memory=False,
        )
        clock = _Clock(len(batches), self.vlm.device)
        trainer = make(
            args=on_one_card(arguments), train_dataset=batches, data_collator=itemgetter(0), callbacks=[clock]
        )
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.train()
        self.vlm.zero_grad()
        return Timed(clock.ended - clock.begun, None)

    # -- what must be equal ------------------------------------------------------------------------------------

    def checks(self, outputs: dict[str, Any]) -> list[dict[str, Any]]:
        """The published way has the loss and the gradient of ours.

        Raises:
            Disagreement: it has not.
        """
        ours, theirs = outputs[f"stage2_b{self.settings.batch}"], outputs["stage2_sequential"]
        apart = max(
            abs(mine - other) / max(abs(other), 1e-12)
            for step, other_step in zip(ours, theirs, strict=True)
            for mine, other in zip(step, other_step, strict=True)
        )
        if not apart < NEAR[self.vlm.model.dtype]:
            raise Disagreement(f"stage 2 has losses and gradient norms {ours}, one example at a time {theirs}")
        return [{"what": "stage2 and published: losses and gradient norms", "relative_difference": apart}]


class _Clock(TrainerCallback):
    """From the end of step `skipped` to the end of the last."""

    def __init__(self, skipped: int, device: torch.device):
        self.skipped, self.device = skipped, device
        self.begun = self.ended = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if state.global_step == self.skipped:
            self.begun = time.perf_counter()
        self.ended = time.perf_counter()


def labelled(batch: dict[str, Any]) -> int:
    """Number of tokens of a batch that bear a label."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def weighted(stage: str, ce: torch.Tensor, align: torch.Tensor) -> torch.Tensor:
    """The loss of a stage with the usual weights."""
    weights = LossRecipe()
    return weights.ce * ce + weights.align * align if stage == "stage1" else ce


def forward_backward(module: StageModule, batch: dict[str, Any]) -> None:
    """A forward and a backward pass; the gradients are dropped."""
    sums = module(**batch)
    weighted(module.stage, sums["ce_sum"], sums["align_sum"]).backward()
    module.zero_grad()
