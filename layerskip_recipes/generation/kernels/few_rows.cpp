// y = x W^T for few rows of x; W is fp32, bf16, int8 or int4. Compiled in one file with tiles.cpp and four_bits.cpp, after
// them: where the processor has tiles, they multiply by bf16 weights. With AVX-512 bf16 instructions, products with a bf16 W take x rounded to bf16,
// as torch does, and compute two at a time. If x is to be rounded to int8 as well, AVX-512 VNNI instructions compute four
// at a time, with int32 sums.
//
// A BLAS repacks W first, which for a few rows takes as long as the product. This code reads each row of W once, in
// place, for all rows of x. The summation order of an element of y does not depend on the number of rows, so
// verification and plain steps give the same bits.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

// Accumulators, and the most rows of x per block: weights stream from memory once per block. `write` takes GROUP sums.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int SUMS = 27, BLOCK = 10, GROUP = LANES;  // of 32 registers
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int SUMS = 12, BLOCK = 6, GROUP = 4;  // of 16 registers
#else
constexpr int SUMS = LANES, BLOCK = std::min(8, LANES), GROUP = LANES;
#endif
// Rows of W in a tile with m rows of x: few, since memory streams slower from more places.
constexpr int tile_rows(int m) { return (m <= 8 ? std::min(SUMS, 16) : SUMS) / m; }
template <int COUNT>
using Totals = std::array<Vector, (COUNT + GROUP - 1) / GROUP * GROUP>;
constexpr int IN_L1 = 28000;  // bytes of x that stay in the L1 cache while weights stream past
constexpr int FEWEST_ROWS = std::min(4, BLOCK);  // of wide x; with less, the weights stream too often
constexpr int IN_L2 = 131072;  // bytes of weights that stay in the L2 cache for all blocks of x
constexpr int APART = 64;  // bytes between rows of x: rows a power of two apart would share few places of the L1 cache
constexpr double SLOWEST = 4e9;  // bytes read, and products, per second on the slowest machine
constexpr int FEWEST_ALONE = 16, MOST_ALONE = 65536;  // single-threaded calls after a late one
constexpr int AHEAD = 8192;  // prefetch distance in each row of W, in bytes
constexpr int IN_ORDER = 16384;  // a tile of W of at most this many bytes is prefetched row after row, this far ahead
// Whether the fewest rows of x take W row by row: AMD's own prefetcher follows one place best, and ours slows it down.
#if defined(__x86_64__)
const bool ROW_BY_ROW = __builtin_cpu_is("amd");
#else
constexpr bool ROW_BY_ROW = false;
#endif

// f(0), .., f(N - 1) with constants: the compiler keeps arrays in registers only if all their indices are constants.
template <typename F, int... i>
[[gnu::always_inline]] inline void unrolled(const F& f, std::integer_sequence<int, i...>) {
  (f(std::integral_constant<int, i>()), ...);
}
template <int N, typename F>
[[gnu::always_inline]] inline void unrolled(const F& f) {
  unrolled(f, std::make_integer_sequence<int, N>());
}
#define INLINE __attribute__((always_inline))

// Keeps v in a register: the compiler would reload it for each product, and loads are the bottleneck.
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

// LANES weights as fp32.
template <typename W>
[[gnu::always_inline]] inline Vector load_fp32(const W* weights) {
  if constexpr (std::is_same_v<W, float>) {
    return Vector::loadu(weights);
  } else if constexpr (std::is_same_v<W, at::BFloat16>) {
    Vector wide;
    at::vec::load_fp32_from_bf16(weights, wide);
    return wide;
  } else {
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
}

[[gnu::always_inline]] inline Vector fmadd(const Vector& a, const Vector& b, const Vector& sum) {
  return at::vec::fmadd(a, b, sum);
}

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
constexpr bool BF16_PRODUCTS = true;
using Pairs = __m512bh;

// Adds both products of each lane to `sum`.
[[gnu::always_inline]] inline Vector fmadd(Pairs a, Pairs b, const Vector& sum) {
  return Vector(_mm512_dpbf16_ps(sum, a, b));
}
#else
constexpr bool BF16_PRODUCTS = false;
using Pairs = void;  // not used
#endif

#if defined(CPU_CAPABILITY_AVX512)
// Two neighbouring bf16 numbers in each lane, or four int8 numbers; with `half`, only LANES numbers and zeros.
template <typename T, bool half>
[[gnu::always_inline]] inline auto load_packed(const T* numbers, std::bool_constant<half>) {
  __m512i packed;
  if constexpr (!half)
    packed = _mm512_loadu_si512(numbers);
  else if constexpr (sizeof(T) == 2)
    packed = _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers)));
  else
    packed = _mm512_zextsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers)));
  asm("" : "+v"(packed));  // see `in_register`
  return (std::conditional_t<sizeof(T) == 2, Pairs, __m512i>)packed;
}
#endif

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512VNNI__)
using Int8Of = uint8_t;  // rows of x as integers plus 128, since the instruction multiplies unsigned by signed numbers

// Adds the four products of each lane to the int32 sums.
[[gnu::always_inline]] inline Vector fmadd(__m512i weights, __m512i x, const Vector& sum) {
  return Vector(_mm512_castsi512_ps(_mm512_dpbusd_epi32(_mm512_castps_si512(sum), x, weights)));
}

// Stores integers from -128 to 127, plus 128.
inline void store_whole(const Vector& numbers, uint8_t* to) {
  const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(numbers), _mm512_set1_epi32(128));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(whole));
}

// int32 sums as fp32.
[[gnu::always_inline]] inline Vector to_fp32(const Vector& sum) {
  return Vector(_mm512_cvtepi32_ps(_mm512_castps_si512(in_register(sum))));
}
#else
using Int8Of = float;  // rows of x as integers: exact with fp32 sums
inline void store_whole(const Vector& numbers, float* to) { numbers.store(to); }
#endif

// Into the L2 cache: L1 takes fewer lines at a time, so products of several rows would wait for memory.
template <typename W>
[[gnu::always_inline]] inline void fetch(const W* weights, int64_t ahead = AHEAD) {
  __builtin_prefetch(reinterpret_cast<const char*>(weights) + ahead, 0, 2);
}

#ifndef CPU_CAPABILITY_AVX2
// One level of `sums`: adds lanes that are `distance` apart. Lanes with that bit hold sums of b, the others sums of a.
template <int distance>
[[gnu::always_inline]] inline Vector pairs(const Vector& a, const Vector& b) {
#ifdef CPU_CAPABILITY_AVX512
  // One shuffle and one blend: more execution ports can blend than shuffle.
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

// The sums of COUNT vectors, in order; pairwise, since sequential sums take as long as the product of a short row of W.
template <int COUNT, int first = 0, typename Vectors>
[[gnu::always_inline]] inline Vector halves(const Vectors& v) {
  if constexpr (COUNT == 1)
    return v[first];
  else
    return pairs<COUNT / 2>(halves<COUNT / 2, first>(v), halves<COUNT / 2, first + COUNT / 2>(v));
}
#endif

// total += x w^T over `count` columns of M rows of x (stride `step`) and N rows of w (stride k), as LANES partial sums.
// `ahead` is the prefetch distance in bytes; prefetching `in_order`, row after row, streams faster than N places in turn.
template <int M, int N, bool prefetches = true, typename X, typename W>
[[gnu::always_inline]] inline void add(
    const X* x, const W* w, int64_t count, int64_t k, int64_t step, int64_t ahead, bool in_order,
    Totals<M * N>& total) {
  static_assert(M * N <= SUMS);
  constexpr int LINE = std::max<int>(64 / sizeof(W), LANES);  // weights per cache line
  constexpr int PER_LANE = sizeof(float) / sizeof(X);
  const auto multiply = [&](int64_t i, auto half) INLINE {
    const auto load = [&](const auto* numbers) INLINE {
      if constexpr (PER_LANE > 1)
        return load_packed(numbers, half);
      else
        return in_register(load_fp32(numbers));
    };
    if constexpr (M < N) {  // the smaller side stays in registers
      std::array<decltype(load(x)), M> rows;
      unrolled<M>([&](auto m) INLINE { rows[m] = load(x + m * step + i); });
      unrolled<N>([&](auto n) INLINE {
        const auto weights = load(w + n * k + i);
        unrolled<M>([&](auto m) INLINE { total[m * N + n] = fmadd(weights, rows[m], total[m * N + n]); });
      });
    } else {
      std::array<decltype(load(w)), N> weights;
      unrolled<N>([&](auto n) INLINE { weights[n] = load(w + n * k + i); });
      unrolled<M>([&](auto m) INLINE {
        const auto row = load(x + m * step + i);
        unrolled<N>([&](auto n) INLINE { total[m * N + n] = fmadd(weights[n], row, total[m * N + n]); });
      });
    }
  };
  const int64_t of_line = in_order ? N : 1, of_row = in_order ? LINE : k;
  int64_t i = 0;
  for (; i + LINE <= count; i += LINE) {
    for (int n = 0; n < (prefetches ? N : 0); n++) fetch(w + of_line * i + of_row * n, ahead);
#pragma GCC unroll 4
    for (int j = 0; j < LINE; j += PER_LANE * LANES) multiply(i + j, std::false_type());
  }
  for (; i < count; i += LANES) multiply(i, std::true_type());
}

template <int COUNT>
[[gnu::always_inline]] inline Totals<COUNT> zeros() {
  Totals<COUNT> total;
  unrolled<std::tuple_size_v<Totals<COUNT>>>([&](auto i) INLINE { total[i] = Vector(0.f); });
  return total;
}

// Writes the M x N sums to y, with row stride `stride`. Their summation order does not depend on M and N.
template <int M, int N>
[[gnu::always_inline]] inline void write(const Totals<M * N>& total, float* y, int64_t stride) {
  float out[std::tuple_size_v<Totals<M * N>>];
  unrolled<std::tuple_size_v<Totals<M * N>> / GROUP>([&](auto group) INLINE {
    constexpr int first = group * GROUP;
#ifdef CPU_CAPABILITY_AVX2
    const __m256 low = _mm256_hadd_ps(total[first], total[first + 1]);
    const __m256 high = _mm256_hadd_ps(total[first + 2], total[first + 3]), four = _mm256_hadd_ps(low, high);
    _mm_storeu_ps(out + first, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
#else
    halves<GROUP, first>(total).store(out + first);
#endif
  });
  for (int m = 0; m < M; m++) std::copy_n(out + m * N, N, y + m * stride);
}

// M rows of x by N rows of w, of width k, a multiple of LANES, AT_ONCE rows of w at a time.
template <int M, int N, int AT_ONCE, bool prefetches = true, typename X, typename W>
void tile(const X* x, const W* w, float* y, int64_t k, int64_t step, int64_t stride) {
  const bool in_order = AT_ONCE * k * static_cast<int64_t>(sizeof(W)) <= IN_ORDER;
  Totals<M * N> total = zeros<M * N>();
  if constexpr (AT_ONCE == N)  // without copies, which cost a third of the time
    add<M, N, prefetches>(x, w, k, k, step, in_order ? IN_ORDER : AHEAD, in_order, total);
  else if constexpr (AT_ONCE == 1)
    for (int n = 0; n < N; n++) {
      Totals<M> part = zeros<M>();
      add<M, 1, prefetches>(x, w + n * k, k, k, step, 0, in_order, part);
      unrolled<M>([&](auto m) INLINE { total[m * N + n] = part[m]; });
    }
  else
    unrolled<N / AT_ONCE>([&](auto group) INLINE {
      constexpr int n = group * AT_ONCE;
      Totals<M * AT_ONCE> part = zeros<M * AT_ONCE>();
      add<M, AT_ONCE, prefetches>(x, w + n * k, k, k, step, in_order ? IN_ORDER : AHEAD, in_order, part);
      unrolled<M * AT_ONCE>([&](auto i) INLINE { total[i / AT_ONCE * N + n + i % AT_ONCE] = part[i]; });
    });
  if constexpr (sizeof(X) == 1) unrolled<M * N>([&](auto i) INLINE { total[i] = to_fp32(total[i]); });
  write<M, N>(total, y, stride);
}

// `rows` <= M rows of x (stride `step`) by all `columns` rows of w, to y (stride `stride`).
template <int M, typename X, typename W>
void block(int64_t rows, const X* x, const W* w, float* y, int64_t k, int64_t columns, int64_t step, int64_t stride) {
  if constexpr (M > 1) {
    if (rows < M) return block<M - 1>(rows, x, w, y, k, columns, step, stride);
  }
  constexpr int N = tile_rows(M);
  int64_t n = 0;
  // Memory streams fastest from one place, so one row of x, or two, take few rows of w at a time.
  if (ROW_BY_ROW && M <= 2)
    for (; n + N <= columns; n += N) tile<M, N, 1, false>(x, w + n * k, y + n, k, step, stride);
  else
    for (; n + N <= columns; n += N) tile<M, N, M == 1 ? std::min(4, N) : N>(x, w + n * k, y + n, k, step, stride);
  for (; n < columns; n++) tile<M, 1, 1>(x, w + n * k, y + n, k, step, stride);
}

// The size of the fewest equal blocks of m rows that have at most `most` rows.
int64_t equal_block(int64_t m, int64_t most) {
  const int64_t blocks = (m + most - 1) / most;
  return (m + blocks - 1) / blocks;
}

// f(first, end) for parts of [0, n) of at least `grain`, on all threads; `work` counts bytes read and products.
// A thread whose core runs another program may stall all others for milliseconds. After such a late call the next calls
// run on one thread, each time twice as many.
thread_local int64_t alone = 0, next_alone = FEWEST_ALONE;

template <typename F>
void in_parallel(int64_t n, int64_t grain, double work, const F& f) {
  if (alone > 0 || at::get_num_threads() == 1) {
    alone = std::max<int64_t>(alone - 1, 0);
    return f(0, n);
  }
  const auto started = std::chrono::steady_clock::now();
  at::parallel_for(0, n, grain, f);
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - started;
  const bool late = taken.count() > 1e-3 + work / SLOWEST;
  alone = late ? next_alone : 0;
  next_alone = late ? std::min<int64_t>(2 * next_alone, MOST_ALONE) : std::max<int64_t>(next_alone / 2, FEWEST_ALONE);
}

// y = x W^T + bias; W [n, k] is fp32, bf16 or int8 with a scale per row, k a multiple of LANES. If the sums of W's rows
// are given, x is rounded to int8. Or W is int4, as four_bits.cpp takes it.
struct Linear {
  at::Tensor weight, scale, bias, sums;

  bool is_int4() const { return weight.scalar_type() == at::kByte; }
  int64_t columns() const { return is_int4() ? sums.size(0) : weight.size(0); }
  int64_t width() const { return weight.size(1) * (is_int4() ? COLUMNS : 1); }
  explicit operator bool() const { return weight.defined(); }

  // Columns [first, end) of y [m, ..] with row stride `stride`, `grain` at a time, for blocks of `size` rows of x, with
  // row stride `step`; x in bf16, packed or not, needs weights in bf16. `units` [m] are factors of integer rows of x, or
  // null.
  template <typename X>
  void operator()(
      const X* x, const float* units, int64_t step, float* y, int64_t m, int64_t size, int64_t stride, int64_t first, int64_t end,
      int64_t grain) const {
    const int64_t k = weight.size(1);
    const auto multiply_by = [&](const auto* w) {
      for (int64_t at = first; at < end; at += grain)
        for (int64_t row = 0; row < m; row += size) {
          const int64_t rows = std::min(size, m - row), count = std::min(grain, end - at);
          if constexpr (std::is_same_v<X, Pair>)
            tile_block(rows, x + row * step, w, y + row * stride, columns(), k, stride, at, at + count);
          else
            block<BLOCK>(rows, x + row * step, w + at * k, y + row * stride + at, k, count, step, stride);
        }
    };
    if constexpr (!std::is_same_v<X, float>)
      multiply_by(weight.const_data_ptr<std::conditional_t<sizeof(X) == 1, int8_t, at::BFloat16>>());
    else if (weight.scalar_type() == at::kChar)
      multiply_by(weight.const_data_ptr<int8_t>());
    else if (weight.scalar_type() == at::kBFloat16)
      multiply_by(weight.const_data_ptr<at::BFloat16>());
    else
      multiply_by(weight.const_data_ptr<float>());
    if (!scale.defined() && !bias.defined()) return;
    for (int64_t row = 0; row < m; row++)
      for (int64_t i = first; i < end; i += LANES) {
        const int64_t count = std::min<int64_t>(LANES, end - i);
        float* const at = y + row * stride + i;
        Vector sum = Vector::loadu(at, count);
        if (sizeof(X) == 1)  // x was 128 too large
          sum = sum - Vector(128.f) * Vector::loadu(sums.const_data_ptr<float>() + i, count);
        Vector factor = scale.defined() ? Vector::loadu(scale.const_data_ptr<float>() + i, count) : Vector(1.f);
        if (units != nullptr) factor = factor * Vector(units[row]);
        const Vector added = bias.defined() ? Vector::loadu(bias.const_data_ptr<float>() + i, count) : Vector(0.f);
        at::vec::fmadd(sum, factor, added).store(at, count);
      }
  }
};

// Room for n numbers, from the start of a cache line; until the next call in this thread. Every product needs it.
template <typename X>
X* kept_room(int64_t n) {
  static thread_local at::Tensor room;
  if (!room.defined() || room.numel() < n) room = at::empty({n}, c10::CppTypeToScalarType<X>::value);
  return room.mutable_data_ptr<X>();
}

// The rows of x [m, k] with stride `step`, as X.
template <typename X>
const X* rows_as(const float* x, int64_t m, int64_t k, int64_t step) {
  X* const to = kept_room<X>(m * step);
  for (int64_t row = 0; row < m; row++) at::vec::convert(x + row * k, to + row * step, k);
  return to;
}

// The rows of x [m, k] with stride `step` as integers from -128 to 127 (torchao's symmetric quantisation per token); row i
// of x is about the integers times units[i].
const Int8Of* int8_rows(const float* x, int64_t m, int64_t k, int64_t step, float* units) {
  Int8Of* const to = kept_room<Int8Of>(m * step);
  for (int64_t row = 0; row < m; row++) {
    const float largest = at::vec::map_reduce_all<float>(
        [](Vector a) { return a.abs(); }, [](Vector a, Vector b) { return at::vec::maximum(a, b); }, x + row * k, k);
    units[row] = std::max(largest / 127.5f, 1e-12f);
    const Vector inverse(1.f / units[row]), least(-128.f), most(127.f);
    for (int64_t i = 0; i < k; i += LANES) {
      const Vector whole = at::vec::clamp((Vector::loadu(x + row * k + i) * inverse).round(), least, most);
      store_whole(whole, to + row * step + i);
    }
  }
  return to;
}

// Blocks first .. end - 1 of 16 rows of an int4 W: y = x W^T + bias for all m rows of x, `size` at a time; `to` is y's
// first column of W, with row stride `stride`.
template <typename S>
void int4_columns(
    const Linear& linear, const S* scales, const RoundedRows& x, int64_t m, int64_t size, int64_t first, int64_t end,
    float* to, int64_t stride) {
  const int64_t k = linear.width(), groups = linear.scale.size(1), columns = linear.columns();
  const int64_t whole = std::min(end, columns / SIDE);  // blocks; a last one may have fewer rows
  const uint8_t* const w = linear.weight.const_data_ptr<uint8_t>();
  const auto product = [&](int64_t row, int64_t block, int64_t count, float* y, int64_t apart) {
    int4_block<MOST_INT4_ROWS>(
        std::min(size, m - row), x, row, w + block * SIDE * k / 2, scales + block * SIDE * groups, k, groups, count, y,
        apart);
  };
  for (int64_t row = 0; row < m; row += size) {
    if (first < whole) product(row, first, whole - first, to + row * stride + first * SIDE, stride);
    if (whole < end) {
      float part[MOST_INT4_ROWS * SIDE];
      product(row, whole, 1, part, SIDE);
      for (int64_t i = 0; i < std::min(size, m - row); i++)
        std::copy_n(part + i * SIDE, columns - whole * SIDE, to + (row + i) * stride + whole * SIDE);
    }
  }
  for (int64_t row = 0; row < m; row++)
    for (int64_t i = first * SIDE; i < std::min(end * SIDE, columns); i += LANES) {
      const int64_t count = std::min<int64_t>(LANES, columns - i);
      float* const at = to + row * stride + i;
      const Vector zeros = Vector(x.zeros[row]) * Vector::loadu(linear.sums.const_data_ptr<float>() + i, count);
      const Vector bias =
          linear.bias.defined() ? Vector::loadu(linear.bias.const_data_ptr<float>() + i, count) : Vector(0.f);
      at::vec::fmadd(Vector::loadu(at, count) - zeros, Vector(x.units[row]), bias).store(at, count);
    }
}

// `multiply` for int4 weights.
void multiply_int4(const float* x, int64_t m, std::initializer_list<const Linear*> linears, float* y) {
  static thread_local RoundedRows rows;
  const Linear& any = **linears.begin();
  const int64_t k = any.width(), bytes = SIDE * k / 2, size = equal_block(m, MOST_INT4_ROWS);
  int64_t n = 0, blocks = 0;
  for (const Linear* linear : linears) n += linear->columns(), blocks += linear->weight.size(0);
  rows.round(x, m, k, any.scale.size(1));
  const RoundedRows& rounded = rows;  // other threads have `rows` of their own
  const int64_t least = std::max<int64_t>((m < 4 ? 65536 : 32768) / bytes, 1);  // a thread pays off from there
  const int64_t grain = m > size ? std::max<int64_t>(IN_L2 / bytes, 1) : blocks;
  in_parallel(blocks, least, static_cast<double>(n * k / 2 + m * n * k), [&](int64_t first, int64_t end) {
    int64_t before = 0;  // blocks of the matrices before
    float* to = y;
    for (const Linear* linear : linears) {
      const int64_t last = std::min(end - before, linear->weight.size(0));
      for (int64_t at = std::max<int64_t>(first - before, 0); at < last; at += grain) {
        const auto columns = [&](const auto* scales) {
          int4_columns(*linear, scales, rounded, m, size, at, std::min(at + grain, last), to, n);
        };
        if (linear->scale.scalar_type() == at::kBFloat16)
          columns(linear->scale.const_data_ptr<at::BFloat16>());
        else
          columns(linear->scale.const_data_ptr<float>());
      }
      before += linear->weight.size(0);
      to += linear->columns();
    }
  });
}

// x [m, k] by each of `linears` [n_i, k] -> y [m, n_0 + n_1 + ..], the products side by side. All or none are int4.
template <bool bf16_products = BF16_PRODUCTS>
void multiply(const float* x, int64_t m, std::initializer_list<const Linear*> linears, float* y) {
  if ((*linears.begin())->is_int4()) return multiply_int4(x, m, linears, y);
  const at::Tensor& any = (*linears.begin())->weight;
  const int64_t k = any.size(1), bytes = k * static_cast<int64_t>(any.element_size());
  int64_t n = 0;
  for (const Linear* linear : linears) n += linear->columns();
  const auto multiply_by = [&](const auto* x, int64_t step, const float* units = nullptr) {
    const int64_t fit = IN_L1 / (k * static_cast<int64_t>(sizeof(*x)));
    constexpr bool packed = std::is_same_v<decltype(x), const Pair*>;
    const int64_t size = packed ? 2 * TILE : equal_block(m, std::clamp<int64_t>(fit, FEWEST_ROWS, BLOCK));
    const int64_t tile = packed ? 2 * TILE : tile_rows(size);
    // Whole tiles of about so many bytes. For a single row wide weights stream best column by column.
    const auto columns = [&](int64_t of_bytes) {
      const int64_t whole = std::max<int64_t>(of_bytes / bytes / tile, 1) * tile;
      return m == 1 && !packed ? std::max<int64_t>(std::min(of_bytes / bytes, whole), 1) : whole;
    };
    // A thread pays off from 32 or 64 kB of weights.
    const int64_t least = columns(m < 4 ? 65536 : 32768), grain = m > size ? columns(IN_L2) : least;
    in_parallel(n, least, static_cast<double>(n * bytes + m * n * k), [&](int64_t first, int64_t end) {
      int64_t offset = 0;  // the matrix's first column in y
      for (const Linear* linear : linears) {
        const int64_t from = std::max(first, offset) - offset, last = std::min(end - offset, linear->columns());
        (*linear)(x, units, step, y + offset, m, size, n, from, last, grain);
        offset += linear->columns();
      }
    });
  };
  if constexpr (bf16_products) {
    const auto is_bf16 = [](const Linear* linear) { return linear->weight.scalar_type() == at::kBFloat16; };
    if (std::all_of(linears.begin(), linears.end(), is_bf16)) {
      if constexpr (TILES) {
        const auto fits = [&](const Linear* linear) { return k % TILE_WIDTH == 0 && linear->columns() >= TILE; };
        if (MAY_USE_TILES && std::all_of(linears.begin(), linears.end(), fits)) {
          Pair* const to = kept_room<Pair>((m + TILE - 1) / TILE * TILE * k / 2);
          pack(rows_as<at::BFloat16>(x, m, k, k), m, k, to);
          return multiply_by(const_cast<const Pair*>(to), k / 2);
        }
      }
      return multiply_by(rows_as<at::BFloat16>(x, m, k, k + APART / 2), k + APART / 2);
    }
  }
  if (std::all_of(linears.begin(), linears.end(), [](const Linear* linear) { return linear->sums.defined(); })) {
    static thread_local std::vector<float> units;
    units.resize(m);
    const int64_t step = k + APART / static_cast<int64_t>(sizeof(Int8Of));
    return multiply_by(int8_rows(x, m, k, step, units.data()), step, units.data());
  }
  if (m == 1) return multiply_by(x, k);
  multiply_by(rows_as<float>(x, m, k, k + APART / 4), k + APART / 4);
}

}  // namespace
