"""Trained models and autoencoders in the files of other libraries.

The backbone is written under timm's names; autoencoders as SAELens' directories or overcomplete's state_dicts.
"""

import safetensors.numpy
from etils.epath import Path

from headsteer_jax.config.paths import expand_path
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.pretrained import timm_tensors
from headsteer_jax.model.vit import TrainedModel
from headsteer_jax.runtime.files import check_replaceable, make_directory, write_bytes
from headsteer_jax.sae.autoencoder import Autoencoder
from headsteer_jax.sae.interchange.overcomplete import export_overcomplete
from headsteer_jax.sae.interchange.saelens import export_saelens

WRITER = "HeadSteer"  # in every exported file, so that an export replaces nothing but earlier exports
TARGETS = ("timm:FILE.safetensors", "saelens:DIR", "overcomplete:DIR")


def parse_target(target: str) -> tuple[str, Path]:
    """Split an export target, such as saelens:DIR, into library and path.

    Raises:
      HeadSteerError: the target has none of the forms in TARGETS.
    """
    library, _, path = target.partition(":")
    libraries = {form.partition(":")[0] for form in TARGETS}
    if library not in libraries or not path or (library == "timm" and not path.endswith(".safetensors")):
        raise HeadSteerError(f"{target}: must be {', '.join(TARGETS[:-1])} or {TARGETS[-1]}")
    return library, Path(expand_path(path, library))


def check_target(library: str, path: Path) -> None:
    """Check that an export replaces nothing but earlier exports.

    Raises:
      HeadSteerError: a file that would be written exists, and HeadSteer did not write it.
    """
    remedy = "choose another path, or pass --overwrite"
    if library == "timm":
        files = [path]
    else:
        files = [*path.glob("seed_*/cfg.json" if library == "saelens" else "seed_*.safetensors")]
    for file in files:
        check_replaceable(file, WRITER, remedy)
    for file in path.glob("seed_*/sae_weights.safetensors") if library == "saelens" else ():
        if not (file.parent / "cfg.json").exists():  # which would say that HeadSteer wrote the weights
            raise HeadSteerError(f"{file}: exists, and HeadSteer did not write it; {remedy}")


def check_directories(library: str, path: Path) -> None:
    """Check that an export's directory is one or can be made.

    Raises:
      HeadSteerError: a file is in its place.
    """
    directory = path.parent if library == "timm" else path
    place = next((place for place in (directory, *directory.parents) if place.exists()), None)
    if place is not None and not place.is_dir():
        raise HeadSteerError(f"{place}: is a file, but the export needs a directory there; choose another path")


def export_timm(trained: TrainedModel, file: Path) -> None:
    """Write a gated model's weights under timm's names; the gates are left out.

    Raises:
      HeadSteerError: the file cannot be written.
    """
    make_directory(file.parent)
    write_bytes(file, safetensors.numpy.save(timm_tensors(trained.params), {"format": "pt", "writer": WRITER}))


def export_autoencoders(
    trained: TrainedModel, autoencoders: Autoencoder, library: str, directory: Path, run_name: str
) -> None:
    """Write every autoencoder in another library's format.

    The exported autoencoders read residuals as they are in the model: centring and scaling are folded in.

    Args:
      autoencoders: the seeds, along the leading axis of the weights.
      library: `saelens` writes directories seed_0, seed_1, ...; `overcomplete` writes files seed_0.safetensors, ...
      run_name: the name of the run, for the metadata.

    Raises:
      HeadSteerError: the directory cannot be written.
    """
    config, directory = trained.config, make_directory(directory)
    for seed in range(autoencoders.members):
        metadata = {"model_name": run_name, "hook_name": f"layers.{config.sae_layer}", "seed": seed,
                    "tokens": config.sae.tokens, "writer": WRITER}  # fmt: skip
        sae, activation, k = autoencoders.member(seed), config.sae.activation, config.sae.k
        if library == "saelens":
            export_saelens(sae, activation, k, directory / f"seed_{seed}", metadata)
        else:
            export_overcomplete(sae, activation, k, directory / f"seed_{seed}.safetensors", metadata)
