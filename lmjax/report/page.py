"""The page that reports are: its frame, its style, and how it writes numbers and settings."""

import html
import json
from typing import Any, Iterable, Mapping, Sequence

from lmjax import config as config_lib
from lmjax.config_checks import by_full_name


def page(name: str, sections: Sequence[str], style: str = "", script: str = "") -> str:
  """Returns a whole page.

  Args:
    name: of what it is about, its title.
    sections: HTML; empty ones are left out.
    style: CSS beside the pages' own.
    script: JavaScript that runs when all is there.
  """
  title = html.escape(name)
  script = f"<script>{script}</script>" if script else ""
  return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
          f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
          f"<style>{_CSS}{style}</style></head>\n<body><main>\n" + "\n".join(s for s in [f"<h1>{title}</h1>", *sections]
                                                                         if s)
          + f"\n</main>{script}</body></html>\n")


def tiles(pairs: Iterable[tuple[str, str]]) -> str:
  """Returns short facts, each with its label, side by side."""
  cells = "".join(f"<div><dt>{label}</dt><dd>{html.escape(value)}</dd></div>" for label, value in pairs)
  return f'<dl class="tiles">{cells}</dl>'


def figure(title: str, svg: str, note: str = "") -> str:
  """Returns a picture with its title and, below it, HTML that says what is shown."""
  note = f"<p>{note}</p>" if note else ""
  return f"<figure><figcaption>{title}</figcaption>{svg}{note}</figure>"


def config_table(config: Mapping[str, Any]) -> str:
  """Returns all settings, folded away, those that differ from their defaults marked."""
  if not config:
    return ""
  defaults = by_full_name(json.loads(config_lib.to_json(config_lib.Config())))
  rows, changed = [], 0
  for name, value in by_full_name(config).items():
    differs = name not in defaults or value != defaults[name]
    changed += differs
    note = f" <i>default {html.escape(json.dumps(defaults[name]))}</i>" if differs and name in defaults else ""
    rows.append(f'<tr{" class=changed" if differs else ""}><th>{html.escape(name)}</th>'
                f"<td>{html.escape(json.dumps(value))}{note}</td></tr>")
  return (f"<details><summary>Config: {changed} of {len(rows)} settings differ from their defaults</summary>"
          f'<div class="scroll"><table class="left">{"".join(rows)}</table></div></details>')


def number(value: float | None) -> str:
  """Writes a metric; None is a dash."""
  return "–" if value is None else f"{value:.4g}" if abs(value) >= 1000 else f"{value:.4f}"


def percent(value: float | None) -> str:
  """Writes a share."""
  return "unknown" if value is None else f"{value:.1%}"


def whole(value: float | None) -> str:
  """Writes 1234.5 as 1,234."""
  return "–" if value is None else f"{value:,.0f}"


def power(value: float | None) -> str:
  """Writes 6e+10 as 6.00e10."""
  return "–" if value is None else f"{value:.2e}".replace("e+", "e")


def duration(seconds: float) -> str:
  """Writes 5400 as 1.5 h."""
  for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
    if seconds >= 2 * length:
      return f"{seconds / length:,.1f} {unit}"
  return f"{seconds:,.1f} s"


def large(value: float | None) -> str:
  """Writes 12345678 as 12.3 M."""
  if value is None:
    return "–"
  for exponent, letter in ((0, ""), (3, " K"), (6, " M"), (9, " B")):
    if value < 999.5 * 10 ** exponent:
      return f"{value / 10 ** exponent:.3g}{letter}"
  return f"{value / 1e12:.3g} T"


_CSS = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2126; --soft: #667079; --line: #dfe3e7; --tile: #f5f6f8;
  --series-0: #2166ac; --series-1: #d6604d; --series-2: #1b7837; --series-3: #8e5ea2; --series-4: #b8860b;
  --series-5: #35978f; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e4e7ea; --soft: #98a2ab; --line: #343a40;
  --tile: #1e2226; --series-0: #6db3f2; --series-1: #ff8f7a; --series-2: #6fcf7f; --series-3: #c99be0;
  --series-4: #e6c15c; --series-5: #6fd3c8; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 1.8rem 0 .6rem; }
h3 { font-size: .85rem; font-weight: normal; color: var(--soft); margin: .8rem 0 .2rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: .6rem; margin: 0; }
.tiles div { background: var(--tile); border-radius: 8px; padding: .6rem .8rem; }
dt { color: var(--soft); font-size: .8rem; } dd { margin: 0; font-size: 1.15rem; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 1rem;
  margin-top: 1.8rem; }
figure { margin: 0; } figcaption { font-weight: 600; }
svg { width: 100%; height: auto; display: block; } svg text { font-family: system-ui, sans-serif !important; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .9rem .2rem 0; text-align: right; font-weight: normal; border-bottom: 1px solid var(--line); }
th:first-child, .left td { text-align: left; } th { color: var(--soft); }
.bar { display: flex; height: 1.1rem; border-radius: 4px; overflow: hidden; margin-bottom: .5rem; }
.key { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin-right: .5rem; }
.changed th, .changed td { font-weight: 600; color: var(--ink); }
.changed i { font-weight: normal; color: var(--soft); margin-left: .6rem; }
pre { background: var(--tile); border-radius: 8px; padding: .8rem; margin: 0; overflow-x: auto; font-size: .85rem; }
details { margin-top: 1.2rem; } summary { cursor: pointer; font-weight: 600; }
"""
