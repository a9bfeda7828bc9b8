"""The report: its JSON is a contract, its text fits a terminal, its page stands alone."""

from __future__ import annotations

import json
import math

import pytest

from attnc.report.report import Report, SiteRecord, Stage, clip, jsonable, summarize

SPEC = (
    "attn q=bhqd[2,12,s77,32]:float32 k=bhkd[2,12,s77,32]:float32 v=bhke[2,12,s77,32]:float32 group=1 "
    "scale(0.17677669529663687) mask=(causal & padding(key,m)) fill(add,-3.4028234663852886e+38) softmax "
    "with m=bk[2,s77]:bool"
)
KEYS = {
    "id", "module", "source", "spec", "mask", "form", "backend", "contract", "status", "reason",
    "error", "tolerance", "flops", "bytes", "predicted_gain", "code", "blocking_op", "blocking_source",
    "advice", "conditions", "details",
}  # fmt: skip


def site(i: int, status: str = "rewritten", **kw) -> SiteRecord:
    base = dict(
        id=f"site_{i}", module=f"encoder.layer.{i}.attention.self", source="modeling_bert.py:133", spec=SPEC,
        mask="causal & padding(key)", form="fused", backend="sdpa", contract="SAME", status=status,
    )  # fmt: skip
    return SiteRecord(**(base | kw))


def report() -> Report:
    missed = site(
        9, "missed", module="pool", spec="", mask="", form="", backend="", reason="softmax over queries"
    )
    sites = [
        site(0, error=1.2e-7, tolerance=3e-7, predicted_gain=1.31),
        site(1, "kept", reason="would be slower"),
        missed,
    ]
    stages = [Stage("capture", 1.43, {"nodes": 280}), Stage("detect", 0.02)]
    return Report("0.1.0", "BertModel", "cpu", sites, stages, ["a warning"], [], {"max_error": 1e-6})


def test_json_has_the_keys_of_the_contract_sorted_and_strict():
    text = report().to_json()
    data = json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert list(data) == sorted(data)
    assert {"version", "model", "target", "sites", "stages", "warnings"} <= data.keys()
    assert all(set(s) == KEYS for s in data["sites"])
    assert [s["id"] for s in data["sites"]] == ["site_0", "site_1", "site_9"]
    assert data["stages"][0] == {"name": "capture", "seconds": 1.43, "nodes": 280}
    assert data["sites"][1]["error"] is None


def test_numbers_that_json_lacks_become_strings_and_come_back():
    one = site(0, error=math.inf, tolerance=math.nan, flops=-math.inf)
    row = json.loads(Report("0", "m", "cpu", [one]).to_json())["sites"][0]
    assert (row["error"], row["tolerance"], row["flops"]) == ("inf", "nan", "-inf")
    back = SiteRecord.from_dict(row)
    assert back.error == math.inf
    assert back.tolerance is not None
    assert math.isnan(back.tolerance)


def test_records_round_trip_and_refuse_missing_keys():
    one = site(3, error=1e-7, details={"nodes": ["a", "b"]})
    assert SiteRecord.from_dict({**one.to_dict(), "of_a_later_version": 1}) == one
    with pytest.raises(ValueError, match="expected a site record"):
        SiteRecord.from_dict({"id": "x"})


def test_details_of_any_type_become_json():
    assert jsonable({1: (1, 2), "s": {"b", "a"}, "n": float("nan"), "o": object}) == {
        "1": [1, 2], "s": ["a", "b"], "n": "nan", "o": "<class 'object'>"
    }  # fmt: skip


def test_text_is_one_line_per_site_within_110_columns():
    made = report()
    made.sites += [site(100 + i, module="a" * 60 + f".{i}", predicted_gain=12.5, error=1.0) for i in range(3)]
    lines = str(made).splitlines()
    assert lines[0] == "attnc 0.1.0: BertModel for cpu: 4 of 6 attention sites rewritten, 1 kept, 1 missed"
    table = lines[1:6]
    assert max(map(len, table)) <= 110
    assert "encoder.layer.0.attention.self" in table[0]
    assert "fused/sdpa  SAME" in table[0]
    assert "1.2e-07/3e-07" in table[0]
    assert "  missed: pool (modeling_bert.py:133): softmax over queries" in lines
    assert "  kept: encoder.layer.1.attention.self (modeling_bert.py:133): would be slower" in lines
    assert lines[-1] == "  warning: a warning"


def test_counts_have_all_three_statuses():
    assert Report("0", "m", "cpu").counts() == {"rewritten": 0, "kept": 0, "missed": 0}
    assert report().counts() == {"rewritten": 1, "kept": 1, "missed": 1}


def test_summary_drops_operands_and_keeps_meaning():
    assert summarize(SPEC, "causal & padding(key)") == "scale(0.1768) causal & padding(key) softmax"
    assert summarize(SPEC) == "scale(0.1768) (causal & padding(key,m)) softmax"
    assert summarize(SPEC.replace("group=1", "group=4"), "none") == "group=4 scale(0.1768) softmax"
    assert summarize("", "") == ""


@pytest.mark.parametrize("width", [12, 13, 20])
def test_clip_keeps_both_ends(width):
    text = clip("model.layers.31.self_attn", width)
    assert len(text) == width
    assert text.startswith("mode")
    assert text.endswith("attn")
    assert clip("short", width) == "short"
