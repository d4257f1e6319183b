"""Which families take a prompt, and how: ``python -m tools.survey_shared_prompt --csv FILE --out FILE``.

Every family of ``transformers`` with a language model is built small, with random weights and short sliding windows,
and gets prompt tuning with the conformance check.
"""

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import fastprefix

from .survey import Outcome, Survey, surveyed


def families() -> dict[str, str]:
    """Model types, and the class of their language model."""
    names = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return {family: name if isinstance(name, str) else name[0] for family, name in sorted(names.items())}


def survey(family: str, class_name: str) -> Outcome:
    """One family."""
    return surveyed(family, class_name, fastprefix.PromptTuningConfig(3), is_decoder=True)


SURVEY = Survey(
    __doc__ or "",
    "One prompt for the whole batch: which families",
    "`python -m tools.survey_shared_prompt`: small random models in float64, one layer of every kind, 3 prompt tokens. "
    "works: the prompt runs once for the whole batch. Values and the prompt's gradient agree to 1e-10 with the "
    "prompt's embeddings in front of every row, in as many situations as the table says.",
    families(),
    survey,
)

if __name__ == "__main__":
    raise SystemExit(SURVEY.main())
