"""Model families: the little that differs between the composite VLMs of transformers.

They share one shape: `model.model` with `visual`, `language_model` and `get_image_features`, and `lm_head`.
A family says the rest: how many tokens a picture takes, which positions the tokens have. It holds no weights, so
that it travels to collation workers.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.windows import side_by_side


class QwenVL:
    """Qwen2.5-VL (and Qwen2-VL): merged patches, three-dimensional rotary positions."""

    model_types = ("qwen2_5_vl", "qwen2_vl")

    def __init__(self, config: Any):
        self.image_token_id: int = config.image_token_id
        marks = (getattr(config, f"{name}_token_id", None) for name in ("image", "video", "vision_start", "vision_end"))
        self.mark_ids: tuple[int, ...] = tuple(mark for mark in marks if mark is not None)  # of pictures and videos
        self.max_positions: int = config.text_config.max_position_embeddings
        self.merge: int = config.vision_config.spatial_merge_size

    def vision_tower(self, model: Any) -> nn.Module:
        return model.model.visual

    def language_model(self, model: Any) -> nn.Module:
        return model.model.language_model

    def tied(self, model: Any) -> bool:
        """Whether the input embeddings are the LM head too; the weights know, since configs say it at either level."""
        return model.get_input_embeddings().weight is model.lm_head.weight

    def merged_grid(self, grid_thw: torch.Tensor) -> tuple[int, int]:
        """(h, w) of the tokens of one picture, from the image processor's patch grid [3]."""
        _, height, width = grid_thw.tolist()
        return height // self.merge, width // self.merge

    def image_features(self, model: Any, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> list[torch.Tensor]:
        """Features of each picture, [n_i, D] in raster order.

        Args:
            pixel_values: [patches of all pictures, C · t · p · p].
            grid_thw: [pictures, 3].
        """
        tower = model.model.visual
        checkpointed = any(getattr(block, "gradient_checkpointing", False) for block in tower.blocks)
        # a checkpointed layer is run again in backward, and must then find what it found before
        again = torch.is_grad_enabled() and tower.training and checkpointed
        with nullcontext() if again else side_by_side(tower.config):
            return list(model.model.get_image_features(pixel_values, grid_thw, return_dict=True).pooler_output)

    def positions(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, grid_thw: torch.Tensor | None
    ) -> torch.Tensor:
        """[3, B, T] rotary positions of right-padded rows; latent tokens count as text."""
        kinds = (input_ids == self.image_token_id).int()
        positions, _ = model.model.get_rope_index(
            input_ids, mm_token_type_ids=kinds, image_grid_thw=grid_thw, attention_mask=attention_mask
        )
        return positions


FAMILIES = (QwenVL,)


def family_of(config: Any) -> QwenVL:
    """The adapter for a transformers config.

    Raises:
        MirageError: no adapter knows its `model_type`.
    """
    model_type = config.model_type
    for family in FAMILIES:
        if model_type in family.model_types:
            return family(config)
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise MirageError(f"no adapter for model type {model_type!r}; known: {known}")
