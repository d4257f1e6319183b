"""The tuning methods. Each file defines one method: its configuration, its parameters and its formulas.

Methods do not depend on a model library. They receive the shapes of the layers that they are attached to.
"""

from .accept import ACCEPT, ACCEPTConfig
from .adept import ADePT, ADePTConfig
from .apt import APT, APTConfig
from .base import METHODS, MethodConfig, PrefixMethod, PromptMethod, VisualMethod
from .cartridge import CartridgeConfig
from .composition import Composition, CompositionConfig
from .computed_prompt import ComputedPrompt, ComputedPromptConfig, make_plain_prompt
from .dept import DePT, DePTConfig
from .llama_adapter import LlamaAdapter, LlamaAdapterConfig
from .multitask_prompt import MultitaskPrompt, MultitaskPromptConfig
from .p_tuning import PTuning, PTuningConfig
from .prefix_tuning import PrefixTuning, PrefixTuningConfig
from .prompt_tuning import PromptTuning, PromptTuningConfig
from .residual_prefix import ResidualPrefix, ResidualPrefixConfig
from .shapes import AttentionShape, EmbeddingShape, VisionShape
from .ship import SHIP, SHIPConfig
from .ulpt import ULPT, ULPTConfig
from .visual_prompt import VisualPrompt, VisualPromptConfig

__all__ = [
    "ACCEPT",
    "APT",
    "METHODS",
    "SHIP",
    "ULPT",
    "ACCEPTConfig",
    "ADePT",
    "ADePTConfig",
    "APTConfig",
    "AttentionShape",
    "CartridgeConfig",
    "Composition",
    "CompositionConfig",
    "ComputedPrompt",
    "ComputedPromptConfig",
    "DePT",
    "DePTConfig",
    "EmbeddingShape",
    "LlamaAdapter",
    "LlamaAdapterConfig",
    "MethodConfig",
    "MultitaskPrompt",
    "MultitaskPromptConfig",
    "PTuning",
    "PTuningConfig",
    "PrefixMethod",
    "PrefixTuning",
    "PrefixTuningConfig",
    "PromptMethod",
    "PromptTuning",
    "PromptTuningConfig",
    "ResidualPrefix",
    "ResidualPrefixConfig",
    "SHIPConfig",
    "ULPTConfig",
    "VisionShape",
    "VisualMethod",
    "VisualPrompt",
    "VisualPromptConfig",
    "make_plain_prompt",
]
