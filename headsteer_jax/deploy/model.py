"""A deployed model: a vision transformer whose layers may each have another number of heads and MLP neurons.

It is a pure function of its own parameters, without flax: uint8 images in, logits out. The last layer computes the CLS
query alone, as in training. A layer without heads or without neurons adds a constant in their place, the bias that is
left of the sublayer.

A dynamic model has the decision networks of the run's gated model. What a gate closes is multiplied by 0.

Axes: B images, h, w their stored size, S the side that the model sees, T tokens, N patches, Q tokens that are queries,
D width, H heads of the layer, K head width, M neurons of the layer's MLP, C classes (channels in images).
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from headsteer_jax.config.schema import GATE_KINDS, DataConfig, GateConfig, ModelConfig, Section
from headsteer_jax.data.augment import preprocess
from headsteer_jax.model.gates import Gates, mask_softmax, threshold, threshold_logit
from headsteer_jax.model.vit import exact_gelu, predict_class
from headsteer_jax.runtime.precision import EXACT
from headsteer_jax.runtime.settings import use_own_settings

FORMAT = "HeadSteer deployed model"
VERSION = 1  # of the files; a change that older readers would misread raises it

multiply = functools.partial(jnp.matmul, precision=EXACT)  # matrix products on every device, as evaluation has them

Params = Any  # nested dicts of float32 arrays; a layer's are {norm1, qkv, out, norm2, mlp_in, mlp_out, gates}


class DeployedConfig(Section):
    """The description of a deployed model, which config.json holds: all but its weights."""

    format: Literal["HeadSteer deployed model"] = "HeadSteer deployed model"
    """The mark of our own directories."""
    version: int = VERSION
    """The version of the files."""
    classes: tuple[str, ...]
    """The names of the classes, in the order of the logits."""
    image: tuple[int, int, int]
    """Height, width and channels of the images that the model reads, as uint8."""
    data: DataConfig
    """The size and the statistics of what the model sees; the other fields have their defaults."""
    model: ModelConfig
    """The shape of the model before anything was cut."""
    heads: tuple[int, ...]
    """The number of heads that each layer has left."""
    neurons: tuple[int, ...]
    """The number of MLP neurons that each layer has left."""
    gate: GateConfig | None = None
    """The gates of a dynamic model. Without them the model computes the same for every image."""

    @property
    def depth(self) -> int:
        """The number of layers, L."""
        return len(self.heads)

    @property
    def patches(self) -> int:
        """The number of patches, N."""
        return (self.data.image_size // self.model.patch) ** 2

    @property
    def head_width(self) -> int:
        """The width of a head, K."""
        return self.model.width // self.model.heads


class DeployedModel(NamedTuple):
    """A deployed model in memory."""

    config: DeployedConfig
    params: Params

    def apply(self, images_BhwC: jax.Array | np.ndarray) -> jax.Array:
        """Compute the logits [B, C] of uint8 images."""
        with use_own_settings():
            return _compiled_logits(self.config, self.params, jnp.asarray(images_BhwC))


def compute_logits(config: DeployedConfig, params: Params, images_BhwC: jax.Array) -> jax.Array:
    """Compute the logits of images as they are stored: [B, h, w, C] uint8 -> [B, C] float32."""
    return compute_logits_and_cls(config, params, preprocess(images_BhwC, config.data))[0]


_compiled_logits = jax.jit(compute_logits, static_argnums=0)


def compute_logits_and_cls(
    config: DeployedConfig, params: Params, images_BSSC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Compute the logits [B, C] and the last CLS residual [B, D] of normalised images."""
    x_BTD = embed_images(config, params, images_BSSC)
    for layer in range(config.depth):
        x_BTD = run_layer(config, params["layers"][layer], layer, x_BTD)
    return classify(config, params, x_BTD[:, 0]), x_BTD[:, 0]


def compute_gates(config: DeployedConfig, params: Params, images_BSSC: jax.Array) -> dict[str, jax.Array]:
    """Compute the gates of a dynamic model on normalised images, by kind: [B, A, n] of the A layers that have it."""
    x_BTD, by_kind = embed_images(config, params, images_BSSC), dict[str, list[jax.Array]]()
    for layer in range(config.depth):
        for kind, g in decide_gates(config, params["layers"][layer], x_BTD).items():
            by_kind.setdefault(kind, []).append(g)
        x_BTD = run_layer(config, params["layers"][layer], layer, x_BTD)
    return {kind: jnp.stack(gates, axis=1) for kind, gates in by_kind.items()}


def embed_images(config: DeployedConfig, params: Params, images_BSSC: jax.Array) -> jax.Array:
    """Compute the residual that enters layer 0: normalised images [B, S, S, C] -> [B, T, D]."""
    p, side, channels = config.model.patch, config.data.image_size // config.model.patch, config.data.channels
    windows = images_BSSC.reshape(-1, side, p, side, p, channels).transpose(0, 1, 3, 2, 4, 5)
    patches_BND = multiply(windows.reshape(-1, side * side, p * p * channels), params["patches"]["kernel"])
    prefix_1PD = params["prefix"][None]  # CLS and the registers, with the position of CLS
    prefix_BPD = jnp.broadcast_to(prefix_1PD, (patches_BND.shape[0], *prefix_1PD.shape[1:]))
    return jnp.concatenate([prefix_BPD, patches_BND + params["patches"]["bias"]], axis=1)


def run_layer(config: DeployedConfig, params: Params, layer: int, x_BTD: jax.Array) -> jax.Array:
    """Run one layer: [B, T, D] -> [B, Q, D], where Q is 1 in the last layer.

    Args:
      params: those of this layer.
    """
    gates = decide_gates(config, params, x_BTD)
    queries = 1 if layer == config.depth - 1 else None
    y_BQY = attend(config, params, x_BTD, queries, gates) if "kernel" in params["out"] else None
    x_BQD = x_BTD[:, :queries] + _gate_sublayer(config, project(params["out"], y_BQY), 0, gates)
    hidden_BQM = activate(config, params, x_BQD, gates) if "kernel" in params["mlp_out"] else None
    return x_BQD + _gate_sublayer(config, project(params["mlp_out"], hidden_BQM), 1, gates)


def normalise(x: jax.Array, norm: Mapping[str, jax.Array], config: DeployedConfig) -> jax.Array:
    """Apply a LayerNorm to the last axis."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + config.model.layer_norm_epsilon) * norm["scale"] + norm["bias"]


def project(dense: Mapping[str, jax.Array], x: jax.Array | None) -> jax.Array:
    """Apply a dense layer to the last axis; what is left of it without inputs is its bias [D]."""
    if x is None:
        return dense["bias"]
    return multiply(x.reshape(-1, x.shape[-1]), dense["kernel"]).reshape(*x.shape[:-1], -1) + dense["bias"]


def attend(config: DeployedConfig, params: Params, x_BTD: jax.Array, queries: int | None, gates: Gates) -> jax.Array:
    """Compute the gated outputs of the layer's heads, side by side: residuals [B, T, D] -> [B, Q, H K]."""
    n_BTD = normalise(x_BTD, params["norm1"], config)
    K, (B, T, D) = config.head_width, n_BTD.shape
    kernel_D3Y = params["qkv"]["kernel"].reshape(D, 3, -1)
    bias_3Y, Y = params["qkv"]["bias"].reshape(3, -1), kernel_D3Y.shape[-1]
    if queries is None:
        qkv_NX = multiply(n_BTD.reshape(-1, D), params["qkv"]["kernel"]) + params["qkv"]["bias"]
        qkv_BT3HK = qkv_NX.reshape(B, T, 3, -1, K)
        q_BQHK, k_BTHK, v_BTHK = (qkv_BT3HK[:, :, i] for i in range(3))
    else:
        rows_ND, rows_RD = n_BTD.reshape(-1, D), n_BTD[:, :queries].reshape(-1, D)
        q_BQHK = (multiply(rows_RD, kernel_D3Y[:, 0]) + bias_3Y[0]).reshape(B, queries, -1, K)
        kv_NX = multiply(rows_ND, kernel_D3Y[:, 1:].reshape(D, -1)) + bias_3Y[1:].reshape(-1)
        kv_BT2HK = kv_NX.reshape(B, T, 2, -1, K)
        k_BTHK, v_BTHK = kv_BT2HK[:, :, 0], kv_BT2HK[:, :, 1]
    scores_BHQT = jnp.einsum("BQHK,BTHK->BHQT", q_BQHK, k_BTHK, precision=EXACT) / K**0.5
    weights_BHQT = (
        mask_softmax(scores_BHQT, keep_tokens(config, gates)) if "tokens" in gates else nn.softmax(scores_BHQT)
    )
    y_BQHK = jnp.einsum("BHQT,BTHK->BQHK", weights_BHQT, v_BTHK, precision=EXACT)
    if "heads" in gates:
        g_B1H1 = gates["heads"][:, None, :, None]
        passed = (1 - g_B1H1) * v_BTHK[:, :queries] if config.gate and config.gate.dropped == "identity" else 0.0
        y_BQHK = y_BQHK * g_B1H1 + passed
    return y_BQHK.reshape(B, -1, Y)


def activate(config: DeployedConfig, params: Params, x_BQD: jax.Array, gates: Gates) -> jax.Array:
    """Compute the MLP's neurons: residuals [B, Q, D] -> [B, Q, M]."""
    gelu = exact_gelu if config.model.gelu == "exact" else nn.gelu
    n_BQD = normalise(x_BQD, params["norm2"], config)
    if config.gate is not None and config.gate.dropped == "slice" and "heads" in gates:
        n_BQD = n_BQD * jnp.repeat(gates["heads"], config.head_width, axis=-1)[:, None]
    return gelu(project(params["mlp_in"], n_BQD))


def classify(config: DeployedConfig, params: Params, x_BD: jax.Array) -> jax.Array:
    """Compute the logits: [B, D] CLS residual after the last layer -> [B, C]."""
    return project(params["head"], normalise(x_BD, params["norm"], config))


def decide_gates(config: DeployedConfig, params: Params, x_BTD: jax.Array) -> dict[str, jax.Array]:
    """Compute a layer's thresholded gates by kind, float32 0 or 1; none in a model that is not dynamic."""
    gates: dict[str, jax.Array] = {}
    for kind in GATE_KINDS if config.gate is not None else ():
        if kind not in params.get("gates", {}):
            continue
        assert config.gate is not None
        gate, settings = params["gates"][kind], config.gate.settings(kind)
        if kind == "tokens":
            reads = x_BTD[:, 1 + config.model.registers :]
            reads = normalise(reads, params["norm1"], config) if config.gate.tokens.normalise else reads
        else:
            reads = x_BTD[:, 0]
            reads = normalise(reads, gate["norm"], config) if "norm" in gate else reads
        m = multiply(reads, gate["kernel"]) + gate["bias"]
        m = m - threshold_logit(settings) if settings.threshold != 0.5 else m
        gates[kind] = threshold(m[..., 0] if kind == "tokens" else m)
    return gates


def keep_tokens(config: DeployedConfig, gates: Gates) -> jax.Array:
    """Add CLS and the registers, which are always kept, to the gates of the patches: [B, N] -> [B, T]."""
    return jnp.pad(gates["tokens"], ((0, 0), (1 + config.model.registers, 0)), constant_values=1)


def _gate_sublayer(config: DeployedConfig, added: jax.Array, sublayer: int, gates: Gates) -> jax.Array:
    """Gate what a sublayer adds to the first Q tokens: [B, Q, D], or [D] of a sublayer that is cut."""
    if "sublayers" in gates:
        added = added * gates["sublayers"][:, sublayer, None, None]
    if "tokens" in gates and added.ndim == 3 and added.shape[1] > 1:
        added = added * keep_tokens(config, gates)[:, : added.shape[1], None]
    return added


@functools.partial(jax.jit, static_argnums=0)
def predict(config: DeployedConfig, params: Params, images_BhwC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Predict the classes [B] int32 and the probabilities [B, C] of uint8 images."""
    logits_BC = compute_logits(config, params, images_BhwC)
    return predict_class(logits_BC), jax.nn.softmax(logits_BC)
