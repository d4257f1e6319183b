"""Train a prefix or a prompt with TRL, by supervised fine-tuning (sft), on preferences (dpo), or on a reward (grpo).

    python examples/trl_adapter.py --trainer dpo --method prompt --model meta-llama/Llama-3.2-1B --out adapter

Without ``--model`` the script uses a tiny random decoder and runs in seconds. The model learns to write praise.
"""

import argparse
from typing import Any

import torch
from datasets import Dataset
from toy import SENTENCES, load_decoder
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import fastprefix

METHODS = {
    "prefix": lambda: fastprefix.PrefixTuningConfig(num_virtual_tokens=8),
    "prompt": lambda: fastprefix.PromptTuningConfig(num_virtual_tokens=8),
}


def make_rows(trainer: str) -> Dataset:
    """Return the training data of a trainer: sentences without their last word, and last words."""
    starts = [sentence.rpartition(" ")[0] for sentence, _ in SENTENCES]
    if trainer == "sft":
        praise = [sentence.rpartition(" ") for sentence, label in SENTENCES if label == 1]
        return Dataset.from_list([{"prompt": start, "completion": f" {word}"} for start, _, word in praise])
    if trainer == "dpo":
        return Dataset.from_list([{"prompt": s, "chosen": " wonderful", "rejected": " awful"} for s in starts])
    return Dataset.from_list([{"prompt": start} for start in starts])


def reward(completions: list[str], **columns: Any) -> list[float]:
    """Return how many words of praise each completion contains."""
    return [
        float(sum(word in completion for word in ("wonderful", "moving", "brilliant"))) for completion in completions
    ]


def make_trainer(name: str, model: PreTrainedModel, tokenizer: Any, lr: float | None, **options: Any) -> Any:
    """Return a TRL trainer."""
    optimizer = torch.optim.AdamW(fastprefix.parameter_groups(model, lr=lr))
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    options = {
        "output_dir": "trl-output",
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "bf16": False,
        **options,
    }
    common = {"train_dataset": make_rows(name), "processing_class": tokenizer, "optimizers": (optimizer, schedule)}
    if name == "sft":
        return SFTTrainer(model, args=SFTConfig(completion_only_loss=True, **options), **common)
    if name == "dpo":
        # The reference is the same model without its adapter, so no second copy is needed.
        return DPOTrainer(model, fastprefix.ReferenceModel(model), args=DPOConfig(**options), **common)
    grpo = GRPOConfig(num_generations=8, max_completion_length=4, **options)
    return GRPOTrainer(model, args=grpo, reward_funcs=reward, **common)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=["sft", "dpo", "grpo"], default="sft")
    parser.add_argument("--method", choices=sorted(METHODS), default="prefix")
    parser.add_argument("--model", help="name or path of a decoder")
    parser.add_argument("--out", default="trl-adapter", help="directory in which to save the adapter")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, help="learning rate; by default the method's usual one")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")
    options = parser.parse_args()

    torch.manual_seed(0)
    model, tokenizer = load_decoder(options.model)
    fastprefix.attach(model, METHODS[options.method]())
    print(fastprefix.count_parameters(model))
    trainer = make_trainer(options.trainer, model, tokenizer, options.lr, max_steps=options.steps, use_cpu=options.cpu)
    trainer.train()
    fastprefix.save_adapter(model, options.out)
    print(f"the adapter is in {options.out}")

    model.eval()
    start = tokenizer("the film was", return_tensors="pt").to(model.device)
    output = model.generate(**start, max_new_tokens=1, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
