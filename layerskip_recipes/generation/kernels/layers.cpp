// The layers and the head of a decoder over a few tokens of each batch row, in fp32; weights are fp32, bf16 or int8,
// caches fp32 or bf16. Compiled in one file with few_rows.cpp and attention.cpp, after them.
//
// Shapes: b rows, s tokens each, m = b s, width d. Hidden states are [m, d].

#include <ATen/core/Dict.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/stack.h>
#include <torch/custom_class.h>

#include <numeric>

namespace {

using Tensors = c10::Dict<std::string, at::Tensor>;

const float* floats(const at::Tensor& tensor) { return tensor.const_data_ptr<float>(); }

at::Tensor room(int64_t n) { return at::empty({n}, at::kFloat); }

// RMSNorm, with or without weights. Without an epsilon the module has no such norm.
struct Norm {
  at::Tensor scale;
  float epsilon;

  explicit operator bool() const { return epsilon > 0; }

  // The norm of x [rows, n], written to y; or x if there is none.
  const float* of(int64_t rows, int64_t n, const float* x, float* y) const {
    if (!*this) return x;
    (*this)(rows, n, x, y);
    return y;
  }

  // x [rows, n] -> y [rows, n].
  void operator()(int64_t rows, int64_t n, const float* x, float* y) const {
    for (int64_t row = 0; row < rows; row++, x += n, y += n) {
      const float squares = at::vec::map_reduce_all<float>(
          [](Vector a) { return a * a; }, [](Vector a, Vector b) { return a + b; }, x, n);
      const Vector factor(1.f / std::sqrt(squares / static_cast<float>(n) + epsilon));
      if (scale.defined())
        at::vec::map2<float>([&](Vector a, Vector w) { return a * factor * w; }, y, x, floats(scale), n);
      else
        at::vec::map<float>([&](Vector a) { return a * factor; }, y, x, n);
    }
  }
};

// Rotary positions of one head; cos and sin are [positions, rotated channels / 2].
struct Rotation {
  at::Tensor cos, sin;
  bool neighbours;  // pairs are (2i, 2i + 1), else (i, i + rotated channels / 2)

  void operator()(float* head, int64_t position) const {
    if (!cos.defined()) return;
    const int64_t half = cos.size(1), at = std::min(position, cos.size(0) - 1) * half, step = neighbours ? 2 : 1;
    const float *c = floats(cos) + at, *s = floats(sin) + at;
    float *first = head, *second = head + (neighbours ? 1 : half);
    for (int64_t i = 0; i < half; i++) {
      const float x = first[i * step], y = second[i * step];
      first[i * step] = x * c[i] - y * s[i];
      second[i * step] = y * c[i] + x * s[i];
    }
  }
};

// The tensors of a module by name, and its numbers as tensors [] in fp32.
struct Parts {
  Tensors tensors;

  at::Tensor tensor(const std::string& name) const {
    const auto found = tensors.find(name);
    return found == tensors.end() ? at::Tensor() : found->value();
  }
  float number(const std::string& name) const {
    const at::Tensor found = tensor(name);
    return found.defined() ? *floats(found) : 0;
  }
  Linear linear(const std::string& name) const {
    return {tensor(name + ".weight"), tensor(name + ".scale"), tensor(name + ".bias"), tensor(name + ".sums")};
  }
  Norm norm(const std::string& name) const { return {tensor(name + ".scale"), number(name + ".epsilon")}; }
};

// Writes one token's keys or values [heads, dim] into a cache [b, heads * copies, slots, dim]. torchtune's Gemma 2 has
// several copies, as it repeats the key heads before its cache.
void keep(const float* x, const at::Tensor& cache, int64_t row, int64_t slot, int64_t heads) {
  const int64_t size = cache.size(2) * cache.size(3), dim = cache.size(3), copies = cache.size(1) / heads;
  const auto write = [&](auto* to) {
    for (int64_t head = 0; head < heads * copies; head++)
      at::vec::convert(x + head / copies * dim, to + row * cache.stride(0) + head * size + slot * dim, dim);
  };
  if (cache.scalar_type() == at::kBFloat16)
    write(cache.mutable_data_ptr<at::BFloat16>());
  else
    write(cache.mutable_data_ptr<float>());
}

// The tokens of one call.
struct Tokens {
  int64_t b, s;
  const int64_t* at;    // [b, s], their slots
  const int64_t* rows;  // [b], their cache rows
  int64_t end;          // the slots that attention may see
};

struct Layer {
  Parts parts;
  Linear join = parts.linear("join"), in = parts.linear("in_proj"), q = parts.linear("q_proj"), k = parts.linear("k_proj"),
         v = parts.linear("v_proj"), output = parts.linear("output_proj"), gate = parts.linear("w1"),
         up = parts.linear("w3"), down = parts.linear("w2");
  Norm before_attention = parts.norm("sa_norm"), before_mlp = parts.norm("mlp_norm"),
       after_attention = parts.norm("sa_scale"), after_mlp = parts.norm("mlp_scale"),
       of_queries = parts.norm("q_norm"), of_keys = parts.norm("k_norm"), of_states = parts.norm("join_norm");
  at::Tensor taps = parts.tensor("taps");  // [kernel, d], of a convolution in the place of attention
  Rotation rotation{parts.tensor("cos"), parts.tensor("sin"), parts.number("neighbours") != 0};
  at::Tensor keys = parts.tensor("k_cache"), values = parts.tensor("v_cache");
  int64_t heads = static_cast<int64_t>(parts.number("heads")), dim = keys.size(3),
          window = static_cast<int64_t>(parts.number("window"));  // 0: none
  bool norm_first = parts.number("norm_first") != 0;
  int activation = static_cast<int>(parts.number("activation"));
  float scale = parts.number("scale"), cap = parts.number("cap"), of_attention = parts.number("sa_scale.factor"),
        of_mlp = parts.number("mlp_scale.factor");  // of what they add; 0: as it is

  // Whether x [b, s, d], the inputs of a first layer, fit.
  bool fits(const at::Tensor& x, int64_t row, int64_t end) const {
    const int64_t d = output.columns() * (join ? 2 : 1);
    return x.size(2) == d && end <= keys.size(2) && 0 <= row && row < keys.size(0);
  }

  // x [m, d], changed in place; a joining layer takes [m, 2 d] and returns a new tensor. With `only_cache`, only the keys
  // and values are computed.
  at::Tensor operator()(at::Tensor x, const Tokens& tokens, bool only_cache) const {
    const int64_t m = tokens.b * tokens.s, d = output.columns();
    if (join) {
      const at::Tensor both = room(2 * m * d);
      of_states(2 * m, d, floats(x), both.mutable_data_ptr<float>());
      x = room(m * d);
      multiply(floats(both), m, {&join}, x.mutable_data_ptr<float>());
    }
    float* state = x.mutable_data_ptr<float>();
    const int64_t inner = up.columns(), queries = in ? d : q.columns(), shared = in ? d : k.columns();
    const at::Tensor buffer = room(m * (d + std::max(queries + 2 * shared, 2 * inner) + std::max(queries, inner)));
    float* const normed = buffer.mutable_data_ptr<float>();
    float* const wide = normed + m * d;
    float* const mixed = wide + m * std::max(queries + 2 * shared, 2 * inner);

    const float* const read = before_attention.of(m, d, state, normed);
    if (in) {
      multiply(read, m, {&in}, wide);
      convolve(wide, mixed, tokens);
      if (only_cache) return x;
    } else if (only_cache) {
      multiply(read, m, {&k, &v}, wide);
      for (int64_t i = 0; i < m; i++) write_to_cache(wide + i * 2 * shared, tokens.rows[i / tokens.s], tokens.at[i]);
      return x;
    }
    if (!in) {
      multiply(read, m, {&q, &k, &v}, wide);
      attend_to_cache(wide, mixed, tokens);
    }
    multiply(mixed, m, {&output}, normed);
    add(after_attention, of_attention, m, d, normed, state);

    multiply(before_mlp.of(m, d, state, normed), m, {&gate, &up}, wide);
    at::parallel_for(0, m, 16, [&](int64_t row, int64_t end) {
      for (; row < end; row++) activate(wide + row * 2 * inner, mixed + row * inner, inner);
    });
    multiply(mixed, m, {&down}, normed);
    add(after_mlp, of_mlp, m, d, normed, state);
    return x;
  }

  // state += update, after the norm or times the factor if there is one.
  static void add(const Norm& norm, float factor, int64_t m, int64_t d, float* update, float* state) {
    if (norm) norm(m, d, update, update);
    const Vector by(factor == 0 ? 1.f : factor);
    at::vec::map2<float>([&](Vector a, Vector b) { return a + by * b; }, state, state, update, m * d);
  }

  // y = act(gate) * up of one token; x [2 n] holds gate and up.
  void activate(const float* x, float* y, int64_t n) const {
    const Vector half(.5f), one(1.f);
    const auto gated = [&](const auto& act) {
      at::vec::map2<float>([&](Vector gate, Vector up) { return act(gate) * up; }, y, x, x + n, n);
    };
    if (activation == 0)  // SiLU
      gated([&](Vector g) { return g / (one + g.neg().exp()); });
    else if (activation == 1)  // GELU
      gated([&](Vector g) { return half * g * (one + (g * Vector(static_cast<float>(M_SQRT1_2))).erf()); });
    else  // GELU by tanh
      gated([&](Vector g) {
        const Vector factor(static_cast<float>(M_SQRT2 / std::sqrt(M_PI)));
        const Vector inside = factor * (g + Vector(.044715f) * g * g * g);
        return half * g * (one + inside.tanh());
      });
  }

  // B, C, x [m, 3 d] -> mixed [m, d], C times the convolution of B * x. Writes these products into the cache, the first
  // half of the channels as keys and the second half as values; changes B.
  void convolve(float* gates, float* mixed, const Tokens& tokens) const {
    const int64_t d = 2 * dim, m = tokens.b * tokens.s;
    for (int64_t i = 0; i < m; i++) {
      float* const token = gates + i * 3 * d;
      const int64_t row = tokens.rows[i / tokens.s], at = tokens.at[i];
      at::vec::map2<float>([](Vector a, Vector b) { return a * b; }, token, token, token + 2 * d, d);
      keep(token, keys, row, at, 1);
      keep(token + dim, values, row, at, 1);
    }
    const auto mix = [&](auto* const* halves) {
      for (int64_t i = 0; i < m; i++) {
        const int64_t row = tokens.rows[i / tokens.s], at = tokens.at[i];
        for (int64_t channel = 0; channel < d; channel += LANES) {
          const auto* const past = halves[channel / dim] + row * keys.stride(0) + at * dim + channel % dim;
          Vector sum(0.f);
          for (int64_t before = 0; before < taps.size(0) && before <= at; before++) {
            const float* const tap = floats(taps) + (taps.size(0) - 1 - before) * d + channel;
            sum = at::vec::fmadd(load_fp32(past - before * dim), Vector::loadu(tap), sum);
          }
          (sum * Vector::loadu(gates + i * 3 * d + d + channel)).store(mixed + i * d + channel);
        }
      }
    };
    if (keys.scalar_type() == at::kBFloat16) {
      const at::BFloat16* const halves[] = {keys.const_data_ptr<at::BFloat16>(), values.const_data_ptr<at::BFloat16>()};
      mix(halves);
    } else {
      const float* const halves[] = {floats(keys), floats(values)};
      mix(halves);
    }
  }

  // qkv [m, ..] -> mixed [m, heads * dim], the mixed values; writes keys and values into the cache.
  void attend_to_cache(float* qkv, float* mixed, const Tokens& tokens) const {
    const int64_t b = tokens.b, s = tokens.s, width = q.columns() + 2 * k.columns();
    const at::Tensor buffer = room(2 * b * s * heads * dim);
    float* const queries = buffer.mutable_data_ptr<float>();  // [b, heads, s, dim]
    float* const out = queries + b * s * heads * dim;
    for (int64_t row = 0; row < b; row++)
      for (int64_t i = 0; i < s; i++) {
        float* const token = qkv + (row * s + i) * width;
        float* const key = token + q.columns();
        const int64_t at = tokens.at[row * s + i];
        place(token, heads, of_queries, at);
        write_to_cache(key, tokens.rows[row], at);
        for (int64_t head = 0; head < heads; head++)
          std::copy_n(token + head * dim, dim, queries + ((row * heads + head) * s + i) * dim);
      }
    const auto attention = keys.scalar_type() == at::kBFloat16 ? attention_over<at::BFloat16> : attention_over<float>;
    attention(queries, keys, values, tokens.at, tokens.rows, out, b, heads, s, tokens.end, scale, cap, window);
    for (int64_t row = 0; row < b; row++)
      for (int64_t head = 0; head < heads; head++)
        for (int64_t i = 0; i < s; i++)
          std::copy_n(out + ((row * heads + head) * s + i) * dim, dim, mixed + ((row * s + i) * heads + head) * dim);
  }

  // Writes one token's key, after norm and rotary position, and its value behind it into the cache; changes the key.
  void write_to_cache(float* key, int64_t row, int64_t at) const {
    const int64_t h = k.columns() / dim;
    place(key, h, of_keys, at);
    keep(key, keys, row, at, h);
    keep(key + k.columns(), values, row, at, h);
  }

  // Norm and rotary position of one token's heads; the norm is of each head, or of all together.
  void place(float* x, int64_t count, const Norm& norm, int64_t position) const {
    const int64_t together = norm ? norm.scale.size(0) : dim;
    if (norm_first) norm.of(count * dim / together, together, x, x);
    for (int64_t head = 0; head < count; head++) rotation(x + head * dim, position);
    if (!norm_first) norm.of(count * dim / together, together, x, x);
  }
};

// The final norm and the output projection.
struct Head : torch::CustomClassHolder {
  Head(Tensors tensors) : parts{std::move(tensors)} {}

  // x [b, s, d] -> [b, s, v].
  at::Tensor logits(const at::Tensor& x) const {
    const int64_t m = x.size(0) * x.size(1), d = x.size(2);
    TORCH_CHECK(d == output.width(), "a state of ", output.width(), " numbers, not ", d);
    const at::Tensor states = x.to(at::kFloat).contiguous(), normed = room(m * d);
    const at::Tensor out = at::empty({x.size(0), x.size(1), output.columns()}, at::kFloat);
    float* const to = out.mutable_data_ptr<float>();
    multiply(norm.of(m, d, floats(states), normed.mutable_data_ptr<float>()), m, {&output}, to);
    if (cap > 0)
      at::vec::map<float>([&](Vector a) { return Vector(cap) * (a / Vector(cap)).tanh(); }, to, to, out.numel());
    return out;
  }

  Parts parts;
  Norm norm = parts.norm("norm");
  Linear output = parts.linear("output");
  float cap = parts.number("cap");
};

struct Layers : torch::CustomClassHolder {
  void append(const Tensors& tensors) { layers.push_back(Layer{{tensors}}); }

  // Layers first .. last - 1: x [b, s, d] (a joining layer takes [b, s, 2 d]) -> [b, s, d]. The tokens are in the slots
  // at [b or 1, s] < end of the cache rows [b]; each sees the slots up to its own. With `only_cache` the result has no
  // meaning: the last layer only writes its keys and values.
  at::Tensor run(
      const at::Tensor& x, const at::Tensor& at, const std::vector<int64_t>& rows, int64_t end, int64_t first,
      int64_t last, bool only_cache) const {
    const int64_t b = x.size(0), s = x.size(1);
    TORCH_CHECK(0 <= first && last <= static_cast<int64_t>(layers.size()), "layers without a cache");
    TORCH_CHECK(static_cast<int64_t>(rows.size()) == b, "rows of other tokens");
    for (const int64_t row : rows)
      TORCH_CHECK(first >= last || layers[first].fits(x, row, end), "a state, length or row of another model");
    const at::Tensor slots = at.expand({b, s}).contiguous();
    const Tokens tokens{b, s, slots.const_data_ptr<int64_t>(), rows.data(), end};
    for (int64_t i = 0; i < b * s; i++)
      TORCH_CHECK(0 <= tokens.at[i] && tokens.at[i] < end, "slot ", tokens.at[i], " of ", end);
    at::Tensor state = x.to(at::kFloat, false, true).contiguous();
    for (int64_t layer = first; layer < last; layer++)
      state = layers[layer](state, tokens, only_cache && layer + 1 == last);
    return state.view({b, s, -1});
  }

  // A chain of `num_to_draft` tokens per row from the first `exit_layer` layers: last, start [b], keys [b, 2] or none
  // if greedy -> tokens [b, n + 1], x_E [b, n, d]. The chain ends after fewer tokens where `confident` [b]
  // times the probabilities of the likeliest tokens is below `least`. `embeddings` [v, d] are multiplied by `factor`;
  // `vocabulary` [v'] has the token ids of a reduced head.
  std::tuple<at::Tensor, at::Tensor> draft(
      const c10::intrusive_ptr<Head>& head, const at::Tensor& embeddings, double factor,
      const std::optional<at::Tensor>& vocabulary, const at::Tensor& last, const at::Tensor& start,
      int64_t num_to_draft, int64_t end, int64_t exit_layer, const std::optional<at::Tensor>& keys, double temperature,
      at::Tensor confident, double least) const {
    std::vector<at::Tensor> tokens{last}, hidden;
    std::vector<int64_t> rows(last.size(0));
    std::iota(rows.begin(), rows.end(), 0);
    for (int64_t i = 0; i < num_to_draft; i++) {
      at::Tensor x = at::embedding(embeddings, tokens.back().unsqueeze(1));
      if (factor != 1) x = x.mul(factor);
      const at::Tensor at = start.unsqueeze(1).add(i);
      hidden.push_back(run(x, at, rows, end, 0, exit_layer, false));
      at::Tensor scores = head->logits(hidden.back());
      if (keys) scores = scores.sub_(scores.amax(-1, true)).div_(temperature);
      if (least > 0) confident = confident.mul(scores.softmax(-1).amax(-1).squeeze(1));
      const at::Tensor place =
          (keys ? choose_tokens(scores, *keys, at.add(1), vocabulary) : scores.argmax(-1)).squeeze(1);
      tokens.push_back(vocabulary ? vocabulary->index_select(0, place) : place);
      if (least > 0 && confident.max().item<float>() < least) break;
    }
    return {at::stack(tokens, 1), at::cat(hidden, 1)};
  }

  std::vector<Layer> layers;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(layerskip, library) {
  library.def("choose_tokens", &choose_tokens);
  library.def("pack_int4", &pack_int4);
  library.class_<Head>("Head").def(torch::init<Tensors>()).def("logits", &Head::logits);
  library.class_<Layers>("Layers")
      .def(torch::init<>())
      .def("append", &Layers::append)
      .def("run", &Layers::run)
      .def("draft", &Layers::draft);
}
