// y = x W^T for few rows of x; W is int4 with a scale per group of columns, and x is rounded to int8. Compiled in one file
// with few_rows.cpp, before it.
//
// 16 rows of W stand side by side: a lane of a vector is a row of W, and takes four of its columns at a time. So sums need
// no shuffles, a group's weights are unpacked once for all rows of x, and the summation order of an element of y does not
// depend on the number of rows of x.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

namespace {

using Vector = at::vec::Vectorized<float>;
constexpr int LANES = Vector::size();
constexpr int SIDE = 16;           // rows of W side by side
constexpr int COLUMNS = 8;         // of these rows in 64 bytes: four in the low half bytes, four in the high ones
constexpr int MOST_INT4_ROWS = 10;  // of x per pass over W

// The rows of x [m, k] rounded to integers from -128 to 127, one unit and zero per row, as torchao rounds tokens
// asymmetrically: x is about units[i] * (whole[i] - zeros[i]) in row i.
struct RoundedRows {
  std::vector<int8_t> whole;  // with row stride `step`
  int64_t step = 0;
  std::vector<float> units, zeros;  // [m]
  std::vector<int32_t> sums;        // [m, groups], -8 times the sum of each group: W is stored plus 8

  void round(const float* x, int64_t m, int64_t k, int64_t groups) {
    step = k + 64;  // rows a power of two apart would share few places of the L1 cache
    whole.resize(m * step);
    units.resize(m);
    zeros.resize(m);
    sums.resize(m * groups);
    for (int64_t row = 0; row < m; row++, x += k) {
      const auto smaller = [](Vector a, Vector b) { return at::vec::minimum(a, b); };
      const auto larger = [](Vector a, Vector b) { return at::vec::maximum(a, b); };
      const float least = std::min(at::vec::reduce_all<float>(smaller, x, k), 0.f);
      const float most = std::max(at::vec::reduce_all<float>(larger, x, k), 0.f);
      const float unit = std::max((most - least) / 255.f, 0x1p-23f);
      const float zero = std::clamp(-128 - std::nearbyint(least / unit), -128.f, 127.f);
      int8_t* const to = whole.data() + row * step;
      const Vector inverse(1 / unit), shift(zero), lowest(-128.f), highest(127.f);
      for (int64_t i = 0; i < k; i += LANES) {
        float numbers[LANES];
        const Vector shifted = (Vector::loadu(x + i) * inverse).round() + shift;
        at::vec::clamp(shifted, lowest, highest).store(numbers);
        for (int lane = 0; lane < LANES; lane++) to[i + lane] = static_cast<int8_t>(numbers[lane]);
      }
      units[row] = unit, zeros[row] = zero;
      for (int64_t group = 0; group < groups; group++)
        sums[row * groups + group] = -8 * std::accumulate(to + group * (k / groups), to + (group + 1) * (k / groups), 0);
    }
  }
};

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512VNNI__)
// int32 sums of 16 rows of W, and fp32 ones.
struct Ints {
  __m512i lanes;
  Ints() = default;
  explicit Ints(int32_t number) : lanes(_mm512_set1_epi32(number)) {}
};
struct Floats {
  __m512 lanes = _mm512_setzero_ps();
  void add(const Ints& sums, __m512 scale) { lanes = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums.lanes), scale, lanes); }
  void store(float* to) const { _mm512_storeu_ps(to, lanes); }
};
__m512 load_scales(const float* scales) { return _mm512_loadu_ps(scales); }
__m512 load_scales(const at::BFloat16* scales) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Eight columns of W, from 0 to 15.
struct Weights {
  __m512i low, high;
  explicit Weights(const uint8_t* packed) {
    const __m512i both = _mm512_loadu_si512(packed), mask = _mm512_set1_epi8(15);
    low = _mm512_and_si512(both, mask);
    high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
  }
  // sums += these columns times x [8].
  void multiply(const int8_t* x, Ints& sums) const {
    int32_t first, second;
    std::memcpy(&first, x, 4);
    std::memcpy(&second, x + 4, 4);
    sums.lanes = _mm512_dpbusd_epi32(sums.lanes, low, _mm512_set1_epi32(first));
    sums.lanes = _mm512_dpbusd_epi32(sums.lanes, high, _mm512_set1_epi32(second));
  }
};
#elif defined(__AVX2__)
struct Ints {
  __m256i lanes[2];
  Ints() = default;
  explicit Ints(int32_t number) : lanes{_mm256_set1_epi32(number), _mm256_set1_epi32(number)} {}
};
struct Scales {
  __m256 lanes[2];
};
struct Floats {
  __m256 lanes[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  void add(const Ints& sums, const Scales& scale) {
    for (int i = 0; i < 2; i++)
      lanes[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums.lanes[i]), scale.lanes[i], lanes[i]);
  }
  void store(float* to) const {
    for (int i = 0; i < 2; i++) _mm256_storeu_ps(to + 8 * i, lanes[i]);
  }
};
Scales load_scales(const float* scales) { return {_mm256_loadu_ps(scales), _mm256_loadu_ps(scales + 8)}; }
Scales load_scales(const at::BFloat16* scales) {
  Scales wide;
  for (int i = 0; i < 2; i++) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + 8 * i));
    wide.lanes[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  return wide;
}

struct Weights {
  __m256i low[2], high[2];
  explicit Weights(const uint8_t* packed) {
    const __m256i mask = _mm256_set1_epi8(15);
    for (int i = 0; i < 2; i++) {
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed + 32 * i));
      low[i] = _mm256_and_si256(both, mask);
      high[i] = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
    }
  }
  void multiply(const int8_t* x, Ints& sums) const {
    int32_t first, second;
    std::memcpy(&first, x, 4);
    std::memcpy(&second, x + 4, 4);
    const __m256i ones = _mm256_set1_epi16(1), a = _mm256_set1_epi32(first), b = _mm256_set1_epi32(second);
    for (int i = 0; i < 2; i++) {  // at most 4 * 15 * 128 per lane of 16 bits
      const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low[i], a), _mm256_maddubs_epi16(high[i], b));
      sums.lanes[i] = _mm256_add_epi32(sums.lanes[i], _mm256_madd_epi16(pairs, ones));
    }
  }
};
#else
struct Ints {
  int32_t lanes[SIDE];
  Ints() = default;
  explicit Ints(int32_t number) { std::fill_n(lanes, SIDE, number); }
};
struct Floats {
  float lanes[SIDE] = {};
  template <typename S>
  void add(const Ints& sums, const S* scales) {
    for (int i = 0; i < SIDE; i++)
      lanes[i] = std::fma(static_cast<float>(sums.lanes[i]), static_cast<float>(scales[i]), lanes[i]);
  }
  void store(float* to) const { std::copy_n(lanes, SIDE, to); }
};
template <typename S>
const S* load_scales(const S* scales) {
  return scales;
}

struct Weights {
  const uint8_t* packed;
  explicit Weights(const uint8_t* packed) : packed(packed) {}
  void multiply(const int8_t* x, Ints& sums) const {
    for (int row = 0; row < SIDE; row++)
      for (int i = 0; i < 4; i++) {
        const int byte = packed[4 * row + i];
        sums.lanes[row] += (byte & 15) * x[i] + (byte >> 4) * x[4 + i];
      }
  }
};
#endif

// M rows of x by 16 rows of W [k / 8, 64] with scales [groups, 16], to y with row stride `stride`.
template <int M, typename S>
void int4_tile(
    const RoundedRows& x, int64_t first, const uint8_t* w, const S* scales, int64_t k, int64_t groups, float* y,
    int64_t stride) {
  const int64_t size = k / groups;
  const int8_t* const rows = x.whole.data() + first * x.step;
  std::array<Floats, M> total;
  for (int64_t group = 0; group < groups; group++) {
    std::array<Ints, M> sums;
    for (int m = 0; m < M; m++) sums[m] = Ints(x.sums[(first + m) * groups + group]);
    for (int64_t i = group * size; i < (group + 1) * size; i += COLUMNS, w += SIDE * COLUMNS / 2) {
      const Weights weights(w);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) weights.multiply(rows + m * x.step + i, sums[m]);
    }
    const auto scale = load_scales(scales + group * SIDE);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) total[m].add(sums[m], scale);
  }
  for (int m = 0; m < M; m++) total[m].store(y + m * stride);
}

// Rows first .. first + rows - 1 <= M of x by `count` blocks of 16 rows of W.
template <int M, typename S>
void int4_block(
    int64_t rows, const RoundedRows& x, int64_t first, const uint8_t* w, const S* scales, int64_t k, int64_t groups,
    int64_t count, float* y, int64_t stride) {
  if constexpr (M > 1) {
    if (rows < M) return int4_block<M - 1>(rows, x, first, w, scales, k, groups, count, y, stride);
  }
  for (int64_t i = 0; i < count; i++)
    int4_tile<M>(
        x, first, w + i * SIDE * k / 2, scales + i * SIDE * groups, k, groups, y + i * SIDE, stride);
}

// W [n, k] from -8 to 7 with scales [n, groups] -> W packed [N, k / 8, 64] for N = n / 16, rounded up, its scales
// [N, groups, 16], and the sums of W's rows [n].
std::tuple<at::Tensor, at::Tensor, at::Tensor> pack_int4(const at::Tensor& numbers, const at::Tensor& scale) {
  const int64_t n = numbers.size(0), k = numbers.size(1), groups = scale.numel() / n, size = k / groups;
  const int64_t blocks = (n + SIDE - 1) / SIDE;
  const at::Tensor from = numbers.contiguous(), factors = scale.to(at::kFloat).reshape({n, groups}).contiguous();
  const at::Tensor packed = at::zeros({blocks, k / COLUMNS, SIDE * 4}, at::kByte), sums = at::empty({n}, at::kFloat);
  const int8_t* const w = from.const_data_ptr<int8_t>();
  uint8_t* const to = packed.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, n, SIDE, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
      float sum = 0;
      for (int64_t group = 0; group < groups; group++) {
        const int8_t* const start = w + row * k + group * size;
        sum += static_cast<float>(std::accumulate(start, start + size, 0)) * factors.const_data_ptr<float>()[row * groups + group];
      }
      sums.mutable_data_ptr<float>()[row] = sum;
      uint8_t* const lane = to + row / SIDE * SIDE * k / 2 + row % SIDE * 4;
      for (int64_t i = 0; i < k; i += COLUMNS)
        for (int64_t j = 0; j < 4; j++) {
          const int8_t* const pair = w + row * k + i + j;
          lane[i * SIDE / 2 + j] = static_cast<uint8_t>((pair[0] + 8) | (pair[4] + 8) << 4);
        }
    }
  });
  const at::Tensor padded = at::zeros({blocks * SIDE, groups}, scale.scalar_type());
  padded.narrow(0, 0, n).copy_(scale.reshape({n, groups}));
  return {packed, padded.view({blocks, SIDE, groups}).transpose(1, 2).contiguous(), sums};
}

}  // namespace
