"""What is served: the keys of a config, config files, and the reference of the keys.

May import: `models`, `schedulers`. Begin with `server.py`, which declares every key.
"""

from kairos_jax.config.server import (
    DTYPES,
    ConfigError,
    DecodeConfig,
    InstanceConfig,
    PrefillConfig,
    ServerConfig,
    SloConfig,
)

__all__ = [
    "DTYPES",
    "ConfigError",
    "DecodeConfig",
    "InstanceConfig",
    "PrefillConfig",
    "ServerConfig",
    "SloConfig",
]
