// The layers of a decoder over a few tokens of each row, in one call, and the head. All computations are in fp32; weights
// may be bf16 or int8, caches bf16. Compiled after few_rows.cpp and attention.cpp, in one file.
//
// Shapes: b rows, s tokens of each, m = b s, d width. Hidden states are [m, d], one token after the other.

#include <ATen/core/Dict.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/stack.h>
#include <torch/custom_class.h>

#include <numeric>

namespace {

using Tensors = c10::Dict<std::string, at::Tensor>;
using Numbers = c10::Dict<std::string, double>;

at::Tensor tensor(const Tensors& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  return found == tensors.end() ? at::Tensor() : found->value();
}

double number(const Numbers& numbers, const std::string& name) {
  const auto found = numbers.find(name);
  return found == numbers.end() ? 0 : found->value();
}

Linear linear(const Tensors& tensors, const std::string& name) {
  return {tensor(tensors, name + ".weight"), tensor(tensors, name + ".scale"), tensor(tensors, name + ".bias")};
}

const float* floats(const at::Tensor& tensor) { return tensor.const_data_ptr<float>(); }

// Room for n numbers.
at::Tensor room(int64_t n) { return at::empty({n}, at::kFloat); }

// RMSNorm, with weights or without. A norm whose epsilon is not given is none: the module does without.
struct Norm {
  at::Tensor scale;
  float epsilon;

  Norm(const Tensors& tensors, const Numbers& numbers, const std::string& name)
      : scale(tensor(tensors, name + ".scale")), epsilon(static_cast<float>(number(numbers, name + ".epsilon"))) {}

  explicit operator bool() const { return epsilon > 0; }

  // `rows` rows of x, each of n numbers, to y.
  void operator()(int64_t rows, int64_t n, const float* x, float* y) const {
    for (int64_t row = 0; row < rows; row++) {
      const float* from = x + row * n;
      float* to = y + row * n;
      const float squares = at::vec::map_reduce_all<float>(
          [](Vector a) { return a * a; }, [](Vector a, Vector b) { return a + b; }, from, n);
      const Vector factor(1.f / std::sqrt(squares / static_cast<float>(n) + epsilon));
      if (scale.defined())
        at::vec::map2<float>([&](Vector a, Vector w) { return a * factor * w; }, to, from, floats(scale), n);
      else
        at::vec::map<float>([&](Vector a) { return a * factor; }, to, from, n);
    }
  }
};

// Heads of queries or keys, turned by their positions; the tables of cosines and sines are [positions, turned / 2].
struct Rotation {
  at::Tensor cos, sin;
  bool neighbours;  // channel 2i turns with 2i + 1; else i with i + turned / 2

  Rotation(const Tensors& tensors, const Numbers& numbers)
      : cos(tensor(tensors, "cos")), sin(tensor(tensors, "sin")), neighbours(number(numbers, "neighbours") != 0) {}

  void operator()(float* head, int64_t position) const {
    if (!cos.defined()) return;
    const int64_t half = cos.size(1);
    const int64_t at = std::min(position, cos.size(0) - 1) * half;
    const float *c = floats(cos) + at, *s = floats(sin) + at;
    float *first = head, *second = head + (neighbours ? 1 : half);
    const int64_t step = neighbours ? 2 : 1;
    for (int64_t i = 0; i < half; i++) {
      const float x = first[i * step], y = second[i * step];
      first[i * step] = x * c[i] - y * s[i];
      second[i * step] = y * c[i] + x * s[i];
    }
  }
};

// One token's keys or values, [heads, dim], into a cache [b, heads * copies, slots, dim] at a slot of a row. torchtune's
// Gemma 2 repeats the key heads before its cache, so that each is there as often as query heads share it.
template <typename V>
void keep(const float* x, V* cache, int64_t heads, int64_t slots, int64_t dim, int64_t copies) {
  for (int64_t head = 0; head < heads; head++)
    for (int64_t copy = 0; copy < copies; copy++)
      at::vec::convert(x + head * dim, cache + (head * copies + copy) * slots * dim, dim);
}

void keep(const float* x, const at::Tensor& cache, int64_t row, int64_t slot, int64_t heads) {
  const int64_t slots = cache.size(2), dim = cache.size(3), at = row * cache.stride(0) + slot * dim;
  const int64_t copies = cache.size(1) / heads;
  if (cache.scalar_type() == at::kBFloat16)
    keep(x, cache.mutable_data_ptr<at::BFloat16>() + at, heads, slots, dim, copies);
  else
    keep(x, cache.mutable_data_ptr<float>() + at, heads, slots, dim, copies);
}

// One call: where the tokens stand, and what is written and read on the way.
struct Tokens {
  int64_t b, s;
  const int64_t* at;    // [b, s], their slots
  const int64_t* rows;  // [b], their rows of the cache
  int64_t end;          // of what attention looks at

  int64_t m() const { return b * s; }
};

class Layer {
 public:
  Layer(const Tensors& tensors, const Numbers& numbers)
      : join(linear(tensors, "join")), q(linear(tensors, "q_proj")), k(linear(tensors, "k_proj")),
        v(linear(tensors, "v_proj")), output(linear(tensors, "output_proj")), gate(linear(tensors, "w1")),
        up(linear(tensors, "w3")), down(linear(tensors, "w2")),
        before_attention(tensors, numbers, "sa_norm"), before_mlp(tensors, numbers, "mlp_norm"),
        after_attention(tensors, numbers, "sa_scale"), after_mlp(tensors, numbers, "mlp_scale"),
        of_queries(tensors, numbers, "q_norm"), of_keys(tensors, numbers, "k_norm"),
        of_states(tensors, numbers, "join_norm"),
        rotation(tensors, numbers), keys(tensor(tensors, "k_cache")), values(tensor(tensors, "v_cache")),
        heads(static_cast<int64_t>(number(numbers, "heads"))), dim(keys.size(3)),
        norm_first(number(numbers, "norm_first") != 0), activation(static_cast<int>(number(numbers, "activation"))),
        scale(static_cast<float>(number(numbers, "scale"))), cap(static_cast<float>(number(numbers, "cap"))) {}

  // What a first layer's inputs have to be.
  void check(const at::Tensor& x, const std::vector<int64_t>& rows, int64_t end) const {
    const int64_t d = before_attention.scale.size(0) * (join ? 2 : 1);
    TORCH_CHECK(x.size(2) == d && end <= keys.size(2), "a state or length of another model");
    for (const int64_t row : rows) TORCH_CHECK(0 <= row && row < keys.size(0), "row ", row, " of ", keys.size(0));
  }

  // x [m, d] -> x [m, d], in place; of a joining layer [m, 2 d] -> [m, d].
  at::Tensor operator()(at::Tensor x, const Tokens& tokens) const {
    const int64_t m = tokens.m(), d = before_attention.scale.size(0);
    if (join) {
      const at::Tensor both = room(2 * m * d);
      of_states(2 * m, d, floats(x), both.mutable_data_ptr<float>());
      x = room(m * d);
      multiply(floats(both), m, {&join}, x.mutable_data_ptr<float>());
    }
    float* state = x.mutable_data_ptr<float>();
    const int64_t inner = up.columns(), queries = q.columns(), shared = k.columns();
    const at::Tensor buffer = room(m * (d + std::max(queries + 2 * shared, 2 * inner) + std::max(queries, inner)));
    float* const normed = buffer.mutable_data_ptr<float>();
    float* const wide = normed + m * d;
    float* const mixed = wide + m * std::max(queries + 2 * shared, 2 * inner);

    before_attention(m, d, state, normed);
    multiply(normed, m, {&q, &k, &v}, wide);
    attend_to_cache(wide, mixed, tokens);
    multiply(mixed, m, {&output}, normed);
    add(after_attention, m, d, normed, state);

    before_mlp(m, d, state, normed);
    multiply(normed, m, {&gate, &up}, wide);
    for (int64_t row = 0; row < m; row++) activate(wide + row * 2 * inner, mixed + row * inner, inner);
    multiply(mixed, m, {&down}, normed);
    add(after_mlp, m, d, normed, state);
    return x;
  }

 private:
  // state += the update, normed where there is a norm after it.
  static void add(const Norm& norm, int64_t m, int64_t d, float* update, float* state) {
    if (norm) norm(m, d, update, update);
    at::vec::map2<float>([](Vector a, Vector b) { return a + b; }, state, state, update, m * d);
  }

  // act(gate) up of one token: both are in x, side by side.
  void activate(const float* x, float* y, int64_t n) const {
    const float* other = x + n;
    const Vector half(.5f), one(1.f);
    if (activation == 0)  // SiLU
      at::vec::map2<float>([&](Vector g, Vector u) { return g / (one + g.neg().exp()) * u; }, y, x, other, n);
    else if (activation == 1)  // GELU
      at::vec::map2<float>(
          [&](Vector g, Vector u) { return half * g * (one + (g * Vector(static_cast<float>(M_SQRT1_2))).erf()) * u; },
          y, x, other, n);
    else  // GELU by tanh
      at::vec::map2<float>(
          [&](Vector g, Vector u) {
            const Vector factor(static_cast<float>(M_SQRT2 / std::sqrt(M_PI)));
            const Vector inside = factor * (g + Vector(.044715f) * g * g * g);
            return half * g * (one + inside.tanh()) * u;
          },
          y, x, other, n);
  }

  // Write the keys and values of the tokens into the cache; queries, keys and values [m, ..] -> what attention mixes.
  void attend_to_cache(float* qkv, float* mixed, const Tokens& tokens) const {
    const int64_t b = tokens.b, s = tokens.s, h = k.columns() / dim;
    const int64_t width = q.columns() + 2 * k.columns();
    const at::Tensor buffer = room(2 * b * s * heads * dim);
    float* const queries = buffer.mutable_data_ptr<float>();  // [b, heads, s, dim]
    float* const out = queries + b * s * heads * dim;
    for (int64_t row = 0; row < b; row++)
      for (int64_t i = 0; i < s; i++) {
        float* const token = qkv + (row * s + i) * width;
        float* const key = token + q.columns();
        const int64_t at = tokens.at[row * s + i];
        place(token, heads, of_queries, at);
        place(key, h, of_keys, at);
        keep(key, keys, tokens.rows[row], at, h);
        keep(key + k.columns(), values, tokens.rows[row], at, h);
        for (int64_t head = 0; head < heads; head++)
          std::copy_n(token + head * dim, dim, queries + ((row * heads + head) * s + i) * dim);
      }
    attention(queries, keys, values, tokens.at, tokens.rows, out, b, heads, s, tokens.end, scale, cap);
    for (int64_t row = 0; row < b; row++)
      for (int64_t head = 0; head < heads; head++)
        for (int64_t i = 0; i < s; i++)
          std::copy_n(
              out + ((row * heads + head) * s + i) * dim, dim, mixed + ((row * s + i) * heads + head) * dim);
  }

  // Norm and position of the heads of one token.
  void place(float* x, int64_t count, const Norm& norm, int64_t position) const {
    if (norm && norm_first) norm(count, dim, x, x);
    for (int64_t head = 0; head < count; head++) rotation(x + head * dim, position);
    if (norm && !norm_first) norm(count, dim, x, x);
  }

  Linear join, q, k, v, output, gate, up, down;
  Norm before_attention, before_mlp, after_attention, after_mlp, of_queries, of_keys, of_states;
  Rotation rotation;
  at::Tensor keys, values;
  int64_t heads, dim;
  bool norm_first;
  int activation;
  float scale, cap;
};

// The layers of a decoder, first .. last-1 of them at a time.
class Layers : public torch::CustomClassHolder {
 public:
  void append(const Tensors& tensors, const Numbers& numbers) { layers.emplace_back(tensors, numbers); }

  // x [b, s, d] -> x [b, s, d] after the layers; a first layer that joins takes [b, s, 2 d]. The tokens stand at the slots
  // `at` [b or 1, s] of the cache's `rows` [b], all below `end`; each sees the slots up to its own.
  at::Tensor run(
      const at::Tensor& x, const at::Tensor& at, const std::vector<int64_t>& rows, int64_t end, int64_t first,
      int64_t last) const {
    const int64_t b = x.size(0), s = x.size(1);
    TORCH_CHECK(0 <= first && last <= static_cast<int64_t>(layers.size()), "layers without a cache");
    TORCH_CHECK(static_cast<int64_t>(rows.size()) == b, "rows of other tokens");
    if (first < last) layers[first].check(x, rows, end);
    const at::Tensor slots = at.expand({b, s}).contiguous();
    const Tokens tokens{b, s, slots.const_data_ptr<int64_t>(), rows.data(), end};
    for (int64_t i = 0; i < b * s; i++)
      TORCH_CHECK(0 <= tokens.at[i] && tokens.at[i] < end, "slot ", tokens.at[i], " of ", end);
    at::Tensor state = x.to(at::kFloat, false, true).contiguous();
    for (int64_t layer = first; layer < last; layer++) state = layers[layer](state, tokens);
    return state.view({b, s, -1});
  }

 private:
  std::vector<Layer> layers;
};

// The norm and the matrix that make logits of hidden states.
class Head : public torch::CustomClassHolder {
 public:
  Head(const Tensors& tensors, const Numbers& numbers)
      : norm(tensors, numbers, "norm"), output(linear(tensors, "output")),
        cap(static_cast<float>(number(numbers, "cap"))) {}

  // x [b, s, d] -> [b, s, v].
  at::Tensor logits(const at::Tensor& x) const {
    const int64_t m = x.size(0) * x.size(1), d = x.size(2);
    TORCH_CHECK(d == output.weight.size(1), "a state of ", output.weight.size(1), " numbers, not ", d);
    const at::Tensor states = x.to(at::kFloat).contiguous(), normed = room(m * d);
    const at::Tensor out = at::empty({x.size(0), x.size(1), output.columns()}, at::kFloat);
    if (norm) norm(m, d, floats(states), normed.mutable_data_ptr<float>());
    float* const to = out.mutable_data_ptr<float>();
    multiply(floats(norm ? normed : states), m, {&output}, to);
    if (cap > 0)
      at::vec::map<float>([&](Vector a) { return Vector(cap) * (a / Vector(cap)).tanh(); }, to, to, out.numel());
    return out;
  }

 private:
  Norm norm;
  Linear output;
  float cap;
};

// Tokens one after the other from the first layers of a decoder and a head: a whole chain of drafts is one call.
class Chain : public torch::CustomClassHolder {
 public:
  // `embeddings` [v, d]; of a head that has a part of the tokens only, `vocabulary` has their ids.
  Chain(
      c10::intrusive_ptr<Layers> layers, c10::intrusive_ptr<Head> head, at::Tensor embeddings, double factor,
      std::optional<at::Tensor> vocabulary)
      : layers(std::move(layers)), head(std::move(head)), embeddings(std::move(embeddings)), factor(factor),
        vocabulary(std::move(vocabulary)) {}

  // `depth` tokens of each row from `exit_layer` layers: last, start [b]; noise [b, depth, v'] of the head's v' tokens
  // -> tokens [b, depth + 1], x_E [b, depth, d] and the distributions [b, depth, v']. Without noise the likeliest tokens, and no distributions.
  std::tuple<at::Tensor, at::Tensor, std::optional<at::Tensor>> draft(
      const at::Tensor& last, const at::Tensor& start, int64_t depth, int64_t end, int64_t exit_layer,
      const std::optional<at::Tensor>& noise, const at::Tensor& temperature) const {
    std::vector<at::Tensor> tokens{last}, hidden, q;
    std::vector<int64_t> rows(last.size(0));
    std::iota(rows.begin(), rows.end(), 0);
    for (int64_t i = 0; i < depth; i++) {
      at::Tensor x = at::embedding(embeddings, tokens.back().unsqueeze(1));
      if (factor != 1) x = x.mul(factor);
      hidden.push_back(layers->run(x, start.unsqueeze(1).add(i), rows, end, 0, exit_layer));
      at::Tensor scores = head->logits(hidden.back()).squeeze(1);
      if (noise) {
        q.push_back(scores.div(temperature).softmax(-1));
        scores = race(q.back(), noise->select(1, i));
      }
      const at::Tensor place = scores.argmax(-1);
      tokens.push_back(vocabulary ? vocabulary->index_select(0, place) : place);
    }
    return {at::stack(tokens, 1), at::cat(hidden, 1), noise ? std::optional(at::stack(q, 1)) : std::nullopt};
  }

 private:
  // As `exponential_race_scores` of sampling.py.
  static at::Tensor race(const at::Tensor& probs, const at::Tensor& noise) {
    const at::Tensor uniform = noise.to(at::kFloat).add_(.5).mul_(std::ldexp(1., -31)).clamp_max_(1 - std::ldexp(1., -24));
    return probs.div(uniform.neg_().log1p_().neg_());
  }

  c10::intrusive_ptr<Layers> layers;
  c10::intrusive_ptr<Head> head;
  at::Tensor embeddings;
  double factor;
  std::optional<at::Tensor> vocabulary;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(layerskip, library) {
  library.class_<Layers>("Layers").def(torch::init<>()).def("append", &Layers::append).def("run", &Layers::run);
  library.class_<Head>("Head").def(torch::init<Tensors, Numbers>()).def("logits", &Head::logits);
  library.class_<Chain>("Chain")
      .def(torch::init<
           c10::intrusive_ptr<Layers>, c10::intrusive_ptr<Head>, at::Tensor, double, std::optional<at::Tensor>>())
      .def("draft", &Chain::draft);
}
