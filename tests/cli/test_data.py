"""The commands of `mirage data`, run as the command line runs them."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

from mirage_vlm import __version__, formats
from mirage_vlm.cli.main import run
from mirage_vlm.errors import MirageError
from mirage_vlm.trajectory import Image, Trajectory, user_turn


@pytest.fixture
def mirage(capsys):
    """Runs a command line; gives its exit status, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run([str(argument) for argument in arguments])
        status = 0 if exit.value.code is None else exit.value.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, colour in (("map", "red"), ("helper", "green")):
        PIL.Image.new("RGB", (4, 4), colour).save(f"{name}.png")
    return tmp_path


def chat(**part: object) -> dict:
    question = [{"type": "image", "image": "map.png"}, {"type": "text", "text": "?"}]
    response = [{"type": "latent", "helper": "helper.png", **part}, {"type": "text", "text": "U"}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": response}]}


def reference(**changes: object) -> dict:
    return {
        "text_input": "?",
        "image_input": "map.png",
        "text_output": "U",
        "image_output": ["helper.png"],
        **changes,
    }


def records(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def write(name: str, *records: object) -> Path:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return Path(name)


class TestCommand:
    def test_version(self, mirage):
        assert mirage("--version") == (0, f"mirage {__version__}\n", "")

    def test_help_loads_nothing_heavy(self):
        heavy = "{'torch', 'transformers', 'datasets', 'gymnasium', 'pygame', 'numpy'}"
        script = (
            "import sys, atexit; from mirage_vlm.cli.main import run\n"
            f"atexit.register(lambda: print('loaded:', sorted({heavy} & set(sys.modules))))\n"
            "run(['data', '--help'])"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "check" in done.stdout
        assert "loaded: []" in done.stdout

    @pytest.mark.parametrize("arguments", [["nonsense"], ["data", "nonsense"], ["data", "check"], ["--nonsense"]])
    def test_wrong_usage_exits_with_2(self, mirage, arguments):
        status, _, error = mirage(*arguments)
        assert status == 2 and "Usage" in error and "Traceback" not in error

    def test_bad_input_is_one_line_on_stderr(self, mirage, folder):
        assert mirage("data", "check", "no.jsonl") == (2, "", "error: no.jsonl: no such file\n")

    def test_ctrl_c_exits_with_130(self, mirage, folder, monkeypatch):
        def interrupted(*arguments: object, **options: object):
            raise KeyboardInterrupt

        monkeypatch.setattr(formats, "scan", interrupted)
        status, _, error = mirage("data", "check", write("data.jsonl", chat()))
        assert status == 130 and "Traceback" not in error


class TestCheck:
    def test_no_faults(self, mirage, folder):
        path = write("data.jsonl", chat(), chat(k=2), {"messages": [{"role": "user", "content": "?"}]})
        assert mirage("data", "check", path) == (0, "3 examples, 2 latent spans, 2 pictures: no faults\n", "")

    def test_one_of_each(self, mirage, folder):
        status, output, _ = mirage("data", "check", write("data.jsonl", chat()))
        assert (status, output) == (0, "1 example, 1 latent span, 1 picture: no faults\n")

    def test_every_fault_of_every_line_is_named(self, mirage, folder):
        bad = chat(k=0)
        del bad["messages"][1]["content"][0]["helper"]
        path = write("data.jsonl", chat(), bad, chat(), chat(helper="no.png"), {})
        status, output, error = mirage("data", "check", path)
        lines = output.splitlines()
        assert (status, error) == (2, "")
        assert lines[0].startswith("data.jsonl:2: messages[1].content[0].helper: is missing")
        assert lines[1].startswith("data.jsonl:2: messages[1].content[0].k: must be a whole number")
        assert lines[2].startswith("data.jsonl:4: messages[1].content[0].helper: no such file: no.png")
        assert lines[3].startswith("data.jsonl:5: messages: is missing")
        assert lines[4:] == ["5 examples: 4 faults"]

    def test_lines_that_are_not_json_or_not_text(self, mirage, folder):
        Path("data.jsonl").write_bytes(
            b'{"messages": \n' + json.dumps(chat()).encode() + b'\n{"text": "\xe9"}\n\n[1]\n'
        )
        status, output, _ = mirage("data", "check", "data.jsonl")
        lines = output.splitlines()
        assert status == 2
        assert lines[0].startswith("data.jsonl:1: is not valid JSON: Expecting value at column 13")
        assert lines[1].startswith("data.jsonl:3: is not UTF-8 at byte 11")
        assert lines[2].startswith("data.jsonl:5: must be an object, not [1]")
        assert lines[3:] == ["4 examples: 3 faults"]

    @pytest.mark.parametrize("content", ["", "\n\n"])
    def test_empty_file(self, mirage, folder, content):
        Path("data.jsonl").write_text(content)
        assert mirage("data", "check", "data.jsonl") == (2, "", "error: data.jsonl: holds no examples\n")

    def test_reference_format(self, mirage, folder):
        path = write("data.jsonl", reference(), reference(image_output="helper.png", image_input=["map.png"] * 2))
        assert mirage("data", "check", path)[:2] == (0, "2 examples, 2 latent spans, 3 pictures: no faults\n")
        path = write("data.jsonl", reference(), reference(text_output="<image><image>", image_input="no.png"))
        status, output, _ = mirage("data", "check", path)
        lines = output.splitlines()
        assert status == 2 and lines[2:] == ["2 examples: 2 faults"]
        assert lines[0].startswith("data.jsonl:2: image_input: no such file")
        assert lines[1].startswith("data.jsonl:2: text_output: marks 2 latent spans")

    def test_dataset_folder(self, mirage, folder):
        formats.save_dataset_dir("set", formats.read_jsonl(write("data.jsonl", chat(), chat())))
        assert mirage("data", "check", "set")[:2] == (
            0,
            "2 examples, 2 latent spans, 2 pictures: no faults\n",
        )
        import datasets

        rows = [
            {"messages": [{"role": "user", "content": "?"}]},
            {"messages": [{"role": "cook", "content": "?"}]},
        ]
        datasets.Dataset.from_list(rows).save_to_disk("bad")
        status, output, _ = mirage("data", "check", "bad")
        assert status == 2 and output.startswith("bad[1]: messages[0].role: must be one of")
        (folder / "nothing").mkdir()
        status, output, error = mirage("data", "check", "nothing")
        assert (status, output) == (2, "") and error.startswith("error: nothing: holds no dataset")

    def test_plain_maps(self, mirage, folder):
        good = {"level": 3, "id": 0, "map": ["FGF", "FFF", "FSF"]}
        path = write("data.jsonl", good)
        assert mirage("data", "check", path)[:2] == (0, "1 example, 1 latent span, 1 picture: no faults\n")
        status, output, _ = mirage("data", "check", write("data.jsonl", good, {**good, "map": ["FGF", "FFF", "FFF"]}))
        assert status == 2 and output.startswith("data.jsonl:2: map:")

    def test_without_files_only_the_form_is_checked(self, mirage, folder):
        path = write("data.jsonl", chat(helper="no.png"))
        assert mirage("data", "check", path)[0] == 2
        assert mirage("data", "check", "--no-files", path)[0] == 0


class TestMake:
    def test_makes_what_check_accepts(self, mirage, folder):
        options = shlex.split("--levels 3,4 --n 4 --n-test 2 --style cot --cell 16 --out made")
        made = mirage("data", "make", "vsp-planning", *options)
        assert made[:2] == (0, "made: 4 training examples, 2 test examples\n")
        for name, count in (("train", 4), ("test", 2)):
            status, output, _ = mirage("data", "check", f"made/{name}.jsonl")
            assert (status, output.split(",")[0]) == (0, f"{count} examples")
        first, second, *_ = formats.read_jsonl("made/train.jsonl")
        assert (first.meta["level"], second.meta["level"]) == (3, 4) and first.meta["style"] == "cot"
        assert next(first.images()).load().size == (48, 48)

    def test_the_seed_decides(self, mirage, folder):
        command = shlex.split("data make vsp-reasoning --levels 3 --n 3 --n-test 0 --cell 16")
        for name, seed in (("one", 7), ("again", 7), ("other", 8)):
            assert mirage(*command, "--seed", seed, "--out", name)[0] == 0
        contents = {name: Path(name, "train.jsonl").read_bytes() for name in ("one", "again", "other")}
        assert contents["one"] == contents["again"] != contents["other"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["vsp-planning", "--levels", "three"],
                "--levels must be whole numbers with commas, such as 3,4,5,6; got 'three'",
            ),
            (["vsp-planning", "--levels", "1"], "levels"),
            (["chess"], "there is no task 'chess'"),
            (["vsp-planning", "--cell", "0"], "cell"),
        ],
    )
    def test_bad_arguments_leave_nothing(self, mirage, folder, arguments, message):
        before = sorted(folder.iterdir())
        status, output, error = mirage("data", "make", *arguments, "--out", "made")
        assert (status, output) == (2, "") and error.startswith("error: ") and message in error
        assert len(error.splitlines()) == 1 and sorted(folder.iterdir()) == before

    def test_a_style_that_is_none(self, mirage, folder):
        status, _, error = mirage("data", "make", "vsp-planning", "--style", "poem", "--out", "made")
        assert status == 2 and "poem" in error

    def test_a_folder_that_is_not_empty(self, mirage, folder):
        status, _, error = mirage("data", "make", "vsp-planning", "--n", 1, "--out", folder)
        assert status == 2 and "not an empty folder" in error


class TestConvert:
    def test_there_and_back(self, mirage, folder):
        write("a.jsonl", reference(), reference(text_output="x <output_image> y", map_desc=["SG"], answer="R"))
        for source, target, *options in (
            ("a.jsonl", "b.jsonl"),
            ("b.jsonl", "c"),
            ("c", "d.jsonl"),
            ("d.jsonl", "e.jsonl", "--to", "reference"),
        ):
            assert mirage("data", "convert", source, target, *options)[:2] == (0, f"{target}: 2 examples\n")
        expected, end = map(records, ("a.jsonl", "e.jsonl"))
        for record in end:
            assert record["image_input"].startswith("d-images/") and record["image_output"].startswith("d-images/")
            record |= {"image_input": "map.png", "image_output": ["helper.png"]}
        assert end == expected
        (start,) = {shown(formats.read_data(name)[0]) for name in ("a.jsonl", "b.jsonl", "c", "d.jsonl", "e.jsonl")}
        assert start == ((255, 0, 0), (0, 128, 0))

    def test_embedding_makes_one_file_that_stands_alone(self, mirage, folder):
        write("a.jsonl", chat())
        assert mirage("data", "convert", "--embed", "a.jsonl", "out/b.jsonl")[0] == 0
        for name in ("map.png", "helper.png"):
            Path(name).unlink()
        assert [path.name for path in Path("out").iterdir()] == ["b.jsonl"]
        assert shown(formats.read_jsonl("out/b.jsonl")[0]) == ((255, 0, 0), (0, 128, 0))

    def test_plain_maps_become_examples_with_pictures(self, mirage, folder):
        write("plain.jsonl", {"level": 3, "id": 0, "map": ["FGF", "FFF", "FSF"]})
        assert mirage("data", "convert", "plain.jsonl", "chat.jsonl")[0] == 0
        assert len(list(Path("chat-images").iterdir())) == 2
        assert mirage("data", "check", "chat.jsonl")[0] == 0

    def test_nothing_is_overwritten(self, mirage, folder):
        path = write("a.jsonl", chat())
        before = path.read_bytes()
        for target in ("a.jsonl", folder):
            status, _, error = mirage("data", "convert", path, target)
            assert status == 2 and error == f"error: {target}: exists already; remove it or name another\n"
        assert path.read_bytes() == before

    def test_what_does_not_fit_leaves_nothing(self, mirage, folder):
        write("a.jsonl", chat(), chat(k=3))
        before = sorted(folder.iterdir())
        status, _, error = mirage("data", "convert", "a.jsonl", "b.jsonl", "--to", "reference")
        assert status == 2 and error.startswith("error: example 2: the reference format has no place")
        status, _, error = mirage("data", "convert", "--embed", "a.jsonl", "b")
        assert status == 2 and "--embed is for chat JSONL" in error
        status, _, error = mirage("data", "convert", "no.jsonl", "b.jsonl")
        assert (status, error) == (2, "error: no.jsonl: no such file\n")
        assert sorted(folder.iterdir()) == before

    def test_a_faulty_source_is_refused(self, mirage, folder):
        write("a.jsonl", chat(), chat(k=0))
        status, _, error = mirage("data", "convert", "a.jsonl", "b")
        assert status == 2 and error.startswith("error: a.jsonl:2: messages[1].content[0].k:")
        assert error.endswith("run `mirage data check a.jsonl`\n") and not Path("b").exists()

    def test_moved_together_the_paths_still_hold(self, mirage, folder):
        trajectory = Trajectory((user_turn(Image(PIL.Image.new("RGB", (2, 2), "blue"))),))
        formats.save_dataset_dir("set", [trajectory])
        assert mirage("data", "convert", "set", "out/a.jsonl")[0] == 0
        shutil.move("out", "moved")
        (image,) = formats.read_jsonl("moved/a.jsonl")[0].images()
        assert image.load().getpixel((0, 0)) == (0, 0, 255)


def shown(trajectory: Trajectory) -> tuple:
    """The colours of the prompt's picture and the helper image."""
    return next(trajectory.images()).load().getpixel((0, 0)), trajectory.spans[0].helper.load().getpixel((0, 0))


CASES = Path(__file__).parent.parent / "data" / "cases"


class TestOneCheck:
    def test_what_encoder_and_scorer_refuse(self, mirage):
        status, output, _ = mirage("data", "check", CASES / "checked-then-refused.jsonl")
        lines = [line.removeprefix(f"{CASES / 'checked-then-refused.jsonl'}:") for line in output.splitlines()]
        assert status == 2
        assert [line.partition(": ")[0] for line in lines[:-1]] == ["2", "3", "4", "5", "6"]
        assert lines[4].startswith("6: meta.choices: must be an object of texts")
        assert lines[-1] == "6 examples: 5 faults"

    @pytest.mark.parametrize("name", ["reference-test.jsonl", "conversations.jsonl", "train.jsonl.gz"])
    def test_files_as_others_write_them(self, mirage, name):
        status, output, _ = mirage("data", "check", CASES / name)
        assert status == 0 and output.endswith(": no faults\n")

    def test_many_of_a_kind_are_one_line(self, mirage, folder):
        bad = reference()
        del bad["text_output"]
        path = write("data.jsonl", *[bad] * 400)
        line = "data.jsonl: text_output: is missing, in 400 lines, first 1"
        assert mirage("data", "check", path)[:2] == (2, f"{line}\n400 examples: 400 faults\n")
        with pytest.raises(MirageError) as error:
            formats.read_data(path)
        assert str(error.value) == f"{line}; run `mirage data check {path}`"

    def test_alike_but_not_the_same(self, mirage, folder):
        path = write("data.jsonl", chat(), *[chat(helper=f"no-{i}.png") for i in range(5)], chat(k=0))
        status, output, _ = mirage("data", "check", path)
        first, second, last = output.splitlines()
        assert status == 2 and last == "7 examples: 6 faults"
        assert first.startswith("data.jsonl: messages[1].content[0].helper: no such file: no-0.png")
        assert first.endswith("and the like in 5 lines, first 2")
        assert second.startswith("data.jsonl:7: messages[1].content[0].k: must be")

    def test_unlike_ones_are_counted_after_a_limit(self, mirage, folder):
        path = write("data.jsonl", *[chat(**{f"{'abcdefgh'[i % 8] * (i // 8 + 5)}": 1}) for i in range(80)])
        lines = mirage("data", "check", path)[1].splitlines()
        assert len(lines) == 52 and lines[-2:] == ["… and 30 more faults, of other kinds", "80 examples: 80 faults"]

    def test_a_task_for_rows_that_have_none(self, mirage, folder):
        path = write("data.jsonl", chat(), chat() | {"task": "choice", "answer": "U"})
        assert mirage("data", "check", path)[0] == 0
        status, output, _ = mirage("data", "check", path, "--task", "vsp-planning")
        assert status == 2 and "data.jsonl:1: meta.map: is missing" in output and "data.jsonl:2" not in output
        assert "there is no task 'x'" in mirage("data", "check", path, "--task", "x")[2]

    def test_unknown_tasks_and_missing_maps(self, mirage, folder):
        path = write("data.jsonl", chat() | {"task": "no-such"}, chat() | {"task": "vsp-planning", "meta": {"id": 1}})
        output = mirage("data", "check", path)[1]
        assert (
            "data.jsonl:1: task: there is no task 'no-such'" in output and "data.jsonl:2: meta.map: is miss" in output
        )

    def test_notes(self, mirage, folder):
        turns = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
        path = write("data.jsonl", chat() | {"answer": "U"}, {"messages": turns})
        status, output, _ = mirage("data", "check", path)
        assert status == 0 and "note: 1 example has an answer but no task" in output
        assert "note: 1 example has several assistant turns, of which only the last is trained on" in output

    def test_for_a_checkpoint_it_is_exact(self, mirage, folder):
        path = write("data.jsonl", chat(), {"messages": [{"role": "user", "content": "way " * 9000}]})
        assert mirage("data", "check", path)[0] == 0
        status, output, _ = mirage("data", "check", path, "--model", "bundled")
        assert status == 2 and "data.jsonl:2: messages: " in output and "context holds" in output


@pytest.mark.parametrize("damage", ["killed", "never finished"])
def test_making_clears_what_a_killed_run_left(mirage, folder, damage):
    (folder / ".maps.partial/images").mkdir(parents=True)
    (folder / ".maps.partial/train.jsonl").write_text("half")
    if damage == "killed":
        (folder / ".maps.lock").touch()
    assert mirage("data", "make", "vsp-planning", "--n", 2, "--n-test", 0, "--out", "maps")[0] == 0
    assert sorted(p.name for p in folder.iterdir()) == ["helper.png", "map.png", "maps"]


def test_two_at_once_do_not_collide(mirage, folder):
    from filelock import FileLock

    with FileLock(folder / ".maps.lock"):
        status, _, error = mirage("data", "make", "vsp-planning", "--n", 2, "--out", "maps")
    assert status == 2 and "another process is writing it right now" in error and not (folder / "maps").exists()
