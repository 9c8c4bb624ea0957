"""Data files: trajectories as JSONL (chat or reference form) and as Hugging Face datasets.

`read_data` reads whatever lies at a path; `write_jsonl`, `write_reference` and `save_dataset_dir` write it
whole or not at all; `scan` yields every fault of a file, line by line.
"""

from mirage_vlm.formats.chat import to_record
from mirage_vlm.formats.faults import Fault, Faults
from mirage_vlm.formats.hf import from_dataset, load_dataset_dir, save_dataset_dir, to_dataset
from mirage_vlm.formats.jsonl import read_jsonl, write_jsonl, write_reference
from mirage_vlm.formats.latent_marks import latent_marks, marks_note
from mirage_vlm.formats.pictures import ImageFolder, ImageSource, as_given, embed, seen_from
from mirage_vlm.formats.records import detect_format, faults, from_record
from mirage_vlm.formats.scanning import Scanned, read_data, scan
from mirage_vlm.formats.writing import atomic_writer

__all__ = [
    "Fault",
    "Faults",
    "ImageFolder",
    "ImageSource",
    "Scanned",
    "as_given",
    "atomic_writer",
    "detect_format",
    "embed",
    "faults",
    "from_dataset",
    "from_record",
    "latent_marks",
    "load_dataset_dir",
    "marks_note",
    "read_data",
    "read_jsonl",
    "save_dataset_dir",
    "scan",
    "seen_from",
    "to_dataset",
    "to_record",
    "write_jsonl",
    "write_reference",
]
