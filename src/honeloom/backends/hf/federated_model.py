"""The model of federated clients: resident once, with an adapter of each client's rank and a frozen one beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from pydantic import TypeAdapter

from honeloom.backends.devices import one_thread
from honeloom.backends.hf.chat import Encoder
from honeloom.backends.hf.client_rows import ClientRows
from honeloom.backends.hf.federated_steps import Scalars, measured, zeroth_order_steps
from honeloom.backends.hf.local_steps import build_optimizer, local_steps
from honeloom.backends.hf.tune import lora_arguments
from honeloom.errors import ConfigError
from honeloom.tuning.config import MezoConfig, MezoTuningConfig, TuneOptimizer
from honeloom.types.federation import LocalJob, LocalResult, Pairs
from honeloom.types.rows import Row

__all__ = ["FederatedModel"]

PREFIX = "base_model.model."
FROZEN = "frozen"


class FederatedModel:
    """A LocalPort on a transformers model; on a CPU it computes with one thread, so that its bits are always the same.

    Adapters are fp32 whatever the base's type, and the base is never changed: what was aggregated
    in earlier rounds is a frozen adapter, so that quantised bases take part like others.

    Parameters
    ----------
    model : transformers model
        In evaluation mode.
    encoder : Encoder
        For training.
    rows : mapping
        Rows of the clients that this process is.
    targets : str or sequence of str
        Modules with adapters.
    batch_size : int
        Rows per forward pass when scoring.
    """

    def __init__(
        self, model: Any, encoder: Encoder, rows: Mapping[str, Sequence[Row]], *, targets: str | Sequence[str],
        batch_size: int,
    ) -> None:  # fmt: skip
        self.targets = targets
        self.held = ClientRows(encoder, batch_size)
        for name, mine in rows.items():
            self.held.admit(name, mine)
        self._frozen_rank = 0
        try:
            self.model = get_peft_model(model, self._config(1), adapter_name="r1").eval()
        except ValueError as error:
            raise ConfigError(f"targets {targets!r}: {error}; `all-linear` adapts every linear layer") from None
        self._layers = {
            name.removeprefix(PREFIX): layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, LoraLayer)
        }
        self.modules: Mapping[str, tuple[int, int]] = {
            name: (layer.out_features, layer.in_features) for name, layer in self._layers.items()
        }

    def adapter_config(self) -> dict[str, Any]:
        """Settings of an adapter on these modules, as PEFT writes them."""
        config = self.model.peft_config["r1"].to_dict()
        return {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}

    def admit(self, client: str, rows: Sequence[Row]) -> None:
        """Take in a client's rows."""
        self.held.admit(client, rows)

    def clients(self) -> list[str]:
        """Whose rows are here."""
        return self.held.clients()

    def rows(self, client: str) -> int:
        """How many rows of a client can be trained on."""
        return len(self.held.of(client))

    def train(self, job: LocalJob) -> LocalResult:
        """Train an adapter for some steps; the base is as before afterwards."""
        with one_thread(self.model.device):
            adapter = self._prepare(job)
            with self.held.told(self.model, job) as metrics:
                scalars, metrics["loss_train"] = self._steps(job, adapter)
            found = {
                name: (_copy(layer.lora_B[adapter].weight), _copy(layer.lora_A[adapter].weight))
                for name, layer in self._layers.items()
            }
        return LocalResult(found, metrics, scalars)

    def measure(self, job: LocalJob) -> dict[str, float]:
        """What the loss of the client's rows bears where the job begins."""
        mezo = MezoTuningConfig(**job.settings["optimizer"])
        with one_thread(self.model.device):
            adapter = self._prepare(job)
            params = {name: layer.weight.data for name, layer in self._perturbed(adapter, mezo).items()}
            return measured(self.model.eval(), self.held, job, params, mezo)

    def hold(self, update: Pairs) -> Any:
        """The model with an update, of scale 1, and nothing else; the next job changes it."""
        rank = max(a.shape[0] for _, a in update.values())
        self._freeze(rank)
        self.model.base_model.set_adapter([FROZEN])
        for name, layer in self._layers.items():
            self._put(layer, FROZEN, update.get(name, self._nothing(name)), 1.0)
        return self.model.eval()

    def _nothing(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        m, n = self.modules[name]
        return torch.zeros(m, 0), torch.zeros(0, n)

    def _freeze(self, rank: int) -> None:
        """Have a frozen adapter of a rank, or none for 0."""
        if rank == self._frozen_rank:
            return
        if self._frozen_rank:
            self.model.delete_adapter(FROZEN)
        if rank:
            self.model.add_adapter(FROZEN, self._config(rank))
        self._frozen_rank = rank

    def _config(self, rank: int) -> LoraConfig:
        return LoraConfig(**lora_arguments(rank, rank, 0.0, self.targets, False))

    def _prepare(self, job: LocalJob) -> str:
        """Put the factors of a job in place; the name of the adapter that is trained."""
        rank = next(iter(job.start.values()))[1].shape[0]
        adapter = f"r{rank}"
        if adapter not in self.model.peft_config:
            self.model.add_adapter(adapter, self._config(rank))
        frozen = max((a.shape[0] for _, a in job.frozen.values()), default=0)
        self._freeze(frozen)
        self.model.base_model.set_adapter([adapter, FROZEN] if frozen else [adapter])
        for name, layer in self._layers.items():
            self._put(layer, adapter, job.start[name], job.scale)
            if frozen:
                self._put(layer, FROZEN, job.frozen.get(name, self._nothing(name)), 1.0)
            layer.lora_A[adapter].weight.requires_grad_(job.trains != "b")
            layer.lora_B[adapter].weight.requires_grad_(job.trains != "a")
            if frozen:
                layer.lora_A[FROZEN].requires_grad_(False)
                layer.lora_B[FROZEN].requires_grad_(False)
        return adapter

    @torch.no_grad()
    def _put(self, layer: Any, adapter: str, pair: tuple[torch.Tensor, torch.Tensor], scale: float) -> None:
        """Factors of at most the adapter's rank; the rest of it is zero."""
        for part, dim, tensor in ((layer.lora_B, 1, pair[0]), (layer.lora_A, 0, pair[1])):
            weight = part[adapter].weight
            weight.data = weight.data.float().zero_()
            weight.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
        layer.scaling[adapter] = scale

    def _steps(self, job: LocalJob, adapter: str) -> tuple[Scalars, float]:
        """Take the steps; the scalars of zeroth-order ones, and the mean loss of all."""
        settings = job.settings
        optimizer_settings: Any = TypeAdapter(TuneOptimizer).validate_python(settings["optimizer"])
        if isinstance(optimizer_settings, MezoConfig):
            sides = self._perturbed(adapter, optimizer_settings)
            params = {name: layer.weight.data for name, layer in sides.items()}
            return zeroth_order_steps(self.model, self.held, job, params, optimizer_settings, sides=sides)
        optimizer = build_optimizer(self.model, optimizer_settings, settings["lr"])
        losses = local_steps(
            self.model, self.held.batches(job), optimizer, max_grad_norm=settings["max_grad_norm"],
            adjust=self._adjustment(job, adapter),
        )  # fmt: skip
        return (), sum(losses) / len(losses)

    def _perturbed(self, adapter: str, mezo: MezoConfig) -> dict[str, Any]:
        """Linear layers whose weights directions are about, by the names that their numbers are drawn under."""
        found = {}
        for name, layer in self._layers.items():
            for factor, part in (("b", layer.lora_B), ("a", layer.lora_A)):
                if part[adapter].weight.requires_grad and (mezo.perturb == "all" or factor == "b"):
                    found[f"{name}|{factor}"] = part[adapter]
        return found

    def _adjustment(self, job: LocalJob, adapter: str) -> Callable[[], None] | None:
        """FedProx's pull to the start and SCAFFOLD's correction, as changes of the gradients."""
        pull = float(job.settings.get("proximal", 0.0))
        if not pull and not job.correction:
            return None
        pairs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        for name, layer in self._layers.items():
            for place, part in enumerate((layer.lora_B, layer.lora_A)):
                weight = part[adapter].weight
                if weight.requires_grad:
                    fix = job.correction[name][place].to(weight) if name in job.correction else None
                    pairs.append((weight, weight.detach().clone(), fix))

        @torch.no_grad()
        def adjust() -> None:
            for weight, start, fix in pairs:
                if weight.grad is None:
                    continue
                weight.grad.add_(weight - start, alpha=pull)
                if fix is not None:
                    weight.grad.add_(fix)

        return adjust


def _copy(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().cpu().clone()
