"""Weight files as people have them: wrapped, chunked, in shards, in directories, in bfloat16, of other architectures.

A file in another form must give the very parameters that the golden file gives, whose features are its publisher's
(test_pretrained.py).
"""

import argparse
import functools
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from builders import tiny_config
from helpers import GOLDENS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from headsteer_jax.config import Config, ModelConfig
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.file_config import KEYS, Fact, FileConfig, _describe_architecture, compare, read_file_config
from headsteer_jax.model.layouts import TIMM, find_backbone
from headsteer_jax.model.pretrained import Loaded, check_backbone, load_backbone
from headsteer_jax.model.vit import build_model
from headsteer_jax.model.weights import fingerprint_weights
from headsteer_jax.train.loop import init_params

Tensors = dict[str, np.ndarray]
D = 12


def our_config(path: Path | str, **fields: Any) -> Config:
    base = tiny_config()
    data = base.data.model_copy(update={"image_size": 8, "channels": 3, "mean": (0.0,) * 3, "std": (1.0,) * 3})
    model = {"patch": 4, "depth": 2, "width": D, "heads": 3, "pretrained": str(path), **fields}
    return base.model_copy(update={"data": data, "model": ModelConfig(**model)})


@functools.cache
def fresh(registers: int) -> Any:
    config = our_config("", registers=registers)
    return init_params(build_model(config, 7), config, 0)


def load(path: Path | str, class_names: tuple[str, ...] = (), **fields: Any) -> tuple[Any, Loaded]:
    return load_backbone(fresh(fields.get("registers", 0)), our_config(path, **fields), class_names)


def golden(name: str) -> Tensors:
    return load_file(GOLDENS / f"{name}.safetensors")


def save(path: Path, tensors: Tensors) -> Path:
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path)
    return path


def assert_same(ours: Any, wanted: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


def refusal(path: Path | str, **fields: Any) -> str:
    with pytest.raises(HeadSteerError) as error:
        load(path, **fields)
    assert "\n" not in str(error.value)
    return str(error.value)


def renamed(tensors: Tensors, *pairs: tuple[str, str]) -> Tensors:
    for before, after in pairs:
        tensors = {name.replace(before, after): tensor for name, tensor in tensors.items()}
    return tensors


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.backbone.", "a.b.c.vit.", "net.0.encoder."]
)
@pytest.mark.parametrize("name", ["timm_vit", "hf_vit"])
def test_any_prefix_is_seen_through_and_said(tmp_path: Path, prefix: str, name: str) -> None:
    wrapped = {prefix + key: value for key, value in golden(name).items()}
    beside = {"projector.0.weight": np.ones((4, D), np.float32), "queue": np.ones(3, np.float32)}
    params, report = load(save(tmp_path / "a.safetensors", wrapped | beside))
    assert_same(params, load(GOLDENS / f"{name}.safetensors")[0])
    assert f"under the prefix {prefix!r}" in str(report)
    assert set(beside) <= set(report.ignored)


def test_a_head_beside_the_backbone_is_kept(tmp_path: Path) -> None:
    tensors = golden("timm_vit")
    wrapped = {("module." if name.startswith("head.") else "module.backbone.") + name: t for name, t in tensors.items()}
    params, _ = load(save(tmp_path / "a.safetensors", wrapped), pretrained_head=True)
    assert_same(params, load(GOLDENS / "timm_vit.safetensors", pretrained_head=True)[0])


@pytest.mark.parametrize(
    ("first", "second", "taken"),
    [
        ("student.", "teacher.backbone.", "teacher.backbone"),
        ("module.base_encoder.", "module.momentum_encoder.", "module.base_encoder"),
        ("model.", "ema.", "ema"),
        ("encoder_q.", "encoder_k.", "encoder_q"),
    ],
)
def test_of_two_backbones_the_choice_is_said(tmp_path: Path, first: str, second: str, taken: str) -> None:
    wanted = golden("timm_vit")
    other = {name: tensor + 1 for name, tensor in wanted.items()}
    both = {prefix: wanted if prefix.rstrip(".") == taken else other for prefix in (first, second)}
    flat = {prefix + name: tensor for prefix, tensors in both.items() for name, tensor in tensors.items()}
    params, report = load(save(tmp_path / "a.safetensors", flat))
    assert_same(params, load(GOLDENS / "timm_vit.safetensors")[0])
    assert f"takes {taken} of the backbones" in str(report)


def test_two_backbones_alike_are_refused(tmp_path: Path) -> None:
    flat = {f"{side}.{name}": tensor for side in ("left", "right") for name, tensor in golden("timm_vit").items()}
    assert "holds 2 backbones, under 'left.', 'right.'" in refusal(save(tmp_path / "a.safetensors", flat))


def test_an_optimizers_state_is_no_second_backbone(tmp_path: Path) -> None:
    tensors = dict(np.load(GOLDENS / "augreg.npz"))
    moments = {f"opt/0/{moment}/{name}": tensor + 1 for moment in ("mu", "nu") for name, tensor in tensors.items()}
    np.savez(tmp_path / "a.npz", **moments, **{f"params/{name}": tensor for name, tensor in tensors.items()})
    assert_same(load(tmp_path / "a.npz")[0], load(GOLDENS / "augreg.npz")[0])


def test_infinity_outside_of_the_backbone_does_not_matter(tmp_path: Path) -> None:
    tensors = {f"visual.{name}": tensor for name, tensor in golden("timm_vit").items()}
    tensors["text.attn_mask"] = np.full((2, 2), -np.inf, np.float32)
    assert_same(load(save(tmp_path / "a.safetensors", tensors))[0], load(GOLDENS / "timm_vit.safetensors")[0])


def test_blocks_that_are_numbered_anew_are_refused(tmp_path: Path) -> None:
    tensors = renamed(golden("timm_vit"), ("blocks.0.", "blocks.0.0."), ("blocks.1.", "blocks.1.0."))
    assert "each stage numbers its blocks from 0 ('blocks.0.0." in refusal(save(tmp_path / "a.safetensors", tensors))


def test_dinov2s_chunks_are_blocks(tmp_path: Path) -> None:
    chunked = renamed(golden("timm_dinov2"), ("blocks.0.", "blocks.0.0."), ("blocks.1.", "blocks.1.1."))
    assert "blocks.1.1.norm1.weight" in chunked
    params, _ = load(save(tmp_path / "a.safetensors", chunked))
    assert_same(params, load(GOLDENS / "timm_dinov2.safetensors")[0])


def test_maes_decoder_is_left_out_and_its_classifier_pools(tmp_path: Path) -> None:
    decoder = {"mask_token": (1, 1, 8), "decoder_pos_embed": (1, 5, 8), "decoder_pred.weight": (48, 8)}
    tensors = golden("timm_vit")
    extra = {name: np.ones(shape, np.float32) for name, shape in decoder.items()}
    params, report = load(save(tmp_path / "a.safetensors", tensors | extra))
    assert_same(params, load(GOLDENS / "timm_vit.safetensors")[0])
    assert report.family == "MAE"
    fine_tuned = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: t for name, t in tensors.items()
    }
    assert "its final norm follows the pooling (fc_norm)" in refusal(save(tmp_path / "b.safetensors", fine_tuned))


def test_a_register_takes_its_position_along(tmp_path: Path) -> None:
    """With no_embed_class=False timm adds positions to registers, and to DeiT's distillation token."""
    tensors = golden("timm_reg")
    positions = np.random.default_rng(0).standard_normal((1, 3, D)).astype(np.float32)
    moved = {
        "cls_token": tensors["cls_token"] - positions[:, :1],
        "reg_token": tensors["reg_token"] - positions[:, 1:],
        "pos_embed": np.concatenate([positions, tensors["pos_embed"]], axis=1),
    }
    ours = load(save(tmp_path / "a.safetensors", tensors | moved), registers=2)[0]["params"]
    wanted = load(GOLDENS / "timm_reg.safetensors", registers=2)[0]["params"]
    np.testing.assert_allclose(ours["registers"], wanted["registers"], atol=1e-6)
    np.testing.assert_allclose(ours["cls"] + ours["positions"][:, :1], wanted["cls"], atol=1e-6)
    np.testing.assert_array_equal(ours["positions"][:, 1:], wanted["positions"][:, 1:])
    distilled = {name: t for name, t in (tensors | moved).items() if name != "reg_token"}
    distilled |= {"dist_token": moved["reg_token"][:, :1], "pos_embed": np.delete(moved["pos_embed"], 2, axis=1)}
    ours = load(save(tmp_path / "b.safetensors", distilled), registers=1)[0]["params"]
    np.testing.assert_allclose(ours["registers"], wanted["registers"][:, :1], atol=1e-6)
    assert "averages two heads" in refusal(tmp_path / "b.safetensors", registers=1, pretrained_head=True)


def test_positions_that_are_no_square_are_not_taken_for_one_without_a_class_token(tmp_path: Path) -> None:
    """Hugging Face's class token always has a position: 16 of them are no grid of 4 x 4."""
    positions = np.zeros((1, 16, D), np.float32)
    path = save(tmp_path / "a.safetensors", golden("hf_vit") | {"embeddings.position_embeddings": positions})
    assert "16 positions do not form a square" in refusal(path)


def big_vision(scanned: bool) -> Tensors:
    """AugReg's golden under big_vision's names; there CLS has no position."""
    old = dict(np.load(GOLDENS / "augreg.npz"))
    positions = old.pop("Transformer/posembed_input/pos_embedding")
    old |= {"cls": old["cls"] + positions[:, :1], "pos_embedding": positions[:, 1:]}
    new = renamed(
        old, ("LayerNorm_2", "LayerNorm_1"), ("DotProductAttention_1", "DotProductAttention_0"), ("Block_3", "Block_0")
    )
    if scanned:
        first, second = ({n: t for n, t in new.items() if f"encoderblock_{i}/" in n} for i in range(2))
        new = {name: tensor for name, tensor in new.items() if "encoderblock_" not in name}
        for (name, a), b in zip(first.items(), second.values(), strict=True):
            new[name.replace("encoderblock_0", "encoderblock")] = np.stack([a, b])
    return {f"params/{name}": tensor for name, tensor in new.items()}


@pytest.mark.parametrize("scanned", [False, True])
def test_big_visions_names(tmp_path: Path, scanned: bool) -> None:
    np.savez(tmp_path / "a.npz", **big_vision(scanned))
    params, report = load(tmp_path / "a.npz")
    wanted = load(GOLDENS / "augreg.npz")[0]["params"]
    ours = params["params"]
    np.testing.assert_allclose(
        ours["cls"] + ours["positions"][:, :1], wanted["cls"] + wanted["positions"][:, :1], atol=1e-6
    )
    for name in ("patches", "norm", "layers_0", "layers_1"):
        assert_same(ours[name], wanted[name])
    assert report.family == "google-research/big_vision"
    assert report.comparison.unchecked == ["GELU", "grid (taken as a square, 2 x 2)", "mean and std"]


def test_siglip_is_refused_by_name(tmp_path: Path) -> None:
    tensors = big_vision(True)
    np.savez(tmp_path / "a.npz", **tensors, **{"params/MAPHead_0/probe": np.ones((1, 1, D), np.float32)})
    assert "pools by attention" in refusal(tmp_path / "a.npz")
    del tensors["params/cls"]
    np.savez(tmp_path / "b.npz", **tensors)
    assert "no class token" in refusal(tmp_path / "b.npz")


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16])
def test_short_floats_in_npz(tmp_path: Path, kind: Any) -> None:
    tensors = dict(np.load(GOLDENS / "augreg.npz"))
    np.savez(tmp_path / "a.npz", **{name: tensor.astype(kind) for name, tensor in tensors.items()})
    np.savez(tmp_path / "b.npz", **{name: tensor.astype(kind).astype(np.float32) for name, tensor in tensors.items()})
    assert_same(load(tmp_path / "a.npz")[0], load(tmp_path / "b.npz")[0])


def test_unknown_types_in_npz_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", cls=np.zeros((1, 1, D), "V1"))
    assert "tensor 'cls' has the unknown type |V1" in refusal(tmp_path / "a.npz")


def test_raw_names_of_transformers_5(tmp_path: Path) -> None:
    raw = renamed(
        golden("hf_vit"), ("encoder.layer.", "layers."), ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"), ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"), ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"),
    )  # fmt: skip
    params, report = load(save(tmp_path / "a.safetensors", {f"vit.{name}": tensor for name, tensor in raw.items()}))
    assert_same(params, load(GOLDENS / "hf_vit.safetensors")[0])
    assert report.family == "transformers 5 ViTModel"


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("visual.class_embedding", (12,), "this is CLIP"),
        ("vision_model.embeddings.patch_embedding.weight", (4, 3, 2, 2), "this is CLIP"),
        ("layers.0.blocks.0.attn.relative_position_bias_table", (9, 3), "this is a Swin transformer"),
        ("blocks.0.attn.relative_position_bias_table", (9, 3), "this is BEiT"),
        ("stages.0.blocks.0.conv_dw.weight", (8, 1, 7, 7), "this is a ConvNeXt"),
        ("layer1.0.conv1.weight", (8, 8, 3, 3), "this is a ConvNet"),
        ("module.conv_stem.weight", (8, 3, 3, 3), "this is a ConvNet"),
        ("base_model.model.blocks.0.attn.qkv.lora_A.weight", (4, 12), "this is a LoRA adapter"),
        ("transformer.wte.weight", (9, 4), "this is a language model"),
        ("W_enc", (4, 9), "this is a sparse autoencoder"),
        ("to_patch_embedding.1.weight", (4, 9), "this is vit-pytorch"),
        ("what.is.this", (1,), "no vision transformer under the names of timm"),
    ],
)
def test_other_architectures_are_called_what_they_are(
    tmp_path: Path, name: str, shape: tuple[int, ...], says: str
) -> None:
    assert says in refusal(save(tmp_path / "a.safetensors", {name: np.ones(shape, np.float32)}))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("blocks.0.attn.q_norm.weight", "qk_norm"),
        ("blocks.1.mlp.norm.weight", "scale_mlp_norm"),
        ("norm_pre.weight", "pre_norm"),
        ("blocks.0.mlp.w12.weight", "its MLP is gated"),
        ("attn_pool.latent", "global_pool='map'"),
        ("blocks.0.attn.rel_pos_h", "relative positions"),
        ("blocks.0.something", "no place for the tensor 'backbone.blocks.0.something'"),
    ],
)
def test_options_are_named_behind_a_prefix_too(tmp_path: Path, name: str, says: str) -> None:
    tensors = golden("timm_vit") | {name: np.ones(D, np.float32)}
    wrapped = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    assert says in refusal(save(tmp_path / "a.safetensors", wrapped))


def test_biases_are_zero_only_if_no_layer_has_one(tmp_path: Path) -> None:
    tensors = {name: t for name, t in golden("timm_vit").items() if not name.endswith("qkv.bias")}
    params, report = load(save(tmp_path / "a.safetensors", tensors))
    assert not np.any(params["params"]["layers_1"]["query"]["bias"])
    assert report.absent == ["blocks.0.attn.qkv.bias", "blocks.1.attn.qkv.bias"]
    assert "without 2 (blocks.0.attn.qkv.bias, blocks.1.attn.qkv.bias), which are zero" in str(report)


# Directories, shards, fingerprints


def shards(directory: Path, count: int = 3) -> Path:
    """Write a golden as transformers shards a model, under an index."""
    tensors = list(golden("timm_vit").items())
    weight_map = {}
    for number in range(count):
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = dict(tensors[number::count])
        save(directory / name, part)
        weight_map |= dict.fromkeys(part, name)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards_by_directory_and_by_index(tmp_path: Path) -> None:
    index = shards(tmp_path)
    wanted = load(GOLDENS / "timm_vit.safetensors")[0]
    assert_same(load(tmp_path)[0], wanted)
    assert_same(load(index)[0], wanted)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    assert "is one of 3 shards; name their directory" in refusal(shard)
    shard.unlink()
    assert "its shard model-00002-of-00003.safetensors is missing" in refusal(tmp_path)
    index.write_text("{}")
    assert "lists no shards" in refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../../elsewhere.safetensors"}}))
    assert "lists no shards" in refusal(tmp_path)


def test_a_directory_has_one_weight_file_or_is_refused(tmp_path: Path) -> None:
    assert "holds no weight file" in refusal(tmp_path)
    save(tmp_path / "mine.safetensors", golden("timm_vit"))
    (tmp_path / "training_args.bin").write_bytes(b"")
    (tmp_path / "optimizer.pt").write_bytes(b"")
    wanted = load(GOLDENS / "timm_vit.safetensors")[0]
    assert_same(load(tmp_path)[0], wanted)
    save(tmp_path / "other.safetensors", golden("timm_dinov2"))
    assert "holds 2 weight files (mine.safetensors, other.safetensors); name one of them" in refusal(tmp_path)
    save(tmp_path / "model.safetensors", golden("timm_vit"))
    assert_same(load(tmp_path)[0], wanted)


def test_the_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "a.safetensors", golden("timm_vit"))
    assert_same(load("~/a.safetensors")[0], load(tmp_path / "a.safetensors")[0])
    assert fingerprint_weights("~/a.safetensors") == fingerprint_weights(str(tmp_path / "a.safetensors")) != ""


def test_fingerprints_are_of_the_content(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", golden("timm_vit"))
    wanted = hashlib.sha256(path.read_bytes()).hexdigest()
    assert fingerprint_weights(str(path)) == fingerprint_weights(str(tmp_path)) == wanted
    path.rename(tmp_path / "b.safetensors")
    assert fingerprint_weights(str(tmp_path / "b.safetensors")) == wanted
    (tmp_path / "shards").mkdir()
    index = shards(tmp_path / "shards")
    content = b"".join(part.read_bytes() for part in sorted(index.parent.glob("*.safetensors")))
    assert (
        fingerprint_weights(str(index)) == fingerprint_weights(str(index.parent)) == hashlib.sha256(content).hexdigest()
    )
    for nothing in ("", "hf://owner/model", str(tmp_path / "none.safetensors")):
        assert fingerprint_weights(nothing) == ""


class EntryNotFoundError(Exception):
    """As huggingface_hub's, for a file that a model does not have."""


def test_the_hub_gives_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards(tmp_path)

    class Hub:
        @staticmethod
        def hf_hub_download(repository: str, file: str) -> str:
            if not (tmp_path / file).is_file():
                raise EntryNotFoundError(f"404: {repository}/{file}")
            return str(tmp_path / file)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 3}))
    params, report = load("hf://owner/model")
    assert_same(params, load(GOLDENS / "timm_vit.safetensors")[0])
    assert report.comparison.checked == ["heads"]
    assert "the model has no file other.bin; name its weight file" in refusal("hf://owner/model/other.bin")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "has no file model.safetensors or" in refusal("hf://owner/model")


# The file's own description


@pytest.mark.parametrize(
    ("described", "fields", "says"),
    [
        ({"num_attention_heads": 4}, {}, "config.json says num_attention_heads = 4, but config.model.heads = 3"),
        ({"model_type": "vit"}, {}, "config.json: model_type vit means num_attention_heads = 12"),
        ({"layer_norm_eps": 1e-12}, {}, "layer_norm_eps = 1e-12, but config.model.layer_norm_epsilon = 1e-06"),
        ({"hidden_act": "gelu_new"}, {}, "hidden_act = 'gelu_new', but config.model.gelu = 'exact'"),
        ({"hidden_act": "gelu"}, {"gelu": "tanh"}, "hidden_act = 'gelu', but config.model.gelu = 'tanh'"),
        ({"hidden_act": "swish"}, {}, "hidden_act = 'swish', but this model computes GELU"),
        ({"num_hidden_layers": 12}, {}, "num_hidden_layers = 12, but config.model.depth = 2"),
        ({"hidden_size": 768}, {}, "hidden_size = 768, but config.model.width = 12"),
        ({"num_channels": 1}, {}, "num_channels = 1, but config.data.channels = 3"),
        ({"image_size": [4, 16], "patch_size": 4}, {}, "a grid of 1 x 4 patches"),
        ({"image_size": 32}, {}, "a grid of 8 x 8 patches"),
        ({"model_args": {"num_heads": 6}}, {}, "config.json says num_heads = 6"),
        ({"architecture": "vit_small_patch16_224"}, {}, "architecture vit_small_patch16_224 means num_heads = 6"),
        ({"architecture": "vit_base_patch16_rpn_224"}, {}, "block_fn = 'ResPostBlock', but this model has another"),
        ({"model_args": {"block_fn": "ParallelScalingBlock"}}, {}, "block_fn = 'ParallelScalingBlock'"),
        ({"global_pool": "avg"}, {"pretrained_head": True}, "global_pool = 'avg', but this model's head reads"),
    ],
)  # fmt: skip
def test_a_disagreement_is_one_line(
    tmp_path: Path, described: dict[str, Any], fields: dict[str, Any], says: str
) -> None:
    path = save(tmp_path / "model.safetensors", golden("timm_vit"))
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert says in refusal(path, **fields)
    with pytest.raises(HeadSteerError, match="model"):
        check_backbone(our_config(path, **fields), ("a",) * 7)


@pytest.mark.parametrize("path", ["~nobody-has-this-name/a.pth", "x" * 300 + ".pth", "a\0b.pth", ".", "/dev/null"])
def test_paths_that_are_none(path: str) -> None:
    assert refusal(path).startswith("config.model.pretrained = ")
    assert fingerprint_weights(path) == ""


@pytest.mark.parametrize(
    "described",
    [
        {"num_attention_heads": "three", "layer_norm_eps": None, "hidden_act": 3, "image_size": "big", "mean": ["a"]},
        {"depth": True, "image_size": [], "id2label": 7, "model_args": 3, "pretrained_cfg": [], "architecture": {}},
        [1, 2],
        {"image_size": {"height": 8, "width": 8}, "model_type": ["vit"]},
    ],
)
def test_a_description_of_something_else_says_nothing(tmp_path: Path, described: Any) -> None:
    path = save(tmp_path / "model.safetensors", golden("timm_vit"))
    (tmp_path / "config.json").write_text(json.dumps(described))
    _, report = load(path, pretrained_head=True)
    assert set(report.comparison.checked) <= {"grid"}


@pytest.mark.parametrize("content", ["{", "\x00", "[1"])
def test_a_broken_config_is_named(tmp_path: Path, content: str) -> None:
    path = save(tmp_path / "model.safetensors", golden("timm_vit"))
    (tmp_path / "config.json").write_text(content)
    assert "config.json: not JSON" in refusal(path)


def test_what_nothing_states_is_named_as_unchecked(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", golden("timm_vit"))
    _, report = load(path, pretrained_head=True)
    assert str(report).endswith(
        "not checked, because there is no config.json beside it: heads, epsilon, GELU, block order, grid (taken as a "
        "square, 2 x 2), pooling, classes, mean and std"
    )
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 3, "act_layer": "gelu", "img_size": 8}))
    _, report = load(path)
    assert str(report).endswith(
        "compared: heads, GELU, grid; not checked, because config.json does not state them: epsilon, block order, mean "
        "and std"
    )


@pytest.mark.parametrize(("pooling", "warned"), [("avg", True), ("token", False), ("", False)])
def test_pooling_of_a_head_that_is_left_out_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pooling: str, warned: bool
) -> None:
    path = save(tmp_path / "model.safetensors", golden("timm_vit"))
    (tmp_path / "config.json").write_text(json.dumps({"global_pool": pooling}))
    load(path)
    assert any("was not trained to classify" in message for message in caplog.messages) == warned


def test_gates_of_tokens_need_a_class_token_that_classifies(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", golden("timm_vit"))
    (tmp_path / "config.json").write_text(json.dumps({"global_pool": "avg"}))
    config = our_config(path)
    config = config.model_copy(update={"gate": config.gate.model_copy(update={"kinds": ("heads", "tokens")})})
    with pytest.raises(HeadSteerError) as error:
        check_backbone(config, ("a",) * 7)
    text = str(error.value)
    assert text.startswith(
        f"config.model.pretrained = {path}: config.json says global_pool = 'avg', but gates of tokens"
    )
    assert text.endswith("choose another file, or gate.kinds without tokens")


def test_another_normalisation_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(tmp_path / "model.safetensors", golden("timm_vit"))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [1.0] * 3}))
    load(path)
    [warning] = caplog.messages
    assert "was trained on images with mean (0.5, 0.5, 0.5), but config.data.mean = (0, 0, 0)" in warning


@pytest.mark.parametrize("names", [["a", "b", "c"], {"0": "a", "1": "b", "2": "c"}])
def test_classes_of_a_kept_head_keep_their_order(names: Any) -> None:
    described = FileConfig("config.json", {"classes": Fact("config.json says id2label", names)})
    config = our_config("a.safetensors", pretrained_head=True)
    assert "classes" in compare(described, config, ("A", "b", "c")).checked
    compare(described, config, ("x", "y", "z"))  # other words for the same classes, for all that we know
    with pytest.raises(HeadSteerError, match="says that its head's class 1 is 'b', but that is the dataset's class 0"):
        compare(described, config, ("b", "a", "c"))


@pytest.mark.parametrize(
    ("architecture", "heads"),
    [
        ("vit_tiny_patch16_224", 3), ("vit_small_patch14_reg4_dinov2", 6), ("deit3_medium_patch16_224", 8),
        ("deit_base_distilled_patch16_384", 12), ("vit_large_patch14_dinov2", 16), ("vit_giant_patch14_dinov2", 24),
        ("vit_base_patch32_plus_256", 14), ("flexivit_small", 6),
    ],
)  # fmt: skip
def test_heads_of_timms_architectures(architecture: str, heads: int) -> None:
    assert _describe_architecture(architecture)["num_heads"] == heads


@pytest.mark.parametrize("architecture", ["swin_tiny_patch4_window7_224", "vit_base_patch16_clip_224", "my_vit", "vit"])
def test_other_architectures_say_nothing(architecture: str) -> None:
    assert not _describe_architecture(architecture)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**6) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
WORDS = [key for keys in KEYS.values() for key in keys]
WORDS += ["architecture", "model_type", "model", "model_args", "pretrained_cfg", "model_kwargs"]


@given(described=st.dictionaries(st.sampled_from(WORDS), JSON, max_size=6), in_args=st.booleans())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_description_is_compared_or_refused_in_one_line(
    tmp_path: Path, described: dict[str, Any], in_args: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({} if in_args else described), encoding="utf-8")
    try:
        file = read_file_config(tmp_path / "a.safetensors", described if in_args else {}, TIMM)
        compare(file, our_config("a.safetensors", pretrained_head=True), tuple("abcdefg"))
        file.image()
    except HeadSteerError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017  # most descriptions are compared


@given(prefix=st.lists(st.from_regex(r"[a-z_]{1,9}|[0-9]", fullmatch=True), max_size=4))
@settings(max_examples=50, deadline=None)
def test_any_prefix_is_found(prefix: list[str]) -> None:
    whole = "".join(f"{part}." for part in prefix)
    tensors = {whole + name: tensor for name, tensor in golden("timm_vit").items()}
    backbone = find_backbone(Path("a.safetensors"), tensors)
    assert (backbone.prefix, backbone.layout, backbone.tensors.keys()) == (whole, TIMM, tensors.keys())


# Torch's files


def torch_file(path: Path, make: Callable[[dict[str, Any]], Any]) -> Path:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch.save(make({name: torch.tensor(value) for name, value in golden("timm_vit").items()}), path)
    return path


@pytest.mark.parametrize(
    ("make", "taken"),
    [
        (lambda t: {"state_dict": _off(t), "state_dict_ema": t}, "state_dict_ema of state_dict_ema, state_dict"),
        (lambda t: {"model": _off(t), "model_ema": t}, "model_ema of model_ema, model"),
        (lambda t: {"student": _off(t), "teacher": t}, "teacher of teacher, student"),
        (lambda t: {"model": {"state_dict": t}, "optimizer": {"state": {}}}, ""),
        (lambda t: {"net_G": t, "step": 3}, ""),
        (lambda t: t | {"epoch": 3}, ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".ckpt", ".pth.tar"])
def test_of_several_sets_the_averaged_one_is_taken_and_said(
    tmp_path: Path, make: Callable[[dict[str, Any]], Any], taken: str, suffix: str
) -> None:
    params, report = load(torch_file(tmp_path / f"a{suffix}", make))
    assert_same(params, load(GOLDENS / "timm_vit.safetensors")[0])
    assert (f"takes {taken};" in str(report)) == bool(taken)


def _off(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor + 1 for name, tensor in tensors.items()}


def test_arguments_in_the_file_are_compared(tmp_path: Path) -> None:
    arguments = argparse.Namespace(model="vit_small_patch16_224", lr=0.1)
    path = torch_file(tmp_path / "a.pth", lambda t: {"model": t, "args": arguments})
    assert "its training script's arguments's" not in refusal(path)
    assert "vit_small_patch16_224 means num_heads = 6, but config.model.heads = 3" in refusal(path)
    path = torch_file(tmp_path / "b.ckpt", lambda t: {"state_dict": t, "hyper_parameters": {"num_heads": 3}})
    assert load(path)[1].comparison.checked == ["heads"]


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {"optimizer": {"state": {}}}])
def test_no_weights_at_all(tmp_path: Path, content: Any) -> None:
    assert "it holds no state_dict" in refusal(torch_file(tmp_path / "a.pth", lambda _: content))
