// `choose_tokens` of generation/sampling.py for fp32 scores on a CPU: the logarithms are computed only for the few tokens that
// can win. Compiled in one file with few_rows.cpp, after it.

#include <cmath>
#include <limits>

namespace {

uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0xd35a2d97u;
  return x ^ (x >> 15);
}

// `gumbel` of sampling.py.
float gumbel(uint32_t bits) {
  const float uniform = std::min((static_cast<float>(bits) + .5f) * 0x1p-32f, 1 - 0x1p-24f);
  return -std::log(-std::log1p(-uniform));
}

// The index of the chosen token among scores [v]; ids [v] or null.
int64_t choose(const float* scores, int64_t v, const int64_t* keys, int64_t position, const int64_t* ids) {
  const uint32_t at = static_cast<uint32_t>(position);
  const uint32_t one = mixed(static_cast<uint32_t>(keys[0]) ^ at), two = mixed(static_cast<uint32_t>(keys[1]) ^ at);
  const auto bits_of = [&](int64_t i) {
    return mixed(mixed(one ^ static_cast<uint32_t>(ids ? ids[i] : i)) ^ two);
  };
  const float most = at::vec::reduce_all<float>([](Vector a, Vector b) { return at::vec::maximum(a, b); }, scores, v);
  int64_t best = 0;
  while (best < v - 1 && scores[best] != most) best++;
  float best_score = scores[best] + gumbel(bits_of(best));
  for (int64_t i = 0; i < v; i++) {
    // Noise of `needed` or more takes a uniform number below exp(-needed) <= 2^-k, and no noise is larger than 23.
    const float needed = best_score - scores[i];
    if (!(needed < 23)) continue;
    const uint32_t bits = bits_of(i);
    const int k = std::clamp(static_cast<int>(needed * 1.442695f - 1e-3f), 0, 32);
    if (k > 0 && bits >> (32 - k)) continue;
    const float score = scores[i] + gumbel(bits);
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
  int64_t* const to = chosen.mutable_data_ptr<int64_t>();
  at::parallel_for(0, b * s, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      to[i] = choose(
          from.const_data_ptr<float>() + i * v, v, pairs.const_data_ptr<int64_t>() + i / s * 2,
          positions.const_data_ptr<int64_t>()[i], ids ? ids->const_data_ptr<int64_t>() : nullptr);
  });
  return chosen;
}

}  // namespace
