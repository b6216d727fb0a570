"""An autoencoder that is imported instead of trained: config.sae.pretrained."""

import hashlib
import shlex
from typing import Any

import jax
import numpy as np

from headsteer_jax.config.schema import Config
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.sae.interchange.dictionary_learning import import_dictionary_learning
from headsteer_jax.sae.interchange.files import Imported
from headsteer_jax.sae.interchange.locate import find_files, locate_autoencoder
from headsteer_jax.sae.interchange.overcomplete import import_overcomplete
from headsteer_jax.sae.interchange.provenance import list_doubts
from headsteer_jax.sae.interchange.saelens import import_saelens
from headsteer_jax.sae.interchange.sparsify import import_sparsify
from headsteer_jax.sae.train import CURVES, TrainedMembers

IMPORTERS = {
    "saelens": import_saelens,
    "overcomplete": import_overcomplete,
    "dictionary_learning": import_dictionary_learning,
    "sparsify": import_sparsify,
}


def import_autoencoder(config: Config) -> Imported:
    """Import the autoencoder that config.sae.pretrained names, and check it against the config.

    It needs neither a dataset nor a trained model, so that a mistake can be found before anything is computed.

    Raises:
      HeadSteerError: it cannot be read, or has another width, activation, k or number of latents than the config.
    """
    c = config.sae
    library, _, location = c.pretrained.partition(":")
    try:
        imported = IMPORTERS[library](locate_autoencoder(library, location), width=config.model.width)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~user without such a user
        reason = getattr(error, "strerror", None) or error
        raise HeadSteerError(f"config.sae.pretrained = {c.pretrained}: cannot be read ({reason}); check it") from None
    actual = {"activation": imported.activation, "k": imported.k, "latents": len(imported.sae.weights.b_e)}
    expected = {"activation": c.activation, "k": c.k, "latents": config.latents}
    other = {name: value for name, value in actual.items() if value not in (None, expected[name])}
    if other:
        differences = ", ".join(f"{name} = {value}, not {expected[name]}" for name, value in other.items())
        flags = " ".join(shlex.quote(f"--config.sae.{name}={value}") for name, value in other.items())
        raise HeadSteerError(
            f"config.sae.pretrained = {c.pretrained}: it has {differences}; pass {flags}, or import another autoencoder"
        )
    return imported


def to_members(imported: Imported) -> TrainedMembers:
    """Return an imported autoencoder as if it had been trained here, without curves."""
    curves = {name: np.zeros((0, 1), np.float32) for name in CURVES}
    return TrainedMembers(jax.tree.map(lambda leaf: leaf[None], imported.sae.weights), imported.sae.scaling, curves)


def describe_provenance(
    config: Config, imported: Imported, run_name: str, explained_variance: float | None = None
) -> dict[str, Any]:
    """Describe where an imported autoencoder comes from.

    Args:
      run_name: the name of the run's directory.
      explained_variance: of the run's test residuals; None if not known yet.

    Returns:
      JSON values: `library`, `path`, `sha256` of its files; `model`, `hook`, `layer`, `dataset`, `tokens` and `version`
      as its file states them (null: not stated); `activation`, `k`, `width`, `latents`; and `doubts`, a list of what
      is unknown, or does not fit this run.
    """
    c, origin = config.sae, imported.provenance
    library, _, location = c.pretrained.partition(":")
    latents, width = imported.sae.weights.W_d.shape
    doubts = list_doubts(origin, config.sae_layer, c.tokens, run_name, config.model.pretrained)
    if explained_variance is not None and explained_variance < 0:
        doubts.append(
            "it describes this run's residuals worse than their mean does (explained variance "
            f"{explained_variance:.3g}): it was probably made for another model, place or scale"
        )
    fields = ("model", "hook", "layer", "dataset", "tokens", "version")
    return {
        "library": library,
        "path": location,
        "sha256": fingerprint_autoencoder(c.pretrained),
        **{name: getattr(origin, name) for name in fields},
        "activation": imported.activation,
        "k": imported.k,
        "width": width,
        "latents": latents,
        "doubts": doubts,
    }


def fingerprint_autoencoder(pretrained: str) -> str:
    """Compute the SHA-256 of an autoencoder's files, which identifies it at any path.

    Args:
      pretrained: as config.sae.pretrained.

    Returns:
      The digest in hexadecimal digits; an empty string if the files are not there or cannot be read.
    """
    library, _, location = pretrained.partition(":")
    digest = hashlib.sha256()
    try:
        files = find_files(library, location) if location else []
        for file in files:
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    except (OSError, RuntimeError):
        return ""
    return digest.hexdigest() if files else ""
