#include <algorithm>

#include "lora.h"

namespace ztok {
namespace {

constexpr int64_t kRowsPerPart = 1200;

thread_local Scratch panel_scratch;  // of a task
thread_local Scratch row_scratch;    // of the calling thread

template <typename Offset>
void spread(const int32_t* adapters, const Tensor& cu_seqlens, int64_t rows, std::vector<int32_t>& result) {
  const auto* offsets = static_cast<const Offset*>(cu_seqlens.const_data_ptr());
  const int64_t batch = cu_seqlens.size(0) - 1;
  ZTOK_CHECK(offsets[0] == 0 && offsets[batch] == rows, kLoraOp, "cu_seqlens: expected offsets from 0 to ", rows);
  for (int64_t b = 0; b < batch; ++b) {
    ZTOK_CHECK(offsets[b] <= offsets[b + 1] && offsets[b + 1] <= rows, kLoraOp,
               "cu_seqlens: expected non-decreasing offsets");
    std::fill(result.begin() + offsets[b], result.begin() + offsets[b + 1], adapters[b]);
  }
}

std::vector<int32_t> row_adapters(int64_t rows, int64_t num_adapters, const OptionalTensor& adapters,
                                  const OptionalTensor& cu_seqlens) {
  std::vector<int32_t> result(rows, 0);
  if (!adapters.has_value()) {
    ZTOK_CHECK(num_adapters == 1 && !cu_seqlens.has_value(), kLoraOp,
               "adapters: expected one for each row or sequence");
    return result;
  }
  ZTOK_CHECK(adapters->scalar_type() == ScalarType::Int, kLoraOp, "adapters: expected int32");
  const Tensor chosen = packed(*adapters);
  const auto* values = static_cast<const int32_t*>(chosen.const_data_ptr());
  if (!cu_seqlens.has_value()) {
    check_lora_shape("adapters", chosen, {rows});
    std::copy(values, values + rows, result.begin());
  } else {
    ZTOK_CHECK(cu_seqlens->is_cpu() && cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, kLoraOp,
               "cu_seqlens: expected [B + 1] on the CPU");
    check_lora_shape("adapters", chosen, {cu_seqlens->size(0) - 1});
    const Tensor offsets = packed(*cu_seqlens);
    const bool wide = offsets.scalar_type() == ScalarType::Long;
    ZTOK_CHECK(wide || offsets.scalar_type() == ScalarType::Int, kLoraOp, "cu_seqlens: expected int32 or int64");
    wide ? spread<int64_t>(values, offsets, rows, result) : spread<int32_t>(values, offsets, rows, result);
  }
  for (int32_t adapter : result) {
    ZTOK_CHECK(adapter >= -1 && adapter < num_adapters, kLoraOp, "adapters: expected values in [-1, ", num_adapters,
               "), got ", adapter);
  }
  return result;
}

}  // namespace

void check_lora_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  ZTOK_CHECK(tensor.is_cpu(), kLoraOp, name, ": expected a CPU tensor");
  ZTOK_CHECK(tensor.dim() == static_cast<int64_t>(shape.size()), kLoraOp, name, ": expected ", shape.size(),
             " dimensions, got ", tensor.dim());
  int64_t d = 0;
  for (int64_t size : shape) {
    ZTOK_CHECK(tensor.size(d) == size, kLoraOp, name, ": expected size ", size, " in dimension ", d, ", got ",
               tensor.size(d));
    ++d;
  }
}

LoraLayer lora_layer(const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& scaling,
                     const OptionalTensor& adapters, const OptionalTensor& cu_seqlens) {
  ZTOK_CHECK(x.dim() == 2 && weight.dim() == 2 && A.dim() == 3, kLoraOp,
             "expected x [M, in], weight [out, in], A [n, r, in]");
  const int64_t rows = x.size(0), in = x.size(1), out = weight.size(0), n = A.size(0), rank = A.size(1);
  ZTOK_CHECK(A.numel() > 0, kLoraOp, "A: expected at least one adapter, rank and input");
  ZTOK_CHECK(rows < INT32_MAX, kLoraOp, "x: expected fewer than 2^31 rows, got ", rows);
  ZTOK_CHECK(x.is_cpu(), kLoraOp, "x: expected a CPU tensor");
  check_lora_shape("weight", weight, {out, in});
  check_lora_shape("A", A, {n, rank, in});
  check_lora_shape("B", B, {n, out, rank});
  check_lora_shape("scaling", scaling, {n});
  ZTOK_CHECK(scaling.scalar_type() == ScalarType::Float, kLoraOp, "scaling: expected float32");
  const Element element = element_of(kLoraOp, "x", x), adapter_element = element_of(kLoraOp, "A", A);
  ZTOK_CHECK(weight.scalar_type() == x.scalar_type(), kLoraOp, "weight: expected the dtype of x");
  ZTOK_CHECK(A.scalar_type() == x.scalar_type() || A.scalar_type() == ScalarType::Float, kLoraOp,
             "A: expected float32 or the dtype of x");
  ZTOK_CHECK(B.scalar_type() == A.scalar_type(), kLoraOp, "B: expected the dtype of A");
  return {rows,
          in,
          out,
          n,
          rank,
          packed(x),
          packed(A),
          packed(B),
          packed(scaling),
          LoraWeight(weight),
          element,
          adapter_element,
          row_adapters(rows, n, adapters, cu_seqlens)};
}

void add_lora_strips(int32_t begin, int32_t end, int32_t adapter, std::vector<LoraStrip>& strips) {
  for (int32_t position = begin; position < end; position += kLoraRows) {
    strips.push_back({position, std::min<int32_t>(kLoraRows, end - position), adapter});
  }
}

LoraGroups lora_groups(const std::vector<int32_t>& adapters, int64_t num_adapters) {
  LoraGroups groups{std::vector<int32_t>(adapters.size()), std::vector<int32_t>(num_adapters + 2, 0), {}};
  for (int32_t adapter : adapters) ++groups.begin[adapter + 2];
  for (int64_t a = 1; a < num_adapters + 2; ++a) groups.begin[a] += groups.begin[a - 1];
  std::vector<int32_t> next(groups.begin);
  for (size_t row = 0; row < adapters.size(); ++row) groups.rows[next[adapters[row] + 1]++] = static_cast<int32_t>(row);
  for (int64_t a = 0; a < num_adapters + 1; ++a) {
    add_lora_strips(groups.begin[a], groups.begin[a + 1], static_cast<int32_t>(a - 1), groups.strips);
  }
  return groups;
}

float* lora_row_scratch(int64_t floats) { return row_scratch.get(floats); }

void lora_multiply(const LoraProduct& product, const LoraStrip* strips, int64_t num_strips, int64_t columns) {
  if (num_strips == 0 || columns == 0) return;
  const int64_t units = (columns + kLoraUnit - 1) / kLoraUnit, threads = torch::stable::get_num_threads();
  // Columns first, so that no panel of b is packed twice; where there are few of them, strips too. The strips of a part
  // are few enough for their sums between two depth blocks to stay in the cache.
  const int64_t wanted = units >= 2 * threads ? 1 : (2 * threads + units - 1) / units;
  const int64_t parts = std::max(std::min(wanted, (num_strips + 7) / 8), num_strips * kLoraRows / kRowsPerPart + 1);
  const int64_t strips_per_part = (num_strips + parts - 1) / parts;
  const int64_t depth = std::min(product.depth, kLoraDepth) + (product.low ? product.rank : 0);
  const double products = static_cast<double>(num_strips) * kLoraRows * columns * (product.depth + product.rank);
  constexpr int64_t kUnits = kLoraColumns / kLoraUnit;
  share(units * parts, kUnits, products / kProductsPerNanosecond, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin, next; task < end; task = next) {
      const int64_t part = task / units, unit = task % units, first = part * strips_per_part;
      next = std::min({end, task + kUnits, (part + 1) * units});
      const int64_t count = std::min(strips_per_part, num_strips - first);
      if (count <= 0) continue;
      const int64_t stop = std::min(columns, (unit + next - task) * kLoraUnit);
      float* scratch = panel_scratch.get(kLoraColumns * (depth + count * kLoraRows));
      ZTOK_SELECT(lora_block)(product, strips + first, count, unit * kLoraUnit, stop, scratch);
    }
  });
}

void lora_widen_rows(const char* from, Element element, int64_t row_elements, const int32_t* rows, int64_t count,
                     float* to) {
  const int64_t bytes = row_elements * bytes_of(element);
  share(count, 16, 6.0 * count * row_elements / kBytesPerNanosecond, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      ZTOK_SELECT(lora_widen)(from + rows[i] * bytes, element, to + i * row_elements, row_elements);
    }
  });
}

void lora_shrink(const LoraLayer& layer, LoraProduct product, const LoraOperand& b, bool by_columns,
                 int64_t b_adapter_stride, float* low, const LoraStrip* strips, int64_t num_strips) {
  product.b = b;
  product.b_by_columns = by_columns;
  product.b_adapter_stride = b_adapter_stride;
  product.scaling = layer.scales();
  product.low = nullptr;
  product.bias = nullptr;
  product.y = low;
  product.y_element = Element::float32;
  product.y_stride = layer.rank;
  lora_multiply(product, strips, num_strips, layer.rank);
}

void lora_add_low(const LoraLayer& layer, const LoraGroups& groups, const float* low, const LoraOperand& b,
                  bool by_columns, int64_t b_adapter_stride, Tensor& y) {
  LoraProduct product{};
  product.a = low;
  product.a_stride = product.depth = layer.rank;
  product.a_rows = product.rows = groups.rows.data();
  product.b = b;
  product.b_by_columns = by_columns;
  product.b_adapter_stride = b_adapter_stride;
  product.y = y.mutable_data_ptr();
  product.y_element = layer.element;
  product.y_stride = y.size(1);
  product.add = true;
  lora_multiply(product, groups.strips.data(), static_cast<int64_t>(groups.strips.size()), y.size(1));
}

}  // namespace ztok
