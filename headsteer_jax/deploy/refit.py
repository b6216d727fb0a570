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
from headsteer_jax.deploy.convert import KeptParts, cut_model
from headsteer_jax.deploy.model import DeployedModel, normalise

DAMPING = 1e-2
PENALTIES = (1.0, 0.1, 0.01, 0.001)  # of the classifier's change, from which validation images choose


def refit_model(model: DeployedModel, parts: KeptParts, images: np.ndarray) -> DeployedModel:
    """Cut what does not stay, and fit what stays of every projection so that the residuals stay the whole model's.

    The sublayers are fitted one after the other, each on the residuals of the cut model up to there: a later one also
    corrects what the earlier ones got wrong.

    Args:
      images: training images of the classes.

    Returns:
      The cut model.
    """
    cut = cut_model(model, parts)
    x = [embed_chunk(cut.config, cut.params, chunk) for chunk in cut_into_chunks(cut.config, images)]
    for layer, sublayer, features, dense_x in walk_sublayers(model, images):
        queries, name = count_queries(cut.config, layer), SUBLAYER_PARAMS[sublayer]
        dense, layer_params = model.params["layers"][layer][name], cut.params["layers"][layer]
        targets = [add_projection(dense, f, queries, chunk) for f, chunk in zip(features, dense_x, strict=True)]
        missing = [after - chunk[:, :queries] for after, chunk in zip(targets, x, strict=True)]
        if "kernel" not in layer_params[name]:  # nothing stays but a constant
            constant = np.mean([np.asarray(part, np.float64).mean(axis=(0, 1)) for part in missing], axis=0)
            layer_params[name] = {"bias": constant.astype(np.float32)}
            x = [chunk[:, :queries] + layer_params[name]["bias"] for chunk in x]
            continue
        features = [compute_features(cut.config, layer_params, sublayer, chunk, queries) for chunk in x]
        moments, size = sum_moments(features, missing), len(layer_params[name]["kernel"])
        layer_params[name] = fit_projection(moments, np.arange(size), layer_params[name], DAMPING)
        x = [add_projection(layer_params[name], f, queries, chunk) for f, chunk in zip(features, x, strict=True)]
    return cut


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
