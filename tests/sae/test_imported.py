"""The autoencoder that config.sae.pretrained names: found, checked against the config, and its origin told."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import sae_config, tiny_config
from helpers import GOLDENS
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from headsteer_jax.config.schema import Config
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.sae.autoencoder import Autoencoder, SAEWeights, Scaling
from headsteer_jax.sae.imported import describe_provenance, fingerprint_autoencoder, import_autoencoder, to_members
from headsteer_jax.sae.interchange.provenance import Provenance, list_doubts, locate_hook
from headsteer_jax.sae.interchange.saelens import export_saelens

WIDTH = 8  # of the golden files; they have 24 latents and k = 3
EVERY = {  # an autoencoder of each library, with its activation
    "saelens": ("saelens_topk", "topk"),
    "overcomplete": ("overcomplete_topk.safetensors", "topk"),
    "dictionary_learning": ("dictionary_learning_matryoshka", "batch_topk"),
    "sparsify": ("sparsify_layers.5", "topk"),
}


def importing(pretrained: object, **sae: Any) -> Config:
    """Make a config of the golden files' width that imports this autoencoder."""
    config = tiny_config()
    model = config.model.model_copy(update={"width": WIDTH, "heads": 2})
    fields = {"pretrained": str(pretrained), "seeds": 1, "k": 3, "latents": 24, **sae}
    return config.model_copy(update={"model": model, "sae": config.sae.model_copy(update=fields)})


def assert_refused(config: Config, *parts: str) -> None:
    with pytest.raises(HeadSteerError) as error:
        import_autoencoder(config)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("library", EVERY)
def test_every_library_is_imported_as_one_member(library: str) -> None:
    name, activation = EVERY[library]
    imported = import_autoencoder(importing(f"{library}:{GOLDENS / name}", activation=activation))
    members = to_members(imported)
    assert members.weights.W_e.shape == (1, 24, WIDTH)
    assert {curve.shape for curve in members.curves.values()} == {(0, 1)}


def test_the_number_of_latents_need_not_be_a_multiple_of_the_width(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = ((100, 24), (100,), (100, 24), (24,), (100,))
    weights = SAEWeights(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))  # type: ignore[arg-type]
    scaling = Scaling(np.zeros(24, np.float32), np.asarray(1.0, np.float32))
    export_saelens(Autoencoder(weights, scaling, 4), "topk", 4, tmp_path)
    config = sae_config(pretrained=f"saelens:{tmp_path}", seeds=1, latents=100)
    assert (config.latents, config.model.width) == (100, 24)
    assert to_members(import_autoencoder(config)).weights.W_d.shape == (1, 100, 24)
    assert_refused(
        sae_config(pretrained=f"saelens:{tmp_path}", seeds=1),
        "it has latents = 100, not 48; pass --config.sae.latents=100, or",
    )


def test_everything_that_differs_is_said_at_once(tmp_path: Path) -> None:
    path = f"saelens:{GOLDENS / 'saelens_batchtopk'}"
    assert_refused(importing(path, k=4, latents=0), "config.sae.pretrained = saelens:",
                   "activation = batch_topk, not topk, k = 3, not 4, latents = 24, not 16; pass ",
                   "pass --config.sae.activation=batch_topk --config.sae.k=3 --config.sae.latents=24, or")  # fmt: skip
    # a file that does not tell k leaves it to the config
    path = f"dictionary_learning:{GOLDENS / 'dictionary_learning_gated'}"
    assert import_autoencoder(importing(path, activation="jumprelu", k=7)).k is None


def test_the_config_counts_latents_itself_or_by_the_width() -> None:
    config = sae_config()
    assert config.latents == 2 * config.model.width
    assert sae_config(latents=7).latents == 7
    with pytest.raises(ValueError, match=r"sae.k = 9: must be at most the 8 latents \(sae.latents\)"):
        Config.model_validate(config.model_dump() | {"sae": config.sae.model_dump() | {"latents": 8, "k": 9}})


@pytest.mark.parametrize("pretrained", ["saelens", "saelens:", "gemma:x", ":x", "runs/x"])
def test_the_library_and_a_place_must_be_given(pretrained: str) -> None:
    config = tiny_config()
    sae = config.sae.model_dump() | {"pretrained": pretrained, "seeds": 1}
    with pytest.raises(ValueError, match=r"saelens:DIR or overcomplete:FILE.safetensors or dictionary_learning:DIR or"):
        Config.model_validate(config.model_dump() | {"sae": sae})


# --- finding it ---


def place(directory: Path, name: str) -> Path:
    """Copy a golden autoencoder into a directory, under its own name."""
    source = GOLDENS / name
    copy = shutil.copytree if source.is_dir() else shutil.copy
    directory.mkdir(exist_ok=True)
    return Path(copy(source, directory / name))


def test_the_home_directory_and_a_file_of_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for library, (name, activation) in EVERY.items():
        place(tmp_path, name)
        import_autoencoder(importing(f"{library}:~/{name}", activation=activation))
        assert fingerprint_autoencoder(f"{library}:~/{name}") == fingerprint_autoencoder(f"{library}:{GOLDENS / name}")
    import_autoencoder(importing("saelens:~/saelens_topk/cfg.json"))
    import_autoencoder(importing("saelens:~/saelens_topk/sae_weights.safetensors"))
    import_autoencoder(importing("sparsify:~/sparsify_layers.5/sae.safetensors"))


@pytest.mark.parametrize("library", EVERY)
@pytest.mark.parametrize("other", EVERY)
def test_another_librarys_autoencoder_is_called_what_it_is(library: str, other: str) -> None:
    if library != other:
        path = GOLDENS / EVERY[other][0]
        assert_refused(importing(f"{library}:{path}"), f"it is an autoencoder of {other}; pass {other}:{path}")


@pytest.mark.parametrize("library", EVERY)
def test_a_directory_of_several_autoencoders(tmp_path: Path, library: str) -> None:
    for name, _ in EVERY.values():
        place(tmp_path / "all", name)
    assert_refused(
        importing(f"{library}:{tmp_path / 'all'}"),
        "it holds 4 autoencoders (dictionary_learning_matryoshka, overcomplete_topk.safetensors, saelens_topk, ...)",
        f"choose one, such as dictionary_learning:{tmp_path / 'all' / 'dictionary_learning_matryoshka'}",
    )


@pytest.mark.parametrize(
    ("files", "location", "parts"),
    [
        ({}, "none", ["none: no such file or directory"]),
        ({}, "", ["cfg.json: no such file; choose a directory of SAELens"]),
        ({"a.txt": b""}, "a.txt", ["it is a file; name the directory that holds cfg.json and sae_weights.safetensors"]),
        ({"params.npz": b""}, "", ["an autoencoder of Gemma Scope", "pass saelens:DIR"]),
        ({"cfg.json": b"{}", "sae_weights.pt": b""}, "", ["a file of PyTorch (sae_weights.pt)", "as .safetensors"]),
        ({"cfg.json": b'{"d_in": 8, "d_sae": 24}'}, "", ["sae_weights.safetensors: no such .safetensors file"]),
        ({"sae.pt": b""}, "sae.pt", ["a .pt file of PyTorch"]),
        ({"config.json": b"{}", "model.safetensors": b""}, "", ["it holds a model, not an autoencoder"]),
        ({"config.json": b"{}", "pytorch_model.bin": b""}, "", ["it holds a model, not an autoencoder"]),
        ({"sae/autoencoders.npz": b""}, "", ["it is a run of HeadSteer; export its autoencoders first"]),
        ({"sae/autoencoders.npz": b""}, "sae", ["it is a run of HeadSteer"]),
        ({"sae/autoencoders.npz": b""}, "sae/autoencoders.npz", ["it is a run of HeadSteer"]),
    ],
)
def test_what_is_no_autoencoder_is_called_what_it_is(
    tmp_path: Path, files: dict[str, bytes], location: str, parts: list[str]
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert_refused(importing(f"saelens:{tmp_path / location}"), *parts)


def test_a_directory_around_the_autoencoder(tmp_path: Path) -> None:
    path = place(tmp_path / "run", "sparsify_layers.5")
    assert_refused(importing(f"saelens:{tmp_path / 'run'}"), f"the autoencoder is inside; pass sparsify:{path}")


@pytest.mark.parametrize("location", ["hf://owner/model", "gs://bucket/sae", "https://huggingface.co/owner/model"])
def test_a_place_that_is_not_local(location: str) -> None:
    assert_refused(importing(f"sparsify:{location}"), "only local files are read; download it first")


@pytest.mark.parametrize("location", ["~nobody_of_this_name/sae", "x" * 5000, "a\0b"])
def test_a_path_that_the_system_refuses(location: str) -> None:
    assert_refused(importing(f"saelens:{location}"), "config.sae.pretrained = saelens:")
    assert fingerprint_autoencoder(f"saelens:{location}") == ""


@pytest.mark.parametrize("file", ["timm_vit.safetensors", "hf_vit.safetensors", "hf_dinov2.safetensors"])
@pytest.mark.parametrize("library", EVERY)
def test_a_backbone_is_not_taken_for_an_autoencoder(tmp_path: Path, library: str, file: str) -> None:
    parts = ("it holds a transformer (tensor", "not an autoencoder; config.model.pretrained")
    assert_refused(importing(f"{library}:{GOLDENS / file}"), *parts)
    if library == "sparsify":  # under the right name
        path = place(tmp_path, EVERY[library][0])
        shutil.copy(GOLDENS / file, path / "sae.safetensors")
        assert_refused(importing(f"{library}:{path}"), *parts)


@pytest.mark.parametrize("library", ["saelens", "sparsify"])
def test_a_file_of_another_librarys_directory(library: str) -> None:
    path = GOLDENS / EVERY[library][0]
    (weights,) = path.glob("*.safetensors")
    assert_refused(importing(f"overcomplete:{weights}"), f"it is an autoencoder of {library}; pass {library}:{path}")


def test_another_width_and_nan_are_found_without_a_model(tmp_path: Path) -> None:
    config = sae_config(pretrained=f"saelens:{GOLDENS / 'saelens_topk'}", seeds=1, latents=24, k=3)
    assert_refused(config, "it reads residuals of width 8, but the model's are 24 wide")
    path = place(tmp_path, "sparsify_layers.5") / "sae.safetensors"
    save_file(load_file(path) | {"b_dec": np.full(WIDTH, np.nan, np.float32)}, path)
    assert_refused(importing(f"sparsify:{path.parent}"), "'b_dec' holds NaN")
    path = place(tmp_path, "saelens_uncentred") / "sae_weights.safetensors"  # b_dec is folded into its encoder
    save_file(load_file(path) | {"b_dec": np.full(WIDTH, 3e38, np.float32)}, path)
    assert_refused(importing(f"saelens:{path.parent}"), "too large for float32")


# --- its content ---


def test_the_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    for library, (name, _) in EVERY.items():
        here, there = fingerprint_autoencoder(f"{library}:{GOLDENS / name}"), place(tmp_path / library, name)
        assert len(here) == 64
        moved = there.rename(there.with_name("moved" + there.suffix))
        assert fingerprint_autoencoder(f"{library}:{moved}") == here
        for file in sorted(moved.iterdir()) if moved.is_dir() else [moved]:
            if file.name != "ae.pt":
                file.write_bytes(file.read_bytes() + b" ")
                changed = fingerprint_autoencoder(f"{library}:{moved}")
                assert changed != here
                here = changed
    assert len({fingerprint_autoencoder(f"{library}:{GOLDENS / name}") for library, (name, _) in EVERY.items()}) == 4


@pytest.mark.parametrize("pretrained", ["", "saelens", "saelens:", "saelens:/nowhere", "overcomplete:/", "unknown:/"])
def test_there_is_no_fingerprint_of_nothing(pretrained: str) -> None:
    assert fingerprint_autoencoder(pretrained) == ""


# --- its origin ---


@pytest.mark.parametrize(
    ("hook", "place"),
    [
        ("blocks.1.hook_resid_post", (2, True)),
        ("blocks.2.hook_resid_pre", (2, True)),
        ("blocks.0.hook_resid_pre", (0, True)),
        ("blocks.2.hook_resid_mid", (None, False)),
        ("blocks.2.hook_mlp_out", (None, False)),
        ("blocks.2.attn.hook_z", (None, False)),
        ("blocks.2.ln2.hook_normalized", (None, False)),
        ("layers.5", (6, True)),
        ("model.layers.5", (6, True)),
        ("gpt_neox.layers.5", (6, True)),
        ("vit.encoder.layer.11", (12, True)),
        ("transformer.resblocks.3", (4, True)),
        ("transformer.h[3]", (4, True)),
        ("layers.5.mlp", (None, False)),
        ("encoder.layer.5.attention.output", (None, False)),
        ("blocks.5.norm1", (None, False)),
        ("resid_post_layer_8", (9, True)),
        ("resid_pre_layer_8", (8, True)),
        ("mlp_out_layer_8", (None, False)),
        ("somewhere", (None, None)),
        ("hook_embed", (None, False)),
    ],
)
def test_the_layer_whose_input_a_hook_reads(hook: str, place: tuple[int | None, bool | None]) -> None:
    assert locate_hook(hook) == place


def with_metadata(path: Path, metadata: dict[str, Any], **fields: Any) -> Path:
    """Change a copy of an SAELens directory: its metadata, and fields of its config."""
    config = json.loads((path / "cfg.json").read_text())
    (path / "cfg.json").write_text(json.dumps(config | {"metadata": metadata} | fields))
    return path


@pytest.mark.parametrize(
    ("metadata", "fields", "doubts"),
    [
        ({"model_name": "gpt2-small", "hook_name": "blocks.1.hook_resid_post"}, {},
         ["it was made for the model 'gpt2-small', and not for this run's"]),
        ({"model_name": "gpt2-small", "hook_name": "blocks.1.hook_resid_pre"}, {},
         ["'gpt2-small'", "'blocks.1.hook_resid_pre', which is the input of layer 1; config.sae.layer is layer 2"]),
        ({"hook_name": "blocks.2.hook_mlp_out"}, {}, ["does not say which model", "which is not the residual stream"]),
        ({"hook_name": "somewhere"}, {}, ["does not say which model", "it is not known whether"]),
        ({"hook_name": "blocks.2.hook_resid_pre", "hook_head_index": 3}, {}, ["which model", "head 3', which is not"]),
        ({}, {}, ["does not say which model", "does not say which place"]),
        (3, {"model_name": "m", "hook_point": "blocks.2.hook_resid_pre"}, ["made for the model 'm'"]),  # before 6.0
        ({"hook_layer": 2}, {}, ["does not say which model", "it reads 'layer 2'; it is not known whether that is"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_this_run_is_doubted(
    tmp_path: Path, metadata: Any, fields: dict[str, Any], doubts: list[str]
) -> None:
    config = importing(f"saelens:{with_metadata(place(tmp_path, 'saelens_topk'), metadata, **fields)}")
    assert config.sae_layer == 2
    told = describe_provenance(config, import_autoencoder(config), "my_run")
    assert len(told["doubts"]) == len(doubts)
    for doubt, part in zip(told["doubts"], doubts, strict=True):
        assert part in doubt


def test_the_origin_is_told_in_json() -> None:
    config = importing(f"dictionary_learning:{GOLDENS / 'dictionary_learning_matryoshka'}", activation="batch_topk")
    told = describe_provenance(config, import_autoencoder(config), "my_run")
    assert json.loads(json.dumps(told)) == {
        "library": "dictionary_learning", "path": str(GOLDENS / "dictionary_learning_matryoshka"),
        "sha256": fingerprint_autoencoder(config.sae.pretrained),
        "model": "EleutherAI/pythia-70m-deduped", "hook": "resid_post_layer_4", "layer": 5, "dataset": None,
        "tokens": None, "version": None, "activation": "batch_topk", "k": 3, "width": 8, "latents": 24,
        "doubts": [
            "it was made for the model 'EleutherAI/pythia-70m-deduped', and not for this run's",
            "it reads 'resid_post_layer_4', which is the input of layer 5; config.sae.layer is layer 2",
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "hook", "tokens", "doubts"),
    [
        ("my_run", "layers.2", "cls", []),
        ("other", "layers.2", "cls", ["it was exported from the run 'other', and this run is 'my_run'"]),
        ("my_run", "layers.1", "cls", ["the input of layer 1; config.sae.layer is layer 2"]),
        ("my_run", "layers.2", "patches", ["trained on the tokens 'patches', and config.sae.tokens is 'cls'"]),
    ],
)
@pytest.mark.parametrize("library", ["saelens", "overcomplete"])
def test_an_autoencoder_of_ours_is_known(
    tmp_path: Path, library: str, model: str, hook: str, tokens: str, doubts: list[str]
) -> None:
    from headsteer_jax.sae.interchange.overcomplete import export_overcomplete

    sae = import_autoencoder(importing(f"saelens:{GOLDENS / 'saelens_topk'}")).sae
    about = {"model_name": model, "hook_name": hook, "seed": 0, "tokens": tokens}  # as deploy/export.py
    path = tmp_path / "a.safetensors"
    export = export_saelens if library == "saelens" else export_overcomplete
    export(sae, "topk", 3, path, about)
    config = importing(f"{library}:{path}")
    told = describe_provenance(config, import_autoencoder(config), "my_run")["doubts"]
    assert len(told) == len(doubts)
    for doubt, part in zip(told, doubts, strict=True):
        assert part in doubt


def test_an_autoencoder_that_describes_nothing_here_is_doubted() -> None:
    config = importing(f"saelens:{GOLDENS / 'saelens_topk'}")
    imported = import_autoencoder(config)
    fits, fails = (describe_provenance(config, imported, "r", share)["doubts"] for share in (0.5, -2.0))
    assert fails[:-1] == fits == describe_provenance(config, imported, "r")["doubts"]
    assert "worse than their mean does (explained variance -2)" in fails[-1]


def test_the_runs_own_backbone_is_known_by_name() -> None:
    origin = Provenance("timm/vit_small_patch16_224", "blocks.1.hook_resid_post", 2, True)
    own = "weights/vit_small_patch16_224.augreg.safetensors"
    assert list_doubts(origin, 2, "cls", "r", own) == [
        "it was made for the backbone 'timm/vit_small_patch16_224', which this run has trained further"
    ]


NOTES = {"saelens": "cfg.json", "dictionary_learning": "config.json", "sparsify": "cfg.json"}
VALUES = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        3,
        10**30,
        1.5,
        float("nan"),
        "",
        "x\n",
        "topk",
        "\ud800",
        [],
        [[1]],
        {},
        {"k": 3},
        "blocks.1.hook_z",
    ]
)
KEYS = st.sampled_from(
    ["architecture", "d_in", "d_sae", "k", "hook_name", "hook_head_index", "hook_layer", "normalize_activations",
     "metadata", "activation_fn", "activation_fn_kwargs", "d_out", "seed", "tokens", "trainer", "buffer", "num_latents",
     "signed", "dict_class", "layer", "submodule_name", "lm_name", "expansion_factor", "activation"]
)  # fmt: skip


@pytest.mark.parametrize("library", NOTES)
@settings(max_examples=40, deadline=None)
@given(changes=st.dictionaries(KEYS, VALUES, min_size=1, max_size=3), inside=st.booleans())
def test_notes_of_any_content_are_read_or_refused_in_a_line(
    tmp_path_factory: pytest.TempPathFactory, library: str, changes: dict[str, Any], inside: bool
) -> None:
    name, activation = EVERY[library]
    path = place(tmp_path_factory.mktemp("sae"), name)
    notes = json.loads((path / NOTES[library]).read_text())
    section = next((key for key in ("metadata", "trainer") if inside and key in notes), None)
    changed = notes | {section: notes[section] | changes} if section else notes | changes
    (path / NOTES[library]).write_text(json.dumps(changed))
    config = importing(f"{library}:{path}", activation=activation)
    refusal = ""
    try:
        json.dumps(describe_provenance(config, import_autoencoder(config), "my_run"), allow_nan=False)
    except HeadSteerError as error:
        refusal = str(error)
    assert "\n" not in refusal
