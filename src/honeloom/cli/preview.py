"""Rows in colour: what is trained and what is masked."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from honeloom.cli.terminal import Terminal

__all__ = ["print_preview"]


def print_preview(result: dict[str, Any], terminal: Terminal) -> None:
    """Print the rows of `stages.rows.preview`: trained text green and bold, masked text dim.

    Without colour the trained text stands between ⟦ and ⟧.
    """
    coloured = terminal.out.is_terminal and not terminal.out.no_color
    for row in result["shown"]:
        terminal.say(f"--- {row['id']} ({row['where']}){' cut at the model limit' if row['truncated'] else ''}")
        line = Text()
        for piece in row["pieces"]:
            text = piece["text"] if coloured or not piece["trained"] else f"⟦{piece['text']}⟧"
            line.append(text, style="bold green" if piece["trained"] else "dim")
        terminal.out.print(line)
    for bad in result["reasons"]:
        terminal.warn(f"{bad['where']}: {bad['reason']}")
    share = result["trained"] / result["tokens"] if result["tokens"] else 0.0
    terminal.say(
        f"{result['rows']} rows, {result['rejected']} rejected, {result['truncated']} cut; "
        f"{result['trained']} of {result['tokens']} tokens are trained ({share:.0%}); template: {result['template']}"
    )
