"""What of a set of examples cannot be evaluated, told before anything is decoded."""

from pathlib import Path

from mirage_vlm.evaluation.refusals import count_untold, refusals, told
from mirage_vlm.formats import read_jsonl

CASES = Path(__file__).parent.parent / "data" / "cases"


def test_the_case_of_checked_then_refused(tiny):
    """A response is not decoded, so what is wrong with it does not count here."""
    examples = read_jsonl(CASES / "checked-then-refused.jsonl")
    refused = refusals(examples, tiny.encoder)
    assert {i: [fault.field for fault in faults] for i, faults in refused.items()} == {
        2: ["messages[1].content[0]"],
        3: ["messages[0].content[0].image"],
        5: ["meta.choices"],
    }
    assert list(refusals(examples)) == [5]
    lines = list(told(examples, refused).lines())
    assert len(lines) == 3 and lines[0].startswith(f"{examples[2].where}: messages[1].content[0]: ")
    assert count_untold(examples) == 5
