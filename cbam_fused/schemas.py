"""The operations that every backend implements: their schemas, and what their arguments mean.

`csrc/library.cpp` registers the same texts; a test compares them. Without a compiled library Python
registers these.

Shapes: ``x`` is ``[N, C, H, W]``, NCHW or channels_last, in float32, float16, bfloat16 or float64.
``compute`` is float64 for float64 and float32 otherwise: every sum, the gates, the norm and all
small tensors are in it.

============  ============================  ========================================================
argument      shape, dtype                  meaning
============  ============================  ========================================================
mlp_weight1   [R, C] or [R, C, 1, 1]        first layer; absent: one C x C layer, no hidden units
                                            (R = 0)
mlp_bias1     [R]
mlp_weight2   [C, R] or [C, R, 1, 1]        second layer ([C, C] where mlp_weight1 is absent)
mlp_bias2     [C]                           the four MLP tensors share one dtype: compute, or that
                                            of x
conv_weight   [1, M, k, k], k odd           spatial gate; absent: channel gate only. M = 1 for
                                            maps="light"
conv_bias     [1]
norm_*        [1]                           weight and bias optional; norm_mean absent: no norm.
                                            Each tensor of the convolution and the norm is in
                                            compute or in the dtype of x
residual      as x
channel_gate  [N, C], compute               Mc = sigmoid(MLP)
descriptors   [N, P, C], compute            what was pooled over H*W, in the order avg, max, lp, lse
hidden        [N, B, R], compute            after the ReLU; B = P branches, 1 for pool="light"
pixel_ties    [N, C], int32                 per channel: ties="first": flat index h * W + w of the
                                            first maximum; "even": the number of maxima (0 if the
                                            maximum is NaN)
pooled        [N, 2, H, W], compute         max and mean over C of x * Mc, in the order of `maps`
                                            ("light": max, mean)
channel_ties  [N, H, W], int32              per pixel, as pixel_ties, over C of x * Mc
logits        [N, H, W], compute            z, the convolution's result, before the norm
============  ============================  ========================================================

The operations themselves do not differentiate: `cbam_fused.cbam` does.

Where a thing does not exist (no spatial gate, no maximum pooled, no statistics asked for) its
output has shape [0].

pool        ``avg``, ``max``, ``lp`` (p = 2), ``lse`` joined by ``+`` in that order, or ``light``:
            one branch 0.5 avg + 0.5 max
maps        ``max_mean`` (official), ``mean_max``, ``light``: one map 0.5 mean + 0.5 max
ties        how the gradient of a maximum is shared: ``first`` index, or ``even`` over all
activation  ``none``, ``relu``, ``relu6``
"""

NAMESPACE = "cbam_fused"

POOL_TYPES = ("avg", "max", "lp", "lse")
MAPS = ("max_mean", "mean_max", "light")
TIES = ("first", "even")
ACTIVATIONS = ("none", "relu", "relu6")

_MLP = "Tensor? mlp_weight1, Tensor? mlp_bias1, Tensor mlp_weight2, Tensor? mlp_bias2"
_CONV = "Tensor? conv_weight, Tensor? conv_bias"
_NORM = "Tensor? norm_weight, Tensor? norm_bias, Tensor? norm_mean, Tensor? norm_var, float eps"

SCHEMAS = {
    # Everything in one call, for when no gradient is needed: y = act(x * Mc * Ms + residual).
    "cbam_inference": f"(Tensor x, {_MLP}, {_CONV}, {_NORM}, Tensor? residual,"
    " str pool, str maps, str activation) -> Tensor",
    # Phase 1. norm_mean and norm_var [1] are the mean and the biased variance of the logits over
    # this batch (batch_statistics=True); given running_mean and running_var ([1], any float) are
    # moved towards them by momentum, as BatchNorm2d does: the variance unbiased, an empty batch
    # changing nothing.
    "cbam_attend": f"(Tensor x, {_MLP}, {_CONV}, bool batch_statistics,"
    " Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum,"
    " str pool, str maps, str ties)"
    " -> (Tensor channel_gate, Tensor descriptors, Tensor hidden, Tensor pixel_ties, Tensor pooled,"
    " Tensor channel_ties, Tensor logits, Tensor norm_mean, Tensor norm_var)",
    # Phase 2: y = act(x * Mc * sigmoid(norm(logits)) + residual).
    "cbam_apply": f"(Tensor x, Tensor channel_gate, Tensor? logits, {_NORM}, Tensor? residual,"
    " str activation) -> Tensor",
    # First pass of the backward. y is needed where there is an activation. masked_grad is grad
    # through the activation ([0] without one: grad itself serves); channel_sums [N, C] =
    # sum_hw g x Ms; norm_grad [N, H, W] is the gradient of the norm's result; norm_sums [2] =
    # sum norm_grad, sum norm_grad * normalised logits ([0] without a norm).
    "cbam_backward_reduce": "(Tensor grad, Tensor x, Tensor? y, Tensor channel_gate,"
    f" Tensor? logits, {_NORM}, str activation)"
    " -> (Tensor masked_grad, Tensor channel_sums, Tensor norm_grad, Tensor norm_sums)",
    # Second pass. grad is masked_grad where there is one. norm_sums [2] is given when the norm used
    # batch statistics, those of norm_count values (N H W), and absent when they were constants.
    # Parameter gradients have the shape of their parameter ([0] for an absent layer); the MLP's
    # are in its dtype, the convolution's in compute. Biases are always given.
    "cbam_backward_input": "(Tensor grad, Tensor x, Tensor channel_gate, Tensor descriptors,"
    " Tensor hidden, Tensor pixel_ties, Tensor pooled, Tensor channel_ties, Tensor? logits,"
    " Tensor channel_sums, Tensor? norm_grad, Tensor? norm_sums, SymInt norm_count,"
    " Tensor? mlp_weight1, Tensor mlp_weight2, Tensor? conv_weight,"
    f" {_NORM}, str pool, str maps, str ties)"
    " -> (Tensor x_grad, Tensor mlp_weight1_grad, Tensor mlp_bias1_grad, Tensor mlp_weight2_grad,"
    " Tensor mlp_bias2_grad, Tensor conv_weight_grad, Tensor conv_bias_grad)",
}
