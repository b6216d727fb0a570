"""Tensor names of published vision transformers: which publisher's layout a file has, and where the backbone begins.

The backbone is found by the name of its patch kernel, whatever prefixes it has: `module.`, `_orig_mod.`, `backbone.`,
one or several. A file of another architecture is refused, and the error names the architecture.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from headsteer_jax.config.schema import GateKind
from headsteer_jax.errors import HeadSteerError


class Layout(NamedTuple):
    """A publisher's names of the tensors, by the names of our modules; {} stands for the layer's number."""

    family: str
    modules: dict[str, str]  # patches, norm, head; of a layer norm1, query, key, value, out, norm2, mlp_in, mlp_out
    tokens: dict[str, str]  # cls, positions, registers, distillation
    scales: dict[str, str]  # LayerScale of out and mlp_out
    leaves: dict[str, str]  # suffixes of kernel, bias and a norm's scale, with the separator
    fused: bool  # query, key and value are one matrix, in this order
    flax: bool  # kernels are [inputs, outputs], attention's with axes H and K, patches' [h, w, channels, D]
    ignored: tuple[str, ...]  # beginnings of names that the model has no use for, except the head's
    constants: Mapping[str, Any] = {}  # what all of the publisher's models have in common, by its keys
    gates: Mapping[GateKind, str] = {}  # decision networks, by what they switch
    gate_norm: str = ""  # the norm that those of heads and sublayers may share

    def name(self, module: str, leaf: str, layer: int | None = None) -> str:
        """Return the file's name of one of our tensors: of a module's `kernel`, `bias` or `scale`."""
        return self.modules[module].format(layer) + self.leaves[leaf]


TORCH = {"kernel": ".weight", "bias": ".bias", "scale": ".weight"}
TIMM = Layout(
    family="timm",
    modules={
        "patches": "patch_embed.proj", "norm": "norm", "head": "head", "norm1": "blocks.{}.norm1",
        "query": "blocks.{}.attn.qkv", "key": "blocks.{}.attn.qkv", "value": "blocks.{}.attn.qkv",
        "out": "blocks.{}.attn.proj", "norm2": "blocks.{}.norm2",
        "mlp_in": "blocks.{}.mlp.fc1", "mlp_out": "blocks.{}.mlp.fc2",
    },
    tokens={
        "cls": "cls_token", "positions": "pos_embed", "registers": "reg_token", "distillation": "dist_token",
    },
    scales={"out": "blocks.{}.ls1.gamma", "mlp_out": "blocks.{}.ls2.gamma"},
    leaves=TORCH, fused=True, flax=False, ignored=("mask_token", "decoder_"),
)  # fmt: skip
# the authors' files of models with registers; without registers they have timm's names
DINOV2 = TIMM._replace(family="DINOv2", tokens=TIMM.tokens | {"registers": "register_tokens"})
MAE = TIMM._replace(family="MAE")  # timm's names and a decoder's
# MengLcool/AdaViT: DeiT with decision networks; its code reads fused projections as well, but trains them apart
ADAVIT = TIMM._replace(
    family="AdaViT",
    constants={"layer_norm_eps": 1e-6, "hidden_act": "gelu", "block_fn": "Block", "global_pool": "token"},
    gates={
        "heads": "blocks.{}.head_select.mlp_head", "sublayers": "blocks.{}.layer_select.mlp_head",
        "tokens": "blocks.{}.attn.token_select.mlp_head",
    },
    gate_norm="blocks.{}.norm_policy",
)  # fmt: skip
ADAVIT_SPLIT = ADAVIT._replace(
    modules=ADAVIT.modules | {part: f"blocks.{{}}.attn.{part}" for part in ("query", "key", "value")}, fused=False
)
_SPLIT = {"query": "attention.attention.query", "key": "attention.attention.key", "value": "attention.attention.value"}
HF_VIT = Layout(
    family="Hugging Face ViTModel",
    modules={
        "patches": "embeddings.patch_embeddings.projection", "norm": "layernorm", "head": "classifier",
        "norm1": "encoder.layer.{}.layernorm_before",
        **{part: f"encoder.layer.{{}}.{name}" for part, name in _SPLIT.items()},
        "out": "encoder.layer.{}.attention.output.dense", "norm2": "encoder.layer.{}.layernorm_after",
        "mlp_in": "encoder.layer.{}.intermediate.dense", "mlp_out": "encoder.layer.{}.output.dense",
    },
    tokens={
        "cls": "embeddings.cls_token", "positions": "embeddings.position_embeddings",
        "registers": "embeddings.register_tokens", "distillation": "embeddings.distillation_token",
    },
    scales={},
    leaves=TORCH, fused=False, flax=False, ignored=("embeddings.mask_token", "pooler.", "decoder."),
)  # fmt: skip
HF_DINOV2 = HF_VIT._replace(
    family="Hugging Face Dinov2Model",
    modules=HF_VIT.modules
    | {
        "norm1": "encoder.layer.{}.norm1", "norm2": "encoder.layer.{}.norm2",
        "mlp_in": "encoder.layer.{}.mlp.fc1", "mlp_out": "encoder.layer.{}.mlp.fc2",
    },
    scales={"out": "encoder.layer.{}.layer_scale1.lambda1", "mlp_out": "encoder.layer.{}.layer_scale2.lambda1"},
)  # fmt: skip
# the names of the modules in transformers 5; save_pretrained still writes those above
_PROJECTIONS = {
    "query": "attention.q_proj", "key": "attention.k_proj", "value": "attention.v_proj", "out": "attention.o_proj",
}  # fmt: skip
HF5_VIT = HF_VIT._replace(
    family="transformers 5 ViTModel",
    modules=HF_VIT.modules
    | {part: f"layers.{{}}.{name}" for part, name in _PROJECTIONS.items()}
    | {
        "norm1": "layers.{}.layernorm_before", "norm2": "layers.{}.layernorm_after",
        "mlp_in": "layers.{}.mlp.fc1", "mlp_out": "layers.{}.mlp.fc2",
    },
)  # fmt: skip
HF5_DINOV2 = HF_DINOV2._replace(
    family="transformers 5 Dinov2Model",
    modules=HF_DINOV2.modules | {part: f"encoder.layer.{{}}.{name}" for part, name in _PROJECTIONS.items()},
)
_BLOCK = "Transformer/encoderblock_{}"
_FLAX_LEAVES = {"kernel": "/kernel", "bias": "/bias", "scale": "/scale"}
AUGREG = Layout(
    family="google-research/vision_transformer",
    modules={
        "patches": "embedding", "norm": "Transformer/encoder_norm", "head": "head",
        "norm1": f"{_BLOCK}/LayerNorm_0",
        **{part: f"{_BLOCK}/MultiHeadDotProductAttention_1/{part}" for part in ("query", "key", "value", "out")},
        "norm2": f"{_BLOCK}/LayerNorm_2",
        "mlp_in": f"{_BLOCK}/MlpBlock_3/Dense_0", "mlp_out": f"{_BLOCK}/MlpBlock_3/Dense_1",
    },
    tokens={"cls": "cls", "positions": "Transformer/posembed_input/pos_embedding"},
    scales={},
    leaves=_FLAX_LEAVES, fused=False, flax=True, ignored=("pre_logits/",),
    constants={"layer_norm_epsilon": 1e-6, "block_fn": "Block", "global_pool": "token"},
)  # fmt: skip
BIG_VISION = AUGREG._replace(
    family="google-research/big_vision",
    modules=AUGREG.modules
    | {
        **{part: f"{_BLOCK}/MultiHeadDotProductAttention_0/{part}" for part in ("query", "key", "value", "out")},
        "norm2": f"{_BLOCK}/LayerNorm_1",
        "mlp_in": f"{_BLOCK}/MlpBlock_0/Dense_0", "mlp_out": f"{_BLOCK}/MlpBlock_0/Dense_1",
    },
    tokens={"cls": "cls", "positions": "pos_embedding"},
)  # fmt: skip
TORCHVISION = Layout(
    family="torchvision",
    modules={
        "patches": "conv_proj", "norm": "encoder.ln", "head": "heads.head",
        "norm1": "encoder.layers.encoder_layer_{}.ln_1", "norm2": "encoder.layers.encoder_layer_{}.ln_2",
        **dict.fromkeys(("query", "key", "value"), "encoder.layers.encoder_layer_{}.self_attention.in_proj"),
        "out": "encoder.layers.encoder_layer_{}.self_attention.out_proj",
        "mlp_in": "encoder.layers.encoder_layer_{}.mlp.0", "mlp_out": "encoder.layers.encoder_layer_{}.mlp.3",
    },
    tokens={"cls": "class_token", "positions": "encoder.pos_embedding"},
    scales={},
    leaves=TORCH, fused=True, flax=False, ignored=(),
    constants={"layer_norm_eps": 1e-6, "hidden_act": "gelu", "block_fn": "Block", "global_pool": "token"},
)  # fmt: skip

# Names that only other architectures have, in the order of the search.
FOREIGN = (
    (r"(^|\.)lora_[AB]\.|\.lora_(down|up)\.", "a LoRA adapter, not a whole model"),
    (r"rope_embed|embeddings\.patch_embeddings\.weight|\.rope\.", "DINOv3 or another ViT with rotary positions"),
    (r"(^|\.)vision_model\.head\.probe", "SigLIP, which pools by attention and has no class token"),
    (r"(^|\.)vision_model\.embeddings\.|visual\.class_embedding|visual\.conv1\.|visual\.transformer\.", "CLIP"),
    (r"(^|\.)layers\.\d+\.blocks\.\d+\.", "a Swin transformer"),
    (
        r"relative_position_bias_table|attn\.q_bias|rel_pos_bias",
        "BEiT or EVA, whose positions are relative or whose keys have no bias",
    ),
    (r"attn\.rel_pos_[hw]", "SAM or another ViT with relative positions"),
    (r"patch_embed\.backbone\.|(^|/)conv_root/kernel", "a hybrid of a ConvNet and a ViT"),
    (r"(^|\.)dwconv\.weight|\.conv_dw\.weight|downsample_layers\.", "a ConvNeXt or a similar ConvNet"),
    (r"(^|\.)layer1\.0\.(conv|bn)1\.|(^|\.)conv_stem\.|(^|\.)features\.0\.|embedder\.embedder\.conv", "a ConvNet"),
    (r"(^|\.)tokens_to_token\.", "T2T-ViT, which embeds its patches by attention"),
    (r"(^|\.)to_patch_embedding\.", "vit-pytorch, whose names are not read"),
    (r"lm_head|embed_tokens|word_embeddings|(^|\.)wte\.", "a language model"),
    (r"^W_(enc|dec)$|(^|\.)dictionary\._weights", "a sparse autoencoder (sae.pretrained reads those)"),
    (r"(^|\.)(unet|down_blocks)\.", "a diffusion model"),
)
# Names of options of a vision transformer that ours does not have.
OPTIONS = (
    (r"attn\.[qk]_norm\.", "its queries and keys are normalised (qk_norm)"),
    (r"attn\.norm\.", "its attention's output is normalised (scale_attn_norm)"),
    (r"mlp\.norm\.", "its MLP's hidden layer is normalised (scale_mlp_norm)"),
    (r"norm_pre\.", "it has a norm before the blocks (pre_norm), as CLIP's models do"),
    (r"fc_norm\.", "its final norm follows the pooling (fc_norm), as in models that average the patches"),
    (r"attn_pool\.|MAPHead", "it pools by attention (global_pool='map')"),
    (r"patch_embed\.norm\.", "it has a norm in its patch embedding (embed_norm_layer)"),
    (r"mlp\.(fc1_[gx]|w12|w[123]|gate_proj|up_proj|weights_in)\.", "its MLP is gated (SwiGLU)"),
    (r"blocks\.\d+\.(attns|ffns)\.", "its blocks run in parallel (ParallelThingsBlock)"),
    (r"blocks\.\d+\.(in_proj|\w+_out_proj)\.", "attention and MLP run in parallel (ParallelScalingBlock)"),
    (r"lambda_[qk]|attn\.sub_norm", "its attention is differential"),
    (r"rel_pos|relative_position", "its positions are relative"),
    (r"attn\.gate|attn\.sinks", "its attention is gated"),
)  # fmt: skip
# If a file has several backbones, the one with the first of these words in its prefix is taken.
PREFERRED = ("ema", "teacher", "target_encoder", "base_encoder", "encoder_q")

GATES = re.compile(r"(^|\.)(head_select|layer_select|token_select|norm_policy)\.")  # the modules of AdaViT's policies
OPTIMIZER = re.compile(r"(^|[./])(mu|nu|exp_avg|exp_avg_sq|momentum_buffer)[./]")  # its state is not a second backbone


class Backbone(NamedTuple):
    """The vision transformer in a file."""

    layout: Layout
    prefix: str  # what precedes the backbone's names
    tensors: dict[str, np.ndarray]  # all of the file's, with layers under the layout's names
    choice: str  # which of several backbones this is; "" if there is one


def find_backbone(path: Path, tensors: Mapping[str, np.ndarray]) -> Backbone:
    """Find the layout whose names these tensors have, and the prefix of the backbone's names.

    Raises:
      HeadSteerError: there is none, there are several without a reason to prefer one, or the model is of another kind.
    """
    anchors = [  # (layout's patch kernel, prefix)
        (anchor, name.removesuffix(anchor))
        for anchor in (layout.name("patches", "kernel") for layout in (TIMM, HF_VIT, AUGREG, TORCHVISION))
        for name in tensors
        if (name == anchor or name.endswith(("." + anchor, "/" + anchor))) and not OPTIMIZER.search(name)
    ]
    if not anchors:
        raise HeadSteerError(f"{path}: {_describe_unknown(tensors)}; choose another file")
    prefixes = [prefix for _, prefix in anchors]
    prefix, choice = _choose_prefix(path, prefixes)
    named = _unchunk(path, _unroll(_split_torchvision(tensors), prefix), prefix)
    layout = _recognise_layout(anchors[prefixes.index(prefix)][0], prefix, named)
    inside = [name.removeprefix(prefix) for name in named if name.startswith(prefix)]
    inside = [name for name in inside if not name.startswith(layout.ignored)]
    if reason := _find_foreign(inside):
        raise HeadSteerError(f"{path}: this is {reason}; choose a plain ViT's file")
    for pattern, reason in OPTIONS:
        if example := next((name for name in inside if re.search(pattern, name)), None):
            raise HeadSteerError(
                f"{path}: {reason}: this model has no place for the tensor {prefix + example!r}; choose a plain ViT's "
                "file"
            )
    return Backbone(layout, prefix, named, choice)


def _recognise_layout(anchor: str, prefix: str, tensors: Mapping[str, np.ndarray]) -> Layout:
    """Choose among the layouts whose patch kernel has this name."""
    if anchor == TIMM.name("patches", "kernel"):
        if prefix + DINOV2.tokens["registers"] in tensors:
            return DINOV2
        if prefix + ADAVIT_SPLIT.name("query", "kernel", 0) in tensors:
            return ADAVIT_SPLIT
        if any(GATES.search(name.removeprefix(prefix)) for name in tensors if name.startswith(prefix)):
            return ADAVIT
        return MAE if prefix + "decoder_pred.weight" in tensors else TIMM
    candidates = {
        HF_VIT.name("patches", "kernel"): (HF_VIT, HF5_VIT, HF5_DINOV2, HF_DINOV2),
        AUGREG.name("patches", "kernel"): (BIG_VISION, AUGREG),
        TORCHVISION.name("patches", "kernel"): (TORCHVISION,),
    }[anchor]

    def fits(layout: Layout) -> bool:
        """Say whether the file has a layer's first norm and its queries under a layout's names."""
        names = (layout.name("norm1", "scale", 0), layout.name("query", "kernel", 0))
        return all(prefix + name in tensors for name in names)

    return next(filter(fits, candidates), candidates[-1])


def _choose_prefix(path: Path, prefixes: list[str]) -> tuple[str, str]:
    """Choose one of the prefixes, and say which if there are several.

    Raises:
      HeadSteerError: there is no reason to prefer one.
    """
    if len(prefixes) == 1:
        return prefixes[0], ""
    names = ", ".join(f"{prefix!r}" for prefix in prefixes)
    for word in PREFERRED:
        preferred = [prefix for prefix in prefixes if re.search(rf"(^|[._/]){word}([._/]|$)", prefix)]
        if len(preferred) == 1:
            return preferred[0], f"{preferred[0].rstrip('./')} of the backbones {names}"
    raise HeadSteerError(f"{path}: holds {len(prefixes)} backbones, under {names}; save only the one that you want")


def _unchunk(path: Path, tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Rename blocks.CHUNK.LAYER, as DINOv2's training writes them for its sharding, to blocks.LAYER.

    Raises:
      HeadSteerError: each chunk numbers its layers from 0, as in hierarchical models.
    """
    chunked = re.compile(rf"({re.escape(prefix)}blocks\.)\d+\.(?=\d+\.)")
    named = {chunked.sub(r"\1", name): tensor for name, tensor in tensors.items()}
    if len(named) < len(tensors):
        example = next(name for name in tensors if chunked.match(name))
        raise HeadSteerError(
            f"{path}: each stage numbers its blocks from 0 ({example!r}), as in hierarchical models; choose a "
            "plain ViT's file"
        )
    return named


def _unroll(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Split the stacked blocks of a scanned Flax model, whose leading axis is the layers, into single ones."""
    scanned = prefix + _BLOCK.removesuffix("_{}") + "/"
    named = {}
    for name, tensor in tensors.items():
        if name.startswith(scanned) and tensor.ndim:
            for layer, part in enumerate(tensor):
                named[f"{prefix}{_BLOCK.format(layer)}/{name.removeprefix(scanned)}"] = part
        else:
            named[name] = tensor
    return named


def _split_torchvision(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename in_proj_weight to in_proj.weight, and the older linear_1 and linear_2 to 0 and 3."""
    old = {
        "self_attention.in_proj_": "self_attention.in_proj.",
        ".mlp.linear_1.": ".mlp.0.",
        ".mlp.linear_2.": ".mlp.3.",
    }
    named = {}
    for name, tensor in tensors.items():
        for before, after in old.items():
            name = name.replace(before, after) if "encoder_layer_" in name else name
        named[name] = tensor
    return named


def _find_foreign(names: Iterable[str]) -> str:
    """Name the architecture to which these names belong, or return "" if it may be a plain ViT."""
    names = list(names)
    return next((reason for pattern, reason in FOREIGN if any(re.search(pattern, name) for name in names)), "")


def _describe_unknown(tensors: Mapping[str, np.ndarray]) -> str:
    """Describe a file in which there is no vision transformer that we know."""
    if reason := _find_foreign(tensors):
        return f"this is {reason}, not a plain vision transformer"
    examples = ", ".join(map(repr, sorted(tensors)[:3]))
    return (
        "no vision transformer under the names of timm, Hugging Face, torchvision or google-research; "
        f"its tensors begin with {examples or 'none'}"
    )
