"""Write tests/goldens/saelens* and so on: small autoencoders of other libraries, with their outputs.

Run it in an environment with the library, only when a case is added:
    python3 -m venv /tmp/saelens && /tmp/saelens/bin/pip install sae-lens
    /tmp/saelens/bin/python tests/goldens/make_sae_goldens.py saelens
    python3 -m venv /tmp/overcomplete && /tmp/overcomplete/bin/pip install overcomplete 'matplotlib<3.9' safetensors
    /tmp/overcomplete/bin/python tests/goldens/make_sae_goldens.py overcomplete
    python3 -m venv /tmp/others && /tmp/others/bin/pip install torch einops natsort simple-parsing safetensors \\
        tqdm huggingface-hub && /tmp/others/bin/pip install --no-deps dictionary-learning eai-sparsify
    /tmp/others/bin/python tests/goldens/make_sae_goldens.py dictionary_learning
    /tmp/others/bin/python tests/goldens/make_sae_goldens.py sparsify

With two more arguments it runs a file that HeadSteer exported: `saelens DIRECTORY ARRAYS.npz` adds z and x_hat to x.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
D, F, K = 8, 24, 3
X = torch.tensor(np.random.default_rng(0).standard_normal((5, D)) + 0.5, dtype=torch.float32)


def jitter(model: torch.nn.Module, **means: float) -> Any:
    """Give every parameter an ordinary size, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = next((value for end, value in means.items() if name.endswith(end)), 0.0)
            parameter.copy_(mean + 0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def compute_outputs(sae: Any, x: torch.Tensor, latents: Any) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        z = latents(sae.encode(x))
        return z.numpy(), sae.decode(z).numpy()


def run_saelens(path: Path, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    from sae_lens import SAE

    return compute_outputs(SAE.load_from_disk(path), x, lambda z: z)


def run_overcomplete(path: Path, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The lines of headsteer_jax.sae.interchange.overcomplete.export_overcomplete's docstring."""
    import overcomplete.sae
    import safetensors

    metadata = json.loads(safetensors.safe_open(path, "pt").metadata()["overcomplete"])
    sae = getattr(overcomplete.sae, metadata["class"])(**metadata["arguments"])
    sae.load_state_dict(load_file(path))
    sae.running_threshold = metadata.get("running_threshold")
    sae.eval()
    return compute_outputs(sae, x, lambda pair: pair[1])


def make_saelens(outputs: dict[str, np.ndarray]) -> str:
    import sae_lens as s

    common: dict[str, Any] = {"d_in": D, "d_sae": F}
    batch: dict[str, Any] = {"k": float(K), **common}
    matryoshka = {"matryoshka_widths": [6, F], **batch}

    def store_outputs(name: str, path: Path) -> None:
        outputs[f"{name}_z"], outputs[f"{name}_x_hat"] = run_saelens(path, X)

    for name, sae in {
        "standard": s.StandardSAE(s.StandardSAEConfig(**common)),
        "gated": s.GatedSAE(s.GatedSAEConfig(**common)),
        "uncentred": s.StandardSAE(s.StandardSAEConfig(**common, apply_b_dec_to_input=False)),
        "topk": s.TopKSAE(s.TopKSAEConfig(**common, k=K)),
        "topk_rescaled": s.TopKSAE(s.TopKSAEConfig(**common, k=K, rescale_acts_by_decoder_norm=True)),
        "jumprelu": s.JumpReLUSAE(s.JumpReLUSAEConfig(**common)),
        "bfloat16": s.JumpReLUSAE(s.JumpReLUSAEConfig(**common, dtype="bfloat16")),
    }.items():
        path = HERE / f"saelens_{name}"
        jitter(sae, threshold=1.0).save_model(path)
        if name == "bfloat16":  # its weights are bfloat16, its arithmetic is not
            wide = s.SAE.load_from_disk(path, dtype="float32")
            outputs[f"{name}_z"], outputs[f"{name}_x_hat"] = compute_outputs(wide, X, lambda z: z)
        else:
            store_outputs(name, path)

    for name, training in {
        "batchtopk": s.BatchTopKTrainingSAE(s.BatchTopKTrainingSAEConfig(**batch)),
        "batchtopk_raw": s.BatchTopKTrainingSAE(
            s.BatchTopKTrainingSAEConfig(**batch, rescale_acts_by_decoder_norm=False)
        ),
        "matryoshka": s.MatryoshkaBatchTopKTrainingSAE(s.MatryoshkaBatchTopKTrainingSAEConfig(**matryoshka)),
    }.items():
        jitter(training)
        training.topk_threshold.fill_(1.25)
        path = HERE / f"saelens_{name}"
        training.save_inference_model(path)
        store_outputs(name, path)
        training.save_model(HERE / f"saelens_{name}_training")  # the same, before it is turned into JumpReLU

    for name, sae, extra in (  # as before 6.0
        ("old_standard", s.StandardSAE(s.StandardSAEConfig(**common)), {}),
        ("old_topk", s.TopKSAE(s.TopKSAEConfig(**common, k=K)),
         {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}),
    ):  # fmt: skip
        path = HERE / f"saelens_{name}"
        jitter(sae).save_model(path)
        old = {"hook_point": "blocks.0.hook_resid_pre", "dtype": "float32", "normalize_activations": False, **common}
        (path / "cfg.json").write_text(json.dumps(old | extra))
        store_outputs(name, path)
    return f"sae_lens {s.__version__}"


def make_overcomplete(outputs: dict[str, np.ndarray]) -> str:
    import importlib.metadata

    from overcomplete.sae import SAE, BatchTopKSAE, JumpSAE, TopKSAE

    def dictionary(normalization: str, multiplier: bool = False) -> dict[str, Any]:
        return {"dictionary_params": {"normalization": normalization, "use_multiplier": multiplier}}

    for name, sae in {
        "topk": TopKSAE(D, F, top_k=K),
        "multiplied": TopKSAE(D, F, top_k=K, **dictionary("l2", True)),
        "max_l2": TopKSAE(D, F, top_k=K, **dictionary("max_l2")),
        "l1": TopKSAE(D, F, top_k=K, **dictionary("l1")),
        "max_l1": TopKSAE(D, F, top_k=K, **dictionary("max_l1")),
        "identity": TopKSAE(D, F, top_k=K, **dictionary("identity")),
        "batchtopk": BatchTopKSAE(D, F, top_k=K * len(X)),
        "jump": JumpSAE(D, F),
        "relu": SAE(D, F),
        "untied": TopKSAE(D, F, top_k=K).untied(bias=True),
        "tied": TopKSAE(D, F, top_k=K, **dictionary("l2", True)).tied(bias=False),
        "tied_bias": TopKSAE(D, F, top_k=K).tied(bias=True),
    }.items():
        jitter(sae)
        if name == "batchtopk":
            sae.encode(X)  # in training mode: sets the threshold
        normalization = name if name in ("max_l2", "l1", "max_l1", "identity") else "l2"
        arguments: dict[str, Any] = {} if normalization == "l2" else dictionary(normalization)
        metadata: dict[str, Any] = {"class": type(sae).__name__, "arguments": arguments}
        if isinstance(sae, TopKSAE):
            arguments["top_k"] = sae.top_k
        if isinstance(sae, BatchTopKSAE):
            metadata["running_threshold"] = float(sae.running_threshold)
        state = {key: value.clone() for key, value in sae.state_dict().items()}  # rows not yet normalised
        save_file(state, HERE / f"overcomplete_{name}.safetensors", metadata={"overcomplete": json.dumps(metadata)})
        sae.eval()
        outputs[f"{name}_z"], outputs[f"{name}_x_hat"] = compute_outputs(sae, X, lambda pair: pair[1])
    return f"overcomplete {importlib.metadata.version('overcomplete')}"


def stub_modules(*names: str) -> None:
    """Let a library import what only its training of language models needs."""
    for name in names:
        sys.modules.setdefault(name, MagicMock())


def make_dictionary_learning(outputs: dict[str, np.ndarray]) -> str:
    stub_modules("nnsight", "datasets", "zstandard")
    from dictionary_learning.dictionary import AutoEncoderNew
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.utils import load_dictionary

    common: dict[str, Any] = {
        "steps": 10, "activation_dim": D, "dict_size": F, "layer": 4, "lm_name": "EleutherAI/pythia-70m-deduped",
        "submodule_name": "resid_post_layer_4", "device": "cpu",
    }  # fmt: skip
    cases = {
        "standard": StandardTrainer(**common, lr=1e-3, l1_penalty=0.1, warmup_steps=1, sparsity_warmup_steps=1),
        "gated": GatedSAETrainer(**common, lr=1e-3, l1_penalty=0.1, warmup_steps=1, sparsity_warmup_steps=1),
        "topk": TopKTrainer(**common, k=K, warmup_steps=1),
        "batchtopk": BatchTopKTrainer(**common, k=K, warmup_steps=1),
        "matryoshka": MatryoshkaBatchTopKTrainer(**common, k=K, group_fractions=[0.25, 0.75], warmup_steps=1),
        "jumprelu": JumpReluTrainer(**common, warmup_steps=1, sparsity_warmup_steps=1),
    }
    trained = {name: (trainer.ae, trainer.config) for name, trainer in cases.items()}
    april = {**trained["standard"][1], "dict_class": "AutoEncoderNew"}  # no trainer of today makes it
    trained["new"] = (AutoEncoderNew(D, F), april)
    for name, (ae, config) in trained.items():
        jitter(ae, threshold=1.0)
        if "topk" in name or name == "matryoshka":
            ae.threshold.fill_(1.25)
        path = HERE / f"dictionary_learning_{name}"
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"trainer": config, "buffer": {"d_submodule": D, "io": "out"}}))
        torch.save(ae.state_dict(), path / "ae.pt")
        loaded, _ = load_dictionary(str(path), "cpu")
        outputs[f"{name}_z"], outputs[f"{name}_x_hat"] = compute_outputs(loaded, X, lambda z: z)
        save_file({key: value.contiguous() for key, value in ae.state_dict().items()}, path / "ae.safetensors")
        if name != "topk":  # PyTorch's file is kept for one of them
            (path / "ae.pt").unlink()
    return "dictionary_learning 0.1.0"


def make_sparsify(outputs: dict[str, np.ndarray]) -> str:
    stub_modules("datasets", "accelerate", "accelerate.utils", "transformers", "schedulefree")
    from sparsify import SparseCoder, SparseCoderConfig

    for name, config in {
        "layers.5": SparseCoderConfig(k=K, expansion_factor=F // D),
        "free": SparseCoderConfig(k=K, num_latents=19, normalize_decoder=False, multi_topk=True),
    }.items():
        coder = jitter(SparseCoder(D, config))
        path = HERE / f"sparsify_{name}"
        coder.save_to_disk(path)
        loaded = SparseCoder.load_from_disk(path)
        with torch.no_grad():
            top = loaded.encode(X)
            z = torch.zeros(len(X), loaded.num_latents).scatter(1, top.top_indices, top.top_acts)
            x_hat = loaded.decode(top.top_acts, top.top_indices)
            outputs[f"{name}_z"], outputs[f"{name}_x_hat"] = z.numpy(), x_hat.numpy()
    return "eai-sparsify 1.3.3"


peer = sys.argv[1]
if len(sys.argv) == 4:
    file = Path(sys.argv[3])
    run = {"saelens": run_saelens, "overcomplete": run_overcomplete}[peer]
    z, x_hat = run(Path(sys.argv[2]), torch.tensor(np.load(file)["x"]))
    np.savez(file, z=z, x_hat=x_hat)
else:
    for stale in HERE.glob(f"{peer}_*"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    arrays = {"x": X.numpy()}
    make = {"saelens": make_saelens, "overcomplete": make_overcomplete,
            "dictionary_learning": make_dictionary_learning, "sparsify": make_sparsify}  # fmt: skip
    version = make[peer](arrays)
    np.savez_compressed(HERE / f"{peer}_outputs.npz", **arrays)
    print(f"{version}, torch {torch.__version__}")
