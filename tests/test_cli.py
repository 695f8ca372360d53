"""The `draftsmith` command: what it answers, with which exit code, and how fast. No verb is run: fakes are planted."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from draftsmith.inference import cli
from draftsmith.inference.commands._args import parser
from draftsmith.inference.errors import InvalidValue

Planter = Callable[[str, cli.Main], None]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Planter:
    """Makes a verb load the given function, in place of its entry point."""

    def planter(verb: str, main: cli.Main) -> None:
        real = cli.load_verb
        monkeypatch.setattr(cli, "load_verb", lambda name: main if name == verb else real(name))

    return planter


def draftsmith(*args: str, **kwargs: object) -> "subprocess.CompletedProcess[str]":
    """The installed console script, as a user starts it."""
    script = shutil.which("draftsmith", path=str(Path(sys.executable).parent))
    assert script, "the console script is not installed beside this Python"
    return subprocess.run([script, *args], capture_output=True, text=True, timeout=60, **kwargs)  # type: ignore[call-overload]


def raiser(error: BaseException) -> cli.Main:
    def main(argv: list[str]) -> int:
        raise error

    return main


# --- the help page ---


def test_help_lists_every_verb_in_its_group_and_answers_within_a_second() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = draftsmith("--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
        assert done.stderr == ""
    assert min(seconds) < 1.0, seconds
    for heading, verbs in cli.VERBS.items():
        block = done.stdout.partition(f"\n{heading}:\n")[2].partition("\n\n")[0].splitlines()
        assert [line.split()[0] for line in block] == list(verbs)
        assert all(line.endswith(text) for line, text in zip(block, verbs.values(), strict=True))


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from draftsmith.inference.cli import main; main(['--help']); "
        "print(sorted({'torch', 'transformers', 'numpy', 'lightning'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "[]"


def test_every_verb_of_the_table_is_an_entry_point_and_the_other_way_round() -> None:
    registered = importlib.metadata.entry_points(group=cli.GROUP).names
    assert {verb for verbs in cli.VERBS.values() for verb in verbs} == set(registered)


def test_no_command_prints_the_help_on_stderr_and_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: draftsmith")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"draftsmith {importlib.metadata.version('draftsmith')}\n"


def test_a_verb_of_another_package_is_listed_and_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{cli.GROUP}]\nwhittle = plugin_of_test:main\n")
    (tmp_path / "plugin_of_test.py").write_text("def main(argv):\n    return len(argv)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "From other packages:\n  whittle\n" in cli.help_page()
    assert cli.main(["whittle", "a", "b", "c"]) == 3


# --- errors: one line, the exit code ---


@pytest.mark.parametrize(("typed", "nearest"), [("dcode", "decode"), ("fitt", "fit"), ("valdate", "validate")])
def test_unknown_verb_names_the_choices_and_the_nearest(
    typed: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([typed]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: unknown command {typed!r}: choose one of bench, calibrate, convert, decode, ")
    assert err.endswith(f"did you mean {nearest!r}?\n") and err.count("\n") == 1


def test_unknown_verb_from_the_shell_has_no_traceback() -> None:
    done = draftsmith("no-such-thing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown command 'no-such-thing'") and done.stderr.count("\n") == 1


def test_a_known_verb_that_is_not_registered_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "GROUP", "draftsmith.no-such-group")
    assert cli.main(["decode"]) == 2
    assert "'draftsmith decode' is not registered in this installation" in capsys.readouterr().err


def test_user_error_is_one_line_even_if_its_message_is_not(plant: Planter, capsys: pytest.CaptureFixture[str]) -> None:
    plant("show", raiser(InvalidValue("batch 0:\n  allowed are 1 to 64;\n  pass --batch 1")))
    assert cli.main(["show"]) == 2
    assert capsys.readouterr().err == "error: batch 0: allowed are 1 to 64; pass --batch 1\n"


@pytest.mark.parametrize("argv", [["--debug", "show"], ["show", "--debug"], ["show", "x", "--debug", "--json"]])
def test_debug_anywhere_adds_the_traceback(argv: list[str], plant: Planter, capsys: pytest.CaptureFixture[str]) -> None:
    plant("show", raiser(InvalidValue("batch 0")))
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err and err.endswith("\nerror: batch 0\n")
    assert "bug in draftsmith" not in err


def test_debug_is_taken_out_before_the_verb_sees_it_but_not_after_a_lone_double_dash(plant: Planter) -> None:
    seen: list[list[str]] = []

    def main(argv: list[str]) -> int:
        seen.append(argv)
        return 0

    plant("show", main)
    assert cli.main(["show", "a", "--debug", "b"]) == 0
    assert cli.main(["show", "--", "--debug"]) == 0
    assert seen == [["a", "b"], ["--", "--debug"]]


@pytest.mark.parametrize(
    ("module", "extra", "title"), [("lightning", "train", "training"), ("deepspeed", "deepspeed", "DeepSpeed")]
)
def test_a_missing_extra_is_named_with_its_install_line(
    module: str, extra: str, title: str, plant: Planter, capsys: pytest.CaptureFixture[str]
) -> None:
    error = ModuleNotFoundError(f"No module named '{module}.pytorch'", name=f"{module}.pytorch")
    plant("fit", raiser(error))
    assert cli.main(["fit", "-c", "x.yaml"]) == 2
    expected = f"error: 'draftsmith fit' needs the {title} extra: pip install 'draftsmith[{extra}]'\n"
    assert capsys.readouterr().err == expected


def test_any_other_missing_module_is_a_bug(plant: Planter) -> None:
    plant("fit", raiser(ModuleNotFoundError("No module named 'draftsmith.nowhere'", name="draftsmith.nowhere")))
    with pytest.raises(ModuleNotFoundError) as caught:
        cli.main(["fit"])
    assert "please report it" in caught.value.__notes__[0]


def test_an_unexpected_error_keeps_its_traceback_and_asks_to_report_it() -> None:
    code = (
        "import sys; from draftsmith.inference import cli\n"
        "def main(argv): raise ZeroDivisionError('by zero')\n"
        "sys.exit(cli.run_main(main, [], 'draftsmith show'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "This is a bug in draftsmith: please report it" in done.stderr.splitlines()[-1]


def test_interrupt_is_130(plant: Planter, capsys: pytest.CaptureFixture[str]) -> None:
    plant("fit", raiser(KeyboardInterrupt()))
    assert cli.main(["fit"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_warning_of_ours_is_one_line_and_others_show_as_always() -> None:
    code = (
        "import sys, warnings; from draftsmith.inference import cli\n"
        "class Ours(UserWarning): __module__ = 'draftsmith.inference.planted'\n"
        "def main(argv):\n"
        "    warnings.warn('two\\nlines', Ours)\n"
        "    warnings.warn('theirs', UserWarning)\n"
        "sys.exit(cli.run_main(main, [], 'draftsmith show'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stderr.splitlines()[:2] == ["warning: two lines", "<string>:5: UserWarning: theirs"]


@pytest.mark.parametrize(("code", "exit_code"), [(None, 0), (0, 0), (2, 2), ("text", 1)])
def test_system_exit_becomes_a_return_value(code: int | str | None, exit_code: int, plant: Planter) -> None:
    plant("show", raiser(SystemExit(code)))
    assert cli.main(["show"]) == exit_code


def test_a_reader_that_leaves_is_no_error() -> None:
    code = (
        "import sys; from draftsmith.inference import cli\n"
        "def main(argv):\n"
        "    for _ in range(100_000): print('a line')\n"
        "sys.exit(cli.run_main(main, [], 'draftsmith show'))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    assert process.stdout.readline() == "a line\n"
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


def test_another_broken_pipe_is_not_hidden(plant: Planter) -> None:
    plant("fit", raiser(BrokenPipeError("a worker died")))
    with pytest.raises(BrokenPipeError, match="a worker died"):
        cli.main(["fit"])


def test_python_dash_m_behaves_like_the_script() -> None:
    command = [sys.executable, "-m", "draftsmith.inference.cli", "dcode"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "NO_COLOR": "1"})
    script = draftsmith("dcode")
    assert (done.returncode, done.stdout, done.stderr) == (script.returncode, script.stdout, script.stderr)


def test_the_extra_of_a_module_is_known_for_every_requirement_of_the_extras() -> None:
    """A requirement that joins an extra in pyproject must join the table, or its absence would look like a bug."""
    requires = importlib.metadata.requires("draftsmith") or []
    import_names = {"scikit-learn": "sklearn", "mauve-text": "mauve"}
    for extra, modules in cli.EXTRA_MODULES.items():
        declared = {
            line.split(";")[0].split(">")[0].split("[")[0].strip()
            for line in requires
            if line.replace("'", '"').endswith(f'extra == "{extra}"')
        }
        assert declared, f"the extra {extra} is not declared"
        assert {import_names.get(name, name) for name in declared} == modules


# --- the parser that the commands share ---


def test_the_help_of_a_command_shows_its_example(capsys: pytest.CaptureFixture[str]) -> None:
    made = parser("show", "Describe an export.", "draftsmith show runs/demo/exports/draft")

    def main(argv: list[str]) -> int:
        made.parse_args(argv)
        return 0

    assert cli.run_main(main, ["--help"], made.prog) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: draftsmith show") and "Describe an export." in out
    assert "Example:\n  draftsmith show runs/demo/exports/draft\n" in out
    assert "--debug" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x", "--promts", "f"], "unknown argument '--promts'; did you mean --prompts?"),
        (["x", "--promts=f"], "unknown argument '--promts'; did you mean --prompts?"),
        (["x", "--zzz"], "unknown argument '--zzz'"),
        (["x", "--batch", "many"], "argument --batch: invalid int value: 'many'"),
        (["x", "--batch"], "argument --batch: expected one argument"),
        ([], "the following arguments are required: target"),
        (["x", "--prom", "f"], "unknown argument '--prom'; did you mean --prompts?"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = parser("bench", "Time decoders.", "draftsmith bench TARGET")
    made.add_argument("target")
    made.add_argument("--prompts")
    made.add_argument("--batch", type=int)

    def main(argv: list[str]) -> int:
        made.parse_args(argv)
        return 0

    assert cli.run_main(main, argv, made.prog) == 2
    assert capsys.readouterr().err == f"error: {message}; see 'draftsmith bench --help'\n"
