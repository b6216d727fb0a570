"""Making up for what was cut, without training: projections by least squares, the classifier as a convex problem.

Axes: B images, D width, C classes.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from headsteer_jax.deploy.calibration import (
    SUBLAYER_PARAMS,
    add_projection,
    compute_features,
    count_queries,
    cut_into_chunks,
    embed_chunk,
    fit_projection,
    sum_moments,
    walk_sublayers,
)
from headsteer_jax.deploy.convert import KeptParts, expand_heads
from headsteer_jax.deploy.model import DeployedModel, normalise

DAMPING = 1e-2
PENALTIES = (1.0, 0.1, 0.01, 0.001)  # of the classifier's change, from which validation images choose


def refit_model(model: DeployedModel, parts: KeptParts, images: np.ndarray) -> DeployedModel:
    """Set to 0 what does not stay, and fit the rest of every projection so that the residuals stay the whole model's.

    The sublayers are fitted one after the other, each on the residuals of the model that is cut so far: a later one
    also corrects what the earlier ones got wrong.

    Args:
      images: training images of the classes.

    Returns:
      A model of the same shape, from which `cut_model` cuts the zeros.
    """
    config, params = model
    fitted = [dict(layer) for layer in params["layers"]]
    x = [embed_chunk(config, params, chunk) for chunk in cut_into_chunks(config, images)]
    for layer, sublayer, features, dense_x in walk_sublayers(model, images):
        queries, name = count_queries(config, layer), SUBLAYER_PARAMS[sublayer]
        stay = parts.neurons[layer] if sublayer else expand_heads(config, parts.heads[layer])
        layer_params = fitted[layer]
        targets = [
            add_projection(layer_params[name], f, queries, chunk) for f, chunk in zip(features, dense_x, strict=True)
        ]
        features = [compute_features(config, layer_params, sublayer, chunk, queries) for chunk in x]
        x = [chunk[:, :queries] for chunk in x]
        missing = [after - chunk for after, chunk in zip(targets, x, strict=True)]
        layer_params[name] = fit_projection(sum_moments(features, missing), stay, layer_params[name], DAMPING)
        x = [add_projection(layer_params[name], f, queries, chunk) for f, chunk in zip(features, x, strict=True)]
    return DeployedModel(config, params | {"layers": fitted})


def refit_classifier(
    model: DeployedModel, train: Sequence[np.ndarray], validation: Sequence[np.ndarray]
) -> DeployedModel:
    """Fit the classifier to the CLS residuals of a refitted model, by logistic regression that starts from its weights.

    The penalty on the change is the one, of several and of no change at all, with the smallest loss on validation.

    Args:
      train, validation: the last CLS residuals [B, D] and the labels [B] of images.
    """
    head, config = model.params["head"], model.config
    start = np.concatenate([head["kernel"], head["bias"][None]]).astype(np.float64)
    inputs = [
        np.asarray(normalise(jnp.asarray(x_BD), model.params["norm"], config), np.float64)
        for x_BD, _ in (train, validation)
    ]
    n_train, n_validation = (np.concatenate([n, np.ones((len(n), 1))], axis=1) for n in inputs)
    best, best_loss = start, _cross_entropy(n_validation @ start, validation[1])
    for penalty in PENALTIES:
        fitted = _fit_logistic(n_train, train[1], start, penalty)
        loss = _cross_entropy(n_validation @ fitted, validation[1])
        if loss < best_loss:
            best, best_loss = fitted, loss
    head = {"kernel": best[:-1].astype(np.float32), "bias": best[-1].astype(np.float32)}
    return DeployedModel(config, model.params | {"head": head})


def _cross_entropy(logits_BC: np.ndarray, labels: np.ndarray) -> float:
    log_p = jax.nn.log_softmax(logits_BC)
    return -float(np.mean(np.asarray(log_p, np.float64)[np.arange(len(labels)), labels]))


def _fit_logistic(n_BD: np.ndarray, labels: np.ndarray, start: np.ndarray, penalty: float) -> np.ndarray:
    """Minimise the cross-entropy plus penalty / 2 |W - start|^2 over W [D, C]."""
    targets = np.eye(start.shape[1])[labels]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        change = flat.reshape(start.shape)
        logits = n_BD @ (start + change)
        logits -= logits.max(axis=1, keepdims=True)
        p = np.exp(logits)
        total = p.sum(axis=1, keepdims=True)
        loss = np.mean(np.log(total[:, 0]) - np.sum(targets * logits, axis=1)) + penalty / 2 * np.sum(change**2)
        return float(loss), (n_BD.T @ (p / total - targets) / len(labels) + penalty * change).ravel()

    return start + minimize(objective, np.zeros(start.size), jac=True, method="L-BFGS-B").x.reshape(start.shape)
