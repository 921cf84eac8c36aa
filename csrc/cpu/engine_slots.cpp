// Z-tokens of slots on the CPU: the choices of the next one from a hidden state, and its input row. See
// docs/determinism.md, "Z-tokens of slots".
#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "engine_draw.h"
#include "engine_kernel.h"
#include "int8_products.h"
#include "ordered_products_kernel.h"
#include "share.h"
#include "slot_rows_kernel.h"
#include "standard_arithmetic.h"
#include "tensors.h"

namespace ztok {
namespace {

constexpr const char *kChoices = "engine_slots", *kRows = "engine_slot_rows";
constexpr int64_t kBlockRows = 64, kBlockPanels = 32;

int64_t panels_of(int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }

void check(const char* op, const char* name, const Tensor& tensor, ScalarType type, std::vector<int64_t> sizes) {
  bool fits =
      tensor.scalar_type() == type && tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.is_contiguous();
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = tensor.size(static_cast<int64_t>(i)) == sizes[i];
  std::string expected;
  for (const int64_t size : sizes) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  ZTOK_CHECK(fits, op, name, ": expected a contiguous ", torch::headeronly::toString(type), " tensor [", expected, "]");
}

// The tables of the head, as `ztok_fast.codec.slot_choices` packs them.
struct Head {
  int64_t hidden, slots, gaps, width, words;  // gaps: with "no slot" and "end-of-Z"
  const float *queries, *gap_panels, *gap_rows, *word_panels, *word_rows;

  int64_t query_stride() const { return panels_of(2 * slots * width) * kPanelColumns; }
};

struct Rule {
  double temperature, top_p;
  int64_t seed, step;
  const int64_t* row_ids;
};

class Chooser {
 public:
  Chooser(const Head& head, const Rule& rule, int64_t longest, bool allow_end, int64_t count)
      : h(head), rule_(rule), longest_(longest), allow_end_(allow_end), count_(count) {
    queries_.resize(count * h.query_stride());
    chosen_.assign(count * h.width, 0.0f);
    asked_.resize(count * h.width);
    place_.assign(count, -1);
    going_.resize(count);
    for (int64_t row = 0; row < count; ++row) going_[row] = row;
  }

  void run(const float* hidden, int32_t* codes, int32_t* places, int32_t* lengths, double* ends) {
    StandardArithmetic standard;
    ZTOK_SELECT(ordered_products)
    (hidden, h.hidden, count_, h.queries, h.hidden, panels_of(2 * h.slots * h.width), queries_.data(),
     h.query_stride());
    std::fill_n(codes, count_ * h.slots, -1);
    std::fill_n(places, count_ * h.slots, -1);
    std::vector<int64_t> gaps, words;
    for (int64_t slot = 0; slot < h.slots; ++slot) {
      choose_gaps(slot, gaps, ends);
      int64_t going = 0;
      for (size_t i = 0; i < going_.size(); ++i) {
        const int64_t row = going_[i], gap = gaps[i];
        if (gap == none() || place_[row] + gap + 1 >= longest_) continue;
        place_[row] += gap + 1;
        add(row, h.gap_rows + (slot * h.gaps + gap) * h.width);
        going_[going++] = row;
      }
      going_.resize(going);
      choose_words(slot, words);
      for (int64_t i = 0; i < going; ++i) {
        const int64_t row = going_[i];
        codes[row * h.slots + slot] = static_cast<int32_t>(words[i]);
        places[row * h.slots + slot] = static_cast<int32_t>(place_[row]);
        add(row, h.word_rows + words[i] * h.width);
      }
    }
    for (int64_t row = 0; row < count_; ++row) lengths[row] = static_cast<int32_t>(place_[row] + 1);
  }

 private:
  int64_t none() const { return h.gaps - 2; }

  void add(int64_t row, const float* vector) {
    float* chosen = chosen_.data() + row * h.width;
    for (int64_t i = 0; i < h.width; ++i) chosen[i] = chosen[i] + vector[i];
  }

  // What the rows that still go ask the table of a level.
  void ask(int64_t level) {
    for (size_t i = 0; i < going_.size(); ++i) {
      const float* query = queries_.data() + going_[i] * h.query_stride() + level * h.width;
      const float* chosen = chosen_.data() + going_[i] * h.width;
      float* to = asked_.data() + static_cast<int64_t>(i) * h.width;
      for (int64_t k = 0; k < h.width; ++k) to[k] = query[k] + chosen[k];
    }
  }

  // One of `count` logits of a row, by the rule of the engine's head.
  int64_t choose(const float* logits, int64_t count, int64_t row, int64_t level, std::vector<int64_t>& weights,
                 std::vector<Candidate>& heap) const {
    if (rule_.temperature > 0) {
      weights.resize(count);
      const auto temperature = static_cast<float>(rule_.temperature);
      if (!ZTOK_SELECT(engine_weights)(logits, count, temperature, weights.data())) return -1;
      const int64_t step = rule_.step * 2 * h.slots + level;
      return draw(weights.data(), count, rule_.top_p, random_bits(rule_.seed, rule_.row_ids[row], step), heap);
    }
    int64_t best = 0;
    for (int64_t i = 1; i < count && !std::isnan(logits[best]); ++i) {
      if (!(logits[i] <= logits[best])) best = i;
    }
    return std::isfinite(logits[best]) ? best : -1;
  }

  void choose_gaps(int64_t slot, std::vector<int64_t>& found, double* ends) {
    ask(2 * slot);
    const int64_t panels = panels_of(h.gaps), stride = panels * kPanelColumns;
    const auto count = static_cast<int64_t>(going_.size());
    std::vector<float> logits(count * stride);
    ZTOK_SELECT(ordered_products)
    (asked_.data(), h.width, count, h.gap_panels + slot * stride * h.width, h.width, panels, logits.data(), stride);
    found.resize(count);
    std::vector<int64_t> weights;
    std::vector<Candidate> heap;
    for (int64_t i = 0; i < count; ++i) {
      float* own = logits.data() + i * stride;
      int64_t choices = h.gaps - 1;
      if (slot == 0) {
        ends[i] = allow_end_ ? 0 : end_mass(own, weights);
        // A Z-token has a slot at least, or ends the sequence.
        own[none()] = own[none() + 1];
        choices = allow_end_ ? choices : choices - 1;
      }
      const int64_t gap = choose(own, choices, going_[i], 2 * slot, weights, heap);
      check_found(gap, going_[i]);
      const bool ended = slot == 0 && gap == none();
      if (ended) ends[i] = 1;
      found[i] = slot > 0 ? gap : ended ? 0 : std::min(gap, longest_ - 1);
    }
  }

  // The share of end-of-Z in the softmax over all choices of the first gap.
  double end_mass(const float* logits, std::vector<int64_t>& weights) const {
    weights.resize(h.gaps);
    if (!ZTOK_SELECT(engine_weights)(logits, h.gaps, 1.0f, weights.data())) return 0;
    int64_t total = 0;
    for (const int64_t weight : weights) total += weight;
    return static_cast<double>(weights.back()) / static_cast<double>(total);
  }

  void choose_words(int64_t slot, std::vector<int64_t>& found) {
    const int64_t level = 2 * slot + 1, count = static_cast<int64_t>(going_.size());
    found.assign(count, -1);
    if (count == 0) return;
    ask(level);
    const int64_t panels = panels_of(h.words), stride = panels * kPanelColumns;
    const int64_t row_blocks = (count + kBlockRows - 1) / kBlockRows;
    const int64_t blocks = (panels + kBlockPanels - 1) / kBlockPanels;
    const bool draws = rule_.temperature > 0;
    const float infinite = std::numeric_limits<float>::infinity();
    std::vector<float> logits(draws ? count * stride : 0), best(draws ? 0 : blocks * count, -infinite);
    std::vector<int64_t> index(draws ? 0 : blocks * count, -1);
    const double products = static_cast<double>(count) * static_cast<double>(h.words * h.width);
    const double nanoseconds =
        std::max(products / kProductsPerNanosecond, 4.0 * h.words * h.width / kBytesPerNanosecond);
    share(row_blocks * blocks, 1, nanoseconds, [&](int64_t begin, int64_t end) {
      StandardArithmetic standard;
      thread_local Scratch scratch;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t block = item / row_blocks, first = item % row_blocks * kBlockRows;
        const int64_t rows = std::min(kBlockRows, count - first), panel = block * kBlockPanels;
        const int64_t own = std::min(kBlockPanels, panels - panel), column = panel * kPanelColumns;
        float* to = draws ? logits.data() + first * stride + column : scratch.get(rows * kBlockPanels * kPanelColumns);
        const int64_t to_stride = draws ? stride : kBlockPanels * kPanelColumns;
        ZTOK_SELECT(ordered_products)
        (asked_.data() + first * h.width, h.width, rows, h.word_panels + column * h.width, h.width, own, to, to_stride);
        if (draws) continue;
        const Products found_here{to,      to_stride, rows,   std::min(own * kPanelColumns, h.words - column),
                                  nullptr, nullptr,   nullptr};
        const int64_t at = block * count + first;
        ZTOK_SELECT(engine_best)(found_here, column, best.data() + at, index.data() + at);
      }
    });
    if (draws) {
      share(count, 1, static_cast<double>(count) * h.words * 10, [&](int64_t begin, int64_t end) {
        StandardArithmetic standard;
        std::vector<int64_t> weights;
        std::vector<Candidate> heap;
        for (int64_t i = begin; i < end; ++i) {
          found[i] = choose(logits.data() + i * stride, h.words, going_[i], level, weights, heap);
        }
      });
    }
    for (int64_t i = 0; i < count; ++i) {
      float greatest = draws ? 0 : -infinite;
      for (int64_t block = 0; !draws && block < blocks && !std::isnan(greatest); ++block) {
        if (best[block * count + i] <= greatest) continue;
        greatest = best[block * count + i];
        found[i] = index[block * count + i];
      }
      check_found(std::isfinite(greatest) ? found[i] : -1, going_[i]);
    }
  }

  static void check_found(int64_t choice, int64_t row) {
    ZTOK_CHECK(choice >= 0, kChoices, "row ", row, ": expected finite logits, got NaN or infinity");
  }

  const Head& h;
  const Rule& rule_;
  int64_t longest_;
  bool allow_end_;
  int64_t count_;
  std::vector<float> queries_, chosen_, asked_;
  std::vector<int64_t> place_, going_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> engine_slots(const Tensor& hidden, const Tensor& queries,
                                                        const Tensor& gap_panels, const Tensor& gap_rows,
                                                        const Tensor& word_panels, const Tensor& word_rows,
                                                        int64_t longest, bool allow_end, double temperature,
                                                        double top_p, int64_t seed, const Tensor& row_ids,
                                                        int64_t step) {
  ZTOK_CHECK(hidden.dim() == 2 && gap_rows.dim() == 3 && gap_rows.size(1) > 2 && word_rows.dim() == 2, kChoices,
             "hidden, gap_rows, word_rows: expected [B, D], [L, more than 2, d] and [V, d]");
  const int64_t count = hidden.size(0), depth = hidden.size(1), words = word_rows.size(0);
  const int64_t slots = gap_rows.size(0), gaps = gap_rows.size(1), width = gap_rows.size(2);
  const ScalarType real = ScalarType::Float;
  ZTOK_CHECK(words > 0 && width > 0 && longest > 0, kChoices, "word_rows, longest: expected at least 1");
  check(kChoices, "hidden", hidden, real, {count, depth});
  check(kChoices, "queries", queries, real, {panels_of(2 * slots * width), depth, kPanelColumns});
  check(kChoices, "gap_rows", gap_rows, real, {slots, gaps, width});
  check(kChoices, "gap_panels", gap_panels, real, {slots, panels_of(gaps), width, kPanelColumns});
  check(kChoices, "word_rows", word_rows, real, {words, width});
  check(kChoices, "word_panels", word_panels, real, {panels_of(words), width, kPanelColumns});
  check(kChoices, "row_ids", row_ids, ScalarType::Long, {count});
  ZTOK_CHECK(temperature >= 0 && std::isfinite(temperature) && top_p > 0 && top_p <= 1, kChoices,
             "temperature, top_p: expected a number of at least 0 and one in (0, 1]");
  Tensor codes = new_tensor(hidden, {count, slots}, ScalarType::Int);
  Tensor places = new_tensor(hidden, {count, slots}, ScalarType::Int);
  Tensor lengths = new_tensor(hidden, {count}, ScalarType::Int), ends = new_tensor(hidden, {count}, ScalarType::Double);
  if (count > 0) {
    const Head head{depth,
                    slots,
                    gaps,
                    width,
                    words,
                    queries.const_data_ptr<float>(),
                    gap_panels.const_data_ptr<float>(),
                    gap_rows.const_data_ptr<float>(),
                    word_panels.const_data_ptr<float>(),
                    word_rows.const_data_ptr<float>()};
    const Rule rule{temperature, top_p, seed, step, row_ids.const_data_ptr<int64_t>()};
    Chooser(head, rule, longest, allow_end, count)
        .run(hidden.const_data_ptr<float>(), codes.mutable_data_ptr<int32_t>(), places.mutable_data_ptr<int32_t>(),
             lengths.mutable_data_ptr<int32_t>(), ends.mutable_data_ptr<double>());
  }
  return {codes, places, lengths, ends};
}

Tensor engine_slot_rows(const Tensor& words, const Tensor& index, const Tensor& codes, const Tensor& offsets,
                        const Tensor& gates, const Tensor& places, const Tensor& empty) {
  ZTOK_CHECK(words.dim() == 2 && codes.dim() == 2 && places.dim() == 2 && places.size(0) > 0, kRows,
             "words, codes, places: expected [n, D], [K, L] and [P, D], P at least 1");
  const int64_t known = words.size(0), width = words.size(1), count = codes.size(0), slots = codes.size(1);
  const int64_t distances = places.size(0);
  const ScalarType real = ScalarType::Float;
  check(kRows, "words", words, real, {known, width});
  check(kRows, "index", index, ScalarType::Long, {count, slots});
  check(kRows, "codes", codes, ScalarType::Int, {count, slots});
  check(kRows, "slot_offsets", offsets, ScalarType::Int, {count, slots});
  check(kRows, "gates", gates, real, {slots, width});
  check(kRows, "places", places, real, {distances, width});
  check(kRows, "empty", empty, real, {width});
  Tensor result = new_tensor(words, {count, width});
  const auto *word = words.const_data_ptr<float>(), *gate = gates.const_data_ptr<float>(),
             *place = places.const_data_ptr<float>(), *no_slot = empty.const_data_ptr<float>();
  const auto* at = index.const_data_ptr<int64_t>();
  const auto *code = codes.const_data_ptr<int32_t>(), *offset = offsets.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < count * slots; ++i) {
    ZTOK_CHECK(code[i] < 0 || (at[i] >= 0 && at[i] < known), kRows, "index: expected 0 to ", known - 1, ", got ",
               at[i]);
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
      "engine_slots(Tensor hidden, Tensor queries, Tensor gap_panels, Tensor gap_rows, Tensor word_panels, Tensor "
      "word_rows, int longest, bool allow_end, float temperature, float top_p, int seed, Tensor row_ids, int step) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "engine_slot_rows(Tensor words, Tensor index, Tensor codes, Tensor slot_offsets, Tensor gates, Tensor places, "
      "Tensor empty) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) {
  m.impl("engine_slots", TORCH_BOX(&ztok::engine_slots));
  m.impl("engine_slot_rows", TORCH_BOX(&ztok::engine_slot_rows));
}
