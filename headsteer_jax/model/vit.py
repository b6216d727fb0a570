"""The vision transformer with gated heads, in flax.linen: pre-norm blocks [ViT] whose heads a gate may drop [AdaViT].

Everything an analysis wants is returned in `out`; nothing is hooked. An intervention is an argument: `gates` forces a
layer's gates, `gate_input` is what a layer's gate reads instead of its residual. The forward pass can be cut at any
layer: `forward(images) == blocks(embed(images), 0)`, and `blocks(x, l)` is the suffix that starts at layer l.

Axes: B images, T tokens (CLS, registers, patches), D width, H heads, K head width, L layers, A gated layers, C classes.
"""

import hashlib
import math
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
    """A convolution whose windows do not overlap, as one matrix product, with `nn.Conv`'s parameters.

    Of the convolution itself XLA's CPU compiler makes a kernel gradient that takes as long as three blocks.
    """

    patch: int
    width: int  # D
    dtype: jnp.dtype

    @nn.compact  # type: ignore[untyped-decorator]  # mypy reads flax as Any
    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        """[B, height, width, C] -> [B, patches, D], row by row; what is left at the edges is cut off."""
        p, (B, height, width, channels) = self.patch, images_BHWC.shape
        rows, columns = height // p, width // p
        kernel_ppCD = self.param("kernel", nn.initializers.lecun_normal(), (p, p, channels, self.width))
        bias_D = self.param("bias", nn.initializers.zeros, (self.width,))
        windows = images_BHWC[:, : rows * p, : columns * p].reshape(B, rows, p, columns, p, channels)
        pixels_NP = windows.transpose(0, 1, 3, 2, 4, 5).reshape(B * rows * columns, -1).astype(self.dtype)
        x_ND = pixels_NP @ kernel_ppCD.reshape(-1, self.width).astype(self.dtype) + bias_D.astype(self.dtype)
        return x_ND.reshape(B, rows * columns, self.width)


class Block(nn.Module):
    """One transformer block. Its halves can be called apart, so that a sweep recomputes only what a gate changes."""

    model: ModelConfig
    gate: GateConfig | None  # None: this layer keeps all its heads

    def setup(self) -> None:
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
        """[B, D] what the gate reads -> [B, H] m."""
        return self.decide(x_BD)

    def heads(self, x_BTD: jax.Array, queries: int | None) -> tuple[jax.Array, jax.Array]:
        """Each head's output before the gate, for the first `queries` tokens (None: all), and their values.

        Returns:
          y_BQHK, what attention gives, and v_BQHK, the values of the same tokens.
        """
        n_BTD = self.norm1(x_BTD)
        q_BQHK = self._split(_apply_to_rows(self.query, n_BTD[:, :queries]))
        k_BTHK, v_BTHK = self._split(_apply_to_rows(self.key, n_BTD)), self._split(_apply_to_rows(self.value, n_BTD))
        scores_BHQT = jnp.einsum("BQHK,BTHK->BHQT", q_BQHK, k_BTHK) / (q_BQHK.shape[-1] ** 0.5)
        weights_BHQT = nn.softmax(scores_BHQT.astype(jnp.float32)).astype(v_BTHK.dtype)
        return jnp.einsum("BHQT,BTHK->BQHK", weights_BHQT, v_BTHK), v_BTHK[:, :queries]

    def finish(self, x_BQD: jax.Array, y_BQHK: jax.Array, v_BQHK: jax.Array, g_BH: jax.Array | None) -> jax.Array:
        """The rest of the block: gate the heads (None: keep all), project, add, MLP, add."""
        if g_BH is not None and self.gate is not None:
            g_B1H1 = g_BH[:, None, :, None].astype(y_BQHK.dtype)
            y_BQHK = y_BQHK * g_B1H1
            if self.gate.dropped == "identity":
                y_BQHK = y_BQHK + v_BQHK * (1 - g_B1H1)
        return self.feed_forward(x_BQD + _apply_to_rows(self.out, y_BQHK.reshape(x_BQD.shape)))

    def feed_forward(self, x_BQD: jax.Array) -> jax.Array:
        """The MLP and what it is added to."""
        gelu = exact_gelu if self.model.gelu == "exact" else nn.gelu
        hidden_BQM = gelu(_apply_to_rows(self.mlp_in, self.norm2(x_BQD)))
        return x_BQD + _apply_to_rows(self.mlp_out, hidden_BQM)

    def contributions(self, y_BHK: jax.Array, v_BHK: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The projection of `finish`, head by head, for one token: what each head adds when it runs.

        Returns:
          [B, D] what is added whatever runs, but for the bias, and [B, H, D], both float32.
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
        """`finish` of one token, from a sum of contributions."""
        bias_D, dtype = self.out.variables["params"]["bias"], jnp.dtype(self.model.dtype)
        return self.feed_forward((x_BD + (added_BD.astype(dtype) + bias_D.astype(dtype)))[:, None])[:, 0]

    def _split(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, H, K]."""
        return x_BTD.reshape(*x_BTD.shape[:-1], self.model.heads, -1)


def exact_gelu(x: jax.Array) -> jax.Array:
    """X Phi(x) by erf: flax's exact form goes through erfc, with which a block's gradient takes half as long again."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))


def _apply_to_rows(dense: nn.Dense, x_BTD: jax.Array) -> jax.Array:
    """A dense layer on one long matrix of tokens.

    With B and T kept apart, XLA's CPU compiler transposes both operands of the weight gradient in memory: training
    then takes three times as long.
    """
    return dense(x_BTD.reshape(-1, x_BTD.shape[-1])).reshape(*x_BTD.shape[:-1], -1)


def sin_cos_positions(count: int, width: int, temperature: float = 10_000.0) -> jax.Array:
    """[1, count, D] sines and cosines of each patch's column and row, 0 for CLS: where the learned positions start.

    As in arXiv:2205.01580. From small random positions a small model spends most of its training on finding out where
    its patches are.
    """
    side, quarter = math.isqrt(count - 1), width // 4
    omega = temperature ** -(jnp.arange(quarter) / max(quarter - 1, 1))
    rows, columns = jnp.divmod(jnp.arange(side**2), side)
    angles = [columns[:, None] * omega, rows[:, None] * omega]
    waves = jnp.concatenate([wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos)], axis=1)
    return jnp.pad(waves, ((1, 0), (0, width - 4 * quarter)))[None]


class ViT(nn.Module):
    """A vision transformer for C classes."""

    model: ModelConfig
    gate: GateConfig
    classes: int  # C
    positions_count: int  # CLS and the patches: T less the registers
    scan: bool = False  # one compiled block, looped over the layers that are alike
    remat: bool = False  # the backward pass computes a block's intermediates again

    def setup(self) -> None:
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
        """[B, height, width, channels] normalised images -> [B, T, D] the residual that enters layer 0."""
        tokens_BtD = self.patches(images_BHWC).astype(jnp.float32)
        cls_B1D = jnp.broadcast_to(self.cls, (tokens_BtD.shape[0], 1, tokens_BtD.shape[2]))
        x_BTD = jnp.concatenate([cls_B1D, tokens_BtD], axis=1) + self.positions
        if self.model.registers:
            registers_BRD = jnp.broadcast_to(self.registers, (len(x_BTD), *self.registers.shape[1:]))
            x_BTD = jnp.concatenate([x_BTD[:, :1], registers_BRD, x_BTD[:, 1:]], axis=1)
        return x_BTD

    def before(self, images_BHWC: jax.Array, layer: int) -> jax.Array:
        """[B, height, width, channels] normalised images -> [B, T, D] the residual that enters `layer`."""
        return self.blocks(self.embed(images_BHWC), 0, stop=layer)[0]

    def classify(self, x_BD: jax.Array) -> jax.Array:
        """[B, D] CLS residual after the last block -> [B, C] float32 logits."""
        return self.head(self.norm(x_BD))

    def gate_logits(self, x_BD: jax.Array, layer: int) -> jax.Array:
        """[B, D] -> [B, H]: what layer `layer`'s decision network makes of it."""
        return self.layers[layer].gate_logits(x_BD)

    def last_contributions(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the last layer's heads add to the CLS residual: [B, D] in any case, [B, H, D] each when it runs."""
        y_B1HK, v_B1HK = self.layers[-1].heads(x_BTD, queries=1)
        return self.layers[-1].contributions(y_B1HK[:, 0], v_B1HK[:, 0])

    def last_logits(self, x_BD: jax.Array, added_BD: jax.Array) -> jax.Array:
        """The logits [B, C] that follow when the last layer's heads add so much to the CLS residual."""
        return self.classify(self.layers[-1].finish_sum(x_BD, added_BD))

    def blocks(
        self,
        x_BTD: jax.Array,
        start: int = 0,
        *,
        stop: int | None = None,
        gating: Gating = "thresholded",
        noise_BAH: jax.Array | None = None,
        gates: Mapping[int, jax.Array] | None = None,
        gate_input: Mapping[int, Callable[[jax.Array], jax.Array]] | None = None,
        steer_residual: bool = False,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Layers `start` to `stop` (None: to the end), with their gates.

        Only the CLS token reaches the classifier, so the last layer computes that token alone.

        Args:
          x_BTD: the residual that enters layer `start`.
          gating: dense keeps every head; sampled is training's straight-through gate; thresholded is evaluation's.
          noise_BAH: for sampled gates: scaled logistic noise, one slice for each gated layer.
          gates: layer -> [B, H], gates to use there whatever the decision network says.
          gate_input: layer -> a function of the CLS residual [B, D]: what the decision network reads there instead.
          steer_residual: the block computes on what `gate_input` gives as well.

        Returns:
          The residual after the last of these layers, and per layer, keyed by its number: `cls` (the CLS residual that
          enters), `gate_logits`, `gates`.
        """
        m, first = self.model, self.gate.first_layer
        out: dict[str, Any] = {"cls": {}, "gate_logits": {}, "gates": {}}
        stop = m.depth if stop is None else stop

        def decided(block: Block, reads_BD: jax.Array, noise_BH: jax.Array | None) -> tuple[jax.Array, Any]:
            """The gate logits, and the gates; None: all heads run."""
            m_BH = block.gate_logits(reads_BD)
            if gating == "sampled":
                assert noise_BH is not None
                return m_BH, straight_through(m_BH, noise_BH, self.gate.temperature)
            return m_BH, threshold(m_BH) if gating == "thresholded" else None

        def rest(block: Block, x_BTD: jax.Array, g_BH: jax.Array | None, queries: int | None) -> jax.Array:
            y_BQHK, v_BQHK = block.heads(x_BTD, queries)
            return block.finish(x_BTD[:, :queries], y_BQHK, v_BQHK, g_BH)

        run = nn.remat(rest, static_argnums=(3,)) if self.remat else rest

        def looped(x_BTD: jax.Array, layers: range) -> jax.Array:
            """These layers, which are gated and alike, as one loop over their stacked parameters."""
            params = [self.layers[layer].variables["params"] for layer in layers]
            block = Block(m, self.gate, parent=None)

            def one(x_BTD: jax.Array, given: Any) -> tuple[jax.Array, Any]:
                own, noise_BH = given

                def layer(block: Block) -> tuple[jax.Array, Any]:
                    m_BH, g_BH = decided(block, x_BTD[:, 0], noise_BH)
                    return rest(block, x_BTD, g_BH, None), (m_BH, jnp.ones_like(m_BH) if g_BH is None else g_BH)

                y_BTD, gate = block.apply({"params": own}, method=layer)
                return y_BTD, (x_BTD[:, 0], *gate)

            noise_LBH = (
                None if noise_BAH is None else jnp.moveaxis(noise_BAH, 1, 0)[layers.start - first :][: len(layers)]
            )
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
            x_BTD, seen = jax.lax.scan(jax.checkpoint(one) if self.remat else one, x_BTD, (stacked, noise_LBH))
            for name, values_L in zip(out, seen, strict=True):
                out[name] |= dict(zip(layers, values_L, strict=True))
            return x_BTD

        layer = start
        while layer < stop:
            block = self.layers[layer]
            alike = range(layer, min(stop, m.depth - 1)) if layer >= first else range(0)
            if self.scan and len(alike) > 1 and not (gates or gate_input or self.is_initializing()):
                x_BTD, layer = looped(x_BTD, alike), alike.stop
                continue
            out["cls"][layer] = x_BTD[:, 0]
            g_BH = None
            if layer >= first:
                reads_BD = x_BTD[:, 0]
                if gate_input is not None and layer in gate_input:
                    reads_BD = gate_input[layer](reads_BD)
                    x_BTD = x_BTD.at[:, 0].set(reads_BD) if steer_residual else x_BTD
                m_BH, g_BH = decided(block, reads_BD, None if noise_BAH is None else noise_BAH[:, layer - first])
                if gates is not None and layer in gates:
                    g_BH = gates[layer]
                out["gate_logits"][layer] = m_BH
                out["gates"][layer] = jnp.ones_like(m_BH) if g_BH is None else g_BH
            x_BTD = run(block, x_BTD, g_BH, 1 if layer == m.depth - 1 else None)
            layer += 1
        return x_BTD, out

    def __call__(self, images_BHWC: jax.Array, **kwargs: Any) -> tuple[jax.Array, dict[str, Any]]:
        """Normalised images -> logits [B, C] and everything by layer (see `blocks`, which the keywords go to)."""
        x_BTD, out = self.blocks(self.embed(images_BHWC), 0, **kwargs)
        return self.classify(x_BTD[:, 0]), out


def predict_class(logits_BC: jax.Array) -> jax.Array:
    """[..., C] -> [...] int32 class of the largest logit; of equals the first.

    The place of the maximum instead of `argmax`, which XLA's CPU compiler makes one scalar loop.
    """
    classes = jnp.arange(logits_BC.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(logits_BC == logits_BC.max(axis=-1, keepdims=True), classes, classes[-1]), axis=-1)


def fingerprint_params(params: Any) -> str:
    """Of a model's parameters: their names and bits."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def build_model(config: Config, classes: int) -> ViT:
    """The model of a config, for so many classes."""
    grid = config.data.image_size // config.model.patch
    how = config.machine
    return ViT(config.model, config.gate, classes, 1 + grid**2, scan=how.scan_layers, remat=how.remat)


class TrainedModel(NamedTuple):
    """A model with its parameters and the experiment that they belong to."""

    config: Config
    model: ViT
    params: Any


def stack_gates(by_layer: Mapping[int, jax.Array]) -> jax.Array:
    """{layer: [B, H]} -> [B, A, H], the gated layers in order."""
    return jnp.stack([by_layer[layer] for layer in sorted(by_layer)], axis=1)
