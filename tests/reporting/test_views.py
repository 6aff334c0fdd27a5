"""What a prompt and a notebook show of a report and of plans; and when a notebook's console is chosen."""

import sys
from types import ModuleType, SimpleNamespace

from hostile_texts import hostile_report

import honeloom
from honeloom.runs.log import Log
from honeloom.runs.notebook import NotebookConsole, notebook_console
from honeloom.types.report import Check, Metric, Report


def report(**changes):
    metrics = (
        Metric("loss", 2.0, 5, "nats/token", False, 0.5, "maths"),
        Metric("loss", 1.5, 9, "nats/token", False, 0.25, "all"),
        Metric("accuracy", None, 9, "share", True, None, "all"),
    )
    checks = (Check("it holds", 1, 0, True), Check("it is small", 2.5, 1.0, False))
    fields = {"verb": "evaluate", "status": "failed", "out": "/x/out", "seed": 0, "artefact": None}
    return Report(**{**fields, "metrics": metrics, "verification": checks, "warnings": ("mind this",), **changes})


def test_one_line_says_status_number_claims_and_place():
    assert repr(report()) == "<Report evaluate failed, loss 1.5 nats/token, 1 of 2 claims hold, 1 warning, /x/out>"


def test_text_has_warnings_first_totals_on_top_and_what_failed():
    lines = str(report()).splitlines()
    assert lines[:2] == ["evaluate failed: /x/out", "warning: mind this"]
    assert lines[2].split("  ")[0] == "domain"
    assert lines[3].split() == ["all", "1.5", "0.25", "9"]
    assert lines[4].split() == ["maths", "2", "0.5", "5"]
    assert lines[5:] == ["FAIL it is small: 2.5 (limit 1)", "1 of 2 claims hold"]


def test_place_is_told_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert repr(report(out=str(tmp_path / "a" / "b"))).endswith(", a/b>")


def test_html_has_warnings_numbers_and_claims():
    html = report()._repr_html_()
    assert html.index("mind this") < html.index("<th>loss (nats/token)</th>") < html.index("it is small")
    assert "<bdi>NO</bdi>" in html


def test_html_is_inert_and_short_whatever_it_shows():
    html = hostile_report()._repr_html_()
    assert "<script" not in html
    assert "<img" not in html
    assert "<a " not in html
    assert len(html) < 20_000


def test_text_of_a_hostile_report_cannot_steer_a_terminal():
    metric = Metric("loss", 1.0, 1, "u", False, None, "a\x1b]0;x\x07\u202eb\nc")
    text = str(report(metrics=(metric,), warnings=("w\x1b[2J",)))
    assert all(c.isprintable() or c == "\n" for c in text)


def test_run_shows_its_evaluations_side_by_side():
    metrics = tuple(
        Metric(f"{stage}/{name}", value, 3, "u", False, None, "all")
        for stage, value in (("before", 2.0), ("pick", 7.0), ("after", 1.0))
        for name in (("loss", "bits_per_char") if stage != "pick" else ("rows_kept",))
    )
    stages = [{"name": n, "verb": v} for n, v in (("before", "evaluate"), ("pick", "select"), ("after", "evaluate"))]
    text = str(report(verb="run", metrics=metrics, details={"stages": stages, "comparisons": ["after is better"]}))
    assert "after is better" in text
    assert "before/loss (u)  after/loss (u)  n" in text
    assert "rows_kept" not in text


def test_plans_are_a_list_that_shows_a_line_each(tmp_path):
    rows = tmp_path / "<b>rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n')
    plans = honeloom.plan("select", rows=rows, method="random", keep="50%")
    assert isinstance(plans, list)
    lines = repr(plans).splitlines()
    assert len(lines) == 2
    assert lines[1].split()[:3] == ["select", "select", "run"]
    assert "<b>" not in plans._repr_html_()


def fake_ipython(monkeypatch, shell):
    shown = []

    class Handle:
        def update(self, content, raw):
            shown.append(("update", content))

    def display(content, raw, display_id):
        shown.append(("display", content))
        return Handle()

    module = ModuleType("IPython")
    module.get_ipython = lambda: shell
    module.display = SimpleNamespace(display=display)
    monkeypatch.setitem(sys.modules, "IPython", module)
    return shown


def test_plain_python_stays_silent(monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert notebook_console() is None
    fake_ipython(monkeypatch, None)  # imported, but no shell runs
    assert notebook_console() is None


def test_notebook_shows_each_task_once_and_updates_it(monkeypatch, capsys):
    shown = fake_ipython(monkeypatch, SimpleNamespace(kernel=object()))
    monkeypatch.setattr("honeloom.runs.notebook.PAUSE", 0.0)
    log = Log(notebook_console())
    log.say("select: <b>")
    assert list(log.track(range(5), "score <rows>", 5)) == list(range(5))
    assert capsys.readouterr().out == "select: <b>\n"
    assert [kind for kind, _ in shown].count("display") == 1
    assert len(shown) == 6
    final = shown[-1][1]
    assert final["text/plain"].startswith("score <rows>: 5 of 5 in ")
    assert "score &lt;rows&gt;" in final["text/html"]


def test_display_is_updated_a_few_times_a_second_only(monkeypatch):
    shown = fake_ipython(monkeypatch, SimpleNamespace(kernel=object()))
    with NotebookConsole(in_place=True).progress("steps", 100_000) as advance:
        for _ in range(100_000):
            advance(1)
    assert len(shown) < 20


def test_terminal_ipython_shows_messages_only(monkeypatch):
    shown = fake_ipython(monkeypatch, SimpleNamespace())
    with NotebookConsole(in_place=False).progress("steps", 3) as advance:
        advance(3)
    assert shown == []
