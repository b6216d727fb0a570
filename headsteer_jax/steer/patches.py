"""Steering the gates of the patches: an autoencoder of their residuals changes what each patch's gate reads.

A class's concepts are the latents that fire more often on the patches of its images than on all patches. In the mode
`scale` they are amplified where they are: x'_n = x_n + decode(z'_n) - decode(z_n) for each patch n. The control takes
random latents that fire as often overall and move the class's patches as far.

Axes: B, N images, P patches, M patches of a class, C classes, F latents, S chosen latents, D width, G strategies, S'
seeds, A alphas, V settings.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy.sparse import csr_array, vstack

from headsteer_jax.config.schema import GATE_KINDS, Config, SteerConfig
from headsteer_jax.data.dataset import Split
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.compute import ImageGates, count_image_macs
from headsteer_jax.model.vit import TrainedModel
from headsteer_jax.sae.autoencoder import ROWS_AT_ONCE, Autoencoder, encode_chunks, row_slices
from headsteer_jax.sae.residuals import StoredResiduals, Tokens
from headsteer_jax.sae.store import RunData
from headsteer_jax.steer.gates import LayerGates
from headsteer_jax.steer.steering import Steering, steer_latents
from headsteer_jax.steer.strategies import Choice
from headsteer_jax.steer.suffix import SuffixResult, SuffixSetting, run_suffix, run_suffix_from_unsteered

PATCHES_OF_A_CLASS = 5000  # the most training patches of each class that the choice of latents looks at
CLOSEST = 10  # latents of similar frequency, of which the control draws one


def steers_patches(config: Config) -> bool:
    """Tell whether the autoencoder reads patches whose gates it can steer."""
    return config.sae.tokens != "cls" and "tokens" in config.gate.kinds_in(config.sae_layer)


class PatchStatistics(NamedTuple):
    """How one autoencoder's latents fire on the patches of training images."""

    codes: list[csr_array]  # [C] of each class's patches, [M, F]
    class_frequency: np.ndarray  # [C, F] share of the class's patches on which the latent fires
    frequency: np.ndarray  # [F] the mean over classes
    strength: np.ndarray  # [F] s_j: mean activation over the patches on which it fires; 0 for a dead latent
    decoder: np.ndarray  # [F, D] in units of the residual stream


def measure_patches(
    sae: Autoencoder, residuals: StoredResiduals, tokens: Tokens, labels: np.ndarray, classes: int, evidence: int
) -> PatchStatistics:
    """Measure how latents fire on the patches of `evidence` training images of each class, or of fewer.

    Args:
      residuals: of the training split.
      tokens: whose residuals they are: patches, or all (CLS first).
      labels: [N] of the training split.
    """
    first = 1 if tokens == "all" else 0
    count = max(1, min(evidence, PATCHES_OF_A_CLASS // (residuals.tokens - first)))
    codes = []
    for label in range(classes):
        x_BPD = residuals.images(np.flatnonzero(labels == label)[:count])[:, first:]
        rows = row_slices(x_BPD.reshape(-1, x_BPD.shape[-1]), ROWS_AT_ONCE)
        codes.append(vstack([z_MF for _, z_MF in encode_chunks(sae, rows)], format="csr"))
    fired_CF = np.stack([np.bincount(z_MF.indices, minlength=z_MF.shape[1]) for z_MF in codes])
    sums_F = np.sum([z_MF.sum(axis=0, dtype=np.float64) for z_MF in codes], axis=0)
    class_frequency = fired_CF / np.array([[z_MF.shape[0]] for z_MF in codes])
    strength = (sums_F / np.maximum(fired_CF.sum(axis=0), 1)).astype(np.float32)
    return PatchStatistics(codes, class_frequency, class_frequency.mean(axis=0), strength, sae.decoder)


def class_concepts(stats: PatchStatistics, config: SteerConfig, rng: np.random.Generator) -> Choice:
    """Choose the latents that fire more often on a class's patches than on all patches, by the largest difference.

    Raises:
      HeadSteerError: too few latents fire.
    """
    eligible = (stats.frequency > 0) & (stats.frequency <= config.max_frequency)
    if eligible.sum() < 2 * config.latents:
        raise HeadSteerError(
            f"config.steer.latents = {config.latents}: only {eligible.sum()} latents fire on patches at most "
            f"steer.max_frequency = {config.max_frequency} of the time, and the control needs as many others; choose "
            "fewer, or raise it"
        )
    lead_CF = np.where(eligible, stats.class_frequency - stats.frequency, -np.inf)
    latents = np.argsort(-lead_CF, axis=1, kind="stable")[:, : config.latents].astype(np.int32)
    return Choice(latents, np.ones(latents.shape, np.float32))


def matched_concepts(stats: PatchStatistics, config: SteerConfig, rng: np.random.Generator) -> Choice:
    """Choose random latents that fire as often as those of `class_concepts` and move the class's patches as far.

    Each latent is replaced by one drawn from the CLOSEST others in overall frequency, of those that fire on the class's
    patches as far as there are enough. Then one weight for all of them makes the root mean square of |x' - x| over the
    class's patches, at alpha 1, as large as with the class's latents.
    """
    chosen = class_concepts(stats, config, rng)
    eligible = (stats.frequency > 0) & (stats.frequency <= config.max_frequency)
    latents, weights = np.empty_like(chosen.latents), np.empty_like(chosen.weights)
    for label, class_latents in enumerate(chosen.latents):
        candidates = np.setdiff1d(np.flatnonzero(eligible), class_latents)
        firing = candidates[stats.class_frequency[label, candidates] > 0]
        free = firing if len(firing) >= config.latents else candidates
        for place, latent in enumerate(class_latents):
            closest = np.argsort(np.abs(stats.frequency[free] - stats.frequency[latent]), kind="stable")[:CLOSEST]
            pick = rng.choice(closest)
            latents[label, place] = free[pick]
            free = np.delete(free, pick)
        class_size, size = (shift_size(stats, label, row, config) for row in (class_latents, latents[label]))
        weights[label] = class_size / max(size, 1e-12)
    return Choice(latents, weights)


def shift_size(stats: PatchStatistics, label: int, latents_S: np.ndarray, config: SteerConfig) -> float:
    """Compute the root mean square of |x' - x| over a class's patches if latents are changed at alpha 1, weight 1."""
    z_MS = stats.codes[label][:, latents_S].toarray()
    s_S, ones_S = jnp.asarray(stats.strength[latents_S]), jnp.ones(len(latents_S))
    change_MS = np.asarray(steer_latents(jnp.asarray(z_MS), s_S, ones_S, jnp.ones(()), config.patch_mode)) - z_MS
    return float(np.sqrt(np.mean(np.sum((change_MS @ stats.decoder[latents_S]) ** 2, axis=1))))


PATCH_STRATEGIES: Mapping[str, Callable[[PatchStatistics, SteerConfig, np.random.Generator], Choice]] = {
    "class": class_concepts,
    "matched_random": matched_concepts,
}


@dataclass(frozen=True)
class PatchSplit:
    """One split with steered patches, for every strategy, seed and alpha; each image is steered by its label."""

    labels: np.ndarray  # [N]
    right: np.ndarray  # [G, S', A, N] bool: is the answer right
    kept_patches: np.ndarray  # [G, S', A, N] int32, patches that the steered layer keeps
    class_patches: np.ndarray | None  # [N] int32, patches that show the image's class; None: not known
    kept_class_patches: np.ndarray | None  # [G, S', A, N] int32, those of them that are kept
    macs: np.ndarray  # [G, S', A, N] float64, of the steered layer


@dataclass(frozen=True)
class PatchSweep:
    """The sweep of steered patches on both splits."""

    strategies: tuple[str, ...]  # G names
    alphas: np.ndarray  # [A] float64, ascending, with 0
    patches: int  # P
    latents: np.ndarray  # [G, S', C, S] int32
    weights: np.ndarray  # [G, S', C, S] float32
    validation: PatchSplit
    test: PatchSplit
    example: Steering  # by `class` and the first autoencoder


def count_patch_gates(
    result: SuffixResult, split: Split, shows_class_NP: np.ndarray | None, gates: LayerGates, shape: tuple[int, int]
) -> PatchSplit:
    """Count what is kept of each image.

    Args:
      result: settings in the order of strategies and seeds.
      shows_class_NP: bool, which patches show the image's class.
      gates: of the steered layer.
      shape: the numbers of strategies and seeds.
    """
    by_kind = result.gates[gates.layer]
    tokens = by_kind["tokens"]
    patches = tokens.sum(axis=-1, dtype=np.int32)
    pattern = np.zeros(patches.shape, np.int64)
    if gates.count:
        pattern = gates.join(by_kind) @ (1 << np.arange(gates.count))

    def unfold(values: np.ndarray) -> np.ndarray:
        return values.reshape(*shape, *values.shape[1:])

    class_patches = kept_class_patches = None
    if shows_class_NP is not None:
        counts = [(tokens[v] & shows_class_NP).sum(axis=-1, dtype=np.int32) for v in range(len(tokens))]
        class_patches, kept_class_patches = shows_class_NP.sum(axis=-1, dtype=np.int32), unfold(np.stack(counts))
    return PatchSplit(
        labels=split.labels,
        right=unfold(result.predictions == split.labels),
        kept_patches=unfold(patches),
        class_patches=class_patches,
        kept_class_patches=kept_class_patches,
        macs=unfold(gates.macs(pattern, patches)),
    )


def observe_steered_patches(
    trained: TrainedModel, split: Split, steering: Steering, alpha: float, unsteered: ImageGates
) -> ImageGates:
    """Observe all gates of a split's images with the patches of the autoencoders' layer steered by the label.

    Args:
      unsteered: the same images without steering, whose gates before that layer are the same.
    """
    config, first = trained.config, trained.config.sae_layer
    setting = SuffixSetting({}, split.labels, {first: steering})
    alphas = np.array([alpha])
    result = run_suffix(trained, split, [setting], alphas, "class: steered patches", GATE_KINDS, following=True)
    gates = {kind: before.copy() for kind, before in unsteered.gates.items()}
    for layer, by_kind in result.gates.items():
        for kind in config.gate.kinds_in(layer):
            gates[kind][:, layer - config.gate.settings(kind).first_layer] = by_kind[kind][0, 0]
    macs = count_image_macs(config, trained.model.classes, gates)
    return ImageGates(gates, macs, result.predictions[0, 0])


def sweep_patches(
    run: RunData, residuals: StoredResiduals, alphas: np.ndarray, splits: Mapping[str, Split],
    find_own: Callable[[Split], np.ndarray | None],
) -> PatchSweep:  # fmt: skip
    """Steer the gates of the patches by every strategy, seed and alpha; latents are chosen on the training split.

    Args:
      residuals: of the training split, as the autoencoders read them.
      splits: validation and test.
      find_own: finds the patches [N, P] that show an image's class; None: not known.
    """
    trained, config, dataset = run.trained, run.trained.config, run.dataset
    seeds, classes = config.sae.seeds, len(dataset.class_names)
    steered: list[list[Steering]] = [[] for _ in PATCH_STRATEGIES]
    for seed in range(seeds):
        sae = run.autoencoders.member(seed)
        stats = measure_patches(
            sae, residuals, config.sae.tokens, dataset.train.labels, classes, config.steer.evidence
        )  # fmt: skip
        for number, choose in enumerate(PATCH_STRATEGIES.values()):
            choice = choose(stats, config.steer, np.random.default_rng([config.seed, 7, seed, number]))
            steered[number].append(Steering(sae, stats.strength, choice))
    result = {
        name: _sweep_split(trained, split, steered, alphas, find_own(split), f"{name}: every patch setting")
        for name, split in splits.items()
    }
    choices = [[steering.choice for steering in by_seed] for by_seed in steered]
    latents = np.array([[choice.latents for choice in by_seed] for by_seed in choices])
    weights = np.array([[choice.weights for choice in by_seed] for by_seed in choices])
    patches = (config.data.image_size // config.model.patch) ** 2
    return PatchSweep(
        tuple(PATCH_STRATEGIES), alphas, patches, latents, weights, result["validation"], result["test"], steered[0][0]
    )  # fmt: skip


def _sweep_split(
    trained: TrainedModel, split: Split, steered: list[list[Steering]], alphas: np.ndarray,
    shows_class_NP: np.ndarray | None, description: str,
) -> PatchSplit:  # fmt: skip
    """Run every setting on one split; alpha 0 is the unsteered model."""
    layer = trained.config.sae_layer
    settings = [SuffixSetting({}, split.labels, {layer: steering}) for by_seed in steered for steering in by_seed]
    result = run_suffix_from_unsteered(trained, split, settings, alphas, description, GATE_KINDS)
    shape = (len(steered), len(steered[0]))
    return count_patch_gates(result, split, shows_class_NP, LayerGates(trained.config, layer), shape)
