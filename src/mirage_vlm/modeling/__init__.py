"""Floor 2: the model, the compression, the feedback, checkpoints."""

from mirage_vlm.modeling.config import LatentConfig
from mirage_vlm.modeling.latent_vlm import LatentVLM

__all__ = ["LatentConfig", "LatentVLM"]
