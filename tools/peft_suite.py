"""Run PEFT's own tests of prompt learning without and with acceleration.

    python -m tools.peft_suite DIRECTORY --out FILE

DIRECTORY is an unpacked source distribution of the installed version of PEFT (``pip download peft==VERSION --no-deps
--no-binary :all:``). Its tests load small models by their names on the hub. This tool stores seeded random models under
these names in a local cache, and the hub is not used. In the accelerated run, every model that PEFT creates or loads
with a prompt learning method is passed to ``fastprefix.accelerate``. Models that it refuses stay plain and are counted.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest.mock
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

FILES = (
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
    "test_token_classification_qa.py",
    "test_adaption_prompt.py",
    "test_cartridge.py",
)
SELECTED = "Prefix or Prompt or prefix or prompt or Cartridge or cartridge or Adaption or adaption"
LOG = "FASTPREFIX_PEFT_SUITE"
"""The environment variable with the path of the file for a run's counts. It is only set in the accelerated run."""

_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 37,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 4, "vocab_size": 1024}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BART = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 1024, "max_position_embeddings": 512},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37},
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "vocab_size": 1024}
_START = {"decoder_start_token_id": 0}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        {**_SMALL, "ffn_dim": 37, "word_embed_proj_dim": 32},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", {**_GPT, **_ENDS}),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", {**_GPT, **_ENDS}),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**_GPT, **_ENDS}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _SMALL),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _SMALL),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", _SMALL),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", {**_SMALL, "head_dim": 8}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", _SMALL),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 1024, **_ENDS},
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", _SMALL),
    "peft-internal-testing/tiny-random-gemma4-E2B": (
        "Gemma4ForCausalLM",
        {
            **_SMALL,
            **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "num_key_value_heads": 1, "head_dim": 8},
            **{"global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 1024},
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        {**_T5, **_START},
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", {**_T5, **_START}),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        {**_BART, **_ENDS, "decoder_start_token_id": 2},
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", _SMALL),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", {**_SMALL, "pad_token_id": 1}),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", _SMALL),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", _SMALL),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", _SMALL),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        {**_SMALL, "pad_token_id": 1},
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", _SMALL),
}
"""Hub names in PEFT's tests, and the class and sizes of the model that replaces each."""


def main() -> int:
    """Run the tests twice and compare. Return 1 if a test that passes plain does not pass accelerated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="an unpacked source distribution of PEFT")
    parser.add_argument("--out", type=Path, help="write the report here, as Markdown")
    parser.add_argument("-k", dest="selected", default=SELECTED, help="expression that selects tests, as in pytest")
    parser.add_argument("--files", nargs="+", default=FILES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_cache(folder / "home" / "hub")
        tests = shutil.copytree(options.directory / "tests", folder / "peft_tests")  # this project has `tests` too
        (tests / "__init__.py").touch()
        plain, accelerated = (run(options, folder, name) for name in ("plain", "accelerated"))
        counts = Counter(json.loads(line)[0] for line in (folder / "counts").read_text("utf-8").splitlines())
    lines = list(report(plain, accelerated, counts))
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(any(plain[test] == "passed" != accelerated.get(test) for test in plain))


def build_cache(hub: Path) -> None:
    """Write seeded random models into a hub cache."""
    for name, (class_name, sizes) in MODELS.items():
        torch.manual_seed(0)
        model_class = getattr(transformers, class_name)
        model = model_class(model_class.config_class(**sizes))
        folder = hub / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        model.save_pretrained(folder / "snapshots" / ("0" * 40))


def run(options: argparse.Namespace, folder: Path, name: str) -> dict[str, str]:
    """Run the tests, and return the outcome of each test by name."""
    report = folder / f"{name}.xml"
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    given = os.environ.get("PYTHONPATH", "")  # for example the folder of another transformers
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), given]))
    if name == "accelerated":
        environment[LOG] = str(folder / "counts")
        Path(environment[LOG]).touch()
    files = [str(Path("peft_tests", file)) for file in options.files]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tools.peft_suite", "-p", "no:cacheprovider", "--no-header"]
    command += ["-k", options.selected, f"--junitxml={report}", "-W", "ignore", "--tb=line", *files]
    subprocess.run(command, cwd=folder, env=environment, check=False)
    return dict(outcomes(report))


def outcomes(report: Path) -> Iterator[tuple[str, str]]:
    """Yield every test of a JUnit report with its outcome."""
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        yield f"{case.get('classname')}::{case.get('name')}", kinds[0] if kinds else "passed"


def report(plain: dict[str, str], accelerated: dict[str, str], counts: Counter[str]) -> Iterator[str]:
    """Yield the lines of the report."""
    yield "# PEFT's own tests of prompt learning, accelerated"
    yield ""
    versions = {name: __import__(name).__version__ for name in ("peft", "transformers", "torch")}
    yield ", ".join(f"{name} {version}" for name, version in versions.items()) + "."
    yield ""
    for name, run in (("Plain", plain), ("Accelerated", accelerated)):
        yield f"{name}: " + ", ".join(f"{count} {kind}" for kind, count in Counter(run.values()).most_common()) + "."
    yield "Models in the accelerated run: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common()) + "."
    yield ""
    different = [test for test in plain if plain[test] != accelerated.get(test)]
    yield f"{len(different)} tests with a different outcome{':' if different else '.'}"
    yield from (f"- {test}: {plain[test]}, {accelerated.get(test)}" for test in different)


def pytest_configure(config: Any) -> None:
    """Accelerate every prompt learning model that PEFT creates, if this is the accelerated run (a hook of pytest)."""
    if importlib.util.find_spec("diffusers") is None:  # PEFT's tests import it, but the selected ones do not use it
        pipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = unittest.mock.MagicMock(StableDiffusionPipeline=pipeline)
    if LOG not in os.environ:
        return
    import peft
    from peft import PeftModel, mapping_func

    import fastprefix
    from fastprefix.integrations.peft.acceleration import KINDS

    def accelerated(model: Any) -> Any:
        kind = str(getattr(model.peft_type, "value", model.peft_type)) if isinstance(model, PeftModel) else None
        if kind in KINDS:
            outcome, why = "accelerated", ""
            try:
                fastprefix.accelerate(model)
                if (path := model.fastprefix.prompt_path) is not None:
                    outcome = f"accelerated ({path.partition(':')[0]})"
            except ValueError as error:
                outcome, why = "refused", str(error)
            with Path(os.environ[LOG]).open("a", encoding="utf-8") as log:
                log.write(json.dumps([outcome, kind, type(model.get_base_model()).__name__, why]) + "\n")
        return model

    make, load = peft.get_peft_model, PeftModel.from_pretrained.__func__
    made = lambda *args, **kwargs: accelerated(make(*args, **kwargs))  # noqa: E731
    peft.get_peft_model = mapping_func.get_peft_model = made
    PeftModel.from_pretrained = classmethod(lambda cls, *args, **kwargs: accelerated(load(cls, *args, **kwargs)))


class _Everything(Counter[str]):
    """Counts that contain every name."""

    def __contains__(self, name: object) -> bool:
        return True


def pytest_collection_finish(session: Any) -> None:
    """Tell PEFT's tests that every model was already loaded from the hub, so that they stay offline (a pytest hook)."""
    for name, module in list(sys.modules.items()):
        if name.endswith("testing_utils") and hasattr(module, "_HUB_MODEL_ACCESSES"):
            module._HUB_MODEL_ACCESSES = _Everything()


if __name__ == "__main__":
    raise SystemExit(main())
