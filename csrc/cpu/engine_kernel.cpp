#include "engine_kernel.h"

#include "lanes.h"

namespace ztok {
namespace ZTOK_ISA {
namespace {

// Lanes of a block of products, scaled and with bias.
struct Scaler {
  const Products& products;

  ZTOK_LANES Lanes at(int64_t row, int64_t column) const {
    const int64_t place = row * products.stride + column;
    Lanes y;
    if (products.weight_scales == nullptr) {
      y = load16(static_cast<const float*>(products.sums) + place);
    } else {
      y = from_ints16(static_cast<const int32_t*>(products.sums) + place) * load16(products.weight_scales + column) *
          splat(products.row_scales[row]);
    }
    return products.bias == nullptr ? y : y + load16(products.bias + column);
  }
};

constexpr double kSine[6] = {-1.66666666666666324348e-01, 8.33333333332248946124e-03,  -1.98412698298579493134e-04,
                             2.75573137070700676789e-06,  -2.50507602534068634195e-08, 1.58969099521155010221e-10};
constexpr double kCosine[6] = {4.16666666666666019037e-02,  -1.38888888888741095749e-03, 2.48015872894767294178e-05,
                               -2.75573143513906633035e-07, 2.08757232129817482790e-09,  -1.13596475577881948265e-11};

void sine_and_cosine(double x, float* sine, float* cosine) {
  const double k = __builtin_rint(x * 0.63661977236758134308);
  const double r =
      ((x - k * 1.57079632673412561417e+00) - k * 6.07710050630396597660e-11) - k * 2.02226624879595063154e-21;
  const double z = r * r;
  const double of_sine = kSine[0] + z * (kSine[1] + z * (kSine[2] + z * (kSine[3] + z * (kSine[4] + z * kSine[5]))));
  const double of_cosine =
      kCosine[0] + z * (kCosine[1] + z * (kCosine[2] + z * (kCosine[3] + z * (kCosine[4] + z * kCosine[5]))));
  const double s = r + (r * z) * of_sine, c = (1 - z * 0.5) + (z * z) * of_cosine;
  switch (static_cast<int64_t>(k) & 3) {
    case 0:
      *sine = static_cast<float>(s);
      *cosine = static_cast<float>(c);
      return;
    case 1:
      *sine = static_cast<float>(c);
      *cosine = static_cast<float>(-s);
      return;
    case 2:
      *sine = static_cast<float>(-s);
      *cosine = static_cast<float>(-c);
      return;
    default:
      *sine = static_cast<float>(-c);
      *cosine = static_cast<float>(s);
  }
}

}  // namespace

void engine_norm(const float* x, const float* weight, int64_t width, float eps, float* out) {
  Lanes sums = splat(0.0f);
  for (int64_t i = 0; i < width; i += kLaneCount) sums = fma(load16(x + i), load16(x + i), sums);
  const float scale = 1.0f / __builtin_sqrtf(tree_sum(sums) / static_cast<float>(width) + eps);
  for (int64_t i = 0; i < width; i += kLaneCount) {
    store16(out + i, (load16(x + i) * splat(scale)) * load16(weight + i));
  }
}

void engine_store(const Products& products, float* out, int64_t out_stride) {
  const Scaler scaler{products};
  for (int64_t r = 0; r < products.rows; ++r) {
    for (int64_t c = 0; c < products.columns; c += kLaneCount) {
      const Lanes y = scaler.at(r, c);
      if (c + kLaneCount <= products.columns) {
        store16(out + r * out_stride + c, y);
      } else {  // the end of the vocabulary
        float lanes[kLaneCount];
        store16(lanes, y);
        for (int64_t i = c; i < products.columns; ++i) out[r * out_stride + i] = lanes[i - c];
      }
    }
  }
}

void engine_add(const Products& products, float* out, int64_t out_stride) {
  const Scaler scaler{products};
  for (int64_t r = 0; r < products.rows; ++r) {
    for (int64_t c = 0; c < products.columns; c += kLaneCount) {
      float* place = out + r * out_stride + c;
      store16(place, load16(place) + scaler.at(r, c));
    }
  }
}

void engine_gate(const Products& products, float* out, int64_t out_stride) {
  const Scaler scaler{products};
  for (int64_t r = 0; r < products.rows; ++r) {
    for (int64_t c = 0; c < products.columns; c += 2 * kLaneCount) {
      store16(out + r * out_stride + c / 2, silu16(scaler.at(r, c)) * scaler.at(r, c + kLaneCount));
    }
  }
}

void engine_best(const Products& products, int64_t first, float* best, int64_t* index) {
  const Scaler scaler{products};
  for (int64_t r = 0; r < products.rows; ++r) {
    float greatest = best[r];
    int64_t at = index[r];
    for (int64_t c = 0; c < products.columns; c += kLaneCount) {
      float lanes[kLaneCount];
      const Lanes y = scaler.at(r, c);
      const int64_t valid = products.columns - c < kLaneCount ? products.columns - c : kLaneCount;
      store16(lanes, y);
      // Most blocks have nothing greater, which the vectorised loop finds. Comparisons with NaN are false.
      bool lower = true;
      for (int64_t i = 0; i < kLaneCount; ++i) lower &= (i >= valid) | (lanes[i] <= greatest);
      if (lower || greatest != greatest) continue;
      for (int64_t i = 0; i < valid && greatest == greatest; ++i) {
        if (!(lanes[i] <= greatest)) {
          greatest = lanes[i];
          at = first + c + i;
        }
      }
    }
    best[r] = greatest;
    index[r] = at;
  }
}

void engine_angles(float position, const float* frequencies, int64_t half, float* cosines, float* sines) {
  for (int64_t i = 0; i < half; ++i) {
    const float angle = position * frequencies[i];
    sine_and_cosine(static_cast<double>(angle), sines + i, cosines + i);
  }
}

void engine_rotate(float* head, int64_t half, const float* cosines, const float* sines) {
  int64_t i = 0;
  for (; i + kLaneCount <= half; i += kLaneCount) {
    const Lanes x = load16(head + i), y = load16(head + half + i), cosine = load16(cosines + i),
                sine = load16(sines + i);
    store16(head + i, fma(x, cosine, y * negated(sine)));
    store16(head + half + i, fma(y, cosine, x * sine));
  }
  for (; i < half; ++i) {  // heads of 16 or 48
    const float x = head[i], y = head[half + i];
    head[i] = __builtin_fmaf(x, cosines[i], y * -sines[i]);
    head[half + i] = __builtin_fmaf(y, cosines[i], x * sines[i]);
  }
}

bool engine_weights(const float* logits, int64_t count, float temperature, int64_t* weights) {
  const float infinite = __builtin_inff();
  float largest = -infinite;
  for (int64_t i = 0; i < count; ++i) {
    const float z = logits[i] / temperature;
    if (!(z < infinite)) return false;
    largest = largest > z ? largest : z;
  }
  if (largest == -infinite) return false;
  for (int64_t i = 0; i < count; i += kLaneCount) {
    float lanes[kLaneCount];
    const int64_t valid = count - i < kLaneCount ? count - i : kLaneCount;
    for (int64_t k = 0; k < kLaneCount; ++k) lanes[k] = k < valid ? logits[i + k] / temperature : largest;
    store16(lanes, exp16(load16(lanes) - splat(largest)));
    for (int64_t k = 0; k < valid; ++k) {
      weights[i + k] = static_cast<int64_t>(__builtin_rint(static_cast<double>(lanes[k]) * 0x1p30));
    }
  }
  return true;
}

}  // namespace ZTOK_ISA
}  // namespace ztok
