"""Gradients of single rows with respect to LoRA adapters, from one backward pass per batch.

The gradient of a linear layer's weight is a sum over tokens of outer products of the output's
gradient and the input. Hooks see both for all rows of a batch at once, so a row's inner product
with a given direction, its gradient, or a projection of it needs no backward pass of its own
("ghost" products: Wang et al. 2025, arXiv:2406.11011, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from honeloom.backends.devices import memory_guard
from honeloom.backends.hf.chat import Encoded, Encoder
from honeloom.backends.hf.load import Loading
from honeloom.backends.hf.local_steps import build_optimizer, restore_trainable, trainable_state
from honeloom.backends.hf.score import WINDOW, Progress, pad_batch, windows
from honeloom.backends.hf.utility import TunableModel, trainable
from honeloom.errors import ConfigError, NotFiniteError, RowsError
from honeloom.ops.noise import rademacher, uniform
from honeloom.tuning.config import AdamWConfig
from honeloom.types.rows import Row

__all__ = ["RowGradients", "rolled_signs", "sketch"]

Observer = Callable[[str, torch.Tensor, torch.Tensor], None]
MAX_GRAD_NORM = 1.0
"""Of a step, as in `local_steps`."""
ADAM = AdamWConfig()
SETTLED = 10
"""Steps after which Adam's scale may be taken from the step before; until then a batch is gone through twice."""


def _no_progress(rows: Iterable[Row], label: str, total: int | None) -> Iterable[Row]:
    return rows


class RowGradients:
    """A model with LoRA adapters on every linear layer, and the gradients of rows with respect to them.

    The loss of a row is the mean over its scored tokens. The model stays in evaluation mode, so
    nothing is dropped out. The adapters' B is zero at the start: there the gradient of A is zero,
    and inner products are those of B alone, which sees the inputs through the random A. They
    are a random projection of the full gradients' products, not zero; A joins after one step.

    Parameters
    ----------
    model : peft model
        Only linear layers of adapters are trainable.
    encoder : Encoder
        Renders the rows, as for training.
    batch_size : int
        Rows per forward and backward pass.
    progress : callable, optional
        Wraps the rows to show progress, as `Log.track`.
    """

    def __init__(self, model: Any, encoder: Encoder, batch_size: int, progress: Progress = _no_progress) -> None:
        self.model = model.eval()
        self.encoder = encoder
        self.batch_size = batch_size
        self.progress = progress
        self._linears: dict[str, torch.nn.Linear] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module.weight.requires_grad
        }
        self._start = trainable_state(model)
        self._optimizer: torch.optim.Optimizer | None = None
        self._direction: dict[str, torch.Tensor] = {}
        self._steps = 0

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        base: Path | None = None,
        loading: Loading | None = None,
        rank: int = 8,
        seed: int = 0,
        batch_size: int = 16,
        max_length: int | None = None,
        progress: Progress | None = None,
    ) -> RowGradients:
        """Load model and tokenizer and add adapters of `rank`, drawn from `seed`; an adapter is merged first.

        Raises
        ------
        SourceError
            The folder has no tokenizer.
        """
        opened = TunableModel(path, base, "", loading or Loading(), rank, seed, batch_size, max_length).open()
        return cls(opened.model, opened.encoder, batch_size, progress or _no_progress)

    def reset(self) -> None:
        """Put the adapters back where they began, bit for bit; optimizer and direction are forgotten."""
        restore_trainable(self.model, self._start)
        self._optimizer = None
        self._direction = {}
        self._steps = 0

    def aim(self, target: Sequence[Row]) -> None:
        """Hold the mean gradient of these rows at the present weights, for `train` and `alignments`.

        Raises
        ------
        RowsError
            None of them has a scored token.
        """
        if not self._mean_gradient(target):
            raise RowsError(f"none of the {len(target)} target rows has a scored token; give rows with answers")
        self._direction = self._take_gradient()

    def train(self, rows: Sequence[Row], *, lr: float) -> npt.NDArray[np.float64]:
        """One AdamW step on the mean of the rows' losses.

        Returns
        -------
        ndarray
            Shape (n,): what the aimed-at loss owes to every row, in nats by which it falls, to
            first order: lr <g_i, P g> / n with g_i the row's gradient before the step and scaled as
            the step's is, g what `aim` holds, and P the diagonal 1 / (sqrt(v) + eps) of this
            step; momentum passes all of it on, over the next steps. NaN for rows without a
            scored token; zero where nothing is held.
        """
        if self._optimizer is None:
            self._optimizer = build_optimizer(self.model, ADAM, lr)
        if self._direction and self._steps < SETTLED:  # v changes too much to take it from before the step
            self._mean_gradient(rows)
            norm = torch.nn.utils.clip_grad_norm_(self._weights(), MAX_GRAD_NORM)
            gradient = self._take_gradient()
            found = self._products(rows, {n: d * self._scale(n, gradient[n]) for n, d in self._direction.items()})
            self._put_gradient(gradient)
        else:
            found = self._products(rows, {n: d * self._scale(n) for n, d in self._direction.items()})
            scored = max(1, int(np.isfinite(found).sum()))
            self._put_gradient({n: g / scored for n, g in self._take_gradient().items()})
            norm = torch.nn.utils.clip_grad_norm_(self._weights(), MAX_GRAD_NORM)
        count = int(np.isfinite(found).sum())
        if count:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            self._steps += 1
        self._zero_grad()
        return found * (lr / max(count, 1) * min(1.0, MAX_GRAD_NORM / (float(norm) + 1e-6)))

    def alignments(self, rows: Sequence[Row]) -> npt.NDArray[np.float64]:
        """Inner products (n,) of the rows' gradients with what `aim` holds; NaN for rows without a scored token.

        Raises
        ------
        ValueError
            Nothing is held: `aim` first.
        """
        if not self._direction:
            raise ValueError("no target gradient is held since the last reset; call aim first")
        found = self._products(self.progress(rows, "take gradients", len(rows)), self._direction, len(rows))
        self._zero_grad()
        return found

    def sketches(self, rows: Sequence[Row], *, size: int, seed: int, as_adam: bool = False) -> npt.NDArray[np.float32]:
        """Random projections (n, size) of the rows' gradients at the present weights.

        Parameters
        ----------
        rows : sequence of Row
            Those without a scored token give NaN.
        size : int
            Numbers per row. An inner product of two sketches has the gradients' own as its mean
            over `seed`, with a standard deviation of at most sqrt(2 / size) times their norms.
        seed : int
            Of the projection.
        as_adam : bool
            Of the steps that Adam would take with each row's gradient instead: its moments after
            the training so far, updated by that row alone (LESS, arXiv:2402.04333, section 2.2).
        """
        found = np.full((len(rows), size), np.nan, dtype=np.float32)
        for places, batch in self._batches(self.progress(rows, "project gradients", len(rows))):
            total = torch.zeros(len(batch), size)
            seen: set[str] = set()

            def observe(
                name: str, x: torch.Tensor, grad: torch.Tensor, total: torch.Tensor = total, seen: set[str] = seen
            ) -> None:
                if as_adam and name in seen:
                    raise ConfigError(f"{name} runs more than once per forward pass, so a row's Adam step is not known")
                seen.add(name)
                gradient = torch.einsum("bto,bti->boi", grad, x)
                step = self._adam_step(name, gradient) if as_adam else gradient
                total += sketch(step.flatten(1), size, seed, name).cpu()

            with self._watched(len(batch), observe):
                self._backward(batch)
            found[places] = total.numpy()
        self._zero_grad()
        return found

    def _products(
        self, rows: Iterable[Row], direction: Mapping[str, torch.Tensor], count: int | None = None
    ) -> npt.NDArray[np.float64]:
        """Inner products of the rows' gradients with a direction; leaves their sum in the weights' `grad`."""
        found = np.full(len(rows) if isinstance(rows, Sized) else count or 0, np.nan)
        self._zero_grad()
        for places, batch in self._batches(rows):
            sums = torch.zeros(len(batch), dtype=torch.float64)

            def observe(name: str, x: torch.Tensor, grad: torch.Tensor, sums: torch.Tensor = sums) -> None:
                sums += _inner(x, grad, direction[name]).cpu().double()

            with self._watched(len(batch), observe) if direction else nullcontext():
                self._backward(batch)
            found[places] = sums.numpy()
        return found

    def _moments(self, name: str) -> tuple[int, Any, Any]:
        """Adam's steps so far and its two running means for a weight; zeros before the first step."""
        state = self._optimizer.state.get(self._linears[name].weight) if self._optimizer else None
        return (int(state["step"]), state["exp_avg"], state["exp_avg_sq"]) if state else (0, 0.0, 0.0)

    def _scale(self, name: str, gradient: torch.Tensor | None = None) -> torch.Tensor:
        """What Adam multiplies its mean gradient with: now, or in the step that it takes with this one."""
        step, _, square = self._moments(name)
        if gradient is not None:
            step, square = step + 1, ADAM.beta2 * square + (1 - ADAM.beta2) * gradient**2
        return 1 / ((square / (1 - ADAM.beta2**step)).sqrt() + ADAM.eps)

    def _adam_step(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """What Adam would subtract, over lr, if the next gradient were this row's: (B, out, in) -> the same."""
        step, mean, _ = self._moments(name)
        mean = ADAM.beta1 * mean + (1 - ADAM.beta1) * gradient
        return mean / (1 - ADAM.beta1 ** (step + 1)) * self._scale(name, gradient)

    def _mean_gradient(self, rows: Sequence[Row]) -> int:
        """Put the mean gradient of the rows into the weights' `grad`; return how many have one."""
        self._zero_grad()
        count = sum(self._backward(batch) for _, batch in self._batches(rows))
        if count:
            self._put_gradient({name: gradient / count for name, gradient in self._take_gradient().items()})
        return count

    def _take_gradient(self) -> dict[str, torch.Tensor]:
        """Take the gradient away from the weights; a weight that no row has used has a zero one."""
        taken = {
            name: torch.zeros_like(linear.weight) if linear.weight.grad is None else linear.weight.grad
            for name, linear in self._linears.items()
        }
        self._zero_grad()
        return taken

    def _put_gradient(self, gradient: Mapping[str, torch.Tensor]) -> None:
        for name, linear in self._linears.items():
            linear.weight.grad = gradient[name]

    def _weights(self) -> list[torch.Tensor]:
        return [linear.weight for linear in self._linears.values()]

    def _batches(self, rows: Iterable[Row]) -> Iterator[tuple[list[int], list[Encoded]]]:
        """Places and encodings of rows of similar length that can be scored, `batch_size` at a time."""
        for window in windows(enumerate(trainable(self.encoder, row) for row in rows), self.batch_size * WINDOW):
            usable = sorted(((i, e) for i, e in window if e is not None), key=lambda pair: (-len(pair[1].ids), pair[0]))
            for start in range(0, len(usable), self.batch_size):
                picked = usable[start : start + self.batch_size]
                yield [i for i, _ in picked], [e for _, e in picked]

    def _backward(self, batch: Sequence[Encoded]) -> int:
        """Add the gradient of the sum of the rows' losses to the weights' `grad`; return the number of rows."""
        doing = f"taking gradients of {len(batch)} rows of up to {max(len(e.ids) for e in batch)} tokens"
        fewer = [f"--batch-size {self.batch_size // 2}"] if self.batch_size > 1 else []
        with memory_guard(self.model.device, doing, [*fewer, f"--max-length {self.encoder.max_length // 2}"]):
            # Padding stands to the right of a causal model's tokens, so no mask is needed.
            ids, _, labels = pad_batch(batch, self.model.device)
            logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
            targets = labels[:, 1:].to(logits.device)
            scored = targets != -100
            weight = (scored / scored.sum(dim=1, keepdim=True))[scored]
            losses = functional.cross_entropy(logits[scored].float(), targets[scored], reduction="none")
            loss = (losses * weight).sum()
            if not torch.isfinite(loss):
                raise NotFiniteError("the model's loss is NaN or infinite; lower lr or use --dtype fp32")
            loss.backward()
        return len(batch)

    def _zero_grad(self) -> None:
        for linear in self._linears.values():
            linear.weight.grad = None

    @contextmanager
    def _watched(self, rows: int, observe: Observer) -> Iterator[None]:
        """Show every adapter layer's input and the gradient of its output, each (rows, T, features), in backward."""

        def keeper(name: str) -> Callable[[Any, Any, torch.Tensor], None]:
            def keep(module: Any, args: Any, output: torch.Tensor) -> None:
                x = _by_row(args[0].detach(), rows, name)
                output.register_hook(lambda grad: observe(name, x, _by_row(grad, rows, name)))

            return keep

        handles = [linear.register_forward_hook(keeper(name)) for name, linear in self._linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _by_row(states: torch.Tensor, rows: int, name: str) -> torch.Tensor:
    """States as float32 (rows, T, features); experts see tokens of all rows mixed, which only one row survives."""
    if rows == 1:
        return states.reshape(1, -1, states.shape[-1]).float()
    if states.ndim != 3 or states.shape[0] != rows:
        raise ConfigError(
            f"{name} gets tokens of shape {tuple(states.shape)} and not row by row, so their rows are not known; "
            "use --batch-size 1"
        )
    return states.float()


def _inner(x: torch.Tensor, grad: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """<sum_t grad_t x_t^T, direction> of every row: (B, T, in), (B, T, out), (out, in) -> (B,)."""
    out, width = direction.shape
    product = functional.linear(x, direction) * grad if out <= width else (grad @ direction) * x
    return product.sum(dim=(1, 2))


@lru_cache(maxsize=4096)
def rolled_signs(count: int, size: int, seed: int, name: str, device: torch.device) -> tuple[Any, Any]:
    """The projection of `count` numbers to `size`: signs (count,) int8, and a shift for every block of `size`."""
    signs = rademacher(seed, f"sketch/{name}/sign", count, dtype=torch.int8, device=device)
    blocks = -(-count // size)
    shifts = (uniform(seed, f"sketch/{name}/shift", blocks) * size).long().to(device)
    return signs, shifts


def sketch(values: torch.Tensor, size: int, seed: int, name: str) -> torch.Tensor:
    """Count sketch (a Johnson-Lindenstrauss map with one non-zero per column): (B, n) -> (B, size).

    Every number gets a random sign and is added to one of `size` places. Places follow a random
    rotation of each block of `size` numbers: two numbers meet with probability at most 1 / size,
    as with independent places, and sums need no atomic operations, so they have the same bits
    every time.

    Parameters
    ----------
    values : Tensor
        Shape (B, n).
    size : int
        Numbers to keep.
    seed, name
        Of the projection; vectors under different names are independent, and sum to the sketch
        of their concatenation.

    References
    ----------
    Charikar et al. 2002, doi:10.1007/3-540-45465-9_59; Weinberger et al. 2009, arXiv:0902.2206.
    """
    signs, shifts = rolled_signs(values.shape[1], size, seed, name, values.device)
    signed = functional.pad(values * signs, (0, len(shifts) * size - values.shape[1]))
    place = (torch.arange(size, device=values.device) - shifts[:, None]) % size
    blocks = signed.view(len(values), len(shifts), size)
    return blocks.gather(2, place.expand(len(values), -1, -1)).sum(dim=1)
