// y = x W^T in the matrix tiles of Intel processors (AMX), for W in bf16. A tile has 16 rows of 64 bytes; one
// instruction multiplies two tiles, and takes as long for one row of x as for 16. W is read in place. The summation order
// of an element of y does not depend on the number of rows.

#include <ATen/cpu/Utils.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>

namespace {

constexpr int TILE = 16;        // rows of a tile
constexpr int TILE_WIDTH = 32;  // bf16 numbers per row
using Pair = int32_t;           // two neighbouring bf16 numbers of a row of x

#if defined(CPU_CAPABILITY_AVX512) && defined(__AMX_BF16__)
constexpr bool TILES = true;
const bool MAY_USE_TILES = at::cpu::init_amx();  // asks the system for permission

// from [m, n] -> to [n, m], with row strides.
void transpose(const float* from, int64_t stride, float* to, int64_t to_stride, int64_t m, int64_t n) {
  if (std::min(m, n) >= 4) return at::vec::transpose_mxn<float>(from, stride, to, to_stride, m, n);
  for (int64_t i = 0; i < m; i++)  // at::vec would move 16 rows
    for (int64_t j = 0; j < n; j++) to[j * to_stride + i] = from[i * stride + j];
}

// x [m, k] in bf16 -> blocks of TILE rows, each [k / 2, TILE] pairs.
void pack(const at::BFloat16* x, int64_t m, int64_t k, Pair* to) {
  for (int64_t row = 0; row < m; row += TILE)
    transpose(
        reinterpret_cast<const float*>(x + row * k), k / 2, reinterpret_cast<float*>(to + row * k / 2), TILE,
        std::min<int64_t>(TILE, m - row), k / 2);
}

// The sums of two tiles of W's rows with one or two blocks of packed x: [block][tile][W's row, x's row].
void tile_sums(
    const Pair* x, const at::BFloat16* first, const at::BFloat16* second, int64_t k, bool two_blocks, float* sums) {
  const int64_t apart = k * static_cast<int64_t>(sizeof(*first));
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < k; i += TILE_WIDTH) {
    const Pair* const block = x + i / 2 * TILE;
    _tile_loadd(4, first + i, apart);
    _tile_loadd(5, second + i, apart);
    _tile_loadd(6, block, TILE * sizeof(Pair));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if (two_blocks) {
      _tile_loadd(7, block + k / 2 * TILE, TILE * sizeof(Pair));
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, TILE * sizeof(float));
  _tile_stored(1, sums + TILE * TILE, TILE * sizeof(float));
  _tile_stored(2, sums + 2 * TILE * TILE, TILE * sizeof(float));
  _tile_stored(3, sums + 3 * TILE * TILE, TILE * sizeof(float));
}

// Columns [at, end) of y [m, ..] with row stride `stride`: one or two blocks of packed x [m, k] by W [n, k].
void tile_block(
    int64_t m, const Pair* x, const at::BFloat16* w, float* y, int64_t n, int64_t k, int64_t stride, int64_t at,
    int64_t end) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
  } shapes;
  asm volatile("" ::"m"(shapes) : "memory");  // GCC does not know what the instructions for tiles read
  _tile_loadconfig(&shapes);
  alignas(64) float sums[4][TILE * TILE];
  const auto start = [&](int64_t j) { return std::min(j, n - TILE); };  // the last tile must not reach behind W
  for (; at < end; at += 2 * TILE) {
    tile_sums(x, w + start(at) * k, w + start(at + TILE) * k, k, m > TILE, *sums);
    for (int64_t i = 0; i < m; i += TILE)
      for (int64_t j = at; j < std::min(end, at + 2 * TILE); j += TILE)
        transpose(
            sums[(2 * i + j - at) / TILE] + (j - start(j)) * TILE, TILE, y + i * stride + j, stride,
            std::min<int64_t>(TILE, end - j), std::min<int64_t>(TILE, m - i));
  }
  _tile_release();
}
#else
constexpr bool TILES = false;
constexpr bool MAY_USE_TILES = false;
void pack(const at::BFloat16* x, int64_t m, int64_t k, Pair* to);
void tile_block(
    int64_t m, const Pair* x, const at::BFloat16* w, float* y, int64_t n, int64_t k, int64_t stride, int64_t at,
    int64_t end);
#endif

}  // namespace
