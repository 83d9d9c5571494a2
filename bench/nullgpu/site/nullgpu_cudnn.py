"""cuDNN for the null GPU: what PyTorch would ask of it gives tensors of the right shape and layout, with nothing in.

Which operators a compiled graph holds and how its tensors lie depends on cuDNN being there; without it a graph is
another than on a GPU, and so is its key in Inductor's cache.
"""

import torch
from torch import _meta_registrations as shapes

_LIBRARY = torch.library.Library("aten", "IMPL")


def _layout(x, weight, *how):
    backend = torch._C._select_conv_backend(x, weight, *how)
    return torch._C._conv_determine_backend_memory_format(x, weight, backend)


def _convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    layout = _layout(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    shape = shapes.calc_conv_nd_return_shape(
        x, weight, stride, padding, dilation, transposed, groups, output_padding if transposed else None
    )
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _convolution_backward(
    grad, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, wanted
):
    how = (None, stride, padding, dilation, transposed, output_padding, groups)
    layout = _layout(x, weight, *how)
    return (
        torch.empty_like(x, memory_format=layout) if wanted[0] else None,
        torch.empty_like(weight, memory_format=layout) if wanted[1] else None,
        grad.new_empty(bias_sizes) if wanted[2] else None,
    )


def _attention(query, key, value, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, debug=False, scale=None):
    found = shapes.meta__scaled_dot_product_cudnn_attention(
        query, key, value, bias, compute_log_sumexp, dropout_p, is_causal, debug, scale=scale
    )
    seed = query.new_empty((), dtype=torch.long)
    return (*found[:6], seed, seed.clone(), None)


def _batch_norm(x, weight, bias, mean, variance, training, momentum, epsilon):
    numbers = x.new_empty(x.shape[1] if training else 0, dtype=torch.float32)
    return torch.empty_like(x), numbers, numbers.clone(), x.new_empty(0, dtype=torch.uint8)


def _batch_norm_backward(x, grad, weight, mean, variance, save_mean, save_variance, epsilon, reserve):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def pretend():
    """From now on cuDNN is there."""
    for name, kernel in {
        "convolution": _convolution,
        "convolution_backward": _convolution_backward,
        "_scaled_dot_product_cudnn_attention": _attention,
        "_scaled_dot_product_cudnn_attention_backward": shapes.meta__scaled_dot_product_cudnn_backward,
        "cudnn_batch_norm": _batch_norm,
        "cudnn_batch_norm_backward": _batch_norm_backward,
    }.items():
        _LIBRARY.impl(name, kernel, "CUDA", allow_override=True)
