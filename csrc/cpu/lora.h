// What the forward and backward passes of lora_linear share on the CPU: arguments, rows grouped by adapter, products.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "lora_kernel.h"
#include "share.h"
#include "tensors.h"

namespace ztok {

using OptionalTensor = std::optional<Tensor>;

constexpr const char* kLoraOp = "lora_linear";
constexpr int64_t kRowsPerChunk =
    1020;  // a multiple of kLoraRows; half-precision rows are made float32 this many at a time

inline int64_t bytes_of(Element element) { return element == Element::float32 ? 4 : 2; }
inline const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }
inline float* mutable_floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }
inline Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline Tensor new_floats(const Tensor& like, std::vector<int64_t> shape) {
  return new_tensor(like, shape, ScalarType::Float);
}

// The weight is read in place both as it is and as the transpose of a contiguous tensor (GPT-2's layers).
struct LoraWeight {
  Tensor tensor;
  bool transposed;

  explicit LoraWeight(const Tensor& weight)
      : tensor(weight),
        transposed(!weight.is_contiguous() && weight.stride(0) == 1 && weight.stride(1) >= weight.size(0)) {
    if (!transposed) tensor = packed(weight);
  }
  LoraOperand matrix(Element element) const {
    return {tensor.const_data_ptr(), element, tensor.stride(transposed ? 1 : 0)};
  }
};

struct LoraLayer {
  int64_t rows, in, out, num_adapters, rank;
  Tensor x, A, B, scaling;
  LoraWeight weight;
  Element element, adapter_element;
  std::vector<int32_t> adapters;  // of each row

  const float* scales() const { return static_cast<const float*>(scaling.const_data_ptr()); }
  LoraOperand matrix_A() const { return {A.const_data_ptr(), adapter_element, in}; }
  LoraOperand matrix_B() const { return {B.const_data_ptr(), adapter_element, rank}; }
};

void check_lora_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape);

// Checks what the kernels rely on, values of adapters and cu_seqlens included.
LoraLayer lora_layer(const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& scaling,
                     const OptionalTensor& adapters, const OptionalTensor& cu_seqlens);

struct LoraGroups {
  std::vector<int32_t> rows;   // sorted by adapter
  std::vector<int32_t> begin;  // adapter a has the positions from begin[a + 1] to begin[a + 2]
  std::vector<LoraStrip> strips;
};

LoraGroups lora_groups(const std::vector<int32_t>& adapters, int64_t num_adapters);
void add_lora_strips(int32_t begin, int32_t end, int32_t adapter, std::vector<LoraStrip>& strips);

// All columns of a product for some strips.
void lora_multiply(const LoraProduct& product, const LoraStrip* strips, int64_t num_strips, int64_t columns);

// Rows `rows[0 .. count)` as float32, one after another.
void lora_widen_rows(const char* from, Element element, int64_t row_elements, const int32_t* rows, int64_t count,
                     float* to);

// Memory of the calling thread that its tasks read.
float* lora_row_scratch(int64_t floats);

// Runs `body(product, strips, count)` with product.a and .a_rows set to rows of `a` as float32: in place, or chunk by
// chunk where they have to be made.
template <typename Body>
void with_float_rows(const Tensor& a, Element element, const LoraGroups& groups, LoraProduct product,
                     const Body& body) {
  const auto num_strips = static_cast<int64_t>(groups.strips.size());
  product.rows = groups.rows.data();
  product.a_stride = a.size(1);
  if (element == Element::float32) {
    product.a = static_cast<const float*>(a.const_data_ptr());
    product.a_rows = groups.rows.data();
    body(product, groups.strips.data(), num_strips);
    return;
  }
  std::vector<int32_t> a_rows(groups.rows.size());
  for (int64_t s = 0; s < num_strips;) {
    const int64_t first = groups.strips[s].begin;
    int64_t stop = s, last = first;
    while (stop < num_strips && last - first < kRowsPerChunk) last += groups.strips[stop++].count;
    float* wide = lora_row_scratch((last - first) * a.size(1));
    lora_widen_rows(static_cast<const char*>(a.const_data_ptr()), element, a.size(1), groups.rows.data() + first,
                    last - first, wide);
    for (int64_t p = first; p < last; ++p) a_rows[p] = static_cast<int32_t>(p - first);
    product.a = wide;
    product.a_rows = a_rows.data();
    body(product, groups.strips.data() + s, stop - s);
    s = stop;
  }
}

// low [rows, rank] = s (a b), b by adapter: A for a = x, B for a = gradient. Rows of adapter -1 are not written.
void lora_shrink(const LoraLayer& lora, LoraProduct product, const LoraOperand& b, bool by_columns,
                 int64_t b_adapter_stride, float* low, const LoraStrip* strips, int64_t num_strips);

// y [rows, columns of b] += low b, b by adapter, for a base product that torch made.
void lora_add_low(const LoraLayer& layer, const LoraGroups& groups, const float* low, const LoraOperand& b,
                  bool by_columns, int64_t b_adapter_stride, Tensor& y);

// Whether torch makes the product a b of `rows` x depth x columns faster (lora_dense.cpp).
bool lora_dense_is_torchs(Element element, int64_t rows, int64_t depth, int64_t columns);

// y = x weightᵀ + bias by torch, rounded to the dtype of y.
void lora_dense_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, Tensor& y);

// Of x, weight, bias, A and B; an empty tensor [0] for each that `needs`, in this order, does not ask for.
using LoraGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

LoraGradients lora_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& A,
                                   const Tensor& B, const Tensor& scaling, const OptionalTensor& adapters,
                                   const OptionalTensor& cu_seqlens, const std::vector<bool>& needs);

}  // namespace ztok
