"""Images and labels: where they come from, how they are cut into splits, in which order training sees them."""

import importlib

_MOVED = {
    "LazyImages": "headsteer_jax.data.dataset",
    "Split": "headsteer_jax.data.dataset",
    "Dataset": "headsteer_jax.data.dataset",
    "stratified_cut": "headsteer_jax.data.dataset",
    "related_pairs": "headsteer_jax.data.dataset",
    "check_classes": "headsteer_jax.data.dataset",
    "gather": "headsteer_jax.data.dataset",
    "load": "headsteer_jax.data.sources",
    "Source": "headsteer_jax.data.sources",
    "_check_labels": "headsteer_jax.data.sources",
    "_blaming": "headsteer_jax.data.sources",
    "_decode": "headsteer_jax.data.sources",
    "_read_npz": "headsteer_jax.data.sources",
    "IMAGE_SUFFIXES": "headsteer_jax.data.sources",
    "_read_folder": "headsteer_jax.data.sources",
    "_read_tfds": "headsteer_jax.data.sources",
    "_prepare_tfds": "headsteer_jax.data.sources",
    "DIGIT_SIDE": "headsteer_jax.data.digits",
    "DIGIT_TEST_FRACTION": "headsteer_jax.data.digits",
    "compose_digits": "headsteer_jax.data.digits",
    "double_digits": "headsteer_jax.data.digits",
    "T": "headsteer_jax.data.batches",
    "prefetched": "headsteer_jax.data.batches",
    "batch_indices": "headsteer_jax.data.batches",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
