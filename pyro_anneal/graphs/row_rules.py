"""One table: what each operation does to the rows of a plate.

A rule is given an operation's arguments and where the rows lie in them, and says where they lie in
the result. It raises :class:`Meet` where one row of the result would depend on several rows, or
where it cannot tell. Arguments that do not depend on the position are constants, whatever they hold.
"""

from __future__ import annotations

from typing import Any

import torch

from .row_axes import (
    as_pairs,
    constant,
    elementwise,
    expanded,
    joined,
    kept,
    on_diagonal,
    padded,
    permuted,
    reduced,
    reshaped,
    scattered,
    selected,
    unknown,
    unreduced,
)
from .row_calls import Call, Meet, Result, Rows, Rule
from .row_indices import embedded, gathered, index_selected, indexed, likelihood_of_class, searched
from .row_products import (
    attended,
    batch_normalized,
    compared,
    layer_normalized,
    leading,
    multiplied,
    of_matrices,
    spatial,
)

__all__ = ["Call", "Meet", "Result", "Rows", "rule_of", "unknown"]


# The rules by names of operations.
_GROUPS: list[tuple[Rule, str]] = [
    (
        elementwise,
        (
            "_to_copy clone detach alias lift_fresh lift_fresh_copy copy tril triu masked_fill where "
            "_prelu_kernel polygamma complex real imag conj _conj _neg_view resolve_conj resolve_neg "
            "addcmul addcdiv lerp nan_to_num clamp angle log_sigmoid_forward "
            "hardswish polar special_ndtr floor_divide "
            # without the tag in torch 2.4
            "celu celu_ elu elu_ hardshrink hardsigmoid hardsigmoid_ hardtanh hardtanh_ leaky_relu "
            "leaky_relu_ mish rad2deg rad2deg_ relu6 selu selu_ softplus softshrink threshold"
        ),
    ),
    (
        reshaped,
        "view _unsafe_view reshape unsqueeze squeeze _reshape_alias",
    ),
    (permuted, "permute transpose t"),
    (expanded, "expand repeat"),
    (selected, "select unbind"),
    (
        kept,
        (
            "slice split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk "
            "flip roll cumsum cumprod logcumsumexp cummax cummin sort argsort topk _softmax "
            "_log_softmax _safe_softmax glu unfold _fft_r2c _fft_c2r _fft_c2c"
        ),
    ),
    (
        reduced,
        (
            "sum mean prod amax amin logsumexp var std var_mean std_mean norm linalg_vector_norm "
            "any all argmax argmin max min median nanmedian mode kthvalue count_nonzero nansum "
            "aminmax"
        ),
    ),
    (joined, "cat stack"),
    (padded, "constant_pad_nd"),
    (multiplied, "mm bmm addmm baddbmm mv addmv dot vdot linear"),
    (
        leading(),
        (
            "convolution mkldnn_convolution cudnn_convolution _slow_conv2d_forward native_group_norm "
            "thnn_conv2d conv_depthwise3d _conv_depthwise2d slow_conv3d_forward miopen_convolution"
        ),
    ),
    (layer_normalized, "native_layer_norm _fused_rms_norm"),
    (
        batch_normalized,
        (
            "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
            "cudnn_batch_norm miopen_batch_norm _batch_norm_with_update"
        ),
    ),
    (embedded, "embedding"),
    (gathered, "gather scatter scatter_add scatter_reduce"),
    (index_selected, "index_select index_add index_copy index_fill"),
    (indexed, "index index_put _unsafe_index _unsafe_index_put"),
    (scattered, "select_scatter slice_scatter"),
    (on_diagonal, "diagonal diagonal_copy"),
    (
        of_matrices,
        (
            "linalg_cholesky_ex cholesky linalg_inv_ex _linalg_solve_ex linalg_solve_triangular "
            "triangular_solve cholesky_solve cholesky_inverse _linalg_eigh linalg_eigh linalg_eig "
            "_linalg_svd linalg_qr _linalg_det _linalg_slogdet linalg_lu_factor_ex linalg_lu_solve "
            "linalg_matrix_exp linalg_ldl_factor_ex linalg_pinv linalg_lu"
        ),
    ),
    (
        attended,
        (
            "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
            "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
            "_scaled_dot_product_attention_math"
        ),
    ),
    (compared, "_cdist_forward"),
    (
        unreduced,
        (
            "mse_loss binary_cross_entropy binary_cross_entropy_with_logits smooth_l1_loss "
            "huber_loss soft_margin_loss"
        ),
    ),
    (likelihood_of_class, "nll_loss_forward"),
    (searched, "bucketize searchsorted"),
    (as_pairs, "view_as_real"),
    (
        constant,
        (
            "ones_like zeros_like full_like empty_like new_ones new_zeros new_full new_empty "
            "new_empty_strided rand_like randn_like sym_size sym_numel"
        ),
    ),
    (
        spatial(1),
        (
            "max_pool1d avg_pool1d upsample_linear1d upsample_nearest1d reflection_pad1d "
            "replication_pad1d adaptive_avg_pool1d _upsample_nearest_exact1d diag_embed"
        ),
    ),
    (
        spatial(2),
        (
            "max_pool2d_with_indices avg_pool2d upsample_nearest2d upsample_bilinear2d "
            "upsample_bicubic2d reflection_pad2d replication_pad2d _adaptive_avg_pool2d "
            "adaptive_max_pool2d pixel_shuffle pixel_unshuffle _upsample_nearest_exact2d "
            "_upsample_bilinear2d_aa"
        ),
    ),
    (
        spatial(3),
        (
            "max_pool3d_with_indices avg_pool3d upsample_nearest3d upsample_trilinear3d "
            "_adaptive_avg_pool3d reflection_pad3d replication_pad3d"
        ),
    ),
]
_RULES = {f"aten::{name}": rule for rule, names in _GROUPS for name in names.split()}


def rule_of(func: Any) -> Rule:
    """Finds the rule of an operation."""
    tags = getattr(func, "tags", ())
    schema = getattr(func, "_schema", None)
    if schema is None:
        return unknown
    # Attention carries the tag of random operations even without dropout.
    is_plain = torch.Tag.nondeterministic_seeded not in tags
    if torch.Tag.pointwise in tags and is_plain:
        return elementwise
    return _RULES.get(schema.name, unknown)
