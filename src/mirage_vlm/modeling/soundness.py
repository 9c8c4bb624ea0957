"""Whether the parts of a checkpoint fit together: found at load and said in one line, never met as a wrong answer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jinja2 import TemplateError

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.family import QwenVL

_PROBE = "Which way is the gift?"


def check_loading(loading: Mapping[str, Any], where: str) -> None:
    """Whether the weights are those that the shapes of `config.json` want.

    Args:
        loading: what transformers says of it.

    Raises:
        MirageError: weights are missing, of another shape, or of layers that config.json does not know.
    """
    if missing := sorted(loading["missing_keys"]):
        raise MirageError(f"{where}: the checkpoint lacks {len(missing)} weights, {missing[0]} among them")
    if other := sorted(loading.get("mismatched_keys") or ()):
        name, stored, wanted = other[0]  # of the first weight by name
        raise MirageError(
            f"{where}: config.json does not fit the weights: {name} is {_shape(stored)}, but should be {_shape(wanted)}"
        )
    unknown = sorted(key for key in loading.get("unexpected_keys") or () if ".layers." in key or ".blocks." in key)
    if unknown:
        raise MirageError(f"{where}: config.json does not fit the weights: it has no place for {unknown[0]}")


def check_model(model: Any, where: str) -> None:
    """Whether a model's own shapes fit together, and its weights are numbers.

    Raises:
        MirageError: they do not, or are not.
    """
    text = model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rope = getattr(text, "rope_parameters", None) or {}
    section = rope.get("mrope_section")
    if section is not None and 2 * sum(section) != head:
        raise MirageError(
            f"{where}: config.json: mrope_section {list(section)} must add up to half a head, which is {head // 2}"
        )
    out = model.config.vision_config
    wide = getattr(out, "out_hidden_size", out.hidden_size)  # of Qwen2-VL, whose tower has one name for it
    if wide != text.hidden_size:
        raise MirageError(
            f"{where}: config.json: the vision tower gives {wide} features, but the decoder is {text.hidden_size} wide"
        )
    check_finite(model.state_dict().items(), where)


def check_finite(weights: Iterable[tuple[str, torch.Tensor]], where: str) -> None:
    """Whether all weights are numbers.

    Raises:
        MirageError: one is not; names the first tensor.
    """
    for name, tensor in weights:
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        # a sum is not finite where a part is not, and takes next to no time; where it is not, it may only be too large
        if math.isfinite(tensor.sum()) or bool(tensor.isfinite().all()):
            continue
        bad = int((~tensor.isfinite()).sum())
        raise MirageError(
            f"{where}: {name} holds {bad:,} of {tensor.numel():,} numbers that are NaN or infinite; the training that "
            "wrote it went wrong, take an earlier checkpoint"
        )


def check_processor(image_processor: Any, config: Any, where: str) -> None:
    """Whether the image processor cuts pictures as the vision tower wants them.

    Raises:
        MirageError: it does not, or is of another kind.
    """
    vision = config.vision_config
    sides = {
        "patch_size": "patch_size",
        "merge_size": "spatial_merge_size",
        "temporal_patch_size": "temporal_patch_size",
    }
    for own, key in sides.items():
        found, wanted = getattr(image_processor, own, None), getattr(vision, key)
        if found != wanted:
            said = "has none" if found is None else f"says {found}"
            raise MirageError(
                f"{where}: config.json says {key} is {wanted}, but preprocessor_config.json {said} ({own})"
            )


def check_tokenizer(tokenizer: Any, model: Any, family: QwenVL, where: str) -> None:
    """Whether the model knows every token, and the tokenizer the picture's.

    Raises:
        MirageError: they do not.
    """
    rows = model.get_input_embeddings().num_embeddings
    token, last = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if last >= rows:
        raise MirageError(
            f"{where}: the tokenizer's {token!r} is token {last}, but the embedding table has {rows} rows; it is "
            "another model's tokenizer"
        )
    for name in ("eos_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise MirageError(f"{where}: the tokenizer has no {name}; name one in tokenizer_config.json")
    if not _known(tokenizer, family.image_token_id):
        raise MirageError(
            f"{where}: config.json says image_token_id is {family.image_token_id}, which the tokenizer does not know"
        )


def check_template(tokenizer: Any, family: QwenVL, where: str) -> None:
    """Whether the chat template does what everything here relies on, tried on a picture and a text.

    Raises:
        MirageError: there is none, it is broken, or it drops the text, the picture or the beginning of the answer.
    """
    if not tokenizer.chat_template:
        raise MirageError(
            f"{where}: there is no chat template; put the model's chat_template.jinja beside its tokenizer"
        )
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _PROBE}]}]
    try:
        shown, alone = (
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer)
            for answer in (True, False)
        )
    except (TemplateError, TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as fault:
        raise MirageError(f"{where}: the chat template is broken: {one_line(fault)}") from fault
    mark = tokenizer.convert_ids_to_tokens(family.image_token_id)
    places = tokenizer(shown, add_special_tokens=False)["input_ids"].count(family.image_token_id)
    problem = None
    if shown.count(_PROBE) != 1:
        problem = f"writes a user's text {shown.count(_PROBE)} times"
    elif places != 1:
        problem = f"makes {places} places for one picture ({mark}, image_token_id of config.json)"
    elif shown == alone:
        problem = "does not begin the answer (add_generation_prompt)"
    if problem:
        raise MirageError(f"{where}: the chat template {problem}; take the model's own")


def _known(tokenizer: Any, token_id: Any) -> bool:
    """Whether a tokenizer has a token of this id."""
    return type(token_id) is int and token_id in tokenizer.get_vocab().values()


def _shape(sizes: Iterable[int]) -> str:
    return " × ".join(map(str, sizes))


def one_line(fault: BaseException) -> str:
    """The first line of what another library says went wrong."""
    return str(fault).strip().splitlines()[0] if str(fault).strip() else type(fault).__name__
