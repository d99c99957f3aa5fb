"""cbam_inference: the whole gate in one call, with constant norm statistics.

y = act(x * Mc * sigmoid(norm(conv(pooled))) + residual); x, y, residual [N, C, H, W] any float.

Small samples: one launch, one program per sample, which keeps x in its registers (`sample`).
Traffic: x (and residual) once, y once.

Others: `pool_pixels`, `gate_pool_channels`, and `apply`, which convolves the pooled maps itself.
Where `gate_pool_channels` splits the channels, `spatial_logits` comes between. Traffic: x three
times, residual once, y once.
"""

from cbam_fused.triton_kernels.cbam_apply import apply
from cbam_fused.triton_kernels.cbam_attend import maximum_map, spatial_logits
from cbam_fused.triton_kernels.configurations import whole_sample
from cbam_fused.triton_kernels.gate_pool_channels import gate_pool_channels
from cbam_fused.triton_kernels.geometry import geometry
from cbam_fused.triton_kernels.launch import aligned
from cbam_fused.triton_kernels.pool_pixels import Pool, pool_pixels
from cbam_fused.triton_kernels.sample import infer_sample


def cbam_inference(
    x, mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2, conv_weight, conv_bias,
    norm_weight, norm_bias, norm_mean, norm_var, eps, residual, pool, maps, activation,
):  # fmt: skip
    """y = activation(x * Mc * Ms + residual), with constant norm statistics."""
    x = aligned(x)
    shape, pools, spatial = geometry(x), Pool.parse(pool), conv_weight is not None
    norm = (norm_weight, norm_bias, norm_mean, norm_var)
    plan = whole_sample(shape, mlp_weight2.numel())
    if plan is not None:
        mlp = (mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2)
        return infer_sample(
            *(plan, x, mlp, (conv_weight, conv_bias), norm, eps, residual, pools),
            maximum_map(maps),
            light_maps=maps == "light",
            activation=activation,
        )

    products = pool_pixels(x, mlp_weight1, mlp_weight2, pools, "none", None).partial_products
    gated = gate_pool_channels(
        x,
        products,
        mlp_bias1,
        mlp_weight2,
        mlp_bias2,
        pools,
        maximum_map(maps),
        "none",
        hidden_layer=mlp_weight1 is not None,
        spatial=spatial,
        keep_hidden=False,
    )
    pooled = logits = None
    if spatial and gated.pooled.shape[1] > 1:
        splits = (gated.pooled, gated.channel_ties)
        logits = spatial_logits(shape, *splits, conv_weight, conv_bias, maps, "none")[2]
    elif spatial:
        pooled = gated.pooled
    return apply(
        *(x, gated.channel_gate, logits, pooled, conv_weight, conv_bias, norm, eps, residual),
        maps=maps,
        activation=activation,
    )
