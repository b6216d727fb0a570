"""A forward pass that leaves out what thresholded gates drop, with the results of the masked model.

XLA's shapes are static, but the number of kept tokens is not. So the work of a layer is cut into pieces of a few static
sizes, and each size has a loop that runs as many of its pieces as the gates require:

- Attention takes groups of images. The images whose attention runs are sorted by their kept tokens. A piece takes the
  next few of them with their kept tokens only, filled up to one of a few lengths, and masks the keys that fill it up.
- The MLP takes rows. The kept tokens of all images whose MLP runs are one list of rows, which is cut into pieces.

The residual stays one array of N = B T rows, which the loops carry and change in place: a piece gathers its rows and
writes them back. An image whose attention or MLP is off has no rows there and costs nothing.

A layer is two programs, which also compile for GPUs and TPUs and can be exported as parts of one. The gates stay on the
device, except that small batches ask how much they keep. Closed heads are multiplied by zero, because without them
attention would save a sixth of the model's work at most, and grouping images by their patterns of heads ran slower than
the dense model.

Axes: as in `vit.py`; b images and t tokens of a piece of attention, r rows of a piece of the MLP, N = B T rows.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp

from headsteer_jax.config.schema import GateKind, ModelConfig
from headsteer_jax.model.gates import Gates
from headsteer_jax.model.vit import ALL_OPEN, Block, Intervention, ViT, decide_gates, describe_gates, run_block

# Of a piece's widest intermediate: 1.5 MB in float32, which a core's cache holds. A ViT-S's MLP ran at 216 GFLOP/s on
# pieces of this size, 256 rows, and at 155 on 512 rows.
VALUES = 393_216
LENGTHS = 8  # a piece of attention is filled up to a multiple of T / LENGTHS tokens
PARTS = 4  # the last piece may be this many times smaller than the others

# Multiply-accumulates of a layer for the batch, from which on it is cut into pieces. An estimate: 250 digits, with 390
# million, gained little, and one image of a ViT-S at 65 tokens, with 118 million, ran 0.9 to 1.15 times as fast.
SMALLEST = 150e6

# In a batch of at most so many rows, a layer of which more than this share of the rows takes part runs as masked, or as
# dense if nothing is dropped: its loops would take longer than they save. This costs a wait for each layer's gates.
# Larger batches run pieces even if nothing is dropped, because these fit in the cache.
SMALL_ROWS = 1024
MASKED_SHARE = 0.8

LayerForm = Literal["kept", "masked", "dense"]

Forward = Callable[[Any, jax.Array], tuple[jax.Array, dict[str, Any]]]


class Pieces(NamedTuple):
    """The static sizes of the pieces into which a layer's work is cut, the largest first."""

    attention: tuple[tuple[int, tuple[int, ...]], ...]  # each t with its b
    mlp: tuple[int, ...]  # r


def plan_pieces(model: ModelConfig, batch: int, tokens: int) -> Pieces:
    """Choose the sizes of the pieces for a batch of B images of T tokens each."""
    step, shortest = math.ceil(tokens / LENGTHS), 1 + model.registers
    rows = VALUES / max(4 * model.width, round(model.mlp_ratio * model.width))
    lengths = sorted({tokens, *(t for t in range(step, tokens, step) if t >= shortest)}, reverse=True)
    images = [min(batch, max(1, round(rows / t))) for t in lengths]
    most = min(batch * tokens, max(1, round(rows)))
    return Pieces(
        tuple((t, (b, b // PARTS) if b >= PARTS else (b,)) for t, b in zip(lengths, images, strict=True)),
        tuple(sorted({math.ceil(most * part / PARTS) for part in range(1, PARTS + 1)}, reverse=True)),
    )


def is_worthwhile(model: ModelConfig, batch: int, tokens: int) -> bool:
    """Return whether a layer has so much work for a batch that pieces can save more than their loops take."""
    width, hidden = model.width, round(model.mlp_ratio * model.width)
    return batch * tokens * (4 * width**2 + 2 * width * hidden + 2 * tokens * width) >= SMALLEST


class BlockCall(NamedTuple):
    """A block with its parameters, whose methods may be called inside of loops."""

    block: Block
    params: Any

    def __call__(self, method: str | Callable[..., Any], *args: Any) -> Any:
        """Call a method of the block, by its name, or a function of the block."""
        return self.block.apply({"params": self.params}, *args, method=method)


class KeptRows(NamedTuple):
    """Lists the rows of the residual that take part in a sublayer, image by image."""

    numbers: jax.Array  # [N + T], ascending; filled up with N
    begin: jax.Array  # [B + 1], where an image's rows begin in the list; the last is the number of rows
    counts: jax.Array  # [B + 1], the number of an image's rows; the last is 0


def list_rows(keep_BT: jax.Array) -> KeptRows:
    """List the rows of the kept tokens."""
    B, T = keep_BT.shape
    count_B = keep_BT.sum(axis=1, dtype=jnp.int32)
    begin = jnp.pad(jnp.cumsum(count_B), (1, 0))
    place_BT = begin[:-1, None] + jnp.cumsum(keep_BT, axis=1, dtype=jnp.int32) - 1
    place_N = jnp.where(keep_BT, place_BT, B * T + T).reshape(-1)
    rows = jnp.full(B * T + T, B * T, jnp.int32).at[place_N].set(jnp.arange(B * T, dtype=jnp.int32), mode="drop")
    return KeptRows(rows, begin, jnp.pad(count_B, (0, 1)))


State = tuple[jax.Array, jax.Array]  # what is done, and the residual x_ND


def run_loops(
    run_piece: Callable[[int, State], State], sizes: tuple[int, ...], total: jax.Array, end: jax.Array, state: State
) -> State:
    """Run pieces of these sizes, the largest first, until all before `end` is done.

    A size has a loop, which runs while the next smaller size would not hold the rest. A branch for each size was slower
    on a CPU, and a branch that writes copies the residual.

    Args:
      run_piece: does the next piece of a size.
      total: what there is to do in all; the pieces may go on from `end` to it.
    """
    for size, smaller in zip(sizes, (*sizes[1:], 0), strict=True):

        def is_needed(state: State, smaller: int = smaller) -> jax.Array:
            return (state[0] < end) & (total - state[0] > smaller)

        state = jax.lax.while_loop(is_needed, functools.partial(run_piece, size), state)
    return state


def attend_kept(
    call: BlockCall, x_ND: jax.Array, kept_rows: KeptRows, heads: Gates, pieces: Pieces, queries: int | None
) -> jax.Array:
    """Add the output of attention to the kept tokens, piece by piece.

    Args:
      heads: the gates of the heads, or nothing.
      queries: the number of an image's tokens, from CLS on, that get a result; None: all kept tokens.
    """
    B, N, prefix = len(kept_rows.counts) - 1, len(x_ND), 1 + call.block.model.registers
    most = max(sizes[0] for _, sizes in pieces.attention)
    images = jnp.pad(jnp.argsort(-kept_rows.counts[:-1], stable=True).astype(jnp.int32), (0, most), constant_values=B)

    def run_piece(t: int, b: int, state: State) -> State:
        begin, x_ND = state
        image_b = jax.lax.dynamic_slice(images, (begin,), (b,))
        kept_bt = jnp.arange(t) < kept_rows.counts[image_b][:, None]
        row_bt = kept_rows.numbers[kept_rows.begin[image_b][:, None] + jnp.arange(t)]
        x_btD = x_ND.at[row_bt].get(mode="clip")
        y_bqHK, v_bqHK = call("heads", x_btD, queries, {"tokens": kept_bt[:, prefix:].astype(jnp.float32)})
        own_heads = {kind: g.at[image_b].get(mode="clip") for kind, g in heads.items()}
        new_bqD = call("add_attention", x_btD[:, :queries], y_bqHK, v_bqHK, own_heads)
        target_bq = jnp.where(kept_bt, row_bt, N)[:, :queries]
        return begin + b, x_ND.at[target_bq].set(new_bqD, mode="drop", unique_indices=True)

    state, total = (jnp.int32(0), x_ND), jnp.sum(kept_rows.counts > 0, dtype=jnp.int32)
    shorter = (*(t for t, _ in pieces.attention[1:]), 0)
    for (t, sizes), next_t in zip(pieces.attention, shorter, strict=True):
        end = jnp.sum(kept_rows.counts > next_t, dtype=jnp.int32)  # of the images that are longer than the next length
        state = run_loops(functools.partial(run_piece, t), sizes, total, end, state)
    return state[1]


def feed_forward_kept(call: BlockCall, x_ND: jax.Array, kept_rows: KeptRows, heads: Gates, pieces: Pieces) -> jax.Array:
    """Add the output of the MLP to the kept tokens, piece by piece.

    Args:
      heads: the gates of the heads that gate the MLP's input as well, or nothing.
    """
    N, T, total = len(x_ND), len(x_ND) // (len(kept_rows.counts) - 1), kept_rows.begin[-1]
    rows = jnp.pad(kept_rows.numbers, (0, pieces.mlp[0]), constant_values=N)

    def run_piece(r: int, state: State) -> State:
        begin, x_ND = state
        row_r = jax.lax.dynamic_slice(rows, (begin,), (r,))
        own_heads = {kind: g.at[row_r // T].get(mode="clip") for kind, g in heads.items()}
        new_r1D = call("feed_forward", x_ND.at[row_r].get(mode="clip")[:, None], own_heads)
        return begin + r, x_ND.at[row_r].set(new_r1D[:, 0], mode="drop", unique_indices=True)

    return run_loops(run_piece, pieces.mlp, total, total, (jnp.int32(0), x_ND))[1]


def _run_pieces(call: BlockCall, x_BTD: jax.Array, keep_BT: jax.Array, gates: Gates, last: bool) -> jax.Array:
    """Run a block for the kept tokens of the images whose sublayers are on."""
    (B, T, D), dropped = x_BTD.shape, call.block.gate.dropped
    pieces = plan_pieces(call.block.model, B, T)
    on_B2 = gates["sublayers"] > 0 if "sublayers" in gates else jnp.ones((B, 2), bool)
    heads: Gates = {"heads": gates["heads"]} if "heads" in gates else ALL_OPEN
    attends_B, x_ND = on_B2[:, 0], x_BTD.reshape(B * T, D)
    if heads and dropped != "identity":  # with no head, attention only adds the bias of its output
        attends_B = attends_B & jnp.any(heads["heads"] > 0, axis=1)
        biased_N = ((on_B2[:, 0] & ~attends_B)[:, None] & keep_BT).reshape(B * T, 1)
        bias_D = call.params["out"]["bias"].astype(call.block.model.dtype)
        x_ND = jax.lax.cond(biased_N.any(), lambda x_ND: x_ND + biased_N * bias_D, lambda x_ND: x_ND, x_ND)
    x_ND = attend_kept(call, x_ND, list_rows(keep_BT & attends_B[:, None]), heads, pieces, 1 if last else None)
    if last:  # CLS alone is too little work for pieces
        masks = {kind: g for kind, g in gates.items() if kind != "tokens"}
        return call("feed_forward", x_ND.reshape(B, T, D)[:, :1], masks)
    sliced = heads if dropped == "slice" else ALL_OPEN
    return feed_forward_kept(call, x_ND, list_rows(keep_BT & on_B2[:, 1:]), sliced, pieces).reshape(B, T, D)


class Decided(NamedTuple):
    """What the gates of a layer decided."""

    keep: jax.Array  # [B, T] bool: which tokens take part
    gates: dict[str, jax.Array]
    out: dict[str, Any]  # the layer's entries of the forward pass's `out`
    share: jax.Array  # of the dense layer's rows, those that attention and the MLP take part in
    all_open: jax.Array  # bool: nothing is dropped, no head either


def decide_layer(call: BlockCall, x_BTD: jax.Array) -> Decided:
    """Compute the gates of a layer."""
    decided = call(lambda block: decide_gates(block, x_BTD, "thresholded", ALL_OPEN, Intervention()))
    logits, gates = decided[1:]
    layer_out: dict[str, Any] = {"cls": x_BTD[:, 0]}
    if gates:
        layer_out |= {"gate_logits": logits, "gates": describe_gates(logits, gates)}
    keep_BT = jnp.ones(x_BTD.shape[:2], bool)
    if "tokens" in gates:
        keep_BT = keep_BT.at[:, 1 + call.block.model.registers :].set(gates["tokens"] > 0)
    on_B2 = gates["sublayers"] > 0 if "sublayers" in gates else jnp.ones((len(x_BTD), 2), bool)
    share = jnp.mean(keep_BT[:, None] * on_B2[..., None])
    all_open = jnp.all(jnp.array([jnp.all(g > 0) for g in gates.values()]))
    return Decided(keep_BT, gates, layer_out, share, all_open)


def choose_form(decided: Decided) -> LayerForm:
    """Choose how to run a layer of a small batch; this waits for its gates."""
    all_open, share = jax.device_get((decided.all_open, decided.share))
    if all_open:
        return "dense"  # the same bits as with masks that are 1
    return "masked" if share > MASKED_SHARE else "kept"


def run_whole_layer(call: BlockCall, x_BTD: jax.Array, gates: Gates, last: bool) -> jax.Array:
    """Run one layer with its gates as masks, which leaves nothing out; without gates it is the dense layer."""
    return cast(jax.Array, call(lambda block: run_block(block, x_BTD, gates, 1 if last else None)))


def run_kept_layer(call: BlockCall, x_BTD: jax.Array, decided: Decided, last: bool) -> jax.Array:
    """Run one layer without what its gates drop.

    Args:
      last: whether it is the model's last layer, which computes CLS alone.
    """
    if not {"tokens", "sublayers"} & set(decided.gates):
        return run_whole_layer(call, x_BTD, decided.gates, last)
    return _run_pieces(call, x_BTD, decided.keep, decided.gates, last)


def _make_call(model: ViT, kinds: tuple[GateKind, ...], layer_params: Any) -> BlockCall:
    return BlockCall(Block(model.model, model.gate, kinds, parent=None), layer_params)


class SkippingPrograms(NamedTuple):
    """The jitted functions of which the host calls a few for each batch."""

    run_masked: Any  # (params, images) -> logits, out: the whole masked model
    embed: Any  # (params, images) -> x_BTD
    decide: Any  # (layer's params, x_BTD, kinds) -> Decided
    run_layer: Any  # (layer's params, x_BTD, Decided, kinds, last, form) -> x_BTD
    classify: Any  # (params, x_BTD) -> logits


def jit_skipping_programs(model: ViT) -> SkippingPrograms:
    """Make the programs of a skipping pass: two a layer, one that decides and one that computes.

    The layer's parameters are an argument, so that layers that are alike share a program.
    """

    def decide(layer_params: Any, x_BTD: jax.Array, kinds: tuple[GateKind, ...]) -> Decided:
        return decide_layer(_make_call(model, kinds, layer_params), x_BTD)

    def run_layer(
        layer_params: Any, x_BTD: jax.Array, decided: Decided, kinds: tuple[GateKind, ...], last: bool, form: LayerForm
    ) -> jax.Array:
        call = _make_call(model, kinds, layer_params)
        if form == "kept":
            return run_kept_layer(call, x_BTD, decided, last)
        return run_whole_layer(call, x_BTD, decided.gates if form == "masked" else ALL_OPEN, last)

    return SkippingPrograms(
        jax.jit(functools.partial(model.apply, gating="thresholded")),
        jax.jit(functools.partial(model.apply, method="embed")),
        jax.jit(decide, static_argnums=2),
        jax.jit(run_layer, static_argnums=(3, 4, 5)),
        jax.jit(lambda params, x_BTD: model.apply(params, x_BTD[:, 0], method="classify")),
    )


def make_skipping_forward(model: ViT) -> Forward:
    """Make a function `(params, images) -> (logits [B, C], out)` that skips what thresholded gates drop.

    It returns what `model.apply(params, images, gating="thresholded")` returns, up to rounding; logits, residuals and
    gates of all layers are computed. A program is compiled once for each size of batch. In a small batch a layer that
    drops little runs as a whole, which may compile two more programs when it is first needed, and a batch of too little
    work runs the masked model.
    """
    programs = jit_skipping_programs(model)

    def forward(params: Any, images_BHWC: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        tokens = model.positions_count + model.model.registers
        if not is_worthwhile(model.model, len(images_BHWC), tokens):
            return cast(tuple[jax.Array, dict[str, Any]], programs.run_masked(params, images_BHWC))
        small = len(images_BHWC) * tokens <= SMALL_ROWS
        x_BTD = programs.embed(params, images_BHWC)
        out: dict[str, Any] = {"cls": {}, "gate_logits": {}, "gates": {}}
        for layer in range(model.model.depth):
            layer_params, last = params["params"][f"layers_{layer}"], layer == model.model.depth - 1
            kinds = model.gate.kinds_in(layer)
            decided = programs.decide(layer_params, x_BTD, kinds)
            form = choose_form(decided) if small else "kept"
            x_BTD = programs.run_layer(layer_params, x_BTD, decided, kinds, last, form)
            for name, value in decided.out.items():
                out[name][layer] = value
        return programs.classify(params, x_BTD), out

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
            decided = decide_layer(call, x_BTD)
            for name, value in decided.out.items():
                out[name][layer] = value
            return run_kept_layer(call, x_BTD, decided, layer == depth - 1)

        for layer in range(alike.start if alike else depth - 1):
            x_BTD = run(x_BTD, layer)
        if alike:
            params_of_layers = [params["params"][f"layers_{layer}"] for layer in alike]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params_of_layers)

            def run_alike(x_BTD: jax.Array, layer_params: Any) -> tuple[jax.Array, dict[str, Any]]:
                call = _make_call(model, gate.kinds_in(alike.start), layer_params)
                decided = decide_layer(call, x_BTD)
                return run_kept_layer(call, x_BTD, decided, False), decided.out

            x_BTD, by_layer = jax.lax.scan(run_alike, x_BTD, stacked)
            for name, values in by_layer.items():
                out[name] |= {layer: jax.tree.map(lambda leaf, i=i: leaf[i], values) for i, layer in enumerate(alike)}
        return model.apply(params, run(x_BTD, depth - 1)[:, 0], method="classify"), out

    return forward
