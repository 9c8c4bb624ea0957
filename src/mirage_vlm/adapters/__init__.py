"""Floor 4: what lets evaluation harnesses run a `LatentVLM`; a harness is imported by its own module alone."""

from __future__ import annotations

from typing import Any


def lmms_eval_manifest() -> Any:
    """What lmms-eval's entry point group `lmms_eval.models` asks for: the model's name and where its class is.

    It is called as lmms-eval starts, for every model, so neither torch nor the adapter is imported here.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mirage_vlm", chat_class_path="mirage_vlm.adapters.lmms_eval.MirageVLM")
