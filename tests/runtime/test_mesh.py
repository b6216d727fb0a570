"""The same program on any number of devices: the same training to float32's rounding; refusals of uneven divisions."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, environment

MESHES = "1,2,4,8,8 again,2x4,1x8"

# Eight devices are simulated in a separate process, because the flag must be set before JAX is imported.
PROGRAM = """
import sys
from pathlib import Path
import jax, numpy as np
from builders import blobs, concepts, sae_config, tiny_config
from headsteer_jax.config import GateConfig, MachineConfig, PhaseConfig
from headsteer_jax.data.dataset import Dataset
from headsteer_jax.model.vit import build_model
from headsteer_jax.runtime import mesh
from headsteer_jax.runtime.checkpoint import Checkpoints
from headsteer_jax.runtime.hosts import to_numpy
from headsteer_jax.sae.residuals import ResidualsInMemory
from headsteer_jax.sae.train import seed_members, train_members
from headsteer_jax.train import loop
from headsteer_jax.train.log import open_log
from headsteer_jax.train.step import make_schedule, make_training_steps

out, steps = Path(sys.argv[1]), int(sys.argv[2])
assert jax.device_count() == 8
machines = {}
for name in sys.argv[3].split(","):
    data, _, fsdp = name.removesuffix(" again").partition("x")
    machines[name] = MachineConfig(data=int(data), fsdp=int(fsdp or 1))
config = tiny_config()
train = config.train.model_copy(update={"gated": PhaseConfig(steps=steps), "ema": 0.9})
config = config.model_copy(update={"train": train})
images = blobs(16 * steps, 0)
x = concepts(640, 24, np.random.default_rng(0))

def save(name, tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    np.savez(out / f"{name}.npz", **{jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})

params = loop.init_params(build_model(config, 3), config, 0)
for name, machine in machines.items():
    one = config.model_copy(update={"machine": machine})
    devices = mesh.training_mesh(machine)
    start = loop.init_state(params, "gated", one)
    live = mesh.state_shardings(start, devices)
    run = make_training_steps(build_model(one, 3), one, True, live)
    batches = images.images.reshape(steps, 16, 8, 8, 1), images.labels.reshape(steps, 16)
    state, metrics = run(mesh.place(start, live), make_schedule(one.train.gated), *batches)
    if machine.fsdp > 1:
        kernel = state.optimizer[1][0].mu["params"]["layers_1"]["mlp_in"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // machine.fsdp
    save(f"vit {name}", to_numpy({"params": state.params, "average": state.average, "loss": metrics["loss"]}))
taught = GateConfig(kinds=("heads", "sublayers", "tokens"), budget=0.6, teacher_logits=1.0, teacher_hidden=0.5)
taught = config.model_copy(update={"gate": taught})
params = loop.init_params(build_model(taught, 3), taught, 0)
for name, machine in machines.items():
    one = taught.model_copy(update={"machine": machine})
    devices = mesh.training_mesh(machine)
    start = loop.init_state(params, "gated", one)
    live = mesh.state_shardings(start, devices)
    run = make_training_steps(build_model(one, 3), one, True, live)
    batches = images.images[:160].reshape(10, 16, 8, 8, 1), images.labels[:160].reshape(10, 16)
    batches = make_schedule(one.train.gated).cut(0, 10), *batches, mesh.place(params, live.params)
    state, metrics = run(mesh.place(start, live), *batches)
    save(f"taught {name}", to_numpy({"params": state.params, "loss": metrics["loss"]}))
for name, machine in machines.items():
    if machine.fsdp > 1:
        continue
    one = sae_config(epochs=5, learning_rate=3e-3).model_copy(update={"machine": machine})  # five epochs of ten steps
    members = train_members(one, seed_members(one.sae), ResidualsInMemory(x), out / f"sae {name}")
    save(f"sae {name}", {"weights": members.weights, "curves": members.curves})

# A run that is stopped on one mesh goes on on another.
class Stop(Exception): pass
real = Checkpoints.save
def stopping(self, step, tree, about):
    real(self, step, tree, about)
    if step == 4 and self.directory.name == "last":
        self.wait()
        raise Stop
dataset = Dataset(blobs(96, 0), blobs(30, 1), blobs(30, 2), ("a", "b", "c"))
for name, meshes in {"whole": ("8",), "parts": ("2x4", "1")}.items():
    for part in meshes:
        one = tiny_config().model_copy(update={"machine": machines[part]})
        params = loop.init_params(build_model(one, 3), one, 0)
        Checkpoints.save = stopping if name == "parts" and part == "2x4" else real
        try:
            with open_log(out / name, one) as log:
                state = loop.train_phase(build_model(one, 3), params, "dense", dataset, one, out / name, log)
        except Stop:
            assert Checkpoints(out / name / "dense" / "last", 2).latest() == 4
    save(f"resumed {name}", to_numpy(state.params))
"""


def start(program: str, *arguments: object, devices: int = 8) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(devices), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mesh")
    result = start(PROGRAM, out, 50, MESHES)
    assert result.returncode == 0, result.stderr[-3000:]
    return out


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as found:
        return dict(found)


def furthest(path: Path, other: Path) -> float:
    """Return the largest difference of two trees, relative to the largest number in each array.

    The keys' biases are left out: softmax does not depend on them, so that their gradient is only rounding, which Adam
    turns into steps.
    """
    one, two = arrays(path), arrays(other)
    assert one.keys() == two.keys()
    names = [name for name in one if "['key']['bias']" not in name]
    return max(float(np.abs(one[name] - two[name]).max() / (np.abs(one[name]).max() + 1e-30)) for name in names)


@pytest.mark.slow
def test_fifty_steps_are_the_same_on_every_mesh_and_a_mesh_gives_the_same_bits(trained: Path) -> None:
    for machine in MESHES.split(",")[1:]:
        assert 0 < furthest(trained / "vit 1.npz", trained / f"vit {machine}.npz") < 2e-5
        assert 0 < furthest(trained / "taught 1.npz", trained / f"taught {machine}.npz") < 2e-5
        if "x" not in machine:
            assert furthest(trained / "sae 1.npz", trained / f"sae {machine}.npz") < 5e-6
    for what in ("vit", "sae"):
        one, two = (arrays(trained / f"{what} {name}.npz") for name in ("8", "8 again"))
        for name, values in one.items():
            np.testing.assert_array_equal(values, two[name])


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(trained: Path) -> None:
    assert furthest(trained / "resumed whole.npz", trained / "resumed parts.npz") < 2e-5


REFUSED = [
    ("data=16", 16, "config.machine.data: the mesh has 16 x 1 devices, but there are 8"),
    ("fsdp=16", 16, "config.machine.fsdp: the mesh has 16 devices, but there are 8"),
    ("fsdp=3", 16, "config.machine.fsdp = 3: must be a divisor of the 8 devices"),
    ("data=0", 12, "config.train.batch = 12: must be a multiple of 8 (8 devices)"),
    ("data=3", 16, "config.train.batch = 16: must be a multiple of 3 (3 devices)"),
    ("data=4, fsdp=2", 36, "config.train.batch = 36: must be a multiple of 8 (8 devices)"),
]


def test_what_cannot_be_divided() -> None:
    program = """
from headsteer_jax.config import Config, MachineConfig, TrainConfig
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime import mesh
"""
    for machine, batch, _ in REFUSED:
        program += f"""
machine = MachineConfig({machine})
try:
    mesh.check_batch(Config(train=TrainConfig(batch={batch}), machine=machine), mesh.training_mesh(machine))
    print("no error")
except HeadSteerError as error:
    print(error)
"""
    result = start(program)
    for line, (_, _, says) in zip(result.stdout.splitlines(), REFUSED, strict=True):
        assert line.startswith(says)
