// AMX tiles in plain C++, for processors without them: what csrc/cpu/int8_products_amx.cpp uses, with the checks that
// the processor makes. Included by int8_check.cpp in place of immintrin.h.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx {

struct Tile {
  int rows = 0, bytes = 0;
  uint8_t data[16][64];
};
inline Tile tiles[8];
inline bool configured = false;

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::printf("AMX: %s\n", what);
  std::exit(1);
}

inline Tile& tile(int number) {
  require(configured, "a tile is used without a configuration");
  require(number >= 0 && number < 8 && tiles[number].rows > 0, "a tile is used that has no size");
  return tiles[number];
}

inline void load_config(const void* memory) {
  const auto* bytes = static_cast<const uint8_t*>(memory);
  require(bytes[0] == 1 && bytes[1] == 0, "palette 1 and row 0 were expected");
  for (int i = 2; i < 16; ++i) require(bytes[i] == 0, "reserved bytes of the configuration must be 0");
  for (int i = 0; i < 8; ++i) {
    uint16_t columns;
    std::memcpy(&columns, bytes + 16 + 2 * i, 2);
    tiles[i] = Tile{bytes[48 + i], columns, {}};
    require(tiles[i].rows <= 16 && tiles[i].bytes <= 64, "a tile is too large");
  }
  for (int i = 8; i < 16; ++i) require(bytes[48 + i] == 0, "there are 8 tiles");
  configured = true;
}

inline void zero(int number) { std::memset(tile(number).data, 0, sizeof tile(number).data); }

inline void load(int number, const void* from, int64_t stride) {
  zero(number);
  for (int row = 0; row < tile(number).rows; ++row) {
    std::memcpy(tile(number).data[row], static_cast<const char*>(from) + row * stride, tile(number).bytes);
  }
}

inline void store(int number, void* to, int64_t stride) {
  for (int row = 0; row < tile(number).rows; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, tile(number).data[row], tile(number).bytes);
  }
}

// sums += signed a times unsigned b, modulo 2^32
inline void multiply(int sums, int a, int b) {
  Tile &to = tile(sums), &left = tile(a), &right = tile(b);
  require(to.rows == left.rows && to.bytes == right.bytes && left.bytes == 4 * right.rows, "sizes do not fit");
  for (int row = 0; row < to.rows; ++row) {
    for (int column = 0; column < to.bytes / 4; ++column) {
      uint32_t sum;
      std::memcpy(&sum, to.data[row] + 4 * column, 4);
      for (int k = 0; k < left.bytes; ++k) {
        const int product = static_cast<int8_t>(left.data[row][k]) * right.data[k / 4][4 * column + k % 4];
        sum += static_cast<uint32_t>(product);
      }
      std::memcpy(to.data[row] + 4 * column, &sum, 4);
    }
  }
}

inline void release() { configured = false; }

}  // namespace amx

#define _tile_loadconfig amx::load_config
#define _tile_zero amx::zero
#define _tile_loadd amx::load
#define _tile_stored amx::store
#define _tile_dpbsud amx::multiply
#define _tile_release amx::release
