"""A converted model under Hugging Face's own tools, unmodified: Trainer, and a peft LoRA adapter that reloads."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from regla.linearize import convert

from .models import llama


class Repeats(Dataset):
    """Sequences that repeat eight tokens: what comes next can be learnt."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        period = torch.randint(97, (8,), generator=torch.Generator().manual_seed(index % 4))
        ids = period.repeat(4)
        return {"input_ids": ids, "labels": ids}


def test_trainer_and_lora(tmp_path):
    model = convert(llama(), "every-2")
    base = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = get_peft_model(
        model,
        LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "gate.proj"]),
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=8,
        max_steps=20,
        learning_rate=2e-2,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=adapted, args=arguments, train_dataset=Repeats())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]

    adapted.save_pretrained(tmp_path / "adapter")
    fresh = convert(llama(), "every-2")
    fresh.load_state_dict(base)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    ids = Repeats()[1]["input_ids"][None]
    with torch.no_grad():
        expected, value = adapted.eval()(ids).logits, loaded(ids).logits
    assert torch.equal(value, expected)
    with torch.no_grad(), loaded.disable_adapter():
        assert not torch.allclose(loaded(ids).logits, expected, atol=1e-2)
