"""Train a language model with ADePT, merge the adapter, and generate text.

    python examples/adept_decoder.py --model meta-llama/Llama-3.2-1B --text corpus.txt --out adapter

TEXT has one example per line. Without ``--model`` the script uses a tiny random decoder, and without ``--text`` a few
made-up sentences. It then runs in seconds.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from toy import SENTENCES, load_decoder
from transformers import (
    BatchEncoding,
    PreTrainedTokenizerBase,
)

import fastprefix


def train(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    lines: list[str],
    epochs: int,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Train the model on complete lines."""

    def batch(texts: list[str]) -> BatchEncoding:
        inputs = tokenizer([text + tokenizer.eos_token for text in texts], return_tensors="pt", padding=True)
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        return inputs

    loader = DataLoader(lines, batch_size=8, shuffle=True, collate_fn=batch)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for inputs in loader:
            loss = model(**inputs.to(model.device)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch}: loss {total / len(loader):.3f}")
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or path of a decoder")
    parser.add_argument("--text", help="text file with one example per line")
    parser.add_argument("--out", default="adept-adapter", help="directory in which to save the adapter")
    parser.add_argument("--start", default="the film", help="text that the trained model continues")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the network (prompt: 0.3)")
    options = parser.parse_args()

    torch.manual_seed(0)
    model, tokenizer = load_decoder(options.model)
    lines = [text for text, _ in SENTENCES]
    if options.text is not None:
        lines = Path(options.text).read_text(encoding="utf-8").splitlines()

    # Use as many parameters as a prompt of 20 tokens: 8 prompt tokens, and a network with the remaining ones.
    budget = 20 * model.config.hidden_size
    config = fastprefix.ADePTConfig.for_budget(model, trainable=budget, num_virtual_tokens=8)
    fastprefix.attach(model, config)
    print(fastprefix.count_parameters(model))
    optimizer = torch.optim.AdamW(fastprefix.parameter_groups(model, lr=options.lr, prompt_lr=0.3))
    train(model, tokenizer, lines, options.epochs, optimizer)

    fastprefix.save_adapter(model, options.out)
    print(f"the adapter is in {options.out}")

    # For inference, merge the network into the embedding table, and the prompt into keys and values of every layer.
    fastprefix.merge(model)
    start = tokenizer(options.start, return_tensors="pt").to(model.device)
    output = model.generate(**start, max_new_tokens=8, pad_token_id=tokenizer.pad_token_id)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
