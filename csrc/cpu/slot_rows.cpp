// Input rows of Z-tokens of slots on the CPU. See docs/determinism.md, "Z-tokens of slots".
#include <algorithm>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "share.h"
#include "slot_rows_kernel.h"
#include "standard_arithmetic.h"
#include "tensors.h"

namespace ztok {
namespace {

constexpr const char* kOp = "engine_slot_rows";

void check(const char* name, const Tensor& tensor, ScalarType type, std::vector<int64_t> sizes) {
  bool fits =
      tensor.scalar_type() == type && tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.is_contiguous();
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = tensor.size(static_cast<int64_t>(i)) == sizes[i];
  std::string expected;
  for (const int64_t size : sizes) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  ZTOK_CHECK(fits, kOp, name, ": expected a contiguous ", torch::headeronly::toString(type), " tensor [", expected,
             "]");
}

Tensor engine_slot_rows(const Tensor& words, const Tensor& index, const Tensor& codes, const Tensor& offsets,
                        const Tensor& gates, const Tensor& places, const Tensor& empty) {
  ZTOK_CHECK(words.dim() == 2 && codes.dim() == 2 && places.dim() == 2 && places.size(0) > 0, kOp,
             "words, codes, places: expected [n, D], [K, L] and [P, D], P at least 1");
  const int64_t known = words.size(0), width = words.size(1), count = codes.size(0), slots = codes.size(1);
  const int64_t distances = places.size(0);
  const ScalarType real = ScalarType::Float;
  check("words", words, real, {known, width});
  check("index", index, ScalarType::Long, {count, slots});
  check("codes", codes, ScalarType::Int, {count, slots});
  check("slot_offsets", offsets, ScalarType::Int, {count, slots});
  check("gates", gates, real, {slots, width});
  check("places", places, real, {distances, width});
  check("empty", empty, real, {width});
  Tensor result = new_tensor(words, {count, width});
  const auto *word = words.const_data_ptr<float>(), *gate = gates.const_data_ptr<float>(),
             *place = places.const_data_ptr<float>(), *no_slot = empty.const_data_ptr<float>();
  const auto* at = index.const_data_ptr<int64_t>();
  const auto *code = codes.const_data_ptr<int32_t>(), *offset = offsets.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < count * slots; ++i) {
    ZTOK_CHECK(code[i] < 0 || (at[i] >= 0 && at[i] < known), kOp, "index: expected 0 to ", known - 1, ", got ", at[i]);
  }
  auto* out = result.mutable_data_ptr<float>();
  share(count, 16, 12.0 * count * slots * width / kBytesPerNanosecond, [&](int64_t begin, int64_t end) {
    StandardArithmetic standard;
    for (int64_t row = begin; row < end; ++row) {
      if (slots == 0 || code[row * slots] < 0) {
        std::copy_n(no_slot, width, out + row * width);
        continue;
      }
      std::fill_n(out + row * width, width, 0.0f);
      for (int64_t slot = 0; slot < slots; ++slot) {
        const int64_t i = row * slots + slot;
        if (code[i] < 0) continue;
        const int64_t distance = std::clamp<int64_t>(offset[i], 0, distances - 1);
        ZTOK_SELECT(add_slot)
        (word + at[i] * width, gate + slot * width, place + distance * width, width, out + row * width);
      }
    }
  });
  return result;
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_FRAGMENT(ztok, m) {
  m.def(
      "engine_slot_rows(Tensor words, Tensor index, Tensor codes, Tensor slot_offsets, Tensor gates, Tensor places, "
      "Tensor empty) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) { m.impl("engine_slot_rows", TORCH_BOX(&ztok::engine_slot_rows)); }
