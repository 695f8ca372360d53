"""Figures: recorded with what they measured, merged, rendered the same way twice, stale when sources change."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from draftsmith.inference import registry
from draftsmith.inference.environment import blob_hash
from draftsmith.inference.errors import InvalidValue
from draftsmith.trainers import results
from tests.figures import record


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with two source files and an empty docs folder."""
    (tmp_path / "inference").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "inference" / "one.py").write_text("x = 1\n")
    (tmp_path / "inference" / "two.py").write_text("y = 1\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "start"]):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *command], check=True)
    return tmp_path


def put(root: Path, figures: dict[str, object], files: tuple[str, ...] = ("inference/*.py",)) -> Path:
    return record("osd", figures, seeds=[0, 1], files=files, root=root, folder=root / "docs" / "figures")


def test_record_merges_and_replaces(repository: Path) -> None:
    put(repository, {"alpha_static": 0.34, "tau": 1.5})
    path = put(repository, {"tau": {"value": 2.0, "low": 1.9, "high": 2.1, "need": ">= 1.8"}})
    data = json.loads(path.read_text())
    assert data["system"] == "osd" and len(data["runs"]) == 1
    run = data["runs"][0]
    assert run["figures"] == {"alpha_static": 0.34, "tau": {"high": 2.1, "low": 1.9, "need": ">= 1.8", "value": 2.0}}
    assert run["seeds"] == [0, 1] and run["dirty"] is False and len(run["commit"]) == 40
    assert run["files"] == {name: blob_hash(repository / name) for name in ("inference/one.py", "inference/two.py")}
    assert run["machine"]["cores"] >= 1 and "torch" in run["versions"]


def test_blob_hash_is_the_one_of_git(repository: Path) -> None:
    done = subprocess.run(
        ["git", "-C", str(repository), "hash-object", "inference/one.py"], capture_output=True, text=True, check=True
    )
    assert blob_hash(repository / "inference" / "one.py") == done.stdout.strip()


def test_a_run_of_other_code_stays_apart_until_all_its_figures_are_replaced(repository: Path) -> None:
    put(repository, {"a": 1.0, "b": 1.0})
    (repository / "inference" / "one.py").write_text("x = 2\n")
    path = put(repository, {"a": 2.0})
    runs = json.loads(path.read_text())["runs"]
    assert [run["figures"] for run in runs] == [{"b": 1.0}, {"a": 2.0}]
    assert [run["dirty"] for run in runs] == [False, True]
    put(repository, {"b": 2.0})
    assert len(json.loads(path.read_text())["runs"]) == 1


def test_stale_only_where_sources_changed(repository: Path) -> None:
    put(repository, {"from_one": 1.0}, files=("inference/one.py",))
    put(repository, {"from_two": 1.0}, files=("inference/two.py",))
    fresh = results.render(repository)
    assert "**stale**:" not in fresh and fresh.count("| current |") == 2
    (repository / "inference" / "two.py").write_text("y = 2\n")
    lines = {line.split(" | ")[0]: line for line in results.render(repository).splitlines()}
    assert "current" in lines["| from_one"] and "**stale**: inference/two.py" in lines["| from_two"]
    (repository / "inference" / "one.py").unlink()
    assert results.render(repository).count("**stale**:") == 2
    (repository / "inference" / "two.py").write_text("y = 1\n")  # undone: no longer stale
    assert results.render(repository).count("**stale**:") == 1


def test_figures_that_json_cannot_hold_leave_the_file_alone(repository: Path) -> None:
    path = put(repository, {"a": 1.0})
    before = path.read_text()
    with pytest.raises(ValueError, match="JSON"):
        put(repository, {"a": float("nan")})
    with pytest.raises(ValueError, match="no figure"):
        put(repository, {})
    with pytest.raises(ValueError, match="no file of 'osd' matches"):
        put(repository, {"a": 2.0}, files=("nowhere/*.py",))
    assert path.read_text() == before and list(path.parent.iterdir()) == [path]


def test_concurrent_records_lose_nothing(repository: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: put(repository, {f"f{i}": i}), range(24)))
    runs = json.loads((repository / "docs" / "figures" / "osd.json").read_text())["runs"]
    assert len(runs[0]["figures"]) == 24


def test_render_is_complete_and_deterministic(repository: Path) -> None:
    put(repository, {"tau": {"value": 3.42, "low": 3.3, "high": 3.5, "unit": "tokens", "need": ">= 3"}})
    put(repository, {"table": {"b8": 1.25, "b1": {"value": 1.5}}, "note": "a|b", "seeds_alpha": [0.78123, 0.79]})
    text = results.render(repository)
    assert text == results.render(repository)
    assert "| tau | 3.42 tokens | 3.3 to 3.5 | >= 3 | [1] | current |" in text
    assert "| table.b1 | 1.5 |" in text and "| table.b8 | 1.25 |" in text
    assert "a\\|b" in text and "0.7812, 0.79" in text
    assert "seeds 0, 1" in text and " cores, torch " in text


@pytest.mark.parametrize(
    ("value", "need", "missed"),
    [
        *[(1.2, ">= 1.3", True), (1.3, ">= 1.3", False), (6.6e-6, "< 1e-6", True), (6.6e-9, "< 1e-6", False)],
        *[(480, "<= 480", False), (0.0005, "> 0.001", True), (1.0, "below static", False), ("text", "> 1", False)],
    ],
)
def test_a_figure_outside_its_need_is_marked(repository: Path, value: object, need: str, missed: bool) -> None:
    put(repository, {"a": {"value": value, "need": need}})
    assert ("| **missed**, current |" in results.render(repository)) == missed


def test_command(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(repository, {"a": 1.0})
    root = ["--root", str(repository)]
    assert results.main(["--check", *root]) == 1
    assert "out of date" in capsys.readouterr().err
    assert results.main(root) == 0
    assert results.main(["--check", *root]) == 0
    (repository / "docs" / "results.md").write_text("edited by hand\n")
    assert results.main(["--check", *root]) == 1
    assert results.main(["--root", str(repository / "nowhere")]) == 2
    assert capsys.readouterr().err.count("error:") == 1


def test_table_of_decoders_comes_from_the_registry() -> None:
    text = f"# Title\n{results.BEGIN}old rows\n{results.END}\nrest\n"
    made = results.render_readme(text)
    assert made.startswith("# Title\n") and made.endswith(f"{results.END}\nrest\n") and "old rows" not in made
    for name in registry.names():
        assert f"| `{name}` | {registry.get(name).summary} | yes" in made
    assert "unless `lossy_mix` is set | target, draft |" in made
    assert results.render_readme(made) == made
    assert results.render_readme("no markers\n") == "no markers\n"
    for half in (results.BEGIN, results.END, f"{results.END}\n{results.BEGIN}"):
        with pytest.raises(InvalidValue, match=r"README\.md needs the line"):
            results.render_readme(half)


def test_readme_is_current() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    assert results.BEGIN in text and results.render_readme(text) == text


def test_bad_figure_file_is_one_line(repository: Path) -> None:
    (repository / "docs" / "figures").mkdir()
    (repository / "docs" / "figures" / "osd.json").write_text('{"system": "osd"')
    with pytest.raises(InvalidValue, match=r"osd\.json is not a figure file"):
        results.render(repository)


def test_runs_as_a_module(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "draftsmith.trainers.results", "--root", str(repository)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Nothing has been measured yet" in (repository / "docs" / "results.md").read_text()


def test_every_test_that_the_coverage_table_names_exists() -> None:
    root = Path(__file__).parents[2]
    names = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (root / "docs" / "coverage.md").read_text())
    assert len(names) > 80
    missing = [
        f"{file}::{test}"
        for file, test in names
        if not (root / file).is_file() or (test and f"def {test}(" not in (root / file).read_text())
    ]
    assert not missing
