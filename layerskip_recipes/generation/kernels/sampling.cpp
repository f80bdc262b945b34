// `choose` of generation/sampling.py for fp32 scores on a CPU: one pass for the largest score, and noise for the few
// tokens that can win. Compiled in one file with few_rows.cpp, after it.

#include <cmath>
#include <limits>

namespace {

uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0xd35a2d97u;
  return x ^ (x >> 15);
}

// `gumbel` of sampling.py.
float gumbel(uint32_t one, uint32_t two, uint32_t id) {
  const float bits = static_cast<float>(mixed(mixed(one ^ id) ^ two));
  const float uniform = std::min((bits + .5f) * 0x1p-32f, 1 - 0x1p-24f);
  return -std::log(-std::log1p(-uniform));
}

// The index of the chosen token among scores [v]; ids [v] or null.
int64_t choose(const float* scores, int64_t v, const int64_t* keys, int64_t position, const int64_t* ids) {
  const float most = at::vec::reduce_all<float>([](Vector a, Vector b) { return at::vec::maximum(a, b); }, scores, v);
  const float least = most - 26;  // noise lies between -2.9 and 22.9
  const uint32_t at = static_cast<uint32_t>(position);
  const uint32_t one = mixed(static_cast<uint32_t>(keys[0]) ^ at), two = mixed(static_cast<uint32_t>(keys[1]) ^ at);
  int64_t best = 0;
  float best_score = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < v; i++) {
    if (!(scores[i] >= least)) continue;
    const float score = scores[i] + gumbel(one, two, static_cast<uint32_t>(ids ? ids[i] : i));
    if (score > best_score) best = i, best_score = score;
  }
  return best;
}

// scores [b, s, v], keys [b, 2], at [b or 1, s], ids [v] -> [b, s].
at::Tensor choose_tokens(
    const at::Tensor& scores, const at::Tensor& keys, const at::Tensor& at, const std::optional<at::Tensor>& ids) {
  const int64_t b = scores.size(0), s = scores.size(1), v = scores.size(2);
  const at::Tensor from = scores.to(at::kFloat).contiguous(), positions = at.expand({b, s}).contiguous();
  const at::Tensor chosen = at::empty({b, s}, at::kLong), pairs = keys.contiguous();
  for (int64_t i = 0; i < b * s; i++)
    chosen.mutable_data_ptr<int64_t>()[i] = choose(
        from.const_data_ptr<float>() + i * v, v, pairs.const_data_ptr<int64_t>() + i / s * 2,
        positions.const_data_ptr<int64_t>()[i], ids ? ids->const_data_ptr<int64_t>() : nullptr);
  return chosen;
}

}  // namespace
