"""Recipes: everything a training run needs, in one YAML file.

A recipe is a tree of frozen dataclasses. Unknown keys, wrong types and impossible values are refused with the
file, the line and the key. `key=value` overrides use dots: `train.max_steps=50 output_dir=runs/x`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.config import LIMITS, STOP_RULES, TARGETS
from mirage_vlm.modeling.feedback import FEEDBACKS
from mirage_vlm.modeling.pooling import POOLING_NAMES
from mirage_vlm.modeling.scratch import ScratchConfig
from mirage_vlm.settings import Where, read_settings
from mirage_vlm.training.align import ALIGNMENTS
from mirage_vlm.training.visibility import VISIBILITIES

# of transformers, those that need no other settings
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
STAGES = ("sft", "stage1", "stage2", "grpo")
LATENTS = ("replay", "reroll", "gaussian")
SPANS = ("free", "required", "none")
RL_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")
SCALES = ("group", "batch", "none")


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

    path: str | None = None
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

    path: str | None = None
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
    feature_cache: str | None = None
    keep_examples: float = 0.0
    workers: int = 0
    log_every: int = 10
    save_every: int = 500
    keep: int = 2
    report_to: tuple[str, ...] = ()


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
            `none` (the model cannot open any: GRPO on text, for comparison).
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
    output_dir: str
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


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `key=value` overrides.

    Raises:
        MirageError: the file cannot be read, or a key or value is wrong; the message names file, line and key.
    """
    recipe, where = read_settings(Recipe, path, overrides, "the recipe")
    check(recipe, where)
    return recipe


def check(recipe: Recipe, where: Where) -> None:
    """What types cannot say.

    Raises:
        MirageError: values do not go together; the message names the key and, by `where`, its place.
    """

    def require(holds: bool, key: str, message: str) -> None:
        if not holds:
            raise MirageError(f"{where(key)}: {key}: {message}")

    def one_of(value: Any, key: str, choices: Sequence[str]) -> None:
        require(value is None or value in choices, key, f"{value!r} is not one of {', '.join(choices)}")

    model, train = recipe.model, recipe.train
    one_of(recipe.stage, "stage", STAGES)
    require((model.path is None) != (model.scratch is None), "model", "give one of path and scratch")
    one_of(model.pooling, "model.pooling", POOLING_NAMES)
    one_of(model.feedback, "model.feedback", list(FEEDBACKS))
    one_of(model.stop_rule, "model.stop_rule", STOP_RULES)
    one_of(model.target, "model.target", TARGETS)
    one_of(recipe.loss.alignment, "loss.alignment", list(ALIGNMENTS))
    for name in ("ce", "align", "align_stage2"):
        require(getattr(recipe.loss, name) >= 0, f"loss.{name}", "must not be negative")
    require(
        not (recipe.loss.through_targets and model.freeze_vision),
        "loss.through_targets",
        "there is nothing to train with a frozen vision tower; set model.freeze_vision to false",
    )
    require(model.codes is None or model.codes > 0, "model.codes", "must be positive")
    one_of(model.dtype, "model.dtype", ("float32", "bfloat16"))
    require(model.latent_size is None or model.latent_size > 0, "model.latent_size", "must be positive")
    limits = {name: limit for name in LIMITS if (limit := getattr(model, name)) is not None}
    for name, limit in limits.items():
        require(limit > 0, f"model.{name}", "must be positive")
    require(list(limits.values()) == sorted(limits.values()), "model.min_pixels", "is above model.max_pixels")
    require(bool(recipe.data), "data", "give at least one source")
    for i, source in enumerate(recipe.data):
        require((source.path is None) != (source.task is None), f"data[{i}]", "give one of path and task")
        require(source.n > 0, f"data[{i}].n", "must be positive")
        require(source.repeat > 0, f"data[{i}].repeat", "must be positive")
    for name in ("batch_size", "accumulate", "log_every", "save_every", "keep"):
        require(getattr(train, name) > 0, f"train.{name}", "must be positive")
    require(0 < train.learning_rate < math.inf, "train.learning_rate", "must be positive")
    require(0 <= train.beta2 < 1, "train.beta2", "must be from 0 to below 1")
    for name in ("weight_decay", "warmup", "max_grad_norm"):
        require(0 <= getattr(train, name) < math.inf, f"train.{name}", "must not be negative")
    require(train.max_steps > 0 or 0 < train.epochs < math.inf, "train.epochs", "must be positive, or train.max_steps")
    one_of(train.scheduler, "train.scheduler", SCHEDULERS)
    if train.report_to:
        from transformers.integrations import INTEGRATION_TO_CALLBACK

        for name in train.report_to:
            one_of(name, "train.report_to", ["all", *INTEGRATION_TO_CALLBACK])
    require(train.pack >= 0, "train.pack", "must be 0 (off) or the most tokens of a row")
    require(train.keep_examples >= 0, "train.keep_examples", "must be 0 (none) or GiB")
    require(train.workers >= 0, "train.workers", "must be 0 or more")
    require(train.latent_iterations >= 0, "train.latent_iterations", "must be 0 (one latent after the other) or more")
    require(
        train.latent_iterations == 0 or recipe.stage == "stage2",
        "train.latent_iterations",
        f"only stage2 computes latents, {recipe.stage} does not; leave it out",
    )
    one_of(train.visibility, "train.visibility", VISIBILITIES)
    require(
        train.visibility == "full" or (recipe.stage != "sft" and train.pack == 0),
        "train.visibility",
        "hides pictures in stage1 and stage2 alone, and not from packed rows",
    )
    require(
        train.visibility == "full" or "flash" not in (model.attn or ""),
        "train.visibility",
        "needs a mask for each pair of positions, which flash attention does not take; choose another model.attn",
    )
    key, shares = "train.own_share", list(train.own_share)
    two = len(shares) == 2 and all(0 <= share <= 1 for share in shares)
    require(two, key, f"must be two shares from 0 to 1, of the first and the last step, not {shares}")
    require(not recipe.mixes or recipe.stage == "stage2", key, f"{recipe.stage} has no latents of its own")
    require(
        train.pack == 0 or recipe.stage != "stage2",
        "train.pack",
        "a rollout (stage2) aligns its rows by their spans and cannot be packed; leave it out",
    )
    require(
        train.feature_cache is None or model.freeze_vision,
        "train.feature_cache",
        "features of a vision tower that is trained cannot be kept; set model.freeze_vision or leave it out",
    )
    check_rl(recipe, require, one_of)


def check_rl(
    recipe: Recipe, require: Callable[[bool, str, str], None], one_of: Callable[[Any, str, Sequence[str]], None]
) -> None:
    """The part of `check` that is of stage `grpo`."""
    rl, train = recipe.rl, recipe.train
    require((rl is not None) == (recipe.stage == "grpo"), "rl", "is what stage grpo needs, and no other has")
    if rl is None:
        return
    one_of(rl.latents, "rl.latents", LATENTS)
    one_of(rl.spans, "rl.spans", SPANS)
    one_of(rl.loss, "rl.loss", RL_LOSSES)
    one_of(rl.scale, "rl.scale", SCALES)
    require(rl.n > 1, "rl.n", "the advantage is taken among the responses to a prompt; ask for two or more")
    batch = train.batch_size * train.accumulate
    require(batch % rl.n == 0, "train.batch_size", f"{batch} responses a step are not a multiple of rl.n = {rl.n}")
    for name in ("temperature", "clip"):
        require(getattr(rl, name) > 0, f"rl.{name}", "must be positive")
    for name in ("max_new_tokens", "updates"):
        require(getattr(rl, name) > 0, f"rl.{name}", "must be positive")
    require(rl.kl >= 0, "rl.kl", "must not be negative")
    require(bool(rl.rewards), "rl.rewards", "give at least one")
    names = [reward.name for reward in rl.rewards]
    require(len(set(names)) == len(names), "rl.rewards", "each reward counts once; add up the weights of the same ones")
    require(all(math.isfinite(reward.weight) for reward in rl.rewards), "rl.rewards", "weights must be finite numbers")
    whole = train.save_every % rl.updates == 0
    require(whole, "train.save_every", "must be a multiple of rl.updates: a run resumes with new responses")
    dropout = recipe.model.lora is not None and recipe.model.lora.dropout > 0
    require(not dropout, "model.lora.dropout", "must be 0 in stage grpo, else engine and trainer would disagree")
    require(recipe.loss == LossRecipe(), "loss", "is of the other stages; leave it out")
    wants = rl.latents == "gaussian"
    require((rl.latent_noise > 0) == wants, "rl.latent_noise", "must be positive with gaussian latents, and 0 without")
    require(not (wants and rl.spans == "none"), "rl.latents", "there are no latents where rl.spans is none")
    one_of(train.visibility, "train.visibility", ("full", "evict"))
    for key, usual in (("train.pack", 0), ("train.keep_examples", 0.0), ("train.workers", 0)):
        require(getattr(train, key.partition(".")[2]) == usual, key, "is of no use in stage grpo; leave it out")
