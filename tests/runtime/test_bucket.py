"""A run in a bucket: checkpoints, small files and the lock, against a server with Google's protocol."""

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import CONFIG, ROOT, environment, free_port

pytest.importorskip("gcsfs", reason="needs the extra gcs")
pytest.importorskip("gcp_storage_emulator", reason="needs gcp-storage-emulator")

# The emulator lacks what TensorStore needs: a header with an object's version, bounds of a listing, and ranges that
# count from the end.
SERVER = """
import json, sys
from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

plain = objects.download

def download(request, response, storage, *args, **kwargs):
    name, header = (request.params["bucket_name"], request.params["object_id"]), request.get_header
    try:
        size, found = len(storage.get_file(*name)), storage.get_file_obj(*name)
    except NotFound:
        return plain(request, response, storage, *args, **kwargs)
    last = (header("range", None) or "").partition("bytes=-")[2]
    if last:
        request.get_header = lambda key, default=None: f"bytes={size - int(last)}-{size - 1}"
    plain(request, response, storage, *args, **kwargs)
    response["X-Goog-Generation"] = found["generation"]

def listed(request, response, storage, *args, **kwargs):
    whole(request, response, storage, *args, **kwargs)
    begin, end = (request.query.get(name, [""])[0] for name in ("startOffset", "endOffset"))
    found = json.loads(response._content)
    names = found.get("items", [])
    found["items"] = [one for one in names if one["name"] >= begin and (not end or one["name"] < end)]
    response.json(found)

whole, objects.download = objects.ls, download
for _, methods in server.HANDLERS:
    for method, handler in list(methods.items()):
        methods[method] = download if handler is plain else listed if handler is whole else handler
server.create_server("127.0.0.1", int(sys.argv[1]), True, default_bucket="steer").run()
"""

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from etils.epath import Path
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime.staging import redirect_stage, remove_stage, replace_stage
from headsteer_jax.runtime import lock
from headsteer_jax.runtime.checkpoint import Checkpoints
from headsteer_jax.runtime.files import (
    Workdir, make_directory, read_arrays, read_json, write_arrays, write_json
)

lock.HEARTBEAT_SECONDS = 0.3
root = Path("gs://steer/files")
make_directory(root)
write_json(root / "a.json", {"a": 1})
write_arrays(root / "a.npz", {"x": np.arange(5)})
assert read_json(root / "a.json") == {"a": 1}
assert read_arrays(root / "a.npz")["x"].tolist() == [0, 1, 2, 3, 4]
try:
    read_json(root / "none.json")
except HeadSteerError as error:
    assert "gs://steer/files/none.json: missing or damaged" in str(error), error

like = {f"layer_{i}": {"kernel": jnp.arange(300.0) + i, "bias": jnp.ones(3) * i} for i in range(20)}
checkpoints = Checkpoints(root / "last", 2)
for step in (1, 2, 3):
    checkpoints.save(step, jax.tree.map(lambda leaf: leaf * step, like), {"step": step})
checkpoints.wait()
tree, about = Checkpoints(root / "last", 2).restore(jax.tree.map(np.asarray, like))
assert about == {"step": 3}
assert all((a == 3 * b).all() for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True))
again = Checkpoints(root / "last", 2)
again.forget_after(2)
assert Checkpoints(root / "last", 2).restore(like)[1] == {"step": 2}

with lock.hold_lock(root):
    try:
        with lock.hold_lock(root):
            raise AssertionError("two runs in one directory")
    except HeadSteerError as error:
        assert "gs://steer/files: another run is writing here" in str(error)
(root / ".lock").write_text("a dead run's")
with lock.hold_lock(root):
    pass
assert not (root / ".lock").exists()

workdir = Workdir(root)
for target, content in ((workdir, "old"), (redirect_stage(workdir, "stage", ("sweep.nc",)), "new")):
    for name in ("stage/started.json", "stage/last/x.json", "sweep.nc", "stage/done.json"):
        write_json(target / name, {"products": ["sweep.nc"], "content": content})
write_json(root / "stage" / "notes.json", "the user's")
replace_stage(workdir, "stage", ("last",), ("sweep.nc",))
for name in ("stage/started.json", "stage/last/x.json", "sweep.nc", "stage/done.json"):
    assert read_json(root / name)["content"] == "new"
assert read_json(root / "stage" / "notes.json") == "the user's"
assert not (root / ".stage.new").exists()
remove_stage(root / "stage", ("last", "notes.json"))
assert not (root / "stage").exists()
print("all is well")
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    """Start a server, and return the environment in which gs://steer exists."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/storage/v1/b/steer", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        yield environment(STORAGE_EMULATOR_HOST=url, TENSORSTORE_GCS_HTTP_URL=url)
    finally:
        server.kill()


def test_files_checkpoints_and_the_lock(bucket: dict[str, str]) -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], env=bucket, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "all is well", result.stderr[-3000:]


@pytest.mark.slow
def test_a_whole_run(bucket: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG)
    command = [sys.executable, str(ROOT / "run.py"), f"--config={config}", "--workdir=gs://steer/run"]
    result = subprocess.run(command, env=bucket, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "gs://steer/run/report.html"
    again = subprocess.run(command, env=bucket, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.stderr.count("done before") == 5
