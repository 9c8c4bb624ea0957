"""From a recipe of stage `grpo` to a trained model."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from transformers import set_seed

from mirage_vlm.errors import MirageError
from mirage_vlm.formats import Faults
from mirage_vlm.modeling.latent_vlm import LatentVLM
from mirage_vlm.rl.rewards import reward_of
from mirage_vlm.tasks import faults
from mirage_vlm.tasks.make import GeneratedDataset
from mirage_vlm.training.cache_check import check_cache
from mirage_vlm.training.checkpoints import MetricsFile
from mirage_vlm.training.data import Examples, all_sources, open_all
from mirage_vlm.training.folder import METRICS_FILE, alone, newest_checkpoint, write_recipe
from mirage_vlm.training.recipe import Recipe
from mirage_vlm.training.run import prepare_model, run, training_arguments
from mirage_vlm.training.run import train as train_on_data
from mirage_vlm.training.shares import together
from mirage_vlm.training.telling import plan_of


def run_recipe(recipe: Recipe, *, resume: bool = False, force: bool = False, device: str | None = None) -> Path:
    """Run a recipe of any stage; as `mirage_vlm.training.run.train`.

    Raises:
        MirageError: as that, or `train_by_rewards`.
    """
    by = train_by_rewards if recipe.stage == "grpo" else train_on_data
    return by(recipe, resume=resume, force=force, device=device)


def train_by_rewards(recipe: Recipe, *, resume: bool = False, force: bool = False, device: str | None = None) -> Path:
    """Run a recipe of stage `grpo`; arguments as for `mirage_vlm.training.run.train`.

    Raises:
        MirageError: TRL is not there, the data, the model, a reward or the output folder is not as the recipe needs it,
            another training writes there, or a step came out that is not finite.
    """
    try:
        from trl import GRPOConfig
    except ImportError as fault:
        raise MirageError("stage grpo needs TRL: pip install 'mirage-vlm[rl]'") from fault
    from mirage_vlm.rl.trainer import LatentGRPO

    rl, train_ = recipe.rl, recipe.train
    assert rl is not None
    names = ("activation_checkpointing", "gradient_checkpointing")  # the first from transformers 5.24 on
    checkpointing = next(name for name in names if name in GRPOConfig.__dataclass_fields__)
    arguments = training_arguments(
        recipe,
        GRPOConfig,
        device,
        num_generations=rl.n,
        num_iterations=rl.updates,
        steps_per_generation=train_.accumulate,
        max_completion_length=rl.max_new_tokens,
        temperature=rl.temperature,
        epsilon=rl.clip,
        loss_type=rl.loss,
        scale_rewards=rl.scale,
        beta=0.0,  # TRL would load its reference by name; ours is given
        **{checkpointing: False},  # of the decoder, which `prepare_model` sees to
        disable_dropout=True,  # which would make the engine and the trainer disagree
    )
    output = Path(recipe.output_dir)
    with ExitStack() as held:
        with together(arguments.device):
            if arguments.process_index == 0:
                held.enter_context(alone(output))
            last = newest_checkpoint(recipe, resume, force)
            rewards = {each.name: (reward_of(each.name), each.weight) for each in rl.rewards}
            examples = open_examples(recipe)
            prompts = train_.batch_size * train_.accumulate * arguments.world_size // rl.n
            if len(examples) < prompts:
                raise MirageError(f"data: {len(examples)} examples do not make one step of {prompts} prompts")
            set_seed(train_.seed)
            vlm = prepare_model(recipe, examples)
            check_prompts(vlm, examples)
            if rl.latents == "reroll":
                check_cache(vlm)
            if arguments.process_index == 0:
                write_recipe(recipe)
        arguments.ddp_find_unused_parameters = True  # a batch without spans leaves the feedback without gradient
        metrics = MetricsFile(output / METRICS_FILE, len(examples))
        trainer = LatentGRPO(vlm, recipe, arguments, examples, rewards, callbacks=[metrics])
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise MirageError(
                "stage grpo decodes from whole weights, which FSDP and DeepSpeed share out; launch it with DDP (or "
                "LoRA)"
            )
        return run(trainer, last, plan_of(recipe, vlm, all_sources(recipe.data), examples))


def open_examples(recipe: Recipe) -> Examples:
    """What is asked; no responses are needed.

    Raises:
        MirageError: a source cannot be read, or its answers cannot be checked where a reward would.
    """
    rl = recipe.rl
    assert rl is not None
    checked = any(each.name in ("accuracy", "optimality") for each in rl.rewards)
    named = all_sources(recipe.data)
    examples = open_all(named, responses=False)
    for source, found in zip(named, examples.sources, strict=True):
        if not checked or isinstance(found, GeneratedDataset):
            continue
        refused = Faults()
        for i, example in enumerate(found, start=1):
            for fault in faults(example):
                refused.add(example.where or f"{source.path}:{i}", fault)
        if refused:
            raise MirageError(refused.summary())
    return examples


def check_prompts(vlm: LatentVLM, examples: Examples) -> None:
    """What the encoder would refuse of the questions of files; made ones are sound.

    Raises:
        MirageError: there is any.
    """
    refused = Faults()
    for source in examples.sources:
        if not isinstance(source, GeneratedDataset):
            for i, example in enumerate(source, start=1):
                for fault in vlm.encoder.faults(example, response=False):
                    refused.add(example.where or f"example {i}", fault)
    if refused:
        raise MirageError(refused.summary())
