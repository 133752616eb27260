"""How the page looks: light and dark, from 400 px on, and on paper.

In: nothing. Out: `STYLE`. Colours say nothing that a word or a sign beside them does not say.
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #595959; --line: #d0d0d0; --paper: #fff;
  --equal: #0a6b2d; --different: #b00020; --incomplete: #7a4b00;
  --c0: #eceff4; --c1: #bcc7d9; --c2: #8093b4; --c3: #465c86; --c4: #0b1a3a }
@media (prefers-color-scheme: dark) { :root { --ink: #ececec; --soft: #a8a8a8; --line: #4a4a4a; --paper: #161616;
  --equal: #6fd694; --different: #ff8a8f; --incomplete: #f0bf66;
  --c0: #262a33; --c1: #414f6b; --c2: #667ba6; --c3: #9fb3d9; --c4: #f2f6ff } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 75rem; padding: 0 1rem; color: var(--ink);
  background: var(--paper) }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line) }
code, .digest { font-family: ui-monospace, monospace; font-size: .9em; overflow-wrap: anywhere }
.equal { color: var(--equal) } .different { color: var(--different) } .incomplete { color: var(--incomplete) }
.state { font-weight: 600; white-space: nowrap } .soft, caption { color: var(--soft) }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .35rem .8rem .35rem 0; vertical-align: top; border-bottom: 1px solid var(--line) }
td { overflow-wrap: anywhere } .cards { table-layout: fixed } .cards th { width: 6.5rem } .cards th + th { width: 7.5rem }
.cards th + th + th { width: 32% } .cards th + th + th + th { width: 28% } .cards th + th + th + th + th { width: auto }
th { font-weight: 600 } dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: .5rem 0 }
dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere } p { margin: .4rem 0 }
.sign { display: grid; grid-template-columns: 2fr 1fr 3fr; gap: 1.5rem; margin-top: 2.5rem }
.sign div { border-top: 1px solid var(--ink); padding-top: .2rem; color: var(--soft) }
.map { display: grid; grid-template-columns: max-content minmax(0, 1fr) max-content; gap: 0 .4rem; font-size: 11px }
.map svg { display: block; width: 100% } .map svg rect { shape-rendering: crispEdges }
.map ol { list-style: none; margin: 0; padding: 0; text-align: right } .map ol.worst { text-align: left }
.map li { height: 14px; line-height: 14px; white-space: nowrap }
.ticks { position: relative; height: 1.2rem } .ticks span { position: absolute; transform: translateX(-50%) }
.v0 { fill: var(--c0) } .v1 { fill: var(--c1) } .v2 { fill: var(--c2) } .v3 { fill: var(--c3) } .v4 { fill: var(--c4) }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; font-size: 13px }
.legend svg { width: 14px; height: 14px; vertical-align: -2px; outline: 1px solid var(--line) }
.values { overflow: auto; max-height: 28rem; font-size: 11px } .values td, .values th { padding: .1rem .5rem .1rem 0 }
.values th:first-child { position: sticky; left: 0; background: var(--paper) }
summary { cursor: pointer } :focus-visible { outline: 2px solid var(--c3) }
@media (max-width: 700px) {
  table.cards, table.cards tbody, table.cards tr, table.cards td, table.cards th { display: block; border: 0; padding: 0 }
  table.cards td[data-of]::before { content: attr(data-of) ": "; color: var(--soft) }
  table.cards thead { display: none }
  table.cards tr { border-bottom: 1px solid var(--line); padding: .5rem 0 }
  dl { grid-template-columns: 1fr } dt { margin-top: .4rem } .sign { grid-template-columns: 1fr; gap: 2.5rem }
  .map { font-size: 10px }
}
@media print {
  body { margin: 0; max-width: none } details { display: none } h2 { break-after: avoid } tr { break-inside: avoid }
  .map svg { print-color-adjust: exact }
}
"""
