"""Search of learning rate and weight decay with optuna, by Trainer's own ``hyperparameter_search``.

Each trial trains a model from scratch.

    pip install optuna
    python examples/hyperparameter_search.py
"""

import smoke
from datasets import load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from hf_adafisher import AdaFisherTrainer, AdaFisherTrainingArguments

MODEL = smoke.language_model("HuggingFaceTB/SmolLM2-135M")
DATA = smoke.texts("roneneldan/TinyStories")

tokenizer = AutoTokenizer.from_pretrained(MODEL)
tokenizer.pad_token = tokenizer.eos_token
stories = load_dataset(DATA, split="train[:1%]").map(
    lambda row: tokenizer(row["text"], truncation=True, max_length=256), remove_columns="text"
)
data = stories.train_test_split(min(500, len(stories) // 2), seed=0)


def model_init():
    """Every trial starts at random, in a small model of the same kind."""
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL, num_hidden_layers=4))


def space(trial):
    """Around the default of training from scratch, 0.004; for fine-tuning around 5e-5."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-3, 2e-2, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-3, 0.3, log=True),
    }


trainer = AdaFisherTrainer(
    model_init=model_init,
    args=AdaFisherTrainingArguments("out/search", num_train_epochs=1, save_strategy="no", **smoke.LIMITS),
    train_dataset=data["train"],
    eval_dataset=data["test"],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
best = trainer.hyperparameter_search(
    space, compute_objective=lambda metrics: metrics["eval_loss"], n_trials=2 if smoke.SMOKE else 20, backend="optuna"
)
print(best)
