"""Fine-tune a classifier with APT (adaptive prefix tuning) and ``Trainer``.

    python examples/finetune_classifier.py --model roberta-base --data train.tsv --out adapter

DATA is a tab-separated file with a header and two columns: the text, and the label as a number. Without ``--model`` the
script uses a tiny random encoder, and without ``--data`` a few made-up sentences. It then runs in seconds.
"""

import argparse
import csv
import random
import tempfile
from pathlib import Path

import torch
from toy import SENTENCES, TINY, word_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import fastprefix


def read(path: str) -> list[tuple[str, int]]:
    """Read texts and labels from a tab-separated file."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    return [(text, int(label)) for text, label in rows]


def load(name: str | None, labels: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an encoder with a new head, and its tokenizer. Without a name, return a tiny random encoder."""
    if name is not None:
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=labels)
        return model, AutoTokenizer.from_pretrained(name)
    tokenizer = word_tokenizer()
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # dropout hurts so small a model
    config = BertConfig(**TINY, **still, vocab_size=len(tokenizer), num_labels=labels)
    return BertForSequenceClassification(config), tokenizer


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or path of an encoder")
    parser.add_argument("--data", help="file with tab-separated texts and labels")
    parser.add_argument("--out", default="apt-adapter", help="directory in which to save the adapter")
    parser.add_argument("--start", default="the film was wonderful", help="text from which the prefix is initialized")
    parser.add_argument("--tokens", type=int, default=20, help="length of the prefix")
    parser.add_argument("--epochs", type=float, default=15)
    parser.add_argument("--lr", type=float, default=2e-2)
    options = parser.parse_args()

    set_seed(0)
    pairs = SENTENCES if options.data is None else read(options.data)
    model, tokenizer = load(options.model, labels=1 + max(label for _, label in pairs))

    # The base model is frozen. The prefix, its gates and the new head are trained. The prefix starts from the keys and
    # values of a text, which is better than random initialization.
    config = fastprefix.APTConfig(num_virtual_tokens=options.tokens, init="text", init_text=options.start)
    fastprefix.attach(model, config, tokenizer=tokenizer)
    print(fastprefix.count_parameters(model))

    rows = [{**tokenizer(text, truncation=True), "label": label} for text, label in pairs]
    random.Random(0).shuffle(rows)
    held_out = len(rows) // 6
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=options.epochs,
            logging_strategy="epoch",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(
            model,
            arguments,
            optimizers=(torch.optim.AdamW(fastprefix.parameter_groups(model, lr=options.lr)), None),
            train_dataset=rows[held_out:],
            eval_dataset=rows[:held_out],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=accuracy,
        )
        trainer.train()
        print(f"accuracy on held-out rows: {trainer.evaluate()['eval_accuracy']:.2f}")
    fastprefix.save_adapter(model, options.out)
    print(f"the adapter is in {options.out}")


if __name__ == "__main__":
    main()
