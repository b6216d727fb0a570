"""The published sizes against timm itself, at 224 pixels: in an environment that has timm, `pytest -m slow`.

CI has the small goldens that timm and transformers made (test_pretrained); this is the same at full size.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from headsteer_jax.config import Config, DataConfig, ModelConfig
from headsteer_jax.model.pretrained import timm_tensors
from headsteer_jax.model.vit import build_model
from headsteer_jax.train.loop import init_params

LAYOUTS = {
    "vit_tiny_patch16_224": ("Ti", 16, 0),
    "vit_small_patch16_224": ("S", 16, 0),
    "vit_base_patch16_224": ("B", 16, 0),
    "deit_small_patch16_224": ("S", 16, 0),
    "vit_small_patch14_dinov2": ("S", 14, 0),
    "vit_small_patch14_reg4_dinov2": ("S", 14, 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_features_equal_timms(tmp_path: Path, name: str) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    import torch
    from safetensors.torch import save_file
    from timm.models.vision_transformer import VisionTransformer

    size, patch, registers = LAYOUTS[name]
    wanted: Any = timm.create_model(name, pretrained=False, img_size=224).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in wanted.parameters():  # biases, tokens and scales that start at 0 or 1 must not hide a mistake
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_file({key: value.contiguous() for key, value in wanted.state_dict().items()}, tmp_path / "a.safetensors")
    images = np.random.default_rng(0).standard_normal((4, 224, 224, 3)).astype(np.float32)
    with torch.no_grad():
        features = wanted.forward_features(torch.tensor(images.transpose(0, 3, 1, 2)))[:, 0].numpy()
    config = Config(
        data=DataConfig(image_size=224, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3),
        model=ModelConfig.of_size(size, patch=patch, registers=registers, pretrained=str(tmp_path / "a.safetensors")),
    )
    model = build_model(config, 5)
    params = init_params(model, config, 0)
    ours = jax.jit(
        lambda params, x: model.apply(
            params, x, method=lambda m, x: m.norm(m.blocks(m.embed(x), gating="dense")[0][:, 0])
        )
    )(params, images)
    error = np.abs(ours - features).max() / np.abs(features).max()
    print(f"{name}: largest difference over largest feature {error:.2e}")
    assert error <= 1e-5

    # and back: timm loads what we export, LayerScale folded, and answers as our model does
    again = VisionTransformer(
        img_size=224, patch_size=patch, embed_dim=config.model.width, num_heads=config.model.heads, num_classes=5,
        reg_tokens=registers, no_embed_class=registers > 0,
    ).eval()  # fmt: skip
    again.load_state_dict({key: torch.tensor(value) for key, value in timm_tensors(params).items()})
    logits, _ = model.apply(params, images, gating="dense")
    with torch.no_grad():
        theirs = again(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    assert np.abs(logits - theirs).max() <= 1e-5 * np.abs(theirs).max()
