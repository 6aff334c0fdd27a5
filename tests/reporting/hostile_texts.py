"""Texts that try to run, to break out or to mislead, and a report made of them."""

from honeloom.types.report import Artefact, Check, Cost, Metric, Report

HOSTILE = [
    "<script>document.title='pwned'</script>",
    "</script><script>document.title='pwned'</script>",
    "<img src=x onerror=\"document.title='pwned'\">",
    "<a href=\"javascript:document.title='pwned'\">click</a>",
    "javascript:document.title='pwned'",
    "\u202eright to left",
    "x" * 1_000_000,
    "'\"`${document.title='pwned'}",
    "=cmd|' /C calc'!A0",
    "2026",
]


def hostile_report():
    """A report whose every text is an attempt."""
    metrics = tuple(Metric("loss", float(i), 3, "nats/token", False, 0.1, text) for i, text in enumerate(HOSTILE))
    against = {
        "model": HOSTILE[0],
        "metric": "loss",
        "difference": -1.0,
        "ci95": [-2.0, -0.5],
        "n": 3,
        "unmatched": 0,
        "sentence": HOSTILE[1],
        "domains": {text: {"difference": -1.0, "ci95": [-2.0, -0.5], "n": 3} for text in HOSTILE},
    }
    return Report(
        verb="evaluate",
        status="ok",
        out="/tmp/" + HOSTILE[0],
        seed=0,
        artefact=Artefact("scores", "/tmp/x", "0" * 64),
        metrics=(Metric("loss", 3.0, 30, "nats/token", False, 0.1, "all"), *metrics),
        verification=tuple(Check(text, text, None, True) for text in HOSTILE),
        warnings=tuple(HOSTILE),
        cost=Cost(1.0, 1.0, 1 << 20),
        details={"description": HOSTILE[1], "rows": 30, "against": against},
    )
