"""Paths as people write them: `~` is expanded, and what is no path of this machine is refused."""

from pathlib import Path

import pytest
from helpers import headsteer

from headsteer_jax.config import Config, load_config
from headsteer_jax.config.files import override
from headsteer_jax.config.paths import expand_path
from headsteer_jax.deploy.export import parse_target
from headsteer_jax.errors import HeadSteerError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a home directory, and work in another one."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.mark.parametrize("text", ["", "x", "./~", "a/~/b", "/x y", "gs://bucket/x", "a:b", "C:\\x"])
def test_other_paths_stay(text: str) -> None:
    assert expand_path(text, "--workdir") == text


def test_a_home_directory(home: Path) -> None:
    assert expand_path("~/x", "--workdir") == str(home / "x")
    assert expand_path("~", "--workdir") == str(home)
    assert str(parse_target("saelens:~/x")[1]) == str(home / "x")


def test_no_such_user() -> None:
    with pytest.raises(HeadSteerError, match=r"--workdir=~nobody_here/x: there is no user 'nobody_here'; write"):
        expand_path("~nobody_here/x", "--workdir")


@pytest.mark.parametrize(
    "text", ["s3://b/x", "s3:/b/x", "az://b", "hdfs://b/x", "http://b/x", "file:///x", "gs:/b/x", "gs://"]
)
def test_other_schemes_are_refused(text: str) -> None:
    with pytest.raises(HeadSteerError, match="not supported; give a path of this machine or gs://bucket/path"):
        expand_path(text, "--workdir")
    for field in ("data.path", "machine.activation_cache"):
        with pytest.raises(HeadSteerError, match=f"config.{field} = "):
            load_config(Path(__file__).parents[2] / "configs" / "double_digits.py", {field: text})


def test_buckets_only_where_they_can_be_read() -> None:
    def check(**data: str) -> None:
        config = Config().model_dump()
        Config.model_validate(config | {"data": config["data"] | data})

    check(source="tfds", path="gs://b/x")
    with pytest.raises(ValueError, match=r"data\.path"):
        check(source="npz", path="gs://b/x")


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--workdir=s3://bucket/x"),
        ("run", "--workdir=~nobody_here/x"),
        ("run", "--config=~nobody_here/x.py"),
        ("run", "--config.machine.activation_cache=~nobody_here/x"),
        ("run", "--config.machine.activation_cache=s3://bucket/x"),
        ("export", "~nobody_here/x", "timm:x.safetensors"),
        ("page", "s3://bucket/x"),
        ("config", "--reference=gs://bucket/x"),
        ("run", f"--config={'x' * 300}"),
        ("export", "x" * 300, "timm:x.safetensors"),
    ],
)
def test_a_refused_path_leaves_nothing(arguments: tuple[str, ...]) -> None:
    result = headsteer(*arguments, cwd=Path.cwd())
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not list(Path.cwd().iterdir())


def test_a_config_in_the_home_directory(home: Path) -> None:
    (home / "mine.py").write_bytes(b"\xef\xbb\xbffrom headsteer_jax.config import Config\n\n\nget_config = Config\n")
    assert headsteer("config", "--check", "--config=~/mine.py", cwd=Path.cwd()).stdout == "~/mine.py: valid\n"
    assert headsteer("config", "--reference=~/page.md", cwd=Path.cwd()).returncode == 0
    assert (home / "page.md").exists()
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("seed", [-1, 2**32, 2**32 + 1, 2**63, 2**70])
def test_a_seed_that_jax_cannot_tell_from_another_is_refused(seed: int) -> None:
    with pytest.raises(HeadSteerError, match=r"config\.seed = .*(less than or equal to 4294967295|or equal to 0)"):
        override(Config(), "seed", str(seed))
    assert override(Config(), "seed", str(2**32 - 1)).seed == 2**32 - 1
