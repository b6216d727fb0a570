"""Counts the FLOPs of a traced program's matrix products, with the turns of its loops.

Compilers count a loop's body once, whatever the number of its turns, so their own count says little about a program
that loops over steps. Two FLOPs are a multiply-accumulate; what is not a product does not count, as in `model/macs.py`.
"""

import math
from collections.abc import Iterator
from typing import Any


def _inner_jaxprs(value: Any) -> Iterator[Any]:
    """Yield the jaxprs in an equation's parameter."""
    if hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield from _inner_jaxprs(value.jaxpr)
    elif isinstance(value, tuple | list):
        for element in value:
            yield from _inner_jaxprs(element)


def _count_product(equation: Any) -> float:
    """Count the FLOPs of a `dot_general`."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)


def count_product_flops(jaxpr: Any) -> float:
    """Count the FLOPs of all products of a jaxpr, on all devices together.

    A `while` loop counts as one turn, and of the branches of a condition the largest counts.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _count_product(equation)
            continue
        inner = [count_product_flops(part) for value in params.values() for part in _inner_jaxprs(value)]
        if name == "cond":
            total += max(inner, default=0.0)
        elif name == "scan":
            total += params["length"] * sum(inner)
        elif name == "shard_map":  # its body has the shapes of one device along the axes that are cut by hand
            axes = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]  # older JAX
            total += sum(inner) * math.prod(params["mesh"].shape[axis] for axis in axes)
        else:
            total += sum(inner)
    return total
