"""Rendering of the templates in `templates/`."""

from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from headsteer_jax.report.style import format_heads, format_number, format_signed


def render_template(template: str, /, **values: Any) -> str:
    """Render a template by its file name.

    In HTML, values are escaped. A name that the template uses and `values` lacks is an error.
    """
    environment = Environment(
        autoescape=".html." in template, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": format_number, "signed": format_signed, "heads": format_heads}
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    text = resources.files(__package__).joinpath(f"templates/{template}").read_text("utf-8")
    return environment.from_string(text).render(**values)
