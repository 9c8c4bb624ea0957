"""Loading and saving: ordinary transformers checkpoints, with the latent part in `config.json`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

# by its module: the top level of transformers 5.16 refuses the class where torchvision is missing
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import logging

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.bundled import located
from mirage_vlm.modeling.config import LATENT_TOKENS, LIMITS, LatentConfig
from mirage_vlm.modeling.devices import choose_device
from mirage_vlm.modeling.family import family_of
from mirage_vlm.modeling.feedback import Feedback, same_weights
from mirage_vlm.modeling.limits import check_agreement
from mirage_vlm.modeling.pooling import LEARNT
from mirage_vlm.modeling.soundness import (
    check_finite,
    check_loading,
    check_model,
    check_processor,
    check_template,
    check_tokenizer,
    one_line,
)

FEEDBACK_FILE = "latent_feedback.safetensors"
POOLING_FILE = "latent_pooling.safetensors"


class Pretrained(nn.Module):
    """The part of `LatentVLM` that loads and saves; the class itself takes (model, tokenizer, processor, config)."""

    model: Any
    tokenizer: Any
    image_processor: Any
    config: LatentConfig
    feedback: Feedback
    pooling: nn.Module

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        attn: str | None = None,
        **latent: Any,
    ) -> Self:
        """Load a checkpoint with latent tokens, Mirage's own or the reference implementation's.

        Args:
            path: a folder, a name on the Hugging Face hub, or `bundled` and its kin.
            device: where to put it; the CPU by default.
            dtype: `auto` keeps the checkpoint's.
            attn: attention implementation of transformers (`eager`, `sdpa`, `flash_attention_2`).
            latent: fields of `LatentConfig` to use instead of the checkpoint's, `max_pixels` for one.

        Raises:
            MirageError: there is no such checkpoint, it has no latent tokens, its parts do not fit together, weights
                are not numbers, or an option is unknown.
        """
        _check_options(latent)
        home = None if device is None else choose_device(device)
        hf_config = read_config(path)
        saved = LatentConfig.read(hf_config, str(path))
        config = replace(saved, **latent)
        model, tokenizer, image_processor = _load_parts(path, hf_config, dtype, attn)
        for token, token_id in zip(LATENT_TOKENS, (config.start_id, config.pad_id, config.end_id), strict=True):
            found = tokenizer.convert_tokens_to_ids(token)
            if found is None or found == tokenizer.unk_token_id:
                raise MirageError(f"{path}: config.json says {token} is {token_id}, the tokenizer does not know it")
            if found != token_id:
                raise MirageError(f"{path}: config.json says {token} is {token_id}, the tokenizer says {found}")
        given: dict[str, Any] = dict.fromkeys(name for name in LIMITS if name in latent)
        check_agreement(image_processor, replace(saved, **given), str(path))
        vlm = cls(model, tokenizer, image_processor, config)
        kept = same_weights(config.feedback, saved.feedback)
        if kept and hasattr(vlm.feedback, "table") and config.codes != saved.codes:
            raise MirageError(f"{path}: its table has {saved.codes} codes and cannot be made one of {config.codes}")
        if config.pooling == saved.pooling in LEARNT and config.latent_size != saved.latent_size:
            raise MirageError(
                f"{path}: its {saved.pooling} gives {saved.latent_size} latents and cannot be made to give "
                f"{config.latent_size}"
            )
        if kept:
            _load_part(vlm.feedback, path, FEEDBACK_FILE, f"feedback {config.feedback!r}")
        if config.pooling == saved.pooling:
            _load_part(vlm.pooling, path, POOLING_FILE, f"pooling {config.pooling!r}")
        return vlm.eval() if home is None else vlm.to(home).eval()

    @classmethod
    def from_base(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        attn: str | None = None,
        **latent: Any,
    ) -> Self:
        """Load an ordinary VLM and give it the three latent tokens.

        Args:
            path: a folder, a name on the Hugging Face hub, or `bundled-base`.
            latent: fields of `LatentConfig` (`latent_size`, `pooling`, `feedback`, `stop_rule`, `image_scale`,
                `min_pixels`, `max_pixels`).

        Raises:
            MirageError: there is no such checkpoint, its parts do not fit together, weights are not numbers, or an
                option is unknown.
        """
        _check_options(latent)
        home = None if device is None else choose_device(device)
        vlm = cls.with_latents(*_load_parts(path, read_config(path), dtype, attn), **latent)
        return vlm.eval() if home is None else vlm.to(home).eval()

    @classmethod
    def with_latents(cls, model: Any, tokenizer: Any, image_processor: Any, **latent: Any) -> Self:
        """Add the latent tokens by name, growing the embeddings only where they are too small.

        The new rows start as the mean of the table, in the input embeddings and in the LM head.
        """
        known = len(tokenizer)
        tokenizer.add_special_tokens(
            {"additional_special_tokens": list(LATENT_TOKENS)}, replace_extra_special_tokens=False
        )
        start_id, pad_id, end_id = tokenizer.convert_tokens_to_ids(list(LATENT_TOKENS))
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for table in {id(w): w for w in (model.get_input_embeddings().weight, model.lm_head.weight)}.values():
                table[[start_id, pad_id, end_id]] = table[:known].mean(dim=0)
        latent.setdefault("latent_size", 4)
        config = LatentConfig(start_id=start_id, pad_id=pad_id, end_id=end_id, **latent)
        return cls(model, tokenizer, image_processor, config)

    def save_pretrained(self, path: str | Path) -> None:
        """Write a checkpoint that `from_pretrained` and plain transformers load.

        It is written into a temporary folder beside `path` and then put in place; a checkpoint that is there
        already is replaced only when the new one is complete.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            self.write_files(scratch)
            scratch.chmod(0o755)
            if target.exists():
                old = scratch.with_name(scratch.name + "-old")
                target.rename(old)
                scratch.rename(target)
                shutil.rmtree(old)
            else:
                scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def write_files(self, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write model, tokenizer, image processor and feedback into an existing folder.

        Args:
            state: the weights under the names of `state_dict()`, where the model itself holds only a share of them.
        """
        if state is None:
            state = self.state_dict()
        model, *parts = (
            {name.removeprefix(part): tensor for name, tensor in state.items() if name.startswith(part)}
            for part in ("model.", "feedback.", "pooling.")
        )
        self.config.write(self.model.config)
        self.model.save_pretrained(folder, state_dict=model)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        for weights, file in zip(parts, (FEEDBACK_FILE, POOLING_FILE), strict=True):
            if weights:
                (folder / file).write_bytes(save({name: tensor.contiguous() for name, tensor in weights.items()}))


def _check_options(latent: Mapping[str, Any]) -> None:
    """Whether every option is a field of `LatentConfig`."""
    known = [field.name for field in fields(LatentConfig)]
    if unknown := next((name for name in latent if name not in known), None):
        raise MirageError(f"unknown option {unknown!r}; known: {', '.join(known)}")


def _load_part(part: nn.Module, path: str | Path, file: str, what: str) -> None:
    """Read the weights of a part beside the model, if it has any."""
    if not part.state_dict():
        return
    weights = Path(located(path)) / file
    if not weights.exists():
        raise MirageError(f"{path}: {what} has weights, but {file} is missing")
    try:
        found = load_file(weights)
        part.load_state_dict(found)
    except Exception as fault:  # safetensors raises one kind at damaged files, torch others at other names and shapes
        reason = " ".join(str(fault).split())
        raise MirageError(f"{path}: {what} cannot be read from {file}: {reason}") from fault
    check_finite(found.items(), f"{path}: {file}")


def has_latents(path: str | Path) -> bool:
    """Whether the checkpoint's `config.json` knows latent tokens.

    Raises:
        MirageError: there is no checkpoint.
    """
    return hasattr(read_config(path), "latent_token_id")


def read_config(path: str | Path) -> Any:
    place = located(path)
    try:
        return AutoConfig.from_pretrained(place)
    except Exception as fault:  # a damaged config.json makes transformers raise all kinds
        if Path(place).exists():
            raise MirageError(f"{path}: its config.json cannot be used: {one_line(fault)}") from fault
        raise MirageError(f"{path}: no such folder, and the hub gives no such model: {one_line(fault)}") from fault


def _load_parts(path: str | Path, config: Any, dtype: str | torch.dtype, attn: str | None) -> tuple[Any, Any, Any]:
    place, family, kind = located(path), family_of(config), _dtype(dtype)
    try:
        with _without_report():
            model, loading = AutoModelForImageTextToText.from_pretrained(
                place,
                config=config,
                dtype=kind,
                attn_implementation=attn,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # which are refused below, by name
            )
    except Exception as fault:  # of whatever kind: a file is damaged, or config.json asks for what cannot be
        raise MirageError(f"{path}: the checkpoint cannot be loaded: {one_line(fault)}") from fault
    check_loading(loading, str(path))
    check_model(model, str(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except Exception as fault:  # as above
        raise MirageError(f"{path}: the tokenizer cannot be loaded: {one_line(fault)}") from fault
    try:
        # PIL on purpose: torchvision is not needed
        image_processor = AutoImageProcessor.from_pretrained(place, backend="pil")
    except Exception as fault:  # as above
        raise MirageError(f"{path}: the image processor cannot be loaded: {one_line(fault)}") from fault
    check_tokenizer(tokenizer, model, family, str(path))
    check_processor(image_processor, config, str(path))
    check_template(tokenizer, family, str(path))
    return model, tokenizer, image_processor


@contextmanager
def _without_report() -> Iterator[None]:
    """Without the table in which transformers warns of weights that do not fit: they are refused in one line."""
    before = logging.get_verbosity()
    if before == logging.WARNING:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A type that weights can have.

    Raises:
        MirageError: it is none.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if found == "auto" or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise MirageError(f"dtype must be auto, float32, bfloat16 or float16, not {dtype!r}")
