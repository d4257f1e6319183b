"""Self-study: how much of a document in context a trained prefix replaces (cartridges, arXiv 2506.06266).

The teacher is the frozen model with the document in context, and the student the model with a prefix of P tokens alone.
The student learns the teacher's 20 most likely tokens after every token of passages that are sampled from the document,
in packed rows. On passages that are never sampled in training, the model is compared with the teacher without a prefix,
with a prefix that starts from text and is not trained, and with the trained prefix.

Without ``--model`` a small decoder is trained first, on other documents, each followed by passages from it. In three
of four rows all tokens are renamed at random, as they are in the document of the study: only the document in context
tells what comes next, and so much of it as a small decoder learns to use.

Everything is kept in ``OUT``: the same command continues an interrupted run.
"""

import argparse
import contextlib
from collections.abc import Iterator
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

DESCRIPTION = "Train prefixes that stand for a document: KL to the document in context, on passages not trained on."
TOP = 20  # tokens of the teacher that are compared
HELD_OUT, HELD_OUT_ROWS = 64, 8  # passages, and rows of them
TEACHER, STUDENT = "document", "cartridge"  # names of adapters
NOTHING, IN_CONTEXT, UNTRAINED, TRAINED = "no document", "document in context", "untrained", "trained"
TOPIC = "expressions"  # of the documentation, from which the document is; the decoder never sees it


class Settings(NamedTuple):
    """Hold the sizes of a run. The decoder is trained on ``decoder_steps`` batches."""

    size: Size
    document: int
    prefixes: tuple[int, ...]
    passage: int
    steps: int
    decoder_steps: int


FULL = Settings(Size(4, 256, 4, vocabulary=512, rows=4, length=1024), 1024, (64, 256, 512), 64, 600, 2000)
QUICK = Settings(Size(2, 64, 2, vocabulary=512, rows=2, length=64), 64, (8,), 16, 6, 6)


class Passages(Dataset[Batch]):
    """Rows of passages from a document, packed: positions begin anew with each. A row depends on its number alone."""

    def __init__(self, document: Tensor, of: Settings, rows: int, held_out: bool = False) -> None:
        starts = torch.randperm(len(document) - of.passage + 1, generator=torch.Generator().manual_seed(0))
        count = min(HELD_OUT, len(starts) // 4)
        self.starts = starts[:count] if held_out else starts[count:]
        self.document, self.length, self.rows = document, of.passage, rows
        self.count = of.size.length // of.passage

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> Batch:
        chosen = torch.randint(len(self.starts), (self.count,), generator=torch.Generator().manual_seed(row))
        places = self.starts[chosen, None] + torch.arange(self.length)
        positions = torch.arange(self.length).repeat(self.count)
        return {"input_ids": self.document[places].flatten(), "position_ids": positions}


def rename(ids: Tensor, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Give each token the name of another: the text stays one, in a language that no decoder has seen."""
    return torch.randperm(vocabulary, generator=generator)[ids]


class Lessons(Dataset[Batch]):
    """Rows to train a decoder with: a document of any length up to the longest, and passages from it until the end."""

    def __init__(self, text: Tensor, of: Settings) -> None:
        self.text, self.of, self.rows = text, of, of.decoder_steps * of.size.rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> Batch:
        generator, of = torch.Generator().manual_seed(row), self.of

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        length = draw(2 * of.passage, of.document)
        start = draw(0, len(self.text) - length)
        document = self.text[start : start + length]
        count = -(-(of.document + of.size.length // 2 - length) // of.passage)
        starts = [draw(0, length - of.passage) for _ in range(count)]
        ids = torch.cat([document, *(document[at : at + of.passage] for at in starts)])
        ids = ids[: of.document + of.size.length // 2]
        labels = ids
        if row % 4:  # nothing tells what comes next in the document itself
            ids = rename(ids, of.size.vocabulary, generator)
            labels = torch.cat([torch.full((length,), -100), ids[length:]])
        return {"input_ids": ids, "labels": labels}


class SelfStudy(Trainer):
    """Train the student. Checkpoints hold the prefix alone."""

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
    """Return the logarithms of the probabilities after every token, with an adapter or without one (None)."""
    fastprefix.set_adapter(model, name or STUDENT)
    with contextlib.nullcontext() if name else fastprefix.disable_adapter(model):
        logits: Tensor = model(**row, use_cache=False).logits
    return F.log_softmax(logits.float(), dim=-1)


def add_rest(logs: Tensor) -> Tensor:
    """Add the logarithm of the probability of all other tokens together.

    Without it the loss would be lowest where the student expects nothing but the tokens that are given.
    """
    rest = (1 - logs.exp().sum(-1, keepdim=True)).clamp(min=1e-6)
    return torch.cat([logs, rest.log()], dim=-1)


def measure_divergence(expected: Tensor, found: Tensor) -> Tensor:
    """Return the mean KL divergence of probabilities, given their logarithms, over the tokens that are given."""
    return (expected.exp() * (expected - found)).sum(-1).mean()


@torch.no_grad()
def evaluate(model: Any, passages: Passages, name: str | None) -> tuple[float, float]:
    """Return the KL divergence from the teacher, over the whole vocabulary, and the loss, on held-out passages."""
    model.eval()
    divergences, losses = list[Tensor](), list[Tensor]()
    for i in range(len(passages)):
        row = {key: tensor[None].to(model.device) for key, tensor in passages[i].items()}
        expected, found = (predict(model, row, each) for each in (TEACHER, name))
        divergences.append(measure_divergence(expected, found))
        inside = row["position_ids"][:, 1:] > 0  # tokens after another of their passage
        losses.append(F.nll_loss(found[:, :-1][inside], row["input_ids"][:, 1:][inside]))
    return torch.stack(divergences).mean().item(), torch.stack(losses).mean().item()


def make_arguments(folder: Path, steps: int, rows: int, device: torch.device, **options: Any) -> TrainingArguments:
    """Return the settings of a training that continues from its last checkpoint."""
    return TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=rows, save_steps=max(1, steps // 5),
        save_total_limit=1, logging_steps=max(1, steps // 20), report_to=[], remove_unused_columns=False,
        use_cpu=device.type == "cpu", dataloader_pin_memory=False, **options,
    )  # fmt: skip


def train(trainer: Trainer) -> tuple[int, float]:
    """Train to the end, from the last checkpoint if there is one; return the steps of this run and their seconds."""
    folder = str(trainer.args.output_dir)
    last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    former = int(str(last).rpartition("-")[2]) if last else 0
    seconds = float(trainer.train(resume_from_checkpoint=last).metrics["train_runtime"])
    return trainer.state.global_step - former, seconds


class Subject(NamedTuple):
    """Hold a frozen decoder and a document that is new to it."""

    title: str
    model: PreTrainedModel
    document: Tensor


def build_subject(options: argparse.Namespace, of: Settings, device: torch.device) -> Subject:
    """Load the decoder of ``--model``, or train one on other documents; read the document."""
    rows: list[Any] = data.read_python_documentation().to_list()
    if options.text is not None:
        with explain(f"--text {options.text}"):
            title, text = str(options.text), options.text.read_text(encoding="utf-8")
    else:
        title = f"Python documentation, {TOPIC}"
        text = "\n\n".join(row["text"] for row in rows if row["label"] == TOPIC)
    others = [row["text"] for row in rows if row["label"] != TOPIC]
    if options.model:
        words: Any = models.load_tokenizer(options.model)
        model = models.load_model(options.model, "causal_lm", 0, words.pad_token_id, 0)
    else:
        words = data.train_tokenizer(others, of.size.vocabulary)
        config = models.configure("causal_lm", of.size)
        config.tie_word_embeddings = True  # what a token is, and what is expected: copying is soon learned
        model = models.build("causal_lm", config, device)
        ids = torch.tensor(words("\n\n".join(others), add_special_tokens=False, verbose=False)["input_ids"])
        folder = options.out / f"decoder-{Hasher.hash([of, ids.tolist()])}"
        arguments = make_arguments(
            folder, of.decoder_steps, of.size.rows, device, learning_rate=2e-3, warmup_steps=of.decoder_steps // 20
        )
        print(f"a decoder of {model.num_parameters():,} parameters learns to read documents, in {folder}", flush=True)
        train(Trainer(model, arguments, train_dataset=Lessons(ids, of)))
    document = torch.tensor(words(text, verbose=False)["input_ids"][: of.document])
    if not options.model:
        document = rename(document, of.size.vocabulary, torch.Generator().manual_seed(0))
    if len(document) < 2 * of.passage:
        raise BenchmarkError(f"{title}: {len(document)} tokens are too few for passages of {of.passage}")
    return Subject(title, models.place(model, device), document)


def attach(subject: Subject, name: str, length: int, **options: Any) -> None:
    """Attach a cartridge that starts from the document."""
    config = fastprefix.CartridgeConfig(length, init_text=subject.title, **options)
    ids = subject.document.tolist()
    fastprefix.attach(subject.model, config, name=name, tokenizer=lambda *_, **__: {"input_ids": ids})


def study(subject: Subject, P: int, of: Settings, options: argparse.Namespace) -> Iterator[Row]:
    """Train a prefix of P tokens, and yield the figures of the model without it, with it untrained, and trained."""
    model, case, held_out = subject.model, {"document": len(subject.document), "P": P}, HELD_OUT_ROWS
    attach(subject, STUDENT, P, init=options.init, train=options.train)
    unseen = Passages(subject.document, of, held_out, held_out=True)

    def rate(peer: str, role: Role, name: str | None) -> Iterator[Row]:
        for quantity, value in zip(("kl", "loss"), evaluate(model, unseen, name), strict=True):
            yield figure_row(case, peer, role, "held out", quantity, value)

    yield from rate(NOTHING, "floor", None)
    yield from rate(IN_CONTEXT, "floor", TEACHER)
    yield from rate(UNTRAINED, "ours", STUDENT)
    fastprefix.set_adapter(model, STUDENT)
    groups = fastprefix.parameter_groups(model, lr=options.lr)
    about = [of, subject.document.tolist(), options.model, options.init, options.train, options.lr]
    arguments = make_arguments(
        options.out / f"prefix-{P}-{Hasher.hash(about)}", of.steps, of.size.rows, model.device, max_grad_norm=1.0
    )
    passages = Passages(subject.document, of, of.steps * of.size.rows)
    optimizers = (torch.optim.AdamW(groups, weight_decay=0.0), None)
    steps, seconds = train(SelfStudy(model, arguments, train_dataset=passages, optimizers=optimizers))
    yield from rate(TRAINED, "ours", STUDENT)
    if steps:
        rate_of_tokens = steps * of.size.rows * of.passage * passages.count / seconds
        yield figure_row(case, TRAINED, "ours", "training", "tokens/s", rate_of_tokens)
    for peer, name in ((IN_CONTEXT, TEACHER), (TRAINED, STUDENT)):
        stored: list[Any] = list(fastprefix.export_cache(fastprefix.set_adapter(model, name)).layers)
        yield figure_row(case, peer, "ours", "cache", "bytes", sum(s.keys.nbytes + s.values.nbytes for s in stored))
    fastprefix.save_adapter(model, options.out / f"cartridge-{P}", name=STUDENT)
    fastprefix.detach(model, STUDENT)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.set_defaults(out=DEFAULT_OUT / "cartridge")
    parser.add_argument("--model", metavar="NAME", help="a decoder: a folder, or a model of the hub")
    parser.add_argument("--text", type=Path, metavar="FILE", help="the document (default: of Python's documentation)")
    parser.add_argument("--document", type=positive, metavar="N", help="its longest length in tokens")
    parser.add_argument("--prefix", type=positive, nargs="+", metavar="P", help="lengths of the prefix")
    parser.add_argument("--steps", type=positive, help="of the training of each prefix")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate (default: 0.01)")
    parser.add_argument("--init", choices=("text", "chunks"), default="text", help="what a prefix starts from")
    parser.add_argument("--train", choices=("both", "values", "keys"), default="both", help="what of it is trained")


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
