"""TRL's SFTTrainer with LoRA on packed chat data.

TRL applies the chat template and packs conversations into rows of ``max_length`` tokens.

    pip install trl peft
    python examples/sft_lora.py
"""

import smoke
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from hf_adafisher import AdaFisherMixin

MODEL = smoke.language_model("Qwen/Qwen3-0.6B")
DATA = smoke.chats("trl-lib/Capybara")


class AdaFisherSFTTrainer(AdaFisherMixin, SFTTrainer):
    """SFTTrainer, and AdaFisherW where ``optim`` is left at its default."""


trainer = AdaFisherSFTTrainer(
    model=MODEL,
    args=SFTConfig(
        "out/sft-lora",
        learning_rate=2e-4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        max_length=1024,
        packing=True,
        **smoke.LIMITS,
    ),
    train_dataset=load_dataset(DATA, split="train"),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()
