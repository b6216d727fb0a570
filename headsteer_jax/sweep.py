"""The steering experiment: every strategy, seed and alpha on the validation and the test split, as arrays of counts.

Latents are chosen on the training split. Nothing is chosen here: `summary` does, on validation alone.
Axes: G strategies, S seeds, Y ways to name the class, A alphas, N images, C classes, H heads, F latents.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.config import Config, HeadSteerError
from headsteer_jax.data import Dataset, Split, check_classes
from headsteer_jax.latents import Choice, LatentStatistics, Outcomes, overlap, statistics, strategy
from headsteer_jax.progress import progress
from headsteer_jax.sae import SAE, Scaling, encode_all
from headsteer_jax.stats import class_counts
from headsteer_jax.steer import Prefix, Sweep, alpha_grid, gates_of, pattern_table
from headsteer_jax.vit import ViT

NAMED_BY = ("true", "predicted")  # the class that steers an image: its label, or what the unsteered model says


def check_names(config: Config, class_names: tuple[str, ...]) -> None:
    """Raises HeadSteerError for a strategy or a class that does not exist, before anything is computed."""
    for name in config.steer.strategies:
        strategy(name)
    check_classes("config.steer.classes", config.steer.classes, class_names)


def seed_of(saes: SAE, seed: int) -> SAE:
    """One of the autoencoders trained side by side."""
    return jax.tree.map(lambda leaf: leaf[seed], saes)


def _scored(split: Split, config: Config, class_names: tuple[str, ...]) -> Split:
    """The images of config.steer.classes, or all."""
    if not config.steer.classes:
        return split
    wanted = np.isin(split.labels, [class_names.index(name) for name in config.steer.classes])
    return Split(split.images[np.flatnonzero(wanted)], split.labels[wanted])


def _top_images(z_NF: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """[F, count] the training images that activate each latent most, strongest first, and the activations there."""
    count = min(count, len(z_NF))
    some = np.array_split(z_NF, -(-z_NF.shape[1] // 128), axis=1)  # the indices of all at once would be large
    top_KF = np.concatenate([np.argpartition(-z_Nf, count - 1, axis=0)[:count] for z_Nf in some], axis=1)
    order = np.argsort(-np.take_along_axis(z_NF, top_KF, axis=0), axis=0, kind="stable")
    top_KF = np.take_along_axis(top_KF, order, axis=0)
    return top_KF.T.astype(np.int32), np.take_along_axis(z_NF, top_KF, axis=0).T


def _counts(split: str, prefix: Prefix, labels: np.ndarray, classes: int, heads: int) -> dict[str, np.ndarray]:
    right = prefix.prediction == labels
    return {
        f"{split}_labels": labels.astype(np.int32),
        f"{split}_count": np.bincount(labels, minlength=classes),
        f"{split}_pattern": prefix.pattern.astype(np.uint16),
        f"{split}_table": prefix.table.astype(np.int16),
        f"{split}_unsteered_correct": class_counts(right, labels, classes),
        f"{split}_unsteered_heads_on": class_counts(gates_of(prefix.pattern, heads).T, labels, classes).T,
    }


def _folds(labels: np.ndarray) -> np.ndarray:
    """[N] 0 or 1: every class's images in two halves, by turns."""
    fold_N = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        fold_N[members] = np.arange(len(members)) % 2
    return fold_N


def _without_fold(stats: LatentStatistics, fold_N: np.ndarray, fold: int) -> LatentStatistics:
    """What a strategy sees that is to be scored on one half of validation: that half is left out.

    So alpha is chosen on images that did not choose the latents.
    """
    train, validation = stats.outcomes
    return stats._replace(outcomes=(train, Outcomes(*(field[fold_N != fold] for field in validation))))


def check_validation(split: Split, config: Config, class_names: tuple[str, ...]) -> None:
    """Raises HeadSteerError where a steered class has too few validation images for the choice of alpha."""
    wanted = config.steer.classes or class_names
    counts = np.bincount(split.labels, minlength=len(class_names))
    for name in wanted:
        count, least = counts[class_names.index(name)], config.steer.least_validation
        if count < least:
            raise HeadSteerError(
                f"validation: {count} images of class {name!r} are too few to choose alpha on; raise "
                f"data.validation_fraction, or lower steer.least_validation = {least}"
            )


def _outcomes(
    config: Config, dataset: Dataset, model: ViT, params: Any, prefix: Prefix, validation: Split
) -> tuple[Outcomes, Outcomes]:
    """What gate_aligned looks at: steer.evidence training images of each class, and the validation split.

    The training images are looked at only where the strategy is asked for.
    """
    labels = dataset.train.labels
    aligned = "gate_aligned" in config.steer.strategies
    some = np.concatenate(
        [
            np.flatnonzero(labels == label)[: config.steer.evidence * aligned]
            for label in range(len(dataset.class_names))
        ]
    )
    split = Split(dataset.train.images[some], labels[some])
    heads = config.model.heads
    if len(some):
        seen = pattern_table(model, params, split, config, f"train: all {2**heads} gate patterns")
        logits, right = seen.gate_logits, seen.table == split.labels[:, None]
    else:
        logits, right = np.zeros((0, heads), np.float32), np.zeros((0, 2**heads), bool)
    return (
        Outcomes(split.labels, logits, right),
        Outcomes(validation.labels, prefix.gate_logits, prefix.table == validation.labels[:, None]),
    )


def run_sweep(
    config: Config, dataset: Dataset, model: ViT, params: Any, saes: SAE, scaling: Scaling, x_train: np.ndarray
) -> dict[str, np.ndarray]:
    """All arrays of sweep.npz; docs/outputs.md names each.

    Args:
      saes: the autoencoders, leading axis S.
      x_train: [N, D] residuals of the training split.
    """
    check_names(config, dataset.class_names)
    steer, classes, heads = config.steer, len(dataset.class_names), config.model.heads
    alphas = alpha_grid(steer)
    splits = {
        "validation": _scored(dataset.validation, config, dataset.class_names),
        "test": _scored(dataset.test, config, dataset.class_names),
    }
    arrays: dict[str, np.ndarray] = {
        "strategies": np.array(steer.strategies),
        "named_by": np.array(NAMED_BY),
        "alphas": alphas,
        "class_names": np.array(dataset.class_names),
    }
    if dataset.related is not None:
        arrays["related"] = dataset.related
    prefixes, sweeps = {}, {}
    for name, split in splits.items():
        prefixes[name] = pattern_table(model, params, split, config, f"{name}: all {2**heads} gate patterns")
        sweeps[name] = Sweep(model, params, split, prefixes[name], config)
        arrays |= _counts(name, prefixes[name], split.labels, classes, heads)

    outcomes = _outcomes(config, dataset, model, params, prefixes["validation"], splits["validation"])
    mean_D = jnp.asarray(scaling.mean)
    gate_HD = jax.jacobian(lambda x_D: model.apply(params, x_D[None], config.sae_layer, method="gate_logits")[0])(
        mean_D
    )
    choices: list[list[Choice]] = []  # [S][G]
    crossed: list[list[Choice]] = []  # the same with 2 C rows, for validation
    fold_N = _folds(splits["validation"].labels)
    stats: list[LatentStatistics] = []
    for seed in range(config.sae.seeds):
        sae = seed_of(saes, seed)
        z_NF = encode_all(sae, scaling, x_train, config.sae.k)
        decoder = np.asarray(sae.W_d) / scaling.scale
        stats.append(statistics(z_NF, dataset.train.labels, classes, decoder, np.asarray(gate_HD).T, outcomes))
        seen = [stats[-1], *(_without_fold(stats[-1], fold_N, fold) for fold in (0, 1))]
        choices.append([])
        crossed.append([])
        for number, name in enumerate(steer.strategies):
            rngs = (np.random.default_rng([config.seed, 3, seed, number]) for _ in seen)
            choice, *halves = (strategy(name)(one, steer, rng) for one, rng in zip(seen, rngs, strict=True))
            choices[-1].append(choice)
            crossed[-1].append(Choice(*(np.concatenate(part) for part in zip(*halves, strict=True))))
        if seed == 0:
            arrays["top_images"], arrays["top_activations"] = _top_images(z_NF, config.report.top_images)
            arrays["class_frequency"] = stats[0].class_frequency.astype(np.float32)
    arrays["latents"] = np.stack([[c.latents for c in row] for row in choices], axis=1)
    arrays["weights"] = np.stack([[c.weights for c in row] for row in choices], axis=1)
    arrays["frequency"] = np.stack([s.frequency for s in stats])

    shape = (len(steer.strategies), config.sae.seeds, len(NAMED_BY), len(alphas))
    settings = int(np.prod(shape[:3])) * len(splits)
    with progress(settings, f"sweep of {len(alphas)} alphas", "setting") as bar:
        for name, split in splits.items():
            labels, prefix = split.labels, prefixes[name]
            used, offset = (crossed, classes * fold_N) if name == "validation" else (choices, 0)
            patterns = np.zeros((*shape, len(labels)), np.uint16)
            predictions = np.zeros((*shape, len(labels)), np.int16)
            for g, s, y in np.ndindex(*shape[:3]):
                steered_by = (labels if y == 0 else prefix.prediction) + offset
                patterns[g, s, y], predictions[g, s, y] = sweeps[name](
                    seed_of(saes, s), scaling, stats[s].strength, used[s][g], steered_by
                )
                bar.update(1)
            right, before = predictions == labels, prefix.prediction == labels
            arrays |= {
                f"{name}_steered_pattern": patterns,
                f"{name}_steered_prediction": predictions,
                f"{name}_correct": class_counts(right, labels, classes),
                f"{name}_gained": class_counts(right & ~before, labels, classes),
                f"{name}_lost": class_counts(~right & before, labels, classes),
                f"{name}_heads_on": np.stack(
                    [class_counts((patterns >> head) & 1, labels, classes) for head in range(heads)], axis=-1
                ),
            }
    by_name = {name: arrays["latents"][g] for g, name in enumerate(steer.strategies)}  # [S, C, K]
    if "class" in by_name:
        arrays["overlap_class_class"] = np.stack([overlap(one, one) for one in by_name["class"]])
    if "class" in by_name and "global" in by_name:
        pairs = zip(by_name["global"], by_name["class"], strict=True)
        arrays["overlap_global_class"] = np.stack([overlap(g[:1], c)[0] for g, c in pairs])
    return arrays
