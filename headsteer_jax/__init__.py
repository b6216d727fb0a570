"""HeadSteer: steer a sparse autoencoder's latents to control which attention heads a vision transformer runs.

`load_run(DIR)` loads a finished run as a `Run`. `load_config(FILE)` reads an experiment's `Config`. An `Autoencoder`
encodes and decodes residuals. `load_deployed(DIR)` loads a deployed model. Everything is imported when it is first
used, so that the command line's help is quick.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headsteer_jax.config import Config, load_config
    from headsteer_jax.deploy.store import load_deployed
    from headsteer_jax.errors import HeadSteerError
    from headsteer_jax.runs import Run, load_run
    from headsteer_jax.sae.autoencoder import Autoencoder

__version__ = "0.2.0"
__all__ = ["Autoencoder", "Config", "HeadSteerError", "Run", "load_config", "load_deployed", "load_run"]

_MODULES = {
    "Autoencoder": "headsteer_jax.sae.autoencoder",
    "Config": "headsteer_jax.config",
    "HeadSteerError": "headsteer_jax.errors",
    "Run": "headsteer_jax.runs",
    "load_config": "headsteer_jax.config",
    "load_deployed": "headsteer_jax.deploy.store",
    "load_run": "headsteer_jax.runs",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
