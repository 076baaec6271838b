"""The tables of optimizers in docs/ are what the program prints, which is what the records and real steps hold."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from hf_adafisher import available_optimizers, create_optimizer, optimizer_state_bytes
from hf_adafisher.experiments.benchmark.counts import MODELS, OPTIMIZERS, state_bytes
from hf_adafisher.optimizers.factory.catalog import optimizer_record
from tests.scripts import load_command

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return load_command("list_optimizers")


def test_the_readme_holds_the_programs_table(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """To renew it: `hf-adafisher list --markdown`."""
    assert program.main(["--markdown"]) == 0
    table = capsys.readouterr().out.strip()
    assert table.count("\n") == len(available_optimizers()) + 1
    assert table in (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")


SMALL = {
    "gpt2": GPT2Config(vocab_size=60, n_positions=16, n_embd=16, n_layer=4, n_head=2),
    "llama": LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_counted_memory_is_that_of_a_real_training_step(
    config: PretrainedConfig, name: str, dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    optimizer = create_optimizer(name, model)
    tokens = torch.arange(16).reshape(2, 8)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    count = sum(p.numel() for p in model.parameters())
    assert state_bytes(config, name, dtype) == (count, optimizer_state_bytes(optimizer))


@pytest.mark.slow
def test_the_memory_table_is_the_programs(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """To renew it: `hf-adafisher list --memory`. bfloat16 weights halve it, as the page says."""
    assert program.main(["--memory"]) == 0
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")
    for name in OPTIMIZERS:
        single, half = (state_bytes(MODELS["Qwen3 0.6B"], name, dtype)[1] for dtype in (torch.float32, torch.bfloat16))
        assert half == pytest.approx(single / 2, rel=0.01)


def test_json_holds_every_record(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed] == available_optimizers()
    for entry in listed:
        record = optimizer_record(entry["name"])
        assert entry["learning_rate"] == {"value": record.learning_rate.value, "source": record.learning_rate.source}
        assert {key: setting["value"] for key, setting in entry["defaults"].items()} == {
            key: setting.value for key, setting in record.defaults.items()
        }
        assert set(entry["refuses"]) == record.refuses and entry["create_graph"] == record.create_graph


def test_the_plain_list_names_every_default_and_its_source(
    program: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main([]) == 0
    text = capsys.readouterr().out
    for name in available_optimizers():
        record = optimizer_record(name)
        assert f"\n{name}\n" in f"\n{text}"
        for setting in (record.learning_rate, *record.defaults.values()):
            assert f"{setting.value} ({setting.source})" in text


@pytest.mark.parametrize("name", available_optimizers())
def test_every_default_has_a_source_and_every_record_a_paper(name: str) -> None:
    record = optimizer_record(name)
    assert record.paper and record.library and record.memory
    assert record.learning_rate.value > 0
    assert all(len(setting.source) > 5 for setting in (record.learning_rate, *record.defaults.values()))
    assert "lr" not in record.defaults, "it has a field of its own"
    if record.momentum:
        assert record.momentum in record.options()
