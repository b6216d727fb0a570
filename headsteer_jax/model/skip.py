"""A forward pass that leaves out what thresholded gates drop, with the results of the masked model.

XLA's shapes are static, but the number of kept tokens is not. So the work of a layer is cut into pieces of a few static
sizes, and loops, whose lengths depend on the gates, run only the pieces that are needed:

- Attention takes groups of images. The images whose attention runs are sorted by their kept tokens. A piece takes the
  next few of them with their kept tokens only, filled up to one of a few lengths, and masks the keys that fill it up.
- The MLP takes rows. The kept tokens of all images whose MLP runs are one list of rows, which is cut into pieces.

The residual stays one array of B T rows, from which a piece gathers its rows and to which it writes them back. An image
whose attention or MLP is off has no rows there and costs nothing. A layer that drops no token and no sublayer runs the
ordinary block. Pieces of 512 rows stay in a CPU's cache; smaller ones were slower per row.

No gate goes to the host: a layer is one program, which also compiles for GPUs and TPUs and can be exported. Closed
heads are multiplied by zero, because without them attention would save a sixth of the model's work at most, and
grouping images by their patterns of heads ran slower than the dense model.

Axes: as in `vit.py`; b images and t tokens of a piece of attention, r rows of a piece of the MLP, N = B T rows.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from headsteer_jax.config.schema import GateKind
from headsteer_jax.model.gates import Gates
from headsteer_jax.model.vit import ALL_OPEN, Block, Intervention, ViT, decide_gates, describe_gates, run_block

ROWS = 512  # of a whole piece
LENGTHS = 12  # a piece of attention is filled up to a multiple of T / LENGTHS tokens
ROW_SIZES = 4  # the last piece of the MLP may be this many times smaller

Forward = Callable[[Any, jax.Array], tuple[jax.Array, dict[str, Any]]]


class Pieces(NamedTuple):
    """The static sizes of the pieces into which a layer's work is cut."""

    tokens: tuple[int, ...]  # t, ascending; the last is T
    images: tuple[tuple[int, int], ...]  # for each t, b of a whole piece and of one when few images are left
    rows: tuple[int, ...]  # r, ascending


def plan_pieces(batch: int, tokens: int, prefix: int = 1) -> Pieces:
    """Choose the sizes of the pieces for a batch of B images of T tokens each, of which `prefix` are always kept."""
    rows, step = min(ROWS, batch * tokens), math.ceil(tokens / LENGTHS)
    lengths = (*(t for t in range(step, tokens, step) if t >= prefix), tokens)
    images = [min(batch, max(1, rows // t)) for t in lengths]
    part = math.ceil(rows / ROW_SIZES)
    return Pieces(
        lengths,
        tuple((b, b // 4 if b >= 4 else b) for b in images),
        tuple(sorted({min(rows, part * count) for count in range(1, ROW_SIZES + 1)})),
    )


class BlockCall(NamedTuple):
    """A block with its parameters, whose methods may be called inside of loops."""

    block: Block
    params: Any

    def __call__(self, method: str | Callable[..., Any], *args: Any) -> Any:
        """Call a method of the block, by its name, or a function of the block."""
        return self.block.apply({"params": self.params}, *args, method=method)


class KeptTokens(NamedTuple):
    """Says which tokens of each image take part in a sublayer."""

    order: jax.Array  # [B, T], the places of an image's kept tokens, then those of the others, each ascending
    counts: jax.Array  # [B], the number of kept tokens; 0 if the image leaves the sublayer out

    def only(self, runs_B: jax.Array) -> "KeptTokens":
        """Leave out the images for which the sublayer is off."""
        return KeptTokens(self.order, jnp.where(runs_B, self.counts, 0))


def order_tokens(keep_BT: jax.Array) -> KeptTokens:
    """Sort each image's tokens by whether they are kept."""
    order_BT = jnp.argsort(~keep_BT, axis=1, stable=True).astype(jnp.int32)
    return KeptTokens(order_BT, keep_BT.sum(axis=1, dtype=jnp.int32))


def attend_kept(
    call: BlockCall, x_ND: jax.Array, tokens: KeptTokens, heads: Gates, pieces: Pieces, queries: int | None
) -> jax.Array:
    """Add the output of attention to the kept tokens, piece by piece.

    Args:
      heads: the gates of the heads, or nothing.
      queries: the number of an image's tokens, from CLS on, that get a result; None: all kept tokens.
    """
    (B, T), prefix = tokens.order.shape, 1 + call.block.model.registers
    images_B = jnp.argsort(-tokens.counts, stable=True).astype(jnp.int32)
    images_B = jnp.pad(images_B, (0, max(b for b, _ in pieces.images)), constant_values=B)
    total = jnp.sum(tokens.counts > 0, dtype=jnp.int32)

    def compute_piece(t: int, b: int, begin: jax.Array, x_ND: jax.Array) -> tuple[jax.Array, ...]:
        image_b = jax.lax.dynamic_slice(images_B, (begin,), (b,))
        own_b = jnp.minimum(image_b, B - 1)
        count_b = jnp.where(image_b < B, tokens.counts[own_b], 0)
        kept_bt = jnp.arange(t) < count_b[:, None]
        rows_bt = own_b[:, None] * T + tokens.order[own_b, :t]
        x_btD = x_ND.at[rows_bt].get(mode="clip")
        y_bqHK, v_bqHK = call("heads", x_btD, queries, {"tokens": kept_bt[:, prefix:].astype(jnp.float32)})
        own_heads = {kind: g[own_b] for kind, g in heads.items()}
        new_bqD = call("add_attention", x_btD[:, :queries], y_bqHK, v_bqHK, own_heads)
        target_bq = jnp.where(kept_bt, rows_bt, B * T)[:, :queries]
        return begin + b, *_fill_up(new_bqD, target_bq, most_rows, B * T)

    pairs = list(zip(pieces.tokens, pieces.images, strict=True))
    sizes = sorted({(t, b) for t, choices in pairs for b in choices})
    most_rows = max(b * (queries or t) for t, b in sizes)
    branches = [functools.partial(compute_piece, t, b) for t, b in sizes]
    branch_of = jnp.asarray([[sizes.index((t, b)) for b in choices] for t, choices in pairs], jnp.int32)
    lengths, images = jnp.asarray(pieces.tokens, jnp.int32), jnp.asarray([b for b, _ in pieces.images], jnp.int32)

    def run_next(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        begin, x_ND = state
        length = jnp.searchsorted(lengths, tokens.counts[images_B[begin]])  # the first image has the most tokens
        few = (total - begin < images[length]).astype(jnp.int32)
        begin, new_rD, target_r = jax.lax.switch(branch_of[length, few], branches, begin, x_ND)
        return begin, x_ND.at[target_r].set(new_rD, mode="drop", unique_indices=True)

    return jax.lax.while_loop(lambda state: state[0] < total, run_next, (jnp.int32(0), x_ND))[1]


def _fill_up(new_rD: jax.Array, target_r: jax.Array, count: int, outside: int) -> tuple[jax.Array, jax.Array]:
    """Fill up a piece's new rows [..., D] and their places [...] to one number of rows for all sizes of pieces.

    They are written where the loop goes on, because a branch that writes them itself copies the whole residual.

    Args:
      outside: the place of a row that is not written.
    """
    new_rD, target_r = new_rD.reshape(-1, new_rD.shape[-1]), target_r.reshape(-1)
    missing = count - len(target_r)
    return jnp.pad(new_rD, ((0, missing), (0, 0))), jnp.pad(target_r, (0, missing), constant_values=outside)


def feed_forward_kept(call: BlockCall, x_ND: jax.Array, tokens: KeptTokens, heads: Gates, pieces: Pieces) -> jax.Array:
    """Add the output of the MLP to the kept tokens, piece by piece.

    Args:
      heads: the gates of the heads that gate the MLP's input as well, or nothing.
    """
    B, T = tokens.order.shape
    end_B = jnp.cumsum(tokens.counts)
    total, sizes = end_B[-1], jnp.asarray(pieces.rows, jnp.int32)

    def compute_piece(r: int, begin: jax.Array, x_ND: jax.Array) -> tuple[jax.Array, ...]:
        number_r = begin + jnp.arange(r, dtype=jnp.int32)
        image_r = jnp.minimum(jnp.searchsorted(end_B, number_r, side="right"), B - 1).astype(jnp.int32)
        place_r = jnp.clip(number_r - (end_B - tokens.counts)[image_r], 0, T - 1)
        row_r = image_r * T + tokens.order[image_r, place_r]
        own_heads = {kind: g[image_r] for kind, g in heads.items()}
        new_r1D = call("feed_forward", x_ND.at[row_r].get(mode="clip")[:, None], own_heads)
        target_r = jnp.where(number_r < total, row_r, B * T)
        return begin + r, *_fill_up(new_r1D, target_r, pieces.rows[-1], B * T)

    branches = [functools.partial(compute_piece, r) for r in pieces.rows]

    def run_next(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        begin, x_ND = state
        size = jnp.minimum(jnp.searchsorted(sizes, total - begin), len(pieces.rows) - 1)
        begin, new_rD, target_r = jax.lax.switch(size, branches, begin, x_ND)
        return begin, x_ND.at[target_r].set(new_rD, mode="drop", unique_indices=True)

    return jax.lax.while_loop(lambda state: state[0] < total, run_next, (jnp.int32(0), x_ND))[1]


def _run_pieces(call: BlockCall, x_BTD: jax.Array, keep_BT: jax.Array, gates: Gates, last: bool) -> jax.Array:
    """Run a block for the kept tokens of the images whose sublayers are on."""
    (B, T, D), dropped = x_BTD.shape, call.block.gate.dropped
    pieces, tokens = plan_pieces(B, T, 1 + call.block.model.registers), order_tokens(keep_BT)
    on_B2 = gates["sublayers"] > 0 if "sublayers" in gates else jnp.ones((B, 2), bool)
    heads: Gates = {"heads": gates["heads"]} if "heads" in gates else ALL_OPEN
    attends_B, x_ND = on_B2[:, 0], x_BTD.reshape(B * T, D)
    if heads and dropped != "identity":  # with no head, attention only adds the bias of its output
        attends_B = attends_B & jnp.any(heads["heads"] > 0, axis=1)
        biased_N = ((on_B2[:, 0] & ~attends_B)[:, None] & keep_BT).reshape(B * T, 1)
        bias_D = call.params["out"]["bias"].astype(call.block.model.dtype)
        x_ND = jax.lax.cond(biased_N.any(), lambda x_ND: x_ND + biased_N * bias_D, lambda x_ND: x_ND, x_ND)
    x_ND = attend_kept(call, x_ND, tokens.only(attends_B), heads, pieces, 1 if last else None)
    if last:  # CLS alone is too little work for pieces
        masks = {kind: g for kind, g in gates.items() if kind != "tokens"}
        return call("feed_forward", x_ND.reshape(B, T, D)[:, :1], masks)
    sliced = heads if dropped == "slice" else ALL_OPEN
    return feed_forward_kept(call, x_ND, tokens.only(on_B2[:, 1]), sliced, pieces).reshape(B, T, D)


def run_layer(call: BlockCall, x_BTD: jax.Array, last: bool) -> tuple[jax.Array, dict[str, Any]]:
    """Run one layer without what its gates drop -> the residual after it, and the layer's entries of `out`.

    Args:
      last: whether it is the model's last layer, which computes CLS alone.
    """
    decided = call(lambda block: decide_gates(block, x_BTD, "thresholded", ALL_OPEN, Intervention()))
    logits, gates = decided[1:]
    layer_out: dict[str, Any] = {"cls": x_BTD[:, 0]}
    if gates:
        layer_out |= {"gate_logits": logits, "gates": describe_gates(logits, gates)}
    heads: Gates = {"heads": gates["heads"]} if "heads" in gates else ALL_OPEN

    def run_all(x_BTD: jax.Array) -> jax.Array:
        return call(lambda block: run_block(block, x_BTD, heads, 1 if last else None))

    if not {"tokens", "sublayers"} & set(gates):
        return run_all(x_BTD), layer_out
    (B, T), prefix = x_BTD.shape[:2], 1 + call.block.model.registers
    keep_BT = (
        jnp.ones((B, T), bool).at[:, prefix:].set(gates["tokens"] > 0) if "tokens" in gates else jnp.ones((B, T), bool)
    )
    nothing_dropped = keep_BT.all() & (gates["sublayers"] > 0).all() if "sublayers" in gates else keep_BT.all()
    x_BTD = jax.lax.cond(nothing_dropped, run_all, lambda x_BTD: _run_pieces(call, x_BTD, keep_BT, gates, last), x_BTD)
    return x_BTD, layer_out


def _make_call(model: ViT, kinds: tuple[GateKind, ...], layer_params: Any) -> BlockCall:
    return BlockCall(Block(model.model, model.gate, kinds, parent=None), layer_params)


def make_skipping_forward(model: ViT) -> Forward:
    """Make a function `(params, images) -> (logits [B, C], out)` that skips what thresholded gates drop.

    It returns what `model.apply(params, images, gating="thresholded")` returns, up to rounding; logits, residuals and
    gates of all layers are computed. The host calls one compiled program a layer, with the layer's parameters as an
    argument, so that layers that are alike share a program. A program is compiled once for each size of batch.
    """
    embed = jax.jit(functools.partial(model.apply, method="embed"))
    classify = jax.jit(lambda params, x_BTD: model.apply(params, x_BTD[:, 0], method="classify"))

    @functools.partial(jax.jit, static_argnums=(2, 3))
    def layer_program(
        layer_params: Any, x_BTD: jax.Array, kinds: tuple[GateKind, ...], last: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        return run_layer(_make_call(model, kinds, layer_params), x_BTD, last)

    def forward(params: Any, images_BHWC: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        x_BTD = embed(params, images_BHWC)
        out: dict[str, Any] = {"cls": {}, "gate_logits": {}, "gates": {}}
        for layer in range(model.model.depth):
            layer_params, last = params["params"][f"layers_{layer}"], layer == model.model.depth - 1
            x_BTD, layer_out = layer_program(layer_params, x_BTD, model.gate.kinds_in(layer), last)
            for name, value in layer_out.items():
                out[name][layer] = value
        return classify(params, x_BTD), out

    return forward


def make_skipping_program(model: ViT) -> Forward:
    """Make the same function as `make_skipping_forward` as one program for `jax.jit` and `jax.export`.

    Layers that are alike are a loop over their stacked parameters, because a program with every layer's branches takes
    minutes to compile. Stacking copies the parameters in each call, so on a CPU `make_skipping_forward` is faster. The
    number of images must be static.
    """
    depth, gate = model.model.depth, model.gate
    alike = range(max(gate.settings(kind).first_layer for kind in gate.kinds), depth - 1)

    def forward(params: Any, images_BHWC: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        x_BTD = model.apply(params, images_BHWC, method="embed")
        out: dict[str, Any] = {"cls": {}, "gate_logits": {}, "gates": {}}

        def run(x_BTD: jax.Array, layer: int) -> jax.Array:
            call = _make_call(model, gate.kinds_in(layer), params["params"][f"layers_{layer}"])
            x_BTD, layer_out = run_layer(call, x_BTD, layer == depth - 1)
            for name, value in layer_out.items():
                out[name][layer] = value
            return x_BTD

        for layer in range(alike.start if alike else depth - 1):
            x_BTD = run(x_BTD, layer)
        if alike:
            params_of_layers = [params["params"][f"layers_{layer}"] for layer in alike]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params_of_layers)

            def run_alike(x_BTD: jax.Array, layer_params: Any) -> tuple[jax.Array, dict[str, Any]]:
                return run_layer(_make_call(model, gate.kinds_in(alike.start), layer_params), x_BTD, False)

            x_BTD, by_layer = jax.lax.scan(run_alike, x_BTD, stacked)
            for name, values in by_layer.items():
                out[name] |= {layer: jax.tree.map(lambda leaf, i=i: leaf[i], values) for i, layer in enumerate(alike)}
        return model.apply(params, run(x_BTD, depth - 1)[:, 0], method="classify"), out

    return forward
