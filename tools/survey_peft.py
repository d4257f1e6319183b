"""On which families PEFT's prefixes and prompts run accelerated: ``python -m tools.survey_peft --csv FILE --out FILE``.

Every family of ``transformers`` with a language model is built small, with random weights and short sliding windows,
gets a PEFT prefix or a PEFT prompt, and is accelerated with the conformance check, whose yardstick is PEFT alone.
"""

import itertools

import peft
import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

import fastprefix
from fastprefix.integrations.transformers.conformance import Float64, list_reports

from .survey import Outcome, Survey, one_line, outcome_of, small_model

KINDS = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}


def families() -> dict[str, str]:
    """Model types with a kind of adapter, and the class of their model with a language head."""
    names = {
        **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        **MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    pairs = itertools.product(sorted(names.items()), KINDS)
    return {f"{family} {kind}": name if isinstance(name, str) else name[0] for (family, name), kind in pairs}


def survey(family: str, class_name: str) -> Outcome:
    """One family with one kind of adapter."""
    name, _, kind = family.partition(" ")
    try:
        with Float64():
            base = small_model(name, class_name, is_decoder=name in ("bert", "roberta"))
            model = tuned(base, kind)
            run(model)
    except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return Outcome(family, class_name, "fails with PEFT alone", one_line(error))
    try:
        fastprefix.accelerate(model)
    except ValueError as error:
        return Outcome(family, class_name, "refused", one_line(error))
    path = model.fastprefix.prompt_path
    return outcome_of(family, class_name, path, list_reports(base, model.peft_type.value)[-1])


def tuned(base: object, kind: str) -> peft.PeftModel:
    """Return a family with an adapter of PEFT in float64."""
    task = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    model: peft.PeftModel = peft.get_peft_model(base, KINDS[kind](task_type=task, num_virtual_tokens=3))
    return model.double().eval()


def run(model: peft.PeftModel) -> None:
    """Run a model of PEFT on a few tokens."""
    ids = torch.arange(10, 14)[None]
    decoded = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **decoded)


SURVEY = Survey(
    __doc__ or "",
    "PEFT's prefixes and prompts, accelerated: which families",
    "`python -m tools.survey_peft`: small random models in float64, one layer of every kind, 3 virtual tokens. works: "
    "accelerated. in every row: a prompt that stays on PEFT's path, and why. Values and gradients agree to 1e-10 with "
    "PEFT's own, in as many situations as the table says.",
    families(),
    survey,
)

if __name__ == "__main__":
    raise SystemExit(SURVEY.main())
