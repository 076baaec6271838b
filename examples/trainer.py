"""Trainer in ten lines: AdaFisherW fine-tunes a small language model.

After twenty steps DoctorCallback says what is wrong, if anything is.

    python examples/trainer.py
"""

import smoke
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from hf_adafisher import AdaFisherTrainer, AdaFisherTrainingArguments, DoctorCallback

MODEL = smoke.language_model("HuggingFaceTB/SmolLM2-135M")
DATA = smoke.texts("roneneldan/TinyStories")

tokenizer = AutoTokenizer.from_pretrained(MODEL)
tokenizer.pad_token = tokenizer.eos_token
stories = load_dataset(DATA, split="train[:2%]").map(
    lambda row: tokenizer(row["text"], truncation=True, max_length=256), remove_columns="text"
)
trainer = AdaFisherTrainer(
    model=AutoModelForCausalLM.from_pretrained(MODEL),
    # Without learning_rate it is 0.004, for weights that start at random; for pretrained ones take AdamW's.
    args=AdaFisherTrainingArguments("out/trainer", learning_rate=5e-5, num_train_epochs=1, **smoke.LIMITS),
    train_dataset=stories,
    processing_class=tokenizer,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    callbacks=[DoctorCallback()],
)
trainer.train()
trainer.save_model()
