"""The style sheet of a report: light and dark, wide and narrow. Colours are Okabe and Ito's, told apart by colour-blind
readers; every mark has its word or name beside it as well."""

STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --card: #ffffff; --ink: #1d2126; --soft: #586069; --rule: #dcdfe3;
  --track: #eef0f2; --c0: #0072b2; --c1: #00805c; --c2: #b35300; --c3: #a34a80; --c4: #6b7178; --c5: #7a6a00;
  --up: 0, 114, 178; --down: 204, 96, 0; --good: #00704f; --mixed: #8a5a00; --poor: #b3261e; --note: #586069; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --card: #1b1f24; --ink: #e6e8ea; --soft: #a2abb4; --rule: #343a41; --track: #262b31;
    --c0: #5cb8ee; --c1: #3cc79c; --c2: #f0953f; --c3: #e08fbd; --c4: #a2abb4; --c5: #d9c84a;
    --up: 86, 180, 233; --down: 240, 140, 50; --good: #4fd0a5; --mixed: #eab54d; --poor: #ff8a80; --note: #a2abb4; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 944px; margin: 0 auto; padding: 24px 32px 64px; overflow-wrap: anywhere; }
h1 { font-size: 26px; line-height: 1.25; margin: 0; } h2 { font-size: 20px; margin: 0 0 4px; } h3 { font-size: 15px; margin: 20px 0 4px; }
p { margin: 6px 0; max-width: 76ch; } .soft, .conditions { color: var(--soft); } .conditions { font-size: 13px; margin-top: 12px; max-width: 110ch; } td .soft { font-size: 13px; }
.verdict { font-size: 20px; line-height: 1.4; font-weight: 600; margin: 14px 0 16px; max-width: none; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 10px; margin: 0 0 16px; padding: 0; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 12px; }
.tile dt { font-size: 13px; color: var(--soft); } .tile dd { margin: 0; } .tile .big { font-size: 24px; font-weight: 650; line-height: 1.25; }
.tile .small { font-size: 13px; color: var(--soft); line-height: 1.35; }
.findings { list-style: none; margin: 0; padding: 0; } .findings li { display: grid; grid-template-columns: 80px 150px 1fr; gap: 2px 12px;
  padding: 7px 0; border-top: 1px solid var(--rule); font-size: 15px; line-height: 1.45; }
.findings .mark { font-weight: 650; font-size: 14px; } .good .mark { color: var(--good); } .mixed .mark { color: var(--mixed); }
.poor .mark { color: var(--poor); } .note .mark { color: var(--note); } .findings .subject { font-weight: 600; }
nav { font-size: 14px; margin: 16px 0 0; } nav a { margin-right: 14px; white-space: nowrap; } a { color: var(--c0); }
section { margin-top: 28px; padding: 20px 0 0; border-top: 2px solid var(--rule); }
figure { margin: 12px 0 0; } figcaption { font-size: 13px; color: var(--soft); margin-top: 4px; }
table { border-collapse: collapse; font-size: 14px; margin-top: 12px; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 8px; border-bottom: 1px solid var(--rule); vertical-align: top; }
tr.own .soft { font-weight: 400; } th { overflow-wrap: normal; font-weight: 600; color: var(--soft); font-size: 13px; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.own td { font-weight: 650; } dl.facts { display: grid; grid-template-columns: 190px 1fr; gap: 4px 16px; font-size: 14px; margin: 12px 0 0; }
dl.facts dt { color: var(--soft); } dl.facts dd { margin: 0; } code, pre { font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
pre { background: var(--track); padding: 8px 10px; border-radius: 6px; white-space: pre-wrap; margin: 6px 0; }
.multiples { display: flex; flex-wrap: wrap; gap: 18px 24px; } .multiples figure { margin: 8px 0 0; }
svg { display: block; max-width: 100%; height: auto; font: 12px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; } .narrow { display: none; }
svg text { fill: var(--ink); } svg .axis { fill: var(--soft); font-weight: 600; } svg .tick { fill: var(--soft); }
svg .tag { fill: var(--c0); font-weight: 600; } svg .strong { font-weight: 700; } svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .line { fill: none; stroke-width: 2; } svg .leader { fill: none; stroke-width: 1; opacity: .55; }
svg .mark { stroke: var(--card); stroke-width: 1.5; } svg .track { fill: var(--track); } svg .mean { stroke: var(--ink); stroke-width: 2; }
.line.c0, .leader.c0 { stroke: var(--c0); } .mark.c0, .bar.c0 { fill: var(--c0); } .line.c1, .leader.c1 { stroke: var(--c1); } .mark.c1, .bar.c1 { fill: var(--c1); }
.line.c2, .leader.c2 { stroke: var(--c2); } .mark.c2, .bar.c2 { fill: var(--c2); } .line.c3, .leader.c3 { stroke: var(--c3); } .mark.c3, .bar.c3 { fill: var(--c3); }
.line.c4, .leader.c4 { stroke: var(--c4); } .mark.c4, .bar.c4 { fill: var(--c4); } .line.c5, .leader.c5 { stroke: var(--c5); } .mark.c5, .bar.c5 { fill: var(--c5); }
svg .cell { stroke: var(--page); stroke-width: 1; } svg .merged .cell { stroke: none; } svg .over { fill: transparent; }
.cell.z { fill: var(--track); } .cell.p1 { fill: rgba(var(--up), .25); } .cell.p2 { fill: rgba(var(--up), .5); } .cell.p3 { fill: rgba(var(--up), .9); }
.cell.n1 { fill: rgba(var(--down), .22); } .cell.n2 { fill: rgba(var(--down), .48); } .cell.n3 { fill: rgba(var(--down), .85); }
svg .in.p3, svg .in.n3 { fill: var(--page); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: 13px; color: var(--soft); margin-top: 6px; }
.legend span { white-space: nowrap; } .key { display: inline-block; width: 14px; height: 14px; vertical-align: -2px; margin-right: 5px; border-radius: 2px; }
.key.z { background: var(--track); } .key.p1 { background: rgba(var(--up), .25); } .key.p2 { background: rgba(var(--up), .5); } .key.p3 { background: rgba(var(--up), .9); }
.key.n1 { background: rgba(var(--down), .22); } .key.n2 { background: rgba(var(--down), .48); } .key.n3 { background: rgba(var(--down), .85); }
details { margin-top: 20px; } summary { cursor: pointer; font-weight: 600; }
@media (max-width: 720px) {
  main { padding: 16px 16px 48px; } .wide { display: none; } .narrow { display: block; } h1 { font-size: 21px; } .verdict { font-size: 17px; }
  .tiles { grid-template-columns: 1fr 1fr; } .tile .big { font-size: 20px; } .findings li { grid-template-columns: auto 1fr; }
  .findings .sentence { grid-column: 1 / -1; } dl.facts { grid-template-columns: 1fr; gap: 0; } dl.facts dd { margin-bottom: 6px; }
  table { font-size: 13px; } th, td { padding: 4px 3px; } .optional { display: none; } }
@media print { .narrow { display: none; } section { break-inside: avoid; } }
"""
