// Attention of few queries over a KV-cache, with fp32 sums; keys and values are fp32 or bf16, read once for all queries
// of their head. Compiled in one file with few_rows.cpp, after it.

#include <limits>

namespace {

constexpr int SLOTS = 96;  // keys or values per pass over all queries of a head
constexpr int QUERIES = std::min(BLOCK, 8);  // the most queries per block

// s = exp(t - max t) in place, where t = factor s, or cap tanh(factor s / cap) with a cap; 0 before slot `from` and from
// slot `visible` on. Returns the sum. The row s is padded to whole vectors.
float exponents(float* s, int64_t from, int64_t visible, const Vector& factor, float cap, int64_t slots) {
  const Vector none(-std::numeric_limits<float>::infinity());
  Vector most = none, sum(0.f);
  for (int64_t i = 0; i < slots; i += LANES) {
    const int64_t count = std::clamp<int64_t>(visible - i, 0, LANES);
    Vector scaled = Vector::loadu(s + i) * factor;
    if (cap > 0) scaled = Vector(cap) * (scaled / Vector(cap)).tanh();
    scaled = Vector::set(scaled, none, std::clamp<int64_t>(from - i, 0, LANES));
    const Vector score = Vector::set(none, scaled, count);
    score.store(s + i);
    most = at::vec::maximum(most, score);
  }
  most = Vector(at::vec::vec_reduce_all<float>([](Vector& x, Vector& y) { return at::vec::maximum(x, y); }, most));
  for (int64_t i = 0; i < slots; i += LANES) {
    const Vector p = (Vector::loadu(s + i) - most).exp_u20();
    p.store(s + i);
    sum = sum + p;
  }
  return at::vec::vec_reduce_all<float>([](Vector& x, Vector& y) { return x + y; }, sum);
}

// out = p v, or with `more` out += p v: M rows of p (stride `length`) by C vectors of each row of v [slots, dim].
template <int M, int C, typename V>
void mix(const float* p, const V* v, float* out, int64_t slots, int64_t dim, int64_t length, int64_t stride, bool more) {
  std::array<Vector, M * C> total;
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++)
      total[m * C + c] = more ? Vector::loadu(out + m * stride + c * LANES) : Vector(0.f);
  for (int64_t slot = 0; slot < slots; slot++) {
    std::array<Vector, C> values;
    for (int c = 0; c < C; c++) {
      fetch(v + slot * dim + c * LANES);
      values[c] = in_register(load_fp32(v + slot * dim + c * LANES));
    }
    for (int m = 0; m < M; m++) {
      const Vector weight = in_register(Vector(p[m * length + slot]));
      for (int c = 0; c < C; c++) total[m * C + c] = at::vec::fmadd(weight, values[c], total[m * C + c]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) total[m * C + c].store(out + m * stride + c * LANES);
}

// `rows` <= M rows of p by all of v.
template <int M, typename V>
void mixture(
    int64_t rows, const float* p, const V* v, float* out, int64_t slots, int64_t dim, int64_t length, int64_t stride,
    bool more) {
  if constexpr (M > 1) {
    if (rows < M) return mixture<M - 1>(rows, p, v, out, slots, dim, length, stride, more);
  }
  constexpr int C = std::min(LANES / M, 4);
  int64_t at = 0;
  for (; at + C * LANES <= dim; at += C * LANES) mix<M, C>(p, v + at, out + at, slots, dim, length, stride, more);
  for (; at < dim; at += LANES) mix<M, 1>(p, v + at, out + at, slots, dim, length, stride, more);
}

// y = softmax(scale q k^T) v: q, y [b, heads, s, d], a cache [.., h, .., d] of which `all` slots are used. A query sees its
// cache row, rows [b], up to its own slot, at [b, s], and with a window (not 0) only that many slots. heads is a multiple
// of h, d of LANES.
template <typename V>
void attention_over(
    const float* q, const at::Tensor& keys, const at::Tensor& values, const int64_t* at, const int64_t* rows, float* y,
    int64_t b, int64_t heads, int64_t s, int64_t all, float scale, float cap, int64_t window) {
  const int64_t h = keys.size(1), d = keys.size(3), queries = heads / h * s;
  // Threads also share the queries of a head, in equal blocks: with three heads one of two threads would wait.
  const int64_t size = equal_block(queries, QUERIES), blocks = (queries + size - 1) / size;
  // `count` blocks of queries of one head, from number `first` on.
  const auto attend = [&](int64_t row, int64_t head, int64_t first, int64_t count) {
    const int64_t n = std::min(count * size, queries - first), from = (row * heads * s + head * queries + first) * d;
    // Skip the slots that no query of the row sees. Those are whole vectors, so the sums of a query keep their order.
    const int64_t earliest = window ? *std::min_element(at + row * s, at + (row + 1) * s) + 1 - window : 0;
    const int64_t start = std::max<int64_t>(earliest, 0) / LANES * LANES, slots = all - start;
    const int64_t length = (slots + LANES - 1) / LANES * LANES;
    const V* const k = keys.const_data_ptr<V>() + rows[row] * keys.stride(0) + head * keys.stride(1) + start * d;
    const V* const v = values.const_data_ptr<V>() + rows[row] * values.stride(0) + head * values.stride(1) + start * d;
    std::vector<float> scores(n * length), sum(n);
    // All queries use SLOTS keys, then SLOTS values, while these are in the processor's cache.
    const auto in_pieces = [&](const auto& f) {
      for (int64_t slot = 0; slot < slots; slot += SLOTS)
        for (int64_t i = 0; i < n; i += size)
          f(i, std::min(size, n - i), scores.data() + i * length + slot, slot, std::min<int64_t>(SLOTS, slots - slot));
    };
    in_pieces([&](int64_t i, int64_t m, float* to, int64_t slot, int64_t count) {
      block<QUERIES>(m, q + from + i * d, k + slot * d, to, d, count, d, length);
    });
    for (int64_t i = 0; i < n; i++) {
      const int64_t visible = at[row * s + (first + i) % s] + 1 - start, from = window ? visible - window : 0;
      sum[i] = exponents(scores.data() + i * length, from, visible, Vector(scale), cap, slots);
    }
    in_pieces([&](int64_t i, int64_t m, const float* p, int64_t slot, int64_t count) {
      mixture<QUERIES>(m, p, v + slot * d, y + from + i * d, count, d, length, d, slot > 0);
    });
    for (int64_t i = 0; i < n; i++)
      at::vec::map<float>([&](Vector x) { return x / Vector(sum[i]); }, y + from + i * d, y + from + i * d, d);
  };
  const int64_t numbers = 2 * b * h * (window ? std::min(all, window + s) : all) * d, work = numbers * (static_cast<int64_t>(sizeof(V)) + queries);
  in_parallel(b * h * blocks, 1, static_cast<double>(work), [&](int64_t first, int64_t end) {
    while (first < end) {
      const int64_t count = std::min(end - first, blocks - first % blocks);
      attend(first / blocks / h, first / blocks % h, first % blocks * size, count);
      first += count;
    }
  });
}

}  // namespace
