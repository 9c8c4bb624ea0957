"""Examples out of real benchmarks and of any data set whose columns a small YAML names.

`load_preset("blink", …)` reads a benchmark that is known, `load(read_mapping("mine.yaml"), …)` anything else. Both
yield trajectories with gold responses, of the task `choice` or, where a plan is asked for, of the maze or blocks task.
"""

from mirage_vlm.sources.examples import load
from mirage_vlm.sources.known import load_preset, preset_names
from mirage_vlm.sources.mapping import Answer, Choices, Mapping, read_mapping

__all__ = ["Answer", "Choices", "Mapping", "load", "load_preset", "preset_names", "read_mapping"]
