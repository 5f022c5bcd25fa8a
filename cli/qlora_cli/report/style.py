"""Style of a report: one set of names for colours, filled for light, for dark, and for paper."""

from __future__ import annotations

_SERIES = ("#2a6fdb", "#d9730d", "#1a9c74", "#b0468f", "#8a6d00", "#6b7280")
_SERIES_DARK = ("#6ea8ff", "#ffa657", "#4fd1a5", "#e58ac9", "#e3c04b", "#9aa4b2")


def _colours(series: tuple[str, ...]) -> str:
    return "".join(f"--s{index}:{colour};" for index, colour in enumerate(series))


LIGHT = (
    "--back:#fff;--text:#1b1f24;--soft:#5b6470;--line:#dfe3e8;--box:#f5f7f9;--mark:#fff0b3;--good:#137a4b;--bad:#b42318;"
    "--waits:#8a6100;" + _colours(_SERIES)
)
DARK = (
    "--back:#14171b;--text:#e6e9ed;--soft:#9aa4b0;--line:#313840;--box:#1d2228;--mark:#5c4a00;--good:#4fd1a5;--bad:#ff8a80;"
    "--waits:#e3c04b;" + _colours(_SERIES_DARK)
)
_CLASSES = "".join(
    f".s{i}{{stroke:var(--s{i})}}.dot.s{i}{{fill:var(--s{i})}}.f{i}{{fill:var(--s{i});background:var(--s{i})}}"
    f".k{i}::before{{background:var(--s{i})}}"
    for i in range(len(_SERIES))
)

_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--text);font:15px/1.5 system-ui,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 24px 60px}
h1{font-size:28px;margin:0}
h2{font-size:18px;margin:0 0 12px;padding-top:26px;border-top:1px solid var(--line)}
section{margin-top:26px}
header p{margin:4px 0;color:var(--soft);overflow-wrap:anywhere}
header p.why{color:var(--text)}
.badge{font-size:14px;font-weight:600;padding:3px 10px;border:1px solid;border-radius:99px;vertical-align:5px}
.badge{color:var(--soft)}
.badge.good{color:var(--good)}.badge.bad{color:var(--bad)}.badge.waits{color:var(--waits)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px;margin-top:18px}
.figures div{background:var(--box);border-radius:8px;padding:12px 14px}
.figures span,.figures i{display:block;color:var(--soft);font-size:13px;font-style:normal}
.figures b{font-size:24px;font-weight:600;font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:22px 28px}
figure{margin:0;min-width:0}
figcaption{display:flex;flex-wrap:wrap;gap:2px 16px;justify-content:space-between;margin-bottom:4px}
svg{display:block;width:100%;height:auto}
svg.shares{height:26px}
.grid{stroke:var(--line)}.axis{stroke:var(--soft)}.mark{stroke:var(--soft);stroke-dasharray:4 4}
.tick{fill:var(--soft);font-size:12px;font-variant-numeric:tabular-nums}
.curve{fill:none;stroke-width:2;stroke-linejoin:round}
.curve.faint{stroke:var(--s0);stroke-width:1;opacity:.4}
.keys{display:flex;flex-wrap:wrap;gap:2px 16px;color:var(--soft);font-size:13px;margin:0}
.keys i{font-style:normal;opacity:.85}
.key::before{content:"";display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.key.faint::before{background:var(--s0);opacity:.4}
.key:empty{display:none}
div.keys{margin-top:8px}p.keys{margin-bottom:8px}
div.facts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:12px 28px;align-items:start}
div.facts dl{margin-top:0}
dl{display:grid;grid-template-columns:minmax(140px,max-content) 1fr;gap:3px 22px;margin:14px 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:500;font-size:13px}
td{font-variant-numeric:tabular-nums}td:last-child{overflow-wrap:anywhere;padding-right:0}
.n{text-align:right}td:not(:last-child){white-space:nowrap}
.bars{min-width:220px;padding-left:8px}.bar{display:block;height:8px;border-radius:2px;margin:2px 0}
code,pre{font:13px/1.45 ui-monospace,"SF Mono",Menlo,Consolas,monospace}
pre{background:var(--box);border-radius:8px;padding:14px 16px;margin:8px 0;white-space:pre-wrap;overflow-wrap:anywhere}
pre.config{columns:2 340px;column-gap:32px}
table.answers{table-layout:fixed}
.said{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.45 ui-monospace,"SF Mono",Menlo,Consolas,monospace}
mark{background:var(--mark);color:inherit;border-radius:2px;padding:0 1px}
@media(max-width:760px){.charts,div.facts{grid-template-columns:minmax(0,1fr)}}
@media screen{.scroll table{min-width:600px}}
@page{size:A4;margin:14mm}
@media print{
body{font-size:10.5pt}main{max-width:none;padding:0}
h2{break-after:avoid}figure,tr,.figures div,pre.sample{break-inside:avoid}
.charts,div.facts{grid-template-columns:repeat(2,minmax(0,1fr));gap:12px 18px}
dl{grid-template-columns:minmax(90px,max-content) 1fr;gap:2px 14px;break-inside:avoid}
pre.config{columns:2;column-gap:24px}code,pre,.said{font-size:8.5pt}
.figures div,pre{background:none;border:1px solid var(--line)}
.scroll{overflow:visible}.tick{font-size:15px}td:not(:last-child){white-space:normal}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
}
"""
STYLE = f":root{{{LIGHT}}}@media screen and (prefers-color-scheme:dark){{:root{{{DARK}}}}}{_RULES}{_CLASSES}"
