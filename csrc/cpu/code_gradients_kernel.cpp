// Some columns of one row at a time go down the levels and back up again, in registers and L1: on the way down the
// residuals, on the way up their gradients. Nothing but the cosine needs more of a row than its own column.
#include "code_gradients_kernel.h"

#include "exact_score.h"
#include "simd.h"

namespace ztok {
namespace ZTOK_ISA {
namespace {

// Vectors of a row that are handled together.
constexpr int kVectors = 4;
static_assert(kVectors * kWidth <= 64, "walk_floats");

// `lanes` counts only where a pass has a single vector.
template <int kCount, typename T>
inline Vec load_some(const T* p, int lanes) {
  return kCount > 1 || lanes == kWidth ? load(p) : load_first(p, lanes);
}

template <int kCount, typename T>
inline void store_some(T* p, Vec value, int lanes) {
  if (kCount > 1 || lanes == kWidth) {
    store(p, value);
  } else {
    store_first(p, value, lanes);
  }
}

inline const float* code_at(const ChosenCodes& chosen, int64_t level, int32_t code) {
  return chosen.books + (level * chosen.size + code) * chosen.rows.width;
}

// The loss's gradient by kCount vectors of a row, in `gradient`, and calls of visit(level, code, vector, gradient by
// the code).
template <Metric kMetric, int kCount, typename T, typename Visit>
inline void walk(const ChosenCodes& chosen, int64_t row, int64_t column, int lanes, float* memory,
                 Vec (&gradient)[kCount], const Visit& visit) {
  const int32_t* codes = chosen.codes + row * chosen.levels;
  const T* source = static_cast<const T*>(chosen.rows.data) + row * chosen.rows.stride + column;
  Vec residual[kCount];
  for (int v = 0; v < kCount; ++v) residual[v] = load_some<kCount>(source + v * kWidth, lanes);
  for (int64_t l = 0; l < chosen.levels; ++l) {
    if (codes[l] < 0) continue;
    const float* code = code_at(chosen, l, codes[l]) + column;
    for (int v = 0; v < kCount; ++v) {
      float* kept = memory + (l * kCount + v) * kWidth;
      const Vec left = residual[v] - load_some<kCount>(code + v * kWidth, lanes);
      // l2 asks for what is left only
      store(kept, kMetric == Metric::l2 ? left : residual[v]);
      residual[v] = left;
    }
  }
  for (int v = 0; v < kCount; ++v) gradient[v] = zeros();
  for (int64_t l = chosen.levels; l-- > 0;) {
    if (codes[l] < 0) continue;
    const int64_t pair = row * chosen.levels + l;
    const Vec weight = broadcast(chosen.weights == nullptr ? 1.0f : chosen.weights[pair]);
    const float* code = code_at(chosen, l, codes[l]) + column;
    const float* terms = kMetric == Metric::cosine ? chosen.cosine_terms + pair * kCosineTerms : nullptr;
    for (int v = 0; v < kCount; ++v) {
      const Vec kept = load(memory + (l * kCount + v) * kWidth);
      // r_{l+1} = r_l - c_l: what the later residuals gather reaches this code as well
      const Vec later = zeros() - gradient[v];
      if constexpr (kMetric == Metric::l2) {
        const Vec difference = weight * kept;
        gradient[v] += difference;
        visit(l, codes[l], v, later - difference);
      } else if constexpr (kMetric == Metric::dot) {
        visit(l, codes[l], v, later - weight * kept);
        gradient[v] = gradient[v] - weight * load_some<kCount>(code + v * kWidth, lanes);
      } else if (terms[2] == 0) {
        visit(l, codes[l], v, later);
      } else {
        const Vec cosine = broadcast(terms[0]), by_row = broadcast(terms[1]), by_code = broadcast(terms[2]);
        const Vec a = by_row * kept, b = by_code * load_some<kCount>(code + v * kWidth, lanes);
        visit(l, codes[l], v, later + weight * ((cosine * b - a) * by_code));
        gradient[v] += weight * ((cosine * a - b) * by_row);
      }
    }
  }
}

template <Metric kMetric, int kCount, typename T>
inline void write_row(const ChosenCodes& chosen, int64_t row, int64_t column, int lanes, const T* straight, Vec scale,
                      T* target, float* memory) {
  Vec gradient[kCount];
  walk<kMetric, kCount, T>(chosen, row, column, lanes, memory, gradient, [](int64_t, int32_t, int, Vec) {});
  for (int v = 0; v < kCount; ++v) {
    const int64_t at = column + v * kWidth;
    const Vec passed = straight == nullptr ? zeros() : load_some<kCount>(straight + at, lanes);
    store_some<kCount>(target + at, fma(scale, gradient[v], passed), lanes);
  }
}

bool has_code(const ChosenCodes& chosen, int64_t row, int64_t first_code, int64_t last_code) {
  const int32_t* codes = chosen.codes + row * chosen.levels;
  for (int64_t l = 0; l < chosen.levels; ++l) {
    if (codes[l] >= first_code && codes[l] < last_code) return true;
  }
  return false;
}

template <Metric kMetric, typename T>
void write_rows(const ChosenCodes& chosen, int64_t begin, int64_t end, const T* straight, float scale, T* gradients,
                float* memory) {
  const int64_t width = chosen.rows.width;
  const Vec scales = broadcast(scale);
  for (int64_t row = begin; row < end; ++row) {
    const T* passed = straight != nullptr && has_code(chosen, row, 0, chosen.size) ? straight + row * width : nullptr;
    T* target = gradients + row * width;
    int64_t k = 0;
    for (; k + kVectors * kWidth <= width; k += kVectors * kWidth) {
      write_row<kMetric, kVectors>(chosen, row, k, kWidth, passed, scales, target, memory);
    }
    for (; k < width; k += kWidth) {
      const int lanes = static_cast<int>(smaller(kWidth, width - k));
      write_row<kMetric, 1>(chosen, row, k, lanes, passed, scales, target, memory);
    }
  }
}

struct CodeRange {
  int64_t first, last;
};

template <Metric kMetric, int kCount, typename T>
inline void add_row(const ChosenCodes& chosen, int64_t row, int64_t column, int lanes, CodeRange range, Vec scale,
                    float* gradients, float* memory) {
  Vec gradient[kCount];
  walk<kMetric, kCount, T>(chosen, row, column, lanes, memory, gradient, [&](int64_t l, int32_t code, int v, Vec by) {
    if (code < range.first || code >= range.last) return;
    float* sum = gradients + (l * chosen.size + code) * chosen.rows.width + column + v * kWidth;
    store_some<kCount>(sum, fma(scale, by, load_some<kCount>(sum, lanes)), lanes);
  });
}

template <Metric kMetric, typename T>
void add_rows(const ChosenCodes& chosen, int64_t begin, int64_t end, CodeRange range, float scale, float* gradients,
              float* memory) {
  const Vec scales = broadcast(scale);
  for (int64_t row = 0; row < chosen.rows.rows; ++row) {
    if (!has_code(chosen, row, range.first, range.last)) continue;
    int64_t k = begin;
    for (; k + kVectors * kWidth <= end; k += kVectors * kWidth) {
      add_row<kMetric, kVectors, T>(chosen, row, k, kWidth, range, scales, gradients, memory);
    }
    for (; k < end; k += kWidth) {
      const int lanes = static_cast<int>(smaller(kWidth, end - k));
      add_row<kMetric, 1, T>(chosen, row, k, lanes, range, scales, gradients, memory);
    }
  }
}

template <typename T>
void write_as(const ChosenCodes& chosen, int64_t begin, int64_t end, const void* straight, float scale, void* gradients,
              float* memory) {
  const auto* passed = static_cast<const T*>(straight);
  auto* target = static_cast<T*>(gradients);
  switch (chosen.metric) {
    case Metric::l2:
      return write_rows<Metric::l2>(chosen, begin, end, passed, scale, target, memory);
    case Metric::cosine:
      return write_rows<Metric::cosine>(chosen, begin, end, passed, scale, target, memory);
    case Metric::dot:
      return write_rows<Metric::dot>(chosen, begin, end, passed, scale, target, memory);
  }
}

template <typename T>
void add_as(const ChosenCodes& chosen, int64_t begin, int64_t end, CodeRange range, float scale, float* gradients,
            float* memory) {
  switch (chosen.metric) {
    case Metric::l2:
      return add_rows<Metric::l2, T>(chosen, begin, end, range, scale, gradients, memory);
    case Metric::cosine:
      return add_rows<Metric::cosine, T>(chosen, begin, end, range, scale, gradients, memory);
    case Metric::dot:
      return add_rows<Metric::dot, T>(chosen, begin, end, range, scale, gradients, memory);
  }
}

// What 1 / length is, 0 where float32 does not hold it: as good as no length.
inline float reciprocal(double length) { return length > 1.0 / 3e38 ? static_cast<float>(1.0 / length) : 0.0f; }

template <typename T>
void find_terms(const ChosenCodes& chosen, int64_t begin, int64_t end, float* residual, float* terms) {
  const int64_t width = chosen.rows.width;
  for (int64_t row = begin; row < end; ++row) {
    const T* source = static_cast<const T*>(chosen.rows.data) + row * chosen.rows.stride;
    for (int64_t k = 0; k < width; k += kWidth) {
      const int lanes = static_cast<int>(smaller(kWidth, width - k));
      store_some<1>(residual + k, load_some<1>(source + k, lanes), lanes);
    }
    for (int64_t l = 0; l < chosen.levels; ++l) {
      const int64_t pair = row * chosen.levels + l;
      if (chosen.codes[pair] < 0) continue;
      const float* code = code_at(chosen, l, chosen.codes[pair]);
      const double row_length = __builtin_sqrt(squared_norm(residual, width));
      const double code_length = __builtin_sqrt(squared_norm(code, width));
      float* term = terms + pair * kCosineTerms;
      term[0] =
          static_cast<float>(-exact_score(residual, code, width, Metric::dot, 0).value / (row_length * code_length));
      term[1] = reciprocal(row_length);
      // of a residual with NaN too: no gradient, as in the reference
      const bool directed = row_length > 0 && (term[1] > 0 || __builtin_isinf(row_length));
      term[2] = directed ? reciprocal(code_length) : 0;
      for (int64_t k = 0; k < width; k += kWidth) {
        const int lanes = static_cast<int>(smaller(kWidth, width - k));
        store_some<1>(residual + k, load_some<1>(residual + k, lanes) - load_some<1>(code + k, lanes), lanes);
      }
    }
  }
}

}  // namespace

void find_cosine_terms(const ChosenCodes& chosen, int64_t begin, int64_t end, float* residual, float* terms) {
  switch (chosen.rows.element) {
    case Element::float16:
      return find_terms<Half>(chosen, begin, end, residual, terms);
    case Element::bfloat16:
      return find_terms<BFloat16>(chosen, begin, end, residual, terms);
    default:
      return find_terms<float>(chosen, begin, end, residual, terms);
  }
}

void gradients_of_rows(const ChosenCodes& chosen, int64_t begin, int64_t end, const void* straight, float scale,
                       void* gradients, float* memory) {
  switch (chosen.rows.element) {
    case Element::float16:
      return write_as<Half>(chosen, begin, end, straight, scale, gradients, memory);
    case Element::bfloat16:
      return write_as<BFloat16>(chosen, begin, end, straight, scale, gradients, memory);
    default:
      return write_as<float>(chosen, begin, end, straight, scale, gradients, memory);
  }
}

void add_gradients_of_codes(const ChosenCodes& chosen, int64_t begin, int64_t end, int64_t first_code,
                            int64_t last_code, float scale, float* gradients, float* memory) {
  const CodeRange range{first_code, last_code};
  switch (chosen.rows.element) {
    case Element::float16:
      return add_as<Half>(chosen, begin, end, range, scale, gradients, memory);
    case Element::bfloat16:
      return add_as<BFloat16>(chosen, begin, end, range, scale, gradients, memory);
    default:
      return add_as<float>(chosen, begin, end, range, scale, gradients, memory);
  }
}

}  // namespace ZTOK_ISA
}  // namespace ztok
