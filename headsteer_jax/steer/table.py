"""The answer under every gate pattern of one layer, for every image of a split, from one pass over the split.

Steering a layer's gate changes nothing before that layer, so one pass keeps its input; what follows depends only on
which of the 2^H gate patterns an image gets. Every setting is then a gate pattern and a look-up. Above MOST_HEADS heads
there are too many patterns: a sample of them serves the controls, and steering runs the suffix (`steering.py`).

Axes: B, N images, T tokens, D width, H heads, K head width, P gate patterns (bit h of a pattern is head h), C classes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.config.schema import MOST_HEADS, Config
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import Split
from headsteer_jax.model.passes import Program, compile_program_within_memory, per_image_program, run_over_split
from headsteer_jax.model.vit import Intervention, TrainedModel, ViT, predict_class

ROWS_PER_PRODUCT = 2048  # rows of the products that fill the table: more leave a CPU's cache


def gates_to_pattern(g_BH: jax.Array) -> jax.Array:
    """Convert [..., H] gates to [...] int32 patterns, whose bit h is head h."""
    return jnp.sum((g_BH > 0) << jnp.arange(g_BH.shape[-1]), axis=-1, dtype=jnp.int32)


def pattern_to_gates(pattern: np.ndarray, heads: int) -> np.ndarray:
    """Convert [...] patterns to [..., H] bool gates."""
    return (np.asarray(pattern)[..., None] >> np.arange(heads)) & 1 > 0


def list_patterns(config: Config) -> np.ndarray:
    """List the gate patterns of a table, [P] int64, ascending.

    Up to MOST_HEADS heads these are all 2^H patterns. Above, they are a sample of steer.subsets patterns: no head and
    all heads, every single head, every set that lacks one head, and random sets, equally many of each size.
    """
    heads, count = config.model.heads, config.steer.subsets
    if heads <= MOST_HEADS:
        return np.arange(2**heads)
    singles = 1 << np.arange(heads, dtype=np.int64)
    everything = int(singles.sum())
    patterns = {0, everything, *singles.tolist(), *(everything - singles).tolist()}
    rng = np.random.default_rng([config.seed, 6])
    while len(patterns) < count:  # there are 2^13 or more patterns, far more than this
        for size in range(2, heads - 1):
            patterns.add(int(singles[rng.permutation(heads)[:size]].sum()))
    return np.array(sorted(patterns))


def predict_under_patterns(model: ViT, params: Any, x_BTD: jax.Array, layer: int, patterns_P: jax.Array) -> jax.Array:
    """Predict [P, B] int32 classes with `layer` running each pattern's heads, whatever its gate says.

    In the last layer only the CLS query is needed, and attention does not depend on the gates: each head's
    contribution to the CLS residual [B, H, D] is computed once, a pattern sums the contributions of its heads, and the
    MLP of one token follows.
    """
    count, heads, depth = x_BTD.shape[0], model.model.heads, model.model.depth
    gates_PH = ((patterns_P[:, None] >> jnp.arange(heads)) & 1).astype(jnp.float32)

    def run(m: ViT) -> jax.Array:
        if layer == depth - 1:
            always_BD, contribution_BHD = m.last_contributions(x_BTD)

            def sum_contributions(g_H: jax.Array) -> jax.Array:
                sum_BD = jnp.einsum("H,BHD->BD", g_H, contribution_BHD, precision=jax.lax.Precision.HIGHEST)
                return predict_class(m.last_logits(x_BTD[:, 0], always_BD + sum_BD, {"heads": g_H[None]}))

            return jax.lax.map(sum_contributions, gates_PH, batch_size=max(1, ROWS_PER_PRODUCT // count))

        def force_gates(g_H: jax.Array) -> jax.Array:
            intervention = Intervention(gates=jnp.broadcast_to(g_H, (count, heads)))
            last_BTD, _ = m.blocks(x_BTD, layer, interventions={layer: intervention})
            return predict_class(m.classify(last_BTD[:, 0]))

        return jax.lax.map(force_gates, gates_PH)

    return model.apply(params, method=run)


class Outcomes(NamedTuple):
    """The unsteered gates of some images, and whether the answer would be right under every gate pattern."""

    labels: np.ndarray  # [N]
    gate_logits: np.ndarray  # [N, H] unsteered
    right: np.ndarray  # [N, P] bool: is the answer right under the pattern
    pattern: np.ndarray  # [N] int64, the unsteered gates

    @property
    def right_unsteered(self) -> np.ndarray:
        """[N] bool: is the unsteered model's answer right."""
        return self.right[np.arange(len(self.labels)), self.pattern]


class Table(NamedTuple):
    """A split up to the steered layer, and all that the layer's gates can lead to."""

    x: np.ndarray  # [N, D] float32 CLS residual that enters the layer
    gate_logits: np.ndarray  # [N, H] float32, unsteered
    pattern: np.ndarray  # [N] int32, the unsteered gates
    prediction: np.ndarray  # [N] int32, the unsteered model's
    answers: np.ndarray  # [N, P] int32, the prediction under each listed pattern

    def outcomes(self, labels: np.ndarray) -> Outcomes:
        """Compare every answer with the images' labels [N]."""
        return Outcomes(labels, self.gate_logits, self.answers == labels[:, None], self.pattern.astype(np.int64))


def compile_table_program(trained: TrainedModel, split: Split) -> Program:
    """Compile the pass that fills a table, within the memory budget, for images like a split's.

    Raises:
      HeadSteerError: the budget is too small for one image.
    """
    config, model = trained.config, trained.model
    layer, listed_P = config.sae_layer, jnp.asarray(list_patterns(config), jnp.int32)

    def run(params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        x_BTD = model.apply(params, preprocess(images, config.data), layer, method="before")
        m_BH = model.apply(params, x_BTD[:, 0], layer, method="gate_logits")
        answers_BP = predict_under_patterns(model, params, x_BTD, layer, listed_P).T
        pattern_B = gates_to_pattern(m_BH)
        if len(listed_P) == 2**config.model.heads:
            prediction_B = jnp.take_along_axis(answers_BP, pattern_B[:, None], axis=1)[:, 0]
        else:
            last_BTD, _ = model.apply(params, x_BTD, layer, method="blocks")
            prediction_B = predict_class(model.apply(params, last_BTD[:, 0], method="classify"))
        return x_BTD[:, 0], m_BH, pattern_B, prediction_B, answers_BP

    program = per_image_program(run, config.machine.sweep_chunk)
    return compile_program_within_memory(program, trained.params, split, config.machine.sweep_memory)


def fill_table(program: Program, params: Any, split: Split, description: str) -> Table:
    """Fill a split's table in one pass; `description` names the work in the progress bar."""
    return Table(*run_over_split(program, params, split, description))
