"""What an experiment is: every number that it depends on, documented, typed and checked at the start."""

import importlib

_MOVED = {
    "HeadSteerError": "headsteer_jax.errors",
    "Fraction": "headsteer_jax.config.schema",
    "Share": "headsteer_jax.config.schema",
    "Finite": "headsteer_jax.config.schema",
    "MOST_HEADS": "headsteer_jax.config.schema",
    "SIZES": "headsteer_jax.config.schema",
    "Section": "headsteer_jax.config.schema",
    "DataConfig": "headsteer_jax.config.schema",
    "ModelConfig": "headsteer_jax.config.schema",
    "GateConfig": "headsteer_jax.config.schema",
    "PhaseConfig": "headsteer_jax.config.schema",
    "TrainConfig": "headsteer_jax.config.schema",
    "SAEConfig": "headsteer_jax.config.schema",
    "GridConfig": "headsteer_jax.config.schema",
    "SteerConfig": "headsteer_jax.config.schema",
    "LayersConfig": "headsteer_jax.config.schema",
    "ReportConfig": "headsteer_jax.config.schema",
    "MachineConfig": "headsteer_jax.config.schema",
    "Config": "headsteer_jax.config.schema",
    "one_line": "headsteer_jax.config.files",
    "_did_you_mean": "headsteer_jax.config.files",
    "fields": "headsteer_jax.config.files",
    "flatten": "headsteer_jax.config.files",
    "_parse": "headsteer_jax.config.files",
    "override": "headsteer_jax.config.files",
    "load_config": "headsteer_jax.config.files",
    "help_text": "headsteer_jax.config.files",
    "reference": "headsteer_jax.config.files",
    "_default": "headsteer_jax.config.files",
    "_type_name": "headsteer_jax.config.files",
}


def __getattr__(name: str) -> object:
    """The old import path, for one commit."""
    if name not in _MOVED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MOVED[name]), name)
