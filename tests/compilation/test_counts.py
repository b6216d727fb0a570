"""What is read from a compiled program's text and from a trace, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from headsteer_jax.compilation.hlo import summarise_program
from headsteer_jax.compilation.products import count_product_flops

PROGRAM = """HloModule jit_steps

%condition (arg: (s32[], f32[4,8])) -> pred[] {
  %arg = (s32[], f32[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %n = s32[] constant(25)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%async.1 (p: f32[2,8]) -> f32[8,8] {
  %p = f32[2,8]{1,0} parameter(0)
  ROOT %gather = f32[8,8]{1,0} all-gather(%p), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
}

%async.2 (p: f32[2,8]) -> f32[8,8] {
  %p.2 = f32[2,8]{1,0} parameter(0)
  ROOT %gather.2 = f32[8,8]{1,0} all-gather(%p.2), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
}

%all-reduce-scatter.1 (p: f32[8,8]) -> f32[2,8] {
  %p.3 = f32[8,8]{1,0} parameter(0)
  ROOT %sum = f32[8,8]{1,0} all-reduce(%p.3), channel_id=4, replica_groups={{0,1,2,3}}, to_apply=%add
}

%body (arg.2: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %arg.2 = (s32[], f32[4,8]) parameter(0)
  %start = f32[8,8]{1,0} fusion(%arg.2), calls=%async.1, backend_config={"estimated_cycles":"100"}
  %done = f32[8,8]{1,0} fusion(%start), calls=%async.2
  %scatter = f32[2,8]{1,0} fusion(%done), calls=%all-reduce-scatter.1
  %both = (bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, f32[3]{0}) all-reduce(%done, %done), channel_id=5, to_apply=%add
  ROOT %result = (s32[], f32[4,8]) tuple(%arg.2)
}

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %loop = (s32[], f32[4,8]) while(%x), condition=%condition, body=%body
  %moved = (f32[4,8], f32[4,8], u32[], u32[]) collective-permute-start(%x), channel_id=6, source_target_pairs={{0,1}}
  %summed = ((f32[3]{0}), f32[3]{0}) all-reduce-start(%x), channel_id=8, to_apply=%add
  %gathered = ((f32[2], bf16[2]), (f32[8], bf16[8])) all-gather-start(%x), channel_id=9, replica_groups=[1,4]<=[4]
  %parts = f32[4,8] reduce-scatter(%x), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %y = f32[4,8]{1,0} copy(%x), backend_config={"estimated_cycles":"7"}
}
"""


def test_a_text_is_summed_over_the_turns_of_its_loop() -> None:
    totals = summarise_program(PROGRAM)
    assert totals.cycles == 25 * 100 + 7
    assert totals.collectives["all-gather"] == (25 + 1, 25 * 8 * 8 * 4 + 8 * 6)  # once, though two fusions have it
    assert totals.collectives["all-reduce"] == (25 + 1, 25 * (4 * 8 * 2 + 3 * 4) + 3 * 4)
    assert totals.collectives["reduce-scatter"] == (25 + 1, 25 * 8 * 8 * 4 + 4 * (4 * 8 * 4))
    assert totals.collectives["collective-permute"][0] == 1
    assert totals.collectives["collective-permute"][1] == pytest.approx(4 * 8 * 4, abs=8)


def test_a_compiled_loop_is_read() -> None:
    def run(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jnp.sin(x), None), x, None, length=13)[0]

    assert summarise_program(jax.jit(run).lower(jnp.ones(8)).compile().as_text() or "").collectives == {}


def product_flops(function: object, *shapes: tuple[int, ...]) -> float:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count_product_flops(jax.jit(function).trace(*arguments).jaxpr)  # type: ignore[call-overload]


def test_products_are_counted_with_the_turns_of_loops() -> None:
    one = 2 * 8 * 16 * 16

    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=7)[0]

    assert product_flops(run, (8, 16), (16, 16)) == 7 * one
    gradient = jax.grad(lambda w, x: jnp.sum(jnp.sin(x @ w)))
    assert product_flops(gradient, (16, 16), (8, 16)) == 2 * one  # the product, and the gradient of w
    batched = product_flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (5, 2, 3), (5, 3, 4))
    assert batched == 2 * 5 * 2 * 3 * 4
    branches = [lambda x, w: x @ w, lambda x, w: x]
    assert product_flops(lambda x, w: jax.lax.cond(x[0, 0] > 0, *branches, x, w), (8, 16), (16, 16)) == one


def test_products_of_all_devices_are_counted() -> None:
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    specs = (PartitionSpec("data"), PartitionSpec())
    run = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    assert product_flops(run, (8, 16), (16, 16)) == 2 * 8 * 16 * 16
