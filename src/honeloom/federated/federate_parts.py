"""Settings of what a federation is made of: clients, partition, privacy, rates, server, SuperLink."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from honeloom.config.base import Config, OptionalFileInput, RowsInput
from honeloom.federated.privacy import Mode
from honeloom.system import unportable

__all__ = [
    "ClientConfig", "DpConfig", "PartitionConfig", "PrivacyConfig", "RatesConfig", "ServerConfig", "Statistic",
    "SuperlinkConfig",
]  # fmt: skip

Statistic = Literal["none", "loss", "five_rounds", "difference", "random"]


class PartitionConfig(Config):
    """How one set of rows is split among simulated clients."""

    type: Literal["iid", "dirichlet", "domain", "size"] = Field(
        "iid", description="Alike parts; shares of every domain drawn; whole domains; or alike parts of falling size."
    )
    n: int = Field(ge=1, le=10_000, description="Clients.")
    alpha: float = Field(0.5, gt=0, description="Of dirichlet: the smaller, the more clients differ.")
    least: int = Field(8, ge=1, description="Of dirichlet: fewest rows of a client.")

    @model_validator(mode="after")
    def _no_idle_setting(self) -> PartitionConfig:
        fields = type(self).model_fields
        for name in ("alpha", "least"):
            if self.type != "dirichlet" and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} is about type dirichlet; leave it out")
        return self


class ClientConfig(Config):
    """One client: its rows, and when it takes part."""

    id: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$", description="Name, unique.")
    rows: RowsInput = Field((), description="Its own rows; nobody else reads them.")
    rank: int | dict[int, int] | None = Field(
        None, description='Of its adapter; {"1": 8, "3": 4} changes it from round 3 on. Default: as `ranks` say.'
    )
    joins: int = Field(1, ge=1, description="First round it takes part in.")
    leaves: int | None = Field(None, ge=1, description="First round it no longer takes part in.")
    key: OptionalFileInput = Field(
        None, description="Public key of its SuperNode (PEM or OpenSSH): a node with another key is not asked."
    )

    @model_validator(mode="after")
    def _fits(self) -> ClientConfig:
        if self.leaves is not None and self.leaves <= self.joins:
            raise ValueError(f"client {self.id!r} joins in round {self.joins} and leaves in {self.leaves}; leave later")
        ranks = self.rank.values() if isinstance(self.rank, dict) else [self.rank or 1]
        if any(r < 1 for r in ranks) or (isinstance(self.rank, dict) and min(self.rank, default=2) > 1):
            raise ValueError(f"client {self.id!r}: a rank is 1 or more, and ranks by round begin with round 1")
        if why := unportable(self.id):
            raise ValueError(f"client {self.id!r} is the name of files, and {why}; name it otherwise")
        return self

    def rank_in(self, number: int, default: int) -> int:
        """Its rank in a round, counted from 1."""
        if not isinstance(self.rank, dict):
            return self.rank or default
        return self.rank[max(r for r in self.rank if r <= number)]

    @property
    def largest_rank(self) -> int:
        """Over the rounds; 0 where it is still the default's."""
        return max(self.rank.values()) if isinstance(self.rank, dict) else self.rank or 0

    def takes_part(self, number: int) -> bool:
        """Whether it is there in a round."""
        return self.joins <= number and (self.leaves is None or number < self.leaves)


class SuperlinkConfig(Config):
    """The SuperLink of a deployment."""

    address: str = Field("127.0.0.1:8000", pattern=r"^[^\s/]+:\d+$", description="host:port, without a prefix.")
    root_certificates: str | None = Field(
        None,
        description="File: certificate of the authority that signed the SuperLink's; only on this machine may it lack.",
    )

    @model_validator(mode="after")
    def _encrypted(self) -> SuperlinkConfig:
        host = self.address.rpartition(":")[0].strip("[]")
        if self.root_certificates is None and host not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError(
                f"superlink {self.address}: without root_certificates nothing is encrypted, which is for this machine "
                "alone; give the certificate of the authority that signed the SuperLink's"
            )
        return self


class DpConfig(Config):
    """Differential privacy of single rows: every scalar is a noised sum over a Poisson sample of rows.

    `batch_size` is then the rows of a step on average. Losses stay with the clients.
    """

    clip: float = Field(gt=0, description="Largest magnitude of a row's scalar, in nats per token and unit of weight.")
    noise: float = Field(gt=0, description="Standard deviation of the noise, in units of clip.")
    delta: float = Field(1e-5, gt=0, lt=1, description="Must be below one over a client's rows.")
    seed: int | None = Field(
        None, ge=0, description="Of the noise, for simulations: whoever knows it can take the noise off. Default: the "
        "operating system's secret numbers, so that no two runs are alike."
    )  # fmt: skip


class PrivacyConfig(Config):
    """Who may see what of a client."""

    mode: Mode | None = Field(
        None, description="flora-stack: everybody each client's factors; flora-svd: the server those, other clients "
        "their compressed sum; average: the server those, other clients their average; seed-pool: the server each "
        "client's sums over seeds, or with secagg their total alone. Default: that of the rule and uplink."
    )  # fmt: skip
    secagg: bool = Field(
        False, description="Secure aggregation: the server sees the sum of the clients' sums over seeds, and no part "
        "of it; with uplink seed-pool, three clients or more."
    )  # fmt: skip
    dp: DpConfig | None = Field(None, description="Differential privacy of each row: noise on zeroth-order scalars.")

    @field_validator("mode", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        why = {
            "dense-sum": "the server would need each weight's dense update under secure aggregation, which honeloom "
            "does not offer for LoRA",
        }
        if value in why:
            raise ValueError(
                f"{value} is not to be had here: {why[value]}; use flora-stack, flora-svd, average or seed-pool"
            )
        return value


class ServerConfig(Config):
    """What the server does with an aggregated update before it becomes the new state."""

    type: Literal["none", "momentum", "adam", "yogi", "adagrad"] = Field(
        "none", description="momentum works on the updates of svd and flora; the others on factors of one shape."
    )
    lr: float = Field(1.0, gt=0, description="Multiplies the step.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment, or of the momentum.")
    beta2: float = Field(0.99, ge=0, lt=1, description="Decay of the second moment.")
    tau: float = Field(1e-3, gt=0, description="Added to the root of the second moment.")


class RatesConfig(Config):
    """Learning rates of single clients: the round's, times 1 + spread x how far the client was from the others.

    A client that is new has the round's own rate; one that was away keeps half of its deviation for each round.
    """

    statistic: Statistic = Field(
        "none", description="What is compared: the mean training loss of the last round or of five rounds, how far "
        "a client's way was from the mean way, or nothing (random: a control)."
    )  # fmt: skip
    spread: float = Field(0.5, gt=0, lt=1, description="Largest deviation, as a share of the rate (published: 0.5).")
    robust: bool = Field(
        False, description="Divide by three median absolute deviations and clip, instead of by the largest deviation."
    )
    least: float | None = Field(None, gt=0, description="No rate is below.")
    most: float | None = Field(None, gt=0, description="No rate is above.")

    @model_validator(mode="after")
    def _no_idle_setting(self) -> RatesConfig:
        fields = type(self).model_fields
        changed = [n for n in ("spread", "robust", "least", "most") if getattr(self, n) != fields[n].default]
        if self.statistic == "none" and changed:
            raise ValueError(f"{changed[0]} is about rates of single clients; give a statistic, or leave it out")
        if self.statistic == "random" and self.robust:
            raise ValueError("robust compares clients, and random does not; leave it out")
        if self.least is not None and self.most is not None and self.least > self.most:
            raise ValueError(f"least {self.least:g} is over most {self.most:g}")
        return self
