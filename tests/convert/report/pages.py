"""A report made for a test, its page read and checked, and checkpoints that no conversion here would make."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import torch

from pregate.convert.report.figures import Figures
from pregate.convert.report.options import ReportOptions
from pregate.convert.report.run import report
from pregate.model import RoutedConfig, RoutedForCausalLM
from pregate.model.checkpoint import Manifest

ROWS = [[1, *range(3, 60)], [1, *range(200, 240)], [1, 7, 9, 400]]


class Page(HTMLParser):
    """Tags, their attributes, and all text outside of them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def text_of(html: str) -> str:
    """All the words of a page, one space between any two."""
    return " ".join(Page(html).text.split())


def findings(html: str) -> dict[str, tuple[str, str]]:
    """The page's judgements: subject -> mark and sentence."""
    items = re.findall(r'<li class="(\w+)">(.*?)</li>', html, re.DOTALL)
    spans = [
        (mark, re.findall(r'<span class="(?:subject|sentence)">(.*?)</span>', item, re.DOTALL)) for mark, item in items
    ]
    return {text_of(subject): (mark, text_of(sentence)) for mark, (subject, sentence) in spans}


def load(path: Path) -> RoutedForCausalLM:
    return RoutedForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def random_checkpoint(folder: Path, dense: Path, layer_cuts: list[dict[str, int]], **fields) -> Path:
    """Random weights and a fixed number of experts; cuts may differ, as no conversion here would make them."""
    text_config = json.loads((dense / "config.json").read_text()) | {"num_hidden_layers": len(layer_cuts)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = RoutedForCausalLM(RoutedConfig(text_config=text_config, layer_cuts=layer_cuts, **fields))
        for mlp in model.routed_mlps:
            mlp.neuron_index.copy_(torch.arange(len(mlp.neuron_index)))
            for name, parameter in mlp.named_parameters():
                if "scale" not in name:
                    torch.nn.init.normal_(parameter, std=0.15)
    model.manifest = Manifest(method="made for a test")
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(dense / name, folder / name)
    return folder


CUT = {"num_routed": 6, "num_shared": 2, "num_active": 2, "expert_width": 16}


DENSE_CUT = {"num_routed": 0, "num_shared": 8, "num_active": 0, "expert_width": 16}


def make_report(model: Path, text: Path, folder: Path, **more) -> tuple[Figures, str]:
    out = folder / "report.html"
    figures = report(ReportOptions(model, out, (text,), max_tokens=150, **more))
    return figures, out.read_text()


def check_page(html: str) -> Page:
    page = Page(html)
    assert page.open == []  # every element is closed, in order
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "link", "iframe", "object", "image"})
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in {"src", "srcset", "data"}]
        assert str(attributes.get("href", "#")).startswith("#")
    policy = [a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy
    assert policy[0].startswith("default-src 'none'")
    assert "url(" not in html
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert [a["id"] for t, a in page.tags if t == "section"] == [a["href"][1:] for t, a in page.tags if t == "a"]
    assert {a["href"][1:] for t, a in page.tags if t == "use"} <= set(ids)
    assert all("aria-label" in a and a.get("role") == "img" for t, a in page.tags if t == "svg")
    assert not re.search(r"https?:", " ".join(str(v) for _, a in page.tags for v in a.values() if "<" not in str(v)))
    return page
