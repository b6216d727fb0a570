"""The variables of clusters' launchers: only one that counts several processes makes this one join a cluster."""

import logging

import jax
import pytest

from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime import hosts


@pytest.fixture(autouse=True)
def joined(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Clear the variables, and note the calls that would join a cluster."""
    calls: list[dict[str, object]] = []
    for name in hosts.CLUSTERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    return calls


@pytest.mark.parametrize("text", ["", " ", "1", "0", "one", "1.5", "1(x2)"])
@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES"])
def test_one_process(
    name: str, text: str, joined: list, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(name, text)
    monkeypatch.setattr(logging.getLogger("headsteer_jax"), "propagate", True)
    hosts.start("", 1)
    assert not joined
    assert (f"{name}={text}: not a number" in caplog.text) == (text in ("one", "1.5", "1(x2)"))


@pytest.mark.parametrize("text", ["", "localhost", "localhost,", " , "])
def test_one_tpu_worker(text: str, joined: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", text)
    hosts.start("", 1)
    assert not joined


@pytest.mark.parametrize(("name", "text"), [("SLURM_STEP_NUM_TASKS", " 2"), ("TPU_WORKER_HOSTNAMES", "a,b")])
def test_several_processes(name: str, text: str, joined: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "nonsense")
    monkeypatch.setenv(name, text)
    hosts.start("", 1)
    assert len(joined) == 1


@pytest.mark.parametrize("error", [ValueError("no\naddress"), KeyError("SLURM_PROCID"), RuntimeError("late")])
def test_a_cluster_that_cannot_be_joined(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(HeadSteerError, match=r"SLURM_STEP_NUM_TASKS=2 .* \(.*\); unset it to run alone") as caught:
        hosts.start("", 1)
    assert "\n" not in str(caught.value)
