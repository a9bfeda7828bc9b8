"""Codes of the steps between the scores and the softmax, masks among them."""

from __future__ import annotations

from attnc.codes.rows import Code

STEPS = (
    Code(
        "score-step-unknown",
        "Write the step as scale, soft cap (tanh), bias or mask, or as elementwise arithmetic on the score.",
        "An operation between the scores contraction and the softmax is not understood, so what the softmax "
        "sees is unknown. The report names the operation and its line.",
    ),
    Code(
        "symbolic-number",
        "Use a number that does not depend on sizes, or a tensor.",
        "The scores are scaled by, or added to, a number that is computed from sizes. A spec holds "
        "numbers that are the same at every size.",
    ),
    Code(
        "division-by-zero",
        "Check the scale: the scores are divided by the constant 0.",
        "The scores are divided by zero, so the softmax sees infinities and NaN. Nothing is fused on top of "
        "that.",
    ),
    Code(
        "scale-not-finite",
        "Check the scale: it must be a finite number.",
        "The scores are multiplied or divided by infinity or NaN.",
    ),
    Code(
        "scaled-addition",
        "Spell the addition without alpha or beta: scale the tensor in a step of its own.",
        "A tensor is added to the scores with a factor inside the addition (alpha, or beta of baddbmm).",
    ),
    Code(
        "scores-combined",
        "Let one contraction give the scores and enter every other one as a bias; or concatenate the "
        "features of both, so that one contraction gives their sum.",
        "Two tensors that come from score contractions meet in one operation, and neither can be read as a "
        "bias of the other: each pair of query and key would need two products. q1.k1 + q2.k2 is one "
        "contraction of concatenated features where both have the same layout.",
    ),
    Code(
        "cat-of-scores",
        "Concatenate keys and values instead of scores.",
        "Scores of two contractions are concatenated along the keys, as with a cache kept apart or with "
        "global tokens. One contraction with concatenated keys gives the same scores.",
    ),
    Code(
        "softcap-sign",
        "Use a cap that is not zero: cap * tanh(scores / cap).",
        "A tanh on the scores is multiplied by zero, which is no soft cap (arXiv:2408.00118, section 2).",
    ),
    Code(
        "shift-not-finite",
        "Add a finite constant, or a mask.",
        "An infinite constant or NaN is added to all scores.",
    ),
)

MASKS = (
    Code(
        "mask-not-readable",
        "Scale before the mask is added.",
        "An additive mask was scaled after it was added, and no tensor of the graph holds the scaled mask.",
    ),
    Code(
        "empty-rows-differ",
        "Mask with -inf, or subtract each row's maximum before the exponential (torch.softmax does).",
        "The exponentials of the scores are summed as they are, and masked scores are a finite number. In a "
        "row that sees no key the exponentials vanish or are rounded off, and the model's own result, NaN or "
        "weights that do not add up to one, is not what a softmax gives.",
    ),
    Code(
        "nan-made-zero",
        "Zero the rows that see no key with torch.where, or leave nan_to_num out.",
        "The weights go through nan_to_num, which zeroes rows that see no key. A step on the scores may make "
        "NaN itself, of an infinite bias times zero for one, and those rows a fused kernel would not zero.",
    ),
)

SCORES = (*STEPS, *MASKS)
