"""Train a cartridge, a short prefix that replaces a long document, by self-study (arXiv 2506.06266).

    python examples/cartridge.py --model Qwen/Qwen3-0.6B --text manual.txt --tokens 512 --questions 64 --out cartridge

The teacher is the frozen model with the document in context. The student is the same model with only the cartridge. The
student learns the teacher's predictions for every token of passages sampled from the document, and of questions and
answers that the teacher writes. Without ``--model`` the script uses a tiny random decoder, and without ``--text`` a few
made-up sentences. It then runs in seconds.
"""

import argparse
import functools
import time
from pathlib import Path

import torch
from torch import Tensor
from toy import SENTENCES, load_decoder
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import fastprefix

TOP = 20  # number of the teacher's most likely tokens to compare
Row = dict[str, Tensor]
Target = tuple[Tensor, Tensor]  # log-probabilities and ids of the teacher's top tokens


def pack(pieces: list[Tensor], device: torch.device) -> Row:
    """Return pieces of text in one packed row. Positions restart with each piece, and no piece sees another."""
    positions = torch.cat([torch.arange(len(piece)) for piece in pieces])
    return {"input_ids": torch.cat(pieces)[None].to(device), "position_ids": positions[None].to(device)}


class Passages:
    """The passages of a document. Every eighth one is held out: training never sees any of its tokens."""

    def __init__(self, document: Tensor, length: int) -> None:
        self.document, self.length = document, max(1, min(length, len(document) // 4))
        blocks = document.split(self.length)
        chosen = range(3, len(blocks), 8) or range(len(blocks) - 1, len(blocks))
        self.held_out = [blocks[index] for index in chosen]
        is_free = torch.ones(len(document), dtype=torch.bool)
        for index in chosen:
            is_free[index * self.length : (index + 1) * self.length] = False
        self.starts = is_free.unfold(0, self.length, 1).all(1).nonzero().flatten()

    def sample(self, count: int) -> list[Tensor]:
        """Return passages to train on."""
        starts = self.starts[torch.randint(len(self.starts), (count,))].tolist()
        return [self.document[start : start + self.length] for start in starts]


def write_questions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Tensor]:
    """Let the model write questions and answers. It has to have the document in context."""
    start = tokenizer("\n\nQuestion:", return_tensors="pt", add_special_tokens=False).to(model.device)
    output = model.generate(
        **start, max_new_tokens=64, do_sample=True, num_return_sequences=count, pad_token_id=tokenizer.pad_token_id
    )
    return [row[row != tokenizer.pad_token_id] for row in output.cpu()]


@torch.no_grad()
def teach(model: PreTrainedModel, row: Row) -> Target:
    """Return the teacher's predictions for a row. They are kept, so that the teacher reads each row once."""
    values, ids = model(**row, use_cache=False).logits.float().log_softmax(-1).topk(TOP)
    return values, ids


def add_rest(logs: Tensor) -> Tensor:
    """Append the log-probability of all other tokens."""
    return torch.cat([logs, (1 - logs.exp().sum(-1, keepdim=True)).clamp(min=1e-6).log()], dim=-1)


def measure_divergence(model: PreTrainedModel, row: Row, target: Target) -> Tensor:
    """Return the KL divergence of the model from the teacher, on the teacher's top tokens."""
    expected, ids = target
    found = add_rest(model(**row, use_cache=False).logits.float().log_softmax(-1).gather(-1, ids))
    expected = add_rest(expected)
    return (expected.exp() * (expected - found)).sum(-1).mean()


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults, and the description as it is."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--model", help="name or path of a decoder")
    parser.add_argument("--text", type=Path, help="the document, a text file")
    parser.add_argument("--tokens", type=int, default=16, help="length of the cartridge, at most that of the document")
    parser.add_argument("--out", default="cartridge-adapter", help="directory in which to save the cartridge")
    parser.add_argument("--steps", type=int, default=100, help="training steps, each on one row")
    parser.add_argument("--passage", type=int, default=64, help="tokens per passage, at most a quarter of the document")
    parser.add_argument("--passages", type=int, default=16, help="passages per row")
    parser.add_argument("--rows", type=int, default=32, help="number of different rows, each read once by the teacher")
    parser.add_argument("--questions", type=int, default=0, help="questions that the model writes, with their answers")
    parser.add_argument("--lr", type=float, default=2e-2, help="learning rate")
    parser.add_argument("--prompt", help="text to continue at the end, without and with the cartridge")
    options = parser.parse_args()

    torch.manual_seed(0)
    model, tokenizer = load_decoder(options.model)
    text = " ".join(sentence for sentence, _ in SENTENCES)
    if options.text is not None:
        text = options.text.read_text(encoding="utf-8")
    document = torch.tensor(tokenizer(text)["input_ids"])
    passages = Passages(document, options.passage)

    # An untrained cartridge as long as the document is exactly equivalent to the document in context.
    for name, length in (("document", len(document)), ("cartridge", min(options.tokens, len(document)))):
        config = fastprefix.CartridgeConfig(length, init_text=text)
        fastprefix.attach(model, config, name=name, tokenizer=tokenizer)
    print(fastprefix.count_parameters(model))

    fastprefix.set_adapter(model, "document")
    pieces = [passages.sample(options.passages) for _ in range(options.rows)]
    if options.questions:
        questions = write_questions(model.eval(), tokenizer, options.questions)
        print(f"a question that the model wrote: {tokenizer.decode(questions[0])!r}", flush=True)
        pieces += [questions[first : first + options.passages] for first in range(0, len(questions), options.passages)]
    print(f"the teacher reads {len(pieces) + 1} rows", flush=True)
    packed = [pack(of, model.device) for of in [passages.held_out[: options.passages], *pieces]]
    held_out, *rows = [(row, teach(model, row)) for row in packed]
    fastprefix.detach(model, "document")

    fastprefix.set_adapter(model, "cartridge")
    with torch.no_grad(), fastprefix.disable_adapter(model):
        print(f"KL to the document in context: frozen model {measure_divergence(model, *held_out):.4f}")
    optimizer = torch.optim.AdamW(fastprefix.parameter_groups(model, lr=options.lr))
    seconds, tokens = 0.0, 0
    for step in range(options.steps + 1):
        if step % 10 == 0 or step == options.steps:
            with torch.no_grad():
                divergence = measure_divergence(model, *held_out).item()
            speed = f", {tokens / seconds:.0f} tokens/s" if step else ""
            print(f"step {step}: KL to the document in context {divergence:.4f}{speed}", flush=True)
        if step == options.steps:
            break
        start, (row, target) = time.perf_counter(), rows[step % len(rows)]
        optimizer.zero_grad()
        measure_divergence(model, row, target).backward()
        optimizer.step()
        tokens += row["input_ids"].shape[1]
        seconds += time.perf_counter() - start

    fastprefix.save_adapter(model.eval(), options.out)
    print(f"the cartridge is in {options.out}: {len(document)} tokens of text in {config.num_virtual_tokens}")
    prompt = tokenizer(options.prompt or text[:40], return_tensors="pt").to(model.device)
    generate = functools.partial(model.generate, **prompt, max_new_tokens=24, pad_token_id=tokenizer.pad_token_id)
    with fastprefix.disable_adapter(model):
        print(f"without it: {tokenizer.decode(generate()[0], skip_special_tokens=True)!r}")
    print(f"with it: {tokenizer.decode(generate()[0], skip_special_tokens=True)!r}")


if __name__ == "__main__":
    main()
