"""The Jinja sources of the HTML pages: one style, tables, legends and figures for all of them."""

_BASE = """\
{% import "parts" as parts with context %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root {
  --ink: #0f172a; --muted: #56637a; --grid: #dbe2ea; --page: #f6f8fa; --card: #ffffff;
  --shade: rgb(15 23 42 / 28%);
  {% for color in light %}--c{{ loop.index0 }}: {{ color }}; {% endfor %}

}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e5eaf1; --muted: #98a5b8; --grid: #2f3b4c; --page: #0d131c; --card: #151d29;
    --shade: rgb(229 234 241 / 35%);
    {% for color in dark %}--c{{ loop.index0 }}: {{ color }}; {% endfor %}

  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1240px; padding: clamp(12px, 3vw, 32px);
  background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: clamp(20px, 4vw, 28px); line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: clamp(17px, 3vw, 21px); margin: 32px 0 10px; }
h3 { font-size: 16px; margin: 0; }
p { margin: 8px 2px; max-width: 80ch; }
dl { display: flex; flex-wrap: wrap; gap: 4px 24px; margin: 0 0 20px; color: var(--muted); }
dl div { display: flex; gap: 6px; }
dd { margin: 0; color: var(--ink); overflow-wrap: anywhere; }
.card {
  background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 14px 16px;
}
/* What does not fit scrolls: a shade at its right edge says so, on narrow screens a hint too. */
.scroll {
  overflow-x: auto; padding: 0;
  background:
    linear-gradient(to left, var(--card) 50%, transparent) right / 40px 100% no-repeat local,
    linear-gradient(to left, var(--shade), transparent) right / 16px 100% no-repeat scroll,
    var(--card);
}
.hint { display: none; color: var(--muted); font-size: 13px; margin: 10px 2px 4px; }
@media (max-width: 960px) { .hint.wide { display: block; } }
@media (max-width: 560px) { .hint.middle { display: block; } }
.answer { font-size: 17px; margin: 10px 2px 12px; }
.warning {
  border: 2px solid var(--c1); border-radius: 10px; padding: 8px 12px; max-width: none;
}
.held { width: fit-content; max-width: 100%; margin-bottom: 20px; }
.held th { white-space: normal; }
.contents { margin: 0 0 20px; width: fit-content; max-width: 100%; }
.contents ol { margin: 0; padding-left: 22px; columns: 2 300px; column-gap: 32px; }
a { color: var(--c0); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: right; white-space: nowrap; }
thead th { font-weight: 600; font-size: 13px; color: var(--muted); }
thead th[colspan] { padding-bottom: 0; text-align: center; }
td small { white-space: normal; }
tbody tr { border-top: 1px solid var(--grid); }
th:first-child {
  text-align: left; position: sticky; left: 0; background: var(--card); font-weight: 600;
}
td.first, th.first { border-left: 1px solid var(--grid); }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 8px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 18px 2px 10px; font-weight: 600; }
.figures {
  display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr));
}
figure { margin: 0; }
figcaption, footer, small { color: var(--muted); font-size: 13px; }
footer { margin-top: 16px; }
@media (max-width: 640px) {
  th, td { padding: 6px 8px; }
  th:first-child { white-space: normal; min-width: 9em; }
}
caption { caption-side: top; text-align: left; padding: 12px 12px 4px; font-weight: 600; }
.figures + .scroll, .scroll + .scroll, .figures + .hint + .scroll { margin-top: 16px; }
.scroll + .figures { margin-top: 16px; }
details { margin-top: 32px; }
summary { cursor: pointer; font-weight: 600; margin-bottom: 10px; }
svg { display: block; width: 100%; height: auto; margin-top: 6px; }
svg text { font-family: inherit !important; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for warning in warnings or () %}
<p class="warning" role="note">{{ warning }}</p>
{% endfor %}
{% block answer %}{% endblock %}
<dl>
{% for name, value in facts.items() %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% if contents and contents|length > 3 %}
<nav class="card contents" aria-label="Contents">
<ol>
{% for id, name in contents %}
<li><a href="#{{ id }}">{{ name }}</a></li>
{% endfor %}
</ol>
</nav>
{% endif %}
{% block content %}{% endblock %}
</body>
</html>
"""

_PARTS = """\
{% macro swatch(i) -%}
<span class="swatch" style="background: var(--c{{ i % light|length }})"></span>
{%- endmacro %}
{% macro legend(labels) %}
<div class="legend">
{% for label in labels %}
<span>{{ swatch(loop.index0) }}{{ label }}</span>
{% endfor %}
</div>
{% endmacro %}
{% macro grid(figures) %}
<div class="figures">
{% for each in figures %}
<figure class="card">
<h3>{{ each.title }}</h3>
<figcaption>{{ each.caption }}</figcaption>
{{ each.svg|safe }}
</figure>
{% endfor %}
</div>
{% endmacro %}
{% macro scrolled(columns, label, name="") %}
{% set size = "wide" if columns > 6 else "middle" if columns > (4 if name else 2) else "" %}
<p class="hint {{ size }}" aria-hidden="true">The table scrolls sideways →</p>
<div class="card scroll {{ name }}" tabindex="0" role="region" aria-label="{{ label }}">
{{ caller() }}
</div>
{% endmacro %}
{% macro summaries(table) %}
{% call scrolled(table.columns|length, "Table of all figures") %}
<table>
<thead>
<tr>
<th></th>
{% for group, span in table.groups %}
<th class="first" colspan="{{ span }}">{{ group }}</th>
{% endfor %}
</tr>
<tr>
<th>policy</th>
{% for c in table.columns %}
<th{% if c in table.firsts %} class="first"{% endif %}>{{ c.name }}</th>
{% endfor %}
</tr>
</thead>
<tbody>
{% for row in table.rows %}
{% set at = loop.index0 %}
<tr>
<th scope="row">{{ swatch(at) }}{{ row.label }}</th>
{% for c in table.columns %}
<td{% if c in table.firsts %} class="first"{% endif %}>
{%- if (at, loop.index0) in table.best %}<b>{{ c.text(row) }}</b>
{%- else %}{{ c.text(row) }}{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
{% endcall %}
{% endmacro %}
{% macro plain(table, name="") %}
{% call scrolled(table.columns|length, table.title or "Table", name) %}
<table>
{% if table.title %}
<caption>{{ table.title }}</caption>
{% endif %}
<thead>
<tr>
{% for name in table.columns %}
<th{% if loop.index0 in table.firsts %} class="first"{% endif %}>{{ name }}</th>
{% endfor %}
</tr>
</thead>
<tbody>
{% for row in table.rows %}
<tr>
{% for cell in row %}
{% if loop.first %}
<th scope="row">{{ cell }}</th>
{% else %}
<td{% if loop.index0 in table.firsts %} class="first"{% endif %}>{{ cell }}</td>
{% endif %}
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
{% endcall %}
{% endmacro %}
"""

_RUNS = """\
{% extends "base" %}
{% block content %}
{{ parts.summaries(table) }}
{{ parts.legend(runs|map(attribute="label")) }}
{{ parts.grid(figures) }}
<footer>
{% for run in runs %}
{{ run.label }}: {{ run.summary.num_requests }} requests, {{ run.summary.num_failed }} failed,
in {{ "%.1f"|format(run.summary.duration_s) }} s.
{% endfor %}
Goodput counts requests that met both objectives.
</footer>
{% endblock %}
"""

_SWEEP = """\
{% extends "base" %}
{% block answer %}
<p class="answer">{{ answer }}</p>
{{ parts.plain(held, "held") }}
{% endblock %}
{% block content %}
{% if claims %}
<h2 id="claims">Against the baseline, and the paper</h2>
{% for table in claims %}
{{ parts.plain(table) }}
<p><small>{{ table.note }}</small></p>
{% endfor %}
{% endif %}
{% for section in sections %}
<h2 id="{{ section.id }}">{{ section.title }}</h2>
{{ parts.legend(section.labels) }}
{{ parts.grid(section.by_rate) }}
<h2 id="{{ section.id }}-rate">{{ section.title }}, {{ section.rate }} requests/s</h2>
{{ parts.summaries(section.table) }}
{{ parts.legend(section.labels) }}
{{ parts.grid(section.at_rate) }}
{% endfor %}
<details id="cells">
<summary>All {{ cells.rows|length }} cells</summary>
{{ parts.plain(cells) }}
</details>
<footer>
Attainment is in percent of all requests that arrived; goodput counts those that met both
objectives. Where several batch caps or packings were swept, each load shows each pair of policies
at its best end-to-end attainment.
</footer>
{% endblock %}
"""

TEMPLATES = {"base": _BASE, "parts": _PARTS, "runs": _RUNS, "sweep": _SWEEP}
