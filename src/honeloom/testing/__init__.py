"""For people who write methods: conformance suites, tiny models, and fakes of the ports."""

from __future__ import annotations

from honeloom.testing.conformance import (
    check_aggregation,
    check_drop_metric,
    check_estimator,
    check_merge_method,
    check_selector,
)
from honeloom.testing.fakes import FakeModel, FakeRows

__all__ = [
    "FakeModel",
    "FakeRows",
    "check_aggregation",
    "check_drop_metric",
    "check_estimator",
    "check_merge_method",
    "check_selector",
]
