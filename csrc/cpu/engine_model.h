// A model as the engine reads it: one blob of prepared weights and a table of offsets (ztok_fast/engine/weights.py).
#pragma once

#include <cstdint>
#include <cstring>

#include "check.h"
#include "int8_products.h"
#include "tensors.h"

namespace ztok {

struct EngineLinear {
  const uint8_t* panels;
  const float* scales;  // null: float32 panels
  const float* bias;    // or null
  int64_t depth, columns;

  int64_t num_panels() const { return (columns + kPanelColumns - 1) / kPanelColumns; }
};

struct EngineLayer {
  const float *norm1, *norm2, *query_norm, *key_norm;  // the last two may be null
  EngineLinear qkv, out, gate_up, down;
};

class EngineModel {
 public:
  static constexpr int64_t kVersion = 1, kHeader = 32, kRecord = 16;

  EngineModel(const char* op, const Tensor& weights, const Tensor& layout) : op_(op) {
    ZTOK_CHECK(weights.scalar_type() == ScalarType::Byte && weights.dim() == 1 && weights.is_contiguous(), op,
               "weights: expected a contiguous uint8 vector");
    ZTOK_CHECK(layout.scalar_type() == ScalarType::Long && layout.dim() == 1 && layout.is_contiguous() &&
                   layout.size(0) >= kHeader,
               op, "layout: expected a contiguous int64 vector of at least ", kHeader, " elements");
    base_ = static_cast<const uint8_t*>(weights.const_data_ptr());
    bytes = weights.size(0);
    table_ = layout.const_data_ptr<int64_t>();
    ZTOK_CHECK(table_[0] == kVersion, op, "layout: expected version ", kVersion, ", got ", table_[0]);
    layers = table_[1], hidden = table_[2], heads = table_[3], kv_heads = table_[4], head = table_[5];
    inner = table_[6], vocabulary = table_[7], adapters = table_[8];
    is_int8 = table_[9] == 0;
    std::memcpy(&eps, table_ + 11, sizeof(float));  // little endian: the low half
    std::memcpy(&attention_scale, table_ + 16, sizeof(float));
    ZTOK_CHECK(layers > 0 && hidden > 0 && kv_heads > 0 && heads > 0 && heads % kv_heads == 0 && head > 0 &&
                   inner > 0 && vocabulary > 0 && adapters > 0 && hidden % 16 == 0 && head % 16 == 0 && inner % 16 == 0,
               op, "layout: expected positive sizes, widths that are multiples of 16");
    ZTOK_CHECK(layout.size(0) == kHeader + adapters * layers * kRecord, op, "layout: expected ",
               kHeader + adapters * layers * kRecord, " elements, got ", layout.size(0));
    frequencies = at<float>(table_[12], head / 2);
    final_norm = at<float>(table_[13], hidden);
    head_linear = linear(table_[14], table_[15], -1, hidden, vocabulary);
  }

  EngineLayer layer(int64_t adapter, int64_t index) const {
    const int64_t* r = table_ + kHeader + (adapter * layers + index) * kRecord;
    return {at<float>(r[0], hidden),
            at<float>(r[1], hidden),
            at<float>(r[2], head),
            at<float>(r[3], head),
            linear(r[4], r[5], r[6], hidden, (heads + 2 * kv_heads) * head),
            linear(r[7], r[8], r[9], heads * head, hidden),
            linear(r[10], r[11], r[12], hidden, 2 * inner),
            linear(r[13], r[14], r[15], inner, hidden)};
  }

  int64_t layers, hidden, heads, kv_heads, head, inner, vocabulary, adapters, bytes;
  bool is_int8;
  float eps, attention_scale;
  const float *frequencies, *final_norm;
  EngineLinear head_linear;

 private:
  template <typename T>
  const T* at(int64_t offset, int64_t count) const {
    if (offset < 0) return nullptr;
    ZTOK_CHECK(offset % alignof(T) == 0 && offset <= bytes && count * static_cast<int64_t>(sizeof(T)) <= bytes - offset,
               op_, "layout: expected offsets within ", bytes, " bytes of weights, got ", offset);
    return reinterpret_cast<const T*>(base_ + offset);
  }

  EngineLinear linear(int64_t panels, int64_t scales, int64_t bias, int64_t depth, int64_t columns) const {
    const int64_t padded = (columns + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
    const int64_t steps = (depth + kDepthStep - 1) / kDepthStep * kDepthStep;
    ZTOK_CHECK(panels >= 0 && (scales >= 0) == is_int8, op_, "layout: expected panels, with scales for int8 alone");
    const auto* data = is_int8 ? at<uint8_t>(panels, padded * steps)
                               : reinterpret_cast<const uint8_t*>(at<float>(panels, padded * depth));
    return {data, at<float>(scales, padded), at<float>(bias, padded), depth, columns};
  }

  const char* op_;
  const uint8_t* base_;
  const int64_t* table_;
};

}  // namespace ztok
