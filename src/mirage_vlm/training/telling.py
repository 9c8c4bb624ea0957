"""What a run says: before its first step what it is going to do, and at each log one line that can be read.

The first process speaks alone. Raw numbers are in `metrics.jsonl`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from mirage_vlm.training.data import has_spans

if TYPE_CHECKING:
    from transformers import Trainer

    from mirage_vlm.modeling.latent_vlm import LatentVLM
    from mirage_vlm.training.data import Examples
    from mirage_vlm.training.recipe import DataRecipe, Recipe

WIDEST = 120  # characters of a line of a log
SOURCES = 4  # that are named
GROWN = 2  # times its first value, of a last loss that is worth a note
SAID_AFTER = 3  # steps, the first of which is slower than the others, before a first estimate
STAGES = {
    "sft": "cross-entropy on text",
    "stage1": "the targets in the place of latents",
    "stage2": "the model's own latents",
    "grpo": "rewards on the model's own responses",
}


@dataclass(frozen=True)
class Plan:
    """What is known of a run before its trainer is.

    Attributes:
        recipe: of the run.
        parameters, trained: numbers of them, adapters included.
        sources: a few words on each source of data.
        examples: how many there are, repeated ones as often as they count.
        latents: a few words on the latent spans.
        notes: what the user may not have meant.
    """

    recipe: Recipe
    parameters: int
    trained: int
    sources: tuple[str, ...]
    examples: int
    latents: str
    notes: tuple[str, ...] = ()

    def lines(self, args: Any, steps: int, begin: int = 0) -> list[str]:
        """The plan in lines for people.

        Args:
            args: the trainer's arguments.
            steps: of the whole run.
            begin: steps that are behind it already.
        """
        recipe, train = self.recipe, self.recipe.train
        computed = "bfloat16 (mixed precision)" if train.bf16 else "float32"
        computed = "bfloat16" if recipe.model.dtype == "bfloat16" and recipe.model.scratch is None else computed
        lora = "" if recipe.model.lora is None else f" (LoRA of rank {recipe.model.lora.rank})"
        named = "; ".join(self.sources[:SOURCES])
        named += f"; and {len(self.sources) - SOURCES} more" if len(self.sources) > SOURCES else ""
        batch = [str(train.batch_size)]
        batch += [f"{train.accumulate} accumulated"] if train.accumulate > 1 else []
        batch += [f"{args.world_size} processes"] if args.world_size > 1 else []
        size = train.batch_size * train.accumulate * args.world_size
        what = "responses" if recipe.rl is not None else "examples"
        passes = "" if recipe.rl is not None else f" ({steps * size / self.examples:.3g} epochs)"
        said = {
            "stage": f"{recipe.stage}: {STAGES[recipe.stage]}",
            "device": f"{_device(args.device)}, {computed}",
            "model": f"{recipe.model.path or 'from scratch'}, {_count(self.parameters)} parameters, "
            f"{_count(self.trained)} of them trained{lora}",
            "data": f"{self.examples:,} examples: {named}",
            "steps": f"{steps:,}{passes}, each of {size} {what}"
            + (f" = {' x '.join(batch)}" if len(batch) > 1 else ""),
            "latents": self.latents,
        }
        if recipe.rl is not None:
            rewards = ", ".join(f"{each.weight:g} x {each.name}" for each in recipe.rl.rewards)
            said["rewards"] = f"{rewards}; {recipe.rl.n} responses a prompt, KL {recipe.rl.kl:g}"
        said["writes"] = f"{recipe.output_dir}: metrics.jsonl, a checkpoint every {train.save_every:,} steps, final"
        if begin:
            said["resumed"] = f"from step {begin:,}"
        notes = [*self.notes, *_schedule(train, steps)]
        return [f"{name:9}{text}" for name, text in said.items()] + [f"note: {note}" for note in notes]


def plan_of(recipe: Recipe, vlm: LatentVLM, sources: Sequence[DataRecipe], examples: Examples) -> Plan:
    """The plan of a run whose model and data are there; `sources` are those of `examples`, in order."""
    named, spans = [], False
    for source, found in zip(sources, examples.sources, strict=True):
        times = f" x {source.repeat}" if source.repeat > 1 else ""
        named.append(f"{len(found):,}{times} of {source.path or source.task}")
        spans = spans or recipe.stage in ("sft", "grpo") or has_spans(found)
    config = vlm.config
    latents = f"k {config.latent_size}, pooling {config.pooling}, feedback {config.feedback}"
    latents += "" if config.stop_rule == "fixed" else ", the model ends its spans"
    if recipe.stage == "sft" or (recipe.rl is not None and recipe.rl.spans == "none"):
        latents = "none"
    notes = () if spans else (f"no example has a latent span, so {recipe.stage} trains on text alone",)
    parameters = list(vlm.parameters())
    trained = sum(each.numel() for each in parameters if each.requires_grad)
    total = sum(each.numel() for each in parameters)
    return Plan(recipe, total, trained, tuple(named), len(examples), latents, notes)


def speak(trainer: Trainer, plan: Plan) -> None:
    """Let a trainer say what it does in our words rather than in the Trainer's."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Teller(plan))


class Teller(TrainerCallback):
    """Prints the plan and the lines of a run, in the first process."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.begin = 0  # steps that were behind the run when it began or was resumed
        self.began = self.warm = self.logged = 0.0  # seconds: at the start, after the first step, at the last log
        self.at = 0  # step of the last log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin = self.at = state.global_step
        self.began = self.warm = self.logged = time.monotonic()
        if state.is_world_process_zero:
            say(*self.plan.lines(args, state.max_steps, self.begin))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step - self.begin
        if done == 1:
            self.warm = time.monotonic()
        more = state.global_step < state.max_steps
        if state.is_world_process_zero and done == SAID_AFTER < args.logging_steps and more:
            say(f"about {duration(self._left(state))} to go")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        now, steps = time.monotonic(), max(1, state.global_step - self.at)
        each = (now - self.logged) / steps
        self.logged, self.at = now, state.global_step
        left = self._left(state) if state.global_step < state.max_steps else 0.0
        shown = rewards_line(logs) if self.plan.recipe.rl is not None else losses_line(logs)
        shown += [f"{each:.3g} s/step", f"{duration(left)} left" if left else "done"]
        say(fitted(f"step {state.global_step}/{state.max_steps}", shown))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            skipped = next((line["skipped"] for line in reversed(state.log_history) if "skipped" in line), 0)
            more = f"; {skipped} of them left out, since they were not finite" if skipped else ""
            say(f"{state.global_step - self.begin:,} steps in {duration(time.monotonic() - self.began)}{more}")
            losses = [line["loss"] for line in state.log_history if line.get("loss") is not None]
            if self.plan.recipe.rl is None and losses and losses[-1] > GROWN * losses[0]:
                rate = f"train.learning_rate (it is {self.plan.recipe.train.learning_rate:g})"
                say(f"note: the loss grew from {number(losses[0])} to {number(losses[-1])}; look at {rate}")

    def _left(self, state: Any) -> float:
        """Seconds that the rest of the run will take, at the pace so far; the first step counts only if it is alone."""
        done, now = state.global_step - self.begin, time.monotonic()
        pace = (now - self.warm) / (done - 1) if done > 1 else now - self.began
        return pace * (state.max_steps - state.global_step)


def losses_line(logs: Mapping[str, Any]) -> list[str]:
    """The parts of a log of a stage that trains on data."""
    parts = [("loss", "loss"), ("ce", "ce"), ("align", "align"), ("acc", "token_accuracy")]
    shown = [f"{name} {number(logs[key])}" for name, key in parts if key in logs]
    return [*shown, *_optimiser(logs)]


def rewards_line(logs: Mapping[str, Any]) -> list[str]:
    """The same of GRPO, the most telling first."""
    names = [key.split("/")[1] for key in logs if key.startswith("rewards/") and key.endswith("/mean")]
    each = [f"{name.rpartition(':')[2]} {number(logs[f'rewards/{name}/mean'])}" for name in names]
    shown = [f"reward {number(logs.get('reward'))}" + (f" ({' '.join(each)})" if len(each) > 1 else "")]
    parts = [("latents", "latent_rate"), ("kl", "kl"), ("length", "completions/mean_length")]
    parts += [("clip", "clip_ratio/region_mean")]
    shown += [f"{name} {number(logs[key])}" for name, key in parts if key in logs]
    return [*shown, *_optimiser(logs)]


def _optimiser(logs: Mapping[str, Any]) -> list[str]:
    shown = [f"grad {number(logs['grad_norm'])}"] if "grad_norm" in logs else []
    shown += [f"lr {logs['learning_rate']:.3g}"] if "learning_rate" in logs else []
    return shown + ([f"skipped {logs['skipped']}"] if logs.get("skipped") else [])


def fitted(head: str, parts: Sequence[str]) -> str:
    """The parts on one line of at most `WIDEST` characters; where they do not fit, those before the last two go."""
    kept = list(parts)
    while len(line := "  ".join([head, *kept])) > WIDEST and len(kept) > 3:
        del kept[-3]
    return line if len(line) <= WIDEST else line[: WIDEST - 3] + "..."


def number(value: Any) -> str:
    """A number in four digits or so; what is none is said to be so."""
    if not isinstance(value, int | float):
        return "-"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.4g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"


def duration(seconds: float) -> str:
    """`12 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def say(*lines: str) -> None:
    """Print lines at once, also into a pipe; a run does not end because nobody reads on at its other end."""
    with suppress(BrokenPipeError):
        for line in lines:
            print(line, flush=True)


def _schedule(train: Any, steps: int) -> list[str]:
    """What is odd about a learning rate that is still rising when the run ends."""
    rising = train.warmup if train.warmup >= 1 else math.ceil(train.warmup * steps)
    if train.scheduler == "constant" or rising < steps:
        return []
    return [f"warmup takes {rising:g} of {steps} steps, so the learning rate never comes to train.learning_rate"]


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        threads = torch.get_num_threads()
        return f"{device.type} ({threads} thread{'s' if threads > 1 else ''})"
    return f"{device} ({torch.cuda.get_device_name(device)})"


def _count(parameters: int) -> str:
    if parameters < 1_000_000:
        return f"{parameters:,}"
    return f"{parameters / 1e6:,.1f} M" if parameters < 1e9 else f"{parameters / 1e9:,.2f} B"
