"""The config of an experiment: its sections, which config files import from here, and how a file is loaded."""

from headsteer_jax.config.files import load_config
from headsteer_jax.config.schema import (
    Config,
    DataConfig,
    FrontConfig,
    GateConfig,
    GridConfig,
    LayersConfig,
    MachineConfig,
    ModelConfig,
    PhaseConfig,
    ReportConfig,
    SAEAblationConfig,
    SAEConfig,
    SteerConfig,
    SublayerGateConfig,
    TokenGateConfig,
    TrainConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "FrontConfig",
    "GateConfig",
    "GridConfig",
    "LayersConfig",
    "MachineConfig",
    "ModelConfig",
    "PhaseConfig",
    "ReportConfig",
    "SAEAblationConfig",
    "SAEConfig",
    "SteerConfig",
    "SublayerGateConfig",
    "TokenGateConfig",
    "TrainConfig",
    "load_config",
]
