"""What decoding leaves on a trajectory, in records: token ids, how they were chosen, and the latents of spans."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mirage_vlm.formats.faults import Fault, shown
from mirage_vlm.trajectory import Decoding

if TYPE_CHECKING:
    import torch

FINISH_REASONS = ("stop", "length", "cancelled", "error")
NEVER = "-inf"  # log-probability of a replayed token that could not be, for which JSON has no number


def decoding_record(decoding: Decoding) -> dict[str, Any]:
    """As JSON can hold it; keys with nothing to say are left out."""
    record: dict[str, Any] = {"token_ids": list(decoding.token_ids), "finish_reason": decoding.finish_reason}
    if decoding.logprobs is not None:
        record["logprobs"] = [NEVER if chance == -math.inf else chance for chance in decoding.logprobs]
    if decoding.stop_id is not None:
        record["stop_id"] = decoding.stop_id
    return record


def read_decoding(record: Mapping[str, Any]) -> Decoding:
    """The decoding of a record in which `decoding_faults` finds no fault."""
    chances = record.get("logprobs")
    if chances is not None:
        chances = tuple(None if chance is None else float(chance) for chance in chances)
    return Decoding(tuple(record["token_ids"]), record["finish_reason"], chances, record.get("stop_id"))


def decoding_faults(decoding: Any) -> Iterator[Fault]:
    """Every fault of what a record has under `decoding`."""
    if not isinstance(decoding, Mapping):
        yield Fault("decoding", f"must be an object, not {shown(decoding)}")
        return
    ids, reason, chances, stop = (decoding.get(key) for key in ("token_ids", "finish_reason", "logprobs", "stop_id"))
    known = ids if isinstance(ids, list) and all(map(_is_id, ids)) else None
    if known is None:
        yield Fault("decoding.token_ids", f"must be a list of token ids, not {shown(ids)}")
    if not isinstance(reason, str) or reason not in FINISH_REASONS:
        yield Fault("decoding.finish_reason", f"must be one of {', '.join(FINISH_REASONS)}, not {shown(reason)}")
    elif stop is not None and reason != "stop":
        yield Fault("decoding.stop_id", f"is of a response that ended by itself, but finish_reason is {shown(reason)}")
    if stop is not None and not _is_id(stop):
        yield Fault("decoding.stop_id", f"must be a token id, not {shown(stop)}")
    if chances is None:
        return
    if not isinstance(chances, list):
        yield Fault("decoding.logprobs", f"must be a list of numbers, not {shown(chances)}")
        return
    for place, chance in enumerate(chances):
        if not _is_chance(chance):
            yield Fault(
                f"decoding.logprobs[{place}]", f'must be a number up to 0, "{NEVER}" or null, not {shown(chance)}'
            )
            return
    if known is not None and (expected := len(known) + (reason == "stop")) != len(chances):
        more = " and the end of turn" if reason == "stop" else ""
        problem = f"must have {expected} entries, one for each token{more}, not {len(chances)}"
        yield Fault("decoding.logprobs", problem)


def _is_id(token: Any) -> bool:
    return type(token) is int and 0 <= token < 1 << 63


def _is_chance(chance: Any) -> bool:
    return chance is None or chance == NEVER or (type(chance) in (int, float) and chance <= 0)


def pack(latents: torch.Tensor) -> dict[str, Any]:
    """[k, D] latents as JSON can hold them: in float32, which has every number of the half precisions too."""
    array = latents.detach().float().cpu().numpy().astype("<f4")  # [k, D]
    data = base64.b64encode(array.tobytes()).decode()
    return {"shape": list(array.shape), "dtype": "float32", "data": data}


def unpack(packed: Mapping[str, Any]) -> torch.Tensor:
    """The latents [k, D] that were packed."""
    import numpy as np
    import torch

    array = np.frombuffer(base64.b64decode(packed["data"]), dtype="<f4").astype(np.float32)
    return torch.from_numpy(array.reshape(packed["shape"]))  # [k, D]


def latents_fault(packed: Any) -> str | None:
    """What is wrong with packed latents; None where nothing is."""
    if not isinstance(packed, Mapping):
        return f"must be an object with `shape`, `dtype` and `data`, not {shown(packed)}"
    shape, dtype, data = packed.get("shape"), packed.get("dtype"), packed.get("data")
    sizes = shape if isinstance(shape, list) else []
    if len(sizes) != 2 or not all(type(size) is int and size >= 0 for size in sizes):
        return f"must have the shape [k, width], not {shown(shape)}"
    if dtype != "float32":
        return f"must have the dtype 'float32', not {shown(dtype)}"
    try:
        size = len(base64.b64decode(data if isinstance(data, str) else "?", validate=True))
    except ValueError:
        return "must hold base64 under `data`"
    expected = 4 * sizes[0] * sizes[1]
    return None if size == expected else f"must hold {expected} bytes for the shape {shape}, not {size}"
