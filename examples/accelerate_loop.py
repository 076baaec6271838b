"""A loop of one's own with accelerate: accumulation, clipping, mixed precision, and any number of processes.

The loop is the one for AdamW; the optimizer needs the model, and can say how the run is.

    accelerate launch --num_processes 2 examples/accelerate_loop.py
"""

import smoke
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from hf_adafisher import create_optimizer

MODEL = smoke.language_model("HuggingFaceTB/SmolLM2-135M")
DATA = smoke.texts("roneneldan/TinyStories")
STEPS = 2 if smoke.SMOKE else 500

accelerator = Accelerator(gradient_accumulation_steps=2, cpu=smoke.SMOKE)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
tokenizer.pad_token = tokenizer.eos_token
stories = load_dataset(DATA, split="train[:2%]").map(
    lambda row: tokenizer(row["text"], truncation=True, max_length=256), remove_columns="text"
)
model = AutoModelForCausalLM.from_pretrained(MODEL)
optimizer = create_optimizer("adafisherw", model, lr=5e-5, weight_decay=0.01)  # the model, before prepare
collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
loader = DataLoader(stories, batch_size=8 if not smoke.SMOKE else 1, shuffle=True, collate_fn=collate)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

norms = []
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            norms.append(accelerator.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients and len(norms) % 20 == 0:
        accelerator.print(f"step {len(norms)}: loss {loss.item():.3f}")
    if len(norms) == STEPS:
        break

accelerator.print(optimizer.optimizer.diagnose(grad_norms=norms, max_grad_norm=1.0))
accelerator.wait_for_everyone()
accelerator.unwrap_model(model).save_pretrained("out/accelerate", is_main_process=accelerator.is_main_process)
