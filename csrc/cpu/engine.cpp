// engine_forward on the CPU: new rows of many sequences through all layers, over a cache of keys and values.
//
// Sequences do not see each other, so passes (rows of some sequences) are independent. Where there are enough of them
// each thread takes whole passes. Otherwise, and where the weights do not fit the caches, all threads go through one
// pass together, phase by phase. Neither changes a bit (docs/determinism.md).
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "engine_attention_kernel.h"
#include "engine_linear.h"
#include "engine_plan.h"
#include "team.h"

namespace ztok {
namespace {

constexpr const char* kOp = "engine_forward";
constexpr int64_t kPassRows = 128;          // most rows of a pass: their activations stay in L2
constexpr int64_t kAloneRows = 64;          // most rows of a pass that one thread runs
constexpr int64_t kFewRows = 16;            // fewer than that waste a read of the weights
constexpr int64_t kCachedBytes = 16 << 20;  // weights that the last level cache keeps
constexpr int64_t kTileRows = 8;            // rows of one item of the work between linear layers

struct Call {
  const EngineModel& model;
  uint8_t *keys, *values;
  bool half_cache;
  int64_t slots, capacity;
  const float* embeddings;
  const int64_t* tokens;
  const float* vectors;  // or null
  const int64_t* positions;
  const Plan& plan;
  int64_t layers;
  float* result;

  int64_t scores_stride() const { return capacity + 16; }

  HeadCache cache(int64_t layer, int64_t slot, int64_t head) const {
    const int64_t place =
        ((layer * slots + slot) * model.kv_heads + head) * capacity * model.head * (half_cache ? 2 : 4);
    return {keys + place, values + place, model.head, half_cache};
  }
};

// Where a row of a pass comes from: row `offset` of a piece.
struct RowPiece {
  int64_t piece, offset;
};

// Activations of a pass.
struct Buffers {
  float *x, *normed, *qkv, *attended, *inner, *cosines, *sines;
  QuantisedRows quantised;
  RowPiece* row_pieces;
};

Buffers buffers_for(const EngineModel& m, int64_t rows, Scratch& scratch) {
  const int64_t qkv = (m.heads + 2 * m.kv_heads) * m.head, attended = m.heads * m.head;
  const int64_t widest = padded_depth(std::max({m.hidden, attended, m.inner}));
  float* p = scratch.get(rows * (widest / 4 + 2 * m.hidden + qkv + attended + m.inner + m.head + 2 + 4));
  const auto take = [&](int64_t count) {
    float* taken = p;
    p += count;
    return taken;
  };
  Buffers b;
  b.quantised.values = reinterpret_cast<int8_t*>(take(rows * widest / 4));  // a multiple of 64 bytes
  b.quantised.stride = widest;
  b.row_pieces = reinterpret_cast<RowPiece*>(take(rows * 4));
  b.x = take(rows * m.hidden);
  b.normed = take(rows * m.hidden);
  b.qkv = take(rows * qkv);
  b.attended = take(rows * attended);
  b.inner = take(rows * m.inner);
  b.cosines = take(rows * m.head / 2);
  b.sines = take(rows * m.head / 2);
  b.quantised.scales = take(rows);
  b.quantised.sums = reinterpret_cast<int32_t*>(take(rows));
  return b;
}

class Runner {
 public:
  Runner(const Call& call, const Pass& pass, const Buffers& buffers, Member& member, int64_t threads)
      : c(call), m(call.model), pass_(pass), b(buffers), member_(member), threads_(threads), rows_(pass.rows) {}

  void run(float* scores) {
    for_rows([&](int64_t row) { enter(row); });
    for (int64_t l = 0; l < c.layers; ++l) {
      const EngineLayer layer = m.layer(pass_.adapter, l);
      norm(layer.norm1);
      apply(layer.qkv, {b.normed, m.hidden, b.quantised}, [&](const Products& products, int64_t column) {
        ZTOK_SELECT(engine_store)(products, b.qkv + column, qkv_width());
      });
      for_rows([&](int64_t row) { rotate(layer, l, row); });
      attend(l, scores);
      quantise(b.attended, m.heads * m.head);
      add(layer.out, {b.attended, m.heads * m.head, b.quantised});
      norm(layer.norm2);
      apply(
          layer.gate_up, {b.normed, m.hidden, b.quantised},
          [&](const Products& products, int64_t column) {
            ZTOK_SELECT(engine_gate)(products, b.inner + column / 2, m.inner);
          },
          2);
      quantise(b.inner, m.inner);
      add(layer.down, {b.inner, m.inner, b.quantised});
    }
    for_rows([&](int64_t row) {
      const Piece& piece = piece_of(row);
      ZTOK_SELECT(engine_norm)
      (b.x + row * m.hidden, m.final_norm, m.hidden, m.eps, c.result + (piece.first + offset(row)) * m.hidden);
    });
  }

  // phases of one pass
  static int64_t phases(int64_t layers) { return 2 + 10 * layers; }

 private:
  int64_t qkv_width() const { return (m.heads + 2 * m.kv_heads) * m.head; }
  const Piece& piece_of(int64_t row) const { return c.plan.pieces[b.row_pieces[row].piece]; }
  int64_t offset(int64_t row) const { return b.row_pieces[row].offset; }

  template <typename Body>
  void for_rows(const Body& body) {
    const int64_t tile = threads_ > 1 ? std::clamp<int64_t>(rows_ / (2 * threads_), 1, kTileRows) : rows_;
    member_.share((rows_ + tile - 1) / tile, [&](int64_t item) {
      for (int64_t row = item * tile; row < std::min(rows_, (item + 1) * tile); ++row) body(row);
    });
  }

  void enter(int64_t row) {
    const Piece& piece = piece_of(row);
    const int64_t at = piece.first + offset(row), token = c.tokens[at];
    float* x = b.x + row * m.hidden;
    const float* vector = c.vectors == nullptr ? nullptr : c.vectors + at * m.hidden;
    if (token >= 0) {
      std::copy_n(c.embeddings + token * m.hidden, m.hidden, x);
    } else {
      std::fill_n(x, m.hidden, 0.0f);
    }
    for (int64_t i = 0; vector != nullptr && i < m.hidden; ++i) x[i] = x[i] + vector[i];
    const int64_t half = m.head / 2;
    ZTOK_SELECT(engine_angles)
    (static_cast<float>(c.positions[at]), m.frequencies, half, b.cosines + row * half, b.sines + row * half);
  }

  void norm(const float* weight) {
    for_rows([&](int64_t row) {
      float* out = b.normed + row * m.hidden;
      ZTOK_SELECT(engine_norm)(b.x + row * m.hidden, weight, m.hidden, m.eps, out);
      if (m.is_int8) quantise_row(out, m.hidden, b.quantised, row);
    });
  }

  void quantise(const float* rows, int64_t width) {
    if (!m.is_int8) return;
    for_rows([&](int64_t row) { quantise_row(rows + row * width, width, b.quantised, row); });
  }

  // Columns in blocks of a multiple of `step` panels.
  template <typename Use>
  void apply(const EngineLinear& linear, const EngineRows& rows, const Use& use, int64_t step = 1) {
    const int64_t panels = linear.num_panels();
    const int64_t block =
        threads_ == 1 ? panels : std::max(step, std::min(kMostPanels, panels / (3 * threads_) / step * step));
    member_.share((panels + block - 1) / block, [&](int64_t item) {
      engine_products(linear, rows, 0, rows_, item * block, std::min(panels, (item + 1) * block), use);
    });
  }

  void add(const EngineLinear& linear, const EngineRows& rows) {
    apply(linear, rows,
          [&](const Products& products, int64_t column) { ZTOK_SELECT(engine_add)(products, b.x + column, m.hidden); });
  }

  void rotate(const EngineLayer& layer, int64_t l, int64_t row) {
    const Piece& piece = piece_of(row);
    const int64_t half = m.head / 2;
    float* queries = b.qkv + row * qkv_width();
    float* keys = queries + m.heads * m.head;
    const float* values = keys + m.kv_heads * m.head;
    for (int64_t h = 0; h < m.heads + m.kv_heads; ++h) {
      float* head = queries + h * m.head;
      const float* weight = h < m.heads ? layer.query_norm : layer.key_norm;
      if (weight != nullptr) ZTOK_SELECT(engine_norm)(head, weight, m.head, m.eps, head);
      ZTOK_SELECT(engine_rotate)(head, half, b.cosines + row * half, b.sines + row * half);
    }
    for (int64_t h = 0; h < m.kv_heads; ++h) {
      ZTOK_SELECT(engine_cache)
      (keys + h * m.head, values + h * m.head, c.cache(l, piece.slot, h), piece.start + offset(row));
    }
  }

  // Have the processor fetch the keys and values of a row from its last level cache, unless the row before it had the
  // same: they lie in many short stretches, of which it guesses none.
  void fetch(int64_t l, int64_t kv, int64_t row, int64_t slot_before) const {
    const Piece& piece = piece_of(row);
    if (piece.slot == slot_before) return;
    const HeadCache cache = c.cache(l, piece.slot, kv);
    const int64_t bytes = (piece.start + offset(row) + 1) * m.head * (c.half_cache ? 2 : 4);
    for (const void* from : {cache.keys, cache.values}) {
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const uint8_t*>(from) + i, 0, 2);
    }
  }

  void attend(int64_t l, float* scores) {
    const int64_t tile = threads_ > 1 ? std::clamp<int64_t>(rows_ / (2 * threads_), 1, kTileRows) : rows_;
    const int64_t tiles = (rows_ + tile - 1) / tile, group = m.heads / m.kv_heads;
    member_.share(tiles * m.kv_heads, [&](int64_t item) {
      const int64_t kv = item / tiles, begin = item % tiles * tile;
      for (int64_t row = begin; row < std::min(rows_, begin + tile); ++row) {
        const Piece& piece = piece_of(row);
        const HeadCache cache = c.cache(l, piece.slot, kv);
        if (row + 1 < std::min(rows_, begin + tile)) fetch(l, kv, row + 1, piece.slot);
        ZTOK_SELECT(engine_attend)
        (b.qkv + row * qkv_width() + kv * group * m.head, group, cache, piece.start + offset(row) + 1,
         m.attention_scale, scores, c.scores_stride(), b.attended + (row * m.heads + kv * group) * m.head);
      }
    });
  }

  const Call& c;
  const EngineModel& m;
  const Pass& pass_;
  const Buffers& b;
  Member& member_;
  int64_t threads_, rows_;
};

void fill_rows(const Call& call, const Pass& pass, const Buffers& b) {
  int64_t row = 0;
  for (int64_t p = pass.pieces_begin; p < pass.pieces_end; ++p) {
    for (int64_t t = 0; t < call.plan.pieces[p].count; ++t, ++row) {
      b.row_pieces[row] = {p, t};
    }
  }
}

Scratch& pass_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

Scratch& score_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

void run_alone(const Call& call, int64_t first, int64_t last) {
  StandardArithmetic standard;
  for (int64_t p = first; p < last; ++p) {
    const Pass& pass = call.plan.passes[p];
    const Buffers b = buffers_for(call.model, pass.rows, pass_scratch());
    fill_rows(call, pass, b);
    Member member;
    Runner(call, pass, b, member, 1).run(score_scratch().get(kScoreRows * call.scores_stride()));
  }
}

void run_together(const Call& call, int64_t threads) {
  thread_local std::vector<Phase> phases;
  const int64_t per_pass = Runner::phases(call.layers);
  if (static_cast<int64_t>(phases.size()) < per_pass) phases = std::vector<Phase>(per_pass);
  Phase* of_pass = phases.data();
  for (const Pass& pass : call.plan.passes) {
    const Buffers b = buffers_for(call.model, pass.rows, pass_scratch());
    fill_rows(call, pass, b);
    together(threads, of_pass, per_pass, [&](Member& member) {
      StandardArithmetic standard;
      Runner(call, pass, b, member, threads).run(score_scratch().get(kScoreRows * call.scores_stride()));
    });
  }
}

const int32_t* sequence_ints(const char* name, const Tensor& tensor, int64_t count) {
  ZTOK_CHECK(
      tensor.scalar_type() == ScalarType::Int && tensor.dim() == 1 && tensor.size(0) == count && tensor.is_contiguous(),
      kOp, name, ": expected a contiguous int32 vector of ", count, " elements");
  return tensor.const_data_ptr<int32_t>();
}

const int64_t* row_longs(const char* name, const Tensor& tensor, int64_t count) {
  ZTOK_CHECK(tensor.scalar_type() == ScalarType::Long && tensor.dim() == 1 && tensor.size(0) == count &&
                 tensor.is_contiguous(),
             kOp, name, ": expected a contiguous int64 vector of ", count, " elements");
  return tensor.const_data_ptr<int64_t>();
}

void check_cache(const char* name, const Tensor& tensor, int64_t dims, const EngineModel& model) {
  ZTOK_CHECK(tensor.scalar_type() == (model.is_int8 ? ScalarType::Half : ScalarType::Float) && tensor.dim() == dims &&
                 tensor.is_contiguous(),
             kOp, name, ": expected a contiguous ", model.is_int8 ? "float16" : "float32", " tensor of ", dims,
             " dimensions");
}

Tensor engine_forward(const Tensor& weights, const Tensor& layout, const Tensor& keys, const Tensor& values,
                      const Tensor& embeddings, const Tensor& tokens, const std::optional<Tensor>& vectors,
                      const Tensor& positions, const Tensor& cu_rows, const Tensor& slots, const Tensor& starts,
                      const Tensor& adapters, int64_t layers) {
  const EngineModel model(kOp, weights, layout);
  check_cache("keys", keys, 6, model);
  check_cache("values", values, 5, model);
  const int64_t num_slots = values.size(1), capacity = values.size(3);
  ZTOK_CHECK(values.size(0) == model.layers && values.size(2) == model.kv_heads && values.size(4) == model.head &&
                 capacity % 16 == 0 && keys.numel() == values.numel(),
             kOp, "keys, values: expected caches of this model whose capacity is a multiple of 16");
  ZTOK_CHECK(embeddings.scalar_type() == ScalarType::Float && embeddings.dim() == 2 && embeddings.is_contiguous() &&
                 embeddings.size(0) == model.vocabulary && embeddings.size(1) == model.hidden,
             kOp, "embeddings: expected contiguous float32 [", model.vocabulary, ", ", model.hidden, "]");
  ZTOK_CHECK(layers >= 1 && layers <= model.layers, kOp, "layers: expected 1 to ", model.layers, ", got ", layers);
  const int64_t rows = tokens.dim() == 1 ? tokens.size(0) : -1, sequences = slots.dim() == 1 ? slots.size(0) : -1;
  const int64_t* token = row_longs("tokens", tokens, rows);
  const int64_t* position = row_longs("positions", positions, rows);
  const int32_t *cu = sequence_ints("cu_rows", cu_rows, sequences + 1),
                *slot = sequence_ints("slots", slots, sequences);
  const int32_t *start = sequence_ints("starts", starts, sequences),
                *adapter = sequence_ints("adapters", adapters, sequences);
  if (vectors.has_value()) {
    ZTOK_CHECK(vectors->scalar_type() == ScalarType::Float && vectors->dim() == 2 && vectors->is_contiguous() &&
                   vectors->size(0) == rows && vectors->size(1) == model.hidden,
               kOp, "vectors: expected contiguous float32 [", rows, ", ", model.hidden, "]");
  }
  for (int64_t r = 0; r < rows; ++r) {
    ZTOK_CHECK(token[r] >= -1 && token[r] < model.vocabulary, kOp, "tokens: expected -1 to ", model.vocabulary - 1,
               ", got ", token[r]);
    // Exact as a float, and the reduction of the angle stays exact.
    ZTOK_CHECK(position[r] >= 0 && position[r] < (1 << 24), kOp, "positions: expected 0 to ", (1 << 24) - 1, ", got ",
               position[r]);
  }
  ZTOK_CHECK(cu[0] == 0 && cu[sequences] == rows, kOp, "cu_rows: expected offsets from 0 to ", rows);
  std::vector<bool> taken(num_slots);
  for (int64_t s = 0; s < sequences; ++s) {
    ZTOK_CHECK(cu[s] <= cu[s + 1], kOp, "cu_rows: expected non-decreasing offsets");
    ZTOK_CHECK(slot[s] >= 0 && slot[s] < num_slots && !taken[slot[s]], kOp, "slots: expected different ones below ",
               num_slots, ", got ", slot[s]);
    taken[slot[s]] = true;
    ZTOK_CHECK(start[s] >= 0 && start[s] + int64_t{cu[s + 1]} - cu[s] <= capacity, kOp, "starts: expected at most ",
               capacity, " rows in a slot, got ", start[s] + int64_t{cu[s + 1]} - cu[s]);
    ZTOK_CHECK(adapter[s] >= 0 && adapter[s] < model.adapters, kOp, "adapters: expected 0 to ", model.adapters - 1,
               ", got ", adapter[s]);
  }
  Tensor result = new_tensor(embeddings, {rows, model.hidden});
  if (rows == 0) return result;

  thread_local Plan kept;
  Plan& plan = kept;  // a lambda that names `kept` means that of its own thread
  plan.order.resize(sequences);
  std::iota(plan.order.begin(), plan.order.end(), 0);
  std::stable_sort(plan.order.begin(), plan.order.end(), [&](int64_t a, int64_t b) { return adapter[a] < adapter[b]; });
  // Products of one row, for the number of threads alone.
  const double nanoseconds = static_cast<double>(rows) * model.bytes / kProductsPerNanosecond;
  const int64_t threads = threads_for(nanoseconds);
  const int64_t alone = std::clamp((rows + threads - 1) / threads, kFewRows, kAloneRows);
  const Call call{model,
                  static_cast<uint8_t*>(keys.mutable_data_ptr()),
                  static_cast<uint8_t*>(values.mutable_data_ptr()),
                  values.scalar_type() == ScalarType::Half,
                  num_slots,
                  capacity,
                  embeddings.const_data_ptr<float>(),
                  token,
                  vectors.has_value() ? vectors->const_data_ptr<float>() : nullptr,
                  position,
                  plan,
                  layers,
                  result.mutable_data_ptr<float>()};
  make_passes(plan, cu, slot, start, adapter, alone, true);
  const auto runs = static_cast<int64_t>(plan.starts.size()) - 1;
  const bool many = runs >= threads && (model.bytes <= kCachedBytes || rows >= threads * kPassRows);
  if (threads == 1 || many) {
    share_among(std::min(threads, runs), runs, 1, [&](int64_t, const auto& claims) {
      claims([&](int64_t begin, int64_t end) { run_alone(call, plan.starts[begin], plan.starts[end]); });
    });
    return result;
  }
  make_passes(plan, cu, slot, start, adapter, kPassRows, false);
  run_together(call, threads);
  return result;
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_FRAGMENT(ztok, m) {
  m.def(
      "engine_forward(Tensor weights, Tensor layout, Tensor(a!) keys, Tensor(b!) values, Tensor embeddings, "
      "Tensor tokens, Tensor? vectors, Tensor positions, Tensor cu_rows, Tensor slots, Tensor starts, "
      "Tensor adapters, int layers) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) { m.impl("engine_forward", TORCH_BOX(&ztok::engine_forward)); }
