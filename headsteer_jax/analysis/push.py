"""Why usage falls or rises under amplification: the push of a class against the class's own gate logits.

With *add*, *delta* and *policy*, alpha moves the gate logits of a class's images along one vector, the class's push:
m(alpha) = m + alpha p. As alpha grows, a gate opens where p > 0 and closes where p < 0, whatever its bias is, so usage
tends to the share of positive pushes. The latents of a class add up to about its mean residual less that of all images,
which the autoencoder subtracts. The push therefore resembles the class's deviation, its mean gate logits less the mean
over classes, whose signs are about balanced, while the bias that keeps most gates open belongs to no latent.

Axes: G strategies, S seeds, C classes, H gates.
"""

from typing import Any

import numpy as np

from headsteer_jax.steer.results import SweepResult


def center_classes(gate_logits_CH: np.ndarray) -> np.ndarray:
    """Compute each class's deviation: its mean gate logits less the mean of all classes' that have images."""
    return gate_logits_CH - np.nanmean(gate_logits_CH, axis=0)


def explain_usage(result: SweepResult) -> dict[str, dict[str, Any]]:
    """Compare every strategy's pushes with the classes' deviations; nothing where alpha does not act as a push.

    Returns:
      By strategy: `limit`, the usage on test that a growing alpha tends to, where a gate without a push stays as it is
      (mean over seeds); `correlation`, of push and deviation within each gate, over classes; `same_sign`, the share of
      classes and gates in which push and deviation have one sign. The last two are None without variation.
    """
    if result.push is None or result.gate_logits is None:
        return {}
    count_C = result.test.count
    deviation_CH = center_classes(result.gate_logits)
    known_C = ~np.isnan(deviation_CH).any(axis=1)
    explained: dict[str, dict[str, Any]] = {}
    for name, push_SCH in zip(result.strategies, result.push, strict=True):
        if np.isnan(push_SCH).any():  # it does not move a class along one vector
            continue
        p_SCH, d_SCH = push_SCH[:, known_C], np.broadcast_to(deviation_CH, push_SCH.shape)[:, known_C]
        within_SCH = p_SCH - p_SCH.mean(axis=1, keepdims=True)
        spread = np.sqrt((within_SCH**2).sum() * (d_SCH**2).sum())
        pushed = p_SCH != 0
        on_SCH = np.where(push_SCH == 0, result.test.unsteered_heads_on, (push_SCH > 0) * count_C[:, None])
        explained[name] = {
            "limit": float(on_SCH.sum(axis=1).mean() / count_C.sum()),
            "correlation": float((within_SCH * d_SCH).sum() / spread) if spread > 0 else None,
            "same_sign": float((np.sign(p_SCH) == np.sign(d_SCH))[pushed].mean()) if pushed.any() else None,
        }
    return explained
