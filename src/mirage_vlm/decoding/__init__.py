"""Floor 3: the native decoder."""

from mirage_vlm.decoding.generate import GenerationConfig, generate

__all__ = ["GenerationConfig", "generate"]
