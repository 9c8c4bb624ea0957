"""What the types of a recipe cannot say: values that do not go together, and names of what there is not.

Nothing here imports torch, so that a fault is told at once; what a user names as `module:function` is looked at later.
"""

from __future__ import annotations

import glob
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.bundled import resolve
from mirage_vlm.modeling.config import LIMITS, LONGEST_MARK, STOP_RULES, TARGETS
from mirage_vlm.modeling.names import FEEDBACK_NAMES, POOLING_NAMES
from mirage_vlm.settings import Where
from mirage_vlm.tasks import get_task
from mirage_vlm.tasks.make import GeneratedDataset
from mirage_vlm.training.names import (
    ALIGNMENT_NAMES,
    ATTENTIONS,
    LATENTS,
    LOGGERS,
    NON_FINITE,
    REWARD_NAMES,
    RL_LOSSES,
    SCALES,
    SCHEDULERS,
    SPANS,
    STAGES,
    VISIBILITIES,
)
from mirage_vlm.training.recipe import DataRecipe, LossRecipe, Recipe

Require = Callable[[bool, str, str], None]  # holds, key, message: a fault where it does not hold
OneOf = Callable[[Any, str, Sequence[str]], None]  # value, key, choices


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

    one_of(recipe.stage, "stage", STAGES)
    _check_model(recipe, require, one_of)
    require(bool(recipe.data), "data", "give at least one source")
    for i, source in enumerate(recipe.data):
        _check_source(source, f"data[{i}]", where, require)
    for i, source in enumerate(recipe.model.tokenizer_data):
        _check_source(source, f"model.tokenizer_data[{i}]", where, require)
    _check_loss(recipe, require, one_of)
    _check_train(recipe, require, one_of)
    _check_latents(recipe, require, one_of)
    check_rl(recipe, require, one_of)
    _check_loggers(recipe, one_of)


def _check_model(recipe: Recipe, require: Require, one_of: OneOf) -> None:
    model = recipe.model
    require((model.path is None) != (model.scratch is None), "model", "give one of path and scratch")
    one_of(model.pooling, "model.pooling", POOLING_NAMES)
    one_of(model.feedback, "model.feedback", FEEDBACK_NAMES)
    one_of(model.stop_rule, "model.stop_rule", STOP_RULES)
    one_of(model.target, "model.target", TARGETS)
    if "/" not in (model.attn or ""):  # else it is a kernel of the hub
        one_of(model.attn, "model.attn", ATTENTIONS)
    require(model.codes is None or model.codes > 0, "model.codes", "must be positive")
    require(model.image_scale is None or model.image_scale > 0, "model.image_scale", "must be positive")
    one_of(model.dtype, "model.dtype", ("float32", "bfloat16"))
    require(model.latent_size is None or model.latent_size > 0, "model.latent_size", "must be positive")
    limits = {name: limit for name in LIMITS if (limit := getattr(model, name)) is not None}
    for name, limit in limits.items():
        require(limit > 0, f"model.{name}", "must be positive")
    require(list(limits.values()) == sorted(limits.values()), "model.min_pixels", "is above model.max_pixels")
    if (lora := model.lora) is not None:
        require(lora.rank > 0, "model.lora.rank", "must be positive")
        require(lora.alpha > 0, "model.lora.alpha", "must be positive: with 0 the adapters add nothing")
        require(0 <= lora.dropout < 1, "model.lora.dropout", "must be from 0 to below 1")
        require(bool(lora.modules), "model.lora.modules", "give at least one, such as q_proj")
    if (shape := model.scratch) is None:
        return
    for name, value in vars(shape).items():
        require(value > 0, f"model.scratch.{name}", "must be positive")
    for width, heads, multiple in (("width", "heads", 2), ("vision_width", "vision_heads", 4)):
        key, wide, many = f"model.scratch.{width}", getattr(shape, width), getattr(shape, heads)
        fits = wide % many == 0 and wide // many % multiple == 0
        require(fits, key, f"{wide} does not go into {heads} = {many} of a multiple of {multiple} each")
    require(shape.width // shape.heads >= 6, "model.scratch.width", "a head must have at least 6 of it")
    fits = shape.heads % shape.kv_heads == 0
    require(fits, "model.scratch.kv_heads", f"heads = {shape.heads} is not a multiple of {shape.kv_heads}")


def _check_source(source: DataRecipe, key: str, where: Where, require: Require) -> None:
    require((source.path is None) != (source.task is None), key, "give one of path and task")
    require(source.n > 0, f"{key}.n", "must be positive")
    require(source.repeat > 0, f"{key}.repeat", "must be positive")
    if source.task is None or ":" in source.task:  # a user's own is looked at when the run starts
        return
    part = "task"
    try:
        task = get_task(source.task)
        part = "style"
        if source.style != "mixed":
            task.check_style(source.style)
        part = "levels"
        GeneratedDataset(source.task, source.levels, source.n, source.seed, source.style)
    except MirageError as fault:
        raise MirageError(f"{where(f'{key}.{part}')}: {key}.{part}: {fault}") from fault


def _check_loss(recipe: Recipe, require: Require, one_of: OneOf) -> None:
    loss = recipe.loss
    one_of(loss.alignment, "loss.alignment", ALIGNMENT_NAMES)
    for name in ("ce", "align", "align_stage2"):
        require(getattr(loss, name) >= 0, f"loss.{name}", "must not be negative")
    something = recipe.stage != "stage1" or loss.ce > 0 or loss.align > 0
    require(something, "loss", "ce and align are both 0, so stage1 would learn nothing")
    require(
        not (loss.through_targets and recipe.model.freeze_vision),
        "loss.through_targets",
        "there is nothing to train with a frozen vision tower; set model.freeze_vision to false",
    )


def _check_train(recipe: Recipe, require: Require, one_of: OneOf) -> None:
    train = recipe.train
    for name in ("batch_size", "accumulate", "log_every", "save_every", "keep"):
        require(getattr(train, name) > 0, f"train.{name}", "must be positive")
    require(0 < train.learning_rate < math.inf, "train.learning_rate", "must be positive")
    require(0 <= train.beta2 < 1, "train.beta2", "must be from 0 to below 1")
    for name in ("weight_decay", "warmup", "max_grad_norm"):
        require(0 <= getattr(train, name) < math.inf, f"train.{name}", "must not be negative")
    counted = train.max_steps == -1 or train.max_steps > 0
    require(counted, "train.max_steps", "must be positive, or -1 for as many as train.epochs asks for")
    by_epochs = 0 < train.epochs < math.inf
    require(train.max_steps > 0 or by_epochs, "train.epochs", "must be positive, or train.max_steps")
    require(0 <= train.seed < 2**32, "train.seed", "must be from 0 to below 2^32")
    one_of(train.scheduler, "train.scheduler", SCHEDULERS)
    one_of(train.non_finite, "train.non_finite", NON_FINITE)
    require(train.pack >= 0, "train.pack", "must be 0 (off) or the most tokens of a row")
    require(train.keep_examples >= 0, "train.keep_examples", "must be 0 (none) or GiB")
    require(train.workers >= 0, "train.workers", "must be 0 or more")
    require(
        train.pack == 0 or recipe.stage != "stage2",
        "train.pack",
        "a rollout (stage2) aligns its rows by their spans and cannot be packed; leave it out",
    )
    require(
        train.feature_cache is None or recipe.model.freeze_vision,
        "train.feature_cache",
        "features of a vision tower that is trained cannot be kept; set model.freeze_vision or leave it out",
    )


def _check_latents(recipe: Recipe, require: Require, one_of: OneOf) -> None:
    """What of `train` is about latents and who sees pictures."""
    train = recipe.train
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
        train.visibility == "full" or "flash" not in (recipe.model.attn or ""),
        "train.visibility",
        "needs a mask for each pair of positions, which flash attention does not take; choose another model.attn",
    )
    key, shares = "train.own_share", list(train.own_share)
    two = len(shares) == 2 and all(0 <= share <= 1 for share in shares)
    require(two, key, f"must be two shares from 0 to 1, of the first and the last step, not {shares}")
    require(not recipe.mixes or recipe.stage == "stage2", key, f"{recipe.stage} has no latents of its own")


def check_rl(recipe: Recipe, require: Require, one_of: OneOf) -> None:
    """The part of `check` that is of stage `grpo`."""
    rl, train = recipe.rl, recipe.train
    hint = "add rl: {} for the usual settings, see docs/rl.md" if rl is None else f"leave it out of {recipe.stage}"
    known = (rl is not None) == (recipe.stage == "grpo")
    require(known, "rl", f"is what stage grpo needs, and no other has; {hint}")
    if rl is None:
        return
    one_of(rl.latents, "rl.latents", LATENTS)
    one_of(rl.spans, "rl.spans", SPANS)
    after = rl.span_after is None or (
        rl.spans == "forced" and 0 < len(rl.span_after.encode(errors="replace")) <= LONGEST_MARK
    )
    require(
        after,
        "rl.span_after",
        f"is the text, of 1 to {LONGEST_MARK} bytes, after which a span of rl.spans: forced opens",
    )
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
    for i, name in enumerate(names):
        known = name in REWARD_NAMES or ":" in name
        listed = f"choose from {', '.join(REWARD_NAMES)}, or name your own as module:function"
        require(known, f"rl.rewards[{i}].name", f"there is no reward {name!r}; {listed}")
    weights = [reward.weight for reward in rl.rewards]
    require(all(map(math.isfinite, weights)), "rl.rewards", "weights must be finite numbers")
    require(any(weights), "rl.rewards", "all weights are 0, so nothing would be learnt")
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


def _check_loggers(recipe: Recipe, one_of: OneOf) -> None:
    """Last, since names that are not known here are asked of transformers."""
    if unknown := [name for name in recipe.train.report_to if name not in LOGGERS]:
        from transformers.integrations import INTEGRATION_TO_CALLBACK

        for name in unknown:
            one_of(name, "train.report_to", ["all", *INTEGRATION_TO_CALLBACK])


def check_files(recipe: Recipe, where: Where) -> None:
    """Whether what a recipe names is there.

    Raises:
        MirageError: a file, a folder or a logger is missing; the message names the key and its place.
    """

    def require(holds: bool, key: str, message: str) -> None:
        if not holds:
            raise MirageError(f"{where(key)}: {key}: {message}")

    sources = {f"data[{i}].path": source.path for i, source in enumerate(recipe.data)}
    sources |= {f"model.tokenizer_data[{i}].path": each.path for i, each in enumerate(recipe.model.tokenizer_data)}
    for key, path in sources.items():
        if path is not None and glob.has_magic(path) and not Path(path).exists():
            require(bool(glob.glob(path, recursive=True)), key, f"no file matches {path}")
        elif path is not None:
            require(Path(path).exists(), key, f"there is no {path}")
    if recipe.model.path is not None:
        folder = Path(resolve(recipe.model.path))
        local = folder.is_absolute() or recipe.model.path.startswith(".") or len(folder.parts) > 2
        require(folder.exists() or not local, "model.path", f"there is no {folder}")
        whole = not folder.exists() or (folder / "config.json").is_file()
        require(whole, "model.path", f"{folder} is not a checkpoint (there is no config.json in it)")
    output = Path(recipe.output_dir)
    above = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    require(above.is_dir(), "output_dir", f"{above} is not a folder")
    for name in recipe.train.report_to:
        if name in LOGGERS and name != "all":
            there = any(importlib.util.find_spec(found) for found in {name, name.replace("board", "boardX")})
            require(there, "train.report_to", f"{name} is not installed: pip install {name}")
