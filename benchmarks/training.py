"""One competitor on one task: its training steps, its evaluations, its losses."""

import torch
from torch import Tensor

from .memory import added_peak
from .methods import Prepared
from .tasks import Task
from .timing import Clock


class Trainee:
    """A prepared model with its optimizer; steps and passes are jobs for ``timing.interleave``."""

    def __init__(self, prepared: Prepared, task: Task, clock: Clock) -> None:
        """Train ``prepared`` on ``task``."""
        self.losses: list[float] = []
        self._held_out_losses: list[float] = []
        self._model = prepared.model
        self._task = task
        self._clock = clock
        # The floor of a language model trains nothing at all.
        self._optimizer = torch.optim.AdamW(prepared.groups, weight_decay=0.0) if prepared.groups else None

    def train_step(self, i: int) -> float:
        """Step i: the seconds are those of forward + backward; the optimizer's are much the same for all."""
        self._model.train()
        batch = self._task.train[i]
        losses: list[Tensor] = []

        def forward_backward() -> None:
            loss = self._model(**batch).loss
            loss.backward()
            losses.append(loss.detach())

        seconds = self._clock(forward_backward)
        self.losses.append(losses[0].item())
        if self._optimizer is not None:
            self._optimizer.step()
        self._model.zero_grad(set_to_none=True)
        return seconds

    def evaluate(self, i: int) -> float:
        """Pass i over the held-out batches, one after another: the seconds of one forward pass without gradients."""
        self._model.eval()
        batch = self._task.held_out[i % len(self._task.held_out)]
        losses: list[Tensor] = []

        @torch.no_grad()
        def forward() -> None:
            losses.append(self._model(**batch).loss)

        seconds = self._clock(forward)
        self._held_out_losses.append(losses[0].item())
        return seconds

    def held_out_curve(self) -> list[float]:
        """The mean loss of every whole evaluation so far."""
        n = len(self._task.held_out)
        whole = range(0, len(self._held_out_losses) // n * n, n)
        return [sum(self._held_out_losses[i : i + n]) / n for i in whole]

    def peak_memory(self) -> int:
        """Bytes that forward + backward add at their peak: activations, temporaries and gradients, not the model."""
        self._model.train()
        batch = self._task.train[0]
        peak = added_peak(lambda: self._model(**batch).loss.backward(), self._clock.device)
        self._model.zero_grad(set_to_none=True)
        return peak
