"""Codes of detection: the weights, the values, and the layout of operands."""

from __future__ import annotations

from attnc.codes.rows import Code

WEIGHTS = (
    Code(
        "no-scores",
        "Compute the scores as one contraction of queries and keys, and let only elementwise steps stand "
        "between it and the softmax.",
        "A softmax and a contraction with values were found, but what is normalized is no elementwise "
        "function of one contraction of two computed tensors. A learned table in place of the scores "
        "(Synthesizer), a pooled or sorted score, or a convolution over scores ends here: each weight then "
        "depends on more than its own query and key, and no fused kernel computes that.",
    ),
    Code(
        "no-value-contraction",
        "Contract the weights with values (matmul, bmm, einsum), with views, casts and dropout only in "
        "between.",
        "The normalized scores are never contracted with values. Where the model only wants the weights, "
        "such as for pooling or routing, there is nothing to fuse; where it multiplies them in a loop, "
        "write one product.",
    ),
    Code(
        "several-value-contractions",
        "Concatenate the values along their features and contract the weights once.",
        "The weights are used by more than one contraction. A fused kernel never holds the weights, so it "
        "would have to compute them once per use. Joining the values gives the same results in one pass.",
    ),
    Code(
        "weights-squared",
        "Contract the weights with a tensor of values instead of with themselves.",
        "The weights are contracted with themselves: a power of the attention matrix, as in graph "
        "diffusion. The result needs the whole matrix, which a fused kernel does not keep.",
    ),
    Code(
        "values-added",
        "Add the extra tensor in a step of its own, after the contraction with the values.",
        "The contraction with the values (baddbmm) also scales its result or adds a tensor to it. Spelled "
        "as a product and an addition, the product is a site.",
    ),
    Code(
        "weights-edited",
        "Move the edit before the softmax if it hides keys, or after the values if it is one factor per "
        "query.",
        "Something other than a view, a cast or dropout changes the weights between the softmax and the "
        "values. A mask applied after the softmax leaves rows that no longer sum to 1; talking heads "
        "(arXiv:2003.02436) mix heads there. A fused kernel has no place for such a step.",
    ),
    Code(
        "keys-not-summed",
        "Let the softmax run over exactly the axis that the contraction with the values sums.",
        "The values are summed along another axis than the one that the softmax normalized, or along part "
        "of it. This is how a softmax over the queries, or over heads, looks. It is not attention over the "
        "keys.",
    ),
    Code(
        "weights-rearranged",
        "Keep every axis of the weights in the result: reshape and permute after the values.",
        "An axis of the weights is cut, merged or repeated on its way into the result so that the two "
        "cannot be matched. Views that keep every axis are followed; a view that mixes axes is not.",
    ),
    Code(
        "columns-dropped",
        "Append at most one column (a sink) to the scores, and drop exactly that one after the softmax.",
        "The softmax runs over more columns than the values have rows. One extra column is an attention "
        "sink; more of them belong to no spec.",
    ),
    Code(
        "sink-edited",
        "Subtract the row maximum from scores and sink alike, or append the sink as the last step.",
        "The sink column is changed after it was appended to the scores, so its value in the denominator is "
        "not the logit that was appended.",
    ),
    Code(
        "sink-not-found",
        "Append the sink by one concatenation along the keys.",
        "The softmax runs over one column more than there are keys, and that column is not a concatenated "
        "tensor. The sink's logit cannot be read.",
    ),
    Code(
        "sink-layout",
        "Give one sink logit per head, broadcast over batch and queries.",
        "The sink logit varies along more than the heads. A spec holds one logit per head.",
    ),
    Code(
        "late-division",
        "Divide the result once by the sum of the same weights over the keys.",
        "Unnormalized weights are contracted with values and the result is divided later, but the divisor "
        "is not the sum of these weights at the same query, so it is not a softmax.",
    ),
    Code(
        "talking-heads",
        "Nothing short of removing the mixing of heads; the site runs as it is.",
        "Scores or weights of several heads are mixed by a product before they meet the values "
        "(arXiv:2003.02436). Each head needs the scores of all, so no kernel can run one head at a time.",
    ),
    Code(
        "score-convolution",
        "Nothing short of removing the convolution; the site runs as it is.",
        "The scores are convolved before the softmax (multi-token attention, arXiv:2504.00927). A score "
        "reads its neighbors, so no tile of scores stands alone.",
    ),
    Code(
        "softmax-over-shared-axis",
        "Take the softmax over the keys, if that is what was meant.",
        "The softmax runs over an axis that queries and keys share, such as the heads. Its weights do not "
        "sum to 1 over the keys, so this is no attention over them.",
    ),
    Code(
        "query-axis-softmax",
        "Take the softmax over the keys, if that is what was meant; otherwise the site runs as it is.",
        "The weights of each key are normalized over the queries (slot attention, arXiv:2006.15055). The "
        "sums of all columns are needed before the first result: two passes, which no kernel here makes.",
    ),
    Code(
        "entmax",
        "Use a softmax if the model may change; otherwise the site runs as it is.",
        "The weights are scores less a threshold that is found from all scores of the row: sparsemax "
        "(arXiv:1602.02068) or entmax (arXiv:1905.05702). That takes several passes over the keys.",
    ),
    Code(
        "signed-softmax",
        "Take the softmax of |scores|, hidden by -inf, and multiply by the sign of the scores.",
        "The weights carry the sign of the scores (Cog attention, arXiv:2411.07176), but what the softmax "
        "sees is not the magnitude of the same scores.",
    ),
    Code(
        "not-softmax",
        "Use a softmax if the model may change; otherwise leave it, nothing is lost but speed.",
        "Scores are weighted by another function than a softmax, such as a sigmoid (arXiv:2409.04431) or a "
        "ReLU. That is attention of another kind; the report names it and the model stays as it is.",
    ),
    Code(
        "linear-attention",
        "Nothing has to be done; a linear form of the same product is a matter of association order.",
        "A contraction of two computed tensors is contracted again with no normalizer in between: linear "
        "attention (arXiv:2006.16236) or a chain of products. There is no softmax to fuse.",
    ),
    Code(
        "weights-gated-by-key",
        "Multiply the values by the tensor in place of the weights, or add its logarithm to the scores.",
        "Weights are multiplied after the softmax by a tensor that changes along the keys, so they no "
        "longer sum to what the softmax made them. A factor per head or per query is the same before "
        "and after the values, and is taken.",
    ),
    Code(
        "weights-masked",
        "Mask before the softmax and after it by one condition, or before it only.",
        "Weights are set to zero after the softmax where the scores were not hidden before it, so the "
        "weights that remain do not sum to 1. Where both masks are one, the second only gives zeros to "
        "queries that see no key, and that is read.",
    ),
    Code(
        "rounded-logsumexp",
        "Write softmax, or log_softmax and exp, or hide keys with -inf; or compute scores in fp32.",
        "Weights are exp(s - logsumexp(s)). Where a query sees no key and hidden scores are a huge finite "
        "number, the log-sum-exp rounds to that number and every weight becomes 1, so the values are summed "
        "and not averaged. No softmax does that, and in the precision of these scores it cannot be repeated.",
    ),
    Code(
        "terms-differ",
        "Give both softmaxes the same heads and the same layout.",
        "Weights of several softmaxes are added before they meet the values, as in differential "
        "attention (arXiv:2410.05258), but their batch, heads or queries are laid out differently, so "
        "the attentions cannot be added.",
    ),
)

OPERANDS = (
    Code(
        "pieces-differ",
        "Give all pieces one query, one scale and plain additive masks; add other masks as tensors.",
        "The weights of one softmax meet values in several contractions, as block-sparse attention does. "
        "With the keys side by side that is one attention, if the pieces have the same queries, scale and "
        "layout; one of them does not.",
    ),
    Code(
        "no-key-side",
        "Let exactly one of the two contracted tensors vary along the keys.",
        "Both operands of the scores contraction vary along the axis that the softmax normalizes, or "
        "neither does. Keys that depend on the query (relative keys per pair) look so; no kernel takes a "
        "key per pair.",
    ),
    Code(
        "query-reads-keys",
        "Compute the queries without the axis of the keys.",
        "The query side varies along the keys, so there is one query per pair. That is no attention spec.",
    ),
    Code(
        "operand-atoms",
        "Sum or index away the extra axis before the scores are computed.",
        "An operand varies along an axis that the scores do not have. The contraction would have to sum it "
        "too.",
    ),
    Code(
        "repeated-features",
        "Contract tensors that both vary along the feature axis.",
        "An operand is constant along a summed axis: the scores then hold a plain sum of features and not a "
        "product with keys.",
    ),
    Code(
        "operand-layout",
        "Build the operand by views, repeats along heads, slices and concatenations.",
        "A query, key or value tensor cannot be brought to batch, heads, length, features by views of "
        "something that the graph holds, for example because it is gathered by data.",
    ),
    Code(
        "side-operand-layout",
        "Let the mask or bias broadcast to batch, heads, queries and keys through views only.",
        "A tensor beside the scores is read in a way that no view gives, such as a gather along the keys by "
        "data.",
    ),
    Code(
        "result-layout",
        "Return the result with whole axes of batch, heads, queries and features, in any order.",
        "The result's axes are no product of batch, heads, queries and features, so the fused output cannot "
        "be put in its place by views.",
    ),
    Code(
        "size-not-decided",
        "Make the number of heads (and the feature size) a fixed number: mark only batch and sequence as "
        "dynamic.",
        "A size that decides the spec is symbolic, such as query heads per key head. Sizes are divided "
        "exactly, never by the value they have in the example.",
    ),
    Code(
        "sdpa-operands",
        "Call scaled_dot_product_attention with tensors of one rank of at least 3 and a number as its scale.",
        "A call of scaled_dot_product_attention has operands that cannot be read: ranks that differ, keys "
        "that do not fit the queries, or a scale that is not a number.",
    ),
)

DETECT = (*WEIGHTS, *OPERANDS)
