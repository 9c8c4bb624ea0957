"""What a step has to read, and what training has to compute, counted another way."""

from __future__ import annotations

import pytest
import torch
from support import batch_of, ragged
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from mirage_vlm.benchmarks import bounds
from mirage_vlm.benchmarks.bounds import Memory, Reading, datasheet, matmul, training_flops
from mirage_vlm.benchmarks.shapes import shaped
from mirage_vlm.modeling.decoder import run_decoder
from mirage_vlm.modeling.encoding import IGNORED
from mirage_vlm.training.losses import stage1


def test_bytes_of_a_step(tiny):
    cache = DynamicCache(config=tiny.language_model.config)
    ids = torch.zeros(1, 10, dtype=torch.long)
    positions = torch.arange(10).expand(3, 1, -1)
    run_decoder(tiny.language_model, tiny.embed(ids), positions, past=cache)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    weights = sum(
        p.numel() * 4
        for name, p in tiny.model.named_parameters()
        if "visual" not in name and "embed_tokens" not in name
    )
    assert Reading.of(tiny).step(10) == weights + held
    assert Reading.of(tiny).step(0) == weights


def test_a_tied_head_is_read_though_the_embeddings_are_not():
    vlm = shaped("tiny", torch.device("cpu"), torch.bfloat16)
    layers = sum(p.numel() for name, p in vlm.model.named_parameters() if "visual" not in name)
    assert vlm.model.lm_head.weight is vlm.model.get_input_embeddings().weight
    assert Reading.of(vlm).weights == 2 * layers


def test_operations_of_a_training_pass(tiny, fresh):
    """Against torch's own count; it counts attention over the whole square, and the vision tower's too."""
    fresh.vision_tower.requires_grad_(False)
    batch = batch_of(fresh, ragged())
    with FlopCounterMode(display=False) as counter:
        loss = stage1(fresh, batch)
        (loss.ce_sum + loss.align_sum).backward()
    lengths = [batch.input_ids.shape[1]] * len(batch.input_ids)  # padding is computed too
    patches = len(batch.pixel_values) + len(batch.helper_pixel_values)
    labelled = int((batch.labels[:, 1:] != IGNORED).sum())
    assert training_flops(fresh, lengths, labelled, patches) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_speeds_are_measured():
    cpu = torch.device("cpu")
    memory = Memory(cpu, size=1 << 20)
    assert float(memory()) == memory.size / 4, "every number is read"
    assert matmul(cpu, torch.float32, side=64) > 0
    assert datasheet(cpu) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("Other", None)],
)
def test_the_data_sheets(monkeypatch, name, peak):
    monkeypatch.setattr(bounds.torch.cuda, "get_device_name", lambda device: name)
    assert datasheet(torch.device("cuda")) == peak
