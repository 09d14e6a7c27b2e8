"""The Jinja source of report.py's HTML page."""

PAGE = """\
{% macro first(c) %}{% if c in firsts %} class="first"{% endif %}{% endmacro %}
{% macro swatch(i) -%}
<span class="swatch" style="background: var(--c{{ i % light|length }})"></span>
{%- endmacro %}
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
  {% for color in light %}--c{{ loop.index0 }}: {{ color }}; {% endfor %}

}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e5eaf1; --muted: #98a5b8; --grid: #2f3b4c; --page: #0d131c; --card: #151d29;
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
h2 { font-size: 16px; margin: 0; }
dl { display: flex; flex-wrap: wrap; gap: 4px 24px; margin: 0 0 20px; color: var(--muted); }
dl div { display: flex; gap: 6px; }
dd { margin: 0; color: var(--ink); }
.card {
  background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 14px 16px;
}
.scroll { overflow-x: auto; padding: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: right; white-space: nowrap; }
thead th { font-weight: 600; font-size: 13px; color: var(--muted); }
thead tr:first-child th { padding-bottom: 0; text-align: center; }
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
figcaption, footer { color: var(--muted); font-size: 13px; }
footer { margin-top: 16px; }
@media (max-width: 640px) {
  th, td { padding: 6px 8px; }
  th:first-child { white-space: normal; min-width: 9em; }
}
svg { display: block; width: 100%; height: auto; margin-top: 6px; }
svg text { font-family: inherit !important; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<dl>
<div><dt>SLO</dt><dd>{{ slo }}</dd></div>
{% for name, value in facts.items() %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
<div class="card scroll">
<table>
<thead>
<tr>
<th></th>
{% for group, span in groups %}
<th class="first" colspan="{{ span }}">{{ group }}</th>
{% endfor %}
</tr>
<tr>
<th>policy</th>
{% for c in columns %}
<th{{ first(c) }}>{{ c.name }}</th>
{% endfor %}
</tr>
</thead>
<tbody>
{% for run in runs %}
{% set row = loop.index0 %}
<tr>
<th scope="row">{{ swatch(row) }}{{ run.label }}</th>
{% for c in columns %}
<td{{ first(c) }}>{% if (row, loop.index0) in best %}<b>{{ c.text(run) }}</b>
{%- else %}{{ c.text(run) }}{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
<div class="legend">
{% for run in runs %}
<span>{{ swatch(loop.index0) }}{{ run.label }}</span>
{% endfor %}
</div>
<div class="figures">
{% for name, caption, svg in figures %}
<figure class="card">
<h2>{{ name }}</h2>
<figcaption>{{ caption }}</figcaption>
{{ svg|safe }}
</figure>
{% endfor %}
</div>
<footer>
{% for run in runs %}
{{ run.label }}: {{ run.summary.num_requests }} requests, {{ run.summary.num_failed }} failed,
in {{ "%.1f"|format(run.summary.duration_s) }} s.
{% endfor %}
Goodput counts requests that met both objectives.
</footer>
</body>
</html>
"""
