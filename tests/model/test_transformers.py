"""Hugging Face's models, saved by transformers itself: in one file, in shards, under its raw names, and wrapped."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import tiny_config

from headsteer_jax.config import Config, ModelConfig
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.pretrained import Loaded, load_backbone
from headsteer_jax.model.vit import build_model
from headsteer_jax.train.loop import init_params

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")

CLASSES = 3
SHAPE = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 16, "patch_size": 8,
    "num_labels": CLASSES,
}  # fmt: skip
VIT = transformers.ViTConfig(**SHAPE, intermediate_size=96)
DEIT = transformers.DeiTConfig(**SHAPE, intermediate_size=96)
DINOV2 = transformers.Dinov2Config(**SHAPE)
REGISTERS = transformers.Dinov2WithRegistersConfig(**SHAPE, num_register_tokens=2)
IMAGES = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)


def jittered(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(mean + 0.3 * torch.randn(parameter.shape))
    return model.eval()


def our_config(path: Path, **fields: Any) -> Config:
    base = tiny_config()
    data = base.data.model_copy(update={"image_size": 16, "channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    model = {"patch": 8, "depth": 2, "width": 24, "heads": 3, "pretrained": str(path), **fields}
    return base.model_copy(update={"data": data, "model": ModelConfig(**model)})


def load(config: Config, class_names: tuple[str, ...] = ()) -> tuple[Any, Loaded]:
    plain = config.model_copy(update={"model": config.model.model_copy(update={"pretrained": ""})})
    return load_backbone(init_params(build_model(plain, CLASSES), plain, 0), config, class_names)


def features(params: Any, config: Config) -> np.ndarray:
    model = build_model(config, CLASSES)
    return np.asarray(
        model.apply(params, IMAGES, method=lambda m, x: m.norm(m.blocks(m.embed(x), gating="dense")[0][:, 0]))
    )


def check(model: Any, config: Config) -> Loaded:
    params, report = load(config)
    base = model if not hasattr(model, "base_model") else model.base_model
    with torch.no_grad():
        wanted = base(torch.tensor(IMAGES.transpose(0, 3, 1, 2))).last_hidden_state[:, 0].numpy()
    assert np.abs(features(params, config) - wanted).max() <= 1e-5 * np.abs(wanted).max()
    return report


MODELS = {
    "ViT": (transformers.ViTModel, VIT, {"layer_norm_epsilon": 1e-12}),
    "ViT classifier": (transformers.ViTForImageClassification, VIT, {"layer_norm_epsilon": 1e-12}),
    "distilled DeiT": (transformers.DeiTModel, DEIT, {"layer_norm_epsilon": 1e-12, "registers": 1}),
    "DeiT teacher": (
        transformers.DeiTForImageClassificationWithTeacher, DEIT, {"layer_norm_epsilon": 1e-12, "registers": 1},
    ),
    "DINOv2": (transformers.Dinov2Model, DINOV2, {}),
    "DINOv2 registers": (transformers.Dinov2WithRegistersModel, REGISTERS, {"registers": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", ["saved", "sharded", "raw names", "wrapped raw names"])
def test_features_are_transformers(tmp_path: Path, name: str, form: str) -> None:
    kind, described, fields = MODELS[name]
    model = jittered(kind(described))
    model.save_pretrained(tmp_path, max_shard_size="20KB" if form == "sharded" else "1GB")
    if "raw" in form:
        (tmp_path / "model.safetensors").unlink()
        prefix = "module._orig_mod." if "wrapped" in form else ""
        torch.save({prefix + key: value for key, value in model.state_dict().items()}, tmp_path / "pytorch_model.bin")
    report = check(model, our_config(tmp_path, **fields))
    assert len(list(tmp_path.glob("model-*"))) == 0 or form == "sharded"
    assert report.comparison.unchecked == ["mean and std"]


def test_mae_loads_its_encoder(tmp_path: Path) -> None:
    described = transformers.ViTMAEConfig(
        **SHAPE, intermediate_size=96, decoder_hidden_size=12, decoder_num_attention_heads=2,
        decoder_num_hidden_layers=1, decoder_intermediate_size=24, mask_ratio=0.0,
    )  # fmt: skip
    model = jittered(transformers.ViTMAEForPreTraining(described))
    model.save_pretrained(tmp_path)
    report = check(model, our_config(tmp_path, layer_norm_epsilon=1e-12))
    assert any(name.startswith("decoder.") for name in report.ignored)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("heads", 4, "num_attention_heads = 3, but config.model.heads = 4"),
        ("layer_norm_epsilon", 1e-6, "layer_norm_eps = 1e-12, but config.model.layer_norm_epsilon = 1e-06"),
        ("gelu", "tanh", "hidden_act = 'gelu', but config.model.gelu = 'tanh'"),
    ],
)
def test_a_disagreement_with_config_json_is_named(tmp_path: Path, field: str, value: Any, says: str) -> None:
    jittered(transformers.ViTModel(VIT)).save_pretrained(tmp_path)
    config = our_config(tmp_path / "model.safetensors", **({"layer_norm_epsilon": 1e-12} | {field: value}))
    with pytest.raises(HeadSteerError) as error:
        load(config)
    assert f"config.json says {says}" in str(error.value)
    assert "\n" not in str(error.value)


def test_dinov2s_classifier_is_of_another_kind(tmp_path: Path) -> None:
    model = jittered(transformers.Dinov2ForImageClassification(DINOV2))
    model.save_pretrained(tmp_path)
    with pytest.raises(HeadSteerError, match="token and average"):
        load(our_config(tmp_path, pretrained_head=True))
    (tmp_path / "config.json").unlink()
    with pytest.raises(HeadSteerError, match="reads the class token and the patches' average"):
        load(our_config(tmp_path, pretrained_head=True))


def test_other_architectures_are_called_what_they_are(tmp_path: Path) -> None:
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 48}
    for says, model in {
        "CLIP": transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**small, image_size=16, patch_size=8)),
        "BEiT": transformers.BeitModel(
            transformers.BeitConfig(**small, image_size=16, patch_size=8, use_relative_position_bias=True)
        ),
        "Swin": transformers.SwinModel(
            transformers.SwinConfig(image_size=16, embed_dim=12, depths=[1, 1], num_heads=[1, 1], window_size=2)
        ),
        "DINOv3": transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**small, image_size=16, patch_size=8)),
        "ConvNet": transformers.ResNetModel(
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
        ),
        "ConvNeXt": transformers.ConvNextModel(
            transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
        ),
        "language model": transformers.BertModel(transformers.BertConfig(**small, vocab_size=20)),
    }.items():
        directory = tmp_path / says.replace(" ", "_")
        model.save_pretrained(directory)
        with pytest.raises(HeadSteerError) as error:
            load(our_config(directory))
        assert f"{says}" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["file", "index", "missing shard"])
def test_shards_are_named_by_their_index(tmp_path: Path, part: str) -> None:
    model = jittered(transformers.ViTModel(VIT))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*"))
    index = tmp_path / "model.safetensors.index.json"
    if part == "index":
        check(model, our_config(index, layer_norm_epsilon=1e-12))
        return
    if part == "missing shard":
        shards[-1].unlink()
    with pytest.raises(HeadSteerError, match="is missing" if part != "file" else "is one of"):
        load(our_config(shards[0] if part == "file" else tmp_path, layer_norm_epsilon=1e-12))


def test_a_head_with_id2label_keeps_the_classes_in_order(tmp_path: Path) -> None:
    names = ("cat", "dog", "owl")
    described = transformers.ViTConfig(**SHAPE, intermediate_size=96, id2label=dict(enumerate(names)))
    jittered(transformers.ViTForImageClassification(described)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"]["1"] == "dog"
    config = our_config(tmp_path, layer_norm_epsilon=1e-12, pretrained_head=True)
    _, report = load(config, names)
    assert "classes" in report.comparison.checked
    with pytest.raises(HeadSteerError, match="its head's class 1 is 'dog', but that is the dataset's class 0"):
        load(config, ("dog", "cat", "owl"))


def test_features_are_torchvisions(tmp_path: Path) -> None:
    model = jittered(
        torchvision.models.VisionTransformer(
            image_size=16, patch_size=8, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=96, num_classes=CLASSES
        )
    )
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    config = our_config(tmp_path / "vit.pth", pretrained_head=True)
    params, report = load(config)
    with torch.no_grad():
        wanted = model(torch.tensor(IMAGES.transpose(0, 3, 1, 2))).numpy()
    head = params["params"]["head"]
    ours = features(params, config) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    assert np.abs(ours - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert report.family == "torchvision"
