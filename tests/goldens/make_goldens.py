"""Make tests/goldens: small models of timm and Hugging Face, and their outputs.

Run it in a separate environment, and only when a layout is added:
    python3 -m venv /tmp/peers && /tmp/peers/bin/pip install timm transformers
    /tmp/peers/bin/python tests/goldens/make_goldens.py
"""

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

HERE = Path(__file__).parent
D, H, L, P, SIDE, CLASSES = 12, 3, 2, 4, 8, 7
IMAGES = torch.tensor(np.random.default_rng(0).standard_normal((3, 3, SIDE, SIDE)), dtype=torch.float32)


def jittered(model: Any) -> Any:
    """Give every parameter random values of ordinary size, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if parameter.ndim == 1 and ("norm" in name and "weight" in name) else 0.0
            parameter.copy_(mean + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def keep(name: str, model: Any, features: torch.Tensor, logits: torch.Tensor | None, **extra: Any) -> None:
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, HERE / f"{name}.safetensors")
    outputs[name] = features.detach().numpy()
    if logits is not None:
        outputs[f"{name}_logits"] = logits.detach().numpy()


HERE.mkdir(exist_ok=True)
outputs: dict[str, np.ndarray] = {"images": IMAGES.numpy().transpose(0, 2, 3, 1)}
shape: dict[str, Any] = {
    "img_size": SIDE, "patch_size": P, "embed_dim": D, "depth": L, "num_heads": H, "num_classes": CLASSES,
}  # fmt: skip
for name, extra in (
    ("timm_vit", {}),
    ("timm_dinov2", {"init_values": 1.0}),
    ("timm_reg", {"init_values": 1.0, "reg_tokens": 2, "no_embed_class": True}),
):
    model = jittered(VisionTransformer(**shape, **extra))
    keep(name, model, model.forward_features(IMAGES)[:, 0], model(IMAGES))

# the original JAX names, as timm itself reads them
rng = np.random.default_rng(1)
npz: dict[str, np.ndarray] = {}


def put(name: str, *size: int) -> None:
    npz[name] = (0.3 * rng.standard_normal(size) + (1.0 if name.endswith("scale") else 0.0)).astype(np.float32)


put("cls", 1, 1, D)
put("embedding/kernel", P, P, 3, D)
put("embedding/bias", D)
put("Transformer/posembed_input/pos_embedding", 1, 1 + (SIDE // P) ** 2, D)
put("head/kernel", D, CLASSES)
put("head/bias", CLASSES)
for module in (
    "Transformer/encoder_norm",
    *(f"Transformer/encoderblock_{i}/LayerNorm_{j}" for i in range(L) for j in (0, 2)),
):
    put(f"{module}/scale", D)
    put(f"{module}/bias", D)
for i in range(L):
    block = f"Transformer/encoderblock_{i}"
    for part in ("query", "key", "value"):
        put(f"{block}/MultiHeadDotProductAttention_1/{part}/kernel", D, H, D // H)
        put(f"{block}/MultiHeadDotProductAttention_1/{part}/bias", H, D // H)
    put(f"{block}/MultiHeadDotProductAttention_1/out/kernel", H, D // H, D)
    put(f"{block}/MultiHeadDotProductAttention_1/out/bias", D)
    put(f"{block}/MlpBlock_3/Dense_0/kernel", D, 4 * D)
    put(f"{block}/MlpBlock_3/Dense_0/bias", 4 * D)
    put(f"{block}/MlpBlock_3/Dense_1/kernel", 4 * D, D)
    put(f"{block}/MlpBlock_3/Dense_1/bias", D)
np.savez(HERE / "augreg.npz", **npz)
model = VisionTransformer(**shape).eval()
model.load_pretrained(str(HERE / "augreg.npz"))
outputs["augreg"] = model.forward_features(IMAGES)[:, 0].detach().numpy()
outputs["augreg_logits"] = model(IMAGES).detach().numpy()

common: dict[str, Any] = {
    "hidden_size": D, "num_attention_heads": H, "num_hidden_layers": L, "image_size": SIDE, "patch_size": P,
    "layer_norm_eps": 1e-6,
}  # fmt: skip
vit = transformers.ViTConfig(**common, intermediate_size=4 * D, num_labels=CLASSES)
with_registers = transformers.Dinov2WithRegistersConfig(**common, num_register_tokens=2)
for name, config, kind in (
    ("hf_vit", vit, transformers.ViTModel),
    ("hf_dinov2", transformers.Dinov2Config(**common), transformers.Dinov2Model),
    ("hf_reg", with_registers, transformers.Dinov2WithRegistersModel),
    ("hf_classifier", vit, transformers.ViTForImageClassification),
):
    model = jittered(kind(config))
    base = model.vit if name == "hf_classifier" else model
    model.save_pretrained(HERE / name)  # under the names that files have, which are not those of state_dict
    (HERE / name / "model.safetensors").rename(HERE / f"{name}.safetensors")
    (HERE / name / "config.json").unlink()
    (HERE / name).rmdir()
    outputs[name] = base(IMAGES).last_hidden_state[:, 0].detach().numpy()
    if name == "hf_classifier":
        outputs[f"{name}_logits"] = model(IMAGES).logits.detach().numpy()
np.savez(HERE / "outputs.npz", **outputs)
print(f"timm {timm.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
