"""What `import scfa_jax` brings, and what it must not."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import requires, version
from pathlib import Path

import pytest

import scfa_jax

PUBLIC = {
    "BlockSizes",
    "SparseIndex",
    "TileShape",
    "block_index",
    "causal_attention",
    "causal_index",
    "hash_index",
    "hash_sparse_attention",
    "keep_index",
    "kmeans_hash",
    "learned_hash",
    "local_hash_index",
    "lsh_hash",
    "merge_attention",
    "moba_attention",
    "moba_blocks",
    "nsa_attention",
    "patterns",
    "qk_sparse_attention",
    "random_rotations",
    "range_attention",
    "range_index",
    "reference",
    "remat",
    "sharding",
    "sparse_attention",
    "sparsek_attention",
    "window_attention",
    "window_index",
}


def test_every_public_name_is_there_and_documented():
    assert set(re.findall(r" as (\w+)$", Path(scfa_jax.__file__).read_text(), re.MULTILINE)) == PUBLIC
    for name in PUBLIC:
        assert getattr(scfa_jax, name).__doc__, name


def test_reference_defines_every_operator():
    for name in PUBLIC:
        if name.endswith("_attention") and name != "sparse_attention":
            assert callable(getattr(scfa_jax.reference, name))


def test_importing_the_core_imports_nothing_but_jax_and_numpy():
    code = (
        "import sys, scfa_jax; "
        "print([m for m in ('flax', 'chex', 'optax', 'jaxtyping', 'beartype', "
        "'jax.experimental.pallas') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_core_depends_on_jax_and_numpy_alone():
    core = {r.split(">")[0] for r in requires("scfa-jax") if "extra" not in r}
    assert core == {"jax", "jaxlib", "numpy"}
    assert version("scfa-jax")


# What a recipe of the Makefile finds on its path beside a Python: no interpreter, no nvidia-smi.
TOOLS = ("make", "sh", "cat", "cksum", "cp", "head", "mkdir", "rm", "sed")
# An interpreter that tells its version and makes environments of itself; in one, it says what it was asked to run.
FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
  *"%d.%d"*) echo {version} ;;
  *"(3, 11)"*) exit {too_old} ;;
  *ensurepip*) exit {bare} ;;
  *_base_executable*) echo "{path}" ;;
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python3"; cp "$0" "$3/bin/python" ;;
  --version*) echo Python {version} ;;
  "-m pip"|"-m train") echo "RAN $*" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder with the Makefile, and `bin`, the only folder on the path of the `make` that `run_make` runs."""
    root = Path(__file__).parent.parent
    (tmp_path / "bin").mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(root / name, tmp_path)
    for name in TOOLS:
        tool = shutil.which(name)
        assert tool, f"{name} is needed"
        (tmp_path / "bin" / name).symlink_to(tool)
    return tmp_path


def add_command(folder: Path, name: str, text: str) -> None:
    path = folder / "bin" / name
    path.write_text(text)
    path.chmod(0o755)


def add_python(folder: Path, name: str, version: str, *, too_old: bool = False, bare: bool = False) -> None:
    path = folder / "bin" / name
    add_command(folder, name, FAKE_PYTHON.format(version=version, too_old=int(too_old), bare=int(bare), path=path))


def run_make(folder: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path + str(folder / "bin"), "HOME": str(folder)}
    return subprocess.run(
        [str(folder / "bin" / "make"), *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def complaint(run: subprocess.CompletedProcess[str]) -> str:
    """The one line of its own that a failed `make` wrote."""
    assert run.returncode == 2
    lines = [line for line in run.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1, run.stderr
    return lines[0]


@pytest.mark.parametrize("target", ["train", "test"])
def test_make_names_the_remedy_where_python_or_its_venv_is_missing(target, checkout):
    assert "no Python found; install Python 3.11" in complaint(run_make(checkout, target))
    assert "no Python found as python9" in complaint(run_make(checkout, target, "PYTHON=python9"))
    add_python(checkout, "python3", "3.9", too_old=True)
    assert "python3 is Python 3.9, and 3.11 or later is needed" in complaint(run_make(checkout, target))
    add_python(checkout, "python3.12", "3.12", bare=True)
    assert "apt install python3.12-venv" in complaint(run_make(checkout, target))
    assert not (checkout / ".venv").exists()
    add_python(checkout, "python3.11", "3.11")
    assert run_make(checkout, "train").returncode == 0


def test_make_sets_up_once(checkout):
    add_python(checkout, "python3", "3.12")
    first = run_make(checkout, "train", "ARGS=--steps 3")
    assert "install --quiet -e .[train]\n" in first.stdout
    assert first.stdout.endswith("RAN -m train --steps 3\n")
    again = run_make(checkout, "train")
    assert again.returncode == 0, again.stderr
    assert "making" not in again.stdout
    assert "install" not in again.stdout
    assert again.stdout.endswith("RAN -m train\n")


def test_make_uses_the_interpreter_behind_an_active_environment(checkout):
    # .venv itself may be active, and is removed before it is made anew.
    venv.create(checkout / ".venv", symlinks=True)
    (checkout / "bin" / "rm").unlink()
    add_command(checkout, "rm", "#!/bin/sh\nexit 1\n")  # this is as far as it shall go
    run = run_make(checkout, "train", path=f"{checkout / '.venv' / 'bin'}{os.pathsep}")
    interpreter = run.stdout.removeprefix("making .venv with ").split()[0]
    assert Path(interpreter).samefile(sys.executable)
    assert checkout not in Path(interpreter).parents


@pytest.mark.parametrize(
    ("said", "extras", "note"),
    [
        ("CUDA Version: 12.4", "train,cuda12", ""),
        ("CUDA Version: 13.0", "train,cuda13", ""),
        ("CUDA UMD Version: 13.1", "train,cuda13", ""),
        ("CUDA Version: 11.8", "train", "too old for JAX"),
        ("CUDA Version: N/A", "train", "names no CUDA version"),
        (None, "train", ""),
    ],
)
def test_make_takes_the_cuda_build_that_the_driver_asks_for(said, extras, note, checkout):
    add_python(checkout, "python3", "3.12")
    answer = "exit 9" if said is None else f"echo '| NVIDIA-SMI 580.95  Driver Version: 580.95  {said} |'"
    add_command(checkout, "nvidia-smi", f"#!/bin/sh\n{answer}\n")
    run = run_make(checkout, "train")
    assert run.returncode == 0
    assert f"-e .[{extras}]\n" in run.stdout
    assert note in run.stderr
    assert bool(note) == bool(run.stderr)


def test_the_wheel_ships_the_package_with_its_types_and_nothing_else(tmp_path):
    root = Path(__file__).parent.parent
    build = [sys.executable, "-W", "ignore", "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=root, capture_output=True, check=True)
    (wheel,) = tmp_path.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {str(path.relative_to(root)) for path in (root / "scfa_jax").rglob("*.py")}
    assert "scfa_jax/py.typed" in names
    assert {name for name in names if ".dist-info/" not in name} == sources | {"scfa_jax/py.typed"}


@pytest.mark.parametrize("name", ["sparse_attention", "range_attention", "window_index", "sparsek_attention"])
def test_an_unknown_option_is_answered_with_the_right_ones(name):
    with pytest.raises(TypeError, match=rf"mask is no option of {name}. It takes .*implementation"):
        getattr(scfa_jax, name)(mask=None)
