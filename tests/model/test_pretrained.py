"""Pretrained backbones: the loaded model computes the same as timm's, which is written here in NumPy float64."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from builders import tiny_config
from helpers import GOLDENS, ROOT, SHARED
from PIL import Image
from reference import gelu, in_float64, layer_norm
from safetensors.numpy import load_file, save_file
from scipy.special import softmax

from headsteer_jax.config import Config, ModelConfig
from headsteer_jax.config.files import load_config
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.pretrained import load_backbone, resample_patches, resample_positions
from headsteer_jax.model.pretrained import timm_tensors as timm_export
from headsteer_jax.model.vit import build_model
from headsteer_jax.train.loop import init_params

CHECKPOINT = SHARED / "weights" / "vit_small_patch14.safetensors"
D, H, L, P, GRID = 24, 3, 2, 4, 2  # width, heads, blocks, patch, positions a side


def timm_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """A small vision transformer's tensors under timm's names, with LayerScale."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, D), "pos_embed": (1, 1 + GRID**2, D), "mask_token": (1, D),
        "patch_embed.proj.weight": (D, 1, P, P), "patch_embed.proj.bias": (D,),
        "norm.weight": (D,), "norm.bias": (D,), "head.weight": (7, D), "head.bias": (7,),
    }  # fmt: skip
    for layer in range(L):
        block = {
            "norm1.weight": (D,), "norm1.bias": (D,), "attn.qkv.weight": (3 * D, D), "attn.qkv.bias": (3 * D,),
            "attn.proj.weight": (D, D), "attn.proj.bias": (D,), "ls1.gamma": (D,),
            "norm2.weight": (D,), "norm2.bias": (D,), "mlp.fc1.weight": (4 * D, D), "mlp.fc1.bias": (4 * D,),
            "mlp.fc2.weight": (D, 4 * D), "mlp.fc2.bias": (D,), "ls2.gamma": (D,),
        }  # fmt: skip
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return {name: (0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def timm_features(t: dict[str, np.ndarray], tokens_TD: np.ndarray, heads: int) -> np.ndarray:
    """timm's VisionTransformer from the embedded tokens [T, D] of one image to the normalised CLS token [D]."""

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return layer_norm(x, {"scale": t[f"{name}.weight"], "bias": t[f"{name}.bias"]}, 1e-6)

    x, layer = tokens_TD, 0
    while f"blocks.{layer}.norm1.weight" in t:
        b = f"blocks.{layer}"
        qkv = linear(norm(x, f"{b}.norm1"), f"{b}.attn.qkv").reshape(len(x), 3, heads, -1)  # T, (q k v), H, K
        q, k, v = qkv.transpose(1, 2, 0, 3)
        attended = softmax(q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]), axis=-1) @ v  # H, T, K
        attended = attended.transpose(1, 0, 2).reshape(x.shape)
        x = x + t.get(f"{b}.ls1.gamma", 1) * linear(attended, f"{b}.attn.proj")
        hidden = gelu(linear(norm(x, f"{b}.norm2"), f"{b}.mlp.fc1"), "exact")
        x = x + t.get(f"{b}.ls2.gamma", 1) * linear(hidden, f"{b}.mlp.fc2")
        layer += 1
    return norm(x, "norm")[0]


def config_for(path: Path | str, **model: Any) -> Config:
    base = tiny_config()
    fields: dict[str, Any] = {"patch": P, "depth": L, "width": D, "heads": H, "pretrained": str(path)} | model
    return base.model_copy(update={"model": ModelConfig(**fields)})


def save(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    save_file(tensors, path)
    return path


def features(params: Any, config: Config, images: np.ndarray) -> np.ndarray:
    """[B, D] normalised CLS tokens of our model with all heads on."""

    def run(m: Any, images: Any) -> Any:
        return m.norm(m.blocks(m.embed(images), gating="dense")[0][:, 0])

    return np.asarray(jax.jit(lambda p: build_model(config, 5).apply(p, images, method=run))(params))


@pytest.mark.parametrize("scaled", [True, False], ids=["LayerScale", "plain"])
def test_features_are_timms(tmp_path: Path, images: np.ndarray, scaled: bool) -> None:
    tensors = {name: value for name, value in timm_tensors().items() if scaled or "gamma" not in name}
    config = config_for(save(tmp_path / "a.safetensors", tensors))
    params = init_params(build_model(config, 5), config, 0)
    t = in_float64(tensors)
    for image, ours in zip(images, features(params, config, images), strict=True):
        patches = [image[r : r + P, c : c + P] for r in range(0, 8, P) for c in range(0, 8, P)]
        kernel = t["patch_embed.proj.weight"]
        tokens = [np.einsum("hwc,Dchw->D", patch, kernel) + t["patch_embed.proj.bias"] for patch in patches]
        tokens_TD = np.concatenate([t["cls_token"][0], tokens]) + t["pos_embed"][0]
        np.testing.assert_allclose(ours, timm_features(t, tokens_TD, H), rtol=2e-5, atol=2e-5)


def test_report_says_what_became_of_every_tensor(tmp_path: Path) -> None:
    tensors = timm_tensors()
    config = config_for(save(tmp_path / "a.safetensors", tensors), patch=2)
    before = init_params(build_model(config, 5), config_for("", patch=2), 0)
    params, report = load_backbone(before, config)
    assert set(report.loaded) | set(report.ignored) == set(tensors)
    assert sorted(report.ignored) == ["head.bias", "head.weight", "mask_token"]
    assert report.resampled == ["patch_embed.proj.weight", "pos_embed"]
    assert report.folded == [f"blocks.{layer}.ls{i}.gamma" for layer in range(L) for i in (1, 2)]
    assert sorted(report.random) == [
        "head.bias", "head.kernel", "layers_1.decide.linear.bias", "layers_1.decide.linear.kernel",
    ]  # fmt: skip
    for name in ("head", "layers_1"):
        kept = (before["params"][name], params["params"][name])
        own = [tree if name == "head" else tree["decide"]["linear"] for tree in kept]
        np.testing.assert_array_equal(own[0]["kernel"], own[1]["kernel"])
    assert "left random 4" in str(report)
    assert "\n" not in str(report)


@pytest.mark.parametrize("grid", [2, 4, 9])
def test_positions_are_resized_as_pillow_resizes(grid: int) -> None:
    positions = np.random.default_rng(1).standard_normal((1, 36, 3)).astype(np.float32)
    ours = resample_positions(positions, grid)
    for channel in range(3):
        plane = Image.fromarray(positions[0, :, channel].reshape(6, 6))
        wanted = np.asarray(plane.resize((grid, grid), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(ours[0, :, channel].reshape(grid, grid), wanted, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(4, 7), (6, 6), (7, 4)])
def test_patch_kernels_answer_as_before_on_resized_patches(old: int, new: int) -> None:
    """FlexiViT, eq. 4: exact for larger patches; for smaller ones as near as any kernel can be."""
    rng = np.random.default_rng(2)
    kernel = rng.standard_normal((old, old, 2, 5)).astype(np.float32)
    ours = resample_patches(kernel, new)
    pixels = np.eye(old * old, dtype=np.float32).reshape(-1, old, old)  # answers are linear in the patch
    resized = np.stack([np.asarray(Image.fromarray(p).resize((new, new), Image.Resampling.BICUBIC)) for p in pixels])
    error = np.einsum("nhw,hwcD->ncD", resized, ours) - np.einsum("nhw,hwcD->ncD", pixels, kernel)
    if new >= old:
        np.testing.assert_allclose(error, 0, atol=2e-4)
    else:  # a least-squares error is orthogonal to all that a kernel can do
        assert np.abs(error).max() > 0.1
        np.testing.assert_allclose(np.einsum("nhw,ncD->hwcD", resized, error), 0, atol=2e-5)


@pytest.fixture(scope="module")
def fresh() -> Any:
    """Variables before anything is loaded."""
    config = config_for("")
    return init_params(build_model(config, 5), config, 0)


def _without(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.__delitem__(name)


def _with(name: str, value: np.ndarray) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (_without("blocks.1.attn.proj.bias"), ["no tensor 'blocks.1.attn.proj.bias'"]),
        (_without("cls_token"), ["no tensor 'cls_token'"]),
        (_with("reg_token", np.zeros((1, 4, D), np.float32)), ["4 register tokens", "config.model.registers = 0"]),
        (
            _with("dist_token", np.zeros((1, 1, D), np.float32)),
            ["1 distillation token, ", "config.model.registers = 0"],
        ),
        (
            _without("patch_embed.proj.weight"),
            ["no vision transformer under the names of", "'blocks.0.attn.proj.bias'"],
        ),
        (_with("blocks.2.norm1.bias", np.zeros(D, np.float32)), ["3 blocks", "config.model.depth = 2"]),
        (_with("norm.weight", np.zeros(D + 1, np.float32)), ["'norm.weight'", "[25]", "not [24]"]),
        (_with("patch_embed.proj.weight", np.zeros((D, 3, P, P), np.float32)), ["[24, 3, 4, 4]", "data.channels"]),
        (_with("patch_embed.proj.weight", np.zeros((D, 1, P, 5), np.float32)), ["not square"]),
        (_with("pos_embed", np.zeros((1, 7, D), np.float32)), ["'pos_embed'", "7 positions"]),
        (_with("norm.bias", np.full(D, np.nan, np.float32)), ["'norm.bias' holds NaN"]),
    ],
)
def test_bad_tensors_are_named(
    tmp_path: Path, spoil: Callable[[dict[str, np.ndarray]], None], parts: list[str], fresh: Any
) -> None:
    tensors = timm_tensors()
    spoil(tensors)
    config = config_for(save(tmp_path / "a.safetensors", tensors))
    with pytest.raises(HeadSteerError) as error:
        load_backbone(fresh, config)
    assert "\n" not in str(error.value)
    for part in ["a.safetensors", *parts]:
        assert part in str(error.value)


@pytest.mark.parametrize("kept", [0, 5, 4000, -1])
def test_a_truncated_file_is_one_clear_line(tmp_path: Path, kept: int, fresh: Any) -> None:
    path = save(tmp_path / "a.safetensors", timm_tensors())
    path.write_bytes(path.read_bytes()[:kept])
    config = config_for(path)
    with pytest.raises(HeadSteerError, match=r"a\.safetensors: truncated or not a \.safetensors file") as error:
        load_backbone(fresh, config)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path, fresh: Any) -> None:
    config = config_for(tmp_path / "none.safetensors")
    with pytest.raises(HeadSteerError, match=r"none\.safetensors: no such file"):
        load_backbone(fresh, config)


def test_hub_without_its_extra(monkeypatch: pytest.MonkeyPatch, fresh: Any) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    config = config_for("hf://owner/model")
    with pytest.raises(HeadSteerError, match=r"hf://owner/model: needs the extra hub"):
        load_backbone(fresh, config)


def test_hub_downloads_once_and_says_when_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: Any
) -> None:
    path = save(tmp_path / "a.safetensors", timm_tensors())
    asked = []

    class Hub:
        @staticmethod
        def hf_hub_download(repository: str, file: str) -> str:
            asked.append((repository, file))
            if repository == "owner/offline":
                raise ConnectionError("no route\nto host")
            return str(path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    config = config_for("hf://owner/model")
    load_backbone(fresh, config)
    assert [file for _, file in asked] == ["model.safetensors", "config.json", "preprocessor_config.json"]
    config = config_for("hf://owner/offline")
    with pytest.raises(HeadSteerError, match=r"hf://owner/offline: cannot be downloaded .*no route\)") as error:
        load_backbone(fresh, config)
    assert "\n" not in str(error.value)


# GOLDENS were made by timm and transformers themselves: goldens/make_goldens.py
ANSWERS = dict(np.load(GOLDENS / "outputs.npz"))


def golden_config(file: str, **model: Any) -> Config:
    data = tiny_config().data.model_copy(update={"image_size": 8, "channels": 3, "mean": (0.0,) * 3, "std": (1.0,) * 3})
    config = config_for(GOLDENS / file, width=12, registers=2 if "_reg." in file else 0, **model)
    return config.model_copy(update={"data": data})


@pytest.mark.parametrize(
    ("file", "family"),
    [
        ("timm_vit.safetensors", "timm"),
        ("timm_dinov2.safetensors", "timm"),
        ("timm_reg.safetensors", "timm"),
        ("augreg.npz", "google-research/vision_transformer"),
        ("hf_vit.safetensors", "Hugging Face ViTModel"),
        ("hf_classifier.safetensors", "Hugging Face ViTModel"),
        ("hf_dinov2.safetensors", "Hugging Face Dinov2Model"),
        ("hf_reg.safetensors", "Hugging Face Dinov2Model"),
    ],
)
def test_features_and_logits_are_the_publishers(file: str, family: str) -> None:
    name = file.partition(".")[0]
    has_head = f"{name}_logits" in ANSWERS
    config = golden_config(file, pretrained_head=has_head)
    model = build_model(config, 7)
    params, report = load_backbone(init_params(model, config_without(config), 0), config)
    assert report.family == family
    wanted = ANSWERS[name]
    assert np.abs(features(params, config, ANSWERS["images"]) - wanted).max() <= 2e-6 * np.abs(wanted).max()
    assert ("head.kernel" in report.random) != has_head
    if has_head:
        logits, _ = jax.jit(lambda p: model.apply(p, ANSWERS["images"], gating="dense"))(params)
        wanted = ANSWERS[f"{name}_logits"]
        assert np.abs(logits - wanted).max() <= 2e-6 * np.abs(wanted).max()
    unknown = [random for random in report.random if not random.startswith("head") and "decide" not in random]
    assert unknown == []


@pytest.mark.parametrize("file", ["timm_vit.safetensors", "timm_reg.safetensors", "augreg.npz"])
def test_what_leaves_under_timms_names_is_what_came(tmp_path: Path, file: str) -> None:
    config = golden_config(file, pretrained_head=True)
    params = init_params(build_model(config, 7), config, 0)
    out = save(tmp_path / "out.safetensors", timm_export(params))
    again = config.model_copy(update={"model": config.model.model_copy(update={"pretrained": str(out)})})
    back, report = load_backbone(init_params(build_model(config, 7), config_without(config), 1), again)
    assert report.ignored == report.folded == report.resampled == []
    np.testing.assert_allclose(
        features(back, config, ANSWERS["images"]), features(params, config, ANSWERS["images"]), rtol=0, atol=1e-6
    )
    if file == "timm_vit.safetensors":  # no LayerScale to fold: the very tensors
        original = load_file(GOLDENS / file)
        assert original.keys() == load_file(out).keys()
        for name, tensor in load_file(out).items():
            np.testing.assert_array_equal(tensor, original[name])


def test_a_kept_head_must_fit() -> None:
    config = golden_config("timm_vit.safetensors", pretrained_head=True)
    with pytest.raises(HeadSteerError, match=r"'head\.weight' has the shape \[7, 12\], not \[5, 12\]"):
        load_backbone(init_params(build_model(config, 5), config_without(config), 0), config)


def test_a_prefix_is_seen_through(tmp_path: Path) -> None:
    """DataParallel's `module.`, for one."""
    tensors = {f"module.{name}": value for name, value in load_file(GOLDENS / "timm_vit.safetensors").items()}
    config = golden_config(str(save(tmp_path / "a.safetensors", tensors)))
    params = init_params(build_model(config, 5), config, 0)
    wanted = ANSWERS["timm_vit"]
    assert np.abs(features(params, config, ANSWERS["images"]) - wanted).max() <= 2e-6 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.npz", b"no zip", "truncated or not a .npz file"),
        ("a.npz", (GOLDENS / "augreg.npz").read_bytes()[:9000], "truncated or not a .npz file"),
        ("a.npz", (GOLDENS / "timm_vit.safetensors").read_bytes(), "truncated or not a .npz file"),
        ("a.safetensors", (GOLDENS / "augreg.npz").read_bytes(), "truncated or not a .safetensors file"),
        ("a.onnx", b"", "must be a file that ends in .safetensors, .npz, .pth, .pt, .bin, .ckpt"),
    ],
)
def test_a_file_that_is_not_what_it_says(tmp_path: Path, name: str, content: bytes, says: str, fresh: Any) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HeadSteerError) as error:
        load_backbone(fresh, config_for(tmp_path / name))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_npz_of_pickles_is_refused(tmp_path: Path, fresh: Any) -> None:
    np.savez(tmp_path / "a.npz", cls=np.array([object()]))
    with pytest.raises(HeadSteerError, match=r"truncated or not a \.npz file"):
        load_backbone(fresh, config_for(tmp_path / "a.npz"))


def test_pth_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: Any) -> None:
    (tmp_path / "a.pth").write_bytes(b"PK")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(HeadSteerError, match=r"a\.pth: a \.pth file needs the extra torch"):
        load_backbone(fresh, config_for(tmp_path / "a.pth"))


@pytest.mark.parametrize("wrapped", [None, "model", "state_dict"])
def test_pth(tmp_path: Path, wrapped: str | None) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensors = {name: torch.tensor(value) for name, value in load_file(GOLDENS / "timm_vit.safetensors").items()}
    torch.save({wrapped: tensors, "epoch": 3} if wrapped else tensors, tmp_path / "a.pth")
    config = golden_config(str(tmp_path / "a.pth"))
    params = init_params(build_model(config, 5), config, 0)
    wanted = ANSWERS["timm_vit"]
    assert np.abs(features(params, config, ANSWERS["images"]) - wanted).max() <= 2e-6 * np.abs(wanted).max()


def test_pth_executes_nothing(tmp_path: Path, fresh: Any) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")

    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"model": Trap()}, tmp_path / "a.pth")
    with pytest.raises(HeadSteerError, match="holds more than tensors and plain data"):
        load_backbone(fresh, config_for(tmp_path / "a.pth"))
    assert not (tmp_path / "executed").exists()
    (tmp_path / "b.pth").write_bytes(b"no torch file")
    with pytest.raises(HeadSteerError):
        load_backbone(fresh, config_for(tmp_path / "b.pth"))
    torch.save([1, 2], tmp_path / "c.pth")
    with pytest.raises(HeadSteerError, match="no state_dict"):
        load_backbone(fresh, config_for(tmp_path / "c.pth"))


@pytest.mark.slow
@pytest.mark.skipif(not CHECKPOINT.exists(), reason=f"{CHECKPOINT} is not there")
def test_a_real_checkpoint() -> None:
    """DINOv2's layout: LayerScale, 37x37 positions, 14x14 patches; ours has 4x4 positions and 8x8 patches."""
    config = load_config(ROOT / "configs" / "tiny_imagenet100_vit_s.py", {"model.pretrained": str(CHECKPOINT)})
    model = build_model(config, 5)
    params, report = load_backbone(init_params(model, config_without(config), 0), config)
    tensors = {name: np.asarray(value, np.float64) for name, value in load_file(CHECKPOINT).items()}
    assert set(report.loaded) | set(report.ignored) == set(tensors)
    assert len(report.folded) == 2 * 12
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    tokens_BTD = np.asarray(model.apply(params, images, method="embed"), np.float64)
    for tokens_TD, ours in zip(tokens_BTD, features(params, config, images), strict=True):
        wanted = timm_features(tensors, tokens_TD, 6)
        np.testing.assert_allclose(ours, wanted, atol=1e-4 * np.abs(wanted).max())


def config_without(config: Config) -> Config:
    """The same, from scratch."""
    return config.model_copy(update={"model": config.model.model_copy(update={"pretrained": ""})})
