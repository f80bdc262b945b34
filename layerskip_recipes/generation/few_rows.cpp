// y = x W^T for few rows of x, and attention of few queries, in fp32; W may be int8.
//
// A BLAS is made for large matrices: it copies W into an order of its own first, which for a handful of rows takes as
// long as the product. Here each row of W is read once, as it lies in memory, for all rows of x; so are the keys and
// values of attention. An element of y is summed in one order whatever the number of rows: verification computes what
// plain steps compute, to the last bit.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <functional>
#include <initializer_list>
#include <vector>

namespace {

using Vector = at::vec::Vectorized<float>;
constexpr int LANES = Vector::size();
constexpr int BLOCK = std::min(8, LANES);  // rows of x at a time
constexpr int AHEAD = 8192;  // so many bytes ahead weights are on their way from memory while others are multiplied

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

template <typename W>
[[gnu::always_inline]] inline void fetch(const W* weights) {
  __builtin_prefetch(reinterpret_cast<const char*>(weights) + AHEAD);
}

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
[[gnu::always_inline]] inline Vector sums(const std::array<Vector, COUNT>& v) {
  if constexpr (COUNT == 1) {
    return v[0];
  } else {
    std::array<Vector, COUNT / 2> half;
#pragma GCC unroll 16
    for (int i = 0; i < COUNT / 2; i++) half[i] = pairs<LANES / COUNT>(v[2 * i], v[2 * i + 1]);
    return sums<COUNT / 2>(half);
  }
}

// M rows of x by N rows of w, all of width k, a multiple of LANES; y has rows of length stride.
template <int M, int N, typename W>
void tile(const float* x, const W* w, float* y, int64_t k, int64_t stride) {
  static_assert(M * N <= LANES);
  std::array<Vector, LANES> total;
#pragma GCC unroll 16
  for (int j = 0; j < LANES; j++) total[j] = Vector(0.f);
  for (int64_t i = 0; i < k; i += LANES) {
    std::array<Vector, N> weights;
    for (int n = 0; n < N; n++) {
      fetch(w + n * k + i);
      weights[n] = in_register(load(w + n * k + i));
    }
    for (int m = 0; m < M; m++) {
      const Vector row = in_register(Vector::loadu(x + m * k + i));
      for (int n = 0; n < N; n++) total[m * N + n] = at::vec::fmadd(weights[n], row, total[m * N + n]);
    }
  }
  float out[LANES];
  sums<LANES>(total).store(out);
  for (int m = 0; m < M; m++) std::copy_n(out + m * N, N, y + m * stride);
}

// `rows` <= M rows of x by all `columns` rows of w.
template <int M, typename W>
void block(int64_t rows, const float* x, const W* w, float* y, int64_t k, int64_t columns, int64_t stride) {
  if constexpr (M > 1) {
    if (rows < M) return block<M - 1>(rows, x, w, y, k, columns, stride);
  }
  constexpr int N = LANES / M;
  int64_t n = 0;
  for (; n + N <= columns; n += N) tile<M, N>(x, w + n * k, y + n, k, stride);
  for (; n < columns; n++) tile<M, 1>(x, w + n * k, y + n, k, stride);
}

// Columns [first, end) of y [m, n] = x W^T, `grain` at a time: x [m, k], w [.., k] from the row of column `first` on.
template <typename W>
void columns(
    const float* x, const W* w, float* y, int64_t m, int64_t k, int64_t n, int64_t first, int64_t end, int64_t grain) {
  for (int64_t at = first; at < end; at += grain)
    for (int64_t row = 0; row < m; row += BLOCK)
      block<BLOCK>(
          std::min<int64_t>(BLOCK, m - row), x + row * k, w + (at - first) * k, y + row * n + at, k,
          std::min(grain, end - at), n);
}

// rows [m, k], each of ws [n_i, k] contiguous, fp32 or int8, k a multiple of LANES -> [m, n_0 + n_1 + ..]: side by side
// what each gives alone.
at::Tensor products(const at::Tensor& rows, std::initializer_list<std::reference_wrapper<const at::Tensor>> ws) {
  const at::Tensor x = rows.contiguous();
  const int64_t m = x.size(0), k = x.size(1);
  int64_t n = 0;
  for (const at::Tensor& w : ws) {
    TORCH_CHECK(w.is_contiguous() && w.size(1) == k && k % LANES == 0);
    n += w.size(0);
  }
  at::Tensor out = at::empty({m, n}, x.options());
  const float* xs = x.const_data_ptr<float>();
  float* ys = out.mutable_data_ptr<float>();
  // A thread pays from some 32 or 64 kB of weights, and what it takes at a time stays in its cache for all rows of x.
  const int64_t bytes = k * static_cast<int64_t>(ws.begin()->get().element_size());
  const int64_t grain = std::max<int64_t>((m < 4 ? 65536 : 32768) / bytes, 1);
  at::parallel_for(0, n, grain, [&](int64_t first, int64_t end) {
    int64_t before = 0;  // columns of the matrices so far
    for (const at::Tensor& w : ws) {
      const int64_t from = std::max(first, before), last = std::min(end, before + w.size(0));
      const int64_t skipped = (from - before) * k;
      if (w.scalar_type() == at::kChar)
        columns(xs, w.const_data_ptr<int8_t>() + skipped, ys, m, k, n, from, last, grain);
      else
        columns(xs, w.const_data_ptr<float>() + skipped, ys, m, k, n, from, last, grain);
      before += w.size(0);
    }
  });
  return out;
}

// out = p v for M rows of p [M, slots] and C vectors of each row of v [slots, dim] and out [M, dim].
template <int M, int C>
void mix(const float* p, const float* v, float* out, int64_t slots, int64_t dim) {
  std::array<Vector, M * C> total;
#pragma GCC unroll 16
  for (int j = 0; j < M * C; j++) total[j] = Vector(0.f);
  for (int64_t slot = 0; slot < slots; slot++) {
    std::array<Vector, C> values;
    for (int c = 0; c < C; c++) {
      fetch(v + slot * dim + c * LANES);
      values[c] = in_register(Vector::loadu(v + slot * dim + c * LANES));
    }
    for (int m = 0; m < M; m++) {
      const Vector weight = in_register(Vector(p[m * slots + slot]));
      for (int c = 0; c < C; c++) total[m * C + c] = at::vec::fmadd(weight, values[c], total[m * C + c]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) total[m * C + c].store(out + m * dim + c * LANES);
}

// `rows` <= M rows of p by all of v.
template <int M>
void mixture(int64_t rows, const float* p, const float* v, float* out, int64_t slots, int64_t dim) {
  if constexpr (M > 1) {
    if (rows < M) return mixture<M - 1>(rows, p, v, out, slots, dim);
  }
  constexpr int C = std::min(LANES / M, 4);
  int64_t at = 0;
  for (; at + C * LANES <= dim; at += C * LANES) mix<M, C>(p, v + at, out + at, slots, dim);
  for (; at < dim; at += LANES) mix<M, 1>(p, v + at, out + at, slots, dim);
}

// softmax(scale q k^T + mask) v: q [b, h, s, d]; k, v [b, h, slots, d], the rows of a head one after the other;
// mask [b or 1, 1, s, slots]; d a multiple of LANES -> [b, h, s, d].
at::Tensor attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& mask, double scale) {
  const int64_t b = q.size(0), h = q.size(1), s = q.size(2), d = q.size(3), slots = k.size(2);
  TORCH_CHECK(d % LANES == 0 && k.stride(3) == 1 && k.stride(2) == d && v.stride(3) == 1 && v.stride(2) == d);
  const at::Tensor queries = q.contiguous(), added = mask.expand({b, 1, s, slots}).contiguous();
  at::Tensor out = at::empty({b, h, s, d}, q.options());
  const float *qs = queries.const_data_ptr<float>(), *ks = k.const_data_ptr<float>();
  const float *vs = v.const_data_ptr<float>(), *masks = added.const_data_ptr<float>();
  float* ys = out.mutable_data_ptr<float>();
  const Vector factor(static_cast<float>(scale));
  at::parallel_for(0, b * h, 1, [&](int64_t first, int64_t end) {
    std::vector<float> scores(BLOCK * slots);
    for (int64_t head = first; head < end; head++)
      for (int64_t row = 0; row < s; row += BLOCK) {
        const int64_t rows = std::min<int64_t>(BLOCK, s - row), at = head * s + row;
        const float* keys = ks + head / h * k.stride(0) + head % h * k.stride(1);
        const float* values = vs + head / h * v.stride(0) + head % h * v.stride(1);
        block<BLOCK>(rows, qs + at * d, keys, scores.data(), d, slots, slots);
        for (int64_t m = 0; m < rows; m++) {
          float* p = scores.data() + m * slots;
          const float* seen = masks + (head / h * s + row + m) * slots;
          at::vec::map2<float>([&](Vector x, Vector y) { return at::vec::fmadd(x, factor, y); }, p, p, seen, slots);
          const float most =
              at::vec::reduce_all<float>([](Vector& x, Vector& y) { return at::vec::maximum(x, y); }, p, slots);
          at::vec::map<float>([&](Vector x) { return (x - Vector(most)).exp(); }, p, p, slots);
          const float sum = at::vec::reduce_all<float>([](Vector& x, Vector& y) { return x + y; }, p, slots);
          at::vec::map<float>([&](Vector x) { return x / Vector(sum); }, p, p, slots);
        }
        mixture<BLOCK>(rows, scores.data(), values, ys + at * d, slots, d);
      }
  });
  return out;
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& a) { return products(x, {a}); }
at::Tensor linear2(const at::Tensor& x, const at::Tensor& a, const at::Tensor& b) { return products(x, {a, b}); }
at::Tensor linear3(const at::Tensor& x, const at::Tensor& a, const at::Tensor& b, const at::Tensor& c) {
  return products(x, {a, b, c});
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(layerskip, library) {
  library.def("attention(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> Tensor");
  library.def("linear(Tensor x, Tensor a) -> Tensor");
  library.def("linear2(Tensor x, Tensor a, Tensor b) -> Tensor");
  library.def("linear3(Tensor x, Tensor a, Tensor b, Tensor c) -> Tensor");
}
TORCH_LIBRARY_IMPL(layerskip, CPU, library) {
  library.impl("attention", attention);
  library.impl("linear", linear);
  library.impl("linear2", linear2);
  library.impl("linear3", linear3);
}
