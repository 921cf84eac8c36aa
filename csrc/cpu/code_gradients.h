// The backward pass of residual_quantize, for the ops that contain it.
#pragma once

#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace ztok {

// Gradients of latents [M, d] and codebooks [L, V, d], the codes int32 [M, L] held fixed.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> residual_quantize_backward(
    const torch::stable::Tensor& latents, const torch::stable::Tensor& codebooks, const torch::stable::Tensor& codes,
    const torch::stable::Tensor& grad_quantized, const torch::stable::Tensor& grad_commitment,
    const torch::stable::Tensor& grad_codebook_loss);

}  // namespace ztok
