"""ACCEPT (Lin et al., "ACCEPT: adaptive codebook for composite and efficient prompt tuning", EMNLP Findings 2024)."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .base import check_choice, check_positive, register
from .budget import find_largest, read_embedding_width
from .computed_prompt import ComputedPrompt
from .dept import DePT, DePTConfig


@dataclass(kw_only=True)
class ACCEPTConfig(DePTConfig):
    """DePT with codebooks. The blocks of the prompt and of the offset are weighted sums of codewords.

    The width ``d`` is split into ``K = d / t`` blocks of ``t`` numbers, each with ``r`` codewords. Block k of prompt
    token i is ``sum_j w[i, k, j] C[k, j]``. Block k of the offset at position i is ``sum_j w'[i, k, j] C'[k, j]``,
    without a scale. The learning rates are those of DePT. The paper first trains the prompt and the offset separately,
    then both together.

    Args:
        codebook_prompt: True computes the prompt from a codebook. False uses a free prompt, as in DePT.
        prompt_block: block size ``t`` of the prompt, a divisor of ``d``.
        prompt_codewords: number of codewords ``r`` per block of the prompt.
        codebook_offset: True computes the offset from a codebook. False uses DePT's low-rank offset, with its ``rank``
            and ``alpha``.
        offset_block: block size ``t'`` of the offset, a divisor of ``d``.
        offset_codewords: number of codewords ``r'`` per block of the offset.
        offset_init: initial values of the offset's codewords. "uniform" draws from +-sqrt(6 / (r' t')), as in the
            authors' code, so training does not start from the frozen model. "zero" starts from the frozen model.
    """

    codebook_prompt: bool = True
    prompt_block: int = 32
    prompt_codewords: int = 20
    codebook_offset: bool = True
    offset_block: int = 32
    offset_codewords: int = 4
    offset_init: Literal["uniform", "zero"] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("codebook_prompt", "codebook_offset"):
            check_choice(name, getattr(self, name), (False, True))
        for name in ("prompt_block", "prompt_codewords", "offset_block", "offset_codewords"):
            check_positive(name, getattr(self, name))
        check_choice("offset_init", self.offset_init, ("uniform", "zero"))
        if self.codebook_prompt and self.init != "random":
            raise ValueError(
                f'`init` must be "random" with codebook_prompt=True, because codewords are not rows of the embedding '
                f'table, got "{self.init}"'
            )

    @classmethod
    def for_budget(
        cls, model: nn.Module, *, trainable: int, num_virtual_tokens: int, max_length: int = 256, **options: Any
    ) -> "ACCEPTConfig":
        """Return the configuration with the largest offset that fits within ``trainable`` parameters.

        This sets ``offset_codewords``, or ``rank`` with ``codebook_offset=False``. The prompt has ``r d + m K r``
        parameters, or ``m d`` if it is free. Each unit of ``offset_codewords`` adds ``d + T K'`` parameters, and each
        unit of ``rank`` adds ``T + d``.
        """
        d = read_embedding_width(model)
        config = cls(num_virtual_tokens, max_length=max_length, **options)
        name, each = "rank", max_length + d
        if config.codebook_offset:
            name, each = "offset_codewords", d + max_length * count_parts("offset_block", config.offset_block, d)
        if name in options:
            raise TypeError(f"`{name}` must be left out, since it is chosen by for_budget")
        fixed = num_virtual_tokens * d
        if config.codebook_prompt:
            parts = count_parts("prompt_block", config.prompt_block, d)
            fixed = config.prompt_codewords * (d + num_virtual_tokens * parts)
        count = find_largest("trainable", trainable, fixed=fixed, each=each)
        return cls(num_virtual_tokens, max_length=max_length, **{**options, name: count})


def count_parts(name: str, block: int, width: int) -> int:
    """Return the number of blocks of size ``block`` in a width.

    Raises:
        ValueError: the width is not a multiple of ``block``.
    """
    if width % block:
        raise ValueError(f"`{name}` must be a divisor of the model's width, {width}, got {block}")
    return width // block


class Codebook(nn.Module):
    """Vectors ``[n, d]`` whose K blocks are sums of ``r`` codewords ``C [K, r, t]``, weighted by ``w [n, K, r]``."""

    def __init__(self, rows: int, parts: int, codewords: int, block: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.empty(rows, parts, codewords))
        self.codewords = nn.Parameter(torch.empty(parts, codewords, block))

    def reset_parameters(self, bound: float) -> None:
        """Draw ``w`` uniformly from +-1/sqrt(K r) and ``C`` from +-``bound``."""
        _, parts, codewords = self.weights.shape
        nn.init.uniform_(self.weights, -1.0 / math.sqrt(parts * codewords), 1.0 / math.sqrt(parts * codewords))
        nn.init.uniform_(self.codewords, -bound, bound)

    def compute_rows(self, first: int, end: int) -> Tensor:
        """Compute the vectors from ``first`` up to, but not including, ``end``."""
        return torch.einsum("nkj,kjt->nkt", self.weights[first:end], self.codewords).flatten(1)


class ACCEPT(DePT, ComputedPrompt):
    """A prompt and an offset. Each is computed from a codebook, or has the same parameters as in DePT."""

    config: ACCEPTConfig

    def _make_prompt(self) -> None:
        """Create the codebook of the prompt, or a free prompt."""
        of, d = self.config, self.shape.width
        if of.codebook_prompt:
            parts = count_parts("prompt_block", of.prompt_block, d)
            self.prompt_codebook = Codebook(of.num_virtual_tokens, parts, of.prompt_codewords, of.prompt_block)
        else:
            self.free_prompt = nn.Parameter(torch.empty(of.num_virtual_tokens, d))

    def _make_offset(self) -> None:
        """Create the codebook of the offset, or DePT's low-rank factors."""
        of = self.config
        if not of.codebook_offset:
            super()._make_offset()
            return
        parts = count_parts("offset_block", of.offset_block, self.shape.width)
        self.offset_codebook = Codebook(of.max_length, parts, of.offset_codewords, of.offset_block)

    def reset_parameters(self, table: Tensor, init_ids: Tensor | None) -> None:
        """Initialize the codebooks as in the authors' code, and the other parameters as in DePT."""
        of = self.config
        if of.codebook_prompt:
            self.prompt_codebook.reset_parameters(1.0 / math.sqrt(of.prompt_codewords * of.prompt_block))
        else:
            self._reset_prompt(self.free_prompt, table, init_ids)
        if not of.codebook_offset:
            self._reset_offset()
            return
        zero = of.offset_init == "zero"
        self.offset_codebook.reset_parameters(0.0 if zero else math.sqrt(6.0 / (of.offset_codewords * of.offset_block)))

    def compute_prompt(self) -> Tensor:
        """Compute the prompt from its codebook, or return the free prompt."""
        if not self.config.codebook_prompt:
            return self.free_prompt
        return self.prompt_codebook.compute_rows(0, self.config.num_virtual_tokens)

    def list_prompt_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the prompt's codebook, or the free prompt."""
        return list(self.prompt_codebook.parameters()) if self.config.codebook_prompt else [self.free_prompt]

    def offset(self, tokens: int, first_position: int, dtype: torch.dtype) -> dict[str, Any]:
        """Return the offset of ``tokens`` tokens from ``first_position`` on, as arguments of ``prompt_embedding``.

        Raises:
            ValueError: the input is longer than ``max_length``.
        """
        if not self.config.codebook_offset:
            return super().offset(tokens, first_position, dtype)
        end = self._check_end(tokens, first_position)
        return {"position_offset": self.offset_codebook.compute_rows(first_position, end).to(dtype)}


register("accept", ACCEPTConfig, ACCEPT)
