"""The answer under every gate pattern of one layer, for every image of a split, from one pass over the split.

Steering a layer's gates changes nothing before that layer, so one pass keeps its input; what follows depends only on
which of the 2^G gate patterns an image gets. Every setting is then a gate pattern and a look-up. Above MOST_HEADS heads
there are too many patterns: a sample of them serves the controls, and steering runs the suffix (`steering.py`).

Axes: B, N images, T tokens, D width, H heads, K head width, G gates of the layer that read its CLS residual (the heads,
then attention and the MLP, as far as the layer gates them), P gate patterns (bit g of a pattern is gate g), C classes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from headsteer_jax.config.schema import Config
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import Split
from headsteer_jax.model.call_limits import choose_call_limits
from headsteer_jax.model.macs import count_macs_from
from headsteer_jax.model.passes import Program, compile_program_within_memory, per_image_program, run_over_split
from headsteer_jax.model.vit import Intervention, TrainedModel, ViT, predict_class
from headsteer_jax.runtime.mesh import local_mesh
from headsteer_jax.runtime.precision import EXACT
from headsteer_jax.steer.gates import LayerGates, force_gates, gates_to_pattern

ROWS_PER_PRODUCT = 2048  # rows of the products that fill the table: more leave a CPU's cache


def list_patterns(config: Config) -> np.ndarray:
    """List the gate patterns of a table, [P] int64, ascending.

    Up to MOST_HEADS heads these are all 2^G patterns. Above, they are a sample of steer.subsets patterns: no gate and
    all gates, every single gate, every set that lacks one gate, and random sets, equally many of each size.
    """
    gates = LayerGates(config, config.sae_layer)
    if gates.fits_table:
        return np.arange(2**gates.count)
    singles = 1 << np.arange(gates.count, dtype=np.int64)
    everything = int(singles.sum())
    patterns = {0, everything, *singles.tolist(), *(everything - singles).tolist()}
    rng = np.random.default_rng([config.seed, 6])
    while len(patterns) < config.steer.subsets:  # there are 2^13 or more patterns, far more than this
        for size in range(2, gates.count - 1):
            patterns.add(int(singles[rng.permutation(gates.count)[:size]].sum()))
    return np.array(sorted(patterns))


def predict_under_patterns(
    model: ViT, params: Any, x_BTD: jax.Array, gates: LayerGates, patterns_P: jax.Array
) -> jax.Array:
    """Predict [P, B] int32 classes with a layer's gates open as each pattern says, whatever they decide themselves.

    The gates of the patches decide as they do without steering. In the last layer only the CLS query is needed, and
    attention does not depend on the heads' gates: each head's contribution to the CLS residual [B, H, D] is computed
    once, a pattern sums the contributions of its heads, and the MLP of one token follows.
    """
    count, layer = x_BTD.shape[0], gates.layer
    gates_PG = ((patterns_P[:, None] >> jnp.arange(gates.count)) & 1).astype(jnp.float32)

    def run(m: ViT) -> jax.Array:
        if layer == model.model.depth - 1:
            always_BD, contribution_BHD = m.last_contributions(x_BTD)

            def sum_contributions(g_G: jax.Array) -> jax.Array:
                by_kind = {kind: g[None] for kind, g in gates.split(g_G).items()}
                g_H = by_kind["heads"][0] if "heads" in by_kind else jnp.ones(model.model.heads)
                sum_BD = jnp.einsum("H,BHD->BD", g_H, contribution_BHD, precision=EXACT)
                return predict_class(m.last_logits(x_BTD[:, 0], always_BD + sum_BD, by_kind))

            return jax.lax.map(sum_contributions, gates_PG, batch_size=max(1, ROWS_PER_PRODUCT // count))

        def run_rest(g_G: jax.Array) -> jax.Array:
            intervention = Intervention(gates=force_gates(gates, g_G, count))
            last_BTD, _ = m.blocks(x_BTD, layer, interventions={layer: intervention})
            return predict_class(m.classify(last_BTD[:, 0]))

        return jax.lax.map(run_rest, gates_PG)

    return model.apply(params, method=run)


def count_kept_patches(model: ViT, params: Any, x_BTD: jax.Array, layer: int) -> jax.Array:
    """Count the patches that a layer keeps of each image, from the residual that enters it: [B] int32."""
    first = 1 + model.model.registers
    if "tokens" not in model.gate.kinds_in(layer):
        return jnp.full(len(x_BTD), x_BTD.shape[1] - first, jnp.int32)
    logits_BN = model.apply(params, x_BTD[:, first:], layer, "tokens", method="gate_logits")
    return jnp.sum(logits_BN > 0, axis=-1, dtype=jnp.int32)


class Outcomes(NamedTuple):
    """The unsteered gates of some images, and whether the answer would be right under every gate pattern."""

    labels: np.ndarray  # [N]
    gate_logits: np.ndarray  # [N, G] unsteered
    right: np.ndarray  # [N, P] bool: is the answer right under the pattern
    pattern: np.ndarray  # [N] int64, the unsteered gates

    @property
    def right_unsteered(self) -> np.ndarray:
        """[N] bool: is the unsteered model's answer right."""
        return self.right[np.arange(len(self.labels)), self.pattern]


class Table(NamedTuple):
    """A split up to the steered layer, and all that the layer's gates can lead to."""

    x: np.ndarray  # [N, D] float32 CLS residual that enters the layer
    gate_logits: np.ndarray  # [N, G] float32, unsteered
    pattern: np.ndarray  # [N] int32, the unsteered gates
    prediction: np.ndarray  # [N] int32, the unsteered model's
    answers: np.ndarray  # [N, P] int32, the prediction under each listed pattern
    kept_patches: np.ndarray  # [N] int32, the patches that the layer keeps
    confidence: np.ndarray  # [N] float32, the unsteered model's largest probability (softmax)
    macs_from: np.ndarray  # [N] float32, MACs of the unsteered model from the layer's input to the logits

    def outcomes(self, labels: np.ndarray) -> Outcomes:
        """Compare every answer with the images' labels [N]."""
        return Outcomes(labels, self.gate_logits, self.answers == labels[:, None], self.pattern.astype(np.int64))


def make_table_program(trained: TrainedModel, mesh: Mesh | None = None) -> Program:
    """Make the pass that fills a table, for as many images as a call may have; see `per_image_program` for `mesh`."""
    config, model = trained.config, trained.model
    gates, listed_P = LayerGates(config, config.sae_layer), jnp.asarray(list_patterns(config), jnp.int32)

    def run(params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        x_BTD = model.apply(params, preprocess(images, config.data), gates.layer, method="before")
        m_BG = gates.logits(model, params, x_BTD[:, 0])
        answers_BP = predict_under_patterns(model, params, x_BTD, gates, listed_P).T
        pattern_B = gates_to_pattern(m_BG)
        last_BTD, out = model.apply(params, x_BTD, gates.layer, method="blocks")
        logits_BC = model.apply(params, last_BTD[:, 0], method="classify")
        if gates.fits_table:
            prediction_B = jnp.take_along_axis(answers_BP, pattern_B[:, None], axis=1)[:, 0]
        else:
            prediction_B = predict_class(logits_BC)
        confidence_B = jnp.max(jax.nn.softmax(logits_BC), axis=-1)
        macs_B = count_macs_from(config, logits_BC.shape[1], gates.layer, out["gates"])
        patches_B = count_kept_patches(model, params, x_BTD, gates.layer)
        return x_BTD[:, 0], m_BG, pattern_B, prediction_B, answers_BP, patches_B, confidence_B, macs_B

    return per_image_program(run, choose_call_limits(model, config.machine, mesh or local_mesh()).images, mesh=mesh)


def compile_table_program(trained: TrainedModel, split: Split, mesh: Mesh | None = None) -> Program:
    """Compile the pass that fills a table, within the memory budget, for images like a split's.

    Raises:
      HeadSteerError: the budget is too small for one image.
    """
    program, config = make_table_program(trained, mesh), trained.config
    memory = choose_call_limits(trained.model, config.machine, mesh or local_mesh()).memory
    return compile_program_within_memory(program, trained.params, split, memory, mesh)


def fill_table(program: Program, params: Any, split: Split, description: str) -> Table:
    """Fill a split's table in one pass; `description` names the work in the progress bar."""
    return Table(*run_over_split(program, params, split, description, predicted=Table._fields.index("prediction")))
