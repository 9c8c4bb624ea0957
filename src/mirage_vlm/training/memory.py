"""What a recipe takes of a card's memory, worked out from the shapes of its model before anything is loaded.

Weights, gradients and AdamW's state are exact. Activations are what autograd keeps for the backward pass, counted
operation by operation in the decoder layer of transformers, and right to about a fifth. Not counted: a trained
vision tower's activations, what the driver takes, fragments, and what lives for one operation only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.checkpoint import read_config
from mirage_vlm.modeling.family import family_of
from mirage_vlm.training.recipe import Recipe

# of the published config.json, so that a plan needs no network:
# width, layers, heads, key-value heads, mlp, vocabulary, whether the embeddings are the head too
_PUBLISHED = {
    "Qwen/Qwen2.5-VL-3B-Instruct": (2048, 36, 16, 2, 11008, 151936, True),
    "Qwen/Qwen2.5-VL-7B-Instruct": (3584, 28, 28, 4, 18944, 152064, False),
}


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters.

    Attributes:
        total, trained: of the model, adapters included.
        layer: of one decoder layer.
        rest, rest_trained: outside of the decoder layers (embeddings, LM head, vision tower).
    """

    total: int
    trained: int
    layer: int
    rest: int
    rest_trained: int


def model_shape(path: str) -> Any:
    """A checkpoint's model on the meta device: shapes without weights.

    Raises:
        MirageError: there is no such checkpoint.
    """
    if path in _PUBLISHED:
        width, layers, heads, kv_heads, mlp, vocabulary, tied = _PUBLISHED[path]
        text = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        text |= {"num_key_value_heads": kv_heads, "intermediate_size": mlp, "vocab_size": vocabulary}
        vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": width}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    else:
        try:
            config = read_config(path)
            family_of(config)
        except MirageError as fault:
            known = " and ".join(_PUBLISHED)
            raise MirageError(f"model.path: {fault}; the shapes of {known} are known without the network") from fault
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def sizes(model: Any, recipe: Recipe) -> Sizes:
    """Count a model's parameters, tied ones once, and what a recipe trains of them (but for a feedback's own)."""
    family, lora = family_of(model.config), recipe.model.lora
    decoder: Any = family.language_model(model)
    layer, total = _count(decoder.layers[0]), _count(model)
    rest = total - layer * len(decoder.layers)
    if lora is None:
        frozen = _count(family.vision_tower(model)) if recipe.model.freeze_vision else 0
        return Sizes(total, total - frozen, layer, rest, rest - frozen)
    adapters = sum(
        lora.rank * (module.in_features + module.out_features)
        for name, module in decoder.layers[0].named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in lora.modules
    )
    tied = family.tied(model)
    tokens = 3 * decoder.config.hidden_size * (1 if tied else 2)  # the latent tokens' rows
    added = adapters * len(decoder.layers) + tokens
    return Sizes(total + added, added, layer + adapters, rest + tokens, tokens)


def estimate(
    model: Any, recipe: Recipe, *, tokens: int = 1024, labels: int = 256, cards: int = 1, resharded: bool = True
) -> dict[str, int]:
    """Bytes on a card at the peak of a step, by what takes them.

    Args:
        model: of the recipe; only its shapes are read.
        tokens, labels: of a row; `train.batch_size` says how many rows.
        cards: over how many weights, gradients and AdamW's state are shared out by FSDP2; 1 = a card has them all.
        resharded: under FSDP2 a layer's weights are dropped after each pass and gathered again.
    """
    found, train, config = sizes(model, recipe), recipe.train, model.config.get_text_config()
    stored = 2 if recipe.model.dtype == "bfloat16" and recipe.model.scratch is None else 4
    used = 2 if train.bf16 else stored  # bytes of a number that is computed with
    kept = 4 if train.bf16 and cards > 1 else stored  # of a trained one: there accelerate makes float32 of them
    parts = {
        "weights": (kept * found.trained + stored * (found.total - found.trained)) // cards,
        "gradients": kept * found.trained // cards,
        "AdamW's state": 2 * kept * found.trained // cards,
    }
    if cards > 1:
        layers = 2 if resharded else config.num_hidden_layers  # one at work, one on its way
        parts["gathered weights"] = used * (found.rest + layers * found.layer)
        share = found.trained - found.rest_trained
        whole = 2 * max(found.rest_trained, share // config.num_hidden_layers)  # with the copy that is sent round
        # all layers' until the last micro-batch, and in stage 2 until the pass that ran first
        waiting = share if train.accumulate > 1 or recipe.stage == "stage2" else 0
        parts["whole gradients"] = used * (whole + waiting)
    elif train.bf16 and stored == 4:
        parts["bfloat16 copies of weights"] = 2 * found.total
    parts["activations"] = train.batch_size * tokens * _activations(config, recipe, used, stored, tokens)
    parts["logits"] = 16 * train.batch_size * labels * config.vocab_size  # and their gradient, float32 but for a part
    return parts


def _activations(config: Any, recipe: Recipe, used: int, stored: int, tokens: int) -> int:
    """Bytes that a token leaves for the backward pass, in all layers; with checkpointing also those of the one that
    is run again."""
    width, heads = config.hidden_size, config.num_attention_heads
    head = width // heads
    keys = 2 * head * config.num_key_value_heads  # and values
    autocast = used < stored
    norms = 26 * width if autocast else 2 * (4 + 2 * used) * width
    layer = norms + used * (2 * width + keys + 4 * config.intermediate_size)
    if heads > config.num_key_value_heads:  # with a padding mask, keys and values are repeated for all heads
        layer += used * 3 * width
    if recipe.model.attn == "eager":
        layer += (4 if used == 4 else 6) * heads * tokens
    between = stored * width + (used * keys if recipe.stage == "stage2" else 0)
    outside = 14 * width  # embeddings, final norm
    if recipe.train.gradient_checkpointing:
        latents = (recipe.model.latent_size or 4) if recipe.stage == "stage2" else 0  # of a row; they are not run again
        return config.num_hidden_layers * (between + layer * latents // tokens) + layer + outside
    if recipe.stage == "stage2" and heads > config.num_key_value_heads:  # once more for each latent, half a row of them
        layer += (recipe.model.latent_size or 4) * used * width
    return config.num_hidden_layers * layer + outside


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
