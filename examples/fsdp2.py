"""Sharded training with FSDP2 in plain PyTorch: weights, gradients and the optimizer's state in pieces.

    torchrun --standalone --nproc_per_node 2 examples/fsdp2.py

Under Trainer, ``fsdp=True`` among the arguments and ``accelerate launch`` do the same.
"""

import os

import smoke
import torch
import torch.distributed as dist
from datasets import load_dataset
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_adafisher import SpectralAdaFisher

MODEL = smoke.language_model("HuggingFaceTB/SmolLM2-135M")
DATA = smoke.texts("roneneldan/TinyStories")
STEPS, BATCH = (2, 2) if smoke.SMOKE else (200, 8)

if "RANK" not in os.environ:  # started without torchrun: one process
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29555"}
on_gpu = torch.cuda.is_available() and not smoke.SMOKE
dist.init_process_group("nccl" if on_gpu else "gloo")
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")

tokenizer = AutoTokenizer.from_pretrained(MODEL)
tokenizer.pad_token = tokenizer.eos_token
stories = load_dataset(DATA, split="train[:2%]").shard(dist.get_world_size(), dist.get_rank())
model = AutoModelForCausalLM.from_pretrained(MODEL).to(device)
for block in model.model.layers:
    fully_shard(block)
fully_shard(model)
optimizer = SpectralAdaFisher(model, lr=1.5e-4)  # after sharding, as for every torch optimizer

for step in range(STEPS):
    rows = stories[step * BATCH : (step + 1) * BATCH]["text"]
    batch = tokenizer(rows, return_tensors="pt", padding=True, truncation=True, max_length=256).to(device)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()

whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if dist.get_rank() == 0:
    print(f"loss {loss.item():.3f}")
    os.makedirs("out", exist_ok=True)
    torch.save(whole, "out/fsdp2-model.pt")
dist.destroy_process_group()
