"""Every program that runs on an accelerator, lowered for TPUs and GPUs on this machine: nothing of it is compiled."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import CLASSES, sae_config, setting, steer_config, tiny_config, trained_model
from lowering import HIGHEST, capture_program, check_accelerator_text, precisions

from headsteer_jax.config import Config
from headsteer_jax.data.dataset import Split
from headsteer_jax.deploy.convert import convert_model
from headsteer_jax.deploy.model import predict
from headsteer_jax.model import passes
from headsteer_jax.model.vit import TrainedModel, build_model
from headsteer_jax.runtime.mesh import local_mesh, members_mesh
from headsteer_jax.sae import latents, residuals, train
from headsteer_jax.sae.autoencoder import encode_compiled
from headsteer_jax.steer import replacement, suffix, table
from headsteer_jax.steer.steering import GateProgram
from headsteer_jax.train.loop import init_state
from headsteer_jax.train.step import make_schedule, make_training_steps

LATENTS = 48  # of tiny_config's autoencoders


@pytest.fixture(autouse=True)
def unnamed_products_stay_unnamed() -> Iterator[None]:
    """Take away the precision that these tests set for products that name none."""
    with jax.default_matmul_precision(None):
        yield


def images(count: int, *leading: int) -> Any:
    return jax.ShapeDtypeStruct((*leading, count, 8, 8, 1), np.uint8)


def training(gated: bool, **gate: Any) -> Any:
    config = tiny_config(**gate)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    model, phase = build_model(config, CLASSES), config.train.gated
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))
    state = jax.eval_shape(lambda p: init_state(p, "gated", config), params)
    steps = make_training_steps(model, config, gated)
    teacher = [params] * (gated and config.gate.teacher_logits > 0)
    return steps.trace(
        state, make_schedule(phase).cut(0, 2), images(16, 2), jax.ShapeDtypeStruct((2, 16), np.int32), *teacher
    )


def autoencoder_step(members: int = 3, **fields: Any) -> Any:
    config = sae_config(**fields)
    c, shape = config.sae, jax.ShapeDtypeStruct((128, 24), np.float32)
    group = train.Members(*(np.repeat(column[:1], members) for column in train.seed_members(c)))
    state = jax.eval_shape(lambda u: train.init_state(c, group, u, LATENTS, 0), shape)
    mesh = members_mesh(members, config.machine)
    with jax.set_mesh(mesh):
        return train.jit_epochs(c, group, 24, 2, 0, mesh, "tpu").trace(state, group, shape, np.int32(0), epochs=2)


TRAINING: dict[str, Callable[[], Any]] = {
    "dense step": lambda: training(False),
    "gated step": lambda: training(True, kinds=("heads", "sublayers", "tokens")),
    "step with a teacher": lambda: training(True, teacher_logits=1.0, teacher_hidden=1.0),
    "TopK": autoencoder_step,
    "one TopK": lambda: autoencoder_step(1),
    "Matryoshka": lambda: autoencoder_step(prefixes=(0.5,)),
    "BatchTopK": lambda: autoencoder_step(activation="batch_topk"),
    "JumpReLU": lambda: autoencoder_step(activation="jumprelu"),
    "ReLU": lambda: autoencoder_step(activation="relu"),
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_programs(name: str) -> None:
    traced = TRAINING[name]()
    found = precisions(traced)
    assert found
    assert None not in found
    check_accelerator_text(traced, LATENTS)


def capture(patch: pytest.MonkeyPatch, module: Any, make: Callable[[TrainedModel, Split], Any], **options: Any) -> Any:
    """Capture a program of (parameters, images) that a function of a model and a split makes, and trace it."""
    trained, few = made_model(**options), Split(np.zeros((9, 8, 8, 1), np.uint8), np.arange(9, dtype=np.int32) % 7)
    program = capture_program(patch, module, lambda: make(trained, few))
    params: Any = trained.params
    if module is replacement:
        params = params, stacked_autoencoder().weights
    return program.trace(params, images(16))


def made_model(**fields: Any) -> TrainedModel:
    config: Config = tiny_config(kinds=("heads", "sublayers", "tokens"))
    return trained_model(config.model_copy(update={"sae": config.sae.model_copy(update=fields)}))


def stacked_autoencoder() -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], setting().sae)


def gate_programs(rows: int = 8) -> list[Any]:
    trained, x, label = trained_model(steer_config()), jnp.zeros((rows, 24)), jnp.zeros(rows, jnp.int32)
    program, steering = GateProgram(trained), setting()
    return [
        run.trace(trained.params, steering, x, label, jnp.zeros(count))
        for run, count in ((program.run_rows, rows), (program.run_grid, 3))
    ]


def observe(trained: TrainedModel, _: Split) -> Any:
    return passes.make_observer(trained.model, trained.config, "thresholded", trained.config.sae_layer)


def cached(patch: pytest.MonkeyPatch, tokens: Any) -> Any:
    return capture(patch, residuals, lambda trained, _: residuals.make_residual_program(trained, (1, 2), tokens))


def tabled(patch: pytest.MonkeyPatch, layer: int) -> Any:
    return capture(patch, table, lambda trained, _: table.make_table_program(trained), layer=layer)


def replaced(trained: TrainedModel, split: Split) -> Any:
    return replacement.measure_replacement(trained, stacked_autoencoder(), split)


def layer_programs() -> list[Any]:
    """A steered layer in which the alphas part, and one in which they have, inside of the model and as its last."""
    trained, mesh, steering = made_model(), local_mesh(), setting()
    programs = []
    for layer, both in ((1, True), (2, True), (1, False), (2, False)):
        form = suffix.find_form(trained, layer, parts=both, closed=not both)
        changed = suffix.LayerSteering(steering, steering) if both or layer == 2 else suffix.NOTHING
        x, label = jnp.zeros((8 if both else 24, 5, 24)), jnp.zeros(8, jnp.int32)
        layer_params = trained.params["params"][f"layers_{layer}"]
        programs.append(suffix.jit_layer(form, mesh).trace(layer_params, changed, jnp.zeros(3), x, label))
    few = jax.ShapeDtypeStruct((8, 8, 8, 1), np.uint8)
    programs.append(suffix.jit_embed(trained.model, trained.config.data, mesh).trace(trained.params, few))
    return [*programs, suffix.jit_classify(trained.model, mesh).trace(trained.params, jnp.zeros((24, 1, 24)))]


def deployed() -> Any:
    model = convert_model(made_model(), tuple("abcdefg"), np.arange(7), (8, 8, 1), dynamic=True)
    return predict.trace(model.config, model.params, images(9))


EXACT_PROGRAMS: dict[str, Callable[[pytest.MonkeyPatch], list[Any]]] = {
    "observer": lambda patch: [capture(patch, passes, observe)],
    "cache": lambda patch: [cached(patch, "cls"), cached(patch, "all")],
    "table of the last layer": lambda patch: [tabled(patch, 2)],
    "table of another layer": lambda patch: [tabled(patch, 1)],
    "replacement": lambda patch: [capture(patch, replacement, replaced)],
    "layers": lambda _: layer_programs(),
    "encode": lambda _: [encode_compiled.trace(setting().sae, jnp.zeros((50, 24)))],
    "gates": lambda _: gate_programs(),
    "deployed": lambda _: [deployed()],
}


@pytest.mark.parametrize("name", EXACT_PROGRAMS)
def test_programs_that_decide_are_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for traced in EXACT_PROGRAMS[name](monkeypatch):
        found = precisions(traced)
        assert found
        assert set(found) == {HIGHEST}
        check_accelerator_text(traced, LATENTS)


def test_top_images_need_no_sort_of_all_latents() -> None:
    top = latents.TopImages(jnp.zeros((LATENTS, 4)), jnp.zeros((LATENTS, 4), jnp.int32), jnp.zeros((LATENTS, 4, 5)))
    check_accelerator_text(latents._merge_top_images.trace(top, jnp.zeros((8, 5, LATENTS)), jnp.int32(0)), LATENTS)
