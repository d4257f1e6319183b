"""Survey the families of ``transformers`` on which each kind of method works.

    python -m tools.survey prefix --csv FILE
    python -m tools.survey table DIRECTORY --out FILE
    python -m tools.survey check llama --method apt

A survey builds a small model of every family, with random weights, short sliding windows and one layer of every kind.
It attaches a method with three virtual tokens and runs the conformance check. The method is the simplest one of its
kind, or another one chosen by ``--method``. A survey appends a row for each family to a CSV file, and can be resumed.

``table`` writes one page with the CSV files of all surveys. ``check`` prints the report of the check of one method on
one family.
"""

import argparse
import csv
import gc
import logging
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pandas as pd
import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

import fastprefix
from fastprefix.integrations.transformers.checking.conformance import (
    ConformanceReport,
    Float64,
    check,
    format_error,
    list_reports,
)
from fastprefix.integrations.transformers.models.discovery import CopyError, list_configs, make_small_copy
from fastprefix.integrations.transformers.vision.visual_prompt import find_vision_stack
from fastprefix.methods import METHODS, MethodConfig

SECONDS, LONGEST = 180, 240  # time limit of a family, and maximum length of a message
UNSET: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4},
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 4},
    "blip-2": {"image_token_index": 1},
    "chameleon": {"vocabulary_map": {"<image>": 8711, "IMGIMGBZ": 5, "IMGIMGAZ": 4}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": {"rope_theta": 10000.0}}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] + 31 * ["sparse"], "num_experts_per_tok": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<image>": 151000, "<|extra_200|>": 151846, "<|visual token 000001|>": 151855}},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "granite4_vision": {
        "deepstack_layer_map": [[-2, 0]],
        "downsample_rate": "4/8",
        "image_grid_pinpoints": [[384, 384]],
        "spatial_target_layers": [1],
    },
    "granitemoehybrid": {"layer_types": 2 * ["linear_attention", "full_attention"], "num_hidden_layers": 4},
    "informer": {"prediction_length": 4},
    "instructblip": {"image_token_index": 1},
    "instructblipvideo": {"video_token_index": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
    "step3p7": {"text_config": {"sliding_window": 512}},
    "time_series_transformer": {"prediction_length": 4},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 256,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        }
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "xmod": {"default_language": "en_XX"},
    "videoprism": {"vision_config": {"image_size": 36, "num_frames": 2}},
    "videoprism_vision_model": {"image_size": 36, "num_frames": 2},
}
"""Options for families whose defaults do not give a model, or give one that is too slow."""

REQUIRED: dict[str, dict[str, Any]] = {
    "cartridge": {"init": "normal"},
    "multitask_prompt": {"num_tasks": 2},
    "PromptEncoderConfig": {"encoder_hidden_size": 8},
    "MultitaskPromptTuningConfig": {"num_tasks": 2},
}
"""Required options of the methods of this package and of PEFT."""


@dataclass(frozen=True)
class Outcome:
    """The verdict on one family ("works", "in every row", "refused", "not built" or "not run") and its reason.

    ``situations`` is the number of situations that agree with the textbook, and ``error`` is their largest error.
    ``notes`` lists the situations that are refused or fail.
    """

    family: str
    model: str
    verdict: str
    why: str = ""
    situations: int = 0
    error: float = 0.0
    notes: str = ""


def read(path: Path | None) -> list[Outcome]:
    """Return the rows of a CSV file, or an empty list if it does not exist."""
    if path is None or not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = {"situations": int, "error": float}
    return [Outcome(**{name: numbers.get(name, str)(value) for name, value in row.items()}) for row in rows]


def append(path: Path | None, outcome: Outcome) -> None:
    """Append a row to a CSV file. A new file starts with the names of the columns."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    begins = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        if begins:
            writer.writerow(field.name for field in fields(Outcome))
        writer.writerow(astuple(outcome))


def survey_method(family: str, class_name: str, config: MethodConfig, **options: Any) -> Outcome:
    """Attach a method to a small model of a family, and run the conformance check."""
    model_class = getattr(transformers, class_name, None)
    if model_class is None:
        return Outcome(family, class_name, "not built", "transformers does not export the class")
    is_model = issubclass(model_class, transformers.PreTrainedModel)
    # ``attach`` refuses it too, but some of these models cannot be built.
    if is_model and config.kind == "prefix" and not model_class._can_set_attn_implementation():
        return Outcome(family, class_name, "refused", "its attention does not go through the attention interface")
    with Float64():
        model = small_model(family, class_name, **options)
    try:
        fastprefix.attach(model, config)
    except ValueError as error:
        return Outcome(family, class_name, "refused", format_error(error, LONGEST))
    path = getattr(model.fastprefix, "prompt_path", None)
    fastprefix.detach(model)
    checked = find_vision_stack(model).reader if config.kind == "visual" else model
    return outcome_of(family, class_name, path, list_reports(checked, config.method_name())[-1])


def outcome_of(family: str, class_name: str, path: str | None, report: ConformanceReport) -> Outcome:
    """Return the row of a supported family. ``path`` is "shared", "textbook: " and a reason, or None for a prefix."""
    verdict, why = ("works", "") if path in (None, "shared") else ("in every row", path.partition(": ")[2])
    agree = [finding for finding in report.findings if finding.verdict == "ok" and finding.situation != "autocast"]
    notes = "; ".join(str(f) for f in report.findings if f.verdict in ("refused", "fails"))
    error = max((finding.error for finding in agree), default=0.0)
    return Outcome(family, class_name, verdict, why, len(agree), error, notes[:600])


def small_model(family: str, class_name: str, **options: Any) -> Any:
    """Build a small model of a family, in float64 and in evaluation mode.

    ``options`` override values that its configuration has.
    """
    config: Any = AutoConfig.for_model(family, **UNSET.get(family, {}))
    own = getattr(transformers, class_name).config_class
    config = next((part for part in list_configs(config) if isinstance(part, own)), config)
    for part in list_configs(config):
        for name, value in options.items():
            if vars(part).get(name) is not None:
                setattr(part, name, value)
        if part.model_type.endswith("_thinker"):
            part.vision_start_token_id = 0
    return make_small_copy(config, getattr(transformers, class_name), torch.float64)


class _Stopped(BaseException):
    """Not an ``Exception``, because code that tries several sizes or inputs catches those."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError if the code in the context takes longer than ``seconds``."""

    def stop(*_: object) -> None:
        raise _Stopped

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    except _Stopped:
        raise TimeoutError(f"not done within {seconds} s") from None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def survey_peft(family: str, class_name: str, config_name: str) -> Outcome:
    """Accelerate a method of PEFT on a small model of a family, and run the check, which compares it with PEFT."""
    import peft

    try:
        with Float64():
            base = small_model(family, class_name, is_decoder=family in ("bert", "roberta"))
            task = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
            options = REQUIRED.get(config_name, {})
            config = getattr(peft, config_name)(task_type=task, num_virtual_tokens=3, **options)
            model: Any = peft.get_peft_model(base, config).double().eval()
            run_peft(model)
    except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return Outcome(family, class_name, "fails with PEFT alone", format_error(error, LONGEST))
    try:
        fastprefix.accelerate(model)
    except ValueError as error:
        return Outcome(family, class_name, "refused", format_error(error, LONGEST))
    return outcome_of(family, class_name, model.fastprefix.prompt_path, list_reports(base, model.peft_type.value)[-1])


def run_peft(model: Any) -> None:
    """Run a PEFT model on a few tokens."""
    ids = torch.arange(10, 14)[None]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    more |= {"task_ids": ids[:, 0] * 0} if hasattr(model.active_peft_config, "num_tasks") else {}
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)


def list_families(*mappings: Mapping[str, Any]) -> dict[str, str]:
    """Return the model class of each model type. If a type has several classes, the first one is used."""
    names = {family: name for mapping in mappings for family, name in mapping.items()}
    return {family: name if isinstance(name, str) else name[0] for family, name in sorted(names.items())}


class Survey(NamedTuple):
    """The families on which a kind of method is tried, and the function that tries it."""

    families: dict[str, str]
    survey: Callable[[str, str], Outcome]

    def run(self, family: str) -> Outcome:
        """Survey one family, and return an outcome for every error."""
        name = self.families[family]
        try:
            with time_limit(SECONDS):
                return self.survey(family, name)
        except CopyError as error:
            return Outcome(family, name, "not run" if error.built else "not built", format_error(error, LONGEST))
        except (ImportError, TimeoutError) as error:
            return Outcome(family, name, "not built", format_error(error, LONGEST))
        except Exception as error:
            return Outcome(family, name, "FAILED", format_error(error, LONGEST))


_MODELS, _DECODERS = modeling_auto.MODEL_MAPPING_NAMES, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
_IMAGES = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
_PICTURES = modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
_SEEING = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
_HALVES = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
SURVEYS = {
    "prefix": Survey(
        list_families(_DECODERS, _MODELS), partial(survey_method, config=fastprefix.PrefixTuningConfig(3))
    ),
    "prompt": Survey(
        list_families(_SEEING, _DECODERS),
        partial(survey_method, config=fastprefix.PromptTuningConfig(3), is_decoder=True),
    ),
    "visual": Survey(
        list_families(_PICTURES, _IMAGES), partial(survey_method, config=fastprefix.VisualPromptConfig(3, depth="deep"))
    ),
    "peft-prefix": Survey(
        list_families(_SEEING, _HALVES, _DECODERS), partial(survey_peft, config_name="PrefixTuningConfig")
    ),
    "peft-prompt": Survey(
        list_families(_SEEING, _HALVES, _DECODERS), partial(survey_peft, config_name="PromptTuningConfig")
    ),
}
COLUMNS = {
    "prefix": "prefix methods",
    "prompt": "prompt methods",
    "visual": "visual methods",
    "visual-ship": "SHIP",
    "peft-prefix": "PEFT prefixes, accelerated",
    "peft-prompt": "PEFT prompts, accelerated",
}
VERDICTS = ["works", "in every row", "refused", "not tried"]
COUNTED = {
    "prefix-own-softmax": 'prefixes, `softmax="own"`',
    "prompt-accept": "ACCEPT",
    "prompt-multitask_prompt": "MPT",
    "prompt-ulpt": "ULPT",
    "prompt-p_tuning": "P-tuning",
}
"""Surveys of methods that use the same code as those above. The page shows only how many families have each verdict."""
PAGE = """\
# Which model families work

This page was generated with transformers {transformers} and PyTorch {torch}. A small model of every family is built in
float64 and compared with the textbook, or with PEFT alone for PEFT's methods. The comparison covers the values and all
gradients of trained parameters, in all situations that the family supports.

- **works**: values and gradients agree to 1e-10. The number in parentheses is the number of situations. Prompts, also
  visual ones, run once for the whole batch. They are tried on the family's causal language model, such as
  `BertLMHeadModel`.
- **in every row**: the same, but a prompt runs in every row, because sharing it would give different results.
  A number of 0 means that no situation could be compared.
- **refused**: `attach` or `accelerate` raises an error with the reason and an alternative.
- **not tried**: no small model could be built or run here, or PEFT alone fails on it. `attach` checks the method on
  your model.

The CSV files in the folder `{folder}`, such as [prefix.csv]({folder}/prefix.csv), contain the reasons, with a row for
each family.

{counts}

The table below has the verdict of each family for the first methods. The CSV files have those of the others:

{table}
"""


def write_table(folder: Path, out: Path) -> None:
    """Write one page with the results of all surveys."""
    verdicts, counts = {}, {}
    for kind, title in {**COLUMNS, **COUNTED}.items():
        if not (folder / f"{kind}.csv").exists():
            continue
        rows = pd.read_csv(folder / f"{kind}.csv").set_index("family").sort_index()
        untried = rows.verdict.isin(["not built", "not run", "fails with PEFT alone"])
        shown = rows.verdict.mask(untried, "not tried")
        counts[title] = shown.value_counts()
        if kind in COLUMNS:
            served = shown.isin(["works", "in every row"])
            verdicts[title] = shown.mask(served, shown + " (" + rows.situations.astype(str) + ")")
    verdict_counts = pd.DataFrame(counts).T
    columns = dict.fromkeys([*VERDICTS, *verdict_counts])  # a failure that nothing expects comes last
    page = PAGE.format(
        transformers=transformers.__version__,
        torch=torch.__version__,
        folder=folder.name,
        counts=verdict_counts.reindex(columns=list(columns)).fillna(0).astype(int).to_markdown(),
        table=pd.DataFrame(verdicts).fillna("").to_markdown(),
    )
    out.write_text(page, encoding="utf-8")


def make_config(method: str, **options: str) -> MethodConfig:
    """Return a configuration with three virtual tokens, the required options of the method, and ``options``."""
    return METHODS[method][0](3, **{**REQUIRED.get(method, {}), **options})


def list_methods(kind: str) -> list[str]:
    """Return the methods of a kind: those of this package by name, and those of PEFT by configuration class."""
    if kind == "peft-prompt":
        return ["PromptTuningConfig", "PromptEncoderConfig", "MultitaskPromptTuningConfig"]
    if kind == "peft-prefix":
        return ["PrefixTuningConfig", "CartridgeConfig"]
    return [name for name, (config, _) in METHODS.items() if config.kind == kind and name != "composition"]


def choose_method(kind: str, method: str | None, options: Mapping[str, str] = MappingProxyType({})) -> Survey:
    """Return the survey of a kind, or of another method of this kind with options of its configuration."""
    survey = SURVEYS[kind]
    if method is None:
        return survey
    if kind.startswith("peft"):
        return survey._replace(survey=partial(survey_peft, config_name=method))
    of_model: dict[str, Any] = {"is_decoder": True} if kind == "prompt" else {}
    return survey._replace(survey=partial(survey_method, config=make_config(method, **options), **of_model))


def print_report(family: str, method: str, situations: list[str] | None) -> bool:
    """Print the report of the conformance check of a method on a small model. Return True if it agrees."""
    config = make_config(method)
    survey = SURVEYS[config.kind]
    with Float64():
        model = small_model(family, survey.families[family], is_decoder=config.kind == "prompt")
    attach = partial(fastprefix.attach, check=False)
    report = check(model, config, attach, situations)
    print(report)
    return report.agrees


def main() -> int:
    """Run a survey or a check, or write the table. Return 1 if a family fails unexpectedly."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition(".\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for kind in SURVEYS:
        command = commands.add_parser(kind)
        command.add_argument("--csv", type=Path, help="append a row for every family, except those that have one")
        command.add_argument("--family", nargs="+", metavar="TYPE", help="default: all")
        command.add_argument("--method", choices=list_methods(kind), help="default: the simplest of its kind")
        command.add_argument("--option", nargs="+", default=[], metavar="NAME=VALUE", help="options of --method")
        command.add_argument("--part", default="0/1", metavar="I/N", help="every Nth family from the Ith on")
    table = commands.add_parser("table")
    table.add_argument("folder", type=Path, help="folder of the CSV files, which are named after the surveys")
    table.add_argument("--out", type=Path, required=True, help="write the page here, as Markdown")
    report = commands.add_parser("check")
    report.add_argument("family")
    report.add_argument("--method", choices=METHODS, default="prefix_tuning")
    report.add_argument("--situation", nargs="+", metavar="NAME", help="such as 'left padding'; default: all")
    options = parser.parse_args()
    if options.command == "check":
        return int(not print_report(options.family, options.method, options.situation))
    if options.command == "table":
        write_table(options.folder, options.out)
        return 0
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if options.option and (options.method is None or options.command.startswith("peft")):
        parser.error("--option requires a --method of this package")
    survey = choose_method(options.command, options.method, dict(option.split("=", 1) for option in options.option))
    part, of = map(int, options.part.split("/"))
    known = {outcome.family: outcome for outcome in read(options.csv)}
    for family in (options.family or list(survey.families))[part::of]:
        if family not in known:
            known[family] = survey.run(family)
            print(*filter(None, astuple(known[family])), sep=" | ", flush=True)
            append(options.csv, known[family])
            gc.collect()  # models are large and contain reference cycles
    return int(any(outcome.verdict == "FAILED" for outcome in known.values()))


if __name__ == "__main__":
    raise SystemExit(main())
