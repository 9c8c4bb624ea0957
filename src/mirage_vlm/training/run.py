"""From a recipe to a trained model."""

from __future__ import annotations

import random
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from transformers import TrainingArguments, set_seed

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.bundled import resolve
from mirage_vlm.modeling.checkpoint import has_latents
from mirage_vlm.modeling.config import LIMITS
from mirage_vlm.modeling.decoder import checkpoint_activations
from mirage_vlm.modeling.features import FeatureStore
from mirage_vlm.modeling.feedback import Feedback
from mirage_vlm.modeling.latent_vlm import LatentVLM
from mirage_vlm.modeling.pooling import Targets
from mirage_vlm.modeling.scratch import build
from mirage_vlm.training.align import ALIGNMENTS, Alignment
from mirage_vlm.training.cache_check import check_cache
from mirage_vlm.training.checkpoints import Checkpoints, MetricsFile
from mirage_vlm.training.data import (
    Collator,
    Examples,
    Kept,
    all_sources,
    check_examples,
    has_spans,
    open_all,
)
from mirage_vlm.training.folder import (
    FINAL,
    METRICS_FILE,
    RECIPE_FILE,
    alone,
    clear,
    newest_checkpoint,
    write_recipe,
    writing,
)
from mirage_vlm.training.losses import targets_of
from mirage_vlm.training.recipe import LoraRecipe, ModelRecipe, Recipe
from mirage_vlm.training.rollout import Batch
from mirage_vlm.training.shares import together
from mirage_vlm.training.telling import Plan, plan_of, speak
from mirage_vlm.training.trainer import LatentTrainer
from mirage_vlm.training.workers import in_one_line
from mirage_vlm.trajectory import Image, Text

A = TypeVar("A", bound=TrainingArguments)
TOKENIZER_SAMPLE = 4000
FIT_TARGETS, FIT_BATCH = 16_000, 64  # parts of targets that statistics are made of; examples looked at together


def train(recipe: Recipe, *, resume: bool = False, force: bool = False, device: str | None = None) -> Path:
    """Run a recipe.

    Args:
        resume: go on from the newest checkpoint in `output_dir`; starts afresh where there is none.
        force: go on though the recipe has changed.
        device: `cpu` or `cuda`; by default a GPU where torch finds one.

    Returns:
        The folder of the final model, `output_dir/final`.

    Raises:
        MirageError: the data, the model or the output folder is not as the recipe needs it, another training writes
            there, or a step came out that is not finite.
    """
    arguments = training_arguments(recipe, TrainingArguments, device)  # joins the other processes, if there are any
    output = Path(recipe.output_dir)
    with ExitStack() as held:
        with together(arguments.device):
            if arguments.process_index == 0:
                held.enter_context(alone(output))
            last = newest_checkpoint(recipe, resume, force)
            sources = all_sources(recipe.data)
            examples = open_all(sources)
            if recipe.stage == "sft" and any(has_spans(source) for source in examples.sources):
                raise MirageError("stage sft trains on text alone, but the data has latent spans; use stage1 or stage2")
            set_seed(recipe.train.seed)
            vlm = prepare_model(recipe, examples)
            for source, opened in zip(sources, examples.sources, strict=True):
                check_examples(vlm.encoder, opened, source.path or f"task {source.task}", recipe.needs_targets)
            alignment = ALIGNMENTS[recipe.loss.alignment]().to(vlm.device)
            fit(vlm, alignment, examples, recipe, arguments.device)
            if recipe.stage == "stage2":
                check_cache(vlm)
            if arguments.process_index == 0:
                write_recipe(recipe)
        # of these a process without pictures, or without spans, makes no gradient
        sometimes = [p for part in (vlm.vision_tower, vlm.feedback, vlm.pooling) for p in part.parameters()]
        arguments.ddp_find_unused_parameters = any(parameter.requires_grad for parameter in sometimes)
        kept = Kept(examples, vlm.encoder, recipe.needs_targets, recipe.train.keep_examples * 2**30)
        trainer = LatentTrainer(
            vlm,
            recipe,
            arguments,
            alignment,
            train_dataset=kept if recipe.train.keep_examples else examples,
            data_collator=Collator(
                vlm.encoder,
                targets=recipe.needs_targets,
                pack=recipe.train.pack,
                keys=vlm.feature_store is not None,
            ),
            callbacks=[MetricsFile(output / METRICS_FILE, len(examples))],
        )
        return run(trainer, last, plan_of(recipe, vlm, sources, examples))


def run(trainer: Checkpoints, last: str | None, plan: Plan) -> Path:
    """Train, and save the final model, a plain checkpoint; returns its folder.

    Args:
        last: the checkpoint to go on from.
        plan: what is told before the first step.

    Raises:
        MirageError: a disk is full or cannot be written, a process that prepares batches ends, or a step is not finite.
    """
    recipe = trainer.recipe
    output = Path(recipe.output_dir)
    speak(trainer, plan)
    if trainer.is_world_process_zero():
        clear(output)
    if last is not None and was_over(recipe, last):
        trainer.load_weights(last)  # transformers would train one step more
    else:
        try:
            with writing("what a training writes", output, full=True), in_one_line():
                trainer.train(resume_from_checkpoint=last)
        finally:
            trainer.callback_handler.train_dataloader = None  # its worker processes end with it
    trainer.watch.check_weights()
    trainer.collect()
    if trainer.is_world_process_zero():
        merge_adapters(trainer.vlm)
        with writing("the final model", output):
            _put_in_place(trainer, output / FINAL)
    trainer.accelerator.wait_for_everyone()
    return output / FINAL


def _put_in_place(trainer: Checkpoints, final: Path) -> None:
    """Write the final model and its recipe beside their place, and move them there when they are whole."""
    staged = final.with_name(f".{final.name}")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        trainer.vlm.save_pretrained(staged)
        shutil.copy(final.with_name(RECIPE_FILE), staged)
        if final.exists():
            shutil.rmtree(final)
        staged.rename(final)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def was_over(recipe: Recipe, last: str | None) -> bool:
    """Whether a checkpoint is of the last step of a run."""
    return last is not None and 0 < recipe.train.max_steps <= int(last.rpartition("-")[2])


def prepare_model(recipe: Recipe, examples: Examples) -> LatentVLM:
    """The model of a recipe, ready to train: latent tokens added, frozen and adapted as it says."""
    wanted: ModelRecipe = recipe.model
    names = ("latent_size", "pooling", "feedback", "codes", "target", "places", "stop_rule", "image_scale", *LIMITS)
    latent = {name: value for name in names if (value := getattr(wanted, name)) is not None}
    latent["evict_images"] = recipe.train.visibility == "evict"  # decoded as it was trained
    if wanted.scratch is not None:
        corpus = open_all(all_sources(wanted.tokenizer_data)) if wanted.tokenizer_data else examples
        vlm = build(wanted.scratch, _sample_texts(corpus), recipe.train.seed, wanted.attn, **latent)
    else:
        assert wanted.path is not None
        path = resolve(wanted.path)
        options: dict[str, Any] = {"dtype": getattr(torch, wanted.dtype), "attn": wanted.attn}
        if has_latents(path):
            vlm = LatentVLM.from_pretrained(path, **options, **latent)
        else:
            vlm = LatentVLM.from_base(path, **options, **latent)
    vlm.vision_tower.requires_grad_(not wanted.freeze_vision)
    vlm.feedback.requires_grad_(recipe.stage != "sft")  # which does not read it
    vlm.pooling.requires_grad_(recipe.needs_targets)
    if wanted.lora is not None:
        add_adapters(vlm, wanted.lora)
    if recipe.train.feature_cache is not None:
        vlm.feature_store = FeatureStore(recipe.train.feature_cache, vlm.vision_tower)
    if recipe.train.gradient_checkpointing:
        checkpoint_activations(vlm.model)
    return vlm


def fit(
    vlm: LatentVLM, alignment: Alignment, examples: Examples, recipe: Recipe, device: torch.device | None = None
) -> None:
    """Let what is made from targets be made: the alignment, and the feedback where it did not come with a checkpoint.

    Every process does it for itself, from the same sample.

    Args:
        device: where the vision tower looks at the sample; the rest of the model is left where it is.

    Raises:
        MirageError: the alignment and the feedback do not go together, there are too few targets, or the vision tower's
            weights are in another process.
    """
    if vlm.feedback.reads_patches and recipe.train.pack:
        raise MirageError("train.pack: a pointer would see the pictures of the other examples of its row; leave it out")
    if recipe.needs_targets:
        alignment.check(vlm.feedback)
        if vlm.feedback.reads_patches and vlm.config.target != "prompt":
            raise MirageError("model.feedback: pointer points at the prompt's picture; set model.target to prompt too")
    used: tuple[Feedback | Alignment, ...] = (vlm.feedback, alignment) if recipe.needs_targets else (vlm.feedback,)
    parts = [part for part in used if not part.fitted]
    if recipe.stage == "sft" or not parts:
        return
    if any(parameter.is_meta for parameter in vlm.vision_tower.parameters()):
        raise MirageError(
            f"{type(parts[0]).__name__.lower()} is made of targets, which needs the vision tower in every process: "
            "turn off fsdp_cpu_ram_efficient_loading"
        )
    home = vlm.device
    device = device or home
    looking = (vlm.vision_tower.to(device), vlm.pooling.to(device))
    found: list[Targets] = []
    collate = Collator(vlm.encoder, targets=True)
    order = random.Random(0).sample(range(len(examples)), len(examples))
    for start in range(0, len(order), FIT_BATCH):
        few = [example for example in map(examples.__getitem__, order[start : start + FIT_BATCH]) if example.spans]
        if few:
            batch = Batch(**{k: v.to(device) if hasattr(v, "to") else v for k, v in collate(few).items()})
            with torch.no_grad():
                targets = targets_of(vlm, batch)
            assert targets is not None
            found.append(targets)
        if sum(len(targets.parts) for targets in found) >= FIT_TARGETS:
            break
    for module in looking:
        module.to(home)
    if not found:
        raise MirageError("the data has no latent spans to learn targets from")
    sample = Targets.join(found)
    for part in parts:
        part.fit((sample.parts if isinstance(part, Feedback) else sample.pooled).to(home).float())


def add_adapters(vlm: LatentVLM, lora: LoraRecipe) -> None:
    """Low-rank adapters on the decoder; beside them only the latent tokens' rows are trained (embeddings and head)."""
    decoder = set(vlm.language_model.modules())
    wanted = {
        name
        for name, module in vlm.model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in lora.modules and module in decoder
    }
    if not wanted:
        raise MirageError(f"model.lora.modules: no layer of the decoder is named {', '.join(lora.modules)}")
    tokens = [vlm.config.start_id, vlm.config.pad_id, vlm.config.end_id]
    tied = vlm.family.tied(vlm.model)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(wanted),
        trainable_token_indices={"embed_tokens": tokens} if tied else {"embed_tokens": tokens, "lm_head": tokens},
    )
    inject_adapter_in_model(config, vlm.model)


def merge_adapters(vlm: LatentVLM) -> None:
    """Fold adapters into the weights, so that the model is a plain checkpoint again."""
    for name, module in list(vlm.model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, TrainableTokensWrapper):
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        elif isinstance(module, LoraLayer):
            module.merge()
            plain = module.get_base_layer()
        else:
            continue
        setattr(vlm.model.get_submodule(parent), child, plain)


def training_arguments(recipe: Recipe, kind: type[A], device: str | None = None, **more: Any) -> A:
    """A recipe's `train` section in the Trainer's terms, with whatever else its arguments are to say.

    Raises:
        MirageError: there is no such device.
    """
    train = recipe.train
    use_cpu = not wants_gpu(device)
    arguments = kind(
        output_dir=recipe.output_dir,
        num_train_epochs=train.epochs,
        max_steps=train.max_steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulate,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.scheduler,
        warmup_steps=train.warmup,
        weight_decay=train.weight_decay,
        adam_beta2=train.beta2,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        bf16=train.bf16,
        dataloader_num_workers=train.workers,
        dataloader_persistent_workers=train.workers > 0,
        logging_steps=train.log_every,
        logging_first_step=True,
        save_steps=train.save_every,
        save_strategy="steps",
        report_to=list(train.report_to) or "none",
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=use_cpu,
        dataloader_pin_memory=not use_cpu,
        logging_nan_inf_filter=False,  # which writes another loss in the place of what is not finite; see `Watch`
        disable_tqdm=True,
        **more,
    )
    return on_one_card(arguments)


def wants_gpu(device: str | None) -> bool:
    """Whether to train on a GPU: where torch finds one, unless the CPU is named.

    Raises:
        MirageError: there is no such device.
    """
    if device not in (None, "cpu", "cuda"):
        raise MirageError(
            f"--device: {device!r} is not one of cpu, cuda; which cards are used is said by CUDA_VISIBLE_DEVICES"
        )
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise MirageError("--device: torch finds no CUDA device here; leave it out to train on the CPU")
    return there and device != "cpu"


def on_one_card(arguments: A) -> A:
    """One device a process. A single one would split rows among its cards, which pictures do not bear."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    if arguments.device.type == "cpu":  # one of several is on `cpu:0`, where transformers before 5.18 cannot resume
        vars(arguments)["_setup_devices"] = torch.device("cpu")
    return arguments


def _sample_texts(examples: Examples) -> list[str]:
    """Texts of an even sample of the data, for training a tokenizer."""
    step = max(1, len(examples) // TOKENIZER_SAMPLE)
    texts = []
    for i in range(0, len(examples), step):
        trajectory = examples[i]
        segments = [segment for message in trajectory.messages for segment in message.segments]
        texts += [segment.text for segment in segments if isinstance(segment, Text)]
        texts += ["".join(segment.reading) for segment in segments if isinstance(segment, Image) and segment.reading]
    return texts
