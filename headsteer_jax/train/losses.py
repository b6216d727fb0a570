"""The losses of the gated phase beside the cross-entropy: on what the gates let run, and on the distance to a teacher.

What runs is limited in one of two ways:

- `gate.budget` > 0: one loss on the multiply-accumulates of the batch, as a share of the dense model's;
- otherwise each kind of gate has a target for its usage, as in [AdaViT].

The form of either is |x - target| or its square, and both reach the gates through their straight-through gradients.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from headsteer_jax.config.schema import Config, GateConfig
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.gates import Gates, anneal_target, threshold, usage_loss
from headsteer_jax.model.macs import count_dense_macs, count_macs
from headsteer_jax.model.vit import stack_gates

Metrics = dict[str, jax.Array]


def name_usage(name: str, kind: str) -> str:
    """Return a metric's name for one kind of gate; the heads' have no suffix."""
    return name if kind == "heads" else f"{name}_{kind}"


def compute_macs_share(config: Config, classes: int, gates: Mapping[int, Gates]) -> jax.Array:
    """Compute the mean multiply-accumulates of images as a share of the dense model's, from their gates.

    Args:
      gates: by layer and kind, as `out["gates"]`.
    """
    return jnp.mean(count_macs(config, classes, gates)) / float(count_dense_macs(config, classes))  # beyond int32


def compute_least_share(config: Config, classes: int) -> float:
    """Compute the multiply-accumulates that no gate can switch off, as a share of the dense model's."""
    m = config.model
    counts = {"heads": m.heads, "sublayers": 2, "tokens": (config.data.image_size // m.patch) ** 2}
    closed: dict[int, Gates] = {
        layer: {kind: jnp.zeros((1, counts[kind])) for kind in config.gate.kinds_in(layer)}
        for layer in config.gated_layers
    }
    return float(compute_macs_share(config, classes, closed))


def check_budget(config: Config, classes: int) -> None:
    """Check that gates can reach the budget.

    Raises:
      HeadSteerError: what no gate can switch off costs more.
    """
    budget = config.gate.budget
    if budget and budget < (least := compute_least_share(config, classes)):
        raise HeadSteerError(
            f"config.gate.budget = {budget}: must be at least {math.ceil(least * 1e4) / 1e4}, because these gates "
            "cannot switch off the rest; raise it, gate more kinds (config.gate.kinds) or earlier layers (first_layer)"
        )


def limit_usage(
    config: Config, classes: int, gates: Mapping[int, Gates], logits: Mapping[int, Gates], progress: jax.Array
) -> tuple[jax.Array, Metrics]:
    """Compute the weighted loss on what the gates let run, and the metrics of all gates.

    Args:
      gates: sampled gates by layer and kind.
      logits: their logits in the same form.
      progress: the share of the phase that is done.
    """
    gate, metrics = config.gate, {}
    stacked = {kind: stack_gates(gates, kind) for kind in gate.kinds}
    counts_running = gate.running_only and {"heads", "sublayers"} <= set(gate.kinds)
    running_BA = _find_running_blocks(config, gates) if counts_running else None
    terms = []
    for kind, g_BAn in stacked.items():
        metrics[name_usage("usage_sampled", kind)] = _mean_by_layer(g_BAn, kind)
        metrics[name_usage("usage_thresholded", kind)] = _mean_by_layer(threshold(stack_gates(logits, kind)), kind)
        if not gate.budget:
            target = anneal_target(gate, progress, gate.settings(kind).target)
            terms.append(usage_loss(g_BAn, target, gate, kind, running_BA if kind == "heads" else None))
            metrics[name_usage("usage_target", kind)] = target
    thresholded = {layer: {kind: threshold(m) for kind, m in by_kind.items()} for layer, by_kind in logits.items()}
    share = compute_macs_share(config, classes, gates)
    metrics |= {"macs_sampled": share, "macs_thresholded": compute_macs_share(config, classes, thresholded)}
    if gate.budget:
        metrics["macs_target"] = anneal_target(gate, progress, gate.budget)
        gap = share - metrics["macs_target"]
        terms.append(jnp.abs(gap) if gate.loss == "absolute" else gap**2)
    pressure = gate.weight * sum(terms[1:], terms[0])
    return pressure, metrics | {"usage_loss": pressure}


def _mean_by_layer(g_BAn: jax.Array, kind: str) -> jax.Array:
    """Compute the usage of each layer [A]; that of sublayers for attention and MLP apart [A, 2]."""
    return jnp.mean(g_BAn, axis=0 if kind == "sublayers" else (0, 2))


def _find_running_blocks(config: Config, gates: Mapping[int, Gates]) -> jax.Array:
    """Find the blocks of each image, among those that gate heads, whose attention or MLP runs -> [B, A] 0 or 1."""
    running = [
        jnp.max(threshold(gates[layer]["sublayers"]), axis=-1)
        if "sublayers" in gates[layer]
        else jnp.ones(len(gates[layer]["heads"]))
        for layer in config.layers_with("heads")
    ]
    return jax.lax.stop_gradient(jnp.stack(running, axis=1))


def has_teacher(gate: GateConfig) -> bool:
    """Say whether the dense phase's model teaches the gated one."""
    return gate.teacher_logits > 0 or gate.teacher_hidden > 0


def is_taught(config: Config, phase: str) -> bool:
    """Say whether the dense phase's model teaches in a phase."""
    return phase == "gated" and has_teacher(config.gate)


def follow_teacher(
    gate: GateConfig, student: tuple[jax.Array, jax.Array], teacher: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, Metrics]:
    """Compute the weighted distance of a model to its teacher on the same images.

    Logits are compared by T^2 KL(softmax(teacher / T) || softmax(student / T)), so that the gradient does not shrink
    with the temperature T (arXiv:1503.02531). The CLS residuals after the last layer are compared by the mean squared
    difference of their components, each residual standardised to mean 0 and variance 1, because residuals have no
    natural scale.

    Args:
      student: logits [B, C] and CLS residuals [B, D].
      teacher: the same of the teacher, which gets no gradient.
    """
    logits_BC, x_BD = student
    teacher_BC, teacher_BD = jax.lax.stop_gradient(teacher)
    T, metrics = gate.teacher_temperature, {}
    if gate.teacher_logits:
        log_p, log_q = (jax.nn.log_softmax(z_BC / T) for z_BC in (teacher_BC, logits_BC))
        divergence = jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))
        metrics["teacher_logits"] = gate.teacher_logits * T**2 * divergence
    if gate.teacher_hidden:
        gap_BD = jax.nn.standardize(x_BD) - jax.nn.standardize(teacher_BD)
        metrics["teacher_hidden"] = gate.teacher_hidden * jnp.mean(gap_BD**2)
    return sum(metrics.values(), jnp.zeros(())), metrics
