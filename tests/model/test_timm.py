"""timm's plain VisionTransformer in its options: each loads with timm's own features, or is refused in one line.

timm writes the files and their config.json as it does for the Hugging Face hub. What it cannot write into config.json,
a class for instance, it asks to be replaced by a word; those words are here.
"""

import functools
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from builders import tiny_config

from headsteer_jax.config import Config, ModelConfig
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.pretrained import Loaded, load_backbone
from headsteer_jax.model.vit import build_model
from headsteer_jax.train.loop import init_params

torch = pytest.importorskip("torch", reason="torch is not installed")
timm = pytest.importorskip(
    "timm",
    minversion="1.0.31",
    reason="no timm, or one like 1.0.29, which does not write a model's options to its file",
)
from timm.layers import GluMlp, RmsNorm, SwiGLU, SwiGLUPacked  # noqa: E402
from timm.models import vision_transformer as vit  # noqa: E402

CLASSES = 5
SHAPE = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": CLASSES}


class Variant(NamedTuple):
    """One choice of timm's options."""

    options: dict[str, Any]
    refused: str = ""  # a part of the line with which it is refused; "" if it loads
    words: Mapping[str, Any] = types.MappingProxyType({})  # what replaces options that are not JSON, in config.json
    ours: Mapping[str, Any] = types.MappingProxyType({})  # fields of config.model
    unseen: str = ""  # without config.json it loads and computes something else; this is named as unchecked
    architecture: str = "vit_tiny_patch16_224"
    head: str = "loads"  # what becomes of a kept head, or a part of the line that refuses it


def _layer_norm(**fields: Any) -> Callable[..., Any]:
    return functools.partial(torch.nn.LayerNorm, **fields)


VARIANTS = {
    "default": Variant({}),
    "layer scale": Variant({"init_values": 0.1}),
    "no qkv bias": Variant({"qkv_bias": False}),
    "no proj bias": Variant({"proj_bias": False}),
    "no biases": Variant({"qkv_bias": False, "proj_bias": False, "init_values": 1e-5}),
    "qk_norm": Variant({"qk_norm": True}, "qk_norm"),
    "scale_attn_norm": Variant({"scale_attn_norm": True}, "scale_attn_norm"),
    "scale_mlp_norm": Variant({"scale_mlp_norm": True}, "scale_mlp_norm"),
    "no class token": Variant({"class_token": False, "global_pool": "avg"}, "fc_norm"),
    "no class token, norm": Variant({"class_token": False, "global_pool": "avg", "fc_norm": False}, "no class token"),
    "no_embed_class": Variant({"no_embed_class": True}),
    "registers": Variant({"reg_tokens": 2}, ours={"registers": 2}),
    "registers without positions": Variant({"reg_tokens": 4, "no_embed_class": True}, ours={"registers": 4}),
    "registers not expected": Variant({"reg_tokens": 4}, "4 register tokens, but config.model.registers = 0"),
    "pos_embed none": Variant({"pos_embed": "none"}),
    "pos_embed empty": Variant({"pos_embed": "", "reg_tokens": 1}, ours={"registers": 1}),
    "pre_norm": Variant({"pre_norm": True}, "pre_norm"),
    "no final norm": Variant({"final_norm": False}, "final_norm"),
    "fc_norm": Variant({"fc_norm": True}, "fc_norm"),
    "avg": Variant({"global_pool": "avg"}, "fc_norm"),
    "avg after the norm": Variant({"global_pool": "avg", "fc_norm": False}, head="global_pool = 'avg'"),
    "avgmax": Variant({"global_pool": "avgmax"}, "fc_norm"),
    "max": Variant({"global_pool": "max"}, "fc_norm"),
    "max after the norm": Variant({"global_pool": "max", "fc_norm": False}, head="global_pool = 'max'"),
    "map": Variant({"global_pool": "map"}, "global_pool='map'"),
    "prr": Variant({"global_pool": "prr"}, head="global_pool = 'prr'"),
    "no pooling": Variant({"global_pool": ""}, head="global_pool = ''"),
    "ResPostBlock": Variant(
        {"block_fn": vit.ResPostBlock}, "block_fn = 'ResPostBlock'", {"block_fn": "ResPostBlock"}, unseen="block order"
    ),
    "ParallelScalingBlock": Variant(
        {"block_fn": vit.ParallelScalingBlock}, "ParallelScalingBlock", {"block_fn": "ParallelScalingBlock"}
    ),
    "ParallelThingsBlock": Variant(
        {"block_fn": vit.ParallelThingsBlock}, "ParallelThingsBlock", {"block_fn": "ParallelThingsBlock"}
    ),
    "DiffParallelScalingBlock": Variant(
        {"block_fn": vit.DiffParallelScalingBlock}, "ParallelScalingBlock", {"block_fn": "DiffParallelScalingBlock"}
    ),
    "differential attention": Variant({"attn_layer": "diff"}, "differential"),
    "GluMlp": Variant({"mlp_layer": GluMlp}, "gated", {"mlp_layer": "GluMlp"}),
    "SwiGLU": Variant({"mlp_layer": SwiGLU}, "gated", {"mlp_layer": "SwiGLU"}),
    "SwiGLUPacked": Variant({"mlp_layer": SwiGLUPacked}, "gated", {"mlp_layer": "SwiGLUPacked"}),
    "gelu by tanh": Variant({"act_layer": "gelu_tanh"}, ours={"gelu": "tanh"}),
    "gelu by tanh for exact": Variant({"act_layer": "gelu_tanh"}, "act_layer = 'gelu_tanh'", unseen="GELU"),
    "exact gelu for tanh": Variant({}, "means act_layer = 'gelu'", ours={"gelu": "tanh"}, unseen="GELU"),
    "quick_gelu": Variant({"act_layer": "quick_gelu"}, "act_layer = 'quick_gelu'", unseen="GELU"),
    "relu": Variant({"act_layer": "relu"}, "act_layer = 'relu'", unseen="GELU"),
    "silu": Variant({"act_layer": "silu"}, "act_layer = 'silu'", unseen="GELU"),
    "epsilon": Variant(
        {"norm_layer": _layer_norm(eps=1e-5)},
        words={"norm_layer": "LayerNorm", "norm_eps": 1e-5}, ours={"layer_norm_epsilon": 1e-5},
    ),
    "another epsilon": Variant(
        {"norm_layer": _layer_norm(eps=1e-2)}, "norm_eps = 0.01", {"norm_layer": "LayerNorm", "norm_eps": 1e-2},
        unseen="epsilon",
    ),
    "RmsNorm": Variant({"norm_layer": RmsNorm}, "RMSNorm", {"norm_layer": "RmsNorm"}),
    "other heads": Variant({"num_heads": 6}, "num_heads = 6", unseen="heads"),
    "dynamic_img_size": Variant({"dynamic_img_size": True}),
    "other patch": Variant({"patch_size": 4}, ours={"patch": 4}),
    "tall images": Variant({"img_size": (64, 16)}, "a grid of 8 x 2", unseen="grid"),
    "grey images": Variant({"in_chans": 1}, "in_chans = 1, but config.data.channels = 3"),
    "embed_norm_layer": Variant(
        {"embed_norm_layer": _layer_norm()}, "embed_norm_layer", {"embed_norm_layer": "LayerNorm"}
    ),
    "mlp_ratio": Variant({"mlp_ratio": 2.0}, ours={"mlp_ratio": 2.0}),
    "other mlp_ratio": Variant({"mlp_ratio": 3.0}, "'blocks.0.mlp.fc1.weight' has the shape [72, 24]"),
    "other depth": Variant({"depth": 3}, "3 blocks"),
    "no classifier": Variant({"num_classes": 0}, head="no classifier"),
    "weight_init": Variant({"weight_init": "jax", "fix_init": True}),
    "distilled": Variant(
        {}, architecture="deit_tiny_distilled_patch16_224", ours={"registers": 1}, head="averages two heads"
    ),
    "distilled not expected": Variant(
        {}, "1 distillation token, but config.model.registers = 0", architecture="deit_tiny_distilled_patch16_224"
    ),
    "deit3": Variant({"init_values": 1e-4}, architecture="deit3_small_patch16_224"),
}  # fmt: skip


@functools.cache
def made(name: str) -> tuple[Any, Variant]:
    """A variant's model with parameters of ordinary size, so that none can be left out unnoticed."""
    variant = VARIANTS[name]
    torch.manual_seed(0)
    model = timm.create_model(variant.architecture, **(SHAPE | variant.options)).eval()
    with torch.no_grad():
        for tensor_name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in tensor_name and tensor_name.endswith("weight") else 0.0
            parameter.copy_(mean + 0.3 * torch.randn(parameter.shape))
    return model, variant


def save(model: Any, variant: Variant, directory: Path, *, config: bool, **model_config: Any) -> Path:
    timm.models.save_for_hf(
        model, directory, model_config=model_config, model_args=dict(variant.words), safe_serialization=True
    )
    if not config:
        (directory / "config.json").unlink()
    return directory / "model.safetensors"


def our_config(path: Path, variant: Variant, **fields: Any) -> Config:
    base = tiny_config()
    data = base.data.model_copy(update={"image_size": 16, "channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    model = {"patch": 8, "depth": 2, "width": 24, "heads": 3, "pretrained": str(path)} | dict(variant.ours) | fields
    return base.model_copy(update={"data": data, "model": ModelConfig(**model)})


@functools.cache
def fresh(registers: int, patch: int, mlp_ratio: float) -> Any:
    config = our_config(Path(), Variant({}, ours={"registers": registers, "patch": patch, "mlp_ratio": mlp_ratio}))
    config = config.model_copy(update={"model": config.model.model_copy(update={"pretrained": ""})})
    return init_params(build_model(config, CLASSES), config, 0)


def load(config: Config, class_names: tuple[str, ...] = ()) -> tuple[Any, Loaded]:
    m = config.model
    return load_backbone(fresh(m.registers, m.patch, m.mlp_ratio), config, class_names)


def difference(params: Any, config: Config, model: Any, *, logits: bool = False) -> float:
    """The largest difference from timm's features or logits, relative to the largest of these."""
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        x = torch.tensor(images.transpose(0, 3, 1, 2))
        theirs = (model(x) if logits else model.forward_features(x)[:, 0]).numpy()
    ours = build_model(config, CLASSES)
    read = (lambda m, x: m.head(x)) if logits else (lambda m, x: x)
    mine = ours.apply(
        params, images, method=lambda m, x: read(m, m.norm(m.blocks(m.embed(x), gating="dense")[0][:, 0]))
    )
    return float(np.abs(np.asarray(mine) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("name", VARIANTS)
def test_with_its_config_it_loads_exactly_or_its_option_is_named(tmp_path: Path, name: str) -> None:
    model, variant = made(name)
    config = our_config(save(model, variant, tmp_path, config=True), variant)
    if variant.refused:
        with pytest.raises(HeadSteerError) as error:
            load(config)
        assert variant.refused in str(error.value)
        assert "\n" not in str(error.value)
        return
    params, report = load(config)
    error_size = difference(params, config, model)
    print(f"{name}: loads, {error_size:.1e}")
    assert error_size <= 1e-4
    assert report.comparison.unchecked == []
    warned = {"token": 0, "": 0}.get(variant.options.get("global_pool", "token"), 1)
    warned += 0 if variant.architecture.startswith("vit") else 2  # mean and std
    assert len(report.comparison.warnings) == warned


@pytest.mark.parametrize("name", VARIANTS)
def test_without_a_config_it_loads_exactly_or_what_may_differ_is_named_as_unchecked(tmp_path: Path, name: str) -> None:
    model, variant = made(name)
    config = our_config(save(model, variant, tmp_path, config=False), variant)
    try:
        params, report = load(config)
    except HeadSteerError:
        return
    if name == "tall images" or difference(params, config, model) > 1e-4:
        assert variant.unseen
        assert any(unchecked.startswith(variant.unseen) for unchecked in report.comparison.unchecked)
        assert variant.unseen in str(report).partition("not checked, because there is no config.json beside it: ")[2]


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if not variant.refused])
def test_a_kept_head_answers_as_timms_or_is_refused(tmp_path: Path, name: str) -> None:
    model, variant = made(name)
    config = our_config(save(model, variant, tmp_path, config=True), variant, pretrained_head=True)
    if variant.head != "loads":
        with pytest.raises(HeadSteerError) as error:
            load(config)
        assert variant.head in str(error.value)
        return
    params, report = load(config)
    assert difference(params, config, model, logits=True) <= 1e-4
    assert report.comparison.unchecked == ["classes"]


def test_a_kept_head_has_the_datasets_classes_in_their_order(tmp_path: Path) -> None:
    model, variant = made("default")
    names = ["cat", "dog", "great white shark", "owl", "yak"]
    config = our_config(save(model, variant, tmp_path, config=True, label_names=names), variant, pretrained_head=True)
    _, report = load(config, tuple(names))
    assert report.comparison.unchecked == []
    load(config, ("Cat", "dog", "great_white_shark", "owl", "yak"))
    with pytest.raises(HeadSteerError, match=r"its head's class 1 is 'dog', but that is the dataset's class 0"):
        load(config, ("dog", "cat", "great white shark", "owl", "yak"))


def test_heads_of_timms_architectures_are_timms() -> None:
    """What the name of an architecture says, for each plain one with a class token that timm has."""
    from headsteer_jax.model.file_config import _describe_architecture

    known = 0
    for name in timm.list_models("*", module=["vision_transformer", "deit"]):
        facts = _describe_architecture(name)
        if not facts or "num_heads" not in facts or any(size in name for size in ("giant", "huge", "large", "so400m")):
            continue
        model = timm.create_model(name, device="meta")
        block = model.blocks[0]
        assert facts["num_heads"] in (None, block.attn.num_heads), name
        assert model.norm.eps == facts["norm_eps"], name
        assert isinstance(block.mlp.act, torch.nn.GELU), name
        known += 1
    assert known >= 20
