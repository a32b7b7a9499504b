"""Writes an explanation as one HTML file without scripts or outside resources."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from html import escape

from planner.explain import Explanation, ReplicaTime, in_seconds
from planner.explain_text import (
    BATCH_NOTE,
    DOUBTS,
    alternative_cells,
    alternative_name,
    other_notes,
    verdict,
    words,
)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2330; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
code { font-size: 1rem; background: #eef1f6; padding: .1rem .3rem; }
.row { display: grid; grid-template-columns: 14rem 1fr 5rem; align-items: center; margin: .2rem 0; }
.bar { display: flex; height: 1.3rem; background: #eef1f6; } .bar span { height: 100%; }
.seconds { text-align: right; }
.legend span { display: inline-block; margin-right: 1rem; } .legend i { display: inline-block; width: .9rem;
  height: .9rem; margin-right: .3rem; vertical-align: -.1rem; }
table { border-collapse: collapse; }
td, th { padding: .25rem .7rem; border-bottom: 1px solid #d6dbe4; text-align: left; }
td.number, th.number { text-align: right; }
"""
CHART_NOTE = (
    "A bar a replica, in seconds of one step and by padded length of the sequences it computes; the empty part of a "
    "bar is waiting for the slowest replica."
)
START_UP_COLOUR = "#7a8191"


def html(explanation: Explanation) -> str:
    """The page."""
    lengths = sorted({length for replica in explanation.replicas for length in replica.by_bucket})
    colours = dict(zip(lengths, _colours(len(lengths)), strict=True))
    title = f"Plan for {explanation.plan.model}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p><code>{escape(str(explanation.plan))}</code></p>",
        *(f"<p>{escape(sentence)}</p>" for sentence in (*words(explanation), verdict(explanation))),
        "<h2>Where each replica's time goes</h2>",
        f"<p>{CHART_NOTE}</p>",
        _legend(colours, any(replica.filling_s + replica.fixed_s for replica in explanation.replicas)),
        *(_bar(replica, colours, explanation.slowest_s) for replica in explanation.replicas),
        *_list("What limits the step", explanation.limits),
        *(_list(DOUBTS, explanation.doubts) if explanation.doubts else ()),
        _alternatives(explanation),
        "<h2>The expected batch</h2>",
        f"<p>{escape(BATCH_NOTE)}</p>",
        _batch(explanation),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _colours(number: int) -> list[str]:
    """Hues from blue (short sequences) to red (long ones)."""
    colours = []
    for index in range(number):
        hue = 0.62 * (1 - index / max(number - 1, 1))
        red, green, blue = colorsys.hls_to_rgb(hue, 0.55, 0.55)
        colours.append(f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}")
    return colours


def _legend(colours: dict[int, str], start_up: bool) -> str:
    entries = [(f"to {length} tokens", colour) for length, colour in colours.items()]
    entries += [("start-up and pipeline filling", START_UP_COLOUR)] * start_up
    spans = (f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in entries)
    return f'<p class="legend">{"".join(spans)}</p>'


def _bar(replica: ReplicaTime, colours: dict[int, str], slowest_s: float) -> str:
    def part(seconds: float, colour: str, what: str) -> str:
        style = f"width:{100 * seconds / slowest_s:.3f}%;background:{colour}"
        return f'<span style="{style}" title="{escape(what)}: {in_seconds(seconds)}"></span>'

    parts = [
        part(seconds, colours[length], f"{replica.sequences[length]} sequences to {length} tokens")
        for length, seconds in replica.by_bucket.items()
    ]
    start_up_s = replica.filling_s + replica.fixed_s
    if start_up_s:
        parts.append(part(start_up_s, START_UP_COLOUR, "start-up and pipeline filling"))
    return (
        f'<div class="row"><div>{escape(replica.name)}</div><div class="bar">{"".join(parts)}</div>'
        f'<div class="seconds">{in_seconds(replica.seconds)}</div></div>'
    )


def _alternatives(explanation: Explanation) -> str:
    if not explanation.alternatives:
        return ""
    rows = (
        _row([alternative_name(other), *alternative_cells(explanation, other)], numbers=2)
        for other in explanation.alternatives
    )
    head = _row(["what", "plan", "step (s)", "against this plan"], numbers=2, tag="th")
    notes = "".join(f"<p>{escape(note)}</p>" for note in other_notes(explanation))
    return f"<h2>Other plans on the same batch</h2><table>{head}{''.join(rows)}</table>{notes}"


def _list(title: str, sentences: Sequence[str]) -> tuple[str, ...]:
    items = (f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<h2>{escape(title)}</h2>", "<ul>", *items, "</ul>"


def _batch(explanation: Explanation) -> str:
    head = _row(["padded length (tokens)", "sequences"], numbers=2, tag="th")
    rows = (_row([str(length), str(count)], numbers=2) for length, count in explanation.counts.items())
    return f"<table>{head}{''.join(rows)}</table>"


def _row(cells: Sequence[str], *, numbers: int, tag: str = "td") -> str:
    """A table row whose last `numbers` cells are set to the right."""
    first = len(cells) - numbers
    opening = (f'<{tag} class="number">' if index >= first else f"<{tag}>" for index in range(len(cells)))
    marked = (f"{start}{escape(cell)}</{tag}>" for start, cell in zip(opening, cells, strict=True))
    return f"<tr>{''.join(marked)}</tr>"
