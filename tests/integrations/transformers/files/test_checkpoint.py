"""Test saved adapters: contents, refusals, and interrupted saves."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, BertModel

import fastprefix
from fastprefix.integrations.transformers.files import saving
from fastprefix.integrations.transformers.files.replacing import replace_file

from .... import models
from ..test_attach import FAMILIES, METHODS, attached


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family: str, method: str, tmp_path: Path) -> None:
    model, inputs = attached(family, method), models.batch("right")
    fastprefix.save_adapter(model, tmp_path / "new" / "folder")
    other = fastprefix.load_adapter(FAMILIES[family](), tmp_path / "new" / "folder")
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name, p in other.named_parameters() if p.requires_grad] == trainable
    assert fastprefix.detach(other) is other


def test_files(tmp_path: Path) -> None:
    """The parameters of the method and of the head have names, and the options are readable."""
    fastprefix.save_adapter(attached("encoder", "adept"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    assert options["method"] == "adept"
    assert options["bottleneck_dim"] == 3
    assert options["base_model_type"] == "bert"
    head = {"modules_to_save.classifier.weight", "modules_to_save.classifier.bias"}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"prompt", "w1", "b1", "w2", "b2"} | head


def test_modules_to_save(tmp_path: Path) -> None:
    model = models.decoder()
    norm = model.model.norm.weight.detach().clone()
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(3, modules_to_save=["model.norm"]))
    models.randomize(model)
    fastprefix.save_adapter(model, tmp_path)
    other = fastprefix.load_adapter(models.decoder(), tmp_path)
    assert torch.equal(other.model.norm.weight, model.model.norm.weight)
    assert other.model.norm.weight.requires_grad
    assert torch.equal(fastprefix.detach(model).model.norm.weight, norm)


@pytest.mark.parametrize("written", ["fastprefix", "peft", "peft over fastprefix", "fastprefix over peft"])
@pytest.mark.parametrize("step", ["weights", "config"])
def test_an_interrupted_save_leaves_one_whole_adapter(
    step: str, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any failure, the folder contains the old adapter or the new one."""
    formats: list[Any] = written.split(" over ")
    inputs = models.batch()
    old = attached("decoder", "prompt_tuning" if formats[-1] == "peft" else "prefix")
    new = attached("decoder", "p-tuning" if formats[0] == "peft" else "apt")
    fastprefix.save_adapter(old, tmp_path, format=formats[-1])
    replace = Path.replace
    interrupted = {"weights": saving.WEIGHTS_FILE, "config": saving.CONFIG_FILE}[step]

    def fail(self: Path, target: Path) -> Path:
        if target.name == interrupted:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        fastprefix.save_adapter(new, tmp_path, format=formats[0])
    assert len(list(tmp_path.iterdir())) == 2  # nothing half-written lies about
    loaded = fastprefix.load_adapter(models.decoder(), tmp_path)
    expected = old if step == "weights" else new
    assert torch.equal(loaded(**inputs).logits, expected(**inputs).logits)


def test_two_writers_of_a_file_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write(place: Path) -> None:
        place.write_text("first")
        replace_file(path, lambda other: other.write_text("second"))
        assert path.read_text() == "second"

    replace_file(path, write)
    assert [each.read_text() for each in tmp_path.iterdir()] == ["first"]


def test_no_adapter_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="directory"):
        fastprefix.load_adapter(models.decoder(), tmp_path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    fastprefix.save_adapter(attached("decoder", "prefix"), tmp_path)
    path = tmp_path / saving.WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        fastprefix.load_adapter(models.decoder(), tmp_path)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / saving.WEIGHTS_FILE)
    with pytest.raises(ValueError, match="was not written by"):
        fastprefix.load_adapter(models.decoder(), tmp_path)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    fastprefix.save_adapter(attached("encoder", "prefix"), tmp_path)
    with pytest.raises(ValueError, match=r"bert.*llama"):
        fastprefix.load_adapter(models.decoder(), tmp_path)


def test_an_adapter_that_does_not_fit_leaves_the_model_alone(tmp_path: Path) -> None:
    fastprefix.save_adapter(attached("decoder", "prompt_tuning"), tmp_path)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8, vocab_size=100
    )
    wider, inputs = LlamaForCausalLM(config).eval(), models.batch()
    logits = wider(**inputs).logits
    with pytest.raises(ValueError, match=r"prompt must be \(5, 48\), but is \(5, 32\)"):
        fastprefix.load_adapter(wider, tmp_path)
    assert torch.equal(wider(**inputs).logits, logits)
    with pytest.raises(ValueError, match="method attached"):
        fastprefix.detach(wider)


def test_layers_labels_and_names_that_do_not_fit_are_counted_and_named(tmp_path: Path) -> None:
    fastprefix.save_adapter(attached("decoder", "prefix"), tmp_path / "two")
    with pytest.raises(ValueError, match="the adapter has 2 layers, the model 3"):
        fastprefix.load_adapter(models.decoder(layers=3), tmp_path / "two")
    fastprefix.save_adapter(attached("encoder", "prefix"), tmp_path / "classifier")
    labels = json.loads((tmp_path / "classifier" / "adapter_config.json").read_text())["base_model_labels"]
    assert labels == ["LABEL_0", "LABEL_1"]
    other = models.encoder()
    other.config.num_labels = 5
    with pytest.raises(
        ValueError, match=r"head for 2 labels \(LABEL_0, LABEL_1\), but `model` has one for 5\. .*num_labels=2"
    ):
        fastprefix.load_adapter(other, tmp_path / "classifier")
    normalized = fastprefix.attach(models.decoder(), fastprefix.PrefixTuningConfig(3, modules_to_save=["model.norm"]))
    fastprefix.save_adapter(normalized, tmp_path / "norm")  # which depends on no labels
    decoder = models.decoder()
    decoder.config.num_labels = 5
    fastprefix.load_adapter(decoder, tmp_path / "norm")
    parameters = {name: torch.nn.Parameter(torch.ones(1)) for name in "abcde"}
    with pytest.raises(ValueError, match="only the model has a, b, c and 2 more, and only the adapter has x"):
        saving.fill(parameters, {"x": torch.ones(1)})


def with_labels(*labels: str) -> BertForSequenceClassification:
    model = models.encoder()
    if labels:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: i for i, label in enumerate(labels)}
    return model


@pytest.mark.parametrize("whole", [False, True])
def test_names_of_labels_come_with_the_head(whole: bool, tmp_path: Path) -> None:
    model = fastprefix.attach(with_labels("blame", "praise"), fastprefix.PrefixTuningConfig(3))
    model.save_pretrained(tmp_path) if whole else fastprefix.save_adapter(model, tmp_path)
    other = fastprefix.load_adapter(with_labels(), tmp_path)
    assert other.config.id2label == {0: "blame", 1: "praise"}
    assert other.config.label2id == {"blame": 0, "praise": 1}
    with fastprefix.disable_adapter(other):
        assert other.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert fastprefix.detach(other).config.label2id == {"LABEL_0": 0, "LABEL_1": 1}
    named = fastprefix.load_adapter(with_labels("bad", "good"), tmp_path)
    assert named.config.id2label == {0: "bad", 1: "good"}
    with pytest.raises(ValueError, match=r"another order \(praise, blame\).*id2label=\{0: 'blame', 1: 'praise'\}"):
        fastprefix.load_adapter(with_labels("praise", "blame"), tmp_path)


def test_a_head_for_a_model_without_one(tmp_path: Path) -> None:
    fastprefix.save_adapter(attached("encoder", "prefix"), tmp_path)
    headless = BertModel(models.encoder().config)
    with pytest.raises(ValueError, match=r"but BertModel has none\. .*BertForSequenceClassification with num_labels=2"):
        fastprefix.load_adapter(headless, tmp_path)


def test_paths_beside_the_adapter(tmp_path: Path) -> None:
    fastprefix.save_adapter(attached("encoder", "prefix"), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"not a file in it\. Pass '.*adapter'"):
        fastprefix.load_adapter(models.encoder(), tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "out" / "checkpoint-20").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-3").mkdir()
    with pytest.raises(FileNotFoundError, match=r"Pass one of them, such as '.*checkpoint-20'"):
        fastprefix.load_adapter(models.encoder(), tmp_path / "out")


@pytest.mark.parametrize("composed", [False, True])
def test_the_same_options_are_recognized_in_a_checkpoint(composed: bool, tmp_path: Path) -> None:
    """The text of a cartridge is not saved, and JSON has lists only."""
    config = fastprefix.CartridgeConfig(3, init_text="w4 w5 w6 w7", attentions=("decoder",))
    model = fastprefix.attach(models.decoder(), config, tokenizer=models.tokenizer(), name="a")
    if composed:
        fastprefix.compose(model, ["a"], name="b")
    inputs = models.batch()
    expected = model(**inputs).logits
    saving.write_carried(model, tmp_path)()
    models.randomize(model)
    saving.read_carried(model, tmp_path)()
    assert torch.equal(model(**inputs).logits, expected)
    fastprefix.detach(model)
    fastprefix.attach(model, fastprefix.CartridgeConfig(4, init="normal"), name="b" if composed else "a")
    with pytest.raises(ValueError, match="with other options than the one in"):
        saving.read_carried(model, tmp_path)


def test_files_of_others_in_the_folder_of_carried_adapters_stay(tmp_path: Path) -> None:
    model = fastprefix.attach(models.decoder(), fastprefix.PrefixTuningConfig(3), check=False)
    foreign = tmp_path / "fastprefix" / "model.safetensors"
    foreign.parent.mkdir()
    save_file({"w": torch.ones(2)}, foreign)
    before = foreign.read_bytes()
    saving.write_carried(model, tmp_path)()
    assert foreign.read_bytes() == before
    assert {path.name for path in foreign.parent.iterdir()} == {"default.safetensors", "model.safetensors"}
    loaded = fastprefix.load_adapter(models.decoder(), tmp_path)
    assert torch.equal(loaded.fastprefix.prefix.keys[0], model.fastprefix.prefix.keys[0])


def _edit(path: Path, **options: object) -> None:
    description = {**json.loads(path.read_text()), **options}
    path.write_text(json.dumps({name: value for name, value in description.items() if value is not ...}))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"alpha": 16.0}, r"alpha: 8\.0 -> 16\.0"),
        ({"rank": ...}, "rank: 3 -> nothing"),
        ({"typo": 1}, "typo: nothing -> 1"),
        ({"base_model_type": "bert"}, 'base_model_type: "llama" -> "bert"'),
    ],
)
def test_options_that_were_edited_by_hand_are_refused(tmp_path: Path, options: dict[str, object], what: str) -> None:
    """Edits would have no effect, because the tensor file also contains the options."""
    model = fastprefix.attach(models.decoder(), fastprefix.DePTConfig(5, rank=3, max_length=12))
    fastprefix.save_adapter(model, tmp_path)
    path, other = tmp_path / saving.CONFIG_FILE, models.decoder()
    _edit(path, **options)
    with pytest.raises(ValueError, match=rf"`adapter_config.json` in .* was edited by hand \({what}\)\. .* delete"):
        fastprefix.load_adapter(other, tmp_path)
    with pytest.raises(ValueError, match="model"):  # nothing was attached
        fastprefix.detach(other)
    path.unlink()
    inputs = models.batch()
    assert torch.equal(fastprefix.load_adapter(other, tmp_path)(**inputs).logits, model(**inputs).logits)


def test_a_file_of_options_that_is_damaged_is_refused(tmp_path: Path) -> None:
    fastprefix.save_adapter(attached("decoder", "prefix"), tmp_path)
    (tmp_path / saving.CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"`adapter_config.json` must be JSON, .* delete"):
        fastprefix.load_adapter(models.decoder(), tmp_path)


@pytest.mark.parametrize("edit", [{"save_id": "of another save", "num_virtual_tokens": 9}, {"save_id": ...}, {}])
def test_other_ids_and_informative_entries_are_no_error(tmp_path: Path, edit: dict[str, object]) -> None:
    """Another id belongs to other options, after an interrupted save. Older files have no id."""
    model, inputs = attached("decoder", "prefix"), models.batch()
    fastprefix.save_adapter(model, tmp_path)
    _edit(tmp_path / saving.CONFIG_FILE, base_model_name_or_path="moved", **edit)
    assert torch.equal(fastprefix.load_adapter(models.decoder(), tmp_path)(**inputs).logits, model(**inputs).logits)


def test_adapters_without_an_id_are_loaded(tmp_path: Path) -> None:
    model, inputs = attached("decoder", "prefix"), models.batch()
    fastprefix.save_adapter(model, tmp_path)
    description, tensors = saving._read(tmp_path / saving.WEIGHTS_FILE)
    assert description is not None
    del description["save_id"]
    saving._write(tmp_path, {**description, "hidden_dim": 3}, tensors, {"fastprefix": json.dumps(description)})
    assert torch.equal(fastprefix.load_adapter(models.decoder(), tmp_path)(**inputs).logits, model(**inputs).logits)


def test_a_save_has_the_same_id_every_time(tmp_path: Path) -> None:
    model, ids = attached("decoder", "prefix"), []
    for folder in ("a", "b", "c"):
        if folder == "c":
            models.randomize(model, 0.1)
        fastprefix.save_adapter(model, tmp_path / folder)
        ids.append(json.loads((tmp_path / folder / saving.CONFIG_FILE).read_text())["save_id"])
    assert ids[0] == ids[1] != ids[2]


def write_lora(folder: Path) -> None:
    (folder / saving.CONFIG_FILE).write_text('{"peft_type": "LORA"}')
    save_file({"lora": torch.zeros(3)}, folder / saving.WEIGHTS_FILE, metadata={"format": "pt"})


def write_pickled_lora(folder: Path) -> None:
    (folder / saving.CONFIG_FILE).write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.bin").write_bytes(b"lora")


def write_unknown(folder: Path) -> None:
    save_file({"weight": torch.zeros(3)}, folder / saving.WEIGHTS_FILE)


def write_carried(folder: Path) -> None:
    (folder / "fastprefix").mkdir()
    (folder / "fastprefix" / "default.safetensors").write_bytes(b"prefix")


OCCUPIED: dict[str, tuple[Callable[[Path], None], str]] = {
    "lora": (write_lora, r"an adapter of PEFT \(LORA\), which would be overwritten"),
    "pickled lora": (write_pickled_lora, r"an adapter of PEFT \(LORA\), which would be overwritten"),
    "unknown": (write_unknown, "an adapter of another library"),
    "carried": (write_carried, "adapters that a PEFT model saved in 'fastprefix', which load_adapter would read"),
    "model": (lambda folder: models.decoder().save_pretrained(folder), "a whole model, which from_pretrained could"),
    "attached": (lambda folder: attached("decoder", "apt").save_pretrained(folder), "a whole model"),
}


def read_files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("format", ["fastprefix", "peft"])
@pytest.mark.parametrize("case", OCCUPIED)
def test_a_folder_with_something_else_is_refused(case: str, format: Any, tmp_path: Path) -> None:
    write, what = OCCUPIED[case]
    write(tmp_path)
    before = read_files(tmp_path)
    with pytest.raises(ValueError, match=rf"`directory` must be a separate folder, .*{what}.*\. Pass another one\."):
        fastprefix.save_adapter(attached("decoder", "prefix-shift"), tmp_path, format=format)
    assert read_files(tmp_path) == before


def test_a_folder_with_other_files_is_used(tmp_path: Path) -> None:
    """A folder of Trainer has checkpoints and the program's own files. Damaged files of an adapter are replaced."""
    models.decoder().save_pretrained(tmp_path / "checkpoint-1")
    (tmp_path / "config.json").write_text('{"learning_rate": 0.1}')
    model, inputs = attached("decoder", "prefix"), models.batch()
    fastprefix.save_adapter(model, tmp_path)
    for file in (saving.WEIGHTS_FILE, saving.CONFIG_FILE):
        (tmp_path / file).write_text("{")
        fastprefix.save_adapter(model, tmp_path)
    assert torch.equal(fastprefix.load_adapter(models.decoder(), tmp_path)(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("header", "what"),
    [
        ("{", r"The header of .*adapter_model\.safetensors cannot be read: "),
        ("[]", r"The header of .* must be a JSON object, but is '\[\]'"),
        ("null", "The header of .* must be a JSON object, but is 'null'"),
        ("{}", "The header of .* is damaged, since it lacks base_model_type"),
    ],
)
def test_a_damaged_header_is_refused(header: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / saving.WEIGHTS_FILE
    save_file({"prompt": torch.zeros(5, models.WIDTH)}, path, metadata={"fastprefix": header})
    with pytest.raises(ValueError, match=what):
        fastprefix.load_adapter(models.decoder(), tmp_path)


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], **options: object) -> None:
    """Write tensors and options into the tensor file of an adapter."""
    description, former = saving._read(folder / saving.WEIGHTS_FILE)
    header = json.dumps({**(description or {}), **options})
    save_file({**former, **tensors}, folder / saving.WEIGHTS_FILE, metadata={"fastprefix": header})
    (folder / saving.CONFIG_FILE).unlink()


def test_options_of_a_newer_version_are_refused_with_both_versions(tmp_path: Path) -> None:
    fastprefix.save_adapter(attached("decoder", "prefix"), tmp_path)
    rewrite(tmp_path, {}, new_option=3, fastprefix_version="9.9")
    what = rf"saved by fastprefix 9\.9, but fastprefix {re.escape(fastprefix.__version__)} .* no option new_option"
    with pytest.raises(ValueError, match=what):
        fastprefix.load_adapter(models.decoder(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.bfloat16])
def test_numbers_of_another_kind_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    fastprefix.save_adapter(attached("decoder", "prompt_tuning"), tmp_path)
    rewrite(tmp_path, {"prompt": torch.ones(5, models.WIDTH).to(dtype)})
    model = models.decoder()
    if dtype.is_floating_point:
        fastprefix.load_adapter(model, tmp_path)
        return
    with pytest.raises(ValueError, match=rf"damaged: prompt must be floating-point, but is {dtype}"):
        fastprefix.load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="method attached"):
        fastprefix.detach(model)


def test_the_longest_name_names_a_file(tmp_path: Path) -> None:
    model = fastprefix.attach(models.decoder(), fastprefix.PrefixTuningConfig(2), name="a" * 200)
    saving.write_carried(model, tmp_path)()
    assert fastprefix.load_adapter(models.decoder(), tmp_path, name="a" * 200).fastprefix
