"""What an experiment is: every number that it depends on, documented, typed and checked at the start.

Config files import the sections from here.
"""

from headsteer_jax.config.files import load_config
from headsteer_jax.config.schema import (
    Config,
    DataConfig,
    GateConfig,
    GridConfig,
    LayersConfig,
    MachineConfig,
    ModelConfig,
    PhaseConfig,
    ReportConfig,
    SAEConfig,
    SteerConfig,
    TrainConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "GateConfig",
    "GridConfig",
    "LayersConfig",
    "MachineConfig",
    "ModelConfig",
    "PhaseConfig",
    "ReportConfig",
    "SAEConfig",
    "SteerConfig",
    "TrainConfig",
    "load_config",
]
