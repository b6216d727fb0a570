"""Where an imported autoencoder comes from, as its file states it, and whether it fits this run.

Libraries name a place in a model in their own words. HeadSteer's autoencoders read the input of a layer: that is
TransformerLens' `blocks.L.hook_resid_pre`, and the output of the layer before it, `blocks.L-1.hook_resid_post`.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

RESIDUALS = "the residual stream between two layers, which a run's autoencoders read"
TRANSFORMER_LENS = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
# a block of a model, whose output an autoencoder reads, such as encoder.layers.5, h.5 or layers[5]
BLOCK = re.compile(r"(?:.*\.)?(?:blocks|resblocks|layers?|h)(?:[._](\d+)|\[(\d+)\])")
DICTIONARY_LEARNING = re.compile(r"resid_(pre|post)_layer_(\d+)")
OTHER_PLACES = re.compile(r"attn|attention|mlp|hook_|ffn|\bq\b|\bk\b|\bv\b|ln_?\d|norm")


class Provenance(NamedTuple):
    """Hold what an autoencoder's file says about its origin; None: it does not say."""

    model: str | None = None
    hook: str | None = None  # the place in that model, in the library's words
    layer: int | None = None  # the layer, counted from 0, whose input that place is
    is_residual: bool | None = None  # whether the place is the residual stream between two layers; None: unknown
    dataset: str | None = None
    tokens: str | None = None  # as in SAEConfig.tokens
    version: str | None = None  # of the library
    is_ours: bool = False  # exported by HeadSteer; the model is then the name of a run


def locate_hook(hook: str) -> tuple[int | None, bool | None]:
    """Find the layer whose input a hook reads.

    Args:
      hook: the name of a place in a model, as TransformerLens, PyTorch or dictionary_learning call it.

    Returns:
      The layer, counted from 0, or None; and whether the place is the residual stream between two layers (None: the
      name does not say).
    """
    if match := TRANSFORMER_LENS.fullmatch(hook):
        return int(match[1]) + (match[2] == "post"), True
    if match := DICTIONARY_LEARNING.fullmatch(hook):
        return int(match[2]) + (match[1] == "post"), True
    if match := BLOCK.fullmatch(hook):
        return int(match[1] or match[2]) + 1, True
    return None, False if OTHER_PLACES.search(hook.lower()) else None


def of_hook(hook: str | None, layer: object = None) -> Provenance:
    """Return the provenance of an autoencoder that reads this hook.

    Args:
      hook: None if the file names none.
      layer: the number that the file gives beside the hook; it does not say whether it means input or output.
    """
    if hook:
        return Provenance(None, hook, *locate_hook(hook))
    return Provenance(hook=f"layer {layer}") if type(layer) is int else Provenance()


def read_metadata(metadata: Mapping[str, Any], is_ours: bool) -> Provenance:
    """Read a provenance from the metadata of any version of SAELens, or of HeadSteer's exports.

    Args:
      is_ours: HeadSteer wrote them, whose hook layers.L is the input of layer L.
    """
    hook = read_text(metadata, "hook_name", "hook_point")
    provenance = of_hook(hook, metadata.get("hook_layer", metadata.get("hook_point_layer")))
    if is_ours and provenance.layer is not None:
        provenance = provenance._replace(layer=provenance.layer - 1, is_ours=True)
    if (head := metadata.get("hook_head_index", metadata.get("hook_point_head_index"))) is not None:
        provenance = provenance._replace(hook=f"{hook}, head {head}", layer=None, is_residual=False)
    return provenance._replace(
        model=read_text(metadata, "model_name"),
        dataset=read_text(metadata, "dataset_path", "dataset"),
        tokens=read_text(metadata, "tokens") if is_ours else None,
        version=read_text(metadata, "sae_lens_version"),
    )


def read_text(values: Mapping[str, Any], *names: str) -> str | None:
    """Return the first of a JSON object's fields that is a text with content; None if none is."""
    texts = (value.strip() for name in names if isinstance(value := values.get(name), str))
    return next(filter(None, texts), None)


def list_doubts(provenance: Provenance, layer: int, tokens: str, run_name: str, backbone: str = "") -> list[str]:
    """Say what is wrong or unknown about an autoencoder for a run, in the order model, place, tokens.

    Args:
      layer: the run's layer, counted from 0, whose input its autoencoders read.
      tokens: the run's config.sae.tokens.
      run_name: the name of the run's directory.
      backbone: the run's config.model.pretrained.
    """
    doubts = [_doubt_model(provenance, run_name, backbone), _doubt_place(provenance, layer)]
    if provenance.tokens not in (None, tokens):
        doubts.append(f"it was trained on the tokens {provenance.tokens!r}, and config.sae.tokens is {tokens!r}")
    return [doubt for doubt in doubts if doubt]


def _doubt_model(p: Provenance, run_name: str, backbone: str) -> str:
    if p.model is None:
        return "it does not say which model it was made for"
    if p.is_ours:
        return "" if p.model == run_name else f"it was exported from the run {p.model!r}, and this run is {run_name!r}"
    name, backbone = (re.sub(r"[^a-z0-9]", "", text.lower()) for text in (p.model.rpartition("/")[2], backbone))
    if name and name in backbone:
        return f"it was made for the backbone {p.model!r}, which this run has trained further"
    return f"it was made for the model {p.model!r}, and not for this run's"


def _doubt_place(p: Provenance, layer: int) -> str:
    if p.hook is None:
        return "it does not say which place of its model it reads"
    if p.is_residual is False:
        return f"it reads {p.hook!r}, which is not {RESIDUALS}"
    if p.layer is None:
        return f"it reads {p.hook!r}; it is not known whether that is {RESIDUALS}"
    if p.layer != layer:
        return f"it reads {p.hook!r}, which is the input of layer {p.layer}; config.sae.layer is layer {layer}"
    return ""
