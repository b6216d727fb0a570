"""Checkpoints of AdaViT's released code: our model computes what that code does, which is written here in NumPy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from builders import tiny_config
from reference import gelu, in_float64, layer_norm
from safetensors.numpy import save_file
from scipy.special import expit, softmax

from headsteer_jax.config import Config, GateConfig, ModelConfig
from headsteer_jax.config.schema import TokenGateConfig
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.pretrained import load_backbone
from headsteer_jax.model.vit import build_model
from headsteer_jax.train.loop import init_params

D, H, L, P, GRID, CLASSES = 24, 3, 3, 2, 4, 7  # width, heads, blocks, patch, patches a side, classes
KINDS = ("heads", "sublayers", "tokens")
ADAVIT = GateConfig(kinds=KINDS, dropped="slice", tokens=TokenGateConfig(threshold=0.6))
Tensors = dict[str, np.ndarray]


def released_tensors(*, fused: bool = True, norm: bool = False, seed: int = 0) -> Tensors:
    """A small model's tensors under the names of MengLcool/AdaViT's `AdaStepT2T_ViT` without its T2T module."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, D), "pos_embed": (1, 1 + GRID**2, D), "patch_embed.proj.weight": (D, 1, P, P),
        "patch_embed.proj.bias": (D,), "norm.weight": (D,), "norm.bias": (D,), "head.weight": (CLASSES, D),
        "head.bias": (CLASSES,),
    }  # fmt: skip
    for layer in range(L):
        block: dict[str, tuple[int, ...]] = {
            "norm1.weight": (D,), "norm1.bias": (D,), "attn.proj.weight": (D, D), "attn.proj.bias": (D,),
            "norm2.weight": (D,), "norm2.bias": (D,), "mlp.fc1.weight": (4 * D, D), "mlp.fc1.bias": (4 * D,),
            "mlp.fc2.weight": (D, 4 * D), "mlp.fc2.bias": (D,),
            "attn.token_select.mlp_head.weight": (1, D), "attn.token_select.mlp_head.bias": (1,),
        }  # fmt: skip
        if fused:
            block |= {"attn.qkv.weight": (3 * D, D), "attn.qkv.bias": (3 * D,)}
        else:
            block |= {f"attn.{part}.weight": (D, D) for part in ("query", "key", "value")}
            block |= {f"attn.{part}.bias": (D,) for part in ("query", "key", "value")}
        if layer:  # keep_layers = 1
            block |= {"head_select.mlp_head.weight": (H, D), "head_select.mlp_head.bias": (H,)}
            block |= {"layer_select.mlp_head.weight": (2, D), "layer_select.mlp_head.bias": (2,)}
            block |= {"norm_policy.weight": (D,), "norm_policy.bias": (D,)} if norm else {}
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return {name: (0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def released_block(
    t: Tensors, b: str, x: np.ndarray, head_attn: bool, threshold: float
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`StepAdaBlock.forward` in evaluation, for one image [T, D], with ada_token_with_mlp."""

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ t[f"{b}.{name}.weight"].T + t[f"{b}.{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return layer_norm(x, {"scale": t[f"{b}.{name}.weight"], "bias": t[f"{b}.{name}.bias"]}, 1e-6)

    policy_token = norm(x[0], "norm_policy") if f"{b}.norm_policy.weight" in t else x[0]
    gates = {}
    head_select, sub_layer_select = np.ones(H), np.ones(2)
    if f"{b}.head_select.mlp_head.weight" in t:
        head_select = gates["heads"] = (expit(linear(policy_token, "head_select.mlp_head")) > 0.5).astype(float)
        sub_layer_select = gates["sublayers"] = (expit(linear(policy_token, "layer_select.mlp_head")) > 0.5) * 1.0
    width_select = np.ones(D) if head_attn else np.repeat(head_select, D // H)
    n = norm(x, "norm1")
    if f"{b}.attn.qkv.weight" in t:
        weights, biases = np.split(t[f"{b}.attn.qkv.weight"], 3), np.split(t[f"{b}.attn.qkv.bias"], 3)
    else:
        weights, biases = ([t[f"{b}.attn.{part}.{leaf}"] for part in ("query", "key", "value")]
                           for leaf in ("weight", "bias"))  # fmt: skip
    q, k, v = (
        (n @ (weight * width_select[:, None]).T + bias * width_select).reshape(len(x), H, -1).transpose(1, 0, 2)
        for weight, bias in zip(weights, biases, strict=True)
    )
    token_select = np.append(1.0, expit(linear(n[1:], "attn.token_select.mlp_head"))[:, 0] > threshold)
    gates["tokens"] = token_select[1:]
    policy, eye = np.outer(token_select, token_select), np.eye(len(x))
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(D // H)
    attn = softmax(scores * policy + np.where(1 - policy - eye > 0, -np.inf, 0.0), axis=-1)
    if head_attn:
        attn = attn * head_select[:, None, None] + eye * (1 - head_select[:, None, None])
    attended = (attn @ v).transpose(1, 0, 2).reshape(x.shape)
    attn_x = (attended @ (t[f"{b}.attn.proj.weight"] * width_select).T + t[f"{b}.attn.proj.bias"]) * token_select[
        :, None
    ]
    x = x + sub_layer_select[0] * attn_x
    hidden = norm(x, "norm2") @ (t[f"{b}.mlp.fc1.weight"] * width_select).T + t[f"{b}.mlp.fc1.bias"]
    mlp_x = linear(gelu(hidden, "exact"), "mlp.fc2")
    return x + sub_layer_select[1] * token_select[:, None] * mlp_x, gates


def released_logits(
    t: Tensors, image: np.ndarray, head_attn: bool, threshold: float
) -> tuple[np.ndarray, dict[int, dict[str, np.ndarray]]]:
    """`AdaStepT2T_ViT.forward` in evaluation, for one image."""
    patches = [image[r : r + P, c : c + P] for r in range(0, 8, P) for c in range(0, 8, P)]
    tokens = [np.einsum("hwc,Dchw->D", p, t["patch_embed.proj.weight"]) + t["patch_embed.proj.bias"] for p in patches]
    x = np.concatenate([t["cls_token"][0], tokens]) + t["pos_embed"][0]
    gates = {}
    for layer in range(L):
        x, gates[layer] = released_block(t, f"blocks.{layer}", x, head_attn, threshold)
    cls = layer_norm(x[0], {"scale": t["norm.weight"], "bias": t["norm.bias"]}, 1e-6)
    return cls @ t["head.weight"].T + t["head.bias"], gates


def config_for(path: Path, gate: GateConfig = ADAVIT) -> Config:
    model = ModelConfig(patch=P, depth=L, width=D, heads=H, pretrained=str(path), pretrained_head=True)
    return tiny_config().model_copy(update={"model": model, "gate": gate})


def save(path: Path, tensors: Tensors) -> Path:
    save_file(tensors, path)
    return path


def fresh_params(config: Config) -> Any:
    without = config.model.model_copy(update={"pretrained": ""})
    plain = config.model_copy(update={"model": without})
    return init_params(build_model(plain, CLASSES), plain, 0)


@pytest.mark.parametrize(
    ("fused", "norm", "head_attn", "threshold", "seed"),  # with these seeds every gate opens and closes
    [(True, False, False, 0.6, 17), (False, False, False, 0.5, 5), (True, True, True, 0.6, 7)],
    ids=["released", "split-0.5", "norm_policy-ada_head_attn"],
)
def test_logits_and_gates_are_the_released_codes(
    tmp_path: Path, images: np.ndarray, fused: bool, norm: bool, head_attn: bool, threshold: float, seed: int
) -> None:
    tensors = released_tensors(fused=fused, norm=norm, seed=seed)
    gate = ADAVIT.model_copy(
        update={
            "dropped": "identity" if head_attn else "slice",
            "layer_norm": norm,
            "tokens": TokenGateConfig(threshold=threshold),
        }
    )
    config = config_for(save(tmp_path / "a.safetensors", tensors), gate)
    params, report = load_backbone(fresh_params(config), config)
    assert report.family == "AdaViT"
    assert report.random == report.ignored == []
    assert set(report.loaded) == set(tensors)
    model = build_model(config, CLASSES)
    logits, out = jax.jit(lambda p: model.apply(p, images))(params)
    t = in_float64(tensors)
    decided: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for i, image in enumerate(images):
        wanted, gates = released_logits(t, image, head_attn, threshold)
        for layer, by_kind in gates.items():
            assert out["gates"][layer].keys() == by_kind.keys()
            for kind, g in by_kind.items():
                np.testing.assert_array_equal(out["gates"][layer][kind][i], g)
                decided[kind].append(g)
        np.testing.assert_allclose(logits[i], wanted, rtol=2e-5, atol=2e-5)
    for gates in decided.values():
        assert 0.2 < np.mean(gates) < 0.8


def test_the_threshold_of_patches_matters(images: np.ndarray) -> None:
    """Otherwise the test above would not tell 0.5 from 0.6."""
    t = in_float64(released_tensors())
    assert any(
        (released_logits(t, image, False, 0.5)[1][0]["tokens"] != released_logits(t, image, False, 0.6)[1][0]["tokens"])
        .any() for image in images
    )  # fmt: skip


def test_gates_that_the_config_does_not_have_are_left_out(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", released_tensors())
    config = config_for(path, GateConfig(dropped="slice"))
    params, report = load_backbone(fresh_params(config), config)
    assert {name.split(".")[2] for name in report.ignored} == {"layer_select", "attn"}
    assert "leaves out its gates of sublayers, tokens" in str(report)
    assert params["params"]["layers_1"].keys() >= {"decide"}
    assert "decide_tokens" not in params["params"]["layers_1"]


def test_gates_that_the_file_does_not_have_stay_random(tmp_path: Path) -> None:
    tensors = {name: value for name, value in released_tensors().items() if "layer_select" not in name}
    config = config_for(save(tmp_path / "a.safetensors", tensors))
    _, report = load_backbone(fresh_params(config), config)
    assert {name.split(".")[1] for name in report.random} == {"decide_sublayers"}


def test_other_settings_than_the_released_codes_are_said(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", released_tensors())
    gate = GateConfig(kinds=KINDS, threshold=0.4, tokens=TokenGateConfig(normalise=False))
    _, report = load_backbone(fresh_params(config_for(path, gate)), config_for(path, gate))
    fields = [warning.partition("trained for gate.")[2].partition(" =")[0] for warning in report.comparison.warnings]
    assert fields == ["dropped", "threshold", "tokens.threshold", "tokens.normalise"]


def _rename(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def _drop(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "gate", "parts"),
    [
        (
            _rename("head_select.mlp_head", "head_select.fc"), ADAVIT,
            ["'blocks.1.head_select.fc.bias'", "another form than those of AdaViT's released code"],
        ),
        (
            _rename("blocks.1.layer_select", "layer_select"), ADAVIT,
            ["'layer_select.mlp_head.bias'", "another form"],
        ),
        (_drop("blocks.1.head_select"), ADAVIT, ["heads are in the layers 2", "set config.gate.first_layer=2"]),
        (
            _drop("nothing"), ADAVIT.model_copy(update={"tokens": TokenGateConfig(first_layer=1)}),
            ["gates of tokens are in the layers 0, 1, 2", "set config.gate.tokens.first_layer=0"],
        ),
        (_drop("nothing"), ADAVIT.model_copy(update={"layer_norm": True}), ["set config.gate.layer_norm=false"]),
        (_drop("blocks.2.attn.token_select.mlp_head.bias"), ADAVIT, ["no tensor 'blocks.2.attn.token_select"]),
        (_rename("patch_embed.", "tokens_to_token."), ADAVIT, ["this is T2T-ViT"]),
    ],
)  # fmt: skip
def test_gates_of_another_form_are_refused(
    tmp_path: Path, change: Callable[[Tensors], Tensors], gate: GateConfig, parts: list[str]
) -> None:
    config = config_for(save(tmp_path / "a.safetensors", change(released_tensors())), gate)
    with pytest.raises(HeadSteerError) as error:
        load_backbone({"params": {"head": {"bias": np.zeros(CLASSES)}}}, config)
    assert "\n" not in str(error.value)
    for part in ["a.safetensors", *parts]:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"ada_head_attn": True}, "trained for gate.dropped = identity"), ({"ada_head_v2": True}, "ada_head_v2")],
)
def test_a_training_scripts_arguments_count(tmp_path: Path, arguments: dict[str, Any], says: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensors = {f"module.{name}": torch.tensor(value) for name, value in released_tensors().items()}
    torch.save({"state_dict_ema": tensors, "args": arguments}, tmp_path / "a.pth")
    config = config_for(tmp_path / "a.pth")
    if "ada_head_v2" in arguments:
        with pytest.raises(HeadSteerError, match=says):
            load_backbone({"params": {"head": {"bias": np.zeros(CLASSES)}}}, config)
    else:
        _, report = load_backbone(fresh_params(config), config)
        assert any(says in warning for warning in report.comparison.warnings)
