"""The page explorer.html, on which a reader steers the test images: its data, and how they are packed.

If logits are affine in alpha but for latents that reach 0 (`steer/flips.py`), all that steering any latents can lead to
follows from an image's gate logits, its active latents and its answer under every gate pattern. The page holds these
and computes with them what the sweep does. Otherwise it holds the recorded settings.

Axes: N images, C classes, F latents, G gates of the steered layer, P gate patterns, S chosen latents, R strategies, Y
ways to name the class, A alphas, M active latents of all images, U distinct numbers of kept patches, K neighbours.
"""

import base64
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from PIL import Image
from scipy.sparse import csr_array

from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import Dataset, Split, gather_images
from headsteer_jax.model.compute import ImageGates
from headsteer_jax.report.latents import encode_image, shrink_image
from headsteer_jax.report.render import render_template
from headsteer_jax.runtime.files import write_text
from headsteer_jax.sae.autoencoder import encode_split
from headsteer_jax.sae.metrics import class_selectivity
from headsteer_jax.sae.store import RunData
from headsteer_jax.steer.flips import UNIT_ROUNDOFF, GateEffect, gate_effect
from headsteer_jax.steer.gates import LayerGates
from headsteer_jax.steer.strategies import latent_statistics
from headsteer_jax.steer.sweep import (
    bound_logits,
    choose_method,
    encode_sparse,
    find_selected,
    gate_jacobian,
    select_classes,
)

Arrays = dict[str, np.ndarray]

# a page of 6 MB still opens quickly and can be sent; both are counted as base64
ARRAY_BYTES = 2_700_000
THUMBNAIL_BYTES = 3_100_000
TILES = (56, 48, 40, 32, 24)  # pixels: the sides that thumbnails may have
NEIGHBOURS = 5  # latents of the nearest decoder rows
LEVELS = 255  # of bounds, which are rounded up to a byte
ROUNDED = 2.0**-17  # relative error of an activation of which the page holds 24 bits
CONTROLS = ("random", "matched_random", "matched_superclass", "random_direction", "random_bias", "image_random")


class TestReadings(NamedTuple):
    """The first autoencoder's and the gate's readings of the steered test images."""

    split: Split
    gate_logits: np.ndarray  # [N, G] float32, unsteered
    size: np.ndarray  # [N, G] |x| |W| + |b|: bounds the logits' rounding; 0 if they are not linear
    active: csr_array  # [N, F] the active latents
    strength: np.ndarray  # [F] float32 mean activation where a latent fires
    frequency: np.ndarray  # [F] share of the training images on which it fires
    selectivity: np.ndarray  # [F]
    effect: GateEffect
    neighbours: np.ndarray  # [F, K] int32 latents of the nearest decoder rows, nearest first
    cosines: np.ndarray  # [F, K] float32


def read_test_images(run: RunData, x_ND: np.ndarray) -> TestReadings:
    """Read what steering starts from off the residuals [N, D] of the whole test split."""
    config, dataset = run.trained.config, run.dataset
    names, gates = dataset.class_names, LayerGates(config, config.sae_layer)
    if config.steer.classes:
        x_ND = x_ND[find_selected(dataset.test.labels, config, names)]
    sae, gate_DH = run.autoencoders.member(0), gate_jacobian(run.trained, run.x_train)
    z_NF = encode_split(sae, run.x_train)
    stats = latent_statistics(z_NF, dataset.train.labels, len(names), sae.decoder)
    counts_C = np.maximum(np.bincount(dataset.train.labels, minlength=len(names)), 1)
    sums_CF = np.stack([z_NF[dataset.train.labels == label].sum(axis=0) for label in range(len(names))])
    logits = np.asarray(gates.logits(run.trained.model, run.trained.params, jnp.asarray(x_ND)))
    linear = choose_method(config) == "flips"
    neighbours, cosines = find_neighbours(sae.decoder, stats.frequency > 0)
    return TestReadings(
        split=select_classes(dataset.test, config, names),
        gate_logits=logits,
        size=bound_logits(run.trained, x_ND) if linear else np.zeros_like(logits),
        active=encode_sparse(sae, x_ND),
        strength=stats.strength,
        frequency=stats.frequency,
        selectivity=class_selectivity(sums_CF / counts_C[:, None]),
        effect=gate_effect(sae.decoder, gate_DH, config.steer.latents, jax.default_backend()),
        neighbours=neighbours,
        cosines=cosines,
    )


def find_neighbours(decoder_FD: np.ndarray, living: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the living latents whose decoder rows are nearest to each latent's: [F, K], and their cosines.

    Where there are too few of them, the latent itself fills up its row, with a cosine of 0.
    """
    unit_FD = decoder_FD / np.maximum(np.linalg.norm(decoder_FD, axis=1, keepdims=True), 1e-12)
    latents, cosines = [], []
    for begin in range(0, len(unit_FD), 1024):
        cosine_fF = unit_FD[begin : begin + 1024] @ unit_FD.T
        rows = begin + np.arange(len(cosine_fF))
        cosine_fF[:, ~living] = -2
        cosine_fF[np.arange(len(rows)), rows] = -2
        nearest_fK = np.argsort(-cosine_fF, axis=1, kind="stable")[:, :NEIGHBOURS]
        nearest_fK = np.pad(nearest_fK, ((0, 0), (0, NEIGHBOURS - nearest_fK.shape[1])))
        cosine_fK = np.take_along_axis(cosine_fF, nearest_fK, axis=1)
        missing = cosine_fK < -1.5
        latents.append(np.where(missing, rows[:, None], nearest_fK))
        cosines.append(np.where(missing, 0, cosine_fK))
    return np.concatenate(latents).astype(np.int32), np.concatenate(cosines).astype(np.float32)


class Packed(NamedTuple):
    """Arrays as one compressed blob, and the list of what is where in it."""

    blob: str  # base64 of zlib
    places: list[dict[str, Any]]  # name, type, shape and first byte of each array


def pack_arrays(arrays: Mapping[str, np.ndarray]) -> Packed:
    """Pack arrays for the page.

    The bytes of numbers are separated into planes, first the lowest byte of all of them, which compresses better. Of
    activations (`active_values`) the lowest byte is left out; their rounding is part of the page's bound.
    """
    parts, places, offset = list[bytes](), list[dict[str, Any]](), 0
    for name, values in arrays.items():
        flat = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).ravel()
        kind = {"f": "float", "u": "uint", "i": "int"}[values.dtype.kind] + str(8 * values.dtype.itemsize)
        planes = flat.view(np.uint8).reshape(-1, values.dtype.itemsize).T
        if name == "active_values":
            bits = flat.view(np.uint32).astype(np.uint64) + 0x80  # rounds to the nearest
            planes = np.stack([bits >> 8 & 255, bits >> 16 & 255, bits >> 24 & 255]).astype(np.uint8)
        parts.append(np.ascontiguousarray(planes).tobytes())
        places.append({"name": name, "type": kind, "planes": len(planes), "shape": values.shape, "offset": offset})
        offset += len(parts[-1])
    return Packed(base64.b64encode(zlib.compress(b"".join(parts), 9)).decode(), places)


def _as_unsigned(values: np.ndarray) -> np.ndarray:
    """Convert integers >= 0 to the smallest unsigned type that holds them."""
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


def _round_up(size: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Round bounds [..., G] up to bytes, as multiples of one number for each gate."""
    unit_G = np.maximum(size.reshape(-1, size.shape[-1]).max(axis=0, initial=0), 1e-30) / LEVELS
    return np.ceil(size / unit_G * (1 - 1e-12)).clip(0, LEVELS).astype(np.uint8), unit_G.tolist()


def explain_why_recorded(config: Config) -> str:
    """Explain why the page can show recorded settings only; the empty string if it can steer."""
    steer, gates = config.steer, LayerGates(config, config.sae_layer)
    if choose_method(config) == "flips":
        return ""
    if steer.target == "residual":
        return "the block itself reads the steered residual (steer.target is residual)"
    if not gates.fits_table:
        return f"{gates.heads} heads have too many patterns for a table of all answers"
    return "the gate has a LayerNorm" if config.gate.layer_norm else f"steering is {steer.mode} in {steer.form} form"


def _describe_strategies(arrays: Arrays, live: bool) -> list[dict[str, Any]]:
    """Describe every strategy: its name, what it changes, and whether it is a control.

    A strategy that chooses for each image has neither latents nor directions in the sweep: it is `recorded`.
    """
    rows = []
    for r, name in enumerate(arrays["strategies"].tolist()):
        kind = "recorded"
        if live and (arrays["latents"][r, 0] >= 0).any():
            kind = "latents"
        elif live and "directions" in arrays and arrays["directions"][r, 0].any():
            kind = "directions"
        rows.append({"name": name, "kind": kind, "control": name in CONTROLS})
    return rows


def _collect_strategies(arrays: Arrays, readings: TestReadings, kinds: list[str]) -> tuple[Arrays, dict[str, Any]]:
    """Collect what the first autoencoder's strategies do, in the order in which their kinds occur.

    Returns:
      Arrays, and the units of the bounds among them.
    """
    latents, directions, recorded = ([r for r, kind in enumerate(kinds) if kind == name]
                                     for name in ("latents", "directions", "recorded"))  # fmt: skip
    collected: Arrays = {}
    units: dict[str, Any] = {}
    if latents:
        collected["latents"] = _as_unsigned(np.maximum(arrays["latents"][latents, 0], 0))
        collected["weights"] = np.where(arrays["latents"][latents, 0] < 0, 0, arrays["weights"][latents, 0])
    if directions:
        v_RCD, gate_DG = arrays["directions"][directions, 0].astype(np.float64), readings.effect.gate
        collected["direction_effect"] = (v_RCD @ gate_DG).astype(np.float32)
        collected["direction_reach"], units["direction_reach"] = _round_up(np.abs(v_RCD) @ np.abs(gate_DG))
    if recorded:
        collected["recorded_correct"] = _as_unsigned(arrays["test_correct"][recorded, 0])
        collected["recorded_heads_on"] = _as_unsigned(arrays["test_heads_on"][recorded, 0])
        collected["recorded_macs"] = arrays["test_macs"][recorded, 0]
    return collected, units


class Sprite(NamedTuple):
    """Thumbnails of some images as one picture, `columns` to a row."""

    uri: str
    side: int  # pixels of a tile
    columns: int
    tile: np.ndarray  # [N] int32 the tile of each image; -1: it has none


def draw_sprite(split: Split, order: np.ndarray) -> Sprite:
    """Draw the thumbnails of a split's images in the order [N], as large and as many as THUMBNAIL_BYTES allow.

    Of each class equally many are left out, if some must be. What fits is estimated from a sample.
    """
    labels, longest = split.labels[order], max(split.images.shape[1:3])
    sides = [side for side in TILES if side < longest] or [longest]
    if longest <= TILES[0]:
        sides = [longest, *(side for side in sides if side < longest)]
    sample = order[np.linspace(0, len(order) - 1, min(len(order), 256)).astype(int)]
    fits = {side: THUMBNAIL_BYTES * len(sample) / len(_draw_tiles(split, sample, side)[0]) for side in sides}
    side = next((side for side in sides if fits[side] >= len(order)), sides[-1])
    counts, rank = np.bincount(labels), _rank_in_class(labels)
    per_class = next(n for n in range(int(counts.max()), 0, -1) if np.minimum(counts, n).sum() <= fits[side] or n == 1)
    shown = np.flatnonzero(rank < per_class)
    tile = np.full(len(order), -1, np.int32)
    tile[shown] = np.arange(len(shown))
    return Sprite(*_draw_tiles(split, order[shown], side), tile)


def _rank_in_class(labels: np.ndarray) -> np.ndarray:
    """Number the images of each class, where images are sorted by class: [N]."""
    counts = np.bincount(labels)
    return np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)


def _draw_tiles(split: Split, images: np.ndarray, side: int) -> tuple[str, int, int]:
    """Draw images as one picture: its data URI, the side of a tile and the number of columns."""
    columns = math.ceil(math.sqrt(len(images)))
    mode = "L" if split.images.shape[3] == 1 else "RGB"
    sheet = Image.new(mode, (columns * side, math.ceil(len(images) / columns) * side))
    for part in np.array_split(np.arange(len(images)), max(1, len(images) // 256)):  # unscaled images are large
        for place, image in zip(part.tolist(), gather_images(split.images, images[part]), strict=True):
            picture = shrink_image(image, side)
            centre = (side - picture.width) // 2, (side - picture.height) // 2
            corner = place % columns * side + centre[0], place // columns * side + centre[1]
            sheet.paste(picture, corner)
    return encode_image(sheet, ("png", "webp") if mode == "L" else ("webp",), quality=55), side, columns


def explorer_data(
    config: Config, dataset: Dataset, arrays: Arrays, readings: TestReadings, gates: ImageGates | None = None,
    step: int = 1,
) -> tuple[dict[str, Any], Arrays, np.ndarray]:  # fmt: skip
    """Collect the page's content.

    Args:
      arrays: those of sweep.nc.
      gates: of the whole test split, for its patches.
      step: every how many-th image of each class is held.

    Returns:
      What goes into JSON, the arrays to pack, and which test images they hold in which order, [N]: by class. The blob
      and the thumbnails are not in them yet.
    """
    strategies = _describe_strategies(arrays, live=not explain_why_recorded(config))
    order = np.argsort(arrays["test_labels"], kind="stable")
    order = order[_rank_in_class(arrays["test_labels"]) % step == 0]
    collected, strategy_units = _collect_strategies(arrays, readings, [row["kind"] for row in strategies])
    latents, latent_units = _collect_latents(readings, order)
    contents = _collect_answers(config, arrays, order) | latents | collected
    if gates is not None and "tokens" in gates.gates and "tokens" in config.gate.kinds_in(config.sae_layer):
        kept_NP = gates.gates["tokens"][:, config.sae_layer - config.gate.settings("tokens").first_layer]
        kept_NP = kept_NP[find_selected(dataset.test.labels, config, dataset.class_names)]
        contents["kept"] = np.packbits(kept_NP[order], axis=1, bitorder="little")
    rounding = {
        "unit": UNIT_ROUNDOFF,
        # in roundings, beside the square root of the number of terms: products, and float32 here of effects
        "more": readings.effect.slack / UNIT_ROUNDOFF - math.sqrt(config.model.width + config.steer.latents) + 2,
        "activation": ROUNDED,
    }
    header = _describe_run(config, dataset, arrays) | {
        "strategies": strategies,
        "rounding": rounding | latent_units | strategy_units,
    }
    return header, contents, order


def _collect_answers(config: Config, arrays: Arrays, order: np.ndarray) -> Arrays:
    """Collect the answers of images, in an order, under every gate pattern, and what each pattern computes."""
    patches = arrays["test_kept_patches"][order]
    patch_counts = np.unique(patches)
    layer = LayerGates(config, config.sae_layer)
    return {
        "image": _as_unsigned(order),
        "labels": _as_unsigned(arrays["test_labels"][order]),
        "prediction": _as_unsigned(arrays["test_prediction"][order]),
        "pattern": _as_unsigned(arrays["test_pattern"][order]),
        "answers": _as_unsigned(arrays["test_table"][order]),
        "patterns": _as_unsigned(arrays["subset"]),
        "patches": _as_unsigned(np.searchsorted(patch_counts, patches)),
        "macs": np.stack([layer.macs(arrays["subset"], count) for count in patch_counts]),
        "class_chosen": _as_unsigned(arrays["class_chosen"]),
    }


def _collect_latents(readings: TestReadings, order: np.ndarray) -> tuple[Arrays, dict[str, Any]]:
    """Collect the gate logits and active latents of images, in an order, and what each latent does.

    Returns:
      Arrays, and the units of the bounds among them.
    """
    active = csr_array(readings.active[order])
    active.sort_indices()
    step_M = np.diff(active.indices, prepend=0)  # within an image, latents ascend
    starts = active.indptr[:-1][np.diff(active.indptr) > 0]
    step_M[starts] = active.indices[starts]
    size, size_unit = _round_up(readings.size)
    reach, reach_unit = _round_up(readings.effect.size)
    collected: Arrays = {
        "gate_logits": readings.gate_logits[order],
        "size": size[order],
        "active_count": _as_unsigned(np.diff(active.indptr)),
        "active_latents": _as_unsigned(step_M),
        "active_values": active.data.astype(np.float32),
        "strength": readings.strength,
        "frequency": readings.frequency.astype(np.float32),
        "selectivity": readings.selectivity.astype(np.float32),
        "effect": readings.effect.logits.astype(np.float32),
        "reach": reach,
        "neighbours": _as_unsigned(readings.neighbours),
        "cosines": readings.cosines,
    }
    return collected, {"size": size_unit, "reach": reach_unit}


def _describe_run(config: Config, dataset: Dataset, arrays: Arrays) -> dict[str, Any]:
    """Describe the classes, gates and recorded settings of a run, for the page's JSON."""
    layer = LayerGates(config, config.sae_layer)
    return {
        "classes": list(dataset.class_names),
        "count": arrays["test_count"].tolist(),
        "total": len(arrays["test_labels"]),
        "gates": [name if name in ("attention", "mlp") else f"h{name}" for name in layer.names],
        "why_recorded": explain_why_recorded(config),
        "alphas": arrays["alphas"].tolist(),
        "chosen": arrays["chosen"].tolist(),
        "related": [] if dataset.related is None else [np.flatnonzero(row).tolist() for row in dataset.related],
        "dense_macs": layer.dense_macs,
        "unsteered_macs": arrays["test_unsteered_macs"].tolist(),
        "width": config.model.width,
        "grid": config.data.image_size // config.model.patch,
    }


def write_explorer(
    file: Path, name: str, config: Config, dataset: Dataset, arrays: Arrays, readings: TestReadings,
    gates: ImageGates | None = None,
) -> None:  # fmt: skip
    """Write a page that opens from disk, on which a reader steers the test images.

    Args:
      name: the run's name, for the title.
      arrays: those of sweep.nc.
      gates: of the whole test split.
    """
    step = 1
    while True:
        header, contents, order = explorer_data(config, dataset, arrays, readings, gates, step)
        if len(pack_arrays(contents).blob) <= ARRAY_BYTES or len(order) <= len(dataset.class_names):
            break
        step *= 2
    sprite = draw_sprite(readings.split, order)
    packed = pack_arrays(contents | {"tile": sprite.tile})
    header |= {"index": packed.places, "tile": {"side": sprite.side, "columns": sprite.columns}}
    page = render_template(
        "explorer.html.j2", name=name, config=config, data=header, blob=packed.blob, sprite=sprite,
        images=len(order), pictures=int((sprite.tile >= 0).sum()), latents=len(readings.strength), step=step,
    )  # fmt: skip
    write_text(file, page)
