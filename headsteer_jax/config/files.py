"""Config files, the command line's overrides, and the texts that explain every field."""

import difflib
import json
import runpy
import textwrap
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from etils.epath import Path as EPath
from pydantic import TypeAdapter, ValidationError

from headsteer_jax.config.paths import expand_path
from headsteer_jax.config.schema import Config, SAEAblationConfig, Section
from headsteer_jax.errors import HeadSteerError

# the sections whose names do not follow from their classes' names
NESTED_SECTIONS = {
    "SAEAblationConfig": "sae.ablation",
    "PhaseConfig": "train.<phase>",
    "SublayerGateConfig": "gate.sublayers",
    "TokenGateConfig": "gate.tokens",
}

# fields of version 0.1 that have moved
MOVED_FIELDS = {
    "data.memory_limit_mb": "machine.image_memory",
    "sae.cache": "machine.activation_cache",
    "steer.memory": "machine.sweep_memory",
    "steer.chunk": "machine.sweep_chunk",
    "layers.chunk": "machine.sweep_chunk",
    **{f"sae.{name}": f"sae.ablation.{name}" for name in SAEAblationConfig.model_fields},
}


def first_fault(error: ValidationError, prefix: str = "") -> str:
    """Describe the first fault of a failed validation, as `config.FIELD = VALUE: the allowed values`.

    Args:
      prefix: the section that was validated; empty for a whole config.
    """
    fault = error.errors(include_url=False)[0]
    path = ".".join([prefix, *map(str, fault["loc"])] if prefix else map(str, fault["loc"]))
    if fault["type"] == "value_error":  # from Config._check_rules, whose message names the field
        return f"config.{fault['ctx']['error']}"
    if fault["type"] == "extra_forbidden":
        return f"config.{path}: there is no such field{_did_you_mean(path)}"
    return f"config.{path} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _did_you_mean(path: str) -> str:
    if path in MOVED_FIELDS:
        return f"; it is now config.{MOVED_FIELDS[path]}"
    close = difflib.get_close_matches(path, [name for name, *_ in list_fields()], n=1, cutoff=0.5)
    return f"; did you mean config.{close[0]}?" if close else "; headsteer config lists the fields"


def list_fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield the dotted path, the type and the help text of every field that is not a section itself."""
    for name, info in section.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield from list_fields(annotation, f"{prefix}{name}.")
        else:
            metadata = (annotation, *info.metadata) if info.metadata else (annotation,)
            typed = Annotated[metadata] if len(metadata) > 1 else annotation
            yield prefix + name, typed, " ".join((info.description or "").split())


def flatten(config: Config) -> dict[str, Any]:
    """Return every field's value in JSON's types, by its dotted path."""

    def walk(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(walk(json.loads(config.model_dump_json()), ""))


def _parse(annotation: Any, text: str) -> Any:
    """Convert a text of the command line to a value of a type; a tuple's elements are separated by commas.

    Raises:
      ValidationError: the text is not of this type.
      ValueError: the text is a list that is not well formed.
    """
    if get_origin(annotation) is tuple:
        element = get_args(annotation)[0]
        if element is str:
            return parse_names(text)
        return tuple(_parse(element, part.strip()) for part in text.strip("()[] ").split(",") if part.strip())
    if get_origin(annotation) is Literal:
        value = {str(choice): choice for choice in get_args(annotation)}.get(text, text)
        return TypeAdapter(annotation).validate_python(value)
    return TypeAdapter(annotation).validate_strings(text)


def parse_names(text: str) -> tuple[str, ...]:
    """Read a list of strings: separated by commas, or a JSON list, whose strings may contain anything.

    Raises:
      ValueError: the text begins with a bracket but is not a JSON list.
    """
    if not text.lstrip().startswith("["):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        example = """'["a, b", "[c]"]'"""
        raise ValueError(f"a value that begins with [ must be a JSON list of quoted strings, such as {example}")
    return tuple(names)


def format_override(value: Any) -> str:
    """Format a field's value, in JSON's types, as the text that the command line reads as this value."""
    if not isinstance(value, list):
        return str(value)
    plain = ",".join(map(str, value))
    is_names = any(isinstance(element, str) for element in value)
    if is_names and (plain.lstrip().startswith("[") or parse_names(plain) != tuple(value)):
        return json.dumps(value, ensure_ascii=False)
    return plain


def override(config: Config, path: str, text: str) -> Config:
    """Set the field at a dotted path from a text of the command line.

    The elements of a list are separated by commas; a list of strings may also be a JSON list.

    The rules across fields are not checked: `load_config` does that once, after the last override.

    Raises:
      HeadSteerError: there is no such field, or the text is not of its type or range.
    """
    typed = {name: annotation for name, annotation, *_ in list_fields()}
    if path not in typed:
        raise HeadSteerError(f"config.{path}: there is no such field{_did_you_mean(path)}")
    try:
        value = _parse(typed[path], text)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        message = f"{fault['msg'][0].lower()}{fault['msg'][1:]}"
        raise HeadSteerError(f"config.{path} = {text!r}: {message}") from None
    except ValueError as error:
        raise HeadSteerError(f"config.{path} = {text!r}: {error}") from None

    def replace_field(section: Section, names: list[str]) -> Section:
        new = replace_field(getattr(section, names[0]), names[1:]) if len(names) > 1 else value
        return section.model_copy(update={names[0]: new})

    result = replace_field(config, path.split("."))
    assert isinstance(result, Config)
    return result


def load_config(path: str | Path, overrides: Mapping[str, str] = types.MappingProxyType({})) -> Config:
    """Load a config file, apply overrides, and check the result.

    Args:
      path: a Python file that defines get_config() -> Config.
      overrides: texts as on the command line, by the fields' dotted paths.

    Raises:
      HeadSteerError: there is no such file, it fails, or a field is unknown, of a wrong type or impossible.
    """
    path = Path(expand_path(str(path), "--config", buckets=False))
    if not path.is_file():
        raise HeadSteerError(f"--config={path}: there is no such file; correct the path")
    try:
        config = runpy.run_path(str(path))["get_config"]()
        if not isinstance(config, Config):
            raise HeadSteerError(f"--config={path}: get_config() returned {type(config).__name__}; return a Config")
    except ValidationError as error:
        section = NESTED_SECTIONS.get(error.title) or error.title.removesuffix("Config").lower()
        raise HeadSteerError(f"{first_fault(error, section)} (in {path})") from None
    except KeyError:
        raise HeadSteerError(
            f"--config={path}: the file defines no get_config(); define one that returns a Config"
        ) from None
    except HeadSteerError:
        raise
    except Exception as error:
        raise HeadSteerError(f"--config={path}: the file failed with {type(error).__name__}: {error}") from None
    for name, text in overrides.items():
        config = override(config, name, text)
    try:  # the overrides were applied without the checks across fields
        return Config.model_validate(config.model_dump())
    except ValidationError as error:
        raise HeadSteerError(first_fault(error)) from None


def read_saved_config(path: EPath) -> Config:
    """Read the config.json of a run.

    Raises:
      HeadSteerError: it is missing, damaged or of another version.
    """
    try:
        return Config.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        fault = str(error)
        if isinstance(error, ValidationError):
            is_json = error.errors(include_url=False)[0]["type"] != "json_invalid"
            fault = first_fault(error) if is_json else "it is not JSON"
        raise HeadSteerError(
            f"{path}: damaged, or of another version: {fault}; run the command that made the run again"
        ) from None


def describe_field(path: str) -> str:
    """Explain a field, or every field of a section: its path, type, default and meaning.

    Raises:
      HeadSteerError: there is neither a field nor a section of this name.
    """
    path, defaults = path.removeprefix("--").removeprefix("config."), flatten(Config())
    selected = [field for field in list_fields() if field[0] == path or field[0].startswith(f"{path}.")]
    if not selected:
        raise HeadSteerError(f"config.{path}: there is no such field{_did_you_mean(path)}")
    return "\n".join(
        f"config.{name} ({_type_name(annotation)}; default {_format_default(defaults[name])})\n"
        + textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
        for name, annotation, text in selected
    )


def render_reference() -> str:
    """Render the configuration page of the documentation: a table of fields for each section."""
    defaults = flatten(Config())
    lines = [
        "# Configuration",
        "",
        "This page lists all fields of a config with their defaults. A config file sets the fields that its experiment",
        "needs, and the command line overrides both: `--config.FIELD=VALUE`, with commas between the elements of a",
        "list. If a string contains a comma or begins with a bracket, write the list as a JSON list:",
        """`--config.steer.classes='["a, b", "[c]"]'`. This page is the output of""",
        "`headsteer config --reference=docs/reference/configuration.md`.",
        "",
        "Sources: [LH26] is the paper, arXiv:2603.26743; [AdaViT] is arXiv:2111.15668; [ViT] is arXiv:2010.11929.",
    ]
    before = None
    for path, annotation, text in list_fields():
        section = path.rpartition(".")[0].partition(".")[0]
        if section != before:
            title = Config.model_fields[section].annotation.__doc__ if section else Config.__doc__
            lines += ["", f"## {section or 'top level'}", "", (title or "").partition("\n")[0], ""]
            lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
            before = section
        kind, shown, meaning = (
            cell.replace("|", "\\|") for cell in (_type_name(annotation), _format_default(defaults[path]), text)
        )
        lines.append(f"| `{path}` | {kind} | {shown} | {meaning} |")
    return "\n".join(lines)


def _format_default(value: Any) -> str:
    return "empty" if value in ("", []) else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _type_name(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(args[0])
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is tuple:
        return f"{_type_name(args[0])}, ..."
    if origin in (Union, types.UnionType):
        return " | ".join(map(_type_name, args))
    return str(getattr(annotation, "__name__", annotation))
