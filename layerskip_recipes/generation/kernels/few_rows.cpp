// y = x W^T for few rows of x: sums in fp32; W may be bf16 or int8.
//
// A BLAS is made for large matrices: it copies W into an order of its own first, which for a handful of rows takes as
// long as the product. Here each row of W is read once, as it lies in memory, for all rows of x. An element of y is
// summed in one order whatever the number of rows: verification computes what plain steps compute, to the last bit.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <initializer_list>
#include <vector>

namespace {

using Vector = at::vec::Vectorized<float>;
constexpr int LANES = Vector::size();
#ifdef CPU_CAPABILITY_AVX2
constexpr int SUMS = 12, BLOCK = 6;  // sums at a time, in 12 of 16 registers, and the most rows of x
#else
constexpr int SUMS = LANES, BLOCK = std::min(8, LANES);
#endif
using Totals = std::array<Vector, SUMS>;
constexpr int WIDE = 8192;  // numbers of x at a time, 32 kB: they stay in the processor's second cache while weights pass
constexpr int PIECE = 1024;
constexpr double SLOWEST = 4e9;  // bytes read from memory, and products, in a second by the slowest machine
constexpr int FEWEST_ALONE = 128, MOST_ALONE = 65536;  // calls on one thread after one that was late
constexpr int AHEAD = 8192;  // bytes of weights that are fetched ahead of those that are multiplied, in each row of W
constexpr int IN_ORDER = 16384;  // rows of W that take no more bytes together are fetched one after the other, so far ahead

// v, read once: a compiler would read it from memory again for each product, and reading is what these wait for.
[[gnu::always_inline]] inline Vector in_register(const Vector& v) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512 lanes = v;
  asm("" : "+v"(lanes));
  return lanes;
#elif defined(CPU_CAPABILITY_AVX2)
  __m256 lanes = v;
  asm("" : "+x"(lanes));
  return lanes;
#else
  return v;
#endif
}

[[gnu::always_inline]] inline Vector load(const float* weights) { return Vector::loadu(weights); }

[[gnu::always_inline]] inline Vector load(const int8_t* weights) {
#if defined(CPU_CAPABILITY_AVX512)
  return Vector(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights)))));
#elif defined(CPU_CAPABILITY_AVX2)
  return Vector(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(weights)))));
#else
  float wide[LANES];
  std::copy_n(weights, LANES, wide);
  return Vector::loadu(wide);
#endif
}

[[gnu::always_inline]] inline Vector load(const at::BFloat16* weights) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights));
  return Vector(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weights));
  return Vector(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)));
#else
  float wide[LANES];
  std::copy_n(weights, LANES, wide);
  return Vector::loadu(wide);
#endif
}

template <typename W>
[[gnu::always_inline]] inline void fetch(const W* weights, int64_t ahead = AHEAD) {
  __builtin_prefetch(reinterpret_cast<const char*>(weights) + ahead);
}

#ifndef CPU_CAPABILITY_AVX2
// One level of `sums`: lanes that are `distance` apart, of a in the lanes without that bit and of b in those with it.
template <int distance>
[[gnu::always_inline]] inline Vector pairs(const Vector& a, const Vector& b) {
#ifdef CPU_CAPABILITY_AVX512
  // One shuffle: what stays in its lane is a blend, which more of a processor's ports can do.
  alignas(64) static constexpr auto other = [] {
    std::array<int, LANES> lanes{};
    for (int i = 0; i < LANES; i++) lanes[i] = i & distance ? (i ^ distance) + LANES : i ^ distance;
    return lanes;
  }();
  constexpr __mmask16 of_b = distance == 8 ? 0xff00 : distance == 4 ? 0xf0f0 : distance == 2 ? 0xcccc : 0xaaaa;
  const __m512i index = _mm512_load_si512(other.data());
  return Vector(_mm512_mask_blend_ps(of_b, a, b)) + Vector(_mm512_permutex2var_ps(a, index, b));
#else
  const auto [even, odd] = at::vec::deinterleave2(a, b);
  return even + odd;
#endif
}

// The sums of COUNT vectors (at last of LANES / COUNT lanes of each), in the order of their numbers. In pairs: one after
// the other would take as long as what is summed, where a row of W is short.
template <int COUNT>
[[gnu::always_inline]] inline Vector halves(const std::array<Vector, COUNT>& v) {
  if constexpr (COUNT == 1) {
    return v[0];
  } else {
    std::array<Vector, COUNT / 2> half;
#pragma GCC unroll 16
    for (int i = 0; i < COUNT / 2; i++) half[i] = pairs<LANES / COUNT>(v[2 * i], v[2 * i + 1]);
    return halves<COUNT / 2>(half);
  }
}
#endif

// The sums of the first COUNT vectors. Each is added up in the same order whatever their number.
template <int COUNT>
[[gnu::always_inline]] inline void sums(const Totals& v, float* out) {
#ifdef CPU_CAPABILITY_AVX2
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; i += 4) {
    const __m256 four = _mm256_hadd_ps(_mm256_hadd_ps(v[i], v[i + 1]), _mm256_hadd_ps(v[i + 2], v[i + 3]));
    _mm_storeu_ps(out + i, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
  }
#else
  halves<LANES>(v).store(out);
#endif
}

// total += the products of `count` elements of M rows of x and N rows of w, in LANES parts of each sum. From one row of x
// to the next it is `step`, of w `k`, and it is `ahead` bytes to the weights that come after these. Memory streams faster
// if these are fetched `in_order`, one row after the other, than from N places in turn.
template <int M, int N, typename W>
[[gnu::always_inline]] inline void add(
    const float* x, const W* w, int64_t count, int64_t k, int64_t step, int64_t ahead, bool in_order,
    Totals& total) {
  static_assert(M * N <= SUMS);
  constexpr int LINE = std::max<int>(64 / sizeof(W), LANES);  // so many weights are a line of the cache, fetched once
  const auto multiply = [&](int64_t i) __attribute__((always_inline)) {
    if constexpr (M < N) {  // of the two, those that are fewer stay in registers
      std::array<Vector, M> rows;
      for (int m = 0; m < M; m++) rows[m] = in_register(Vector::loadu(x + m * step + i));
      for (int n = 0; n < N; n++) {
        const Vector weights = in_register(load(w + n * k + i));
        for (int m = 0; m < M; m++) total[m * N + n] = at::vec::fmadd(weights, rows[m], total[m * N + n]);
      }
    } else {
      std::array<Vector, N> weights;
      for (int n = 0; n < N; n++) weights[n] = in_register(load(w + n * k + i));
      for (int m = 0; m < M; m++) {
        const Vector row = in_register(Vector::loadu(x + m * step + i));
        for (int n = 0; n < N; n++) total[m * N + n] = at::vec::fmadd(weights[n], row, total[m * N + n]);
      }
    }
  };
  const int64_t of_line = in_order ? N : 1, of_row = in_order ? LINE : k;
  int64_t i = 0;
  for (; i + LINE <= count; i += LINE) {
    for (int n = 0; n < N; n++) fetch(w + of_line * i + of_row * n, ahead);
#pragma GCC unroll 4
    for (int j = 0; j < LINE; j += LANES) multiply(i + j);
  }
  for (; i < count; i += LANES) multiply(i);
}

[[gnu::always_inline]] inline Totals zeros() {
  Totals total;
#pragma GCC unroll 16
  for (int j = 0; j < SUMS; j++) total[j] = Vector(0.f);
  return total;
}

// The M x N sums, to y, whose rows are `stride` apart.
template <int M, int N>
[[gnu::always_inline]] inline void write(const Totals& total, float* y, int64_t stride) {
  float out[SUMS];
  sums<M * N>(total, out);
  for (int m = 0; m < M; m++) std::copy_n(out + m * N, N, y + m * stride);
}

// M rows of x by N rows of w, all of width k, a multiple of LANES. For one row of x, four rows of w are read at a time:
// memory streams slower from 16 places at once.
template <int M, int N, typename W>
void tile(const float* x, const W* w, float* y, int64_t k, int64_t step, int64_t stride) {
  constexpr int AT_ONCE = M == 1 ? std::min(4, N) : N;
  const bool in_order = AT_ONCE * k * static_cast<int64_t>(sizeof(W)) <= IN_ORDER;
  Totals total = zeros();
#pragma GCC unroll 4
  for (int n = 0; n < N; n += AT_ONCE) {
    Totals part = zeros();
    add<M, AT_ONCE>(x, w + n * k, k, k, step, in_order ? IN_ORDER : AHEAD, in_order, part);
#pragma GCC unroll 16
    for (int i = 0; i < M * AT_ONCE; i++) total[n + i] = part[i];
  }
  write<M, N>(total, y, stride);
}

// As many tiles, where rows of x are so wide that a cache next to the processor does not hold them: a piece of each row
// by all columns, then the next piece. Each element is summed in the same order as in one tile.
template <int M, int N, typename W>
void wide_tiles(
    int64_t tiles, const float* x, const W* w, float* y, int64_t k, int64_t step, int64_t stride) {
  std::vector<Totals> totals(tiles, zeros());
  for (int64_t i = 0; i < k; i += PIECE)
    for (int64_t t = 0; t < tiles; t++) {
      Totals total = totals[t];
      add<M, N>(
          x + i, w + t * N * k + i, std::min<int64_t>(PIECE, k - i), k, step, N * k * static_cast<int64_t>(sizeof(W)),
          false, total);
      totals[t] = total;
    }
  for (int64_t t = 0; t < tiles; t++) write<M, N>(totals[t], y + t * N, stride);
}

// `rows` <= M rows of x by all `columns` rows of w; from one row of x to the next it is `step`, of y `stride`.
template <int M, typename W>
void block(
    int64_t rows, const float* x, const W* w, float* y, int64_t k, int64_t columns, int64_t step, int64_t stride) {
  if constexpr (M > 1) {
    if (rows < M) return block<M - 1>(rows, x, w, y, k, columns, step, stride);
  }
  constexpr int N = SUMS / M;
  int64_t n = 0;
  if (M * k > WIDE) {
    n = columns / N * N;
    wide_tiles<M, N>(columns / N, x, w, y, k, step, stride);
  }
  for (; n + N <= columns; n += N) tile<M, N>(x, w + n * k, y + n, k, step, stride);
  if constexpr (N > 4)
    for (; n + 4 <= columns; n += 4) tile<M, 4>(x, w + n * k, y + n, k, step, stride);
  for (; n < columns; n++) tile<M, 1>(x, w + n * k, y + n, k, step, stride);
}

// Columns [first, end) of y [m, n] = x W^T, `grain` at a time: x [m, k], w [.., k] from the row of column `first` on.
template <typename W>
void block_columns(
    const float* x, const W* w, float* y, int64_t m, int64_t k, int64_t n, int64_t first, int64_t end, int64_t grain) {
  const int64_t blocks = (m + BLOCK - 1) / BLOCK, size = (m + blocks - 1) / blocks;
  for (int64_t at = first; at < end; at += grain)
    for (int64_t row = 0; row < m; row += size)
      block<BLOCK>(
          std::min(size, m - row), x + row * k, w + (at - first) * k, y + row * n + at, k,
          std::min(grain, end - at), k, n);
}

// f(first, end) for parts of [0, n), `grain` or more at a time, by all threads. On a core that another program keeps busy a
// thread may wait for milliseconds, and then all wait for this one: after such a call the next ones run on one thread, and
// twice as many each time.
thread_local int64_t alone = 0, next_alone = FEWEST_ALONE;

template <typename F>
void in_parallel(int64_t n, int64_t grain, double bytes, double products, const F& f) {
  if (alone > 0 || at::get_num_threads() == 1) {
    alone = std::max<int64_t>(alone - 1, 0);
    return f(0, n);
  }
  const auto started = std::chrono::steady_clock::now();
  at::parallel_for(0, n, grain, f);
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - started;
  const bool late = taken.count() > 1e-3 + (bytes + products) / SLOWEST;
  alone = late ? next_alone : 0;
  next_alone = late ? std::min<int64_t>(2 * next_alone, MOST_ALONE) : std::max<int64_t>(next_alone / 2, FEWEST_ALONE);
}

// y = x W^T + bias of a weight W [n, k] in fp32, bf16 or int8, k a multiple of LANES; int8 has a scale for each row of W.
struct Linear {
  at::Tensor weight, scale, bias;

  int64_t columns() const { return weight.size(0); }
  explicit operator bool() const { return weight.defined(); }

  // Columns [first, end) of y [m, ..], whose rows are `stride` apart and begin with this product's column 0.
  void operator()(
      const float* x, float* y, int64_t m, int64_t stride, int64_t first, int64_t end, int64_t grain) const {
    const int64_t k = weight.size(1), skipped = first * k;
    if (weight.scalar_type() == at::kChar)
      block_columns(x, weight.const_data_ptr<int8_t>() + skipped, y, m, k, stride, first, end, grain);
    else if (weight.scalar_type() == at::kBFloat16)
      block_columns(x, weight.const_data_ptr<at::BFloat16>() + skipped, y, m, k, stride, first, end, grain);
    else
      block_columns(x, weight.const_data_ptr<float>() + skipped, y, m, k, stride, first, end, grain);
    if (end <= first || !(scale.defined() || bias.defined())) return;
    const Vector one(1.f), zero(0.f);
    for (int64_t row = 0; row < m; row++)
      for (int64_t i = first; i < end; i += LANES) {
        const int64_t count = std::min<int64_t>(LANES, end - i);
        float* const at = y + row * stride + i;
        const Vector factor = scale.defined() ? Vector::loadu(scale.const_data_ptr<float>() + i, count) : one;
        const Vector added = bias.defined() ? Vector::loadu(bias.const_data_ptr<float>() + i, count) : zero;
        at::vec::fmadd(Vector::loadu(at, count), factor, added).store(at, count);
      }
  }
};

// x [m, k] by each of `linears` [n_i, k] -> y [m, n_0 + n_1 + ..]: side by side what each gives alone.
void multiply(const float* x, int64_t m, std::initializer_list<const Linear*> linears, float* y) {
  const at::Tensor& any = (*linears.begin())->weight;
  const int64_t k = any.size(1);
  int64_t n = 0;
  for (const Linear* linear : linears) n += linear->columns();
  // A thread pays from some 32 or 64 kB of weights, and what it takes at a time stays in its cache for all rows of x.
  const int64_t bytes = k * static_cast<int64_t>(any.element_size());
  // Whole tiles, but one row reads wide weights best as they lie, one column after the other.
  const int64_t fit = (m < 4 ? 65536 : 32768) / bytes;
  const int64_t grain = m == 1 && fit < SUMS ? std::max<int64_t>(fit, 1) : std::max<int64_t>(fit / SUMS, 1) * SUMS;
  in_parallel(n, grain, static_cast<double>(n * bytes), static_cast<double>(m * n * k), [&](int64_t first, int64_t end) {
    int64_t before = 0;  // columns of the matrices so far
    for (const Linear* linear : linears) {
      const int64_t from = std::max(first, before) - before, last = std::min(end - before, linear->columns());
      (*linear)(x, y + before, m, n, from, last, grain);
      before += linear->columns();
    }
  });
}

}  // namespace
