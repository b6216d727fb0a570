"""The steerability of each gated layer: class steering of every layer by itself, then of all of them at once.

Every layer has its own autoencoder. If several layers are steered, a later gate reads a residual that the changed heads
of the earlier layers have already changed.

Axes: B, N images, A alphas, D width, n gates of one kind in one layer.
"""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils.epath import Path

from headsteer_jax.analysis.stats import bootstrap_means, bootstrap_weights, choose_alpha, percentile_interval
from headsteer_jax.config.schema import GATE_KINDS, Config
from headsteer_jax.data.dataset import Dataset, Split, hash_data
from headsteer_jax.model.vit import TrainedModel
from headsteer_jax.sae.autoencoder import encode_split
from headsteer_jax.sae.metrics import measure_health
from headsteer_jax.sae.residuals import Residuals, ResidualSelection, load_all, load_or_compute_residuals
from headsteer_jax.sae.train import seed_members, train_members
from headsteer_jax.steer.gates import LayerGates
from headsteer_jax.steer.steering import Steering
from headsteer_jax.steer.strategies import class_frequent_latents, latent_statistics
from headsteer_jax.steer.suffix import SuffixSetting, predict_without_gates, run_suffix_from_unsteered

logger = logging.getLogger(__name__)


def accuracy_all_off(trained: TrainedModel, split: Split, layer: int) -> float:
    """Compute the accuracy when one layer's gates that read its CLS residual are all closed."""
    return float(np.mean(predict_without_gates(trained, split, layer, f"layer {layer} off") == split.labels))


def keep_first_of_each_class(split: Split, per_class: int) -> Split:
    """Keep the first images of each class, or all images if `per_class` is 0."""
    if not per_class:
        return split
    indices = np.sort(np.concatenate([np.flatnonzero(split.labels == c)[:per_class] for c in np.unique(split.labels)]))
    return Split(split.images[indices], split.labels[indices])


class SteeredSplit(NamedTuple):
    """A split without steering, as alpha 0, and under every alpha of the profile, steered by the label."""

    config: Config
    gates: Mapping[int, Mapping[str, np.ndarray]]  # by steered layer and kind, [A, N, n] bool
    predictions: np.ndarray  # [A, N] int32
    labels: np.ndarray  # [N]

    @property
    def used(self) -> np.ndarray:
        """[A, N] share of the steered layers' gates that are open, of those that read the CLS residual."""
        open_gates = [LayerGates(self.config, layer).join(by_kind) for layer, by_kind in self.gates.items()]
        return np.concatenate(open_gates, axis=-1).mean(axis=-1, dtype=np.float32)

    @property
    def macs(self) -> np.ndarray:
        """[A, N] MACs of the steered layers, as a share of those of the dense model."""
        counted, dense = np.zeros(self.predictions.shape), 0
        for layer, by_kind in self.gates.items():
            gates = LayerGates(self.config, layer)
            pattern_AN = gates.join(by_kind) @ (1 << np.arange(gates.count))
            counted += gates.macs(pattern_AN, by_kind["tokens"].sum(axis=-1) if "tokens" in by_kind else None)
            dense += gates.dense_macs
        return counted / dense

    @property
    def right(self) -> np.ndarray:
        """[A, N] bool: is the answer right."""
        return self.predictions == self.labels


def _summarise_layer(validation: SteeredSplit, test: SteeredSplit, config: Config) -> dict[str, Any]:
    """Summarise the curves on test, and the alpha chosen on validation; it is 0 if none above keeps the accuracy."""
    alphas = np.array((0.0, *config.layers.alphas))
    heads_only = config.gate.kinds == ("heads",)
    cost_A = (validation.used if heads_only else validation.macs).mean(axis=1)
    accuracy_A = validation.right.mean(axis=1)
    chosen = int(choose_alpha(alphas, cost_A, accuracy_A, accuracy_A[0] - config.steer.tolerance))
    used, right, macs = test.used, test.right, test.macs
    rng = np.random.default_rng([config.seed, 5])
    weights = bootstrap_weights(test.labels, config.steer.bootstrap, rng)
    used_R = bootstrap_means(lambda _: used, 1, weights, rng)
    right_R = bootstrap_means(lambda _: right, 1, weights, rng)
    macs_R = bootstrap_means(lambda _: macs, 1, weights, rng)

    def change_ci(resampled: np.ndarray) -> list[float]:
        return [
            float(end) for end in percentile_interval(resampled[:, chosen] - resampled[:, 0], config.steer.confidence)
        ]

    return {
        "alphas": alphas.tolist(),
        "usage": used.mean(axis=1, dtype=np.float64).tolist(),
        "accuracy": right.mean(axis=1).tolist(),
        "alpha": float(alphas[chosen]),
        "usage_before": float(used[0].mean(dtype=np.float64)),
        "usage_after": float(used[chosen].mean(dtype=np.float64)),
        "usage_change_ci": change_ci(used_R),
        "accuracy_before": float(right[0].mean()),
        "accuracy_after": float(right[chosen].mean()),
        "accuracy_change_ci": change_ci(right_R),
        "macs_share": macs.mean(axis=1).tolist(),
        "macs_share_before": float(macs[0].mean()),
        "macs_share_after": float(macs[chosen].mean()),
        "macs_share_change_ci": change_ci(macs_R),
    }


def configure_layer(config: Config, layer: int, images: int) -> Config:
    """Return the config with which a layer's autoencoder is trained on the CLS residuals of `images` images."""
    changes = {"layer": layer, "seeds": 1, "control": False, "views": 1, "tokens": "cls"}
    changes |= {"epochs": config.layers.epochs, "batch": min(config.sae.batch, images)}
    sae = config.sae.model_copy(update=changes)
    return config.model_copy(update={"sae": sae})


def list_profiled_layers(config: Config) -> tuple[int, ...]:
    """List the layers that the profile steers, ascending."""
    return tuple(sorted({layer % config.model.depth for layer in config.layers.layers} or config.steerable_layers))


def _steer_layer(
    trained: TrainedModel, dataset: Dataset, layer: int, source: Residuals, directory: Path
) -> tuple[Steering, float]:
    """Train a layer's autoencoder and choose the latents of class steering.

    Args:
      source: the training residuals.
      directory: for the checkpoints.

    Returns:
      The steering, and the share of dead latents.
    """
    config, labels = trained.config, dataset.train.labels
    layer_config = configure_layer(config, layer, len(labels))
    members = train_members(layer_config, seed_members(layer_config.sae), source, directory, data=hash_data(dataset))
    sae = members.autoencoders(config.sae.inference_k).member(0)
    z_NF = encode_split(sae, load_all(source))
    stats = latent_statistics(z_NF, labels, len(dataset.class_names), sae.decoder)
    choice = class_frequent_latents(stats, config.steer, np.random.default_rng(0))
    return Steering(sae, stats.strength, choice), float(np.mean(stats.frequency == 0))


def profile_layers(trained: TrainedModel, dataset: Dataset, directory: Path, cache: str | Path) -> dict[str, Any]:
    """Steer each of config.layers.layers by itself, then all of them together.

    Latents are chosen on the training split and alpha on validation; the figures are those of test.

    Args:
      directory: for the checkpoints.
      cache: directory of the activation cache.

    Returns:
      `layers`: a row for each, and `together`, if there are several: usage there is the mean over these layers.
      Each row has curves over `alphas`, and figures before and after at the chosen alpha with their intervals; a
      layer's row also has its number, the accuracy with all its heads off, and its autoencoder's explained variance and
      share of dead latents.
    """
    config = trained.config
    layers = list_profiled_layers(config)
    validation, test = (
        keep_first_of_each_class(split, config.layers.per_class) for split in (dataset.validation, dataset.test)
    )
    source = load_or_compute_residuals(cache, trained, ResidualSelection(dataset.train, "train", layers, "cls"))
    x_test = load_or_compute_residuals(None, trained, ResidualSelection(test, "test", layers, "cls"))
    steered: dict[int, Steering] = {}
    rows: list[dict[str, Any]] = []
    for layer in layers:
        logger.info(f"layer {layer}: training its autoencoder")
        steered[layer], dead = _steer_layer(trained, dataset, layer, source[layer], directory / str(layer))
        explained = measure_health(steered[layer].sae, [load_all(x_test[layer])]).explained_variance
        rows.append({"layer": layer, "explained_variance": explained, "dead_fraction": dead})

    def steer_split(steering: Mapping[int, Steering], split: Split, description: str) -> SteeredSplit:
        alphas = np.array((0.0, *config.layers.alphas))
        settings = [SuffixSetting(steering, split.labels)]
        result = run_suffix_from_unsteered(trained, split, settings, alphas, description, GATE_KINDS)
        gates = {layer: {kind: g[0] for kind, g in by_kind.items()} for layer, by_kind in result.gates.items()}
        return SteeredSplit(config, gates, result.predictions[0], split.labels)

    def measure(steering: Mapping[int, Steering], description: str) -> dict[str, Any]:
        on_validation = steer_split(steering, validation, f"validation: {description}")
        return _summarise_layer(on_validation, steer_split(steering, test, f"test: {description}"), config)

    for row in rows:
        layer = row["layer"]
        row |= measure({layer: steered[layer]}, f"layer {layer} steered")
        row["all_off"] = accuracy_all_off(trained, test, layer)
    together = measure(steered, "all steered") if len(layers) > 1 else None
    return {"layers": rows, "together": together, "images": len(test.labels)}
