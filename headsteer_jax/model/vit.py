"""The vision transformer with gates, in flax.linen: pre-norm blocks [ViT] whose parts a gate may drop [AdaViT].

A block with gates g of its heads, a and f of attention and MLP, and t of its tokens computes

    x <- x + a t Attention(kept tokens, kept heads),  x <- x + f t MLP(x),

where t is 1 for CLS and the registers: a dropped patch keeps its residual, and a later block may take it up again.

Everything that an analysis needs is returned in `out`; nothing is hooked. An `Intervention` is an argument: it forces a
layer's gates, or changes what they read. The forward pass can be cut at any layer: `blocks(embed(images), 0)` runs all
layers, and `blocks(x, l)` those from layer l on.

Axes: B images, T tokens (CLS, registers, patches), N patches, Q tokens that are queries, D width, H heads, K head
width, L layers, A gated layers, C classes.
"""

import hashlib
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.config.schema import GATE_KINDS, Config, GateConfig, GateKind, ModelConfig
from headsteer_jax.model import gpu
from headsteer_jax.model.gates import (
    SUBLAYERS,
    Gate,
    Gates,
    logistic_noise,
    mask_softmax,
    straight_through,
    threshold,
)
from headsteer_jax.runtime.precision import EXACT, training_precision
from headsteer_jax.runtime.settings import gives_up_bits

Gating = Literal["dense", "sampled", "thresholded"]
# how a training step is computed: as written here; with the parts of `model/gpu.py`; with cuDNN's attention as well
Form = Literal["plain", "gpu", "cudnn"]
ALL_OPEN: Gates = types.MappingProxyType({})


class Patches(nn.Module):
    """A convolution of windows that do not overlap, computed as one matrix product, with `nn.Conv`'s parameters.

    XLA's CPU compiler would make of `nn.Conv` a kernel gradient that takes as long as three blocks.
    """

    patch: int
    width: int  # D
    dtype: jnp.dtype
    precision: Any

    @nn.compact  # type: ignore[untyped-decorator]  # mypy reads flax as Any
    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        """Embed the patches, row by row: [B, height, width, C] -> [B, patches, D]. Incomplete patches are cut off."""
        p, (B, height, width, channels) = self.patch, images_BHWC.shape
        rows, columns = height // p, width // p
        kernel_ppCD = self.param("kernel", nn.initializers.lecun_normal(), (p, p, channels, self.width))
        bias_D = self.param("bias", nn.initializers.zeros, (self.width,))
        windows = images_BHWC[:, : rows * p, : columns * p].reshape(B, rows, p, columns, p, channels)
        pixels_NP = windows.transpose(0, 1, 3, 2, 4, 5).reshape(B * rows * columns, -1).astype(self.dtype)
        kernel_PD = kernel_ppCD.reshape(-1, self.width).astype(self.dtype)
        x_ND = jnp.matmul(pixels_NP, kernel_PD, precision=self.precision) + bias_D.astype(self.dtype)
        return x_ND.reshape(B, rows * columns, self.width)


class Block(nn.Module):
    """A transformer block, in two halves, so that a sweep recomputes only what a gate changes.

    Its gates are arguments. A kind that is missing from them is all open, and then nothing is multiplied.
    """

    model: ModelConfig
    gate: GateConfig
    kinds: tuple[GateKind, ...]  # the kinds of gates that this layer decides
    precision: Any = EXACT  # of the products
    form: Form = "plain"
    tokens: int = 0  # of an image, which form "cudnn" needs: `gpu.pad_tokens` may have appended one
    devices: int = 1  # that the images are divided among, for the forms of GPUs

    def setup(self) -> None:
        """Make the submodules."""
        m = self.model
        dtype = jnp.dtype(m.dtype)
        dense = {"dtype": dtype, "precision": self.precision, "kernel_init": nn.initializers.xavier_uniform()}
        self.norm1 = nn.LayerNorm(epsilon=m.layer_norm_epsilon)
        self.query, self.key, self.value, self.out = (nn.Dense(m.width, **dense) for _ in range(4))
        self.norm2 = nn.LayerNorm(epsilon=m.layer_norm_epsilon)
        self.mlp_in = nn.Dense(round(m.mlp_ratio * m.width), bias_init=nn.initializers.normal(1e-6), **dense)
        self.mlp_out = nn.Dense(m.width, bias_init=nn.initializers.normal(1e-6), **dense)
        gate, epsilon = self.gate, m.layer_norm_epsilon
        if "heads" in self.kinds:
            self.decide = Gate(m.heads, gate.settings("heads"), gate.layer_norm, epsilon)
        if "sublayers" in self.kinds:
            self.decide_sublayers = Gate(len(SUBLAYERS), gate.settings("sublayers"), gate.layer_norm, epsilon)
        if "tokens" in self.kinds:
            self.decide_tokens = Gate(1, gate.settings("tokens"), False, epsilon)

    def gate_logits(self, x: jax.Array, kind: GateKind = "heads") -> jax.Array:
        """Compute the gate logits m of one kind.

        Args:
          x: the residuals that the gates read: of CLS [B, D] for heads and sublayers, of the patches [B, N, D] for
            tokens.

        Returns:
          [B, H], [B, 2] or [B, N] float32.
        """
        if kind == "tokens":
            return self.decide_tokens(self.norm1(x) if self.gate.tokens.normalise else x)[..., 0]
        return self.decide(x) if kind == "heads" else self.decide_sublayers(x)

    def heads(self, x_BTD: jax.Array, queries: int | None, gates: Gates = ALL_OPEN) -> tuple[jax.Array, jax.Array]:
        """Compute each head's output before its gate, for the first `queries` tokens (None: all).

        Of the gates only those of the tokens count here: they choose the keys.

        Returns:
          y_BQHK, the result of attention, and v_BQHK, the values of the same tokens.
        """
        n_BTD = self.norm1(x_BTD)
        q_BQHK = self._split(self._apply(self.query, n_BTD[:, :queries]))
        k_BTHK, v_BTHK = self._split(self._apply(self.key, n_BTD)), self._split(self._apply(self.value, n_BTD))
        if self.form == "cudnn" and queries is None:
            return gpu.attend(q_BQHK, k_BTHK, v_BTHK, self.tokens), v_BTHK
        tokens, own_queries = x_BTD.shape[1], q_BQHK.shape[1]
        if self.form != "plain":
            q_BQHK, k_BTHK, v_BTHK = (gpu.pad_tokens(heads, gpu.ALIGNMENT) for heads in (q_BQHK, k_BTHK, v_BTHK))
        padding = k_BTHK.shape[1] - tokens
        scores_BHQT = jnp.einsum("BQHK,BTHK->BHQT", q_BQHK, k_BTHK, precision=self.precision)
        scores_BHQT = (scores_BHQT / (q_BQHK.shape[-1] ** 0.5)).astype(jnp.float32)
        if "tokens" in gates:
            keep_BT = jnp.pad(self._keep(gates["tokens"]), ((0, 0), (0, padding)))
            weights_BHQT = mask_softmax(scores_BHQT, keep_BT)
        else:
            if padding:
                scores_BHQT = jnp.where(jnp.arange(tokens + padding) < tokens, scores_BHQT, -jnp.inf)
            weights_BHQT = nn.softmax(scores_BHQT)
        weights_BHQT = weights_BHQT.astype(v_BTHK.dtype)
        y_BQHK = jnp.einsum("BHQT,BTHK->BQHK", weights_BHQT, v_BTHK, precision=self.precision)
        return y_BQHK[:, :own_queries], v_BTHK[:, :own_queries]

    def finish(self, x_BQD: jax.Array, y_BQHK: jax.Array, v_BQHK: jax.Array, gates: Gates = ALL_OPEN) -> jax.Array:
        """Compute the block's second half: gate the heads, project, add, apply the MLP, add."""
        return self.feed_forward(self.add_attention(x_BQD, y_BQHK, v_BQHK, gates), gates)

    def add_attention(
        self, x_BQD: jax.Array, y_BQHK: jax.Array, v_BQHK: jax.Array, gates: Gates = ALL_OPEN
    ) -> jax.Array:
        """Gate the heads, project their outputs, and add the result to the residual."""
        if "heads" in gates:
            g_B1H1 = gates["heads"][:, None, :, None].astype(y_BQHK.dtype)
            y_BQHK = y_BQHK * g_B1H1
            if self.gate.dropped == "identity":
                y_BQHK = y_BQHK + v_BQHK * (1 - g_B1H1)
        added_BQD = self._apply(self.out, y_BQHK.reshape(x_BQD.shape))
        return x_BQD + self._gate_sublayer(added_BQD, 0, gates)

    def feed_forward(self, x_BQD: jax.Array, gates: Gates = ALL_OPEN) -> jax.Array:
        """Add the MLP's output to the residual."""
        exact = exact_gelu if self.form == "plain" else gpu.gelu_from_input
        gelu = exact if self.model.gelu == "exact" else nn.gelu
        n_BQD = self.norm2(x_BQD)
        if self.gate.dropped == "slice" and "heads" in gates:
            n_BQD = n_BQD * jnp.repeat(gates["heads"], self.model.width // self.model.heads, axis=-1)[:, None]
        hidden_BQM = gelu(self._apply(self.mlp_in, n_BQD))
        return x_BQD + self._gate_sublayer(self._apply(self.mlp_out, hidden_BQM), 1, gates)

    def _gate_sublayer(self, added_BQD: jax.Array, sublayer: int, gates: Gates) -> jax.Array:
        """Gate what a sublayer adds to the first Q tokens, by the sublayer's gate and by those of the tokens."""
        if "sublayers" in gates:
            added_BQD = added_BQD * gates["sublayers"][:, sublayer, None, None]
        if "tokens" in gates and added_BQD.shape[1] > 1:  # the CLS token is always kept
            added_BQD = added_BQD * self._keep(gates["tokens"])[:, : added_BQD.shape[1], None]
        return added_BQD

    def _keep(self, t_BN: jax.Array) -> jax.Array:
        """Add CLS and the registers, which are always kept, to the patches' gates: [B, N] -> [B, T]."""
        return jnp.pad(t_BN, ((0, 0), (1 + self.model.registers, 0)), constant_values=1)

    def contributions(self, y_BHK: jax.Array, v_BHK: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Split the projection of `finish` by heads, for one token.

        Returns:
          [B, D] the sum that is added whichever heads run, without the bias, and [B, H, D] what each head adds if it
          runs, both float32.
        """
        heads = self.model.heads
        kernel_HKD = self.out.variables["params"]["kernel"].reshape(heads, -1, self.model.width)
        kernel_HKD = kernel_HKD.astype(y_BHK.dtype).astype(jnp.float32)  # rounded as `finish` rounds it
        identity = self.gate.dropped == "identity"
        part_BHD, passed_BHD = (
            jnp.einsum("BHK,HKD->BHD", heads_BHK.astype(jnp.float32), kernel_HKD, precision=EXACT)
            for heads_BHK in (y_BHK, v_BHK if identity else jnp.zeros_like(v_BHK))
        )
        return passed_BHD.sum(axis=1), part_BHD - passed_BHD

    def finish_sum(self, x_BD: jax.Array, added_BD: jax.Array, gates: Gates = ALL_OPEN) -> jax.Array:
        """Compute `finish` for one token from a sum of contributions.

        Args:
          x_BD: the residual that enters the block.
          added_BD: the sum of the contributions of the heads that run.
          gates: those of the sublayers, and those of the heads, which the MLP's input needs if gate.dropped is slice.
            The first axis of either may be 1 instead of B.
        """
        bias_D, dtype = self.out.variables["params"]["bias"], jnp.dtype(self.model.dtype)
        added_B1D = (added_BD.astype(dtype) + bias_D.astype(dtype))[:, None]
        return self.feed_forward(x_BD[:, None] + self._gate_sublayer(added_B1D, 0, gates), gates)[:, 0]

    def _apply(self, dense: nn.Dense, x_BTD: jax.Array) -> jax.Array:
        """Apply a dense layer to every token."""
        return _apply_to_rows(dense, x_BTD) if self.form == "plain" else gpu.apply_dense(dense, x_BTD, self.devices)

    def _split(self, x_BTD: jax.Array) -> jax.Array:
        """Split the width into heads: [B, T, D] -> [B, T, H, K]."""
        return x_BTD.reshape(*x_BTD.shape[:-1], self.model.heads, -1)


def exact_gelu(x: jax.Array) -> jax.Array:
    """Compute x Phi(x) by erf; with flax's exact form, which uses erfc, a block's gradient takes half as long again."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))


def _apply_to_rows(dense: nn.Dense, x_BTD: jax.Array) -> jax.Array:
    """Apply a dense layer to one long matrix of tokens.

    With B and T kept apart, XLA's CPU compiler transposes both operands of the weight gradient in memory: training
    then takes three times as long.
    """
    return dense(x_BTD.reshape(-1, x_BTD.shape[-1])).reshape(*x_BTD.shape[:-1], -1)


def sin_cos_positions(count: int, width: int, temperature: float = 10_000.0) -> jax.Array:
    """Compute the initial positions [1, count, D]: sines and cosines of each patch's column and row, 0 for CLS.

    They are those of arXiv:2205.01580. With small random positions a small model would spend most of its training on
    learning where its patches are.
    """
    side, quarter = math.isqrt(count - 1), width // 4
    omega = temperature ** -(jnp.arange(quarter) / max(quarter - 1, 1))
    rows, columns = jnp.divmod(jnp.arange(side**2), side)
    angles = [columns[:, None] * omega, rows[:, None] * omega]
    waves = jnp.concatenate([wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos)], axis=1)
    return jnp.pad(waves, ((1, 0), (0, width - 4 * quarter)))[None]


class Intervention(NamedTuple):
    """A change of one layer in a forward pass."""

    # used whatever the decision networks say: gates by kind, or those of the heads, [B, H]
    gates: Gates | jax.Array | None = None
    # CLS residual [B, D] -> what the gates of heads and sublayers read
    gate_input: Callable[[jax.Array], jax.Array] | None = None
    steer_residual: bool = False  # the block computes on the results of `gate_input` and `token_input` as well
    # residuals of the patches [B, N, D] -> what the gates of tokens read, before their normalisation
    token_input: Callable[[jax.Array], jax.Array] | None = None

    def forced(self) -> Gates:
        """Return the gates that are forced, by kind."""
        if self.gates is None:
            return ALL_OPEN
        return self.gates if isinstance(self.gates, Mapping) else {"heads": self.gates}


NO_INTERVENTIONS: Mapping[int, Intervention] = types.MappingProxyType({})


def decide_gates(
    block: Block, x_BTD: jax.Array, gating: Gating, noise: Gates, intervention: Intervention
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """Compute what a block computes on, its gate logits and its gates by kind; without gates everything runs.

    Args:
      noise: of sampled gates, scaled.
    """
    first = 1 + block.model.registers
    reads: dict[bool, jax.Array] = {False: x_BTD[:, 0], True: x_BTD[:, first:]}  # by: are they the patches?
    if intervention.gate_input is not None:
        reads[False] = intervention.gate_input(reads[False])
        x_BTD = x_BTD.at[:, 0].set(reads[False]) if intervention.steer_residual else x_BTD
    if intervention.token_input is not None:
        reads[True] = intervention.token_input(reads[True])
        x_BTD = x_BTD.at[:, first:].set(reads[True]) if intervention.steer_residual else x_BTD
    logits: dict[str, jax.Array] = {kind: block.gate_logits(reads[kind == "tokens"], kind) for kind in block.kinds}
    gates: dict[str, jax.Array] = {}
    for kind in block.kinds:
        if gating == "sampled":
            gates[kind] = straight_through(logits[kind], noise[kind], block.gate.settings(kind).temperature)
        elif gating == "thresholded":
            gates[kind] = threshold(logits[kind])
    return x_BTD, logits, gates | dict(intervention.forced())


def describe_gates(logits: Gates, gates: Gates) -> dict[str, jax.Array]:
    """Return the gates of a layer for `out`, with those that were left out because everything runs."""
    return {kind: jnp.ones_like(m) for kind, m in logits.items()} | dict(gates)


def run_block(block: Block, x_BTD: jax.Array, gates: Gates, queries: int | None) -> jax.Array:
    """Run a block with these gates for the first `queries` tokens (None: all)."""
    y_BQHK, v_BQHK = block.heads(x_BTD, queries, gates)
    return block.finish(x_BTD[:, :queries], y_BQHK, v_BQHK, gates)


class ViT(nn.Module):
    """A vision transformer for C classes.

    By default its products are exact float32, so that gates and answers do not depend on the program or the batch in
    which an image is computed, on an accelerator either. `training_form` makes the model of a training step.
    """

    model: ModelConfig
    gate: GateConfig
    classes: int  # C
    positions_count: int  # CLS and the patches: T less the registers
    scan: bool = False  # compile one block and loop over the layers that are alike
    remat: bool = False  # compute a block's intermediates again in the backward pass
    precision: Any = EXACT  # of the products
    form: Form = "plain"  # of a training step; evaluation is always plain
    devices: int = 1  # that the images of a training step are divided among

    def setup(self) -> None:
        """Make the submodules and the parameters."""
        m = self.model
        self.patches = Patches(m.patch, m.width, jnp.dtype(m.dtype), self.precision)
        self.cls = self.param("cls", nn.initializers.normal(0.02), (1, 1, m.width))
        self.positions = self.param("positions", lambda key: sin_cos_positions(self.positions_count, m.width))
        if m.registers:
            self.registers = self.param("registers", nn.initializers.normal(0.02), (1, m.registers, m.width))
        self.layers = [self._make_block(layer) for layer in range(m.depth)]
        self.norm = nn.LayerNorm(epsilon=m.layer_norm_epsilon)
        self.head = nn.Dense(self.classes, kernel_init=nn.initializers.truncated_normal(0.02), precision=self.precision)

    def _make_block(self, layer: int, **kwargs: Any) -> Block:
        tokens = self.positions_count + self.model.registers
        kinds = self.gate.kinds_in(layer)
        return Block(self.model, self.gate, kinds, self.precision, self.form, tokens, self.devices, **kwargs)

    def embed(self, images_BHWC: jax.Array) -> jax.Array:
        """Compute the residual that enters layer 0: [B, height, width, channels] normalised images -> [B, T, D]."""
        tokens_BtD = self.patches(images_BHWC).astype(jnp.float32)
        cls_B1D = jnp.broadcast_to(self.cls, (tokens_BtD.shape[0], 1, tokens_BtD.shape[2]))
        x_BTD = jnp.concatenate([cls_B1D, tokens_BtD], axis=1) + self.positions
        if self.model.registers:
            registers_BRD = jnp.broadcast_to(self.registers, (len(x_BTD), *self.registers.shape[1:]))
            x_BTD = jnp.concatenate([x_BTD[:, :1], registers_BRD, x_BTD[:, 1:]], axis=1)
        return x_BTD

    def before(self, images_BHWC: jax.Array, layer: int) -> jax.Array:
        """Compute the residual that enters `layer`: [B, height, width, channels] normalised images -> [B, T, D]."""
        return self.blocks(self.embed(images_BHWC), 0, stop=layer)[0]

    def classify(self, x_BD: jax.Array) -> jax.Array:
        """Compute the logits: [B, D] CLS residual after the last block -> [B, C] float32."""
        return self.head(self.norm(x_BD))

    def gate_logits(self, x: jax.Array, layer: int, kind: GateKind = "heads") -> jax.Array:
        """Compute a layer's gate logits of one kind; see `Block.gate_logits`."""
        return self.layers[layer].gate_logits(x, kind)

    def last_contributions(self, x_BTD: jax.Array, gates: Gates | None = None) -> tuple[jax.Array, jax.Array]:
        """Compute what the last layer's heads add to the CLS residual; see `Block.contributions`.

        Args:
          x_BTD: the residual that enters the last layer.
          gates: of the last layer, of which those of the tokens count; None: as the layer decides itself.
        """
        block = self.layers[-1]
        if gates is None:
            gates = decide_gates(block, x_BTD, "thresholded", ALL_OPEN, Intervention())[2]
        y_B1HK, v_B1HK = block.heads(x_BTD, 1, gates)
        return block.contributions(y_B1HK[:, 0], v_B1HK[:, 0])

    def last_logits(self, x_BD: jax.Array, added_BD: jax.Array, gates: Gates = ALL_OPEN) -> jax.Array:
        """Compute the logits [B, C] if the last layer's heads add the sum `added_BD`; see `Block.finish_sum`."""
        return self.classify(self.layers[-1].finish_sum(x_BD, added_BD, gates))

    def blocks(
        self,
        x_BTD: jax.Array,
        start: int = 0,
        *,
        stop: int | None = None,
        gating: Gating = "thresholded",
        noise: Gates = ALL_OPEN,
        interventions: Mapping[int, Intervention] = NO_INTERVENTIONS,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Run the layers from `start` up to and without `stop` (None: all that follow), with their gates.

        Only the CLS token reaches the classifier, so the last layer computes that token alone.

        Args:
          x_BTD: the residual that enters layer `start`.
          gating: dense keeps everything, sampled is training's straight-through gate, thresholded is evaluation's gate.
          noise: the scaled logistic noise of sampled gates by kind, as `draw_noise` returns it.
          interventions: what is changed in a layer, by the layer's number.

        Returns:
          The residual after the last of these layers, and for each layer, by its number, `cls` (the CLS residual that
          enters it) and, if the layer has gates, `gate_logits` and `gates`, both by kind: heads [B, H], sublayers
          [B, 2] (attention, MLP), tokens [B, N].
        """
        out: dict[str, Any] = {"cls": {}, "gate_logits": {}, "gates": {}}
        tokens = x_BTD.shape[1]
        if self.form == "cudnn":
            x_BTD = gpu.pad_tokens(x_BTD, 2)
        layers = range(start, self.model.depth if stop is None else stop)
        scanned = range(0) if interventions else self._layers_to_scan(layers)
        for layer in layers:
            if layer == scanned.start and scanned:
                x_BTD, by_layer = self._scan_layers(x_BTD, scanned, gating, noise)
                for name, values in by_layer.items():
                    out[name] |= values
            if self.form != "plain":
                x_BTD = gpu.keep_rows_together(x_BTD)
            if layer not in scanned:
                intervention = interventions.get(layer, Intervention())
                if layer == self.model.depth - 1:
                    x_BTD = x_BTD[:, :tokens]
                x_BTD, layer_out = self._run_layer(x_BTD, layer, gating, noise, intervention)
                for name, value in layer_out.items():
                    out[name][layer] = value
        return x_BTD[:, :tokens], out

    def _run_layer(
        self, x_BTD: jax.Array, layer: int, gating: Gating, noise: Gates, intervention: Intervention
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Run one layer -> the residual after it, and the layer's entries of `out`."""
        block = self.layers[layer]
        layer_out: dict[str, Any] = {"cls": x_BTD[:, 0]}
        first = {kind: self.gate.settings(kind).first_layer for kind in block.kinds}
        own_noise: dict[str, jax.Array] = {
            kind: noise[kind][:, layer - first[kind]] for kind in block.kinds if kind in noise
        }
        x_BTD, logits, gates = decide_gates(block, x_BTD, gating, own_noise, intervention)
        if logits or gates:
            layer_out |= {"gate_logits": logits, "gates": describe_gates(logits, gates)}
        run = nn.remat(run_block, static_argnums=(3,)) if self.remat else run_block
        return run(block, x_BTD, gates, 1 if layer == self.model.depth - 1 else None), layer_out

    def _layers_to_scan(self, layers: range) -> range:
        """Return those of these layers that have all kinds of gates, if `scan` is on and there are at least two."""
        first = max(self.gate.settings(kind).first_layer for kind in self.gate.kinds)
        alike = range(max(layers.start, first), min(layers.stop, self.model.depth - 1))
        return alike if self.scan and len(alike) > 1 and not self.is_initializing() else range(0)

    def _scan_layers(
        self, x_BTD: jax.Array, layers: range, gating: Gating, noise: Gates
    ) -> tuple[jax.Array, dict[str, dict[int, Any]]]:
        """Run layers that are alike as one loop over their stacked parameters -> as `blocks` returns."""
        params = [self.layers[layer].variables["params"] for layer in layers]
        block = self._make_block(layers.start, parent=None)

        def run_layer(x_BTD: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
            layer_params, layer_noise = inputs

            def run(block: Block) -> tuple[jax.Array, Any]:
                _, logits, gates = decide_gates(block, x_BTD, gating, layer_noise, Intervention())
                return run_block(block, x_BTD, gates, None), (logits, describe_gates(logits, gates))

            y_BTD, gate = block.apply({"params": layer_params}, method=run)
            return y_BTD, (x_BTD[:, 0], *gate)

        first = {kind: layers.start - self.gate.settings(kind).first_layer for kind in block.kinds}
        noise_LB = {
            kind: jnp.moveaxis(noise[kind], 1, 0)[first[kind] :][: len(layers)] for kind in first if kind in noise
        }
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        body = jax.checkpoint(run_layer) if self.remat else run_layer
        x_BTD, (cls_LBD, *gate_out) = jax.lax.scan(body, x_BTD, (stacked, noise_LB))
        by_layer: dict[str, dict[int, Any]] = {"cls": dict(zip(layers, cls_LBD, strict=True))}
        for name, by_kind in zip(("gate_logits", "gates"), gate_out, strict=True):
            by_layer[name] = {layer: {kind: by_kind[kind][i] for kind in by_kind} for i, layer in enumerate(layers)}
        return x_BTD, by_layer

    def __call__(self, images_BHWC: jax.Array, **kwargs: Any) -> tuple[jax.Array, dict[str, Any]]:
        """Compute the logits [B, C] of normalised images, and `out`; see `blocks`, which gets the keyword arguments."""
        x_BTD, out = self.blocks(self.embed(images_BHWC), 0, **kwargs)
        return self.classify(x_BTD[:, 0]), out


def predict_class(logits_BC: jax.Array) -> jax.Array:
    """Return the class of the largest logit, the first of equal ones: [..., C] -> [...] int32.

    It searches for the maximum, because XLA's CPU compiler makes a scalar loop of `argmax`.
    """
    classes = jnp.arange(logits_BC.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(logits_BC == logits_BC.max(axis=-1, keepdims=True), classes, classes[-1]), axis=-1)


def fingerprint_params(params: Any) -> str:
    """Hash the names and the bits of a model's parameters."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def build_model(config: Config, classes: int) -> ViT:
    """Build the model of a config for a number of classes, which computes in float32 whatever the training uses."""
    grid, machine = config.data.image_size // config.model.patch, config.machine
    exact = config.model.model_copy(update={"dtype": "float32"})
    return ViT(exact, config.gate, classes, 1 + grid**2, scan=machine.scan_layers, remat=machine.remat)


def training_form(model: ViT, config: Config, devices: Sequence[jax.Device]) -> ViT:
    """Make the form of a model that training steps run: in config.model.dtype, with products as fast as the device's.

    A step need not give the bits of another program; the model that is evaluated and steered must.

    Args:
      devices: that the images are divided among; they need not be there.
    """
    form: Form = "plain"
    if devices[0].platform == "gpu":
        # cuDNN adds gradients in any order, and has no kernel for dropped tokens, other dtypes or some heads
        head = config.model.width // config.model.heads
        fits = config.model.dtype == "bfloat16" and "tokens" not in config.gate.kinds and head % 8 == 0 and head <= 128
        form = "cudnn" if fits and gives_up_bits() and gpu.has_attention(devices[0]) else "gpu"
    return model.clone(model=config.model, precision=training_precision(), form=form, devices=len(devices))


class TrainedModel(NamedTuple):
    """A model with its parameters and the experiment that they belong to."""

    config: Config
    model: ViT
    params: Any


def stack_gates(by_layer: Mapping[int, Gates], kind: GateKind = "heads") -> jax.Array:
    """Stack the gates of one kind in the order of the layers that have them: {layer: {kind: [B, n]}} -> [B, A, n]."""
    return jnp.stack([by_layer[layer][kind] for layer in sorted(by_layer) if kind in by_layer[layer]], axis=1)


def count_gates(model: ViT) -> dict[str, int]:
    """Count the gates that a layer has of each kind, if it has the kind."""
    return {"heads": model.model.heads, "sublayers": len(SUBLAYERS), "tokens": model.positions_count - 1}


def draw_noise(key: jax.Array, model: ViT, count: int) -> dict[str, jax.Array]:
    """Draw the standard logistic noise of a model's sampled gates.

    Args:
      count: the number of images, B.

    Returns:
      By kind, [B, A, n] for its A gated layers and the n gates of each.
    """
    gates = count_gates(model)
    noise: dict[str, jax.Array] = {}
    for number, kind in enumerate(GATE_KINDS):
        if kind in model.gate.kinds:
            layers = model.model.depth - model.gate.settings(kind).first_layer
            own_key = jax.random.fold_in(key, number) if number else key
            noise[kind] = logistic_noise(own_key, (count, layers, gates[kind]))
    return noise
