"""The page stands alone, escapes what it shows, and draws every site: its mask, its region."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attnc
from attnc.report.graph import HEIGHT, WIDTH, layout
from attnc.report.html import page
from attnc.report.report import Report, SiteRecord
from tests.test_report import report

VOID = {"meta", "rect", "path", "br", "link", "img"}
OPEN_ENDED = {"html", "tr", "td", "th", "li", "dt", "dd", "p", "meta"}
"""Elements whose end tag HTML lets one leave out, and the page does."""


class Page(HTMLParser):
    """Read the page: sections, drawn nodes with their class and texts, and that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.sections: list[str] = []
        self.nodes: list[tuple[int, str, str]] = []
        self.titles: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert set(self.stack) <= OPEN_ENDED, self.stack

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "section":
            self.sections.append("")
        if "data-node" in given:
            self.nodes.append((len(self.sections) - 1, given["data-node"], given["class"]))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while self.stack and self.stack[-1] != tag and self.stack[-1] in OPEN_ENDED:
            self.stack.pop()
        assert self.stack
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.sections:
            self.sections[-1] += data
        if self.stack and self.stack[-1] == "title" and self.sections:
            self.titles.append(data)

    def drawn(self, role: str) -> set[str]:
        return {name for _, name, kind in self.nodes if kind == role}


class Plain(nn.Module):
    def __init__(self, roll: bool, back: bool = False) -> None:
        super().__init__()
        self.qkv, self.roll, self.back = nn.Linear(16, 48), roll, back

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        s = q @ k.transpose(-1, -2)
        w = torch.softmax(torch.roll(s, 1, -1) if self.roll else s, -1)
        out = x + (w @ v).transpose(1, 2).flatten(2)
        return (out, w) if self.back else out


class Layers(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        kept = []
        for layer in self.layers:
            out = layer(x)
            x = out if isinstance(out, Tensor) else out[0]
            kept += [] if isinstance(out, Tensor) else [out[1]]
        return [x, *kept]


@pytest.fixture(scope="module")
def mixed() -> Report:
    """Give the drawn report of six layers: three rewritten, two missed, one whose weights are returned."""
    torch.manual_seed(0)
    layers = [Plain(False), Plain(True), Plain(False), Plain(True), Plain(False), Plain(False, back=True)]
    return attnc.inspect(Layers(*layers), (torch.randn(2, 600, 16),), draw=True)


def test_every_node_of_every_site_is_drawn(mixed):
    found = Page(page(mixed))
    assert [s.status for s in mixed.sites] == ["rewritten"] * 3 + ["kept"] + ["missed"] * 2
    assert len(found.sections) == 3, "equal layers have one section"
    for i, site in enumerate((mixed.sites[0], mixed.sites[3], mixed.sites[4])):
        views = [site.details[side] for side in ("before", "after") if side in site.details]
        wanted = [n["name"] for v in views for n in v["nodes"]]
        assert [name for section, name, _ in found.nodes if section == i] == wanted
        for node in (n for v in views for n in v["nodes"]):
            assert any(all(node[k] in t for k in ("name", "op", "shape", "source")) for t in found.titles)


def test_equal_layers_are_drawn_once_with_a_list_of_places(mixed):
    first, kept, missed = Page(page(mixed)).sections
    assert "layers.* (3 sites)" in first
    assert all(f"layers.{i} (Plain " in first for i in (0, 2, 4))
    assert "layers.5" in kept
    assert all(f"layers.{i} (Plain " in missed for i in (1, 3))


def test_roles_are_told_apart(mixed):
    found = Page(page(mixed))
    rewritten, kept, missed = mixed.sites[0], mixed.sites[3], mixed.sites[4]
    before = {n["name"]: n for n in rewritten.details["before"]["nodes"]}
    assert [n["op"] for n in before.values() if n["role"] == "output"] == ["aten.matmul"]
    assert {n["op"] for n in before.values() if n["role"] == "interior"} >= {"aten.matmul"}
    assert any(n["role"] == "operand" for n in before.values())
    after = rewritten.details["after"]["nodes"]
    assert any("scaled_dot_product_attention" in n["op"] for n in after)
    assert "after" not in kept.details
    assert "after" not in missed.details
    assert len(found.drawn("blocking")) == 2
    blocking = [n for n in missed.details["before"]["nodes"] if n["role"] == "blocking"]
    assert [n["op"] for n in blocking] == ["aten.roll"] == [missed.blocking_op]
    ops = {n["op"] for n in missed.details["before"]["nodes"]}
    assert "aten.matmul" in ops, "the drawing reaches the contractions on both sides"


def test_nothing_is_drawn_and_json_stays_small_unless_asked():
    torch.manual_seed(0)
    plain = attnc.inspect(Plain(False), (torch.randn(2, 600, 16),))
    assert not {"before", "after"} & plain.sites[0].details.keys()
    assert "<svg class=region" not in page(plain)


def test_page_asks_for_nothing_from_outside(mixed, tmp_path):
    path = tmp_path / "r.html"
    mixed.to_html(path)
    found = Page(Path(path).read_text())
    assert not {t for t, _ in found.tags} & {"script", "link", "img", "iframe", "object", "image", "use"}
    for _, given in found.tags:
        assert not {"src", "href", "xlink:href", "srcset", "data", "onload", "onclick"} & given.keys()
        assert "url(" not in (given.get("style") or "")
    style = path.read_text().partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_what_comes_from_the_model_is_escaped():
    evil = "<script>x</script>\"'&"
    view = {
        "nodes": [
            {"name": evil, "op": evil, "shape": evil, "source": evil, "role": "blocking"},
            {"name": "b", "op": "aten.add", "shape": "2", "source": "", "role": "output"},
        ],
        "edges": [[0, 1]],
    }
    site = SiteRecord(
        evil, evil, evil, "", evil, "", "", "SAME", "missed", reason=evil, code="two-masks",
        blocking_op=evil, blocking_source=evil, advice=evil,
        details={"before": view, "operands": {"q": evil}},
    )  # fmt: skip
    text = page(Report(evil, evil, evil, [site], warnings=[evil]))
    assert "<script" not in text
    found = Page(text)
    assert [name for _, name, _ in found.nodes] == [evil, "b"]
    assert any(evil in title for title in found.titles)
    assert evil in found.sections[0]


def test_mask_is_drawn_and_says_where_it_holds():
    made = report()
    made.sites[0].conditions = ["k <= 512"]
    text = page(made)
    assert text.count("<svg") == 2
    assert "causal &amp; padding(key), valid where k &lt;= 512" in text
    assert "causal &amp; padding(key), valid for all sizes" in text
    # Causal and padding: tiles above the diagonal are hidden, the others depend on the padding row.
    svg = text[text.index("<svg") : text.index("</svg>")]
    tiles = int(math.sqrt(svg.count("<rect")))
    assert svg.count('fill="#fff"') == tiles * (tiles - 1) // 2
    assert svg.count('fill="#9bd"') == tiles * (tiles + 1) // 2


def test_boxes_never_overlap_and_lines_lead_downwards():
    edges = [(0, 2), (1, 2), (2, 5), (3, 4), (4, 5), (0, 5), (5, 6), (2, 7), (8, 6)]
    places = layout(9, edges)
    for i, (x, y) in enumerate(places):
        for u, v in places[:i]:
            assert abs(x - u) >= WIDTH or abs(y - v) >= HEIGHT
    assert all(places[b][1] > places[a][1] for a, b in edges)
    assert places[8][1] == places[5][1], "an input stands just above its first reader"
    assert layout(0, []) == []
