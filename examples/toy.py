"""Provide the default inputs of the examples: a few made-up sentences, a tokenizer of their words, a tiny model."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

SENTENCES = [
    (f"the {noun} {verb} {adjective}", label)
    for noun in ("film", "story", "music", "acting", "ending", "camera", "dialogue", "cast")
    for verb in ("was", "seemed")
    for adjective, label in (("wonderful", 1), ("moving", 1), ("brilliant", 1), ("dull", 0), ("awful", 0), ("flat", 0))
]
"""Sentences and their labels: 1 is praise."""

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "initializer_range": 0.2,
}
"""Options of a model that trains in seconds."""


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word."""
    words = sorted({word for sentence, _ in SENTENCES for word in sentence.split()})
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[EOS]",
        model_input_names=["input_ids", "attention_mask"],
    )


def load_decoder(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a decoder and its tokenizer. Without a name, return a tiny random decoder."""
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(name), tokenizer
    tokenizer = word_tokenizer()
    config = LlamaConfig(
        **TINY,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config), tokenizer
