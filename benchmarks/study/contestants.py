"""What is trained: the methods at equal budgets, and the prefix methods over lengths, each as a row of a table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

import fastprefix
from fastprefix.methods import MethodConfig

from ..errors import BenchmarkError
from ..models import with_shared_weights

SHORT_PROMPT = 0.6  # of the tokens of the budget: DePT and ADePT with 60 of 100, as published
RESIDUAL_BOTTLENECK = 8  # at the equal budget, where the default of 128 would leave nothing for the rest


@dataclass(frozen=True)
class Rates:
    """Learning rates: of the soft prompt, of gates, and of everything else but the classifier's head.

    None: there is nothing of the kind; gates are trained at the main rate then.
    """

    main: float | None = None
    prompt: float | None = None
    gate: float | None = None

    def __str__(self) -> str:
        rates = " / ".join(f"{rate:g}" for rate in (self.prompt, self.main) if rate is not None)
        return rates if self.gate is None else f"{rates}, gates {self.gate:g}"


@dataclass(frozen=True)
class Contestant:
    """One row: a method with all its options, or for reference the whole model ("full") or its head alone ("head")."""

    name: str
    group: Literal["reference", "prompt", "prefix", "length"]
    trains: Literal["full", "head", "method"]
    config: MethodConfig | None
    candidates: tuple[Rates, ...]  # that the search chooses from, the published first


@dataclass(frozen=True)
class Budget:
    """Trainable parameters beside the classifier's head, the same for all methods of a group.

    A prefix of m tokens has 2 L times as many parameters as a prompt of m tokens, and a prompt as large as a usual
    prefix would have hundreds of tokens, all of which an encoder runs in every row. Hence two budgets.
    """

    prompt: int
    prefix: int


Make = Callable[[PreTrainedModel, int, int], MethodConfig]
"""A configuration for a model, a budget and the longest input."""


@dataclass(frozen=True)
class Entry:
    """A method of the table, before it is fitted to a model and a budget."""

    name: str
    group: Literal["reference", "prompt", "prefix"]
    candidates: tuple[Rates, ...]
    make: Make | None = None


def _prompt_tuning(model: PreTrainedModel, budget: int, length: int) -> MethodConfig:
    return fastprefix.PromptTuningConfig(largest(model, fastprefix.PromptTuningConfig, budget))


def _short_prompt(model: PreTrainedModel, budget: int) -> int:
    return max(1, round(SHORT_PROMPT * largest(model, fastprefix.PromptTuningConfig, budget)))


def _dept(model: PreTrainedModel, budget: int, length: int) -> MethodConfig:
    return fastprefix.DePTConfig.for_budget(
        model, trainable=budget, num_virtual_tokens=_short_prompt(model, budget), max_length=length
    )


def _adept(model: PreTrainedModel, budget: int, length: int) -> MethodConfig:
    tokens = _short_prompt(model, budget)
    return fastprefix.ADePTConfig.for_budget(model, trainable=budget, num_virtual_tokens=tokens)


def _prefix_tuning(model: PreTrainedModel, budget: int, length: int) -> MethodConfig:
    return fastprefix.PrefixTuningConfig(largest(model, fastprefix.PrefixTuningConfig, budget))


def _apt(model: PreTrainedModel, budget: int, length: int) -> MethodConfig:
    return fastprefix.APTConfig(largest(model, fastprefix.APTConfig, budget))


def _reparameterised(residual: bool, gate: bool) -> Make:
    """As many tokens as prefix tuning has, from the widest network within the budget.

    The network is dropped at export, but it is trained, and so it is counted.
    """

    def make(model: PreTrainedModel, budget: int, length: int) -> MethodConfig:
        tokens = largest(model, fastprefix.PrefixTuningConfig, budget)

        def config(width: int) -> MethodConfig:
            return fastprefix.ResidualPrefixConfig(
                tokens, hidden_dim=width, bottleneck_dim=RESIDUAL_BOTTLENECK, residual=residual, gate=gate
            )

        return config(largest(model, config, budget))

    return make


# Published rates and, since those are for thousands of steps, larger ones; prompts also smaller ones, for 0.3 is large
# beside the embeddings of an encoder. As many candidates for every method.
FULL_RATES = (Rates(2e-5), Rates(5e-5), Rates(1e-4))
HEAD_RATES = (Rates(1e-3), Rates(1e-2), Rates(3e-2))
PROMPT_RATES = (Rates(prompt=0.3), Rates(prompt=0.03), Rates(prompt=0.003))
DEPT_RATES = (Rates(1e-3, 0.3), Rates(1e-3, 0.03), Rates(5e-3, 0.003))
ADEPT_RATES = (Rates(1e-4, 0.3), Rates(1e-3, 0.03), Rates(1e-3, 0.003))
PREFIX_RATES = (Rates(1e-2), Rates(3e-2), Rates(1e-1))
GATED_RATES = (Rates(3e-2, gate=1e-3), Rates(1e-1, gate=1e-3), Rates(1e-1, gate=1e-4))
NETWORK_RATES = (Rates(1e-3), Rates(3e-3), Rates(1e-2))

NETWORKS = {  # whether there is a residual network, and a gate
    "mlp": (False, False),
    "mlp+gate": (False, True),
    "residual": (True, False),
    "residual+gate": (True, True),
}
ENTRIES = {
    "full": Entry("full fine-tuning", "reference", FULL_RATES),
    "head": Entry("head alone", "reference", HEAD_RATES),
    "pt": Entry("PT", "prompt", PROMPT_RATES, _prompt_tuning),
    "dept": Entry("DePT", "prompt", DEPT_RATES, _dept),
    "adept": Entry("ADePT", "prompt", ADEPT_RATES, _adept),
    "prefix": Entry("prefix tuning", "prefix", PREFIX_RATES, _prefix_tuning),
    "apt": Entry("APT", "prefix", PREFIX_RATES, _apt),
    "apt-gates": Entry("APT, slow gates", "prefix", GATED_RATES, _apt),
    "mlp": Entry("MLP prefix", "prefix", NETWORK_RATES, _reparameterised(*NETWORKS["mlp"])),
    "mlp+gate": Entry("MLP prefix + gate", "prefix", NETWORK_RATES, _reparameterised(*NETWORKS["mlp+gate"])),
    "residual": Entry("residual prefix", "prefix", NETWORK_RATES, _reparameterised(*NETWORKS["residual"])),
    "residual+gate": Entry(
        "residual prefix + gate", "prefix", NETWORK_RATES, _reparameterised(*NETWORKS["residual+gate"])
    ),
}
LENGTH_METHODS = ("prefix", *NETWORKS)


def budget_for(model: PreTrainedModel, prompt_tokens: int, prefix_tokens: int) -> Budget:
    """As many parameters as a plain prompt and a plain prefix of so many tokens have."""
    prompt = parameters(model, fastprefix.PromptTuningConfig(prompt_tokens))
    return Budget(prompt, parameters(model, fastprefix.PrefixTuningConfig(prefix_tokens)))


def at_budget(names: Sequence[str], model: PreTrainedModel, budget: Budget, length: int) -> list[Contestant]:
    """The named rows of the table, the methods as large as their group's budget allows."""
    contestants = []
    for key in names:
        entry = ENTRIES[key]
        if entry.make is None:
            trains: Literal["full", "head"] = "full" if key == "full" else "head"
            contestants.append(Contestant(entry.name, entry.group, trains, None, entry.candidates))
            continue
        try:
            config = entry.make(model, budget.prompt if entry.group == "prompt" else budget.prefix, length)
        except ValueError as error:
            raise BenchmarkError(
                f"{entry.name} has no size within the budget of --{entry.group}-tokens ({error}); give more, or choose "
                "other --methods"
            ) from error
        contestants.append(Contestant(entry.name, entry.group, "method", config, entry.candidates))
    return contestants


def of_length(key: str, tokens: int) -> Contestant:
    """A prefix method of a given length, whatever it costs; networks with the package's default widths."""
    entry = ENTRIES[key]
    config: MethodConfig = fastprefix.PrefixTuningConfig(tokens)
    if key in NETWORKS:
        residual, gate = NETWORKS[key]
        config = fastprefix.ResidualPrefixConfig(tokens, residual=residual, gate=gate)
    return Contestant(entry.name, "length", "method", config, entry.candidates)


def parameters(model: PreTrainedModel, config: MethodConfig) -> int:
    """How many parameters a method has on a model, the classifier's head not among them."""
    attached = fastprefix.attach(with_shared_weights(model), config)
    return fastprefix.count_parameters(attached).groups["fastprefix"]


def largest(model: PreTrainedModel, make: Callable[[int], MethodConfig], budget: int) -> int:
    """The largest size whose parameters stay within a budget; they grow by the same number with each step."""
    one, two = (parameters(model, make(size)) for size in (1, 2))
    if one > budget:
        raise ValueError(f"the smallest has {one:,} parameters, got {budget:,}")
    return 1 + (budget - one) // (two - one)
