"""The vision transformer with gated heads, in flax.linen: pre-norm blocks [ViT] whose heads a gate may drop [AdaViT].

Everything that an analysis needs is returned in `out`; nothing is hooked. An `Intervention` is an argument: it forces a
layer's gates, or changes what they read. The forward pass can be cut at any layer: `blocks(embed(images), 0)` runs all
layers, and `blocks(x, l)` those from layer l on.

Axes: B images, T tokens (CLS, registers, patches), D width, H heads, K head width, L layers, A gated layers, C classes.
"""

import hashlib
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.config.schema import Config, GateConfig, ModelConfig
from headsteer_jax.model.gates import Gate, straight_through, threshold

Gating = Literal["dense", "sampled", "thresholded"]


class Patches(nn.Module):
    """A convolution of windows that do not overlap, computed as one matrix product, with `nn.Conv`'s parameters.

    XLA's CPU compiler would make of `nn.Conv` a kernel gradient that takes as long as three blocks.
    """

    patch: int
    width: int  # D
    dtype: jnp.dtype

    @nn.compact  # type: ignore[untyped-decorator]  # mypy reads flax as Any
    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        """Embed the patches, row by row: [B, height, width, C] -> [B, patches, D]. Incomplete patches are cut off."""
        p, (B, height, width, channels) = self.patch, images_BHWC.shape
        rows, columns = height // p, width // p
        kernel_ppCD = self.param("kernel", nn.initializers.lecun_normal(), (p, p, channels, self.width))
        bias_D = self.param("bias", nn.initializers.zeros, (self.width,))
        windows = images_BHWC[:, : rows * p, : columns * p].reshape(B, rows, p, columns, p, channels)
        pixels_NP = windows.transpose(0, 1, 3, 2, 4, 5).reshape(B * rows * columns, -1).astype(self.dtype)
        x_ND = pixels_NP @ kernel_ppCD.reshape(-1, self.width).astype(self.dtype) + bias_D.astype(self.dtype)
        return x_ND.reshape(B, rows * columns, self.width)


class Block(nn.Module):
    """A transformer block, in two halves, so that a sweep recomputes only what a gate changes."""

    model: ModelConfig
    gate: GateConfig | None  # None: this layer keeps all its heads

    def setup(self) -> None:
        """Make the submodules."""
        m = self.model
        dtype = jnp.dtype(m.dtype)
        dense = {"dtype": dtype, "kernel_init": nn.initializers.xavier_uniform()}
        self.norm1 = nn.LayerNorm(epsilon=m.layer_norm_epsilon)
        self.query, self.key, self.value, self.out = (nn.Dense(m.width, **dense) for _ in range(4))
        self.norm2 = nn.LayerNorm(epsilon=m.layer_norm_epsilon)
        self.mlp_in = nn.Dense(round(m.mlp_ratio * m.width), bias_init=nn.initializers.normal(1e-6), **dense)
        self.mlp_out = nn.Dense(m.width, bias_init=nn.initializers.normal(1e-6), **dense)
        if self.gate is not None:
            self.decide = Gate(m.heads, self.gate, m.layer_norm_epsilon)

    def gate_logits(self, x_BD: jax.Array) -> jax.Array:
        """Compute the gate logits m: [B, D] -> [B, H]."""
        return self.decide(x_BD)

    def heads(self, x_BTD: jax.Array, queries: int | None) -> tuple[jax.Array, jax.Array]:
        """Compute each head's output before the gate, for the first `queries` tokens (None: all).

        Returns:
          y_BQHK, the result of attention, and v_BQHK, the values of the same tokens.
        """
        n_BTD = self.norm1(x_BTD)
        q_BQHK = self._split(_apply_to_rows(self.query, n_BTD[:, :queries]))
        k_BTHK, v_BTHK = self._split(_apply_to_rows(self.key, n_BTD)), self._split(_apply_to_rows(self.value, n_BTD))
        scores_BHQT = jnp.einsum("BQHK,BTHK->BHQT", q_BQHK, k_BTHK) / (q_BQHK.shape[-1] ** 0.5)
        weights_BHQT = nn.softmax(scores_BHQT.astype(jnp.float32)).astype(v_BTHK.dtype)
        return jnp.einsum("BHQT,BTHK->BQHK", weights_BHQT, v_BTHK), v_BTHK[:, :queries]

    def finish(self, x_BQD: jax.Array, y_BQHK: jax.Array, v_BQHK: jax.Array, g_BH: jax.Array | None) -> jax.Array:
        """Compute the block's second half: gate the heads (None: keep all), project, add, apply the MLP, add."""
        if g_BH is not None and self.gate is not None:
            g_B1H1 = g_BH[:, None, :, None].astype(y_BQHK.dtype)
            y_BQHK = y_BQHK * g_B1H1
            if self.gate.dropped == "identity":
                y_BQHK = y_BQHK + v_BQHK * (1 - g_B1H1)
        return self.feed_forward(x_BQD + _apply_to_rows(self.out, y_BQHK.reshape(x_BQD.shape)))

    def feed_forward(self, x_BQD: jax.Array) -> jax.Array:
        """Add the MLP's output to the residual."""
        gelu = exact_gelu if self.model.gelu == "exact" else nn.gelu
        hidden_BQM = gelu(_apply_to_rows(self.mlp_in, self.norm2(x_BQD)))
        return x_BQD + _apply_to_rows(self.mlp_out, hidden_BQM)

    def contributions(self, y_BHK: jax.Array, v_BHK: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Split the projection of `finish` by heads, for one token.

        Returns:
          [B, D] the sum that is added whichever heads run, without the bias, and [B, H, D] what each head adds if it
          runs, both float32.
        """
        heads = self.model.heads
        kernel_HKD = self.out.variables["params"]["kernel"].reshape(heads, -1, self.model.width)
        kernel_HKD = kernel_HKD.astype(y_BHK.dtype).astype(jnp.float32)  # rounded as `finish` rounds it
        identity = self.gate is not None and self.gate.dropped == "identity"
        part_BHD, passed_BHD = (
            jnp.einsum("BHK,HKD->BHD", heads_BHK.astype(jnp.float32), kernel_HKD)
            for heads_BHK in (y_BHK, v_BHK if identity else jnp.zeros_like(v_BHK))
        )
        return passed_BHD.sum(axis=1), part_BHD - passed_BHD

    def finish_sum(self, x_BD: jax.Array, added_BD: jax.Array) -> jax.Array:
        """Compute `finish` for one token from a sum of contributions."""
        bias_D, dtype = self.out.variables["params"]["bias"], jnp.dtype(self.model.dtype)
        return self.feed_forward((x_BD + (added_BD.astype(dtype) + bias_D.astype(dtype)))[:, None])[:, 0]

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
    """A change of one gated layer in a forward pass."""

    gates: jax.Array | None = None  # [B, H], used whatever the decision network says
    gate_input: Callable[[jax.Array], jax.Array] | None = None  # CLS residual [B, D] -> what the decision network reads
    steer_residual: bool = False  # the block computes on the result of `gate_input` as well


NO_INTERVENTIONS: Mapping[int, Intervention] = types.MappingProxyType({})


def _decide(
    block: Block, reads_BD: jax.Array, gating: Gating, noise_BH: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Compute a gated block's gate logits and gates; the gates are None if all heads run."""
    m_BH = block.gate_logits(reads_BD)
    if gating == "sampled":
        assert noise_BH is not None
        assert block.gate is not None
        return m_BH, straight_through(m_BH, noise_BH, block.gate.temperature)
    return m_BH, threshold(m_BH) if gating == "thresholded" else None


def _run_block(block: Block, x_BTD: jax.Array, g_BH: jax.Array | None, queries: int | None) -> jax.Array:
    """Run a block with these gates for the first `queries` tokens (None: all)."""
    y_BQHK, v_BQHK = block.heads(x_BTD, queries)
    return block.finish(x_BTD[:, :queries], y_BQHK, v_BQHK, g_BH)


class ViT(nn.Module):
    """A vision transformer for C classes."""

    model: ModelConfig
    gate: GateConfig
    classes: int  # C
    positions_count: int  # CLS and the patches: T less the registers
    scan: bool = False  # compile one block and loop over the layers that are alike
    remat: bool = False  # compute a block's intermediates again in the backward pass

    def setup(self) -> None:
        """Make the submodules and the parameters."""
        m = self.model
        self.patches = Patches(m.patch, m.width, jnp.dtype(m.dtype))
        self.cls = self.param("cls", nn.initializers.normal(0.02), (1, 1, m.width))
        self.positions = self.param("positions", lambda key: sin_cos_positions(self.positions_count, m.width))
        if m.registers:
            self.registers = self.param("registers", nn.initializers.normal(0.02), (1, m.registers, m.width))
        self.layers = [Block(m, self.gate if layer >= self.gate.first_layer else None) for layer in range(m.depth)]
        self.norm = nn.LayerNorm(epsilon=m.layer_norm_epsilon)
        self.head = nn.Dense(self.classes, kernel_init=nn.initializers.truncated_normal(0.02))

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

    def gate_logits(self, x_BD: jax.Array, layer: int) -> jax.Array:
        """Compute a layer's gate logits: [B, D] CLS residual -> [B, H]."""
        return self.layers[layer].gate_logits(x_BD)

    def last_contributions(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Compute what the last layer's heads add to the CLS residual; see `Block.contributions`."""
        y_B1HK, v_B1HK = self.layers[-1].heads(x_BTD, queries=1)
        return self.layers[-1].contributions(y_B1HK[:, 0], v_B1HK[:, 0])

    def last_logits(self, x_BD: jax.Array, added_BD: jax.Array) -> jax.Array:
        """Compute the logits [B, C] if the last layer's heads add the sum `added_BD` to the CLS residual."""
        return self.classify(self.layers[-1].finish_sum(x_BD, added_BD))

    def blocks(
        self,
        x_BTD: jax.Array,
        start: int = 0,
        *,
        stop: int | None = None,
        gating: Gating = "thresholded",
        noise_BAH: jax.Array | None = None,
        interventions: Mapping[int, Intervention] = NO_INTERVENTIONS,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Run the layers from `start` up to and without `stop` (None: all that follow), with their gates.

        Only the CLS token reaches the classifier, so the last layer computes that token alone.

        Args:
          x_BTD: the residual that enters layer `start`.
          gating: dense keeps every head, sampled is training's straight-through gate, thresholded is evaluation's gate.
          noise_BAH: the scaled logistic noise of sampled gates, one slice for each gated layer.
          interventions: what is changed in gated layers, by the layer's number.

        Returns:
          The residual after the last of these layers, and for each layer, by its number, `cls` (the CLS residual that
          enters it), `gate_logits` and `gates`.
        """
        out: dict[str, Any] = {"cls": {}, "gate_logits": {}, "gates": {}}
        layers = range(start, self.model.depth if stop is None else stop)
        scanned = range(0) if interventions else self._layers_to_scan(layers)
        for layer in layers:
            if layer == scanned.start and scanned:
                x_BTD, by_layer = self._scan_layers(x_BTD, scanned, gating, noise_BAH)
                for name, values in by_layer.items():
                    out[name] |= values
            if layer not in scanned:
                intervention = interventions.get(layer, Intervention())
                x_BTD, layer_out = self._run_layer(x_BTD, layer, gating, noise_BAH, intervention)
                for name, value in layer_out.items():
                    out[name][layer] = value
        return x_BTD, out

    def _run_layer(
        self, x_BTD: jax.Array, layer: int, gating: Gating, noise_BAH: jax.Array | None, intervention: Intervention
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Run one layer -> the residual after it, and the layer's entries of `out`."""
        block, layer_out = self.layers[layer], {"cls": x_BTD[:, 0]}
        g_BH = None
        if layer >= self.gate.first_layer:
            reads_BD = x_BTD[:, 0]
            if intervention.gate_input is not None:
                reads_BD = intervention.gate_input(reads_BD)
                x_BTD = x_BTD.at[:, 0].set(reads_BD) if intervention.steer_residual else x_BTD
            noise_BH = None if noise_BAH is None else noise_BAH[:, layer - self.gate.first_layer]
            m_BH, g_BH = _decide(block, reads_BD, gating, noise_BH)
            if intervention.gates is not None:
                g_BH = intervention.gates
            layer_out |= {"gate_logits": m_BH, "gates": jnp.ones_like(m_BH) if g_BH is None else g_BH}
        run = nn.remat(_run_block, static_argnums=(3,)) if self.remat else _run_block
        return run(block, x_BTD, g_BH, 1 if layer == self.model.depth - 1 else None), layer_out

    def _layers_to_scan(self, layers: range) -> range:
        """Return those of these layers that are gated and alike, if `scan` is on and there are at least two of them."""
        alike = range(max(layers.start, self.gate.first_layer), min(layers.stop, self.model.depth - 1))
        return alike if self.scan and len(alike) > 1 and not self.is_initializing() else range(0)

    def _scan_layers(
        self, x_BTD: jax.Array, layers: range, gating: Gating, noise_BAH: jax.Array | None
    ) -> tuple[jax.Array, dict[str, dict[int, jax.Array]]]:
        """Run layers that are alike as one loop over their stacked parameters -> as `blocks` returns."""
        params = [self.layers[layer].variables["params"] for layer in layers]
        block = Block(self.model, self.gate, parent=None)

        def run_layer(x_BTD: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
            layer_params, noise_BH = inputs

            def run(block: Block) -> tuple[jax.Array, Any]:
                m_BH, g_BH = _decide(block, x_BTD[:, 0], gating, noise_BH)
                return _run_block(block, x_BTD, g_BH, None), (m_BH, jnp.ones_like(m_BH) if g_BH is None else g_BH)

            y_BTD, gate = block.apply({"params": layer_params}, method=run)
            return y_BTD, (x_BTD[:, 0], *gate)

        noise_LBH = None
        if noise_BAH is not None:
            noise_LBH = jnp.moveaxis(noise_BAH, 1, 0)[layers.start - self.gate.first_layer :][: len(layers)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        body = jax.checkpoint(run_layer) if self.remat else run_layer
        x_BTD, stacked_out = jax.lax.scan(body, x_BTD, (stacked, noise_LBH))
        names = ("cls", "gate_logits", "gates")
        return x_BTD, {n: dict(zip(layers, value, strict=True)) for n, value in zip(names, stacked_out, strict=True)}

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
    """Build the model of a config for a number of classes."""
    grid, machine = config.data.image_size // config.model.patch, config.machine
    return ViT(config.model, config.gate, classes, 1 + grid**2, scan=machine.scan_layers, remat=machine.remat)


class TrainedModel(NamedTuple):
    """A model with its parameters and the experiment that they belong to."""

    config: Config
    model: ViT
    params: Any


def stack_gates(by_layer: Mapping[int, jax.Array]) -> jax.Array:
    """Stack the gates of the gated layers in order: {layer: [B, H]} -> [B, A, H]."""
    return jnp.stack([by_layer[layer] for layer in sorted(by_layer)], axis=1)
