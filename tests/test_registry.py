"""Every method's row, settings and function agree; unknown, repeated and foreign names."""

from __future__ import annotations

import inspect
import json
import sys
import types
import warnings

import pytest

from honeloom import plugins, registry
from honeloom.config.base import validate
from honeloom.errors import HoneloomError, MissingExtraError, UnknownNameError
from honeloom.registry import FAMILIES, Method, Registry, family, load_target, suggest
from honeloom.verbs import VERBS

STEPPERS = ("optimizers", "rates")
"""Kinds whose targets are classes that several settings and stages share."""
ROWS = [
    (kind, row.name)
    for kind in FAMILIES
    for row in load_target(f"{FAMILIES[kind]}:METHODS")
    if kind not in STEPPERS
]  # fmt: skip
EXTRA = {("tuning", "lora"): {"seed"}}
"""Keywords that the stage passes beside the settings."""
WITHOUT_VERB = {"valuation", "search", "routing", *STEPPERS}
"""Kinds that no verb's `method` names; estimators are chosen by `honeloom.valuation.estimate`, steps by `optimizer`,
searches by `search`, routers by `router`."""


@pytest.mark.parametrize(("kind", "name"), ROWS)
def test_settings_and_function_of_a_method_agree(kind, name):
    row = family(kind).get(name)
    config = family(kind).load_config(name)
    assert config.model_fields["type"].default == name
    settings = set(config.model_fields) - {"type"} - set(getattr(config, "measured", ()))
    method = family(kind).load(name)
    parameters = inspect.signature(getattr(method, "plan", method)).parameters.values()
    keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keywords - EXTRA.get((kind, name), set()) == settings
    assert not [p for p in parameters if p.kind is p.VAR_KEYWORD]
    given = {s: "x" for s, info in config.model_fields.items() if info.is_required()}
    assert set(config(**given).model_dump()) == set(config.model_fields)
    assert row.version >= 1
    assert row.summary and row.paper


@pytest.mark.parametrize(("kind", "name"), ROWS)
def test_every_setting_of_a_method_is_bounded_by_a_type_and_the_function_is_documented(kind, name):
    method = family(kind).load(name)
    function = getattr(method, "plan", method)
    assert inspect.getdoc(function)
    annotations = inspect.get_annotations(function)
    assert "return" in annotations


@pytest.mark.parametrize("kind", STEPPERS)
def test_classes_and_settings_of_steppers_exist(kind):
    for row in family(kind):
        assert inspect.getdoc(family(kind).load(row.name)) and family(kind).load_config(row.name)()
        assert row.paper and row.summary


@pytest.mark.parametrize("verb", VERBS)
def test_targets_of_every_verb_exist(verb):
    row = VERBS[verb]
    assert row.name == verb
    assert callable(load_target(row.execute))
    fields = load_target(row.config).model_fields
    assert row.family is None or {"method", "metric", "router"} & set(fields)
    assert {"seed", "device", "dtype"} <= set(fields)


AIMED = {"in_run", "less", "tracin", "dsir"}
MEASURED = [{"model": "a", "rows": "x"}, {"model": "b", "rows": "y"}]
MODELS = {name: ["a"] for name in ("slerp", "nearswap", "arcee_fusion", "passthrough")}
MODELS |= {"fisher": MEASURED, "regmean": MEASURED}


@pytest.mark.parametrize(("kind", "name"), [r for r in ROWS if r[0] not in WITHOUT_VERB])
def test_every_method_can_be_chosen_by_name_and_by_settings(kind, name):
    verb = next(v for v in VERBS.values() if v.family == kind)
    field = "metric" if kind == "dropping" else "method"
    minimal = {
        "select": {"rows": "x", "model": "m", **({"target": "y"} if name in AIMED else {})},
        "tune": {"rows": "x", "model": "m"},
        "aggregate": {"adapters": ["a", "b"]},
        "merge": {"models": MODELS.get(name, ["a", "b"]), "base_model": "base"},
        "drop": {"model": "m", "calibration": "x", "block": 1},
    }[verb.name]
    for choice in (name, {"type": name}) if name != "scores" else ({"type": name, "path": "scores.parquet"},):
        chosen = getattr(validate(load_target(verb.config), {**minimal, field: choice}, what="test"), field)
        assert isinstance(chosen, family(kind).load_config(name))
    schema = json.dumps(load_target(verb.config).model_json_schema())
    assert f'"const": "{name}"' in schema


def row(name, target="honeloom.ops.rounding:no_such"):
    return Method(name, target, "honeloom.config.base:Config", "none", "a test")


def test_unknown_names_get_a_suggestion_and_the_list():
    table = Registry("merging", [row("linear"), row("slerp")])
    with pytest.raises(UnknownNameError) as caught:
        table.load("slrp")
    assert str(caught.value) == "unknown merging method 'slrp'; did you mean 'slerp'? (known: linear, slerp)"
    with pytest.raises(UnknownNameError, match="unknown kind 'merge'; did you mean 'merging'"):
        family("merge")
    assert suggest("x", ["linear"]) == ""
    assert suggest("lineer", ["linear", "liner", "other"]) == "; did you mean 'liner' or 'linear'?"


def test_a_repeated_name_is_refused_and_names_the_holder():
    table = Registry("merging", [row("linear", "a.b:c")])
    with pytest.raises(HoneloomError, match=r"'linear' exists already \(a\.b:c\).*'mine/linear'"):
        table.add(row("linear"))
    assert table.names() == ["linear"]
    assert [r.target for r in table] == ["a.b:c"]


def test_a_target_that_is_not_there_is_named():
    with pytest.raises(HoneloomError, match=r"module honeloom\.ops\.rounding has no 'no_such'"):
        Registry("merging", [row("x")]).load("x")


@pytest.fixture
def entry_points(monkeypatch):
    """Make `honeloom.merging` plug-ins of modules that exist only here."""

    def install(**objects):
        module = types.ModuleType("plugin_for_test")
        points = []
        for name, value in objects.items():
            setattr(module, name, value)
            points.append(plugins.metadata.EntryPoint(name, f"plugin_for_test:{name}", "honeloom.merging"))
        points.append(plugins.metadata.EntryPoint("broken", "no_such_module_anywhere:METHOD", "honeloom.merging"))
        monkeypatch.setitem(sys.modules, "plugin_for_test", module)
        monkeypatch.setattr(plugins.metadata, "entry_points", lambda group: points if group.endswith("merging") else [])
        family.cache_clear()

    yield install
    family.cache_clear()


def test_a_plug_in_is_found_and_a_broken_one_is_named_and_left_out(entry_points):
    entry_points(zeta=row("mine/zeta", "plugin_for_test:function"), function=row("mine/function"))
    with pytest.warns(UserWarning, match=r"plug-in 'broken' \(no_such_module_anywhere:METHOD\) was left out"):
        table = family("merging")
    assert table.names()[-2:] == ["mine/function", "mine/zeta"]
    assert "linear" in table.names()
    assert table.load("mine/zeta").name == "mine/function"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert family("selection").names() == [r.name for r in load_target("honeloom.selection:METHODS")]


def test_a_plug_in_may_not_shadow_a_built_in_and_what_is_no_method_is_named(entry_points):
    entry_points(linear=row("linear", "evil:linear"), zeta=row("mine/zeta"), nonsense=42)
    with pytest.warns(UserWarning, match="was left out") as caught:
        table = family("merging")
    messages = [str(w.message) for w in caught]
    assert any("plug-in 'linear'" in m and "exists already" in m for m in messages)
    assert any("plug-in 'nonsense'" in m and "honeloom.registry.Method" in m for m in messages)
    assert table.get("linear").target == "honeloom.merging.linear:linear"
    assert "mine/zeta" in table.names()


def test_the_families_are_those_of_the_entry_point_groups():
    kinds = ["selection", "valuation", "tuning", "optimizers", "rates", "aggregation", "merging", "search", "routing",
             "dropping"]  # fmt: skip
    assert list(registry.FAMILIES) == list(FAMILIES) == kinds


def test_a_target_that_needs_an_extra_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"peft is not installed: pip install 'honeloom\[tune\]'"):
        load_target("peft.nowhere:anything")
    with pytest.raises(ModuleNotFoundError, match="nothing_of_ours"):
        load_target("nothing_of_ours:anything")
