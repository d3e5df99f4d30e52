"""How a report's page looks: on a phone, on a desk, in the dark and on paper."""

CSS = """\
:root { color-scheme: light; --ink: #1a1a1a; --paper: #fff; --line: #d4d4d4; --soft: #f3f3f3;
  --best: #0072b2; --faint: #595959; }
@media screen and (prefers-color-scheme: dark) {
  :root { color-scheme: dark; --ink: #e8e8e8; --paper: #161616; --line: #444; --soft: #242424;
    --best: #56b4e9; --faint: #a8a8a8; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 90rem; padding: 1rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0.5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 0.3rem; overflow-wrap: anywhere; }
p, .notes, .key { color: var(--faint); font-size: 0.875rem; margin: 0.4rem 0; }
.notes { padding-left: 1.2rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-size: 0.8125rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.3125rem 0.5rem; line-height: 1.25rem;
  border-bottom: 1px solid var(--line); text-align: left; vertical-align: bottom; }
td { white-space: nowrap; }
thead th { min-width: 3.5rem; }
.number { text-align: right; }
tbody th { position: sticky; left: 0; background: var(--paper); font-weight: 600;
  max-width: 40vw; overflow-wrap: break-word; }
.best > * { background: var(--soft); }
.best > th { background: var(--soft); box-shadow: inset 3px 0 var(--best); }
.figures { display: grid; gap: 1.5rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; min-width: 0; max-width: 40rem; }
figcaption { font-weight: 600; font-size: 0.9rem; overflow-wrap: anywhere; }
figure > svg { display: block; width: 100%; height: auto; fill: currentColor;
  font-family: system-ui, sans-serif; }
figure > svg * { stroke-linejoin: round; stroke-linecap: butt; }
.key { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 0.1rem 1rem; }
.key li { overflow-wrap: anywhere; }
.sign { width: 1.75rem; height: 0.75rem; margin-right: 0.4rem; vertical-align: -0.05rem;
  fill: none; }
pre { background: var(--soft); padding: 0.6rem 0.8rem; margin: 0.3rem 0; font-size: 0.8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; font-size: 0.875rem; }
@page { size: landscape; margin: 12mm; }
@media print {
  :root { font-size: 9pt; }
  body { max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  table { font-size: 6.5pt; width: 100%; }
  th, td { padding: 1pt 2pt; line-height: 1.2; white-space: normal; }
  thead th { min-width: 0; }
  tbody th { position: static; max-width: none; }
  .figures { grid-template-columns: 1fr 1fr 1fr; }
  figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  details { display: none; }
}
"""
