"""A second implementation of the model, the autoencoder and the steering in NumPy float64, which tests compare with."""

from typing import Any

import numpy as np
from scipy.special import erf


def layer_norm(x: np.ndarray, p: dict[str, Any], epsilon: float) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon) * p["scale"] + p["bias"]


def dense(x: np.ndarray, p: dict[str, Any]) -> np.ndarray:
    return x @ p["kernel"] + p["bias"]


def gelu(x: np.ndarray, kind: str) -> np.ndarray:
    if kind == "exact":
        return x * (1 + erf(x / np.sqrt(2))) / 2
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def gate_logits(x: np.ndarray, block: dict[str, Any], gate: Any, epsilon: float, kind: str = "heads") -> np.ndarray:
    """Compute the logits of one kind, counted from its threshold, from what its gates read: CLS [D] or patches [N, D].

    Gates of heads have their settings in `gate` itself.
    """
    name = "decide" if kind == "heads" else f"decide_{kind}"
    t = (gate if kind == "heads" else getattr(gate, kind)).threshold
    if kind == "tokens":
        x = layer_norm(x, block["norm1"], epsilon) if gate.tokens.normalise else x
        return dense(x, block[name]["linear"])[:, 0] - np.log(t / (1 - t))
    if gate.layer_norm:
        x = layer_norm(x, block[name]["norm"], epsilon)
    return dense(x, block[name]["linear"]) - np.log(t / (1 - t))


def attend(scores_T: np.ndarray, t_T: np.ndarray) -> np.ndarray:
    """Compute one query's weights of the keys: exp of the scores times the gates t, divided by the sum.

    With gates of 0 and 1 that is the softmax over the kept keys. A dropped key's score is cut to the largest of the
    kept ones, which matters only to its gradient.
    """
    kept = t_T > 0.5
    largest = scores_T[kept].max()
    e_T = t_T * np.exp(np.where(kept, scores_T, np.minimum(scores_T, largest)) - largest)
    return e_T / e_T.sum()


def block(x_TD: np.ndarray, p: dict[str, Any], m: Any, gates: Any, dropped: str) -> np.ndarray:
    """Compute a block head by head and token by token.

    Gates are by kind, or those of the heads; None opens everything. They may differ a little from 0 and 1.
    """
    K, T = m.width // m.heads, len(x_TD)
    by_kind = gates if isinstance(gates, dict) else {} if gates is None else {"heads": gates}
    g_H, (a, f) = by_kind.get("heads", np.ones(m.heads)), by_kind.get("sublayers", np.ones(2))
    t_T = np.concatenate([np.ones(1 + m.registers), by_kind.get("tokens", np.ones(T - 1 - m.registers))])
    n = layer_norm(x_TD, p["norm1"], m.layer_norm_epsilon)
    q, k, v = (dense(n, p[name]) for name in ("query", "key", "value"))
    heads = np.zeros_like(x_TD)
    for h in range(m.heads):
        cut = slice(h * K, (h + 1) * K)
        for t in range(T):
            attention = attend(k[:, cut] @ q[t, cut] / np.sqrt(K), t_T)
            passed = v[t, cut] if dropped == "identity" else 0
            heads[t, cut] = g_H[h] * (attention @ v[:, cut]) + (1 - g_H[h]) * passed
    x_TD = x_TD + a * t_T[:, None] * dense(heads, p["out"])
    inputs = layer_norm(x_TD, p["norm2"], m.layer_norm_epsilon)
    if dropped == "slice":
        inputs = inputs * np.repeat(g_H, K)
    return x_TD + f * t_T[:, None] * dense(gelu(dense(inputs, p["mlp_in"]), m.gelu), p["mlp_out"])


def embed(p: dict[str, Any], image: np.ndarray, m: Any) -> np.ndarray:
    """Compute the tokens of a normalised image: CLS, registers, patches."""
    side = m.patch
    tokens = [
        np.einsum("hwc,hwcD->D", image[r : r + side, c : c + side], p["patches"]["kernel"]) + p["patches"]["bias"]
        for r in range(0, image.shape[0], side)
        for c in range(0, image.shape[1], side)
    ]
    x = np.concatenate([p["cls"][0], np.array(tokens)]) + p["positions"][0]
    return np.concatenate([x[:1], p["registers"][0], x[1:]]) if m.registers else x


def vit(params: Any, image: np.ndarray, config: Any, gating: Any, forced: dict[int, Any] | None = None) -> Any:
    """Compute the logits [C] of a normalised image [S, S, C], and by layer its gates, gate logits and CLS residual.

    Args:
      gating: dense, thresholded, or a function (layer, kind, logits) -> gates.
      forced: by layer, gates by kind or those of the heads.

    Returns:
      The logits; gates and gate logits by layer and kind; CLS residuals by layer.
    """
    p, m, gate = params["params"], config.model, config.gate
    first = {"heads": gate.first_layer, "sublayers": gate.sublayers.first_layer, "tokens": gate.tokens.first_layer}
    x = embed(p, image, m)
    gates: dict[int, Any] = {}
    logits: dict[int, Any] = {}
    cls = {}
    for layer in range(m.depth):
        layer_params = p[f"layers_{layer}"]
        cls[layer] = x[0]
        own = {}
        for kind in [kind for kind in gate.kinds if layer >= first[kind]]:
            reads = x[1 + m.registers :] if kind == "tokens" else x[0]
            values = gate_logits(reads, layer_params, gate, m.layer_norm_epsilon, kind)
            logits.setdefault(layer, {})[kind] = values
            if callable(gating):
                own[kind] = gating(layer, kind, values)
            else:
                own[kind] = (values > 0).astype(float) if gating == "thresholded" else np.ones_like(values)
        change = (forced or {}).get(layer, {})
        own |= change if isinstance(change, dict) else {"heads": change}
        if own:
            gates[layer] = own
        x = block(x, layer_params, m, own, gate.dropped)
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
