"""On which families prefix methods work: ``python -m tools.survey_prefixes --csv FILE --out FILE``.

Every family of ``transformers`` is built small, with random weights and short sliding windows, and gets prefix tuning
with the conformance check.
"""

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

import fastprefix

from .survey import Outcome, Survey, surveyed


def families() -> dict[str, str]:
    """Model types, and the class of their model."""
    names = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_MAPPING_NAMES}
    return {family: name if isinstance(name, str) else name[0] for family, name in sorted(names.items())}


def survey(family: str, class_name: str) -> Outcome:
    """One family."""
    return surveyed(family, class_name, fastprefix.PrefixTuningConfig(3))


SURVEY = Survey(
    __doc__ or "",
    "Prefix methods: which families",
    "`python -m tools.survey_prefixes`: small random models in float64, one layer of every kind, 3 prefix tokens. "
    "works: values and the gradients of all prefixes agree to 1e-10 with the family's own eager attention over "
    "concatenated keys and values, in as many situations as the table says.",
    families(),
    survey,
)

if __name__ == "__main__":
    raise SystemExit(SURVEY.main())
