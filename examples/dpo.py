"""TRL's DPOTrainer: AdaFisherW trains on preferences.

The mixin goes before the trainer; DPOConfig's own learning rate is used.

    pip install trl
    python examples/dpo.py
"""

import smoke
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

from hf_adafisher import AdaFisherMixin

MODEL = smoke.language_model("Qwen/Qwen3-0.6B")
DATA = smoke.preferences("trl-lib/ultrafeedback_binarized")


class AdaFisherDPOTrainer(AdaFisherMixin, DPOTrainer):
    """DPOTrainer, and AdaFisherW where ``optim`` is left at its default."""


trainer = AdaFisherDPOTrainer(
    model=MODEL,
    args=DPOConfig(
        "out/dpo",
        beta=0.1,  # DPO's, not that of the momentum
        learning_rate=1e-6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        **smoke.LIMITS,
    ),
    train_dataset=load_dataset(DATA, split="train"),
)
trainer.train()
trainer.save_model()
