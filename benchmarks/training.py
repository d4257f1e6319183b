"""One competitor on one task: its training steps, its forward passes, its losses."""

import torch
from torch import Tensor

from .memory import added_peak
from .methods import Prepared
from .tasks import Batch, Task
from .timing import Clock


class Trainee:
    """A prepared model with its optimizer; steps and passes are jobs for ``timing.interleave``."""

    def __init__(self, prepared: Prepared, task: Task, clock: Clock) -> None:
        """Train ``prepared`` on ``task``."""
        self.prepared = prepared
        self.losses: list[float] = []
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

    def forward(self, i: int) -> float:
        """The seconds of one inference pass over training batch i, without gradients."""
        self._model.eval()
        batch = self._task.train[i % len(self._task.train)]
        return self._clock(lambda: self._evaluate(batch))

    def held_out_loss(self) -> float:
        """Mean loss over the batches that nothing is trained on, each weighing by its rows."""
        self._model.eval()
        rows = [len(batch["labels"]) for batch in self._task.held_out]
        total = sum(n * self._evaluate(batch).item() for n, batch in zip(rows, self._task.held_out, strict=True))
        return float(total / sum(rows))

    def peak_memory(self) -> int | None:
        """Bytes that forward + backward add at their peak: activations, temporaries and gradients, not the model."""
        self._model.train()
        batch = self._task.train[0]
        peak = added_peak(lambda: self._model(**batch).loss.backward(), self._clock.device)
        self._model.zero_grad(set_to_none=True)
        return peak

    @torch.no_grad()
    def _evaluate(self, batch: Batch) -> Tensor:
        loss: Tensor = self._model(**batch).loss
        return loss
