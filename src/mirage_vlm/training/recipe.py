"""Recipes: everything a training run needs, in one YAML file.

A recipe is a tree of frozen dataclasses. Unknown keys, wrong types and impossible values are refused with the
file, the line and the key. `key=value` overrides use dots: `train.max_steps=50 output_dir=runs/x`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.shape import ScratchConfig
from mirage_vlm.settings import PATH, not_finite, read_settings
from mirage_vlm.training.names import SCHEDULERS as SCHEDULERS


@dataclass(frozen=True)
class LoraRecipe:
    """Low-rank adapters by peft on the language model; the latent tokens' embeddings are trained with them.

    `modules` are the suffixes of the linear layers that get an adapter.
    """

    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.0
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class DataRecipe:
    """One source of examples: a JSONL file (or `datasets` folder), or a task whose maps are drawn as needed.

    Attributes:
        path: a file of `mirage data make`, the reference implementation's format, or a datasets folder; or a pattern
            for several, such as `data/*/train.jsonl`.
        task, levels, n, seed, style: a generated source; see `mirage_vlm.tasks.make.GeneratedDataset`.
        repeat: how many times each example counts in an epoch, where sources are to be mixed.
    """

    path: str | None = field(default=None, metadata=PATH)
    task: str | None = None
    levels: tuple[int, ...] | None = None
    n: int = 1000
    seed: int = 0
    style: str = "direct"
    repeat: int = 1


@dataclass(frozen=True)
class ModelRecipe:
    """Where the weights come from and what of them is trained.

    Attributes:
        path: a checkpoint folder or hub name, or `bundled`; latent tokens are added where it has none.
        scratch: sizes of a small model to start from nothing, instead of `path`.
        tokenizer_data: with `scratch`, what its tokenizer is trained on; the run's own data if empty.
        latent_size, pooling, feedback, codes, target, places, stop_rule, image_scale, min_pixels, max_pixels: as in
            `LatentConfig`; None keeps the checkpoint's.
        attn: attention implementation of transformers; None leaves it to transformers.
        dtype: `float32` or `bfloat16`, of the weights.
        freeze_vision: keep the vision tower as it is.
        lora: train adapters instead of the weights.
    """

    path: str | None = field(default=None, metadata=PATH)
    scratch: ScratchConfig | None = None
    tokenizer_data: tuple[DataRecipe, ...] = ()
    latent_size: int | None = None
    pooling: str | None = None
    feedback: str | None = None
    codes: int | None = None
    target: str | None = None
    places: bool | None = None
    stop_rule: str | None = None
    image_scale: float | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    attn: str | None = None
    dtype: str = "float32"
    freeze_vision: bool = True
    lora: LoraRecipe | None = None


@dataclass(frozen=True)
class LossRecipe:
    """Weights of the loss terms.

    Attributes:
        ce: the paper's γ, of cross-entropy in stage 1; in the other stages it has weight 1.
        align: of the alignment in stage 1.
        align_stage2: of the alignment in stage 2, where the paper has none.
        through_targets: let gradients into the vision tower through the targets, where it is trained at all; with it
            the targets move.
        alignment: how far a latent is from its target; see `mirage_vlm.training.align`.
    """

    ce: float = 0.1
    align: float = 1.0
    align_stage2: float = 0.0
    through_targets: bool = False
    alignment: str = "cosine"


@dataclass(frozen=True)
class TrainRecipe:
    """Optimisation, handed to `transformers.TrainingArguments`.

    Attributes:
        epochs, max_steps: length of the run; `max_steps` above 0 wins.
        batch_size: examples of a process in one forward pass; times `accumulate` and processes gives the batch.
        warmup: steps, or a share of them when below 1.
        bucket: draw batches of examples of similar size.
        pack: most tokens of a row that holds several examples (stages `sft` and `stage1`); 0 = one example a row.
        visibility: who may look at the prompt's pictures: `full`, `bottleneck` or `evict`; see
            `mirage_vlm.training.visibility`.
        own_share: chance of each latent to be the model's own at the first and the last step (`stage2`); the others
            are given their targets.
        latent_iterations: passes over all latents of a span at once (`stage2`); 0 = one latent after the other.
        feature_cache: a folder that keeps the features of a frozen vision tower, None = compute them each time.
        keep_examples: GiB of main memory for examples that are ready to be read, of each process that prepares batches;
            worth it where there are more epochs than one. 0 = they are made anew each time.
        workers: processes that prepare batches.
        save_every: steps between checkpoints; `keep` of them are kept.
        report_to: the Trainer's loggers (`tensorboard`, `wandb`, …).
        non_finite: what becomes of a step whose loss or gradient is not finite: `stop` ends the run, `skip` leaves the
            weights as they are and goes on.
    """

    epochs: float = 1.0
    max_steps: int = -1
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-5
    scheduler: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    seed: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    bucket: bool = True
    pack: int = 0
    visibility: str = "full"
    own_share: tuple[float, ...] = (1.0, 1.0)
    latent_iterations: int = 0
    feature_cache: str | None = field(default=None, metadata=PATH)
    keep_examples: float = 0.0
    workers: int = 0
    log_every: int = 10
    save_every: int = 500
    keep: int = 2
    report_to: tuple[str, ...] = ()
    non_finite: str = "stop"


@dataclass(frozen=True)
class RewardRecipe:
    """A reward and its weight; `name` is one of `mirage_vlm.rl.rewards.REWARDS`, or `package.module:function`."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class RLRecipe:
    """Reinforcement learning by GRPO (stage `grpo`); see docs/rl.md.

    Attributes:
        n: responses to each prompt, among which the advantage is taken. `train.batch_size` counts responses; times
            `accumulate` it must be a multiple of n.
        latents: what stands at the latent positions while the policy's log-probabilities are computed: `replay` (the
            vectors of the rollout), `reroll` (the policy's own, with gradient), or `gaussian` (the vectors, which were
            drawn around what the policy feeds back and whose density is part of the policy).
        latent_noise: standard deviation of `gaussian`, in each component.
        temperature: of sampling and of log-probabilities.
        max_new_tokens: most positions of a response.
        kl: weight of the KL divergence to the model that the run starts from.
        clip: how far from 1 the ratio of probabilities counts.
        updates: passes over the same responses.
        loss, scale: how TRL averages over tokens and what rewards are divided by; see its `loss_type` and
            `scale_rewards`.
        rewards: what a response is worth, added up.
        spans: `free`; `required` (a run in whose first step no response thinks is refused, later ones are warned of);
            `forced` (one is opened for the model, at the start or after the text `span_after`, and that is no action
            of the policy's); `none` (the model cannot open any: GRPO on text, for comparison).
    """

    n: int = 5
    latents: str = "replay"
    latent_noise: float = 0.0
    temperature: float = 1.0
    max_new_tokens: int = 256
    kl: float = 0.01
    clip: float = 0.2
    updates: int = 1
    loss: str = "grpo"
    scale: str = "group"
    rewards: tuple[RewardRecipe, ...] = (RewardRecipe("accuracy", 0.9), RewardRecipe("format", 0.1))
    spans: str = "free"
    span_after: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Attributes:
        stage: `sft` (cross-entropy, no spans), `stage1` (targets in place of latents), `stage2` (own latents) or `grpo`
            (rewards on the model's own responses).
        rl: of stage `grpo` alone.
        output_dir: where checkpoints, metrics and the final model go.
    """

    stage: str
    output_dir: str = field(metadata=PATH)
    model: ModelRecipe
    data: tuple[DataRecipe, ...]
    loss: LossRecipe = field(default_factory=LossRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    rl: RLRecipe | None = None

    @property
    def needs_targets(self) -> bool:
        """Whether the helper images are looked at."""
        return self.stage == "stage1" or (self.stage == "stage2" and (self.loss.align_stage2 > 0 or self.mixes))

    @property
    def mixes(self) -> bool:
        """Whether targets stand in the place of some latents of stage 2."""
        return any(share < 1 for share in self.train.own_share)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are saved beside every checkpoint."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, files: bool = False) -> Recipe:
    """Read a recipe file and apply `key=value` overrides. Neither torch nor transformers is imported.

    Args:
        files: also look whether the data and the model that it names are there.

    Raises:
        MirageError: the file cannot be read, or a key or value is wrong; the message names file, line and key.
    """
    from mirage_vlm.training.recipe_checks import check, check_files  # which reads the classes above

    recipe, where = read_settings(Recipe, path, overrides, "the recipe")
    check(recipe, where)
    if (key := not_finite(recipe)) is not None:
        raise MirageError(f"{where(key)}: {key}: must be a finite number")
    if files:
        check_files(recipe, where)
    return recipe
