"""AdaFisher, AdaFisherW and SpectralAdaFisher for people who train with Hugging Face Transformers."""

from typing import TYPE_CHECKING, Any

from hf_adafisher.fisher import LayerRule, register_layer
from hf_adafisher.optimizers import (
    AdaFisher,
    AdaFisherW,
    OptimizerFactory,
    SpectralAdaFisher,
    available_optimizers,
    create_optimizer,
    optimizer_state_bytes,
)

if TYPE_CHECKING:
    from hf_adafisher.training import (
        AdaFisherCallback,
        AdaFisherMixin,
        AdaFisherTrainer,
        AdaFisherTrainingArguments,
        CurvatureCallback,
        DoctorCallback,
    )

__version__ = "0.1.0"

__all__ = [
    "AdaFisher",
    "AdaFisherCallback",
    "AdaFisherMixin",
    "AdaFisherTrainer",
    "AdaFisherTrainingArguments",
    "AdaFisherW",
    "CurvatureCallback",
    "DoctorCallback",
    "LayerRule",
    "OptimizerFactory",
    "SpectralAdaFisher",
    "available_optimizers",
    "create_optimizer",
    "optimizer_state_bytes",
    "register_layer",
]


def __getattr__(name: str) -> Any:
    # The optimizers work in a plain PyTorch loop: transformers is imported only where the Trainer is asked for.
    if name in __all__:
        from hf_adafisher import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
