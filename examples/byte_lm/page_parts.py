# SPDX-License-Identifier: Apache-2.0
"""Small parts of an HTML page, as strings."""

from __future__ import annotations

import base64
import html

STYLE = """
body { font: 16px/1.55 system-ui, "Helvetica Neue", "DejaVu Sans", Arial, sans-serif;
       color: #1d1d1f; background: #fff; max-width: 900px; margin: 0 auto; padding: 2.2em 1.4em 5em; }
h1 { font-size: 1.75em; line-height: 1.25; margin: 0 0 .2em; }
h2 { font-size: 1.25em; margin: 2.2em 0 .4em; padding-top: .8em; border-top: 1px solid #ddd; }
p { margin: .55em 0; }
.lead { color: #555; margin-top: 0; }
.verdict { padding: .7em 1em; border-radius: 6px; font-weight: 600; margin: 1.2em 0; }
.pass { background: #e3f4ea; color: #11633a; } .fail { background: #fbe3e3; color: #9c1414; }
.partly { background: #fdf3d8; color: #6f5200; }
table { border-collapse: collapse; margin: .9em 0; font-size: .92em; width: 100%; }
th, td { padding: .34em .6em; text-align: right; border-bottom: 1px solid #e5e5e5; vertical-align: top; }
th { font-weight: 600; color: #555; border-bottom: 2px solid #bbb; }
td.text, th.text { text-align: left; } td.text:first-child { white-space: nowrap; }
td.text { overflow-wrap: anywhere; }
tr.marked td { background: #eef5fb; }
.ok { color: #11633a; font-weight: 700; white-space: nowrap; } .bad { color: #b01010; font-weight: 700; }
.none { color: #7a6a30; font-weight: 700; white-space: nowrap; }
img { max-width: 100%; display: block; margin: .8em auto; }
.pair { display: flex; gap: 1.5em; align-items: center; flex-wrap: wrap; justify-content: center; }
pre { background: #f6f7f9; border: 1px solid #e2e4e8; border-radius: 6px; padding: .9em 1.1em;
      font: 13px/1.45 "DejaVu Sans Mono", Menlo, Consolas, monospace;
      white-space: break-spaces; overflow-wrap: anywhere; }
pre .prompt { color: #8a8f98; } pre .made { color: #0b3d66; background: #e6f1fa; }
code { font: .9em "DejaVu Sans Mono", Menlo, Consolas, monospace; background: #f3f4f6; padding: .05em .3em;
       border-radius: 3px; }
td code { font-size: .84em; }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .45em; }
small { color: #666; }
"""


def escape(text: object) -> str:
    return html.escape(str(text))


def paragraph(content: str) -> str:
    """content is HTML already, as in small()."""
    return f"<p>{content}</p>"


def small(content: str) -> str:
    return f"<p><small>{content}</small></p>"


def picture(svg: str, alternative: str) -> str:
    data = base64.b64encode(svg.encode()).decode()
    return f'<img alt="{escape(alternative)}" src="data:image/svg+xml;base64,{data}">'


def table(
    header: list[str], rows: list[list[str]], *, text_columns: int = 1, marked: int | None = None
) -> str:
    """Cells are HTML already; the first `text_columns` are aligned left."""

    def line(tag: str, cells: list[str]) -> str:
        return "".join(
            f"<{tag}{' class=text' if column < text_columns else ''}>{cell}</{tag}>"
            for column, cell in enumerate(cells)
        )

    body = "".join(
        f"<tr{' class=marked' if index == marked else ''}>{line('td', row)}</tr>"
        for index, row in enumerate(rows)
    )
    return f"<table><thead><tr>{line('th', header)}</tr></thead><tbody>{body}</tbody></table>"


def readable(text: bytes) -> str:
    """Bytes as HTML text; what is not printable becomes a middle dot."""
    decoded = text.decode("utf-8", errors="replace")
    return escape("".join(char if char.isprintable() or char == "\n" else "·" for char in decoded))


def percent(value: float | None) -> str:
    """None stands for attention that skips nothing."""
    return "all" if value is None else f"{value:.1%}"


def listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
