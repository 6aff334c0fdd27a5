"""Settings of `federate`: FED.yaml."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from honeloom.config.base import LoadIn, ModelInput, NoResultMark, RowsConfig, RowsInput
from honeloom.federated.config import AggregationRule, SvdConfig
from honeloom.federated.federate_parts import (
    ClientConfig,
    PartitionConfig,
    PrivacyConfig,
    RatesConfig,
    ServerConfig,
    SuperlinkConfig,
)
from honeloom.federated.privacy import MODES, POOL_MODE, mode_of
from honeloom.registry import suggest
from honeloom.tuning.config import AdamWConfig, LocalOptimizer, MezoConfig, MezoTuningConfig, NumberOrAuto

__all__ = ["FederateConfig"]

EQUAL_RANKS = ("fedit", "fedex", "rolora", "ffa")
"""Rules that average factors as they are."""
MOST_IN_A_SUM = 1000
"""Clients of a secure sum."""


class FederateConfig(RowsConfig):
    """Tune a model on rows that stay with their clients."""

    model: ModelInput = Field(description="The base model, which every client has.")
    clients: tuple[ClientConfig, ...] = Field((), description="Clients with rows of their own.")
    rows: RowsInput = Field((), description="Rows that `partition` splits among simulated clients.")
    partition: PartitionConfig | None = Field(None, description="How `rows` are split.")
    without: tuple[str, ...] = Field(
        (), description="Clients that are left out, by id; the others keep their rows and ranks."
    )
    method: Literal["lora", "full"] = Field(
        "lora", description="What is trained: adapters, or, with mezo and uplink seed-pool, all weights."
    )
    ranks: int | tuple[int, ...] = Field(8, description="One rank for all clients, or one for each, in their order.")
    rounds: int = Field(3, ge=1, description="Rounds of local tuning and aggregation.")
    local_steps: int = Field(20, ge=1, description="Optimizer steps of a client in a round.")
    batch_size: int = Field(8, ge=1, description="Rows per step.")
    lr: NumberOrAuto | None = Field(
        None,
        description="Learning rate of the clients. Default 2e-4; with mezo 1e-4 for lora, 1e-6 for full. With mezo, "
        "auto: the median of what they measure on their own rows.",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Of the learning rate, over the rounds: constant, or falling to a tenth."
    )
    optimizer: LocalOptimizer = Field(
        default_factory=AdamWConfig,
        description="Of the clients; begins anew every round. mezo keeps no gradients or activations, and needs far "
        "lower rates.",
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")
    proximal: float = Field(0.0, ge=0, description="FedProx: weight of half the squared distance from the start.")
    scaffold: bool = Field(False, description="SCAFFOLD: correct clients' drift; with sgd and rules of one shape.")
    targets: str | tuple[str, ...] = Field("all-linear", description="Modules with adapters.")
    alpha: float | None = Field(None, gt=0, description="LoRA's alpha of a client of rank r; default: 2 r.")
    aggregation: AggregationRule = Field(default_factory=SvdConfig, description="The rule, by name or with settings.")
    start: Literal["warm", "reset"] | None = Field(
        None, description="Where a round's adapters begin: at the aggregate, or anew beside it. Default: the rule's."
    )
    server: ServerConfig = Field(default_factory=ServerConfig, description="Optimizer of the server.")
    uplink: Literal["tensors", "scalars", "seed-pool"] = Field(
        "tensors",
        description="What clients send: the factors of their adapters; or, with mezo, one number per step and "
        "direction, from which the server has the very factors (and averages travel down as scalars too); or one "
        "number per seed of a pool, whatever the steps and rounds, up and down.",
    )
    pool_size: int = Field(1024, ge=16, le=65536, description="Seeds of a seed-pool, from which all steps draw.")
    rates: RatesConfig = Field(default_factory=RatesConfig, description="Learning rates of single clients.")
    privacy: PrivacyConfig = Field(default_factory=PrivacyConfig, description="Who may see what of a client.")
    weights: Literal["rows", "equal"] = Field(
        "rows", description="Share of a client: by its rows, as it tells them when it first replies, or the same."
    )
    max_share: float = Field(1.0, gt=0, le=1, description="Largest share of one client; the others get what is over.")
    participation: float = Field(1.0, gt=0, le=1, description="Share of the clients that a round asks, at least one.")
    quorum: float = Field(0.5, gt=0, le=1, description="Share of those asked without whom a round changes nothing.")
    deadline: float = Field(3600.0, gt=0, description="Seconds after which a round no longer waits for replies.")
    outlier: float = Field(
        10.0, gt=1, description="An update whose norm is this many times the median of the others is refused."
    )
    max_length: int | None = Field(None, gt=1, description="Tokens per row; default: the model's limit, at most 2048.")
    load_in: LoadIn = None
    engine: Literal["inline", "simulation", "deployment"] = Field(
        "inline",
        description="What carries the messages: this process, Flower on this machine, or Flower's SuperLink and its "
        "SuperNodes, each with a client's rows. The result is the same to the last bit.",
    )
    patience: float = Field(
        60.0, gt=0, description="On Flower: seconds a round waits for nodes that are not connected, once a quorum is."
    )
    parallel: Annotated[int, NoResultMark()] = Field(
        1, ge=1, description="Of a simulation: clients that are trained at a time."
    )
    superlink: Annotated[SuperlinkConfig | None, NoResultMark()] = Field(
        None, description="Of a deployment: where the SuperLink is. Default: 127.0.0.1:8000, not encrypted."
    )

    @model_validator(mode="before")
    @classmethod
    def _rule_of_mode(cls, data: Any) -> Any:
        """A mode without a rule means the mode's first; sums over seeds are averages."""
        privacy = data.get("privacy") if isinstance(data, dict) else None
        mode = privacy.get("mode") if isinstance(privacy, dict) else None
        if mode == POOL_MODE and isinstance(data, dict):
            data = {"uplink": "seed-pool", **data}
        elif isinstance(mode, str) and mode in MODES and "aggregation" not in data:
            return {**data, "aggregation": MODES[mode][0]}
        if isinstance(data, dict) and data.get("uplink") == "seed-pool":
            return {"aggregation": "ffa", **data}
        return data

    @field_validator("ranks", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        value = tuple(value) if isinstance(value, list) else value
        if any(isinstance(rank, bool) for rank in (value if isinstance(value, tuple) else (value,))):
            raise ValueError("a rank is a number")
        return value

    @model_validator(mode="after")
    def _fits(self) -> FederateConfig:
        if bool(self.rows) != (self.partition is not None):
            raise ValueError("rows and partition go together: rows to split, and how")
        if not self.clients and self.partition is None:
            raise ValueError("no clients; give clients with rows of their own, or rows and a partition")
        ids = [client.id for client in self.clients]
        lower = [i.lower() for i in ids]
        if twice := sorted({i for i in ids if lower.count(i.lower()) > 1}):
            raise ValueError(
                f"clients: the id {twice[0]!r} is given twice (capitals do not tell files apart everywhere)"
            )
        if self.partition is not None and (mine := [c.id for c in self.clients if c.rows]):
            raise ValueError(f"client {mine[0]!r} has rows of its own, and partition splits rows; give one of them")
        if self.engine == "deployment":
            self._check_deployment()
        elif self.partition is None and (none := [c.id for c in self.clients if not c.rows]):
            raise ValueError(f"client {none[0]!r} has no rows; give it some, or use rows and a partition")
        known = {f"client-{k}" for k in range(self.partition.n)} if self.partition is not None else set(ids)
        if strange := [i for i in ids if i not in known]:
            raise ValueError(
                f"clients: {strange[0]!r} is none of the partition's (client-0 to client-{len(known) - 1})"
            )
        if lost := [i for i in self.without if i not in known]:
            raise ValueError(f"without: {lost[0]!r} is no client{suggest(lost[0], known)}; take it out of the list")
        if known <= set(self.without):
            raise ValueError("without names every client, so none is left; name fewer")
        ranks = (self.ranks,) if isinstance(self.ranks, int) else self.ranks
        if any(r < 1 for r in ranks) or (not isinstance(self.ranks, int) and len(ranks) != len(known)):
            raise ValueError(f"ranks: one number, or one for each of the {len(known)} clients, each 1 or more")
        if self.superlink is not None and self.engine != "deployment":
            raise ValueError(f"superlink is about engine deployment, not {self.engine}; leave it out")
        if self.parallel != 1 and self.engine != "simulation":
            raise ValueError(f"parallel is about engine simulation, not {self.engine}; leave it out")
        self._check_rule()
        if idle := [r for r in range(1, self.rounds + 1) if not any(c.takes_part(r) for c in self.members())]:
            raise ValueError(
                f"no client takes part in round {idle[0]}; see joins and leaves of the clients, and rounds"
            )
        return self

    def _check_deployment(self) -> None:
        """Refuse rows, for they stay with the nodes."""
        if self.withdraw:
            raise ValueError("engine deployment: rows stay with the SuperNodes, so withdraw them there, in their files")
        if self.rows or any(client.rows for client in self.clients):
            raise ValueError(
                "engine deployment: rows stay with the SuperNodes, so none stand here; each is started with "
                '--node-config \'client="ID" rows="FILE"\''
            )

    def _check_rule(self) -> None:
        """Refuse what the rule cannot do."""
        rule, averages = self.aggregation.type, ("fedit", "ffa")
        self._check_mode(rule)
        if self.scaffold and (self.optimizer.type != "sgd" or rule not in averages):
            raise ValueError("scaffold corrects sgd steps on factors of one shape; use optimizer sgd and fedit or ffa")
        if isinstance(self.optimizer, MezoConfig):
            self._check_mezo(self.optimizer)
        elif self.uplink != "tensors":
            raise ValueError(
                f"uplink {self.uplink}: {self.optimizer.type} has no scalars; use optimizer mezo, or uplink tensors"
            )
        self._check_pool(rule)
        self._check_privacy()
        self._check_rates()
        if self.measures and (self.optimizer.type != "mezo" or self.optimizer.objective != "loss"):
            raise ValueError(
                "lr auto is for zeroth-order steps on the loss: use optimizer mezo, or give lr as a number"
            )
        if self.rates.statistic == "difference" and rule not in (*EQUAL_RANKS,):
            raise ValueError(
                f"rates.statistic difference compares factors of one shape, and {rule} has none; use fedit, ffa, "
                "rolora or fedex, or statistic five_rounds"
            )
        if self.scaffold and (
            getattr(self.optimizer, "momentum", False) or getattr(self.optimizer, "weight_decay", False)
        ):
            raise ValueError(
                "scaffold takes the way of a client over its steps for its mean gradient, which momentum and weight "
                "decay make wrong (it diverges); leave them out"
            )
        truncating = rule in ("flexlora", "fedit", "zero_pad", "ffa", "rolora", "fedex")
        if self.server.type == "momentum" and truncating and self.starts == "warm":
            raise ValueError(
                f"server momentum adds columns, and clients of {rule} begin with as many as they train; use it with "
                "svd or flora"
            )
        if self.server.type in ("adam", "yogi", "adagrad") and rule not in averages:
            raise ValueError(
                f"server {self.server.type} works entry by entry on factors of one shape, and {rule} has none; use "
                "momentum, or aggregation fedit or ffa"
            )
        given = (c.rank.values() if isinstance(c.rank, dict) else (c.rank,) for c in self.members())
        ranks = sorted({r or 0 for some in given for r in some})
        if rule in EQUAL_RANKS and len(ranks) > 1:
            raise ValueError(
                f"{rule} averages factors column by column, so all ranks must be equal; they are {ranks}. svd and "
                "flora take any ranks"
            )
        allowed: dict[str, tuple[str, ...]] = {"flora": ("reset",), "svd": ("warm", "reset")}
        if self.start is not None and self.start not in allowed.get(rule, ("warm",)):
            raise ValueError(f"start {self.start}: {rule} goes on {' or '.join(allowed.get(rule, ('warm',)))}")

    def _check_rates(self) -> None:
        """Refuse rates of single clients that could not differ."""
        rates = self.rates
        if rates.statistic == "none":
            return
        if len(self.members()) < 2 or self.rounds < 2:
            raise ValueError(
                f"rates.statistic {rates.statistic}: {len(self.members())} clients in {self.rounds} rounds all have "
                "one rate, for it takes two of both to differ; leave rates out"
            )
        if rates.statistic == "five_rounds" and self.rounds <= 5:
            raise ValueError(
                f"rates.statistic five_rounds: rates differ after five rounds, and there are {self.rounds}; use loss "
                "or difference, or more rounds"
            )

    def _check_mode(self, rule: str) -> None:
        mode, has = self.privacy.mode, mode_of(rule, self.uplink)
        if mode is None or mode == has:
            return
        use = ", ".join(MODES[mode]) if mode in MODES else "uplink seed-pool"
        raise ValueError(f"privacy mode {mode}: aggregation {rule} is of mode {has}; use {use}, or that mode")

    def _check_privacy(self) -> None:
        """Refuse sums that cannot be hidden, and noise that bounds nothing."""
        privacy, mezo = self.privacy, self.optimizer
        if privacy.secagg and self.uplink != "seed-pool":
            raise ValueError(
                "secure aggregation hides all but sums from the server, and what travels here is no sum: stacking and "
                "sums of products need each client's A and B, and scalars each client's steps; use uplink seed-pool"
            )
        if privacy.secagg and self.rates.statistic == "difference":
            raise ValueError("rates.statistic difference needs each client's sums, and secagg hides them; use another")
        if privacy.secagg:
            self._check_sums()
        if privacy.dp is None:
            return
        if self.measures:
            raise ValueError(
                "auto: with privacy.dp losses stay with the clients, for they are not noised; give lr and mu as numbers"
            )
        if not isinstance(mezo, MezoConfig):
            raise ValueError(
                "privacy.dp: noise on A and B alone bounds nothing about their product, so no epsilon could be told; "
                "use optimizer mezo, whose scalars are noised, or leave dp out"
            )
        if mezo.clip is not None:
            raise ValueError("optimizer.clip: privacy.dp has a clip of its own, for single rows; leave this one out")
        if mezo.objective != "loss":
            raise ValueError(f"objective {mezo.objective}: privacy.dp is about losses of rows; use objective loss")
        if self.rates.statistic in ("loss", "five_rounds"):
            raise ValueError(
                f"rates.statistic {self.rates.statistic}: with privacy.dp losses stay with the clients, for they are "
                "not noised; use difference, which follows from noised scalars"
            )
        if self.engine == "deployment" and privacy.dp.seed is not None:
            raise ValueError(
                "privacy.dp.seed is for simulations: whoever knows it can take the noise off; leave it out"
            )

    def _check_sums(self) -> None:
        """Refuse rounds that ask too few clients for a secure sum, or too many."""
        for number in range(1, self.rounds + 1):
            there = sum(client.takes_part(number) for client in self.members())
            asked = math.ceil(self.participation * there - 1e-9)
            if not 3 <= asked <= MOST_IN_A_SUM:
                raise ValueError(
                    f"secure aggregation: round {number} asks {asked} of {there} clients, and a sum takes 3 to "
                    f"{MOST_IN_A_SUM}, for of a sum of two each can subtract its own part and has the other's; change "
                    "participation, joins and leaves, or leave secagg out"
                )
        if self.outlier != type(self).model_fields["outlier"].default:
            raise ValueError("outlier compares single updates, and secagg hides them; leave it out")

    def _check_pool(self, rule: str) -> None:
        """Refuse what sums over seeds, or weights without adapters, cannot do."""
        fields = type(self).model_fields
        if self.uplink != "seed-pool":
            if self.pool_size != fields["pool_size"].default:
                raise ValueError("pool_size is about uplink seed-pool; leave it out")
            if self.method == "full":
                raise ValueError("method full: all weights travel as sums over seeds alone; use uplink seed-pool")
            return
        if rule not in ("ffa", "fedit"):
            raise ValueError(
                f"uplink seed-pool adds up what clients did along every seed, and {rule} does more; use ffa, which "
                "trains B alone and is exact, or fedit"
            )
        if self.server.type != "none":
            raise ValueError(f"server {self.server.type} works on factors, and a seed-pool has sums; leave it out")
        if self.method == "full":
            idle = [n for n in ("ranks", "targets", "alpha", "start") if getattr(self, n) != fields[n].default]
            idle += ["clients.rank"] if any(client.rank is not None for client in self.clients) else []
            idle += ["optimizer.perturb"] if getattr(self.optimizer, "perturb", "all") != "all" else []
            idle += ["aggregation fedit"] if rule == "fedit" else []
            if idle:
                raise ValueError(f"{idle[0]} is about adapters, and method full has none; leave it out")
            if self.load_in is not None:
                raise ValueError(f"method full trains float32 weights; load_in {self.load_in} has none; leave it out")
            if self.dtype not in ("auto", "fp32"):
                raise ValueError(
                    f"method full: steps on {self.dtype} would be lost in rounding; use dtype fp32, or auto"
                )

    def _check_mezo(self, mezo: MezoConfig) -> None:
        """Refuse what means nothing where there are no gradients."""
        if self.proximal:
            raise ValueError("proximal is a term of gradients, and mezo has none; leave it out")
        if self.max_grad_norm != type(self).model_fields["max_grad_norm"].default:
            raise ValueError("max_grad_norm: mezo has no gradients; use optimizer.clip, which bounds its scalars")
        if mezo.perturb == "b" and self.aggregation.type == "ffa":
            raise ValueError("ffa trains B alone by itself; leave optimizer.perturb b out")
        if mezo.perturb == "b" and self.aggregation.type == "rolora":
            raise ValueError("rolora trains A in even rounds, and optimizer.perturb b would leave it; use ffa, or all")

    @property
    def learning_rate(self) -> float:
        """The rate in force; `auto` has none before it is measured."""
        if self.lr == "auto":
            raise ValueError("lr auto is not measured yet")
        if self.lr is not None:
            return self.lr
        if self.optimizer.type == "mezo":
            return 1e-4 if self.method == "lora" else 1e-6
        return 2e-4

    @property
    def measures(self) -> bool:
        """Whether clients measure their losses before the first round."""
        return self.lr == "auto" or (isinstance(self.optimizer, MezoTuningConfig) and self.optimizer.mu == "auto")

    @property
    def starts(self) -> Literal["warm", "reset"]:
        """Where adapters begin, the rule's own where nothing was said."""
        return self.start or ("reset" if self.aggregation.type == "flora" else "warm")

    def members(self) -> tuple[ClientConfig, ...]:
        """Clients in their order, those of the partition included; each with the rank of round 1 settled."""
        given = {client.id: client for client in self.clients}
        names = [f"client-{k}" for k in range(self.partition.n)] if self.partition is not None else list(given)
        ranks = [self.ranks] * len(names) if isinstance(self.ranks, int) else list(self.ranks)
        found = (given.get(name, ClientConfig(id=name)) for name in names)
        return tuple(
            client if client.rank is not None else client.model_copy(update={"rank": rank})
            for client, rank in zip(found, ranks, strict=True)
            if client.id not in self.without
        )

    def lr_in(self, number: int) -> float:
        """Learning rate of a round, counted from 1; `auto` has none before it is measured."""
        base = self.learning_rate
        if self.schedule == "constant" or self.rounds == 1:
            return base
        done = (number - 1) / (self.rounds - 1)
        falling = 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return base * (0.1 + 0.9 * falling)
