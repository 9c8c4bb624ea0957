"""Floor 3: the native engine."""

from mirage_vlm.decoding.config import EngineConfig, GenerationConfig
from mirage_vlm.decoding.engine import Engine
from mirage_vlm.decoding.generate import generate, stream
from mirage_vlm.decoding.response import Event, Finished, LatentConsumed, SpanClosed, SpanOpened, TextPiece

__all__ = [
    "Engine",
    "EngineConfig",
    "Event",
    "Finished",
    "GenerationConfig",
    "LatentConsumed",
    "SpanClosed",
    "SpanOpened",
    "TextPiece",
    "generate",
    "stream",
]
