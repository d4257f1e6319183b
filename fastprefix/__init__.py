"""Fused kernels for prefix tuning and prompt tuning.

Importing the package is cheap, because ``transformers`` is only imported at the first use of a name that needs it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import reference
from ._version import __version__
from .methods import (
    ACCEPTConfig,
    ADePTConfig,
    APTConfig,
    CartridgeConfig,
    DePTConfig,
    LlamaAdapterConfig,
    MultitaskPromptConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    ResidualPrefixConfig,
    SHIPConfig,
    ULPTConfig,
    VisualPromptConfig,
)
from .ops.prefix_attention import prefix_attention
from .ops.prompt_embedding import prompt_embedding

if TYPE_CHECKING:
    from . import testing
    from .integrations.peft import accelerate, decelerate
    from .integrations.transformers import (
        AdapterStore,
        PrefixState,
        ReferenceModel,
        ResidentAdapters,
        attach,
        compose,
        compute_bank,
        count_parameters,
        detach,
        disable_adapter,
        encode_prompt_embeds,
        export_cache,
        export_merged_base,
        export_prompt_embeds,
        find_entered_layers,
        load_adapter,
        merge,
        parameter_groups,
        push_to_hub,
        read_prefix,
        save_adapter,
        set_adapter,
        swap_prefix,
    )

__all__ = [
    "ACCEPTConfig",
    "ADePTConfig",
    "APTConfig",
    "AdapterStore",
    "CartridgeConfig",
    "DePTConfig",
    "LlamaAdapterConfig",
    "MultitaskPromptConfig",
    "PTuningConfig",
    "PrefixState",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "ReferenceModel",
    "ResidentAdapters",
    "ResidualPrefixConfig",
    "SHIPConfig",
    "ULPTConfig",
    "VisualPromptConfig",
    "__version__",
    "accelerate",
    "attach",
    "compose",
    "compute_bank",
    "count_parameters",
    "decelerate",
    "detach",
    "disable_adapter",
    "encode_prompt_embeds",
    "export_cache",
    "export_merged_base",
    "export_prompt_embeds",
    "find_entered_layers",
    "load_adapter",
    "merge",
    "parameter_groups",
    "prefix_attention",
    "prompt_embedding",
    "push_to_hub",
    "read_prefix",
    "reference",
    "save_adapter",
    "set_adapter",
    "swap_prefix",
    "testing",
]


def __getattr__(name: str) -> Any:
    if name == "testing":
        return importlib.import_module(".testing", __name__)
    if name in ("accelerate", "decelerate"):
        from .integrations import peft

        return getattr(peft, name)
    if name in __all__:
        from .integrations import transformers

        return getattr(transformers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
