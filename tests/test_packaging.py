"""What the repository promises as a package: its list of packages, wheel, slim install, layers, pins and targets."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
import warnings
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CODE = ("inference", "data", "modules", "trainers")  # folders with logic
SHIPPED = (*CODE, "configs", "slurm")  # folders that the wheel holds, as draftsmith.<folder>
EXTRA_ONLY = ("lightning", "pytorch_lightning", "deepspeed", "datasets", "tensorboard", "torchmetrics", "omegaconf")
EXTRA_ONLY += ("jsonargparse", "matplotlib", "sklearn")
INFERENCE_IMPORTS = {"torch", "transformers", "tokenizers", "safetensors", "numpy", "draftsmith"}
TEST_TOOLS = ("pytest", "pytest-timeout", "hypothesis", "scipy")  # tests/inference runs with these and the wheel


def run(*command: str | Path, cwd: Path, **env: str) -> "subprocess.CompletedProcess[str]":
    """Runs a command outside this virtual environment's variables; stdout and stderr together in `stdout`."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )


def run_well(*command: str | Path, cwd: Path, **env: str) -> str:
    done = run(*command, cwd=cwd, **env)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-8000:]}"
    return done.stdout


def copy_sources(to: Path, folders: tuple[str, ...]) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in folders:
        shutil.copytree(ROOT / folder, to / folder, ignore=ignore)


def pins() -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return dict(line.split("==") for line in lines if line)


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~; ]", line, maxsplit=1)[0].lower() for line in requirements}


# --- the list of packages and the wheel ---


def test_the_package_list_is_the_folders() -> None:
    """An editable install imports a package that is missing from the list; a wheel would lack it."""
    folders = {
        "draftsmith." + ".".join(init.parent.relative_to(ROOT).parts)
        for top in SHIPPED
        for init in (ROOT / top).rglob("__init__.py")
    }
    setting = PROJECT["tool"]["setuptools"]
    assert set(setting["packages"]) == folders
    assert setting["package-dir"] == {f"draftsmith.{top}": top for top in SHIPPED}


def test_every_folder_with_code_is_a_package() -> None:
    for top in CODE:
        for file in (ROOT / top).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), f"{file.relative_to(ROOT)} lies in a folder without __init__"
    assert not (ROOT / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel. Built from a copy, since setuptools puts leftovers of an earlier build/ into the next wheel."""
    source = tmp_path_factory.mktemp("source")
    copy_sources(source, SHIPPED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    run_well(sys.executable, "-m", "build", "--wheel", "--outdir", out, source, cwd=out)
    (made,) = out.glob("*.whl")
    return made


def test_the_wheel_holds_all_code_and_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    patterns = ["**/*.py", "**/*.yaml", "**/*.json", "**/*.sbatch"]
    files = {file for top in SHIPPED for pattern in patterns for file in (ROOT / top).glob(pattern)}
    assert names == {f"draftsmith/{file.relative_to(ROOT).as_posix()}" for file in files}


def test_no_file_of_configs_or_slurm_is_left_out_by_the_patterns() -> None:
    for top, endings in (("configs", {".yaml", ".json", ".py"}), ("slurm", {".sbatch", ".py"})):
        found = {file.suffix for file in (ROOT / top).rglob("*") if file.is_file() and "__pycache__" not in file.parts}
        assert found <= endings, f"package-data in pyproject.toml does not ship {found - endings} of {top}/"


def test_the_wheel_asks_for_inference_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode()
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    lines = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    base = requirement_names([line for line in lines if "extra ==" not in line])
    assert base == {"torch", "transformers", "safetensors", "numpy", "tokenizers"}
    extras = {"train", "deepspeed", "lora", "mauve", "interop", "dev"}
    assert set(re.findall(r"^Provides-Extra: (.*)$", metadata, re.MULTILINE)) == extras


# --- the slim install ---


@pytest.fixture(scope="module")
def slim(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh virtual environment with the wheel, without extras, and the tools that run its tests."""
    venv = tmp_path_factory.mktemp("slim") / "venv"
    run_well(sys.executable, "-m", "venv", venv, cwd=venv.parent)
    pip = (venv / "bin" / "python", "-m", "pip", "install", "-qq", "--disable-pip-version-check")
    run_well(*pip, f"torch=={pins()['torch']}", cwd=venv.parent)  # alone and exact, as in the Makefile
    run_well(*pip, "-c", ROOT / "constraints.txt", wheel, *TEST_TOOLS, cwd=venv.parent)
    return venv / "bin" / "python"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_inference_tests_pass_on_the_slim_install(slim: Path, tmp_path: Path) -> None:
    """tests/inference beside nothing but its helpers, in a folder without the sources (which -P keeps off the path)."""
    for file in inference_test_files():
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)  # for its pytest section
    options = ("-q", "-p", "no:cacheprovider", "-m", "not slow and not acceptance and not gpu")
    output = run_well(slim, "-P", "-m", "pytest", *options, "tests/inference", cwd=tmp_path)
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed[1]) > 0, output[-2000:]


@pytest.mark.slow
def test_the_slim_install_has_no_training_module_and_names_the_extra(slim: Path, tmp_path: Path) -> None:
    probe = (
        "import importlib.util, json, draftsmith.inference.engine as e\n"
        f"found = [name for name in {EXTRA_ONLY!r} if importlib.util.find_spec(name)]\n"
        "print(json.dumps([e.__file__, found]))"
    )
    file, found = json.loads(run_well(slim, "-P", "-c", probe, cwd=tmp_path))
    assert found == []
    assert Path(file).is_relative_to(slim.parent.parent)
    command = slim.parent / "draftsmith"
    assert "decode" in run_well(command, "--help", cwd=tmp_path)
    for verb in ("fit", "validate", "test"):
        done = run(command, verb, "-c", "lm/debug", cwd=tmp_path)
        expected = f"error: 'draftsmith {verb}' needs the training extra: pip install 'draftsmith[train]'\n"
        assert (done.returncode, done.stdout) == (2, expected)


def imported_modules(file: Path) -> set[str]:
    """The full names that a file imports, wherever it does; `from a import b` counts as a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def inference_test_files() -> set[Path]:
    """tests/inference, conftest.py, and the helpers in tests/ that these import, directly or by one another."""
    found: set[Path] = set()
    queue = [ROOT / "tests" / "conftest.py", *(ROOT / "tests" / "inference").rglob("*.py")]
    while queue:
        file = queue.pop()
        found.add(file)
        helpers = {
            ROOT / f"{name.replace('.', '/')}.py" for name in imported_modules(file) if name.startswith("tests.")
        }
        queue += [helper for helper in helpers - found if helper.exists()]
    return found


def test_the_inference_tests_import_inference_alone() -> None:
    """They and their helpers: else they would fail on the slim install."""
    for file in inference_test_files():
        names = {name for name in imported_modules(file) if name.partition(".")[0] in ("draftsmith", *EXTRA_ONLY)}
        wrong = {name for name in names if name != "draftsmith" and not name.startswith("draftsmith.inference")}
        assert not wrong, f"{file.relative_to(ROOT)} imports {sorted(wrong)}"


def test_inference_imports_its_five_libraries_and_no_pickle() -> None:
    banned = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
    allowed = INFERENCE_IMPORTS | (set(sys.stdlib_module_names) - banned)
    for file in (ROOT / "inference").rglob("*.py"):
        outside = {name.partition(".")[0] for name in imported_modules(file)} - allowed
        assert not outside, f"{file.relative_to(ROOT)} imports {outside}"
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)}
        assert "torch.load" not in calls, f"{file.relative_to(ROOT)}: torch.load reads pickles; use safetensors"


def test_load_and_registry_import_in_less_than_twice_the_time_of_torch(tmp_path: Path) -> None:
    timed = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
    statements = ("import torch", "from draftsmith.inference import load, registry")
    seconds: dict[str, list[float]] = {statement: [] for statement in statements}
    for _ in range(5):  # interleaved, so that other load on the machine falls on both alike
        for statement in statements:
            seconds[statement].append(float(run_well(sys.executable, "-c", timed.format(statement), cwd=tmp_path)))
    torch_alone, ours = (statistics.median(seconds[statement]) for statement in statements)
    assert ours < 2 * torch_alone, seconds


def test_load_and_registry_do_not_import_transformers(tmp_path: Path) -> None:
    code = "import sys; from draftsmith.inference import load, registry; print('transformers' in sys.modules)"
    assert run_well(sys.executable, "-c", code, cwd=tmp_path) == "False\n"


# --- the gates bite: each contract is broken on purpose in a copy ---

BREACHES = {
    "layers": ("data/planted.py", "import draftsmith.modules.losses"),
    "slim": ("inference/planted.py", "def late():\n    import lightning"),
    "batches": ("modules/planted.py", "from draftsmith.data.planted_data import NAME"),
    "deepspeed": ("trainers/planted.py", "import deepspeed"),
    "losses": ("modules/losses/planted.py", "import torchmetrics"),
}
ALLOWED = {
    "modules import the batches": ("modules/planted.py", "from draftsmith.data.batches import TokenBatch"),
    "strategies import deepspeed": ("trainers/strategies.py", "import deepspeed"),
    "trainers import everything": ("trainers/planted.py", "import draftsmith.data.planted_data, lightning"),
}


def lint_with(tmp_path: Path, file: str, code: str) -> "subprocess.CompletedProcess[str]":
    package = tmp_path / "draftsmith"
    package.mkdir()
    copy_sources(package, CODE)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (package / "data" / "planted_data.py").write_text("NAME = 1\n")
    (package / file).write_text(code + "\n")
    return run(Path(sys.executable).parent / "lint-imports", "--no-cache", cwd=tmp_path, PYTHONPATH=str(tmp_path))


def test_every_contract_has_its_planted_breach() -> None:
    assert {contract["id"] for contract in PROJECT["tool"]["importlinter"]["contracts"]} == set(BREACHES)


@pytest.mark.parametrize("contract", BREACHES)
def test_a_planted_breach_breaks_its_contract_alone(contract: str, tmp_path: Path) -> None:
    done = lint_with(tmp_path, *BREACHES[contract])
    names = {entry["id"]: entry["name"] for entry in PROJECT["tool"]["importlinter"]["contracts"]}
    assert done.returncode == 1, done.stdout
    assert f"{names[contract]} BROKEN" in done.stdout
    assert f"{len(names) - 1} kept, 1 broken" in done.stdout


@pytest.mark.parametrize("case", ALLOWED)
def test_what_the_layers_allow_passes(case: str, tmp_path: Path) -> None:
    done = lint_with(tmp_path, *ALLOWED[case])
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("import data\n\nprint(data)\n", "TID251"),
        ("from inference.laws import TeacherLaw\n\nprint(TeacherLaw)\n", "TID251"),
        ("from modules import lm\n\nprint(lm)\n", "TID251"),
        ("import trainers.cli\n\nprint(trainers)\n", "TID251"),
        ('try:\n    print(1)\nexcept Exception:\n    print("hidden")\n', "BLE001"),
        ("import pickle\n\nprint(pickle.loads(b''))\n", "S301"),
        ('print(eval("1"))\n', "S307"),
        (f"text = {'x' * 120!r}\n", "E501"),
    ],
)
def test_ruff_refuses(code: str, rule: str) -> None:
    command = [
        Path(sys.executable).parent / "ruff",
        "check",
        "--output-format=json",
        "--stdin-filename",
        "data/x.py",
        "-",
    ]
    done = subprocess.run(command, input=code, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert rule in {finding["code"] for finding in json.loads(done.stdout)}, done.stdout


@pytest.mark.parametrize("module", ["draftsmith.inference.planted", "draftsmith.data.planted", "tests.planted"])
def test_a_warning_in_our_own_code_is_an_error(module: str) -> None:
    with pytest.raises(UserWarning, match="ours"):
        exec("import warnings; warnings.warn('ours')", {"__name__": module})


def test_a_warning_in_other_code_is_only_shown() -> None:
    with warnings.catch_warnings(record=True) as seen:
        exec("import warnings; warnings.warn('theirs')", {"__name__": "lightning.planted"})
    assert [str(warning.message) for warning in seen] == ["theirs"]


# --- pins, Makefile, CI ---


def test_every_requirement_is_pinned_and_installed_as_pinned() -> None:
    pinned = {name.lower().replace("_", "-"): version for name, version in pins().items()}
    assert pinned["torch"] == "2.13.0"
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = requirement_names(sum(extras.values(), PROJECT["project"]["dependencies"]))
    assert wanted <= set(pinned)
    installed = {
        (dist.name or "").lower().replace("_", "-"): dist.version.partition("+")[0]
        for dist in importlib.metadata.distributions()
    }
    differing = {
        name: (version, installed[name])
        for name, version in pinned.items()
        if installed.get(name) not in (None, version)
    }
    assert not differing, f"(constraints.txt, installed): {differing}; rm -r .venv and make install, or update the file"


def test_constraints_hold_no_path_and_no_build_tag() -> None:
    for name, version in pins().items():
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name) and re.fullmatch(r"[0-9a-z.]+", version), (name, version)


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("demo", "draftsmith demo"),
        ("test", '-m pytest -m "not acceptance and not gpu and not slurm"'),
        ("check", "lint-imports"),
        ("acceptance", "-m draftsmith.trainers.results"),
        ("bench", "draftsmith bench"),
        ("slurm-test", "pytest -m slurm tests/slurm"),
    ],
)
def test_each_make_target_installs_first_when_nothing_is_there(target: str, command: str) -> None:
    output = run_well("make", "-n", f"VENV={ROOT / 'no-such-venv'}", target, cwd=ROOT)
    install = output.index("-e '.[train,deepspeed,dev]'")
    assert output.index("\"$(grep '^torch==' constraints.txt)\"") < install < output.index(command)


def test_acceptance_of_one_system_runs_its_file_alone() -> None:
    output = run_well("make", "-n", "acceptance", "SYSTEM=speculative-sampling", cwd=ROOT)
    assert re.search(r"-m acceptance .*tests/acceptance/test_speculative_sampling\.py", output)


def test_ci_runs_the_gates_and_the_tests_of_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.findall(r"^ *timed make (.*)$", script.read_text(), re.MULTILINE)[-3:] == ["check", "test", "slurm-test"]
    run_well("bash", "-n", script, cwd=ROOT)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"^ *(?:\$ )?make ([\w-]+)", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert target in targets, f"README.md names make {target}, which the Makefile lacks"
