"""The style sheet of `make report`: light and dark, from a phone's width up."""

__all__ = ["CSS"]

CSS = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1c2328; --dim: #5b6770; --rule: #d8dee3; --panel: #f4f6f8;
  --met: #14713f; --short: #b3261e; --missing: #8a5a00; --link: #0a5f8f;
  --s0: #1f6fb5; --s1: #d1495b; --s2: #d98a00; --s3: #2a8f6d; --s4: #7d5ba6; --s5: #8a949c; --s6: #5c6770;
  --s7: #96613d; --s8: #e0793f; --s9: #b5367a; }
@media (prefers-color-scheme: dark) {
  :root { --bg: #14181b; --fg: #e3e8ec; --dim: #9aa6af; --rule: #343c43; --panel: #1d2327;
    --met: #58c48b; --short: #ff8a80; --missing: #e5b454; --link: #7cc4f0;
    --s0: #5aa9ea; --s1: #ef7b8b; --s2: #f0b040; --s3: #4fc39b; --s4: #b193dc; --s5: #87929b; --s6: #b9c3ca;
    --s7: #c99468; --s8: #f49a66; --s9: #e57bb3; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 3rem; }
body { margin: 0; background: var(--bg); color: var(--fg); font: 16px/1.5 system-ui, "Segoe UI", Roboto,
  Helvetica, Arial, sans-serif; }
main, header, footer { max-width: 1200px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .5rem; padding-top: .6rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 0; line-height: 1.35; }
p { margin: .4rem 0 .8rem; max-width: 78ch; }
a { color: var(--link); }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
nav { position: sticky; top: 0; z-index: 1; background: var(--bg); border-bottom: 1px solid var(--rule); }
nav div { max-width: 1200px; margin: 0 auto; padding: .5rem 20px; display: flex; gap: 1.1rem; overflow-x: auto;
  white-space: nowrap; }
nav a { text-decoration: none; font-size: .92rem; }
.dim { color: var(--dim); }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin: 1rem 0; padding: 0;
  list-style: none; }
.tiles li { background: var(--panel); border-radius: 8px; padding: .7rem .9rem; }
.tiles b { display: block; font-size: 1.6rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.met { color: var(--met); } .short { color: var(--short); } .missing { color: var(--missing); }
.reported { color: var(--dim); }
.box { overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px; margin: .6rem 0 1.2rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .38rem .6rem; text-align: left; vertical-align: top; border-top: 1px solid var(--rule); }
thead th { border-top: 0; background: var(--panel); font-weight: 600; vertical-align: bottom; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
thead th.number { white-space: normal; min-width: 4.4rem; }
td code { white-space: nowrap; font-size: .84em; } td.entry wbr { display: none; }
td.verdict { font-weight: 600; white-space: nowrap; }
td.bar { min-width: 9rem; }
td.long { min-width: 22rem; }
td.name { min-width: 9rem; }
h3 { margin-top: 1.2rem; } figure h3 { margin-top: 0; }
.charts { columns: 2; column-gap: 18px; }
figure { margin: 0 0 18px; break-inside: avoid; padding: 14px 16px; border: 1px solid var(--rule); border-radius: 8px;
  min-width: 0; }
figure p { font-size: .87rem; color: var(--dim); margin: .2rem 0 .6rem; }
figure svg { display: block; width: 100%; max-width: 560px; height: auto; }
.tag { display: inline-block; font-size: .74rem; font-weight: 600; padding: 0 .45rem; border-radius: 99px;
  border: 1px solid currentColor; color: var(--dim); vertical-align: 1px; white-space: nowrap; }
figure table { font-size: .82rem; } figure th, figure td { padding: .28rem .4rem; }
figure thead th.number { min-width: 0; } figure td.name { min-width: 7.4rem; }
.gap { color: var(--missing) !important; overflow-wrap: anywhere; }
.picture { overflow-x: auto; background: #fff; border-radius: 6px; }
.picture img { display: block; min-width: 860px; width: 100%; height: auto; }
.legend { list-style: none; margin: .6rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: .15rem .9rem;
  font-size: .84rem; }
.key { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .4em; }
details { margin: .5rem 0; } summary { cursor: pointer; padding: .25rem 0; }
footer { padding-top: 1rem; padding-bottom: 3rem; color: var(--dim); font-size: .87rem; }
svg text { fill: var(--fg); font: 12px system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
svg text.dim { fill: var(--dim); font-size: 11px; } svg text.strong { font-weight: 600; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .mark { stroke: var(--fg); stroke-width: 2; }
svg .reference { stroke: var(--dim); stroke-width: 1.2; stroke-dasharray: 4 3; }
svg .whisker { stroke-width: 3; opacity: .45; }
svg .stroke { fill: none; stroke-width: 1.3; } svg .thick { stroke-width: 2.6; } svg .level { stroke-dasharray: 5 4; }
""" + "".join(f".key.s{n} {{ background: var(--s{n}); }} .fill.s{n} {{ fill: var(--s{n}); }} "
              f".stroke.s{n}, .whisker.s{n} {{ stroke: var(--s{n}); }}\n" for n in range(10)) + """
@media (max-width: 760px) {
  main, header, footer { padding-left: 14px; padding-right: 14px; }
  nav div { padding-left: 14px; padding-right: 14px; }
  .tiles { grid-template-columns: repeat(2, 1fr); }
  h1 { font-size: 1.4rem; }
  .charts { columns: 1; }
  figure { padding: 12px; }
  td.entry { min-width: 9.5rem; } td.entry code { white-space: normal; } td.entry wbr { display: inline; }
  th, td { padding: .34rem .5rem; }
}
@media print { nav { display: none; } .box { overflow: visible; } }
"""
"""All rules; classes `s0` to `s9` are the colours of charts."""
