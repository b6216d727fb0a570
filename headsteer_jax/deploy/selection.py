"""Which heads and neurons stay: the loss of every sublayer at several sizes, and the best sizes within a budget.

For each sublayer the features are ordered by what their removal costs (`importance.py`), and the model is run with
that sublayer alone at each of several sizes, its projection refitted. The rise of the loss is the price of the size.
Rises add up roughly, so the sizes of all sublayers within a budget are a knapsack problem, which is solved exactly.

Axes: B images, T tokens, D width, F features, G groups (heads or neurons), C classes.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.deploy.calibration import (
    SUBLAYER_PARAMS,
    Chunk,
    Moments,
    add_projection,
    compute_features,
    count_queries,
    fit_projection,
    sum_moments,
    walk_sublayers,
)
from headsteer_jax.deploy.convert import KeptParts, expand_heads, keep_all
from headsteer_jax.deploy.cost import count_attention_macs, count_fixed_macs, count_macs, count_mlp_macs
from headsteer_jax.deploy.importance import order_removals
from headsteer_jax.deploy.model import DeployedConfig, DeployedModel, classify
from headsteer_jax.deploy.proposals import Proposals

NEURON_STEPS = 24  # the prices of neurons are computed anew each time that 1/24 of them has gone
NEURON_SIZES = (20, 16, 12, 8, 6, 4, 2, 0)  # the sizes of an MLP that are tried, in 24ths
NEURON_MULTIPLE = 8  # sizes of MLPs are multiples of this, which products of matrices on most processors prefer
UNITS = 4096  # of the budget, in the knapsack
DAMPING = 1e-2  # of the refits


class Option(NamedTuple):
    """A size of a sublayer."""

    stay: np.ndarray  # the heads or neurons that stay, ascending
    macs: int
    loss: float  # the rise of the loss if this sublayer alone has this size


Options = list[list[Option]]  # by sublayer, in the order of `walk_sublayers`; the first of each is the whole sublayer


def measure_options(
    model: DeployedModel, images: np.ndarray, scored: np.ndarray, propose_heads: Proposals, advance: Callable[[], None]
) -> Options:
    """Measure what every sublayer costs at several sizes.

    Args:
      model: nothing is cut from it.
      images: training images of the classes, for the second moments.
      scored: training images of the classes, on which the loss is measured.
      propose_heads: sets of heads to try beside those of the order, for instance those that the gates open most.
      advance: called after every sublayer.
    """
    calibrated = walk_sublayers(model, images)
    walk, options = walk_sublayers(model, scored), []
    log_p = jax.nn.log_softmax(_finish(model, scored))
    for (layer, sublayer, features, _), (_, _, scored_features, x) in zip(calibrated, walk, strict=True):
        moments = _project_moments(features, model.params["layers"][layer][SUBLAYER_PARAMS[sublayer]])
        candidates = list_candidates(model, layer, sublayer, moments)
        if sublayer == 0:
            known = {tuple(stay) for stay in candidates}
            candidates += [stay for stay in propose_heads(layer) if tuple(stay) not in known]
        all_units = np.arange((model.config.neurons if sublayer else model.config.heads)[layer])
        measured = [Option(all_units, _count(model.config, layer, sublayer, len(all_units)), 0.0)]
        for stay in candidates:
            rise = _measure_rise(model, (layer, sublayer), moments, stay, scored_features, x, log_p)
            measured.append(Option(stay, _count(model.config, layer, sublayer, len(stay)), rise))
        options.append(measured)
        advance()
    return options


def list_candidates(model: DeployedModel, layer: int, sublayer: int, moments: Moments) -> list[np.ndarray]:
    """List the sets of heads or neurons that are tried in a sublayer, nested by the order of their prices."""
    config, layer_params = model.config, model.params["layers"][layer]
    kernel = layer_params[SUBLAYER_PARAMS[sublayer]]["kernel"]
    if sublayer == 0:
        order = order_removals(moments, kernel, config.head_width, 1)
        return [np.sort(order[gone:]) for gone in range(1, config.heads[layer] + 1)]
    neurons = config.neurons[layer]
    order = order_removals(moments, kernel, 1, max(1, neurons // NEURON_STEPS))
    sizes = dict.fromkeys(round_neurons(neurons * size / NEURON_STEPS) for size in NEURON_SIZES)
    return [np.sort(order[neurons - size :]) for size in sizes if size < neurons]


def round_neurons(neurons: float) -> int:
    """Round a number of neurons up to a multiple of NEURON_MULTIPLE."""
    return -(-int(np.ceil(neurons)) // NEURON_MULTIPLE) * NEURON_MULTIPLE


def _project_moments(features: Sequence[Chunk], dense: dict[str, np.ndarray]) -> Moments:
    """Compute the moments of features, where what should be added is their own projection."""
    moments = sum_moments(features, [jnp.zeros((*f.shape[:2], 1)) for f in features])
    weights = np.concatenate([np.asarray(dense["kernel"], np.float64), np.asarray(dense["bias"], np.float64)[None]])
    return moments._replace(ft=moments.ff @ weights)


def _count(config: DeployedConfig, layer: int, sublayer: int, size: int) -> int:
    return count_mlp_macs(config, layer, size) if sublayer else count_attention_macs(config, layer, size)


def _finish(model: DeployedModel, images: np.ndarray) -> jax.Array:
    """Compute the logits of images, sublayer by sublayer."""
    _, _, features, x = deque(walk_sublayers(model, images), maxlen=1)[0]  # the others need not stay in memory
    dense = model.params["layers"][-1]["mlp_out"]
    x = [add_projection(dense, f, 1, chunk) for f, chunk in zip(features, x, strict=True)]
    return jnp.concatenate([_classify(model.config, model.params, chunk) for chunk in x])


_classify = jax.jit(lambda config, params, x_B1D: classify(config, params, x_B1D[:, 0]), static_argnums=0)


def _measure_rise(
    model: DeployedModel, place: tuple[int, int], moments: Moments, stay: np.ndarray,
    features: Sequence[Chunk], x: Sequence[Chunk], log_p: jax.Array,
) -> float:  # fmt: skip
    """Measure KL(whole model || model) if one sublayer keeps some of its features and its projection is refitted."""
    (layer, sublayer), (config, params) = place, model
    dense = params["layers"][layer][SUBLAYER_PARAMS[sublayer]]
    stay_F = stay if sublayer else expand_heads(config, stay)
    fitted = fit_projection(moments, stay_F, dense, DAMPING)
    queries = count_queries(config, layer)
    logits = []
    for f, chunk in zip(features, x, strict=True):
        residual = add_projection(fitted, f, queries, chunk)
        logits.append(_classify(config, params, _run_rest(model, layer, sublayer + 1, residual)))
    log_q = jax.nn.log_softmax(jnp.concatenate(logits))
    return float(jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)))


def _run_rest(model: DeployedModel, layer: int, sublayer: int, x_BTD: Chunk) -> Chunk:
    """Run the sublayers from one on: sublayer 2 of a layer is the first of the next."""
    config, params = model
    for number in range(2 * layer + sublayer, 2 * config.depth):
        layer_params, queries = params["layers"][number // 2], count_queries(config, number // 2)
        features = compute_features(config, layer_params, number % 2, x_BTD, queries)
        x_BTD = add_projection(layer_params[SUBLAYER_PARAMS[number % 2]], features, queries, x_BTD)
    return x_BTD


def choose_sizes(config: DeployedConfig, options: Options, budget: float) -> KeptParts:
    """Choose the sizes whose rises of the loss have the smallest sum within a budget.

    Args:
      config: of the model from which nothing is cut.
      budget: the most multiply-accumulates, as a share of that model's.
    """
    if budget >= 1:
        return keep_all(config)
    total = count_macs(config)
    most = int(UNITS * (budget - count_fixed_macs(config) / total))
    best, chosen = np.zeros(most + 1), []
    for sublayer in options:
        costs = [int(np.ceil(UNITS * option.macs / total)) for option in sublayer]
        totals = np.full((len(sublayer), most + 1), np.inf)
        for i, (option, cost) in enumerate(zip(sublayer, costs, strict=True)):
            if cost <= most:
                totals[i, cost:] = best[: most + 1 - cost] + option.loss
        chosen.append((np.argmin(totals, axis=0), costs))
        best = totals.min(axis=0)
    picked, place = [], most
    for (choice, costs), sublayer in zip(reversed(chosen), reversed(options), strict=True):
        picked.append(sublayer[choice[place]].stay)
        place -= costs[choice[place]]
    picked.reverse()
    return KeptParts(tuple(picked[0::2]), tuple(picked[1::2]))


def least_budget(config: DeployedConfig) -> float:
    """Return the smallest budget that can be met: every sublayer is cut, and only a constant is left of it."""
    return count_fixed_macs(config) / count_macs(config)
