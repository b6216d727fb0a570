"""The gates that steering a layer's CLS residual reaches: those of its heads, of its attention and of its MLP.

They are numbered, the heads first, then attention and the MLP, each kind only if the layer gates it. A pattern of G
gates is an integer whose bit g is gate g. The gates of the patches do not read the CLS residual.

Axes: B images, D width, G gates, H heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.config.schema import MOST_HEADS, Config, GateKind
from headsteer_jax.model.gates import SUBLAYERS, Gates
from headsteer_jax.model.macs import count_layer_parts, count_patches
from headsteer_jax.model.vit import ViT


def gates_to_pattern(g_BG: jax.Array) -> jax.Array:
    """Convert [..., G] gates to [...] int32 patterns, whose bit g is gate g."""
    return jnp.sum((g_BG > 0) << jnp.arange(g_BG.shape[-1]), axis=-1, dtype=jnp.int32)


def pattern_to_gates(pattern: np.ndarray, gates: int) -> np.ndarray:
    """Convert [...] patterns to [..., G] bool gates."""
    return (np.asarray(pattern)[..., None] >> np.arange(gates)) & 1 > 0


@dataclass(frozen=True)
class LayerGates:
    """The gates of one layer that read its CLS residual."""

    config: Config
    layer: int

    @property
    def kinds(self) -> tuple[GateKind, ...]:
        """Their kinds, in the order of the gates."""
        return tuple(kind for kind in self.config.gate.kinds_in(self.layer) if kind != "tokens")

    @property
    def heads(self) -> int:
        """The number of heads that the layer gates: all or none."""
        return self.config.model.heads if "heads" in self.kinds else 0

    @property
    def count(self) -> int:
        """The number of gates, G."""
        return self.heads + len(SUBLAYERS) * ("sublayers" in self.kinds)

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each gate: a head's number, attention, mlp."""
        return (*map(str, range(self.heads)), *SUBLAYERS[: self.count - self.heads])

    @property
    def heads_only(self) -> bool:
        """Whether the heads are all that the whole model gates: their share is then a measure of its compute."""
        return self.config.gate.kinds == ("heads",)

    @property
    def fits_table(self) -> bool:
        """Whether a table can hold all 2^G patterns."""
        return self.heads <= MOST_HEADS

    def logits(self, model: ViT, params: Any, x_BD: jax.Array) -> jax.Array:
        """Compute the gate logits of CLS residuals: [B, D] -> [B, G]."""
        parts = [model.apply(params, x_BD, self.layer, kind, method="gate_logits") for kind in self.kinds]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)

    def split(self, g_BG: Any) -> dict[str, Any]:
        """Split [..., G] gates by kind."""
        parts: dict[str, Any] = {"heads": g_BG[..., : self.heads], "sublayers": g_BG[..., self.heads :]}
        return {kind: parts[kind] for kind in self.kinds}

    def join(self, gates: Mapping[str, Any]) -> Any:
        """Join NumPy or JAX gates by kind to [..., G], the inverse of `split`."""
        parts = [gates[kind] for kind in self.kinds]
        if len(parts) == 1:
            return parts[0]
        return (np if isinstance(parts[0], np.ndarray) else jnp).concatenate(parts, axis=-1)

    def macs(self, pattern: np.ndarray, patches: np.ndarray | int | None = None) -> np.ndarray:
        """Count the layer's MACs of images from their patterns.

        Args:
          pattern: [...].
          patches: [...] the number of patches that the layer keeps; None: all.

        Returns:
          [...] float64 of whole numbers.
        """
        pattern = np.asarray(pattern).astype(np.int64)
        patches = count_patches(self.config) if patches is None else np.asarray(patches).astype(np.int64)
        attention, mlp = np.ones_like(pattern), np.ones_like(pattern)
        heads = np.full_like(pattern, self.config.model.heads)
        if "heads" in self.kinds:
            heads = np.bitwise_count(pattern & (2**self.heads - 1)).astype(np.int64)
        if "sublayers" in self.kinds:
            attention, mlp = (pattern >> self.heads) & 1, (pattern >> (self.heads + 1)) & 1
        parts = count_layer_parts(self.config, self.layer, patches, heads, attention, mlp)
        return np.asarray(sum(parts), np.float64)

    def mean_macs(self, patterns: np.ndarray, patches: np.ndarray) -> np.ndarray:
        """Average the layer's MACs under each pattern [P] over images that keep `patches` [N] patches: [P] float64."""
        counts, images = np.unique(patches, return_counts=True)
        sums = [number * self.macs(patterns, count) for count, number in zip(counts, images, strict=True)]
        return np.sum(sums, axis=0) / len(patches)

    @property
    def dense_macs(self) -> int:
        """The MACs of the layer in the dense model, which has no decision networks."""
        heads = self.config.model.heads
        return int(sum(count_layer_parts(self.config, self.layer, count_patches(self.config), heads, 1, 1)[:-1]))


def force_gates(gates: LayerGates, g_G: jax.Array, count: int) -> Gates:
    """Repeat one set of gates [G] for `count` images, by kind."""
    return {kind: jnp.broadcast_to(g, (count, len(g))) for kind, g in gates.split(g_G).items()}
