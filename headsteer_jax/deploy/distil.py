"""Training of a cut model for a few minutes, with the dense model as its teacher.

The loss is the cross-entropy of the labels plus the distance to the teacher's logits, on augmented images of the
classes. The optimizer is that of the run, with the gated phase's learning rate.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from headsteer_jax.config.schema import Config, GateConfig, PhaseConfig
from headsteer_jax.data.augment import augment_and_normalise
from headsteer_jax.data.batches import batch_indices
from headsteer_jax.data.dataset import Split, gather_images
from headsteer_jax.deploy.model import DeployedModel, compute_logits_and_cls
from headsteer_jax.runtime.progress import progress
from headsteer_jax.train.losses import follow_teacher
from headsteer_jax.train.step import make_learning_rate, make_optimizer

TEACHING = GateConfig(teacher_logits=1.0, teacher_temperature=2.0)
STEPS_PER_CALL = 10  # in one program: allocating its buffers afresh costs a CPU a quarter of a small step


def distil_model(
    student: DeployedModel, teacher: DeployedModel, train: Split, steps: int, config: Config
) -> DeployedModel:
    """Train a cut model on the images of its classes.

    Args:
      teacher: the dense model for the same classes.
      steps: the number of optimizer steps; it is rounded up to a multiple of STEPS_PER_CALL.
      config: the run's, for augmentation, batch, optimizer and seed.
    """
    calls = -(-steps // STEPS_PER_CALL)
    phase = PhaseConfig(steps=calls * STEPS_PER_CALL, learning_rate=config.train.gated.learning_rate)
    batch = min(config.train.batch, len(train.labels))
    optimizer = make_optimizer(config, make_learning_rate(phase))
    run_call = _compile_call(student, teacher, optimizer, config)
    params: Any = jax.tree.map(jnp.asarray, student.params)
    state, key = optimizer.init(params), jax.random.fold_in(jax.random.key(config.seed), 4)
    before = None  # the loss of the call before: that of the current one would make the host wait for it
    with progress(phase.steps, "deploy: distilling") as bar:
        for call in range(calls):
            rows = range(call * STEPS_PER_CALL, (call + 1) * STEPS_PER_CALL)
            indices = np.stack([batch_indices(len(train.labels), batch, config.seed, step) for step in rows])
            images = gather_images(train.images, indices.ravel())
            images = images.reshape(*indices.shape, *images.shape[1:])
            params, state, loss = run_call(
                params, state, teacher.params, jax.random.fold_in(key, call), images, train.labels[indices]
            )
            bar.update(STEPS_PER_CALL, "" if before is None else f"loss {float(before):.3f}")
            before = loss
    return DeployedModel(student.config, jax.tree.map(np.asarray, params))


def _compile_call(
    student: DeployedModel, teacher: DeployedModel, optimizer: optax.GradientTransformation, config: Config
) -> Any:
    """Compile several steps: (params, state, teacher's params, key, images [n, B, ...], labels [n, B])."""
    classes = len(student.config.classes)

    def compute_loss(params: Any, taught: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        answer = compute_logits_and_cls(student.config, params, images)
        lesson = compute_logits_and_cls(teacher.config, taught, images)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, classes), config.train.label_smoothing)
        distance, _ = follow_teacher(TEACHING, answer, lesson)
        return jnp.mean(optax.softmax_cross_entropy(answer[0], targets)) + distance

    def run_steps(params: Any, state: Any, taught: Any, key: jax.Array, images: Any, labels: Any) -> Any:
        def step(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
            (params, state), (key, images, labels) = carry, batch
            images = augment_and_normalise(key, images, config.data)
            loss, gradient = jax.value_and_grad(compute_loss)(params, taught, images, labels)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), loss

        batches = (jax.random.split(key, len(images)), images, labels)
        (params, state), losses = jax.lax.scan(step, (params, state), batches)
        return params, state, jnp.mean(losses)

    return jax.jit(run_steps, donate_argnums=(0, 1))
