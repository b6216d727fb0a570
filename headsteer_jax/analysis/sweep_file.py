"""The sweep as one xarray dataset with named dimensions, saved as netCDF (`sweep.nc`)."""

import io
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import xarray
from etils.epath import Path

from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime.files import REMAKE, AnyPath, write_bytes
from headsteer_jax.steer.results import NAMED_BY, SplitResult, SweepResult

SETTING = ("strategy", "seed", "named_by", "alpha")
# dimensions of every array; "SPLIT_" stands for validation_ and test_
DIMENSIONS: dict[str, tuple[str, ...]] = {
    "related": ("class", "other_class"),
    "latents": ("strategy", "seed", "class", "place"),
    "weights": ("strategy", "seed", "class", "place"),
    "class_matters": ("strategy",),
    "extra_macs": ("strategy", "named_by"),
    "directions": ("strategy", "seed", "class", "width"),
    "push": ("strategy", "seed", "class", "head"),
    "gate_logits": ("class", "head"),
    "SPLIT_labels": ("SPLIT_image",),
    "SPLIT_count": ("class",),
    "SPLIT_pattern": ("SPLIT_image",),
    "SPLIT_prediction": ("SPLIT_image",),
    "SPLIT_table": ("SPLIT_image", "subset"),
    "SPLIT_unsteered_correct": ("class",),
    "SPLIT_unsteered_heads_on": ("class", "head"),
    "SPLIT_unsteered_right": ("SPLIT_byte",),
    "SPLIT_right": (*SETTING, "SPLIT_byte"),
    "SPLIT_gates": (*SETTING, "head", "SPLIT_byte"),
    "SPLIT_correct": (*SETTING, "class"),
    "SPLIT_gained": (*SETTING, "class"),
    "SPLIT_lost": (*SETTING, "class"),
    "SPLIT_heads_on": (*SETTING, "class", "head"),
    "SPLIT_kept_patches": ("SPLIT_image",),
    "SPLIT_unsteered_macs": ("class",),
    "SPLIT_macs": (*SETTING, "class"),
    "usage": ("strategy", "named_by", "alpha"),
    "accuracy": ("strategy", "named_by", "alpha"),
    "usage_ci": ("bound", "strategy", "named_by", "alpha"),
    "accuracy_ci": ("bound", "strategy", "named_by", "alpha"),
    "class_usage": ("strategy", "named_by", "alpha", "class"),
    "class_accuracy": ("strategy", "named_by", "alpha", "class"),
    "macs": ("strategy", "named_by", "alpha"),
    "macs_ci": ("bound", "strategy", "named_by", "alpha"),
    "class_macs": ("strategy", "named_by", "alpha", "class"),
    "chosen": ("strategy", "named_by"),
    "class_chosen": ("strategy", "named_by", "class"),
    "exact_usage": ("strategy", "exact_alpha"),
    "exact_accuracy": ("strategy", "exact_alpha"),
    "exact_macs": ("strategy", "exact_alpha"),
    "oracle_patterns": ("class",),
    "overlap_global_class": ("seed", "class"),
    "overlap_class_class": ("seed", "class", "other_class"),
    "frequency": ("seed", "latent"),
    "class_frequency": ("class", "latent"),
    "top_images": ("latent", "rank"),
    "top_activations": ("latent", "rank"),
    "sae_mse": ("epoch", "seed"),
    "sae_l0": ("epoch", "seed"),
    "sae_dead": ("epoch", "seed"),
}
COORDINATES = {
    "strategies": "strategy",
    "named_by": "named_by",
    "alphas": "alpha",
    "class_names": "class",
    "gates": "head",
    "subset": "subset",
    "exact_alphas": "exact_alpha",
}


def _dimensions(name: str) -> tuple[str, ...]:
    """Look up the dimensions of an array."""
    for split in ("validation", "test"):
        if name.startswith(f"{split}_"):
            general = DIMENSIONS["SPLIT_" + name.removeprefix(f"{split}_")]
            return tuple(dimension.replace("SPLIT", split) for dimension in general)
    return DIMENSIONS[name]


def name_arrays(result: SweepResult) -> dict[str, np.ndarray]:
    """Name the arrays of a sweep as in sweep.nc: those of a split begin with its name."""
    arrays: dict[str, np.ndarray] = {"named_by": np.array(NAMED_BY)}
    for field in fields(result):
        value = getattr(result, field.name)
        if isinstance(value, SplitResult):
            arrays |= {f"{field.name}_{part.name}": getattr(value, part.name) for part in fields(value)}
        elif value is not None and field.name != "steps":
            arrays[field.name] = np.array(value) if isinstance(value, tuple) else value
    return arrays


def to_dataset(result: SweepResult, scored: Mapping[str, np.ndarray]) -> xarray.Dataset:
    """Label the arrays of a sweep; docs/reference/outputs.md describes each of them.

    Args:
      scored: further arrays by name, such as those of `summarise`.
    """
    arrays = name_arrays(result) | dict(scored)
    variables = {name: (_dimensions(name), values) for name, values in arrays.items() if name not in COORDINATES}
    coordinates = {COORDINATES[name]: values for name, values in arrays.items() if name in COORDINATES}
    coordinates["seed"] = np.arange(result.test.seeds)
    if "usage_ci" in arrays:
        coordinates["bound"] = np.array(("low", "high"))
    if "other_class" in {dimension for dimensions, _ in variables.values() for dimension in dimensions}:
        coordinates["other_class"] = arrays["class_names"]
    return xarray.Dataset(variables, coordinates)


def to_arrays(dataset: xarray.Dataset) -> dict[str, np.ndarray]:
    """Read all arrays of a dataset into memory, by name."""
    names = {dimension: name for name, dimension in COORDINATES.items()}
    arrays = {str(name): dataset[name].values for name in dataset.data_vars}
    return arrays | {names[str(name)]: dataset[name].values for name in dataset.coords if name in names}


def to_result(arrays: Mapping[str, np.ndarray]) -> SweepResult:
    """Make a sweep's result again from the arrays of its file; its exact functions of alpha are not in the file."""
    content: dict[str, Any] = {
        name: SplitResult(**{part.name: arrays[f"{name}_{part.name}"] for part in fields(SplitResult)})
        for name in ("validation", "test")
    }
    content |= {name: tuple(arrays[name].tolist()) for name in ("strategies", "class_names", "gates")}
    content |= {"steps": {}}
    return SweepResult(**{field.name: arrays.get(field.name) for field in fields(SweepResult)} | content)


def write_sweep(path: AnyPath, dataset: xarray.Dataset) -> None:
    """Write a dataset as netCDF.

    Raises:
      HeadSteerError: the disk is full or not writable; a file that was there is then intact.
    """
    encoding = {name: {"zlib": True, "complevel": 4} for name in dataset.data_vars}
    write_bytes(path, bytes(dataset.to_netcdf(engine="h5netcdf", encoding=encoding)))


def read_sweep(path: AnyPath) -> xarray.Dataset:
    """Read the dataset of a sweep.

    Raises:
      HeadSteerError: the file is missing or damaged.
    """
    try:
        return xarray.load_dataset(io.BytesIO(Path(path).read_bytes()), engine="h5netcdf")
    except Exception as error:  # HDF5 fails in many ways
        reason = " ".join(str(error).split())[:160]
        raise HeadSteerError(f"{path}: missing or damaged ({reason}); {REMAKE}") from error
