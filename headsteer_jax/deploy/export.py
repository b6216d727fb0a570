"""Trained models and autoencoders in the formats of other libraries."""

import safetensors.numpy
from etils.epath import Path

from headsteer_jax.books import explain_staleness
from headsteer_jax.config.schema import Config
from headsteer_jax.data.sources import load_dataset
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.pretrained import timm_tensors
from headsteer_jax.runtime import hosts
from headsteer_jax.runtime.files import make_directory, write_bytes
from headsteer_jax.sae.autoencoder import select_member
from headsteer_jax.sae.interchange import export_overcomplete, export_saelens
from headsteer_jax.stages import autoencoders
from headsteer_jax.train.loop import load_trained


def export(config: Config, workdir: Path, file: Path) -> None:
    """Write the gated model's weights under timm's names; the gates stay behind.

    Raises:
      HeadSteerError: the model is not trained, of another config, or the file cannot be written.
    """
    if file.suffix != ".safetensors":
        raise HeadSteerError(f"--export={file}: allowed is a file that ends in .safetensors")
    if not (workdir / "train" / "done.json").exists():
        raise HeadSteerError(f"--export needs train, which is not done in {workdir}: add it to --stages")
    if why := explain_staleness(config, workdir, "train"):
        raise HeadSteerError(f"--export: {workdir / 'train'} is of another config ({why}); name its config")
    _, params = load_trained(
        config, hosts.on_every_process(lambda: load_dataset(config.data, config.seed)), workdir / "train"
    )

    def write() -> None:
        make_directory(file.parent)
        write_bytes(file, safetensors.numpy.save(timm_tensors(params)))

    hosts.on_first_process(write)


def export_saes(config: Config, workdir: Path, target: str) -> None:
    """Write every autoencoder for another library, one for each seed, of residuals as they are in the model.

    Args:
      target: saelens:DIR, which gets directories seed_0, ...; or overcomplete:DIR, which gets seed_0.safetensors, ...

    Raises:
      HeadSteerError: an unknown library; the autoencoders are not trained or of another config; not writable.
    """
    library, _, path = target.partition(":")
    if library not in ("saelens", "overcomplete") or not path:
        raise HeadSteerError(f"--export_sae={target}: allowed is saelens:DIR or overcomplete:DIR")
    if not (workdir / "sae" / "done.json").exists():
        raise HeadSteerError(f"--export_sae needs sae, which is not done in {workdir}: add it to --stages")
    if why := explain_staleness(config, workdir, "sae"):
        raise HeadSteerError(f"--export_sae: {workdir / 'sae'} is of another config ({why}); name its config")
    _, params = load_trained(
        config, hosts.on_every_process(lambda: load_dataset(config.data, config.seed)), workdir / "train"
    )
    saes, scaling, _, _ = autoencoders(config, params, workdir)

    def write() -> None:
        directory = make_directory(path)
        for seed in range(config.sae.seeds):
            about = {"model_name": workdir.name, "hook_name": f"layers.{config.sae_layer}", "seed": seed,
                     "tokens": config.sae.tokens}  # fmt: skip
            given = select_member(saes, seed), scaling, config.sae.activation, config.sae.k
            if library == "saelens":
                export_saelens(*given, directory / f"seed_{seed}", about)
            else:
                export_overcomplete(*given, directory / f"seed_{seed}.safetensors", about)

    hosts.on_first_process(write)
