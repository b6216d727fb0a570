"""The command in surroundings of a user's own: the locale, a directory with files named like modules, no home."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import FinishedRun, environment

# not "types" or another that Python itself imports for -m, before the package has a say
MODULES = ("random", "secrets", "data", "config", "train", "stages", "jax")
PLAIN_TEXT = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def command(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "headsteer_jax", *arguments],
        cwd=cwd, env=environment(**variables), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Make a directory with files that are named like modules of Python's, of libraries and of this package."""
    (tmp_path / "here").mkdir()
    for name in MODULES:
        (tmp_path / "here" / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    return tmp_path / "here"


def test_a_page_is_written_whatever_surrounds_the_command(finished: FinishedRun, here: Path) -> None:
    faulty = here / "matplotlibrc"
    faulty.write_bytes(b"text.usetex: True\nbackend: \xff\n")
    surroundings = {
        "MATPLOTLIBRC": str(faulty), "MPLBACKEND": "nonsense", "MPLCONFIGDIR": "/dev/null/x", "HOME": str(here),
        "XDG_CACHE_HOME": "/dev/null/x", "LC_NUMERIC": "de_DE.UTF-8", "TZ": "Asia/Kathmandu",
        "JAX_ENABLE_X64": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "SLURM_STEP_NUM_TASKS": "",
    }  # fmt: skip
    result = command("page", str(finished.workdir), "--output=~/\u00e9", cwd=here, **PLAIN_TEXT | surroundings)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.startswith(f"{here}/\\udcc3\\udca9/report.html")
    for name in ("figures/steering.png", "figures/steering.svg"):
        assert (here / "\u00e9" / name).read_bytes() == (finished.workdir / name).read_bytes()
    assert not (here / "~").exists()


@pytest.mark.parametrize(
    ("variables", "texts"),
    [
        ({"JAX_PLATFORMS": "typo"}, ["JAX_PLATFORMS=typo: no device could be opened", "unset it"]),
        ({"JAX_ENABLE_X64": "perhaps"}, ["JAX does not start", "JAX_ENABLE_X64"]),
    ],
)
def test_what_cannot_work_is_one_line(variables: dict[str, str], texts: list[str], here: Path, tmp_path: Path) -> None:
    result = command("run", f"--workdir={tmp_path / 'w'}", cwd=here, **variables)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert all(text in result.stderr for text in texts)
    assert not (tmp_path / "w").exists()
