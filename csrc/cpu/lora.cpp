// lora_linear on the CPU, forward and backward: y = x Wᵀ + bias + s (x Aᵀ) Bᵀ, every row under its own adapter.
//
// Products go through the two kernels of lora_kernel.cpp, except x Wᵀ where the processor multiplies bfloat16 natively
// (lora_dense.cpp). With the kernels' own x Wᵀ the low-rank product has no pass over y of its own: x Aᵀ, which is thin,
// is made first, and its product with B extends the sum over the input features of the base product while that is in
// registers. Rows are grouped by adapter into strips, so a strip needs one B and sees no other.
#include <algorithm>

#include <torch/csrc/stable/library.h>

#include "lora.h"

namespace ztok {
namespace {

constexpr int64_t kFewRows = 4;     // up to this many rows the weight is read in place, above it is packed
constexpr int64_t kLowStride = 16;  // rows of x Aᵀ are padded to a multiple of it for lora_few_rows

double few_nanoseconds(int64_t rows, int64_t out, int64_t in, Element element) {
  const double products = static_cast<double>(out) * in, bytes = products * bytes_of(element);
  return std::max(rows * products / kProductsPerNanosecond, bytes / kBytesPerNanosecond);
}

void few_rows(const LoraLayer& layer, const void* bias, Tensor& y) {
  const int64_t low_stride = round_up(layer.rank, kLowStride);
  float* low = lora_row_scratch(layer.rows * (low_stride + layer.in));
  const float* x = floats(layer.x);
  if (layer.element != Element::float32) {
    float* wide = low + layer.rows * low_stride;
    ZTOK_SELECT(lora_widen)(layer.x.const_data_ptr(), layer.element, wide, layer.rows * layer.in);
    x = wide;
  }
  LoraProduct product{};
  product.a = x;
  product.a_stride = product.depth = layer.in;
  product.b = layer.matrix_A();
  product.scaling = layer.scales();
  product.y_element = Element::float32;
  product.y_stride = low_stride;
  bool any = false;
  for (int64_t first = 0, last; first < layer.rows; first = last) {
    const int32_t adapter = layer.adapters[first];
    for (last = first + 1; last < layer.rows && layer.adapters[last] == adapter;) ++last;
    if (adapter < 0) continue;
    any = true;
    LoraProduct run = product;
    run.a += first * layer.in;
    run.b.data =
        static_cast<const char*>(product.b.data) + adapter * layer.rank * layer.in * bytes_of(layer.adapter_element);
    run.y = low + first * low_stride;
    share(layer.rank, 4, few_nanoseconds(last - first, layer.rank, layer.in, layer.adapter_element),
          [&](int64_t begin, int64_t end) {
            ZTOK_SELECT(lora_few_rows)(run, layer.adapters.data() + first, last - first, 0, begin, end);
          });
    for (int64_t row = first; row < last; ++row) {
      std::fill(low + row * low_stride + layer.rank, low + (row + 1) * low_stride, 0.0f);
    }
  }
  product.b = layer.weight.matrix(layer.element);
  product.scaling = nullptr;
  product.expand = layer.matrix_B();
  product.expand_adapter_stride = layer.out * layer.rank;
  product.low = any ? low : nullptr;
  product.rank = layer.rank;
  product.bias = bias;
  product.y = y.mutable_data_ptr();
  product.y_element = layer.element;
  product.y_stride = layer.out;
  constexpr int64_t kColumns = 12;  // a multiple of what lora_few_rows takes at once
  const int64_t blocks = (layer.out + kColumns - 1) / kColumns;
  share(blocks, 8, few_nanoseconds(layer.rows, layer.out, layer.in, layer.element), [&](int64_t begin, int64_t end) {
    ZTOK_SELECT(lora_few_rows)(product, layer.adapters.data(), layer.rows, low_stride, begin * kColumns,
                               std::min(layer.out, end * kColumns));
  });
}

Tensor lora_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& A, const Tensor& B,
                   const Tensor& scaling, const OptionalTensor& adapters, const OptionalTensor& cu_seqlens) {
  const LoraLayer lora = lora_layer(x, weight, A, B, scaling, adapters, cu_seqlens);
  Tensor offset = x;
  const void* bias_data = nullptr;
  if (bias.has_value()) {
    check_lora_shape("bias", *bias, {lora.out});
    ZTOK_CHECK(bias->scalar_type() == x.scalar_type(), kLoraOp, "bias: expected the dtype of x");
    offset = packed(*bias);
    bias_data = offset.const_data_ptr();
  }
  Tensor y = new_tensor(x, {lora.rows, lora.out});
  if (lora.rows == 0 || lora.out == 0) return y;
  if (lora.rows <= kFewRows && !lora.weight.transposed) {
    few_rows(lora, bias_data, y);
    return y;
  }
  const LoraGroups groups = lora_groups(lora.adapters, lora.num_adapters);
  const Tensor low = new_floats(x, {lora.rows, lora.rank});
  const bool dense = lora_dense_is_torchs(lora.element, lora.rows, lora.in, lora.out);
  if (dense) lora_dense_linear(lora.x, lora.weight.tensor, bias, y);
  LoraProduct product{};
  product.depth = lora.in;
  with_float_rows(lora.x, lora.element, groups, product, [&](LoraProduct p, const LoraStrip* strips, int64_t count) {
    lora_shrink(lora, p, lora.matrix_A(), true, lora.rank * lora.in, mutable_floats(low), strips, count);
    if (dense) return;
    p.b = lora.weight.matrix(lora.element);
    p.b_by_columns = !lora.weight.transposed;
    p.expand = lora.matrix_B();
    p.expand_by_columns = true;
    p.expand_adapter_stride = lora.out * lora.rank;
    p.low = floats(low);
    p.rank = lora.rank;
    p.bias = bias_data;
    p.y = y.mutable_data_ptr();
    p.y_element = lora.element;
    p.y_stride = lora.out;
    lora_multiply(p, strips, count, lora.out);
  });
  if (dense) lora_add_low(lora, groups, floats(low), lora.matrix_B(), true, lora.out * lora.rank, y);
  return y;
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&ztok::lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&ztok::lora_linear_backward));
}
