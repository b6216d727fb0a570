"""Configs: every field is documented, and an impossible value gives one line with the field and the allowed values."""

import re
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from headsteer_jax.config import Config, DataConfig, ModelConfig
from headsteer_jax.config.files import (
    describe_field,
    flatten,
    format_override,
    list_fields,
    load_config,
    override,
    render_reference,
)
from headsteer_jax.config.schema import Section
from headsteer_jax.errors import HeadSteerError

CONFIGS = sorted((ROOT / "configs").glob("*.py"))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Write a config file with every default: depth 4, width 96, heads 6, images of 20 pixels."""
    path = tmp_path / "plain.py"
    path.write_text("from headsteer_jax.config import Config\n\n\ndef get_config():\n    return Config()\n")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load(path: Path) -> None:
    assert isinstance(load_config(path), Config)


def test_the_papers_model() -> None:
    """[LH26]: ViT-S, 12 layers, 6 heads, width 384; 384 -> 3072 latents of the last layer; 100 epochs; 224 pixels."""
    config = load_config(next(path for path in CONFIGS if path.stem == "cifar100_vit_s"))
    assert (config.model.depth, config.model.heads, config.model.width) == (12, 6, 384)
    assert (config.latents, config.sae_layer, config.sae.epochs) == (3072, 11, 100)
    assert (config.data.source, config.data.name) == ("tfds", "cifar100")
    patches = (config.data.image_size // config.model.patch) ** 2
    assert (patches, config.sae.k, config.steer.form) == (196, 64, "replace")


def test_sizes() -> None:
    assert ModelConfig.of_size("Ti").width == 192
    assert ModelConfig.of_size("B", patch=2) == ModelConfig(depth=12, width=768, heads=12, patch=2)


@pytest.mark.parametrize(("name", "meaning"), [(name, meaning) for name, _, meaning in list_fields()])
def test_every_field_has_a_text_of_whole_sentences(name: str, meaning: str) -> None:
    """The text is at least one sentence, and stands on a help page on its own, with the field's path and default."""
    assert re.match(r"[A-Z].{15,}\.$", meaning), meaning
    assert re.match(rf"config\.{re.escape(name)} \(.+; default .+\)\n    [A-Z]", describe_field(name))
    assert " ".join(describe_field(name).split()).endswith(meaning)


@pytest.mark.parametrize("section", Config.model_fields)
def test_a_section_is_explained_field_by_field(section: str) -> None:
    text = describe_field(section)
    assert all(f"config.{name} (" in text for name, *_ in list_fields() if name.startswith(f"{section}."))
    assert "config.sae.k (" not in text or section == "sae"


def test_an_unknown_field_is_not_explained() -> None:
    with pytest.raises(HeadSteerError, match=r"config\.model\.dept: there is no such field; did you mean"):
        describe_field("model.dept")


def test_the_documentation_is_up_to_date() -> None:
    page = ROOT / "docs" / "reference" / "configuration.md"
    assert page.read_text() == render_reference() + "\n", f"headsteer config --reference={page}"


def test_flatten_holds_every_field() -> None:
    assert flatten(Config()).keys() == {name for name, *_ in list_fields()}


def test_configs_are_frozen_and_hashable() -> None:
    assert hash(Config()) == hash(Config())
    with pytest.raises(ValidationError, match="frozen"):
        Config().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("seed", "7", 7),
        ("model.depth", "6", 6),
        ("gate.target", "0.5", 0.5),
        ("gate.target", "1", 1.0),
        ("gate.layer_norm", "true", True),
        ("steer.mode", "scale", "scale"),
        ("steer.alphas", "-1,0.5,2", (-1.0, 0.5, 2.0)),
        ("steer.alphas", "(1.0, 2.0)", (1.0, 2.0)),
        ("steer.classes", "07,42", ("07", "42")),
        ("steer.classes", "", ()),
        ("steer.classes", "(a), b c ,d]", ("(a)", "b c", "d]")),
        ("steer.classes", '["a,b", "[c]", " d ", "", "e\\"f", "\\u00e9"]', ("a,b", "[c]", " d ", "", 'e"f', "\u00e9")),
        ("steer.classes", " []", ()),
        ("data.related", '["g,h=a\\\\|b|c"]', ("g,h=a\\|b|c",)),
        ("data.path", "a=b,c", "a=b,c"),
        ("train.gated.learning_rate", "1e-4", 1e-4),
        ("sae.layer", "-2", -2),
    ],
)
def test_overrides_are_typed(path: str, text: str, value: object, plain: Path) -> None:
    assert flatten(load_config(plain, {path: text}))[path] == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize("layer", [2, -1, -4, -5])
def test_a_guess_comes_before_the_steered_layer_and_after_the_first_input(layer: int, plain: Path) -> None:
    """Of four layers, layer 1 is steered: -4 is layer 0, whose CLS token is the same for all images."""
    fields = {"sae.layer": "1", "steer.guess_layer": str(layer)}
    with pytest.raises(
        HeadSteerError, match=rf"^config\.steer\.guess_layer = {layer}: must be 0, or .* sae\.layer = 1,"
    ):
        load_config(plain, fields)
    assert load_config(plain, fields | {"steer.guess_layer": "-3"}).guess_layer == 1
    assert load_config(plain, {"sae.layer": "-2"}).guess_layer == 2


@pytest.mark.parametrize(
    ("path", "text", "parts"),
    [
        ("model.dept", "6", ["config.model.dept", "no such field", "config.model.depth"]),
        ("nonsense", "6", ["config.nonsense", "no such field"]),
        ("model", "6", ["config.model:", "no such field"]),
        ("model.depth", "six", ["config.model.depth = 'six'", "integer"]),
        ("model.depth", "1.5", ["config.model.depth = '1.5'", "integer"]),
        ("model.depth", "0", ["config.model.depth", "greater than 0"]),
        ("gate.target", "0", ["config.gate.target", "greater than 0"]),
        ("gate.target", "1.01", ["config.gate.target", "less than or equal to 1"]),
        ("gate.target", "nan", ["config.gate.target"]),
        ("gate.bias", "inf", ["config.gate.bias", "finite"]),
        ("train.label_smoothing", "1", ["config.train.label_smoothing", "less than 1"]),
        ("steer.mode", "boost", ["config.steer.mode", "'add'", "'ablate'"]),
        ("steer.alphas", "1,x", ["config.steer.alphas"]),
        ("steer.guess_layer", "4", ["config.steer.guess_layer = 4: must be 0, or a layer from 1 to the steered one"]),
        ("steer.allowed_loss", "0.001", ["config.steer.allowed_loss = 0.001: must be 0, or at least steer.tolerance"]),
        ("steer.classes", "[x]", ["config.steer.classes = '[x]'", "a JSON list of quoted strings"]),
        ("steer.classes", "[1, 2]", ["config.steer.classes = '[1, 2]'", "a JSON list of quoted strings"]),
        ("steer.classes", '["x"', ["config.steer.classes", "a JSON list of quoted strings"]),
        ("steer.classes", '["x"], y', ["config.steer.classes", "a JSON list of quoted strings"]),
        ("steer.alphas", "1,nan", ["config.steer.alphas", "finite"]),
        ("model.heads", "5", ["config.model.heads = 5", "a divisor of model.width = 96"]),
        ("model.heads", "48", ["config.model.heads = 48", "at most 30"]),
        ("model.heads", "16", ["config.steer.strategies = ", "without 'gate_aligned'", "model.heads = 16 is above 12"]),
        ("model.patch", "3", ["config.model.patch = 3", "a divisor of data.image_size = 20"]),
        ("sae.k", "1000", ["config.sae.k = 1000", "at most the 768 latents"]),
        ("sae.layer", "0", ["config.sae.layer = 0", "a gated layer: 1 to 3"]),
        ("sae.layer", "4", ["config.sae.layer = 4", "a gated layer: 1 to 3"]),
        ("steer.latents", "769", ["config.steer.latents = 769", "at most the 768"]),
        ("steer.alphas", "", ["config.steer.alphas = ()", "at least one"]),
        ("steer.alphas", "1,1", ["config.steer.alphas = (1.0, 1.0)", "without repeats"]),
        ("steer.strategies", "class,class", ["config.steer.strategies", "without repeats"]),
        ("gate.first_layer", "4", ["config.gate.first_layer = 4", "below model.depth = 4"]),
        ("gate.kinds", "", ["config.gate.kinds = ()", "at least one of heads, sublayers, tokens, without repeats"]),
        ("gate.kinds", "heads,heads", ["config.gate.kinds = ('heads', 'heads')", "without repeats"]),
        ("gate.kinds", "heads,patches", ["config.gate.kinds", "'heads', 'sublayers' or 'tokens'"]),
        ("gate.tokens.threshold", "1", ["config.gate.tokens.threshold", "less than 1"]),
        ("gate.budget", "1.5", ["config.gate.budget", "less than or equal to 1"]),
        ("train.eval_every", "30", ["config.train.eval_every = 30", "a multiple of train.steps_per_call = 25"]),
        ("train.gated.steps", "0", ["config.train.gated.steps = 0", "at least 1"]),
        ("data.channels", "3", ["config.data.mean", "data.channels = 3"]),
    ],
)
def test_impossible_overrides(path: str, text: str, parts: list[str], plain: Path) -> None:
    with pytest.raises(HeadSteerError) as error:
        load_config(plain, {path: text})
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("", ["no get_config()"]),
        ("def get_config(): return 3", ["returned int; return a Config"]),
        ("import nothing_of_this_name", ["ModuleNotFoundError"]),
        ("def get_config(:", ["SyntaxError"]),
        ("from headsteer_jax.config import *\ndef get_config(): return Config(modle=1)", ["config.modle", "no such"]),
        (
            "from headsteer_jax.config import *\ndef get_config(): return Config(data=DataConfig(image_size=20.5))",
            ["config.data.image_size = 20.5", "integer"],
        ),
        (
            "from headsteer_jax.config import *\ndef get_config(): return Config(model=ModelConfig(heads=7))",
            ["config.model.heads = 7", "a divisor of model.width"],
        ),
    ],
)
def test_bad_config_files(tmp_path: Path, source: str, parts: list[str]) -> None:
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(HeadSteerError) as error:
        load_config(path)
    assert "\n" not in str(error.value)
    for part in ["mine.py", *parts]:
        assert part in str(error.value)


def test_a_config_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HeadSteerError, match=r"none\.py: there is no such file"):
        load_config(tmp_path / "none.py")


def test_overrides_are_checked_together(plain: Path) -> None:
    """A patch of 8 does not divide the default image size 20; with an image size of 32 both are right."""
    config = load_config(plain, {"data.image_size": "32", "model.patch": "8"})
    assert (config.data.image_size, config.model.patch) == (32, 8)


@settings(max_examples=50, deadline=None)
@given(st.integers(), st.floats())
def test_numbers_survive_the_command_line(seed: int, target: float) -> None:
    """A text gives the number itself or an error, never another number."""
    for path, value in (("seed", seed), ("gate.target", target)):
        try:
            result = flatten(override(Config(), path, repr(value)))[path]
        except HeadSteerError:
            assert value < 0 or not 0 < value <= 1
        else:
            assert result == value


def test_sections_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValidationError, match="extra"):
        DataConfig(sorce="npz")  # type: ignore[call-arg]
    assert issubclass(Config, Section)


TEXTS = st.text(st.characters() | st.sampled_from(" ,[]()|=\"'\\$`\n"), max_size=8)  # also lone surrogates


@given(st.lists(TEXTS, max_size=5))
def test_any_names_survive_the_command_line(names: list[str]) -> None:
    config = override(Config(), "data.related", format_override(names))
    assert config.data.related == tuple(names)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=5))
def test_any_numbers_survive_the_command_line(numbers: list[float]) -> None:
    assert override(Config(), "steer.alphas", format_override(numbers)).steer.alphas == tuple(numbers)


def test_every_field_of_the_shipped_configs_survives_the_command_line(plain: Path) -> None:
    for path in CONFIGS:
        fields = flatten(load_config(path))
        changed = {name: value for name, value in fields.items() if value != flatten(Config())[name]}
        assert flatten(load_config(plain, {name: format_override(value) for name, value in changed.items()})) == fields


@settings(max_examples=300)
@given(
    st.sampled_from([name for name, *_ in list_fields()]),
    TEXTS | st.from_regex(r"[\[\]\d.,e\"-]{0,12}", fullmatch=True),
)
def test_any_override_is_valid_or_a_line(path: str, text: str) -> None:
    with suppress(HeadSteerError):
        assert isinstance(load_config(CONFIGS[0], {path: text}), Config)


@pytest.mark.parametrize("kind", ["sublayers", "tokens"])
def test_a_kind_of_gate_needs_a_layer(plain: Path, kind: str) -> None:
    """A kind that is not chosen may begin anywhere."""
    field = f"gate.{kind}.first_layer"
    assert load_config(plain, {field: "4"}).gate.kinds == ("heads",)
    with pytest.raises(HeadSteerError) as error:
        load_config(plain, {field: "4", "gate.kinds": f"heads,{kind}"})
    assert str(error.value) == f"config.{field} = 4: must be below model.depth = 4"


def test_gated_layers_are_those_of_all_kinds(plain: Path) -> None:
    config = load_config(plain, {"gate.kinds": "sublayers,tokens", "gate.sublayers.first_layer": "2"})
    assert config.gated_layers == range(4)
    assert [config.layers_with(kind) for kind in ("heads", "sublayers", "tokens")] == [
        range(4, 4),
        range(2, 4),
        range(4),
    ]
    assert config.gate.kinds_in(1) == ("tokens",)
    assert config.gate.kinds_in(2) == ("sublayers", "tokens")
