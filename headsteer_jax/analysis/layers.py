"""How steerable each gated layer is: class steering of every layer by itself, then of all of them at once.

Every layer has its own autoencoder. Where several are steered, a later gate reads a residual that the earlier layers'
changed heads have already changed. Axes: B, N images, A alphas, L steered layers, H heads, D width.
"""

import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path

from headsteer_jax.analysis.stats import bootstrap_means, bootstrap_weights, choose_alpha, percentile_interval
from headsteer_jax.config.schema import Config
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import Dataset, Split
from headsteer_jax.model.passes import per_image_program, run_over_split
from headsteer_jax.model.vit import TrainedModel, predict_class
from headsteer_jax.sae.autoencoder import encode_split
from headsteer_jax.sae.metrics import measure_health
from headsteer_jax.sae.residuals import ResidualSelection, load_all, load_or_compute_residuals
from headsteer_jax.sae.train import seed_members, train_members
from headsteer_jax.steer.steering import Steering, run_suffix
from headsteer_jax.steer.strategies import class_frequent_latents, latent_statistics

logger = logging.getLogger(__name__)


def accuracy_all_off(trained: TrainedModel, split: Split, layer: int) -> float:
    """Compute the accuracy when one layer drops every head."""
    config = trained.config

    def run(params: Any, images: jax.Array) -> tuple[jax.Array]:
        closed = {layer: jnp.zeros((len(images), config.model.heads))}
        logits_BC, _ = trained.model.apply(params, preprocess(images, config.data), gates=closed)
        return (predict_class(logits_BC),)

    program = per_image_program(run, config.train.eval_batch)
    (prediction_N,) = run_over_split(program, trained.params, split, f"layer {layer} off")
    return float(np.mean(prediction_N == split.labels))


def _first_of_each_class(split: Split, per_class: int) -> Split:
    """The first images of each class; 0: all."""
    if not per_class:
        return split
    kept = np.sort(np.concatenate([np.flatnonzero(split.labels == c)[:per_class] for c in np.unique(split.labels)]))
    return Split(split.images[kept], split.labels[kept])


def _summarise_layer(
    validation: tuple[np.ndarray, np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray, np.ndarray],
    config: Config,
) -> dict[str, Any]:  # fmt: skip
    """Curves on test, and the alpha chosen on validation; each split is (gates, predictions, labels)."""
    alphas = np.array((0.0, *config.layers.alphas))

    def curves(gates: np.ndarray, predictions: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return gates.mean(axis=(2, 3), dtype=np.float32), predictions == labels  # [A, N] each

    used, right = (values.mean(axis=1) for values in curves(*validation))
    chosen = int(choose_alpha(alphas, used, right, right[0] - config.steer.tolerance))
    used, right = curves(*test)
    rng = np.random.default_rng([config.seed, 5])
    weights = bootstrap_weights(test[2], config.steer.bootstrap, rng)
    used_R = bootstrap_means(lambda _: used, 1, weights, rng)
    right_R = bootstrap_means(lambda _: right, 1, weights, rng)

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
    }


def profile_layers(trained: TrainedModel, dataset: Dataset, directory: Path, cache: str | Path) -> dict[str, Any]:
    """Steer each of config.layers.layers by itself, then all of them together.

    Latents are chosen on the training split, alpha on validation, figures are test's.

    Args:
      directory: for the checkpoints.
      cache: where activations are kept.

    Returns:
      `layers`: a row for each, and `together`, where there are several: usage there is the mean over these layers.
      Each row: curves over `alphas`, figures before and after at the alpha chosen, their intervals; of a layer also its
      number, the accuracy with all its heads off, and its autoencoder's explained variance and dead share.
    """
    config = trained.config
    depth = config.model.depth
    layers = tuple(sorted({layer % depth for layer in config.layers.layers} or range(config.gate.first_layer, depth)))
    splits = {"validation": dataset.validation, "test": dataset.test}
    splits = {name: _first_of_each_class(split, config.layers.per_class) for name, split in splits.items()}
    source = load_or_compute_residuals(cache, trained, ResidualSelection(dataset.train, "train", layers, "cls"))
    x_test = load_or_compute_residuals(None, trained, ResidualSelection(splits["test"], "test", layers, "cls"))
    steered: dict[int, Steering] = {}
    rows: list[dict[str, Any]] = []
    for layer in layers:
        logger.info(f"layer {layer}: autoencoder")
        one = config.sae.model_copy(
            update={"layer": layer, "seeds": 1, "control": False, "epochs": config.layers.epochs, "tokens": "cls"}
            | {"batch": min(config.sae.batch, len(dataset.train.labels))}
        )
        of_layer = config.model_copy(update={"sae": one})
        members = train_members(of_layer, seed_members(one), source[layer], directory / str(layer))
        sae = members.autoencoders(config.sae.inference_k).member(0)
        z_NF = encode_split(sae, load_all(source[layer]))
        stats = latent_statistics(z_NF, dataset.train.labels, len(dataset.class_names), sae.decoder)
        choice = class_frequent_latents(stats, config.steer, np.random.default_rng(0))
        steered[layer] = Steering(sae, stats.strength, choice)
        on_test = measure_health(sae, [load_all(x_test[layer])])
        rows.append(
            {
                "layer": layer,
                "explained_variance": on_test.explained_variance,
                "dead_fraction": float(np.mean(stats.frequency == 0)),
            }
        )

    def measured(some: Mapping[int, Steering], what: str) -> dict[str, Any]:
        alphas, on = np.array((0.0, *config.layers.alphas)), []
        for name, split in splits.items():
            setting = [(some, split.labels)]
            gates, predictions = run_suffix(trained, split, setting, alphas, f"{name}: {what}")
            on.append((gates[0], predictions[0], split.labels))
        return _summarise_layer(on[0], on[1], config)

    for row in rows:
        layer = row["layer"]
        row |= measured({layer: steered[layer]}, f"layer {layer} steered")
        row["all_off"] = accuracy_all_off(trained, splits["test"], layer)
    together = measured(steered, "all steered") if len(layers) > 1 else None
    return {"layers": rows, "together": together, "images": len(splits["test"].labels)}
