"""Look-alikes: programs that are nearly attention, or attention with a twist that a careless match overlooks.

Each must be refused or computed the same. A near miss is lines of text at a stage of the program, in place
of the lines there (``instead``, ``copies``, ``values``) or after them, and the values of other axes that it
takes to be in force. In the lines ``w`` are the scores, later the weights; ``{s}`` is a size at the time of
tracing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Stage = str
STAGES = ("operands", "copies", "mask", "scores", "instead", "weights", "values", "out")
ANY_HEADS = {"heads": "whole|flat|grouped", "orientation": "queries_first"}
FOUR_AXES = {"heads": "whole", "orientation": "queries_first"}
SQUARE = FOUR_AXES | {"sizes": "square|equal"}
WRITTEN = FOUR_AXES | {"trace": "exported"}


@dataclass(frozen=True)
class NearMiss:
    """Lines by stage, and what other axes have to be ("this|or that")."""

    lines: Mapping[Stage, tuple[str, ...]] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)

    @property
    def bare(self) -> bool:
        """Say whether an exponential is taken of the scores as they are, which overflows for large ones."""
        return any("w.exp()" in line for lines in self.lines.values() for line in lines)


def miss(needs: Mapping[str, str], **lines: str) -> NearMiss:
    """Return a near miss; lines are parted by semicolons."""
    assert set(lines) <= set(STAGES), lines
    return NearMiss({k: tuple(v.split("; ")) for k, v in lines.items()}, needs)


NORMALIZED = ANY_HEADS | {"norm": "softmax", "extra": "none"}
NORMALIZED_4 = FOUR_AXES | {"norm": "softmax", "extra": "none"}
LATE = ANY_HEADS | {"norm": "late", "extra": "none"}
UNMASKED = {"mask": "none"}
ROOMY = {"sizes": "square|equal|distinct|short"}
VARYING = FOUR_AXES | {"sizes": "square|distinct|short", "mask": "causal", "made": "compare"}

NEAR_MISSES: dict[str, NearMiss] = {
    "none": NearMiss(),
    # ------------------------------------------------ what is normalized, and by what
    "softmax_over_queries": miss(NORMALIZED, instead="w = w.softmax(-2)"),
    "softmax_over_heads": miss(NORMALIZED_4, instead="w = w.softmax(1)"),
    "softmax_over_both": miss(NORMALIZED, instead="w = w.flatten(-2).softmax(-1).reshape(w.shape)"),
    "softmax_twice": miss(NORMALIZED, instead="w = w.softmax(-1).softmax(-1)"),
    "finite_fills_without_maximum": miss(
        {"norm": "exp_sum|logsumexp", "mask": "padding|rows|documents", "fill": "min|big|small"}
        | {"applied": "masked_fill|add|where|multiply", "extra": "none"},
    ),
    "biases_before_log_sum": miss({"norm": "logsumexp|lse_sink", "bias": "dense|per_head|keys_only"}),
    # A tensor times scores that may be -inf makes NaN or inf where it is not positive; nan_to_num zeroes such
    # rows, and a softmax does not.
    "factors_of_infinite_scores_made_zero": miss(
        {"norm": "nan_to_num", "order": "bias_scale_mask|mask_first_then_scale", "fill": "inf"}
        | {"mask": "padding|causal|window", "bias": "dense|per_head|keys_only", "extra": "none"}
        | {"scale": "learned|per_head|per_query|per_key|per_batch"},
    ),
    # So does what is kept, as a factor 0, of a tensor that may hold -inf.
    "kept_share_of_infinite_scores_made_zero": miss(
        {"norm": "nan_to_num", "order": "scale_bias_mask", "applied": "blend", "fill": "big|small"}
        | {"mask": "padding|causal|window", "bias": "dense|per_head|keys_only", "extra": "none"},
    ),
    "softmin": miss(NORMALIZED, instead="w = F.softmin(w, -1)"),
    "base_two": miss(NORMALIZED, instead="u = 2.0 ** w; w = u / u.sum(-1, keepdim=True)"),
    "sum_over_queries": miss(NORMALIZED, instead="u = w.exp(); w = u / u.sum(-2, keepdim=True)"),
    "sum_over_all": miss(NORMALIZED, instead="u = w.exp(); w = u / u.sum()"),
    "sum_of_another": miss(NORMALIZED, instead="u = w.exp(); w = u / (w * 0.5).exp().sum(-1, keepdim=True)"),
    "sum_of_a_part": miss(
        NORMALIZED | ROOMY, instead="u = w.exp(); w = u / u[..., 1:].sum(-1, keepdim=True)"
    ),
    "sum_without_maximum": miss(
        NORMALIZED,
        instead="u = (w - w.amax(-1, keepdim=True)).exp(); w = u / w.exp().sum(-1, keepdim=True)",
    ),
    "sum_of_flipped_rows": miss(
        NORMALIZED, instead="u = w.exp(); w = u / u.sum(-1, keepdim=True).flip(-2)"
    ),
    "sum_along_other_axis_kept": miss(
        NORMALIZED | {"sizes": "square|equal"}, instead="u = w.exp(); w = u / u.sum(-1).unsqueeze(-2)"
    ),
    "sum_plus_two": miss(NORMALIZED, instead="u = w.exp(); w = u / (2 + u.sum(-1, keepdim=True))"),
    "sum_plus_one_after_maximum": miss(
        NORMALIZED,
        instead="u = (w - w.amax(-1, keepdim=True)).exp(); w = u / (1 + u.sum(-1, keepdim=True))",
    ),
    "maximum_over_queries": miss(NORMALIZED, instead="w = (w - w.amax(-2, keepdim=True)).softmax(-1)"),
    "maximum_over_all": miss(NORMALIZED, instead="w = (w - w.amax()).softmax(-1)"),
    "maximum_over_queries_in_exp": miss(
        NORMALIZED,
        instead="u = (w - w.amax(-2, keepdim=True)).exp(); w = u / u.sum(-1, keepdim=True)",
    ),
    "maximum_of_flipped_rows": miss(
        NORMALIZED,
        instead="u = (w - w.amax(-1, keepdim=True).flip(-2)).exp(); w = u / u.sum(-1, keepdim=True)",
    ),
    "minimum_subtracted": miss(NORMALIZED, instead="w = (w - w.amin(-1, keepdim=True)).softmax(-1)"),
    "mean_subtracted": miss(
        NORMALIZED | UNMASKED, instead="w = (w - w.mean(-1, keepdim=True)).softmax(-1)"
    ),
    "logsumexp_over_queries": miss(NORMALIZED, instead="w = (w - w.logsumexp(-2, keepdim=True)).exp()"),
    "logsumexp_of_another": miss(NORMALIZED, instead="w = (w - (w * 2).logsumexp(-1, keepdim=True)).exp()"),
    "log_without_exp": miss(NORMALIZED, instead="w = w.log_softmax(-1)"),
    "log_then_scaled": miss(NORMALIZED, instead="w = (w.log_softmax(-1) * 2).exp()"),
    "not_normalized": miss(NORMALIZED | {"fill": "big|small"}, instead="pass"),
    "only_exp": miss(NORMALIZED, instead="w = w.exp()"),
    "sigmoid": miss(NORMALIZED, instead="w = w.sigmoid()"),
    "absolute_sum": miss(
        NORMALIZED | UNMASKED, instead="w = w / w.abs().sum(-1, keepdim=True).clamp(min=1e-6)"
    ),
    "two_softmaxes": miss(NORMALIZED, instead="w = w.softmax(-1) - 0.5 * (w * 0.5).softmax(-1)"),
    "two_sink_columns": miss(
        NORMALIZED,
        instead="w = torch.cat([w, w[..., :1] * 0, w[..., :1]], -1).softmax(-1)[..., :-2]",
    ),
    "sink_in_front": miss(
        NORMALIZED, instead="w = torch.cat([torch.ones_like(w[..., :1]), w], -1).softmax(-1)[..., 1:]"
    ),
    "sink_kept_for_a_key": miss(
        NORMALIZED, instead="w = torch.cat([w, torch.ones_like(w[..., :1])], -1).softmax(-1)[..., 1:]"
    ),
    "sink_by_row": miss(NORMALIZED, instead="w = torch.cat([w, w[..., :1] * 0.5], -1).softmax(-1)[..., :-1]"),
    "sink_scaled_too": miss(
        NORMALIZED,
        instead="w = (torch.cat([w, torch.ones_like(w[..., :1])], -1) * 0.5).softmax(-1)[..., :-1]",
    ),
    # ------------------------------------------------ what happens to the weights
    "mask_after": miss(NORMALIZED | UNMASKED, weights="w = w.tril()"),
    "mask_after_as_factor": miss(NORMALIZED_4 | {"mask": "causal|padding|window"}, weights="w = w * keep"),
    "mask_after_normalized_again": miss(
        NORMALIZED | UNMASKED, weights="w = w.tril(); w = w / w.sum(-1, keepdim=True)"
    ),
    "weights_scaled": miss(NORMALIZED, weights="w = w * 2"),
    "weights_scaled_by_row": miss(NORMALIZED, weights="w = w * w.amax(-1, keepdim=True)"),
    "weights_shifted": miss(NORMALIZED, weights="w = w + 0.125"),
    "weights_squared": miss(NORMALIZED, weights="w = w * w"),
    "weights_cut": miss(NORMALIZED, weights="w = (w - 0.1).relu()"),
    "weights_flipped": miss(NORMALIZED, weights="w = w.flip(-1)"),
    "weights_rolled": miss(NORMALIZED, weights="w = w.roll(1, -1)"),
    "weights_of_another_head": miss(NORMALIZED_4, weights="w = w.roll(1, 1)"),
    "weights_transposed": miss(NORMALIZED | {"sizes": "square|equal"}, weights="w = w.mT"),
    "weights_rearranged": miss(
        NORMALIZED_4 | {"sizes": "square|equal"},
        weights="w = w.reshape(w.shape[0], w.shape[2], w.shape[1], w.shape[3]).transpose(1, 2)",
    ),
    "talking_after": miss(
        NORMALIZED_4, weights="mix = torch.arange(h * n * h * n).view(h * n, h * n) / 9; "
        "w = torch.einsum('bhst,hg->bgst', w, mix.to(w.dtype))",
    ),
    "weights_elsewhere": miss(NORMALIZED, weights="seen = w", out="out = out + seen.mean()"),
    # ------------------------------------------------ what happens to the scores
    "talking_before": miss(
        FOUR_AXES, scores="mix = torch.arange(h * n * h * n).view(h * n, h * n) / 9; "
        "w = torch.einsum('bhst,hg->bgst', w, mix.to(w.dtype))",
    ),
    "scores_elsewhere": miss(
        ANY_HEADS | {"fill": "big|small"}, scores="seen = w", out="out = out + seen.mean()"
    ),
    "scores_of_another_head": miss(FOUR_AXES, scores="w = w.roll(1, 1)"),
    "scores_flipped": miss(ANY_HEADS, scores="w = w.flip(-1)"),
    "scores_transposed": miss(ANY_HEADS | {"sizes": "square|equal"}, scores="w = w.mT"),
    "scores_symmetrized": miss(ANY_HEADS | {"sizes": "square|equal"}, scores="w = w + w.mT"),
    "scores_rearranged": miss(
        SQUARE, scores="w = w.reshape(w.shape[0], w.shape[2], w.shape[1], w.shape[3]).transpose(1, 2)"
    ),
    "scores_summed_up": miss(ANY_HEADS | {"fill": "big|small"}, scores="w = w.cumsum(-1)"),
    "scores_smoothed": miss(
        ANY_HEADS | {"fill": "big|small"}, scores="w = w + F.pad(w, (1, 0))[..., :-1]"
    ),
    "scores_rounded": miss(ANY_HEADS, scores="w = w.round()"),
    "scores_squared": miss(ANY_HEADS | UNMASKED, scores="w = w * w"),
    "scale_twice": miss(ANY_HEADS, operands="q = q * 0.5", scores="w = w * 0.5"),
    "scale_negative_after_mask": miss(
        ANY_HEADS | {"fill": "small|big", "norm": "softmax|exp_max"}, scores="w = w * -0.5"
    ),
    "scale_zero": miss(ANY_HEADS | {"fill": "small|big"}, scores="w = w * 0.0"),
    "scale_by_length": miss(ANY_HEADS, scores="w = w * (w.shape[-1] / 16)"),
    "scale_by_row": miss(ANY_HEADS | UNMASKED, scores="w = w / w.std(-1, keepdim=True, unbiased=False)"),
    "softcap_after_mask": miss(ANY_HEADS | {"fill": "small|big"}, scores="w = torch.tanh(w / 3) * 3"),
    "clamped_after_mask": miss(ANY_HEADS, scores="w = w.clamp(min=-5.0)"),
    "raised_after_mask": miss(
        ANY_HEADS | {"fill": "small", "norm": "softmax|exp_max"},
        scores="w = w + 20000.0 * torch.eye(w.shape[-1]).to(w.dtype)[0]"
    ),
    "hidden_by_score": miss(ANY_HEADS, scores="w = w.masked_fill(w < 0, float('-inf'))"),
    "hidden_by_mean": miss(
        ANY_HEADS | UNMASKED, scores="w = w.masked_fill(w < w.mean(-1, keepdim=True), float('-inf'))"
    ),
    "hidden_by_rank": miss(
        ANY_HEADS | ROOMY, scores="w = w.masked_fill(w < w.topk(2, -1).values[..., -1:], float('-inf'))"
    ),
    "hidden_by_query": miss(
        FOUR_AXES, scores="w = w.masked_fill(q.sum(-1, keepdim=True) < 0, -1e9)"
    ),
    "hidden_by_key": miss(
        FOUR_AXES | {"group": "1"}, scores="w = w.masked_fill((k.sum(-1) < 0).unsqueeze(-2), -1e9)"
    ),
    # ------------------------------------------------ masks that are nearly another
    "sees_one_later": miss(
        {"mask": "causal"}, mask="keep = torch.ones(s, t, dtype=torch.bool).tril(1)[None, None]"
    ),
    "sees_one_less": miss(
        {"mask": "causal"}, mask="keep = torch.ones(s, t, dtype=torch.bool).tril(-1)[None, None]"
    ),
    "sees_what_is_hidden": miss(
        {"mask": "causal"}, mask="keep = torch.ones(s, t, dtype=torch.bool).triu(1)[None, None]"
    ),
    "sees_the_past_of_the_key": miss(
        {"mask": "causal", "sizes": "square|equal"}, mask="keep = keep.transpose(-1, -2)"
    ),
    "sees_in_reverse": miss({"mask": "causal"}, mask="keep = keep.flip(-2)"),
    "causal_at_traced_size": miss(
        VARYING | {"trace": "symbolic|exported_symbolic"},
        mask="keep = (torch.arange(t)[None] <= torch.arange(s)[:, None] + (s - {s}))[None, None]",
    ),
    "causal_by_ratio": miss(
        {"mask": "causal", "trace": "symbolic|exported_symbolic|static"},
        mask="keep = (torch.arange(t)[None] * {s} <= torch.arange(s)[:, None] * s)[None, None]",
    ),
    "window_of_traced_size": miss(
        {"mask": "window"},
        mask="keep = ((torch.arange(t)[None] - torch.arange(s)[:, None]).abs() < max({s}, {t}))[None, None]",
    ),
    "all_but_one": miss(
        {"mask": "all_true"},
        mask="keep = ((torch.arange(s)[:, None] + torch.arange(t)[None]) > 0)[None, None]",
    ),
    "causal_for_even_heads": miss(
        {"mask": "causal"}, mask="keep = keep | (torch.arange(h * n) % 2 == 1)[None, :, None, None]"
    ),
    "causal_unless_first_row": miss(
        {"mask": "causal"}, mask="keep = keep | (torch.arange(b) == 0)[:, None, None, None]"
    ),
    # ------------------------------------------------ operands
    "groups_differ": miss(
        FOUR_AXES | {"group": "2|3", "packed": "none"},
        copies="k = k.repeat_interleave(n, 1); v = v.repeat(1, n, 1, 1)",
    ),
    "groups_differ_otherwise": miss(
        FOUR_AXES | {"group": "2|3", "packed": "none"},
        copies="k = k.repeat(1, n, 1, 1); v = v.repeat_interleave(n, 1)",
    ),
    "heads_flipped_in_keys": miss({}, operands="k = k.flip(1)"),
    "heads_rolled_in_values": miss({}, operands="v = v.roll(1, 1)"),
    "batch_rolled_in_values": miss({}, operands="v = v.roll(1, 0)"),
    "keys_flipped": miss({}, operands="k = k.flip(2)"),
    "keys_rolled": miss({}, operands="k = k.roll(1, 2)"),
    "keys_shuffled": miss({}, operands="k = k[:, :, (torch.arange(t) * 2 + 1) % t]"),
    "values_shuffled": miss({}, operands="v = v.index_select(2, (torch.arange(t) * 3 + 1) % t)"),
    "features_flipped_in_keys": miss({}, operands="k = k.flip(-1)"),
    "values_of_one_head": miss(
        FOUR_AXES | {"group": "1", "values": "matmul|einsum|swapped|mul_sum"}, operands="v = v[:, :1]"
    ),
    "values_of_one_batch": miss(
        {"heads": "whole|grouped", "values": "matmul|einsum|swapped|mul_sum", "copies": "repeat|tile|stack"},
        operands="v = v[:1]",
    ),
    "keys_of_one_batch": miss(
        {"heads": "whole|grouped", "contraction": "matmul|swapped|einsum", "copies": "repeat|tile|stack"},
        operands="k = k[:1]",
    ),
    "queries_are_keys": miss({"sizes": "square|equal", "group": "1"}, operands="k = q"),
    "keys_are_values": miss({"sizes": "square|equal"}, operands="v = k"),
    "keys_rearranged": miss({}, operands="k = k.transpose(1, 2).reshape(b, h, t, d)"),
    "values_rearranged": miss({}, operands="v = v.transpose(1, 2).reshape(b, h, t, e)"),
    # ------------------------------------------------ the value contraction
    "weights_used_twice": miss(NORMALIZED, values="out = w @ v + w @ (v * v)"),
    "weights_used_twice_apart": miss(NORMALIZED, values="out = w @ v; out = out + (w @ v.flip(-2)) * 0.5"),
    "values_by_query": miss(NORMALIZED | {"sizes": "square|equal"}, values="out = w.mT @ v"),
    "values_over_queries": miss(
        NORMALIZED | {"sizes": "square|equal"}, values="out = torch.einsum('...st,...se->...te', w, v)"
    ),
    "values_of_weights": miss(
        NORMALIZED | {"sizes": "square|equal", "output": "bhse"}, values="out = w @ w.mT"
    ),
    "values_plus_mean": miss(NORMALIZED, values="out = w @ v + v.mean(-2, keepdim=True)"),
    "columns_dropped": miss(NORMALIZED | ROOMY, values="out = w[..., 1:] @ v[..., 1:, :]"),
    "columns_shifted": miss(NORMALIZED | ROOMY, values="out = w[..., :-1] @ v[..., 1:, :]"),
    "columns_padded": miss(NORMALIZED, values="out = F.pad(w, (1, 0)) @ F.pad(v, (0, 0, 0, 1))"),
    "heads_summed": miss(
        NORMALIZED_4 | {"output": "bhse"}, values="out = torch.einsum('bhst,bhte->bse', w, v).unsqueeze(1)"
    ),
    "late_by_flipped_rows": miss(LATE, values="out = (w @ v) / total.flip(-2)"),
    "late_by_sum_plus": miss(LATE, values="out = (w @ v) / (total + 0.5)"),
    "late_by_clamped_sum": miss(LATE, values="out = (w @ v) / total.clamp(min=2.0)"),
    "late_by_feature": miss(
        LATE | {"sizes": "equal"}, values="out = (w @ v) / total.mT"
    ),
    "late_twice": miss(LATE, values="out = (w @ v) / total / total"),
    "late_by_sum_of_queries": miss(
        LATE | {"sizes": "equal"}, values="out = (w @ v) / w.sum(-2).unsqueeze(-1)"
    ),
    # ------------------------------------------------ what is around it
    "attention_of_attention": miss(
        FOUR_AXES | {"sizes": "square|equal", "output": "bhse"}, out="out = (out @ k.mT).softmax(-1) @ v"
    ),
    "residual": miss(FOUR_AXES | {"sizes": "square|equal", "output": "bhse"}, out="out = out + q"),
    "written_keys": miss(
        WRITTEN | {"sizes": "square|equal"},
        operands="k = k.clone(); v = k.view(k.shape)", scores="k.mul_(2.0)",
    ),
    "written_values": miss(
        WRITTEN, operands="v = v.clone()", scores="v[:, :, :1].add_(1.0)"
    ),
    "written_scores": miss(WRITTEN, scores="seen = w[..., :1]; seen.mul_(0.5); w.add_(0.25)"),
    "written_weights": miss(
        WRITTEN | {"norm": "softmax"}, weights="w[..., 0].zero_()"
    ),
    "written_weights_by_view": miss(
        WRITTEN | {"norm": "softmax"}, weights="seen = w.unsqueeze(0); seen[..., 1:3] = 0.5"
    ),
    "written_queries_late": miss(
        WRITTEN, operands="q = q.clone()", out="q.zero_(); out = out + q.sum()"
    ),
    "written_mask": miss(
        WRITTEN | {"mask": "causal", "joined": "and"}, mask="keep = keep.clone(); keep[..., 0, 1:2] = True"
    ),
    "written_mask_late": miss(
        WRITTEN | {"mask": "causal"}, mask="keep = keep.clone()", scores="keep.logical_not_()"
    ),
    "written_output": miss(WRITTEN | {"output": "bhse"}, out="out[:, :, :1] = 0.0"),
    # ------------------------------------------------ weights divided by their own sum
    "taylor": miss(
        NORMALIZED | {"fill": "small|big"}, instead="u = 1 + w + w * w / 2; w = u / u.sum(-1, keepdim=True)"
    ),
    "taylor_hidden_after": miss(
        NORMALIZED | UNMASKED,
        instead="late = torch.ones(w.shape[-2:], dtype=torch.bool).triu(1); "
        "u = (1 + w + w * w / 2).masked_fill(late, 0.0); w = u / u.sum(-1, keepdim=True)",
    ),
    "taylor_hidden_twice": miss(
        NORMALIZED_4 | {"fill": "inf", "mask": "causal|padding|window"},
        instead="late = torch.ones(w.shape[-2:], dtype=torch.bool).triu(1); "
        "u = (1 + w + w * w / 2).masked_fill(late, 0.0); w = u / u.sum(-1, keepdim=True)",
    ),
    "shares_of_rectified": miss(NORMALIZED, instead="u = w.relu(); w = u / (1 + u.sum(-1, keepdim=True))"),
    "shares_over_queries": miss(NORMALIZED, instead="u = w.relu(); w = u / (1 + u.sum(-2, keepdim=True))"),
    "shares_of_another": miss(
        NORMALIZED, instead="w = w.sigmoid() / (w * 0.5).sigmoid().sum(-1, keepdim=True)"
    ),
    "shares_late": miss(
        NORMALIZED, instead="w = F.softplus(w) + 1", values="out = (w @ v) / w.sum(-1, keepdim=True)"
    ),
    "shares_late_by_flipped_rows": miss(
        NORMALIZED, instead="w = F.softplus(w) + 1", values="out = (w @ v) / w.sum(-1, keepdim=True).flip(-2)"
    ),
    "weights_affine_by_row": miss(
        NORMALIZED | UNMASKED,
        instead="more = w.mean(-1, keepdim=True); w = w.softmax(-1) * 0.5",
        weights="w = w + more",
    ),
}  # fmt: skip
