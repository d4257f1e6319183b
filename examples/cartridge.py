"""Train a cartridge, a short prefix that replaces a long document, by self-study (arXiv 2506.06266).

    python examples/cartridge.py --model Qwen/Qwen3-0.6B --text manual.txt --tokens 512 --out cartridge

The teacher is the frozen model with the document in context. The student is the same model with only the cartridge. The
student learns the teacher's predictions for every token of passages sampled from the document. Without ``--model`` the
script uses a tiny random decoder, and without ``--text`` a few made-up sentences. It then runs in seconds.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from toy import SENTENCES, load_decoder
from transformers import (
    PreTrainedModel,
)

import fastprefix

TOP = 20  # number of the teacher's most likely tokens to compare


def sample_passages(document: Tensor, length: int, count: int) -> dict[str, Tensor]:
    """Return passages of a document in one packed row. Positions restart with each passage."""
    starts = torch.randint(max(len(document) - length, 0) + 1, (count,)).tolist()
    passages = [document[start : start + length] for start in starts]
    positions = [torch.arange(len(passage)) for passage in passages]
    return {"input_ids": torch.cat(passages)[None], "position_ids": torch.cat(positions)[None]}


def add_rest(logs: Tensor) -> Tensor:
    """Append the log-probability of all other tokens."""
    return torch.cat([logs, (1 - logs.exp().sum(-1, keepdim=True)).clamp(min=1e-6).log()], dim=-1)


def measure_loss(model: PreTrainedModel, row: dict[str, Tensor]) -> Tensor:
    """Return the KL divergence of the cartridge from the document in context, on the teacher's top tokens."""
    with torch.no_grad():
        fastprefix.set_adapter(model, "document")
        expected, ids = model(**row, use_cache=False).logits.float().log_softmax(-1).topk(TOP)
    fastprefix.set_adapter(model, "cartridge")
    found = model(**row, use_cache=False).logits.float().log_softmax(-1).gather(-1, ids)
    expected, found = add_rest(expected), add_rest(found)
    return (expected.exp() * (expected - found)).sum(-1).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or path of a decoder")
    parser.add_argument("--text", type=Path, help="the document, a text file")
    parser.add_argument("--tokens", type=int, default=16, help="length of the cartridge")
    parser.add_argument("--out", default="cartridge-adapter", help="directory in which to save the cartridge")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--passage", type=int, default=64, help="tokens per passage")
    parser.add_argument("--passages", type=int, default=16, help="passages per step")
    parser.add_argument("--lr", type=float, default=2e-2)
    options = parser.parse_args()

    torch.manual_seed(0)
    model, tokenizer = load_decoder(options.model)
    text = " ".join(sentence for sentence, _ in SENTENCES)
    if options.text is not None:
        text = options.text.read_text(encoding="utf-8")
    document = torch.tensor(tokenizer(text)["input_ids"])

    # An untrained cartridge as long as the document is exactly equivalent to the document in context.
    for name, length in (("document", len(document)), ("cartridge", min(options.tokens, len(document)))):
        config = fastprefix.CartridgeConfig(length, init_text=text)
        fastprefix.attach(model, config, name=name, tokenizer=tokenizer)
    print(fastprefix.count_parameters(model))

    optimizer = torch.optim.AdamW(fastprefix.parameter_groups(model, lr=options.lr))
    for step in range(options.steps):
        row = sample_passages(document, options.passage, options.passages)
        loss = measure_loss(model, {name: tensor.to(model.device) for name, tensor in row.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step}: KL to the document in context {loss.item():.4f}")

    fastprefix.detach(model, "document")
    fastprefix.save_adapter(model.eval(), options.out)
    print(f"the cartridge is in {options.out}: {len(document)} tokens of text in {config.num_virtual_tokens}")
    start = document[:4][None].to(model.device)
    output = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=8, pad_token_id=0)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
