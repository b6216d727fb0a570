"""Rendering of the templates in `templates/`."""

from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from headsteer_jax.report.claims import group_claims, word_verdict
from headsteer_jax.report.strategies import describe_strategies
from headsteer_jax.report.style import format_heads, format_number, format_signed


def render_template(template: str, /, **values: Any) -> str:
    """Render a template by its file name.

    In HTML, values are escaped. A name that the template uses and `values` lacks is an error.
    """
    environment = Environment(
        loader=FunctionLoader(_read_template), autoescape=".html." in template, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": format_number, "signed": format_signed, "heads": format_heads}
    environment.globals |= {"verdict": word_verdict, "groups": group_claims, "describe": describe_strategies}
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template(template).render(**values)


def _read_template(name: str) -> str:
    """Read a template, or a part that templates include, by its file name."""
    return resources.files(__package__).joinpath(f"templates/{name}").read_text("utf-8")
