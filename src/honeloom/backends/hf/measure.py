"""What rows say of a model's weights: Fisher diagonals, and Gram matrices of what linear layers get.

Rows pass one at a time, without padding, and on a CPU with one thread: there the numbers have the same bits every time.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch

from honeloom.backends.devices import one_thread
from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.load import load_config
from honeloom.backends.hf.streamed import source_weights, streamed_model
from honeloom.errors import ConfigError, NotFiniteError
from honeloom.merging.engine.sources import ModelSource

__all__ = ["MeasuredModel", "fisher_diagonals", "gram_bytes", "gram_matrices", "shared_inputs"]

Progress = Callable[[Sequence[Encoded], str, int], Iterable[Encoded]]
_PROBE = 8
"""Tokens that are enough to see which layers get the same input."""


def _no_progress(rows: Sequence[Encoded], label: str, total: int) -> Iterable[Encoded]:
    return rows


@dataclass(frozen=True, slots=True)
class MeasuredModel:
    """A model in memory whose parameters know their tensors on disk.

    Attributes
    ----------
    name : str
        For messages.
    model : transformers model
        In evaluation mode; no parameter asks for a gradient.
    device : torch.device
        Where it is.
    places : mapping
        Parameter or stored buffer -> tensors on disk whose elements it holds, one after another. A tied head has those
        of the embeddings, unless it has a tensor of its own.
    shapes : mapping
        Tensor on disk -> its shape.
    """

    name: str
    model: Any
    device: torch.device
    places: Mapping[str, tuple[str, ...]]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def load(cls, source: ModelSource, *, device: torch.device, dtype: torch.dtype) -> MeasuredModel:
        """Load what a source stands for: an adapter added to its base, 8-bit weights as what they mean.

        Parameters
        ----------
        source : ModelSource
            The model; it may be closed afterwards.
        device, dtype
            Where and in which type to compute.

        Raises
        ------
        CheckpointError
            The weights do not fit the configuration, or the family is not known.
        NotFiniteError
            A weight is NaN or infinite.
        """
        config = copy.copy(load_config(source.folder))
        config.quantization_config = None  # the source gives the weights themselves
        weights, parts = source_weights(source), list[str]()

        def read(name: str, start: int, stop: int) -> torch.Tensor:
            parts.append(name)
            return weights.read(name, start, stop)

        found: dict[str, tuple[tuple[str, ...], torch.Tensor]] = {}
        with streamed_model(config, replace(weights, read=read), dtype=dtype) as model:
            for name in model.state_dict():
                streamed = _attribute(model, name)
                if isinstance(streamed, torch.nn.Parameter):
                    continue  # of a part that the language model does not use
                parts.clear()
                tensor = streamed.to(device)
                found[name] = (tuple(dict.fromkeys(parts)), tensor)
        _put(model, found, device)
        return cls(source.name, model, device, {name: disk for name, (disk, _) in found.items()}, weights.shapes)

    def linear_layers(self) -> dict[str, torch.nn.Linear]:
        """Linear layers by the tensor on disk that is their weight; without those that share it, as a tied head does.

        GPT-2's convolutions, whose weights are stored transposed, and experts that are kept as one tensor are none.
        """
        uses = Counter(self.places.values())
        found = {}
        for name, module in self.model.named_modules():
            disk = self.places.get(f"{name}.weight", ())
            if isinstance(module, torch.nn.Linear) and len(disk) == 1 and uses[disk] == 1:
                found[disk[0]] = module
        return found

    def forward(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits (T, V) of one row."""
        logits: torch.Tensor = self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=False).logits
        return logits[0]


def _attribute(model: Any, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def _put(model: Any, found: Mapping[str, tuple[tuple[str, ...], torch.Tensor]], device: torch.device) -> None:
    """Give a model its weights; those that are the same tensors on disk become one parameter."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    made: dict[tuple[str, ...], torch.nn.Parameter] = {}
    for name, (disk, tensor) in found.items():
        path, _, leaf = name.rpartition(".")
        value: torch.Tensor = tensor
        if name in parameters:
            value = made.setdefault(disk, torch.nn.Parameter(tensor, requires_grad=False))
        setattr(model.get_submodule(path), leaf, value)
    for module in model.modules():
        for leaf, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                setattr(module, leaf, buffer.to(device))


def fisher_diagonals(
    measured: MeasuredModel, rows: Sequence[Encoded], *, progress: Progress = _no_progress
) -> dict[str, torch.Tensor]:
    """Diagonal of the empirical Fisher information: the mean over rows of the squared gradient of log p(targets).

    A row's log-likelihood is the sum over its target tokens, so a long row has a large gradient. Beside the weights
    there is one float32 copy of them; a gradient is let go as soon as it is added.

    Parameters
    ----------
    measured : MeasuredModel
        Its weights are not changed.
    rows : sequence of Encoded
        Each with a target.
    progress : callable, optional
        Wraps the rows to show progress, as `Log.track`.

    Returns
    -------
    dict
        Tensor on disk -> its diagonal, of its shape, float32, in nats squared per unit of the weight squared. Zero for
        weights that no row uses.

    Raises
    ------
    NotFiniteError
        A loss or a squared gradient is NaN or infinite.
    ValueError
        There is no row, or one without a target.

    References
    ----------
    Matena and Raffel 2022, arXiv:2111.09832, section 3; with the rows' own targets instead of drawn ones.
    """
    if not rows or not all(row.targets for row in rows):
        raise ValueError("every row needs a target, and there must be one row at least")
    parameters = {n: p for n, p in measured.model.named_parameters() if n in measured.places}
    sums = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
    with one_thread(measured.device), _squares_added(parameters, sums):
        for row in progress(rows, f"measure {measured.name}", len(rows)):
            loss = _negative_log_likelihood(measured, row)
            if not bool(torch.isfinite(loss)):
                value = float(loss.detach())
                raise NotFiniteError(f"{measured.name}: the loss of a row is {value}; its weights are unusable")
            loss.backward()
    found: dict[str, torch.Tensor] = {}
    for name, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise NotFiniteError(
                f"{measured.name}: gradients of {name!r} are NaN or too large; its weights are unusable"
            )
        found |= _on_disk(measured, name, total.div_(len(rows)))
    return found


def _negative_log_likelihood(measured: MeasuredModel, row: Encoded) -> torch.Tensor:
    targets = torch.tensor(row.ids[1:], device=measured.device)
    scored = torch.tensor(row.scored[1:], device=measured.device)
    logits = measured.forward(row.ids)[:-1]
    return torch.nn.functional.cross_entropy(logits[scored].float(), targets[scored], reduction="sum")


@contextmanager
def _squares_added(parameters: Mapping[str, torch.nn.Parameter], sums: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Add the square of every gradient to a sum as soon as it is whole, and let it go."""

    def add(total: torch.Tensor, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None  # this is called once it is there
        gradient = parameter.grad.float()
        total.addcmul_(gradient, gradient)
        parameter.grad = None

    with ExitStack() as stack:
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            stack.callback(parameter.requires_grad_, False)
            handle = parameter.register_post_accumulate_grad_hook(partial(add, sums[name]))
            stack.callback(handle.remove)
        with torch.enable_grad():
            yield


def _on_disk(measured: MeasuredModel, name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter's values as those of its tensors on disk."""
    shapes = {disk: measured.shapes[disk] for disk in measured.places[name]}
    pieces = values.reshape(-1).split([prod(shape) for shape in shapes.values()])
    return {disk: piece.view(shape) for (disk, shape), piece in zip(shapes.items(), pieces, strict=True)}


def shared_inputs(measured: MeasuredModel, row: Encoded) -> dict[str, str]:
    """Which linear layers get the same input, as queries, keys and values do.

    Parameters
    ----------
    measured : MeasuredModel
        The model.
    row : Encoded
        Any; its first tokens pass through the model.

    Returns
    -------
    dict
        Weight on disk -> weight of the first layer with that input. A layer that the tokens do not reach has its own.

    Raises
    ------
    ConfigError
        The model has no linear layer that can be measured.
    """
    layers = measured.linear_layers()
    if not layers:
        raise ConfigError(
            f"{measured.name}: regmean finds no linear layer with a weight (out, in) of its own; GPT-2's are stored as "
            "(in, out). Use fisher or linear"
        )
    firsts = {name: name for name in layers}
    seen: dict[int, tuple[torch.Tensor, str]] = {}  # with the tensors, or their ids would be used again

    def note(name: str, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        firsts[name] = seen.setdefault(id(args[0]), (args[0], name))[1]

    with one_thread(measured.device), torch.no_grad(), _watched(layers, note):
        measured.forward(row.ids[:_PROBE])
    return firsts


def gram_bytes(measured: MeasuredModel, firsts: Mapping[str, str]) -> dict[str, int]:
    """Bytes of every Gram matrix that `gram_matrices` gives, by name."""
    layers = measured.linear_layers()
    return {name: 4 * layers[name].in_features ** 2 for name in dict.fromkeys(firsts.values())}


def gram_matrices(
    measured: MeasuredModel, rows: Sequence[Encoded], firsts: Mapping[str, str], *, budget: int,
    progress: Progress = _no_progress,
) -> Iterator[dict[str, torch.Tensor]]:  # fmt: skip
    """Gram matrices X^T X / n of the inputs X (n, in) of linear layers, over all n tokens of the rows.

    Divided by the tokens, so that a model does not count for more because it has more or longer rows. Sums are float32
    and stay where the model is.

    Parameters
    ----------
    measured : MeasuredModel
        The model.
    rows : sequence of Encoded
        All their tokens count, prompts included.
    firsts : mapping
        From `shared_inputs`; there is one matrix for every value in it.
    budget : int
        Bytes that the sums may take. Where they are more, the rows pass several times, each time for other layers; at
        least one matrix is in memory. The numbers do not depend on it.
    progress : callable, optional
        Wraps the rows of a pass to show progress, as `Log.track`.

    Yields
    ------
    dict
        Of one pass: weight on disk -> its matrix (in, in), float32, symmetric.

    Raises
    ------
    NotFiniteError
        An input is NaN or too large.

    References
    ----------
    Jin et al. 2023, arXiv:2212.09849, section 3.
    """
    tokens = sum(len(row.ids) for row in rows)
    passes = _passes(gram_bytes(measured, firsts), budget)
    layers = measured.linear_layers()
    for number, names in enumerate(passes, start=1):
        label = f"measure {measured.name}" + (f", pass {number} of {len(passes)}" if len(passes) > 1 else "")
        watched = {name: layers[name] for name in names}
        sums = {n: torch.zeros((m.in_features,) * 2, device=measured.device) for n, m in watched.items()}

        def add(name: str, module: Any, args: tuple[torch.Tensor, ...], sums: Any = sums) -> None:
            inputs = args[0].reshape(-1, args[0].shape[-1]).float()
            sums[name].addmm_(inputs.T, inputs)

        with one_thread(measured.device), torch.no_grad(), _watched(watched, add):
            for row in progress(rows, label, len(rows)):
                measured.forward(row.ids)
        for name, total in sums.items():
            if not bool(torch.isfinite(total).all()):
                raise NotFiniteError(
                    f"{measured.name}: inputs of {name!r} are NaN or too large; its weights are unusable"
                )
            sums[name] = (total + total.T).div_(2 * tokens)  # a product may round its two halves differently
        yield sums


def _passes(sizes: Mapping[str, int], budget: int) -> list[list[str]]:
    """Cut names into runs whose sizes stay within a budget; a name that alone is larger has its own."""
    passes: list[list[str]] = []
    left = 0
    for name, size in sizes.items():
        if size > left or not passes:
            passes.append([])
            left = budget
        passes[-1].append(name)
        left -= size
    return passes


@contextmanager
def _watched(layers: Mapping[str, torch.nn.Linear], see: Callable[..., None]) -> Iterator[None]:
    """Show what every layer gets."""
    handles = [module.register_forward_pre_hook(partial(see, name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
