"""Train LoRA and a prefix together on a language model, save both, and load them again.

    python examples/lora_prefix.py --model meta-llama/Llama-3.2-1B --text corpus.txt --out adapter

TEXT has one example per line. Without ``--model`` the script uses a tiny random decoder, and without ``--text`` a few
made-up sentences. It then runs in seconds.
"""

import argparse
from pathlib import Path

import torch
from adept_decoder import train
from peft import LoraConfig, PeftModel, get_peft_model
from toy import SENTENCES, load_decoder

import fastprefix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or path of a decoder")
    parser.add_argument("--text", help="text file with one example per line")
    parser.add_argument("--out", default="lora-adapter", help="directory in which to save both")
    parser.add_argument("--start", default="the film", help="text that the trained model continues")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=5e-3, help="learning rate of the prefix")
    parser.add_argument(
        "--lora-lr", type=float, default=2e-3, help="learning rate of LoRA (usual for pretrained models: 2e-4)"
    )
    options = parser.parse_args()

    torch.manual_seed(0)
    model, tokenizer = load_decoder(options.model)
    lines = [text for text, _ in SENTENCES]
    if options.text is not None:
        lines = Path(options.text).read_text(encoding="utf-8").splitlines()

    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]))
    prefix = fastprefix.PrefixTuningConfig(num_virtual_tokens=8, init="text", init_text=lines[0])
    fastprefix.attach(peft_model, prefix, tokenizer=tokenizer)
    print(fastprefix.count_parameters(peft_model))  # counts the prefix and PEFT's parameters
    groups = fastprefix.parameter_groups(peft_model, lr=options.lr, peft_lr=options.lora_lr)
    train(peft_model, tokenizer, lines, options.epochs, torch.optim.AdamW(groups))

    fastprefix.save_adapter(peft_model, Path(options.out))  # the prefix
    peft_model.save_pretrained(Path(options.out) / "lora")  # LoRA
    print(f"both are in {options.out}")

    # In another process, load a base model with the same weights instead.
    base = fastprefix.detach(peft_model).unload()
    both = PeftModel.from_pretrained(base, Path(options.out) / "lora")
    fastprefix.load_adapter(both, options.out)
    start = tokenizer(options.start, return_tensors="pt").to(both.device)
    output = both.eval().generate(**start, max_new_tokens=8, pad_token_id=tokenizer.pad_token_id)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
