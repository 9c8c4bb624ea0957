"""Names that recipes choose by. They are apart from the tables they stand for, which need torch, so that a recipe is
refused before anything heavy is imported; `tests/training/test_light.py` holds names and tables to each other."""

from __future__ import annotations

ALIGNMENT_NAMES = ("cosine", "whitened", "contrastive", "code")
VISIBILITIES = ("full", "bottleneck", "evict")
REWARD_NAMES = ("accuracy", "optimality", "format", "boxed", "brevity", "thought")
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
SPANS = ("free", "required", "forced", "none")
RL_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")
SCALES = ("group", "batch", "none")
NON_FINITE = ("stop", "skip")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# loggers of the Trainer that are known without asking transformers, whose newer ones are known to it alone
LOGGERS = ("tensorboard", "wandb", "mlflow", "comet_ml", "trackio", "all")
