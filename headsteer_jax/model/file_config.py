"""A checkpoint's own description, compared with our config, because its tensors do not say everything.

The description is config.json beside the file (Hugging Face's and timm's), with preprocessor_config.json, or the
arguments of the training script inside a .pth. Each fact keeps the key under which the file states it.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from headsteer_jax.config.schema import Config
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.layouts import Layout

# The keys of each fact in Hugging Face's configs, timm's model_args and training scripts, the most specific one first.
KEYS = {
    "depth": ("num_hidden_layers", "depth"),
    "width": ("hidden_size", "embed_dim"),
    "heads": ("num_attention_heads", "num_heads"),
    "epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_eps"),
    "activation": ("hidden_act", "act_layer"),
    "pooling": ("global_pool", "gp"),
    "block": ("block_fn",),
    "norm": ("norm_layer",),
    "mlp": ("mlp_layer",),
    "attention": ("attn_layer",),
    "image": ("image_size", "img_size", "input_size"),
    "channels": ("num_channels", "in_chans"),
    "positions": ("pos_embed",),
    "patches_only": ("no_embed_class",),
    "classes": ("label_names", "id2label"),
    "mean": ("image_mean", "mean"),
    "std": ("image_std", "std"),
}
# What transformers assumes if a config does not state it; its DINOv2 classifier reads the patches' average as well.
_TRANSFORMERS = {
    "num_attention_heads": 12, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "block_fn": "Block",
    "global_pool": "token",
}  # fmt: skip
_DINOV2 = _TRANSFORMERS | {"layer_norm_eps": 1e-6, "global_pool": "token and average"}
DEFAULTS = {
    **dict.fromkeys(("vit", "deit", "vit_mae", "vit_msn", "dpt"), _TRANSFORMERS),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), _DINOV2),
}
# timm states only what differs from the named architecture; these are the plain ones, and their numbers of heads.
TIMM_PLAIN = re.compile(
    r"(?:vit|deit|deit3)_(tiny|small|medium|base|large|huge|giant|gigantic|so400m)(?:_distilled)?_patch\d+"
    r"(_plus)?(?:_reg\d)?(_dinov2|_tipsv2)?(?:_\d+)?(?:_miil)?|flexivit_(small|base|large)"
)
TIMM_HEADS = {
    "tiny": 3, "small": 6, "medium": 8, "base": 12, "large": 16, "huge": 16, "giant": 16, "gigantic": 16, "so400m": 16,
    "giant_dinov2": 24, "giant_tipsv2": 24, "base_plus": 14,
}  # fmt: skip
GELUS = {
    **dict.fromkeys(("gelu", "gelu_python"), "exact"),
    **dict.fromkeys(("gelu_tanh", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"), "tanh"),
}
PLAIN = {  # the values of timm's options that our model computes
    "block": ("block", "plain"), "norm": ("layernorm", "layernormfp32"), "mlp": ("mlp",),
    "attention": ("attn", "attention", ""),
}  # fmt: skip
AVERAGED = ("avg", "avgmax", "max", "prr", True)  # timm's poolings that read the patches
OPTIONS = {"block": "block order", "norm": "norm", "mlp": "MLP", "attention": "attention"}


class Fact(NamedTuple):
    """A fact about a model."""

    statement: str  # who states it, and under which key
    value: Any


class FileConfig(NamedTuple):
    """A checkpoint's description: the facts that it states, by our names for them."""

    source: str  # "config.json" or "its training script's arguments"; "" if there is none
    facts: dict[str, Fact]

    def value(self, fact: str) -> Any:
        """Return a fact's value, or None if the description does not state it."""
        return self.facts[fact].value if fact in self.facts else None

    def cite(self, fact: str) -> str:
        """Quote a fact as its description states it."""
        return f"{self.facts[fact].statement} = {self.facts[fact].value!r}"

    def image(self) -> tuple[int, int] | None:
        """Return the height and width of the images that the positions are for, if they are stated."""
        return _read_size(self.value("image"))


class Comparison(NamedTuple):
    """The result of a comparison with a checkpoint's description; a disagreement is an error instead."""

    checked: list[str]
    unchecked: list[str]
    warnings: list[str]


def read_file_config(path: Path, arguments: Mapping[str, Any], layout: Layout) -> FileConfig:
    """Read the description of the model in a weight file.

    Args:
      path: the weight file, or the directory of its shards.
      arguments: of the training script, from inside the file; config.json is preferred.
      layout: of the file, whose publisher may build all models alike.

    Raises:
      HeadSteerError: config.json is not JSON.
    """
    directory = path if path.is_dir() else path.parent
    described = _read_json(directory / "config.json")
    source = "config.json" if described else "its training script's arguments" if arguments else ""
    facts = _collect_facts(described or arguments, source)
    facts = _pick(_collect_processor(directory), "preprocessor_config.json says") | facts
    return FileConfig(source, _pick(layout.constants, f"{layout.family}'s models have") | facts)


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping; {} if there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise HeadSteerError(f"{path}: not JSON ({str(error).partition(chr(10))[0]}); repair or remove it") from None
    return content if isinstance(content, dict) else {}


def _collect_processor(directory: Path) -> dict[str, Any]:
    """Read mean and standard deviation from Hugging Face's preprocessor_config.json."""
    processor = _read_json(directory / "preprocessor_config.json")
    if processor.get("do_normalize") is False:
        return {}
    return {name: processor[name] for name in ("image_mean", "image_std") if name in processor}


def _collect_facts(described: Mapping[str, Any], source: str) -> dict[str, Fact]:
    """Collect the facts of a description, in which the more specific parts win."""
    nested = [described.get(name) for name in ("pretrained_cfg", "model_kwargs", "model_args")]
    pretrained, *specific = (part if isinstance(part, Mapping) else {} for part in nested)
    model_type, architecture = described.get("model_type"), described.get("architecture") or described.get("model")
    facts = _pick(DEFAULTS.get(str(model_type), {}), f"{source}: model_type {model_type} means")
    if isinstance(architecture, str):
        architecture = architecture.partition(".")[0]  # what follows names the training
        named = _describe_architecture(architecture)
        facts |= _pick(named, f"{source}: architecture {architecture} means")
    for part in (pretrained, described, *specific):
        stated = _pick(part, f"{source} says")
        if "norm" in stated:  # another norm than the architecture's, with an epsilon of its own
            facts.pop("epsilon", None)
        facts |= stated
    return facts


def _pick(part: Mapping[str, Any], statement: str) -> dict[str, Fact]:
    """Pick the facts that a mapping states; None states nothing."""
    picked = {}
    for fact, keys in KEYS.items():
        key = next((key for key in keys if _is_valid(fact, part.get(key))), None)
        if key is not None:
            picked[fact] = Fact(f"{statement} {key}", part[key])
    return picked


def _is_valid(fact: str, value: Any) -> bool:
    """Say whether a value can be that of a fact; a training script may use the same word for something else."""
    if fact in ("depth", "width", "heads", "epsilon", "channels"):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if fact in ("mean", "std"):
        numbers = value if isinstance(value, (list, tuple)) else ["none"]
        return len(numbers) > 0 and all(isinstance(number, (int, float)) for number in numbers)
    if fact == "image":
        return _read_size(value) is not None
    if fact == "classes":
        return isinstance(value, (list, Mapping)) and len(value) > 0
    return isinstance(value, (str, bool))


def _read_size(size: Any) -> tuple[int, int] | None:
    """Read height and width from a number, a list that may begin with the channels, or a mapping."""
    if isinstance(size, Mapping):
        size = [size.get("height"), size.get("width")]
    if isinstance(size, int):
        size = [size, size]
    if isinstance(size, (list, tuple)) and len(size) >= 2 and all(isinstance(side, int) for side in size):
        return size[-2], size[-1]
    return None


def _describe_architecture(architecture: str) -> dict[str, Any]:
    """Return what the name of one of timm's architectures says about the model; {} if it is none of the plain ones."""
    if "_rpn_" in architecture:
        return {"block_fn": "ResPostBlock"}
    plain = TIMM_PLAIN.fullmatch(architecture)
    if not plain:
        return {}
    size = "".join(part or "" for part in plain.groups())
    heads = TIMM_HEADS.get(size, TIMM_HEADS[size.partition("_")[0]])
    return {
        "num_heads": heads, "act_layer": "gelu", "norm_eps": 1e-6, "block_fn": "Block", "global_pool": "token",
    }  # fmt: skip


def compare(file: FileConfig, config: Config, class_names: Sequence[str] = ()) -> Comparison:
    """Compare a checkpoint's description with our config.

    Args:
      class_names: of the dataset, in the order of its labels; they are compared if the checkpoint's head is kept.

    Raises:
      HeadSteerError: the two disagree; the message names our field and the file's value.
    """
    for fact, field, ours in _list_numbers(config):
        theirs = file.value(fact)
        if theirs is not None and not math.isclose(theirs, ours, rel_tol=1e-6):
            raise HeadSteerError(
                f"config.model.pretrained = {config.model.pretrained}: {file.cite(fact)}, but {field} = {ours!r}; set "
                f"{field}={theirs!r}, or choose another file"
            )
    for refuse in (_refuse_options, _refuse_activation, _refuse_pooling, _refuse_classes):
        if reason := refuse(file, config, class_names):
            raise HeadSteerError(f"config.model.pretrained = {config.model.pretrained}: {reason}")
    names = {"heads": "heads", "epsilon": "epsilon", "activation": "GELU", "block": "block order", "image": "grid"}
    if config.model.pretrained_head:
        names |= {"pooling": "pooling", "classes": "classes"}
    names |= {"mean": "mean and std"}
    checked = [name for fact, name in names.items() if fact in file.facts]
    return Comparison(checked, [name for name in names.values() if name not in checked], list(_warn(file, config)))


def _list_numbers(config: Config) -> Iterator[tuple[str, str, float]]:
    """Yield the facts that are numbers, our field for each, and its value."""
    m = config.model
    yield "depth", "config.model.depth", m.depth
    yield "width", "config.model.width", m.width
    yield "heads", "config.model.heads", m.heads
    yield "epsilon", "config.model.layer_norm_epsilon", m.layer_norm_epsilon
    yield "channels", "config.data.channels", config.data.channels


def _refuse_options(file: FileConfig, config: Config, class_names: Sequence[str]) -> str:
    """Say which option of timm's models our model does not have; "" if none is set."""
    del config, class_names
    for fact, name in OPTIONS.items():
        plain = str(file.value(fact)).rpartition(".")[2].strip("'>").lower()
        if fact in file.facts and plain not in PLAIN[fact]:
            return f"{file.cite(fact)}, but this model has another {name}; choose a plain ViT's file"
    return ""


def _refuse_activation(file: FileConfig, config: Config, class_names: Sequence[str]) -> str:
    """Say why the activation is not ours; "" if it is, or if none is stated."""
    del class_names
    if "activation" not in file.facts:
        return ""
    theirs = GELUS.get(str(file.value("activation")).lower())
    if theirs is None:
        return f"{file.cite('activation')}, but this model computes GELU; choose another file"
    if theirs != config.model.gelu:
        ours = config.model.gelu
        return f"{file.cite('activation')}, but config.model.gelu = {ours!r}; set config.model.gelu={theirs}"
    return ""


def _refuse_pooling(file: FileConfig, config: Config, class_names: Sequence[str]) -> str:
    """Say why the head, or the gates of tokens, cannot read the class token as the file's model does; "" if none."""
    del class_names
    of_class_token = (None, "token", "tok", "cls", False)  # False in the arguments of MAE's scripts
    if "tokens" in config.gate.kinds and file.value("pooling") in AVERAGED:
        return (
            f"{file.cite('pooling')}, but gates of tokens keep the class token alone, which this file's model did not "
            "learn to read; choose another file, or gate.kinds without tokens"
        )
    if config.model.pretrained_head and file.value("pooling") not in of_class_token:
        return (
            f"{file.cite('pooling')}, but this model's head reads the class token; set model.pretrained_head=false, or "
            "choose another file"
        )
    return ""


def _refuse_classes(file: FileConfig, config: Config, class_names: Sequence[str]) -> str:
    """Say which class a kept head has in another place than the dataset; "" if all that are common agree."""
    if not config.model.pretrained_head or not class_names:
        return ""
    theirs = read_class_names(file)
    places = {_simplify(name): place for place, name in theirs.items()}
    for place, name in enumerate(class_names):
        if places.get(_simplify(name), place) != place:
            return (
                f"{file.source} says that its head's class {places[_simplify(name)]} is {name!r}, but that is the "
                f"dataset's class {place}; set model.pretrained_head=false, or name the classes in the file's order"
            )
    return ""


def read_class_names(file: FileConfig) -> dict[int, str]:
    """Return the names of a head's classes by their places, without transformers' placeholders such as LABEL_0."""
    stated = file.value("classes")
    pairs = stated.items() if isinstance(stated, Mapping) else enumerate(stated) if isinstance(stated, list) else ()
    return {
        int(place): str(name)
        for place, name in pairs
        if str(place).isdigit() and not re.fullmatch(r"LABEL_\d+", str(name))
    }


def _simplify(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _warn(file: FileConfig, config: Config) -> Iterator[str]:
    """Yield differences that may be intended: in the images' normalisation and in the pooling of a head left out."""
    if not config.model.pretrained_head and file.value("pooling") in AVERAGED:
        yield (
            f"{file.cite('pooling')}: the class token of {config.model.pretrained} was not trained to classify, and "
            "this model reads no other token"
        )
    for fact, ours in (("mean", config.data.mean), ("std", config.data.std)):
        theirs = file.value(fact)
        if theirs is None:
            continue
        if len(theirs) != len(ours) or any(abs(a - b) > 1e-3 for a, b in zip(theirs, ours, strict=True)):
            stated, chosen = (", ".join(f"{value:g}" for value in values) for values in (theirs, ours))
            yield (
                f"{config.model.pretrained} was trained on images with {fact} ({stated}), but config.data.{fact} = "
                f"({chosen})"
            )
