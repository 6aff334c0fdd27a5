"""Rates of single clients: the published form on its known answer, and what it does not say."""

import pytest

from honeloom.federated.rates import client_rates, deviations


def test_the_known_answer():
    found = deviations({"a": 1.0, "b": 2.0, "c": 6.0})
    assert found == pytest.approx({"a": -2 / 3, "b": -1 / 3, "c": 1.0})
    rates = client_rates(found, 1e-5, 5e-6)
    assert rates == pytest.approx({"a": 6.6667e-6, "b": 8.3333e-6, "c": 1.5e-5}, rel=1e-4)


@pytest.mark.parametrize("statistic", [{}, {"a": 3.0}, {"a": 2.0, "b": 2.0, "c": 2.0}, {"a": 0.0, "b": 0.0}])
@pytest.mark.parametrize("robust", [False, True])
def test_where_all_are_alike_nobody_is_set_apart(statistic, robust):
    assert deviations(statistic, robust=robust) == dict.fromkeys(statistic, 0.0)


def test_rounding_alone_sets_nobody_apart():
    assert set(deviations({"a": 0.1 + 0.2, "b": 0.3}).values()) == {0.0}


def test_the_robust_form_bounds_what_one_client_does_to_the_others():
    plain = deviations({"a": 1.0, "b": 1.1, "c": 0.9, "d": 1000.0})
    robust = deviations({"a": 1.0, "b": 1.1, "c": 0.9, "d": 1000.0}, robust=True)
    assert robust["d"] == 1.0 and abs(plain["b"] - plain["c"]) < 0.001 < abs(robust["b"] - robust["c"])
    assert all(-1 <= d <= 1 for d in robust.values())


def test_rates_keep_within_bounds():
    assert client_rates({"a": -1.0, "b": 1.0}, 1.0, 2.0, least=0.5, most=1.5) == {"a": 0.5, "b": 1.5}
