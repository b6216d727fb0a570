"""A CPU that rounds the operands of products as an accelerator does, wherever a product's precision allows it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.interpreters import mlir

EXACT = (jax.lax.Precision.HIGHEST,) * 2
MANTISSA = {"bfloat16": 7, "tf32": 10}  # bits
PRODUCTS = (jax.lax.dot_general_p, jax.lax.conv_general_dilated_p)


@contextlib.contextmanager
def rounded_products(kind: str) -> Iterator[list[str]]:
    """Let this process's CPU round both operands of each float32 product to bfloat16 or TF32, unless it is HIGHEST.

    Sums stay float32, as on accelerators. The rounding is part of the lowering, so that it reaches every product of a
    program, whatever loop, branch or gradient it is in. Yields a list that grows by a name for each rounded product.
    """
    from jax._src.interpreters import mlir as private  # the rules that are replaced can be read only there

    rules, rounded = private._platform_specific_lowerings["cpu"], []
    originals = {product: rules.get(product) for product in PRODUCTS}

    def replace(product: Any) -> None:
        original = (originals[product] or private._lowerings[product]).rule

        def lower(ctx: Any, left: Any, right: Any, *, precision: Any, **params: Any) -> Any:
            types = {aval.dtype.name for aval in ctx.avals_in}
            if precision == EXACT or types != {"float32"}:
                return original(ctx, left, right, precision=precision, **params)
            rounded.append(product.name)

            def compute(left: jax.Array, right: jax.Array) -> jax.Array:
                operands = (jax.lax.reduce_precision(x, 8, MANTISSA[kind]) for x in (left, right))
                return product.bind(*operands, precision=EXACT, **params)  # type: ignore[no-any-return]

            return mlir.lower_fun(compute, multiple_results=False)(ctx, left, right)

        mlir.register_lowering(product, lower, platform="cpu")

    jax.clear_caches()
    try:
        for product in PRODUCTS:
            replace(product)
        yield rounded
    finally:
        for product, original in originals.items():
            if original is None:
                del rules[product]
            else:
                rules[product] = original
        jax.clear_caches()
