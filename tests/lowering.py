"""What a jitted program becomes on an accelerator: the precision of its products, and its text for TPUs and GPUs."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
PLATFORMS = ("tpu", "cuda")
HIGHEST = (jax.lax.Precision.HIGHEST,) * 2


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yield every equation of a program, with those of its loops, branches and calls."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def precisions(traced: Any) -> list[Any]:
    """List the precision of each product of floats of a traced program; None if the code names none."""
    found = [e for e in equations(traced.jaxpr.jaxpr) if e.primitive.name in PRODUCTS]
    return [e.params["precision"] for e in found if e.invars[0].aval.dtype.kind == "f"]


def check_accelerator_text(traced: Any, latents: int) -> None:
    """Check that nothing in the program's text calls the host or suits a CPU alone.

    Args:
      latents: no sort may be over an axis of so many numbers, and no top_k over more than two axes of them.
    """
    for platform in PLATFORMS:
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "callback" not in text
        assert "headsteer_" not in text, "a function that only CPUs have"
        assert not re.search(r"tensor<[0-9x]*f64>", text)
        for line in re.findall(r".*chlo\.top_k.*", text):
            shape = re.search(r": tensor<([0-9x]+)xf32>", line)[1].split("x")
            assert len(shape) == 2, f"{platform}: a top_k over more than two axes is a full sort: {line}"
        sorts = re.findall(r"stablehlo\.sort\"?\(.*?\}\) .*?: \((.*?)\) ->", text, re.DOTALL)
        assert not [operands for operands in sorts if re.search(rf"x{latents}x?[if]32", operands)]


class HaltError(Exception):
    """Ends a function once it has made its program."""


def capture_program(monkeypatch: pytest.MonkeyPatch, module: Any, make: Callable[[], Any]) -> Any:
    """Return the jitted function that `make` passes to the module's `per_image_program`, without running it."""
    programs, original = [], module.per_image_program

    def spy(*arguments: Any, **options: Any) -> Any:
        programs.append(original(*arguments, **options))
        return programs[-1]

    def halt(*_: Any, **__: Any) -> None:
        raise HaltError

    with monkeypatch.context() as patch:
        patch.setattr(module, "per_image_program", spy)
        patch.setattr(module, "run_over_split", halt, raising=False)
        with contextlib.suppress(HaltError):
            make()
    (program,) = programs
    return program.run
