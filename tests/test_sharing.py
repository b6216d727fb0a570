"""Runs on the hub: a push and a load in other processes, against a stand-in of the hub in this one."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import FinishedRun, environment, headsteer
from hub_server import READ_TOKEN, TOKEN, Hub, serve_hub
from made_run import made_run
from safetensors.numpy import load_file

from headsteer_jax import HeadSteerError, load_run
from headsteer_jax.data.dataset import SPLITS
from headsteer_jax.report.card import escape_markdown, render_run_card
from headsteer_jax.runtime.files import read_json
from headsteer_jax.runtime.hub import Address, parse_address

LOAD = """
import sys
import numpy as np
from headsteer_jax import load_run

run = load_run(sys.argv[1])
sweep = run.sweep(["class", "gate_aligned", "random"], alphas=(-1.0, 0.5, 2.0))
assert np.array_equal(run.x_train, np.load(sys.argv[2] + ".x_train.npy")), "the training residuals differ"
sweep.to_netcdf(sys.argv[2], engine="h5netcdf")
"""
COMMANDS = """
import json, os, sys
from helpers import headsteer

answers = []
for variables, arguments in json.loads(sys.argv[1]):
    os.environ |= variables
    result = headsteer(*arguments)
    answers.append([result.returncode, result.stdout, result.stderr])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
    with serve_hub() as server:
        yield server


def call(commands: list[tuple[dict[str, str], list[object]]], variables: dict[str, str]) -> list[list[Any]]:
    """Run commands in one process of their own, as huggingface_hub reads its settings when it is imported.

    Args:
      commands: the variables to change before each, and its arguments.

    Returns:
      The exit code, standard output and standard error of each.
    """
    text = json.dumps([(change, [*map(str, arguments)]) for change, arguments in commands])
    result = subprocess.run(
        [sys.executable, "-c", COMMANDS, text],
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def assert_equal_tensors(first: Path, second: Path) -> None:
    """Compare every tensor of two files; the order of their metadata is not fixed."""
    ours, theirs = load_file(first), load_file(second)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], strict=True)


@pytest.fixture(scope="module")
def pushed(hub: Hub, finished: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Push the tiny run twice, and return the environment."""
    variables = hub.environment(tmp_path_factory.mktemp("hub"))
    first, second = call(
        [
            ({}, ["push", finished.workdir, "hf://owner/tiny", "--private"]),
            ({}, ["push", finished.workdir, "hf://owner/tiny", "--message=Again"]),
        ],
        variables,
    )
    assert first == [0, f"{hub.url}/owner/tiny\n", ""]
    assert second == first
    return variables


def test_a_push_is_one_commit_without_the_state_of_training(hub: Hub, pushed: dict[str, str]) -> None:
    stored = hub.repositories["owner/tiny"]
    assert stored.private
    assert stored.messages == ["initial commit", "Add the run tiny", "Again"]
    names = set(stored.files)
    needed = "config.json sweep.nc summary.json report.html latents.html README.md headsteer.json figures/steering.png"
    needed += " train/done.json train/metrics.jsonl train/gates.npz sae/autoencoders.npz sae/inside.npz"
    needed += " train/gated/params.safetensors train/dense_control/params.safetensors layers/layers.json"
    assert names >= set(needed.split())
    left_at_home = ("checkpoints", "tensorboard", "activations", "last", "best", ".lock", "wandb", "dense")
    assert not [name for name in names if set(name.split("/")) & set(left_at_home)]
    listed = json.loads(stored.files["headsteer.json"])
    assert set(listed["files"]) == names - {".gitattributes", "headsteer.json"}


def test_a_run_from_the_hub_sweeps_bit_for_bit_as_the_original(
    pushed: dict[str, str], finished: FinishedRun, tmp_path: Path
) -> None:
    np.save(tmp_path / "hub.nc.x_train.npy", load_run(finished.workdir).x_train)
    (tmp_path / "own.nc.x_train.npy").symlink_to(tmp_path / "hub.nc.x_train.npy")
    sweeps = []
    for location, name in (("hf://owner/tiny", "hub.nc"), (str(finished.workdir), "own.nc")):
        command = [sys.executable, "-c", LOAD, location, str(tmp_path / name)]
        result = subprocess.run(command, env=environment(**pushed), capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        sweeps.append((tmp_path / name).read_bytes())
    assert sweeps[0] == sweeps[1]


def test_every_command_that_reads_a_run_reads_it_from_the_hub(
    hub: Hub, pushed: dict[str, str], finished: FinishedRun, tmp_path: Path
) -> None:
    commit = next(iter(hub.repositories["owner/tiny"].commits))  # the one that the hub made
    last = hub.repositories["owner/tiny"].refs["main"]
    page, export, deploy, nowhere, early = call(
        [
            ({}, ["page", "hf://owner/tiny", f"--output={tmp_path / 'pages'}"]),
            ({}, ["export", f"hf://owner/tiny@{last}", f"timm:{tmp_path / 'timm.safetensors'}"]),
            ({}, ["deploy", "hf://owner/tiny", "--dynamic", f"--output={tmp_path / 'deployed'}"]),
            ({}, ["page", "hf://owner/tiny"]),
            ({}, ["page", f"hf://owner/tiny@{commit}", f"--output={tmp_path / 'early'}"]),
        ],
        pushed,
    )
    assert page[0] == export[0] == deploy[0] == 0, (page, export, deploy)
    assert (tmp_path / "pages/figures/steering.svg").read_bytes() == (
        finished.workdir / "figures/steering.svg"
    ).read_bytes()
    assert "<title>tiny" in (tmp_path / "pages/report.html").read_text()
    assert headsteer("export", finished.workdir, f"timm:{tmp_path / 'own.safetensors'}").returncode == 0
    assert_equal_tensors(tmp_path / "timm.safetensors", tmp_path / "own.safetensors")
    assert nowhere[::2] == [2, "error: RUN=hf://owner/tiny: pages are not written to the hub; give --output=DIR\n"]
    assert early[0] == 2
    assert "has no headsteer.json, so headsteer push did not write it" in early[2]


def test_what_cannot_be_pushed_is_one_line_and_uploads_nothing(
    hub: Hub, pushed: dict[str, str], finished: FinishedRun, tmp_path: Path
) -> None:
    unfinished = finished.copy(tmp_path)
    (unfinished / "report/done.json").unlink()
    other = hub.create("owner/other")
    other.commit({"model.bin": b"x", "README.md": b"mine"}, "mine")
    hub.create("owner/hidden", private=True).hidden = True
    ours = hub.create("owner/ours")  # a run of an earlier version, and a file of somebody else's under a new name
    manifest = json.dumps({"format": 1, "files": ["config.json"]}).encode()
    ours.commit({"headsteer.json": manifest, "config.json": b"{}", "explorer.html": b"mine"}, "a run")
    before = {name: dict(repository.refs) for name, repository in hub.repositories.items()}
    run, uploads = finished.workdir, len([line for line in hub.requests if line.startswith("PUT")])
    nobody = {"HF_TOKEN": "", "HF_HOME": str(tmp_path)}
    cases: list[tuple[dict[str, str], list[object], str]] = [
        ({}, ["push", unfinished, "hf://owner/new"], "headsteer push needs the stage report, which is not done in"),
        ({}, ["push", tmp_path, "hf://owner/new"], "no run was started here"),
        ({}, ["push", run, "owner/new"], "hf://owner/name=owner/new: must be hf://owner/name"),
        ({}, ["push", run, "hf://owner/tiny@v1"], "a run is pushed as the newest commit; leave out @v1"),
        ({}, ["push", run, "hf://owner/other"], "exists, and headsteer push did not write it; choose another name"),
        ({}, ["push", run, "hf://owner/other", "--overwrite", "--private"], "exists and is public"),
        (
            {},
            ["push", run, "hf://owner/ours"],
            "holds explorer.html, which headsteer push did not write; move it",
        ),
        ({}, ["push", run, "hf://owner/hidden"], "exists, but your token may not read it; choose another name"),
        ({"HF_TOKEN": READ_TOKEN}, ["push", run, "hf://owner/new"], "your token may not do this there"),
        ({"HF_TOKEN": "hf_wrong"}, ["push", run, "hf://owner/new"], "the hub refuses your token; log in with hf auth"),
        (nobody, ["push", run, "hf://owner/new"], "there is no token of the hub on this machine; log in with hf auth"),
    ]
    answers = call([(change, arguments) for change, arguments, _ in cases], pushed)
    for (code, out, err), (_, arguments, text) in zip(answers, cases, strict=True):
        assert (code, out) == (2, ""), (arguments, err)
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert text in err
    assert {name: dict(repository.refs) for name, repository in hub.repositories.items()} == before
    assert len([line for line in hub.requests if line.startswith("PUT")]) == uploads


def test_overwriting_keeps_the_files_of_others_and_a_failed_upload_leaves_all_as_it_was(
    hub: Hub, pushed: dict[str, str], finished: FinishedRun
) -> None:
    shared = hub.create("owner/shared")
    shared.commit({"notes.md": b"mine", "README.md": b"mine"}, "mine")
    hub.fail = "^/lfs/"
    try:
        [failed] = call([({}, ["push", finished.workdir, "hf://owner/shared", "--overwrite"])], pushed)
    finally:
        hub.fail = None
    assert failed[0] == 2
    assert "hf://owner/shared: the hub answers with an error (507" in failed[2]
    assert failed[2].count("\n") == 1
    assert shared.messages == ["initial commit", "mine"]
    [first] = call([({}, ["push", finished.workdir, "hf://owner/shared", "--overwrite"])], pushed)
    assert first[0] == 0, first
    assert shared.files["notes.md"] == b"mine"
    assert shared.files["README.md"].startswith(b"---\n")
    listed = json.loads(shared.files["headsteer.json"])
    outdated = {**shared.files, "figures/old.png": b"x"}
    outdated["headsteer.json"] = json.dumps(listed | {"files": [*listed["files"], "figures/old.png"]}).encode()
    shared.commit(outdated, "a run with another figure")
    [second] = call([({}, ["push", finished.workdir, "hf://owner/shared"])], pushed)
    assert second[0] == 0, second
    assert "figures/old.png" not in shared.files
    assert shared.files["notes.md"] == b"mine"


def test_a_damaged_manifest_is_repaired_by_overwriting(
    hub: Hub, pushed: dict[str, str], finished: FinishedRun, tmp_path: Path
) -> None:
    broken = hub.create("owner/broken")
    broken.commit({"headsteer.json": b'{"format": 1, "fi', "notes.md": b"mine"}, "damaged")
    push = ["push", finished.workdir, "hf://owner/broken"]
    export = ["export", "hf://owner/broken", f"timm:{tmp_path / 'a.safetensors'}"]
    unread, refused, repaired, read = call(
        [({}, export), ({}, push), ({}, [*push, "--overwrite"]), ({}, export)], pushed
    )
    assert (unread[0], refused[0]) == (2, 2)
    assert "its headsteer.json is damaged; push the run again with --overwrite" in unread[2]
    assert "exists, and headsteer push did not write it; choose another name, or pass --overwrite" in refused[2]
    assert repaired[0] == read[0] == 0, (repaired, read)
    assert broken.files["notes.md"] == b"mine"


def test_a_commit_of_somebody_else_meanwhile_is_one_line_and_loses_nothing(
    hub: Hub, pushed: dict[str, str], finished: FinishedRun
) -> None:
    busy = hub.create("owner/busy")

    def commit_too() -> None:
        busy.commit({**busy.files, "config.json": b"theirs"}, "theirs")

    hub.before_commit = commit_too
    push: list[object] = ["push", finished.workdir, "hf://owner/busy"]
    [late] = call([({}, push)], pushed)
    assert late == [2, "", "error: hf://owner/busy: the repository changed meanwhile; run the same command again\n"]
    assert busy.messages == ["initial commit", "theirs"]
    assert busy.files["config.json"] == b"theirs"
    refused, again = call([({}, push), ({}, [*push, "--overwrite"])], pushed)
    assert "exists, and headsteer push did not write it" in refused[2]
    assert again[0] == 0, again
    assert busy.messages == ["initial commit", "theirs", "Add the run tiny"]


def test_offline_a_run_comes_from_the_cache_or_is_one_line(
    hub: Hub, pushed: dict[str, str], finished: FinishedRun, tmp_path: Path
) -> None:
    pages = f"--output={tmp_path / 'pages'}"
    online = call([({}, ["export", "hf://owner/tiny", f"timm:{tmp_path / 'a.safetensors'}"])], pushed)
    assert online[0][0] == 0, online
    commands: list[tuple[dict[str, str], list[object]]] = [
        ({}, ["export", "hf://owner/tiny", f"timm:{tmp_path / 'b.safetensors'}"]),
        ({}, ["page", "hf://owner/unseen", pages]),
        ({}, ["push", finished.workdir, "hf://owner/new"]),
    ]
    for change, push_fails in (
        ({"HF_HUB_OFFLINE": "1"}, "the hub is switched off (HF_HUB_OFFLINE); unset this variable"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached"),
    ):
        cached, unseen, push = call(commands, pushed | change)
        assert cached[0] == 0, cached
        assert "hf://owner/unseen: is not in the hub's cache, and the hub cannot be reached" in unseen[2]
        assert f"hf://owner/new: {push_fails}" in push[2]
        for code, _, err in (unseen, push):
            assert code == 2
            assert err.count("\n") == 1
    assert_equal_tensors(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_without_the_extra_one_line_names_it(finished: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    line = "hf://owner/tiny: needs the extra hub: pip install 'headsteer-jax[hub]'"
    with pytest.raises(HeadSteerError) as raised:
        load_run("hf://owner/tiny")
    assert str(raised.value) == line
    result = headsteer("push", finished.workdir, "hf://owner/tiny")
    assert (result.returncode, result.stderr) == (2, f"error: {line}\n")


def test_addresses() -> None:
    assert parse_address("hf://owner/name", "RUN") == Address("owner/name")
    assert parse_address("hf://o-1/n.2_x@refs/pr/1", "RUN") == Address("o-1/n.2_x", "refs/pr/1")
    for text in (
        "hf:/owner/name",
        "hf://owner",
        "hf://owner/name/file",
        "hf://owner/name@",
        "hf://a/b@c@d",
        "hf://a /b",
    ):
        with pytest.raises(HeadSteerError, match="must be hf://owner/name") as raised:
            parse_address(text, "RUN")
        assert str(raised.value).startswith(f"RUN={text}: ")


def test_the_card_of_a_made_run_shows_names_as_they_are() -> None:
    summary = made_run()["summary"]
    summary["classes"][0]["name"] = "<img src=x>|\n---"
    names = ["<script>alert(1)</script>", "a|b", "*c*\n# d", "`e`", *map(str, range(8))]
    data = {"classes": names} | {split: {"images": [5] * 12} for split in SPLITS}
    card = render_run_card(summary, data, "a <run>", "hf://owner/made")
    assert card.startswith("---\nlibrary_name: headsteer\n")
    assert 'load_run("hf://owner/made")' in card
    assert "12: \\<script\\>" in card
    assert not re.search(r"(?<!\\)<(script|img)", card)
    assert "\n# d" not in card
    for strategy, row in summary["steering"].items():
        if strategy != "unsteered":
            start = f"| {escape_markdown(strategy)} |"
            line = next(line for line in card.splitlines() if line.startswith(start))
            assert line.count(" | ") == 6
            assert f"{row['usage']:.3f} ({row['usage_ci'][0]:.3f} to {row['usage_ci'][1]:.3f})" in line
            assert f"{100 * row['accuracy']:.1f}%" in line


def test_the_card_of_a_run(hub: Hub, pushed: dict[str, str], finished: FinishedRun) -> None:
    card = hub.repositories["owner/tiny"].files["README.md"].decode()
    summary = read_json(finished.workdir / "summary.json")
    assert f"{summary['gated_accuracy']:.1%}" in card
    assert 'run = load_run("hf://owner/tiny")' in card
    assert "data.train_per_class = 3\n" in card
    assert TOKEN not in card
