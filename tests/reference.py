"""A second implementation of the model, the autoencoder and the steering in NumPy float64, which tests compare with."""

from typing import Any

import numpy as np
from scipy.special import erf, softmax


def layer_norm(x: np.ndarray, p: dict[str, Any], epsilon: float) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon) * p["scale"] + p["bias"]


def dense(x: np.ndarray, p: dict[str, Any]) -> np.ndarray:
    return x @ p["kernel"] + p["bias"]


def gelu(x: np.ndarray, kind: str) -> np.ndarray:
    if kind == "exact":
        return x * (1 + erf(x / np.sqrt(2))) / 2
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def gate_logits(x_D: np.ndarray, block: dict[str, Any], gate: Any, epsilon: float) -> np.ndarray:
    if gate.layer_norm:
        x_D = layer_norm(x_D, block["decide"]["norm"], epsilon)
    return dense(x_D, block["decide"]["linear"])


def block(x_TD: np.ndarray, p: dict[str, Any], m: Any, g_H: np.ndarray | None, dropped: str) -> np.ndarray:
    """Compute a block head by head and token by token."""
    K = m.width // m.heads
    n = layer_norm(x_TD, p["norm1"], m.layer_norm_epsilon)
    q, k, v = (dense(n, p[name]) for name in ("query", "key", "value"))
    heads = np.zeros_like(x_TD)
    for h in range(m.heads):
        cut = slice(h * K, (h + 1) * K)
        for t in range(len(x_TD)):
            attention = softmax(k[:, cut] @ q[t, cut] / np.sqrt(K))
            output = attention @ v[:, cut]
            if g_H is not None and not g_H[h]:
                output = np.zeros(K) if dropped == "zero" else v[t, cut]
            heads[t, cut] = output
    x_TD = x_TD + dense(heads, p["out"])
    hidden = gelu(dense(layer_norm(x_TD, p["norm2"], m.layer_norm_epsilon), p["mlp_in"]), m.gelu)
    return x_TD + dense(hidden, p["mlp_out"])


def vit(params: Any, image: np.ndarray, config: Any, gating: str, forced: dict[int, np.ndarray] | None = None) -> Any:
    """Compute the logits [C] of a normalised image [S, S, C], and by layer its gates, gate logits and CLS residual."""
    p, m, side = params["params"], config.model, config.model.patch
    tokens = [
        np.einsum("hwc,hwcD->D", image[r : r + side, c : c + side], p["patches"]["kernel"]) + p["patches"]["bias"]
        for r in range(0, image.shape[0], side)
        for c in range(0, image.shape[1], side)
    ]
    x = np.concatenate([p["cls"][0], np.array(tokens)]) + p["positions"][0]
    gates, logits, cls = {}, {}, {}
    for layer in range(m.depth):
        layer_params = p[f"layers_{layer}"]
        cls[layer] = x[0]
        g = None
        if layer >= config.gate.first_layer:
            logits[layer] = gate_logits(x[0], layer_params, config.gate, m.layer_norm_epsilon)
            g = (logits[layer] > 0).astype(float) if gating == "thresholded" else np.ones(m.heads)
            g = (forced or {}).get(layer, g)
            gates[layer] = g
        x = block(x, layer_params, m, g, config.gate.dropped)
    answer = dense(layer_norm(x[0], p["norm"], m.layer_norm_epsilon), p["head"])
    return answer, gates, logits, cls


def encode(sae: Any, u_D: np.ndarray, k: int | None) -> np.ndarray:
    """Compute TopK(ReLU(W_e (u - b_d) + b_e)) of a vector; without k, keep the latents above their thresholds."""
    a = np.maximum(sae.W_e @ (u_D - sae.b_d) + sae.b_e, 0)
    if k is None:
        return np.where(a > sae.threshold, a, 0)
    z = np.zeros_like(a)
    largest = np.argsort(-a)[:k]
    z[largest] = a[largest]
    return z


def steered(sae: Any, mean: np.ndarray, scale: float, x_D: np.ndarray, s_F: np.ndarray, choice: Any, alpha: float,
            k: int, mode: str, form: str) -> np.ndarray:  # fmt: skip
    """Compute x' of a vector; `choice` is (latents [S], weights [S])."""
    z = encode(sae, (x_D - mean) * scale, k)
    new = z.copy()
    for j, w in zip(*choice, strict=True):
        if mode == "add":
            new[j] = z[j] + alpha * w * s_F[j]
        elif mode == "scale":
            new[j] = (1 + alpha * w) * z[j]
        elif mode == "clamp":
            new[j] = alpha * w * s_F[j]
        else:
            new[j] = (1 - min(max(alpha, 0), 1)) * z[j]
        new[j] = max(new[j], 0)
    decoded, decoded_new = ((latents @ sae.W_d + sae.b_d) / scale + mean for latents in (z, new))
    return x_D + decoded_new - decoded if form == "delta" else decoded_new


def in_float64(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: in_float64(value) for name, value in tree.items()}
    return np.asarray(tree, np.float64)
