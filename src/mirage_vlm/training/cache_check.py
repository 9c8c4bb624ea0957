"""Before a rollout with own latents: does a pass over the rest of a row really see what was read before it?

Some releases of transformers take the cache away from a layer whose activations are checkpointed, with no more than a
warning. Text and latents after the first cut would then be learnt without the prompt, and nothing would fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import transformers

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.decoder import run_decoder
from mirage_vlm.modeling.segment_cache import NARROW, SegmentCache, checkpoint_with_cache

if TYPE_CHECKING:
    from mirage_vlm.modeling.latent_vlm import LatentVLM

PREFIX, REST = 12, 2 * NARROW  # columns; the rest is wide enough to be checkpointed
WITHIN, WITHIN_HALF = 1e-3, 0.1  # of the states' own size, in single precision and in half


def check_cache(vlm: LatentVLM) -> None:
    """Compare a pass in two pieces, as stage 2 makes them, with one in a single piece, forward and backward.

    Inputs are noise of the size of the embeddings. The model is put into training mode meanwhile, and no gradient is
    left behind. Nothing is compared where weights lie in another process, or where dropout makes passes differ.

    Raises:
        MirageError: the second piece does not see the first.
    """
    decoder = vlm.language_model
    weights = [parameter for parameter in decoder.parameters() if parameter.is_floating_point()]
    if any(weight.is_meta for weight in weights) or _drops(decoder):
        return
    was_training = vlm.training
    vlm.train()
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            problem = _problem(vlm, decoder)
    finally:
        vlm.train(was_training)
    if problem is not None:
        checkpointed = " with gradient checkpointing" if any(map(_is_checkpointed, decoder.layers)) else ""
        raise MirageError(
            f"a pass that goes on from a cache does not see what was read before it{checkpointed} ({problem}), so own "
            f"latents cannot be trained with transformers {transformers.__version__}: switch "
            "train.gradient_checkpointing off, or install another release (docs/training.md names the tested ones)"
        )


def _problem(vlm: LatentVLM, decoder: torch.nn.Module) -> str | None:
    """What is wrong with a pass in two pieces; None where nothing is."""
    table = vlm.model.get_input_embeddings().weight
    size = table.detach().float().std().item()
    inputs = (size * torch.randn(1, PREFIX + REST, table.shape[1])).to(table.device, table.dtype).requires_grad_()
    tokens = torch.full((1, PREFIX + REST), vlm.tokenizer.eos_token_id, device=table.device)
    mask = torch.ones_like(tokens)
    positions = vlm.positions(tokens, mask, None)
    whole = run_decoder(decoder, inputs, positions, mask).last_hidden_state[:, PREFIX:]
    along = torch.randn(whole.shape[1:]).to(whole)  # the squares of normed states always add up to the same
    (wanted,) = torch.autograd.grad((whole * along).sum(), inputs)
    cache = SegmentCache.empty(len(decoder.layers), PREFIX + REST)  # type: ignore[arg-type]
    try:
        with checkpoint_with_cache(decoder):
            run_decoder(decoder, inputs[:, :PREFIX], positions[..., :PREFIX], mask[:, :PREFIX], cache)
            rest = run_decoder(decoder, inputs[:, PREFIX:], positions[..., PREFIX:], mask, cache.next())
        hidden = rest.last_hidden_state
        (found,) = torch.autograd.grad((hidden * along).sum(), inputs)
    except RuntimeError as fault:  # shapes that do not fit a cache that is not there
        return str(fault).splitlines()[0]
    if not found[:, :PREFIX].abs().sum() > 0:
        return "no gradient reaches what was read first"
    within = WITHIN_HALF if hidden.dtype.itemsize < 4 else WITHIN
    for what, one, other in (("hidden states", hidden, whole), ("gradients", found, wanted)):
        if not (one - other).abs().max() <= within * other.abs().max():
            return f"{what} are not those of one pass over everything"
    return None


def _drops(decoder: torch.nn.Module) -> bool:
    """Whether passes differ by chance."""
    layers = (module.p for module in decoder.modules() if isinstance(module, torch.nn.Dropout))
    return any(share > 0 for share in layers) or getattr(decoder.config, "attention_dropout", 0) > 0


def _is_checkpointed(layer: torch.nn.Module) -> bool:
    return bool(getattr(layer, "gradient_checkpointing", False))
