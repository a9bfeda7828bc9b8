"""Codes of what comes after detection: choosing, editing the graph, kernels, verification."""

from __future__ import annotations

from attnc.codes.rows import Code

KEPT = (
    Code(
        "internal-error",
        "Report this with the model: the error is attnc's own. The site runs as it was.",
        "A stage of the compiler raised on this site. It was left as it was, so that the model still runs.",
    ),
    Code(
        "form-not-allowed",
        "Allow a form for this site: drop the pattern that excludes it, or pass --form fused.",
        "The site was understood, and the forms that were allowed name nothing for it.",
    ),
    Code(
        "form-does-not-apply",
        "Choose another form for this site, or allow fused beside it.",
        "None of the forms that were allowed here fits the site; the reason of each follows.",
    ),
    Code(
        "weights-in-use",
        "Stop returning or reading the attention weights (output_attentions=False), or keep this site as it "
        "is.",
        "The model reads scores or weights of the site outside of it. A fused kernel does not have them, "
        "and computing them beside it would cost more than it saves.",
    ),
    Code(
        "dropout-active",
        "Call .eval(), or set the attention dropout to 0.",
        "Dropout on the weights is active. A fused kernel draws other random numbers than the model, so the "
        "result would not be the same function.",
    ),
    Code(
        "already-fused",
        "Nothing has to be done.",
        "The model calls one fused kernel here, and its mask has no better closed form.",
    ),
    Code(
        "opset-too-old",
        "Convert the file first: onnx.version_converter.convert_version(model, 18), or export it again.",
        "The ONNX file has an older set of operators than a rewritten site is written with, and nodes that "
        "belong to no site are never changed.",
    ),
    Code(
        "no-faster-kernel",
        "Change the step that the kernels lack, named in the reason, or choose another target.",
        "The site was understood, and no kernel of this target computes it faster than the model does. The "
        "reason lists what each kernel lacks.",
    ),
    Code(
        "slower",
        "Pass cost_model=False (--no-cost-model) to rewrite it all the same.",
        "The cost model predicts that the rewritten site would be slower than the model's own code at the "
        "sizes of the example, as happens with short sequences.",
    ),
    Code(
        "failed-verification",
        "Report it with the model; the original code runs here.",
        "The rewritten site was run against the original and was further off than the promise allows, so "
        "the original was put back.",
    ),
    Code(
        "model-disagrees",
        "Report it with the model; the original code runs everywhere.",
        "Each site passed its check, but the model as a whole was further off than the errors of its sites "
        "explain, so all of it was put back.",
    ),
)

EDITING = (
    Code(
        "no-link",
        "Write the result into a new tensor instead of in place, or move the site out of the sub-graph.",
        "A tensor of the site has no counterpart in the captured graph that holds the same value until the "
        "end: it is overwritten in place, or lives inside a sub-graph.",
    ),
    Code(
        "size-not-known",
        "Derive lengths from the inputs' shapes by sums and products only.",
        "A size that building the operands needs is no polynomial of the inputs' sizes, so no node computes "
        "it.",
    ),
    Code(
        "operand-after-output",
        "Compute masks and biases before the site's result.",
        "An operand is made after the site's output in the captured program.",
    ),
    Code(
        "crosses-switch",
        "Put the whole attention inside or outside of the no_grad or autocast block.",
        "Gradient mode or autocast changes between the scores and the result. One kernel runs in one mode.",
    ),
)

KERNELS = (
    Code(
        "sdpa-scores",
        "Use only scale and additive bias on the scores, or a target whose kernels know the step.",
        "scaled_dot_product_attention scales and adds a mask; soft caps and gains have no place in it.",
    ),
    Code(
        "sdpa-scale-after-bias",
        "Scale the queries (or the scores) before the bias is added.",
        "scaled_dot_product_attention scales before it adds the bias, the model after it.",
    ),
    Code(
        "sdpa-norm",
        "Choose a target that runs the spec itself, or use a softmax if the model may change.",
        "scaled_dot_product_attention weighs values by a softmax and by nothing else.",
    ),
    Code(
        "sdpa-sink",
        "Choose a target whose kernels have sinks.",
        "scaled_dot_product_attention has no sink in its denominator.",
    ),
    Code(
        "sdpa-dropout",
        "Call .eval(), or set the attention dropout to 0.",
        "scaled_dot_product_attention would draw other random numbers than the model.",
    ),
    Code(
        "sdpa-fp16-empty-rows",
        "Mask with -inf, or run in bfloat16 or float32.",
        "In fp16 a finite fill plus a score overflows to -inf. A row that sees no key then turns to NaN or "
        "to a ragged set in the model, and no kernel reproduces that.",
    ),
    Code(
        "flex-no-compiler",
        "Install a C++ compiler (CPU) or Triton (GPU); attnc doctor shows what is missing.",
        "FlexAttention is compiled when it first runs, and the compiler it needs is not there.",
    ),
    Code(
        "flex-norm",
        "Choose a target that runs the spec itself, or use a softmax if the model may change.",
        "FlexAttention weighs values by a softmax and by nothing else.",
    ),
    Code(
        "flex-dropout",
        "Call .eval(), or set the attention dropout to 0.",
        "FlexAttention has no dropout.",
    ),
    Code(
        "flex-dtype",
        "Use one of float32, bfloat16 and float16 for q, k and v alike.",
        "FlexAttention runs in one of three dtypes.",
    ),
    Code(
        "flex-head-dim",
        "Fix the head sizes; on CUDA use 16 or more.",
        "FlexAttention needs head sizes that are known when it is compiled.",
    ),
    Code(
        "flex-mask-dtype",
        "Give masks as bool tensors.",
        "FlexAttention reads a mask element by element as bool.",
    ),
    Code(
        "flex-score-dtype",
        "Give biases and gains in floating point.",
        "FlexAttention adds or multiplies floating tensors only.",
    ),
    Code(
        "flex-unknown-part",
        "Use parts that have a text for FlexAttention; the reason names the one that has none.",
        "A part of the spec has no spelling as a score_mod or mask_mod.",
    ),
    Code(
        "pattern-needs-self-attention",
        "Use the form where queries and keys are the same positions.",
        "The form compares positions of queries and keys; here there are more of one than of the other.",
    ),
    Code(
        "pattern-norm",
        "Keep the site dense: leave the form away here.",
        "The form hides keys by a score of -inf, and the model's function gives such a score a weight.",
    ),
    Code(
        "pattern-needs-causal",
        "Use the form on causal sites only.",
        "The form is for queries that look back; the site's mask does not hide the keys after a query.",
    ),
    Code(
        "pattern-tokens",
        "Give the form the sizes that the site's tokens fill; the reason says how many there are.",
        "The form counts positions on a grid or in frames, which the site's tokens do not fill.",
    ),
    Code(
        "s2-heads",
        "Use S2 where the number of heads is fixed.",
        "S2 gives each key/value head its own shard, and the number of heads is known at run time only.",
    ),
    Code(
        "s2-coverage",
        "Lower vertical, or keep a dense head; the reason says which blocks no head sees.",
        "The shards of all heads together leave out blocks, which the layer could not see at all.",
    ),
    Code(
        "triton-head-size",
        "Use fixed head sizes of 1 to 256, the same for queries and keys.",
        "The Triton kernel keeps whole heads in registers.",
    ),
    Code(
        "triton-dtype",
        "Use one of float16, bfloat16 and float32 for q, k and v alike.",
        "The Triton kernel has no other dtypes.",
    ),
    Code(
        "triton-dropout",
        "Call .eval(), or use a rate below 1.",
        "Forward and backward kernels drop weights, from a seed that the call brings. Those of a cache, of "
        "lists of blocks, of packed sequences and of forward mode do not.",
    ),
    Code(
        "triton-score-step",
        "Write the score by scale, soft cap, biases, factors and functions that Triton has.",
        "Kernels have no arc tangent, no powers, and no arithmetic on the number of a head or batch entry.",
    ),
    Code(
        "triton-normalizer",
        "Use a softmax, or weights that are each a function of their own score.",
        "The Triton kernel has these, and signed weights that are hidden by -inf.",
    ),
    Code(
        "triton-mask-kind",
        "Use a mask of bands, ranges, padding and dense parts.",
        "The Triton kernel has no text for another part of a mask.",
    ),
    Code(
        "triton-captured",
        "Give captured tensors in the layouts of a spec: bhqk, bk, h.",
        "The Triton kernel cannot read a captured tensor of the spec; the reason says which and why.",
    ),
)

CHOICE = (*KEPT, *EDITING, *KERNELS)
