// Attention of few queries over a cache: sums in fp32; keys and values may be bf16. They are read once, for all queries of
// their head. Compiled after few_rows.cpp, in one file with it.

#include <limits>

namespace {

constexpr int SLOTS = 96;  // keys or values at a time, for which all queries of a head are done

// A row's scores s, with room for whole vectors -> exp(s - max s) of factor s, in place, and 0 from slot `visible` on;
// returns the sum. Where there is a cap, the scores are cap tanh(factor s / cap).
float exponents(float* s, int64_t visible, const Vector& factor, float cap, int64_t slots) {
  const Vector none(-std::numeric_limits<float>::infinity());
  Vector most = none, sum(0.f);
  for (int64_t i = 0; i < slots; i += LANES) {
    const int64_t count = std::clamp<int64_t>(visible - i, 0, LANES);
    Vector scaled = Vector::loadu(s + i) * factor;
    if (cap > 0) scaled = Vector(cap) * (scaled / Vector(cap)).tanh();
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

// out = p v, and what is in out if there is `more` than this: M rows of p by C vectors of each row of v [slots, dim];
// from one row of p to the next it is `length`, of out `stride`.
template <int M, int C, typename V>
void mix(
    const float* p, const V* v, float* out, int64_t slots, int64_t dim, int64_t length, int64_t stride, bool more) {
  std::array<Vector, M * C> total;
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++)
      total[m * C + c] = more ? Vector::loadu(out + m * stride + c * LANES) : Vector(0.f);
  for (int64_t slot = 0; slot < slots; slot++) {
    std::array<Vector, C> values;
    for (int c = 0; c < C; c++) {
      fetch(v + slot * dim + c * LANES);
      values[c] = in_register(load(v + slot * dim + c * LANES));
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
    int64_t rows, const float* p, const V* v, float* out, int64_t slots, int64_t dim, int64_t length,
    int64_t stride, bool more) {
  if constexpr (M > 1) {
    if (rows < M) return mixture<M - 1>(rows, p, v, out, slots, dim, length, stride, more);
  }
  constexpr int C = std::min(LANES / M, 4);
  int64_t at = 0;
  for (; at + C * LANES <= dim; at += C * LANES) mix<M, C>(p, v + at, out + at, slots, dim, length, stride, more);
  for (; at < dim; at += LANES) mix<M, 1>(p, v + at, out + at, slots, dim, length, stride, more);
}

// Attention of the `rows` queries [rows, d] of one head from number `first` on, `size` at a time; number r sees the slots up
// to its own, at[r modulo s].
// Keys and values are read from memory once: all queries see as many of them as stay in a cache, then the next ones.
template <typename V>
void attend(
    int64_t first, int64_t rows, int64_t size, const float* q, const V* keys, const V* values, const int64_t* at, float* y,
    int64_t d, int64_t s, int64_t slots, const Vector& factor, float cap) {
  const int64_t length = (slots + LANES - 1) / LANES * LANES;
  std::vector<float> scores(rows * length), sum(rows);
  for (int64_t slot = 0; slot < slots; slot += SLOTS)
    for (int64_t row = 0; row < rows; row += size)
      block<BLOCK>(
          std::min(size, rows - row), q + row * d, keys + slot * d, scores.data() + row * length + slot, d,
          std::min<int64_t>(SLOTS, slots - slot), d, length);
  for (int64_t row = 0; row < rows; row++)
    sum[row] = exponents(scores.data() + row * length, at[(first + row) % s] + 1, factor, cap, slots);
  for (int64_t slot = 0; slot < slots; slot += SLOTS)
    for (int64_t row = 0; row < rows; row += size)
      mixture<BLOCK>(
          std::min(size, rows - row), scores.data() + row * length + slot, values + slot * d, y + row * d,
          std::min<int64_t>(SLOTS, slots - slot), d, length, d, slot > 0);
  for (int64_t row = 0; row < rows; row++)
    at::vec::map<float>([&](Vector x) { return x / Vector(sum[row]); }, y + row * d, y + row * d, d);
}

// softmax(scale q k^T) v of queries [b, heads, s, d] over the first slots of a cache [.., h, .., d] in fp32 or bf16 -> y
// [b, heads, s, d]. Each query sees the slots of its row of the cache, `rows` [b], up to its own, `at` [b, s]; heads is a
// multiple of h, d of LANES.
template <typename V>
void attention_over(
    const float* q, const at::Tensor& keys, const at::Tensor& values, const int64_t* at, const int64_t* rows,
    float* y, int64_t b, int64_t heads, int64_t s, int64_t slots, float scale, float cap) {
  const int64_t h = keys.size(1), d = keys.size(3), queries = heads / h * s;
  const V *ks = keys.const_data_ptr<V>(), *vs = values.const_data_ptr<V>();
  // Threads share the queries of a head too, in blocks of one size: three heads would leave one of two threads waiting.
  const int64_t blocks = (queries + BLOCK - 1) / BLOCK, size = (queries + blocks - 1) / blocks;
  const double numbers = static_cast<double>(2 * b * h * slots * d);
  in_parallel(b * h * blocks, 1, numbers * sizeof(V), numbers * static_cast<double>(queries), [&](int64_t first, int64_t end) {
    while (first < end) {
      const int64_t row = first / blocks / h, head = first / blocks % h, query = first % blocks * size;
      const int64_t count = std::min(end - first, blocks - first % blocks);
      const int64_t from = (row * heads * s + head * queries + query) * d;
      attend(
          query, std::min(count * size, queries - query), size, q + from,
          ks + rows[row] * keys.stride(0) + head * keys.stride(1), vs + rows[row] * values.stride(0) + head * values.stride(1),
          at + row * s, y + from, d, s, slots, Vector(scale), cap);
      first += count;
    }
  });
}

void attention(
    const float* q, const at::Tensor& keys, const at::Tensor& values, const int64_t* at, const int64_t* rows,
    float* y, int64_t b, int64_t heads, int64_t s, int64_t slots, float scale, float cap) {
  const auto over = keys.scalar_type() == at::kBFloat16 ? attention_over<at::BFloat16> : attention_over<float>;
  over(q, keys, values, at, rows, y, b, heads, s, slots, scale, cap);
}

}  // namespace
