"""Panels of a federation: what they show, and that they are absent where their data is."""

import json

import pytest
from hostile_texts import HOSTILE

from honeloom.reporting.page import write_page
from honeloom.reporting.panels import PANELS
from honeloom.reporting.panels.federation import rounds_panel, traffic_panel
from honeloom.reporting.panels.federation_cost import (
    client_rates_panel,
    instead_panel,
    loss_by_bytes_panel,
    loss_by_round_panel,
    memory_panel,
)
from honeloom.reporting.panels.federation_updates import (
    client_losses_panel,
    exactness_panel,
    module_errors_panel,
    update_norms_panel,
)
from honeloom.reporting.text import number
from honeloom.reporting.verdict import describe
from honeloom.types.report import Artefact, Check, Metric, Report


def reply(name, status="ok", reason=None, **more):
    ok = {"norm": 0.5, "loss_before": 4.0, "loss_after": 3.5, "rows": 50, "bytes_up": 2048, "seconds": 0.1}
    none = {"norm": None, "loss_before": None, "loss_after": None, "rows": 0, "bytes_up": 0, "seconds": None}
    usual = {"id": name, "rank": 4, "status": status, "reason": reason, "bytes_down": 512, "lr": 2e-4}
    return {**usual, **(ok if status == "ok" else none), **more}


def round_of(number, clients, applied=True, **more):
    errors = {f"layers.{i}.q_proj": 1e-8 * (i + 1) for i in range(30)} if applied else {}
    usual = {"errors": errors, "error": 2e-7 * number if applied else None, "rank": 8, "seconds": 1.0, "sha256": "0"}
    return {"round": number, "clients": clients, "applied": applied, **usual, **more}


def usual_rounds():
    """Three clients in three rounds; client-10 comes late, then is refused, and the second round does not count."""
    large = "norm 60 of its update is over 10 times 0.5"
    return [
        round_of(1, [reply("client-2"), reply("client-10", "late", "a reply of round 0"), reply("client-1")]),
        round_of(2, [reply("client-1", loss_after=9.0), reply("client-2", "absent")], applied=False),
        round_of(3, [
            reply("client-1", loss_before=3.5, loss_after=3.0, rank=8), reply("client-2", loss_after=4.5),
            reply("client-10", "rejected", large, norm=60.0, loss_before=4.0, loss_after=1.0, rows=7, bytes_up=2048),
        ]),
    ]  # fmt: skip


def federation(folder, rounds, **details):
    """Write the rounds; the report, as the stage makes it."""
    (folder / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rounds), encoding="utf-8")
    names = list(dict.fromkeys(c["id"] for r in rounds for c in r["clients"]))
    mine = {n: [next((c for c in r["clients"] if c["id"] == n), None) for r in rounds] for n in names}
    clients = [
        {
            "id": n, "rank": 4, "rows": 50, "status": [c["status"] if c else "absent" for c in seen], "reasons": {},
            "bytes_up": sum(c["bytes_up"] for c in seen if c), "bytes_down": sum(c["bytes_down"] for c in seen if c),
        }
        for n, seen in mine.items()
    ]  # fmt: skip
    usual = {
        "rounds": len(rounds), "aggregation": "flora", "start": "fresh", "relative_error": 6e-7, "clients": clients,
    }  # fmt: skip
    metrics = tuple(
        Metric(n, v, 2, "nats/token", False, None, "all")
        for n, v in (("client_loss_first", 4.0), ("client_loss_last", 3.75))
    )
    check = Check("every aggregate is the weighted sum of the updates (relative error)", 6e-7, 1e-5, True)
    artefact = Artefact("adapter", str(folder), "0" * 64)
    return Report("federate", "ok", str(folder), 0, artefact, metrics, (check,), details={**usual, **details})


@pytest.fixture
def usual(tmp_path):
    return tmp_path, federation(tmp_path, usual_rounds())


def traces(panel):
    return {t.get("name"): t for t in panel.figure["data"]}


def test_panels_are_absent_without_rounds(tmp_path):
    report = federation(tmp_path, [])
    assert [make(tmp_path, report) for make in PANELS["federate"]] == [None] * len(PANELS["federate"])
    (tmp_path / "rounds.jsonl").unlink()
    assert [make(tmp_path, report) for make in PANELS["federate"]] == [None] * len(PANELS["federate"])


def test_a_round_that_nobody_answered_has_no_updates(tmp_path):
    report = federation(tmp_path, [round_of(1, [reply("a", "absent"), reply("b", "late")], applied=False, rank=0)])
    made = [make(tmp_path, report) for make in PANELS["federate"]]
    assert [panel.title for panel in made if panel] == ["Clients by round", "Ranks and bytes by client"]


def test_grid_has_every_request_and_the_reasons(usual):
    panel = rounds_panel(*usual)
    assert [row[0] for row in panel.rows] == ["client-1", "client-2", "client-10"]
    assert panel.rows[0][1:] == (50, 3, 0, 0, 0, 0, "")
    assert panel.rows[1][1:] == (50, 2, 0, 0, 1, 0, "round 2 absent: no reply")
    assert panel.rows[2][1:7] == (7, 0, 1, 1, 0, 1)
    assert panel.rows[2][7].startswith("round 1 late: a reply of round 0; round 3 rejected: norm 60")
    drawn = traces(panel)
    assert {name: list(zip(t["x"], t["y"], strict=True)) for name, t in drawn.items()} == {
        "ok": [(1, 0), (2, 0), (3, 0), (1, 1), (3, 1)], "late": [(1, 2)], "rejected": [(3, 2)], "absent": [(2, 1)],
    }  # fmt: skip
    assert len({t["marker"]["symbol"] for t in drawn.values()}) == 4
    (band,) = panel.figure["layout"]["shapes"]
    assert (band["x0"], band["x1"]) == (1.5, 2.5)
    assert "Of 8 requests: 5 ok, 1 late, 1 rejected, 1 absent" in panel.note
    assert "in round 2: nothing changed" in panel.note


def test_client_that_was_never_asked_has_a_line(tmp_path):
    report = federation(tmp_path, usual_rounds())
    report.details["clients"].append({"id": "zeta", "status": ["absent"] * 3})
    assert rounds_panel(tmp_path, report).rows[-1] == ("zeta", 0, 0, 0, 0, 0, 3, "")
    assert "zeta" not in [row[0] for row in traffic_panel(tmp_path, report).rows]


def test_traffic_is_the_sum_of_all_rounds(usual):
    panel = traffic_panel(*usual)
    assert panel.rows == [
        ("client-1", "4 to 8", 3, 3 * 2048, 3 * 512),
        ("client-2", "4", 3, 2 * 2048, 3 * 512),
        ("client-10", "4", 2, 2048, 2 * 512),
    ]
    up, down = panel.figure["data"]
    assert (up["x"], down["x"]) == ([6.0, 4.0, 2.0], [1.5, 1.5, 1.0])
    assert panel.figure["layout"]["xaxis"]["title"]["text"] == "KiB"
    assert panel.figure["layout"]["yaxis"]["ticktext"][0] == "client-1 · rank 4 to 8"


def test_refused_updates_are_marked(usual):
    panel = update_norms_panel(*usual)
    assert (traces(panel)["refused"]["x"], traces(panel)["refused"]["y"]) == ([3], [60.0])
    assert traces(panel)["client-1"]["x"] == [1, 2, 3]
    assert panel.figure["layout"]["yaxis"]["type"] == "log"
    assert "1 update was refused" in panel.note
    assert [row[1] for row in panel.rows if row[0] == 3] == ["client-10", "client-1", "client-2"]


def test_losses_are_of_the_rounds_that_counted(usual):
    panel = client_losses_panel(*usual)
    assert panel.rows == [("client-1", 50, 1, 4.0, 3, 3.0, -1.0), ("client-2", 50, 1, 4.0, 3, 4.5, 0.5)]
    assert traces(panel)["before the first round"]["x"] == [4.0, 4.0]
    assert traces(panel)["after the last"]["x"] == [3.0, 4.5]
    assert "fell for 1 of 2 clients" in panel.note


def test_exactness_by_round_against_its_limit(usual):
    panel = exactness_panel(*usual)
    assert panel.rows == [(1, 2e-7, 8, 2), (3, pytest.approx(6e-7), 8, 2)]
    (line,) = panel.figure["layout"]["shapes"]
    assert line["y0"] == 1e-5
    assert "flora" in panel.note


def test_an_exact_aggregate_has_no_logarithm(tmp_path):
    panel = exactness_panel(tmp_path, federation(tmp_path, [round_of(1, [reply("a")], error=0.0)]))
    assert "type" not in panel.figure["layout"]["yaxis"]


def test_modules_of_the_last_round_that_counted(usual):
    panel = module_errors_panel(*usual)
    assert panel.title.endswith("round 3")
    assert len(panel.rows) == 20
    assert panel.rows[0] == ("layers.29.q_proj", pytest.approx(3e-7))
    assert "20 largest of 30 modules" in panel.note


def test_many_clients_and_rounds_are_cut_and_the_notes_say_so(tmp_path):
    report = federation(tmp_path, [round_of(k, [reply(f"c{i}") for i in range(30)]) for k in range(1, 222)])
    for make in (rounds_panel, traffic_panel, update_norms_panel, client_losses_panel):
        panel = make(tmp_path, report)
        assert "first 24 of 30 clients by name" in panel.note
        assert sum(len(t["x"]) for t in panel.figure["data"]) <= 5_000
    assert len(rounds_panel(tmp_path, report).rows) == 30
    assert "last 200 of 221 rounds" in rounds_panel(tmp_path, report).note
    assert set(traces(update_norms_panel(tmp_path, report))) == {"a client", "median"}


def test_page_is_inert_with_hostile_names(tmp_path):
    rounds = [round_of(1, [reply(text, "rejected", text) for text in HOSTILE] + [reply("<b>one</b>")])]
    rounds[0]["errors"] = {HOSTILE[0]: 1e-3}
    report = federation(tmp_path, rounds, aggregation=HOSTILE[0])
    page = write_page(tmp_path, report)
    if page is None:
        pytest.skip("plotly is not installed")
    text = page.read_text(encoding="utf-8")
    assert "Clients by round" in text
    assert "<script>document" not in text
    assert "<img src=x" not in text
    assert "<b>one" not in text
    assert len(text) < 6_500_000


def test_verdict_of_a_federation(usual):
    told = describe(usual[1], {"model": "lab:base"})
    assert told.sentence == (
        "A LoRA adapter of “lab:base” was trained by 3 clients in 3 rounds; 1 reply was refused."
    )  # fmt: skip
    assert (told.figure.before, told.figure.after) == ("4.000", "3.750")
    assert dict(told.facts)["sound replies"] == "5"
    assert dict(told.facts)["aggregation"] == "flora, fresh start"


@pytest.mark.parametrize(
    ("inputs", "into", "more"), [({}, "into one", {}), ({"into_base": "base"}, "into “base”", {"bytes_written": 4096})]
)
def test_verdict_of_an_aggregate(inputs, into, more):
    details = {
        "method": "flora", "relative_error": 1e-9, "ranks_in": [4, 8], "rank_out": 12, "bytes_up": 3000,
        "bytes_down": 4096, "clients": [{"adapter": "a"}, {"adapter": "b"}], **more,
    }  # fmt: skip
    told = describe(Report("aggregate", "ok", "/tmp/x", 0, None, details=details), inputs)
    assert told.sentence == f"2 adapters were aggregated {into} by flora."
    assert told.figure.after == number(1e-9)
    assert dict(told.facts)["rank of the adapters"] == "4 to 8"
    assert dict(told.facts)["written"] == ("4 KiB" if more else "2 KiB")


# what it cost


def zeroth_order(folder, **details):
    """Four rounds of two clients at rates of their own, that sent scalars."""
    rates = [(1e-4, 1e-4), (1.5e-4, 0.5e-4), (0.5e-4, 1.5e-4), (1e-4, 1e-4)]
    rounds = [
        round_of(k, [
            reply("client-1", loss_before=4.0 - 0.1 * k, loss_after=3.9 - 0.1 * k, lr=a, bytes_up=500),
            reply("client-2", loss_before=4.2 - 0.1 * k, loss_after=4.1 - 0.1 * k, lr=b, bytes_up=500, rows=150),
        ])
        for k, (a, b) in enumerate(rates, 1)
    ]  # fmt: skip
    usual = {
        "uplink": "scalars", "method": "lora", "rates": {"statistic": "difference"},
        "tensor_bytes": {"client-1": 200_000, "client-2": 100_000},
        "memory": {"inference": 2_000_000, "zeroth-order": 2_200_000, "backpropagation, AdamW": 9_000_000},
    }  # fmt: skip
    return folder, federation(folder, rounds, **{**usual, **details})


def test_losses_are_those_of_the_model_that_all_had_weighted_by_rows(tmp_path):
    by_round = loss_by_round_panel(*zeroth_order(tmp_path))
    assert [row[0] for row in by_round.rows] == [1, 2, 3, 4]
    assert by_round.rows[0][1:] == pytest.approx((0.25 * 3.9 + 0.75 * 4.1, 0.25 * 3.8 + 0.75 * 4.0, 0))
    by_bytes = loss_by_bytes_panel(*zeroth_order(tmp_path))
    assert [row[0] for row in by_bytes.rows] == [k * 2024 for k in range(4)]
    assert [row[1] for row in by_bytes.rows] == [row[1] for row in by_round.rows]


def test_without_losses_nothing_is_drawn(tmp_path):
    """As where noise keeps them with the clients."""
    hidden = [round_of(k, [reply("a", loss_before=None, loss_after=None)]) for k in (1, 2)]
    report = federation(tmp_path, hidden)
    assert loss_by_round_panel(tmp_path, report) is None and loss_by_bytes_panel(tmp_path, report) is None


def test_rates_of_single_clients_are_shown_where_they_differ(tmp_path):
    panel = client_rates_panel(*zeroth_order(tmp_path))
    assert panel.rows == [("client-1", 1e-4, 0.5e-4, 1.5e-4, 1e-4), ("client-2", 1e-4, 0.5e-4, 1.5e-4, 1e-4)]
    assert "difference" in panel.note and set(traces(panel)) == {"client-1", "client-2", "mean"}
    (tmp_path / "same").mkdir()
    assert client_rates_panel(tmp_path / "same", federation(tmp_path / "same", usual_rounds())) is None


def test_bytes_are_beside_what_tensors_would_have_taken(tmp_path):
    panel = instead_panel(*zeroth_order(tmp_path))
    assert panel.rows == [("client-1", 500, 200_000, 400.0), ("client-2", 500, 100_000, 200.0)]
    assert "in the median 300 times as much" in panel.note
    assert instead_panel(*zeroth_order(tmp_path, uplink="tensors")) is None
    assert "all weights" in instead_panel(*zeroth_order(tmp_path, method="full")).columns[2]


def test_memory_is_beside_that_of_backpropagation(tmp_path):
    panel = memory_panel(*zeroth_order(tmp_path))
    assert [row[0] for row in panel.rows] == ["inference", "zeroth-order", "backpropagation, AdamW"]
    assert panel.rows[2][2] == 4.5
    assert memory_panel(*zeroth_order(tmp_path, memory={})) is None


def test_the_page_takes_hostile_names_there_too(tmp_path):
    for k, text in enumerate(HOSTILE[:4]):
        folder = tmp_path / str(k)
        folder.mkdir()
        where, report = zeroth_order(folder, uplink=text, rates={"statistic": text}, tensor_bytes={"client-1": 10})
        write_page(where, report)
        assert text not in (where / "report.html").read_text(encoding="utf-8")
