"""AdaFisher, AdaFisherW and SpectralAdaFisher, and a factory that builds every optimizer by name."""

from hf_adafisher.optimizers.adafisher import AdaFisher, AdaFisherW
from hf_adafisher.optimizers.factory.create import (
    OptimizerFactory,
    available_optimizers,
    create_optimizer,
    optimizer_state_bytes,
)
from hf_adafisher.optimizers.spectral import SpectralAdaFisher

__all__ = [
    "AdaFisher",
    "AdaFisherW",
    "OptimizerFactory",
    "SpectralAdaFisher",
    "available_optimizers",
    "create_optimizer",
    "optimizer_state_bytes",
]
