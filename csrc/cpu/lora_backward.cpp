// The backward pass of lora_linear: products over features like those of the forward pass, and products over the rows
// of each adapter. Nothing of the size of the weight is made besides its own gradient.
#include <algorithm>

#include "lora.h"
#include "torch_products.h"

namespace ztok {
namespace {

std::vector<int32_t> counting(int64_t n) {
  std::vector<int32_t> numbers(n);
  for (int64_t i = 0; i < n; ++i) numbers[i] = static_cast<int32_t>(i);
  return numbers;
}

// [rows, columns] -> [columns, rows], float32, rows taken in the order of `order`.
void transpose(const float* from, const int32_t* order, int64_t rows, int64_t columns, float* to) {
  constexpr int64_t kTile = 16;
  const int64_t tiles = (columns + kTile - 1) / kTile;
  share(tiles, 4, 16.0 * rows * columns / kBytesPerNanosecond, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      for (int64_t i = 0; i < rows; ++i) {
        const float* row = from + (order ? order[i] : i) * columns;
        for (int64_t j = tile * kTile; j < std::min(columns, (tile + 1) * kTile); ++j) to[j * rows + i] = row[j];
      }
    }
  });
}

// y [left_columns, columns] = leftᵀ right over `count` rows: left_t [left_columns, count] is given transposed, of
// `right` the rows `order` are taken.
void multiply_over_rows(const float* left_t, int64_t left_columns, const LoraOperand& right, const int32_t* order,
                        int64_t count, int64_t columns, void* y, Element y_element) {
  const std::vector<int32_t> rows = counting(left_columns);
  std::vector<LoraStrip> strips;
  add_lora_strips(0, static_cast<int32_t>(left_columns), -1, strips);
  LoraProduct product{};
  product.a = left_t;
  product.a_stride = product.depth = count;
  product.a_rows = product.rows = rows.data();
  product.b = right;
  product.b_rows = order;
  product.y = y;
  product.y_element = y_element;
  product.y_stride = columns;
  lora_multiply(product, strips.data(), static_cast<int64_t>(strips.size()), columns);
}

// dA (low = s grad B, right = x) and, transposed, dB (low = s x Aᵀ, right = grad).
void adapter_gradients(const LoraLayer& lora, const LoraGroups& groups, const Tensor& low, const Tensor& right,
                       Element right_element, Tensor& result, bool transposed) {
  const int64_t columns = right.size(1), element = bytes_of(lora.adapter_element);
  const Tensor low_t = new_floats(low, {lora.rows * lora.rank});
  Tensor product = low, product_t = low;
  if (transposed) {
    product = new_floats(low, {lora.rank, columns});
    product_t = new_floats(low, {columns, lora.rank});
  }
  const LoraOperand rows{right.const_data_ptr(), right_element, columns};
  for (int64_t a = 0; a < lora.num_adapters; ++a) {
    const int32_t begin = groups.begin[a + 1], count = groups.begin[a + 2] - begin;
    const int32_t* order = groups.rows.data() + begin;
    char* target = static_cast<char*>(result.mutable_data_ptr()) + a * lora.rank * columns * element;
    transpose(floats(low), order, count, lora.rank, mutable_floats(low_t));
    if (!transposed) {
      multiply_over_rows(floats(low_t), lora.rank, rows, order, count, columns, target, lora.adapter_element);
      continue;
    }
    multiply_over_rows(floats(low_t), lora.rank, rows, order, count, columns, mutable_floats(product),
                       Element::float32);
    transpose(floats(product), nullptr, lora.rank, columns, mutable_floats(product_t));
    ZTOK_SELECT(lora_narrow)(floats(product_t), target, lora.adapter_element, columns * lora.rank);
  }
}

}  // namespace

LoraGradients lora_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& A,
                                   const Tensor& B, const Tensor& scaling, const OptionalTensor& adapters,
                                   const OptionalTensor& cu_seqlens, const std::vector<bool>& needs) {
  ZTOK_CHECK(needs.size() == 5, kLoraOp, "needs: expected 5, one for each of x, weight, bias, A, B, got ",
             needs.size());
  const bool need_x = needs[0], need_weight = needs[1], need_bias = needs[2], need_A = needs[3], need_B = needs[4];
  const LoraLayer lora = lora_layer(x, weight, A, B, scaling, adapters, cu_seqlens);
  check_lora_shape("grad", grad, {lora.rows, lora.out});
  ZTOK_CHECK(grad.scalar_type() == x.scalar_type(), kLoraOp, "grad: expected the dtype of x");
  const Tensor dy = packed(grad);
  auto make = [&](bool needed, const Tensor& like, std::vector<int64_t> shape) {
    return new_tensor(like, needed ? shape : std::vector<int64_t>{0});
  };
  Tensor dx = make(need_x, x, {lora.rows, lora.in}), dweight = make(need_weight, weight, {lora.out, lora.in});
  Tensor dbias = make(need_bias, weight, {lora.out}), dA = make(need_A, A, {lora.num_adapters, lora.rank, lora.in});
  Tensor dB = make(need_B, B, {lora.num_adapters, lora.out, lora.rank});
  const LoraGroups groups = lora_groups(lora.adapters, lora.num_adapters);
  LoraProduct product{};
  if (need_x || need_A) {
    const Tensor low = new_floats(x, {lora.rows, lora.rank});  // s grad B
    const bool dense = need_x && lora_dense_is_torchs(lora.element, lora.rows, lora.out, lora.in);
    if (dense) multiply_into(dy, lora.weight.tensor, dx);
    product.depth = lora.out;
    with_float_rows(dy, lora.element, groups, product, [&](LoraProduct p, const LoraStrip* strips, int64_t count) {
      lora_shrink(lora, p, lora.matrix_B(), false, lora.out * lora.rank, mutable_floats(low), strips, count);
      if (!need_x || dense) return;
      p.b = lora.weight.matrix(lora.element);
      p.b_by_columns = lora.weight.transposed;
      p.expand = lora.matrix_A();
      p.expand_by_columns = false;
      p.expand_adapter_stride = lora.rank * lora.in;
      p.low = floats(low);
      p.rank = lora.rank;
      p.y = dx.mutable_data_ptr();
      p.y_element = lora.element;
      p.y_stride = lora.in;
      lora_multiply(p, strips, count, lora.in);
    });
    if (dense) lora_add_low(lora, groups, floats(low), lora.matrix_A(), false, lora.rank * lora.in, dx);
    if (need_A) adapter_gradients(lora, groups, low, lora.x, lora.element, dA, false);
  }
  if (need_B) {
    const Tensor low = new_floats(x, {lora.rows, lora.rank});  // s x Aᵀ
    product.depth = lora.in;
    with_float_rows(lora.x, lora.element, groups, product, [&](LoraProduct p, const LoraStrip* strips, int64_t count) {
      lora_shrink(lora, p, lora.matrix_A(), true, lora.rank * lora.in, mutable_floats(low), strips, count);
    });
    adapter_gradients(lora, groups, low, dy, lora.element, dB, true);
  }
  if (need_weight && lora_dense_is_torchs(lora.element, lora.out, lora.rows, lora.in)) {
    multiply_into(torch::stable::transpose(dy, 0, 1), lora.x, dweight);
  } else if (need_weight) {
    const std::vector<int32_t> order = counting(lora.rows);
    const Tensor wide = new_floats(x, {lora.rows, lora.out}), wide_t = new_floats(x, {lora.out, lora.rows});
    lora_widen_rows(static_cast<const char*>(dy.const_data_ptr()), lora.element, lora.out, order.data(), lora.rows,
                    mutable_floats(wide));
    transpose(floats(wide), nullptr, lora.rows, lora.out, mutable_floats(wide_t));
    multiply_over_rows(floats(wide_t), lora.out, {lora.x.const_data_ptr(), lora.element, lora.in}, nullptr, lora.rows,
                       lora.in, dweight.mutable_data_ptr(), lora.element);
  }
  if (need_bias) {
    const std::vector<float> ones(lora.rows, 1.0f);
    multiply_over_rows(ones.data(), 1, {dy.const_data_ptr(), lora.element, lora.out}, nullptr, lora.rows, lora.out,
                       dbias.mutable_data_ptr(), lora.element);
  }
  return {dx, dweight, dbias, dA, dB};
}

}  // namespace ztok
