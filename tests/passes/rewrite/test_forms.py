"""What users write as forms: every way to say it, and one clear message for every bad value."""

from __future__ import annotations

import pytest

from attnc.errors import RewriteError
from attnc.passes.rewrite.forms import FORMS, Forms, parse_forms
from attnc.passes.rewrite.fuse.fused import Fused
from attnc.passes.rewrite.quant.w8a8 import W8A8
from attnc.passes.rewrite.sparse.sliding_window import SlidingWindow

WINDOW = SlidingWindow(window=256, sinks=4)


@pytest.mark.parametrize(
    "value",
    [
        WINDOW,
        "sliding_window(window=256, sinks=4)",
        " sliding-window(window=256, sinks=4) ",
        "Sliding_Window(sinks=4, window=256)",
        {"form": "sliding_window", "window": 256, "sinks": 4},
        [WINDOW],
        {"*": WINDOW},
        {"*": ["sliding_window(window=256, sinks=4)"]},
    ],
)
def test_ways_to_write_one_form(value):
    assert parse_forms(value).at("layers.0") == (WINDOW,)


def test_forms_are_read_back_from_their_plan():
    forms = parse_forms({"layers.0.*": [WINDOW], "*": ["fused", W8A8()]})
    assert parse_forms(forms.to_plan()) == forms
    assert parse_forms(forms) is forms


def test_the_longest_pattern_rules():
    forms = parse_forms({"*": "fused", "layers.*": WINDOW, "layers.1.attn": "fused"})
    assert forms.at("embed.attn") == (Fused(),)
    assert forms.at("layers.0.attn") == (WINDOW,)
    assert forms.at("layers.1.attn") == (Fused(),)


def test_a_pattern_covers_what_lies_below_it():
    forms = parse_forms({"layers.1": WINDOW})
    assert forms.at("layers.1.attn#2") == (WINDOW,)
    assert forms.at("layers.10.attn") == ()
    assert forms.at("layers.0.attn") == ()


def test_an_empty_list_leaves_sites_alone():
    forms = parse_forms({"layers.0": [], "*": "fused"})
    assert forms.at("layers.0.attn") == ()
    assert forms.at("layers.1.attn") == (Fused(),)


def test_quantized_projections_alone_fuse_the_attention_too():
    assert parse_forms(W8A8()).at("x") == (Fused(), W8A8())
    assert parse_forms([W8A8(), WINDOW]).of(W8A8) == (W8A8(),)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "flash",
            r"forms for '\*': expected one of fused, chunked, .*, sliding_window, .*, w8a8, found 'flash'",
        ),
        ({"layers.0": "flash"}, "forms for 'layers.0': expected one of"),
        ("sliding_window", "sliding_window needs other options"),
        (
            "sliding_window(window=4, width=3)",
            r"has the options \['window', 'sinks', 'causal'\], found \['width'\]",
        ),
        ("fused(window=4)", r"fused has the options none, found \['window'\]"),
        ("sliding_window(4)", "expected text such as 'fused' or"),
        ("sliding_window(window=4", "expected text such as"),
        ("sliding_window(window=open)", "expected text such as"),
        ("sliding_window(window={[]: 1})", "expected text such as"),
        ("", "expected text such as"),
        ("\0", "expected text such as"),
        (7, "expected a form, its text or a mapping with 'form', found 7"),
        (None, "expected a form, its text or a mapping with 'form', found None"),
        ({}, "expected at least one pattern, found an empty mapping"),
        (["fused", Fused()], "expected each form once, found"),
        ({"form": "sliding_window"}, "sliding_window needs other options"),
    ],
)
def test_what_is_no_form_is_refused(value, message):
    with pytest.raises(RewriteError, match=message):
        parse_forms(value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "expected window as a whole number of tokens >= 1, found 0"),
        ({"window": -3}, "found -3"),
        ({"window": 4.0}, "found 4.0"),
        ({"window": True}, "found True"),
        ({"window": "4"}, "found '4'"),
        ({"window": None}, "found None"),
        ({"window": 4, "sinks": -1}, "expected sinks as a whole number of tokens >= 0, found -1"),
        ({"window": 4, "sinks": 0.5}, "found 0.5"),
        ({"window": 4, "sinks": 5}, r"expected at most window=4 sinks \(its reach\), found sinks=5"),
        ({"window": 4, "causal": 1}, "expected causal as True, False or None, found 1"),
        ({"window": 4, "causal": "yes"}, "found 'yes'"),
    ],
)
def test_bad_windows_are_refused_however_they_are_written(options, message):
    with pytest.raises(RewriteError, match=message):
        SlidingWindow(**options)
    with pytest.raises(RewriteError, match=message):
        parse_forms({"form": "sliding_window", **options})
    text = ", ".join(f"{k}={v!r}" for k, v in options.items())
    with pytest.raises(RewriteError, match=message):
        parse_forms(f"sliding_window({text})")


def test_a_pattern_that_names_no_site_lists_those_that_exist():
    forms = parse_forms({"layers.7.*": "fused", "*": "fused"})
    with pytest.raises(RewriteError) as error:
        forms.check(["layers.1.attn", "layers.0.attn"])
    assert "found 'layers.7.*'" in str(error.value)
    assert str(error.value).endswith("layers.0.attn, layers.1.attn")
    with pytest.raises(RewriteError, match="none: no attention was found"):
        forms.check([])
    parse_forms({"layers.*": "fused"}).check(["layers.0.attn"])
    parse_forms("fused").check([])


def test_every_form_says_its_name_and_contract():
    for name, kind in FORMS.items():
        assert kind.name == name
        assert kind.contract in ("SAME", "BOUNDED")
    assert isinstance(parse_forms("fused"), Forms)
