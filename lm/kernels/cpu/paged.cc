// Attention of a few new tokens per sequence to the pages of keys and values of their sequences.
//
//   q         f32 [N, H, key_dim]
//   data      f32, bf16 or s8 [P, K, page, W]: a position's row has its key first, and its value
//             from lane `value_start` on
//   scales    f32 [P, 2, K, page], of keys and values; or [0]
//   table     s32 [B, M], pages of each sequence in order
//   kv_lens   s32 [B], tokens of each sequence, new ones included
//   starts, lens  s32 [B], where its new tokens begin in q, and how many they are
//   sinks     f32 [H]; or [0]
//   y         f32 [N, H, value_dim]; zeros for padding
//
// A task is a few queries of one key/value head and a part of the sequence: scores of LANES positions
// at a time are held whole, then exponentials and the sum of values. Parts are merged at the end.
#include <cmath>
#include <vector>

#include "lanes.h"

constexpr int MOST_ROWS = 4;           // queries of a task
constexpr int64_t SHORTEST_PART = 256;  // positions

// e^x for x <= 0, to 3e-7: x is n ln 2 + r with |r| <= ln 2 / 2, e^r a Taylor polynomial, and n is
// added to the exponent.
static inline Floats exponential(Floats x) {
  const Floats least = Floats{} - 87.0f, round = Floats{} + 12582912.0f;  // 1.5 * 2^23
  x = x > least ? x : least;
  const Floats shifted = x * 1.4426950408889634f + round, n = shifted - round;
  const Floats r = (x - n * 0.693145751953125f) - n * 1.42860677e-6f;  // ln 2 in two parts
  Floats sum = r * (1.0f / 5040) + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  return (Floats)((Ints)sum + (((Ints)shifted - (Ints)round) << 23));
}

// The sum of each vector's lanes, in the lane of its number. Each step adds halves of blocks of
// lanes, and has twice as many blocks in half as many vectors.
static inline Floats sums_of(Floats* v) {
#define FOLD_HALVES(count, LOW, HIGH)                                        \
  for (int i = 0; i < count; i++) {                                          \
    const Floats low = __builtin_shufflevector(v[2 * i], v[2 * i + 1], LOW); \
    v[i] = low + __builtin_shufflevector(v[2 * i], v[2 * i + 1], HIGH);      \
  }
#define LIST(...) __VA_ARGS__
#ifdef __AVX512F__
  FOLD_HALVES(8, LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
              LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
  FOLD_HALVES(4, LIST(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
              LIST(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31))
  FOLD_HALVES(2, LIST(0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29),
              LIST(2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31))
  FOLD_HALVES(1, LIST(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
              LIST(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31))
#else
  FOLD_HALVES(4, LIST(0, 1, 2, 3, 8, 9, 10, 11), LIST(4, 5, 6, 7, 12, 13, 14, 15))
  FOLD_HALVES(2, LIST(0, 1, 4, 5, 8, 9, 12, 13), LIST(2, 3, 6, 7, 10, 11, 14, 15))
  FOLD_HALVES(1, LIST(0, 2, 4, 6, 8, 10, 12, 14), LIST(1, 3, 5, 7, 9, 11, 13, 15))
#endif
  return v[0];
}

struct Call {
  const float* q;
  const char* data;
  const float *scales, *sinks;
  const int32_t *table, *kv_lens, *starts, *lens;
  float* y;
  ffi::DataType type;
  int64_t H, K, key_dim, page, W, M, value_start, value_dim, window;
  float scale, softcap;
};

// Lanes [first, first + count) of LANES positions' rows, as float32 `stride` apart.
static inline const float* rows(const Call& c, int64_t row, int64_t first, int64_t count,
                                float* held, int64_t& stride) {
  const int64_t at = row * c.W + first;
  if (c.type == ffi::F32) {
    stride = c.W;
    return (const float*)c.data + at;
  }
  stride = count;
  for (int i = 0; i < LANES; i++) {
    float* to = held + i * count;
    if (c.type == ffi::BF16) {
      const uint16_t* from = (const uint16_t*)c.data + at + i * c.W;
      uint32_t* bits = (uint32_t*)to;
      for (int64_t lane = 0; lane < count; lane++) bits[lane] = (uint32_t)from[lane] << 16;
    } else {
      const int8_t* from = (const int8_t*)c.data + at + i * c.W;
      for (int64_t lane = 0; lane < count; lane++) to[lane] = from[lane];
    }
  }
  return held;
}

struct Task {
  int64_t b, k, row, rows, begin, end;  // rows: new token * G + query head; positions
  float* sum;                           // value_dim of each row, then its top and its total
};

// Adds `count` rows of W vectors, each by its weight, to a sum.
template <int W>
static inline void add(float* sum, const float* values, int64_t stride, const float* weights,
                       int64_t count) {
  Floats sums[W];
  memcpy(sums, sum, sizeof sums);
  for (int64_t i = 0; i < count; i++) {
    const Floats weight = Floats{} + weights[i];
#pragma GCC unroll 4
    for (int j = 0; j < W; j++) sums[j] += load<Floats>(values + i * stride + j * LANES) * weight;
  }
  memcpy(sum, sums, sizeof sums);
}

template <int N>
static void attend(const Call& c, const Task& t) {
  const int64_t G = c.H / c.K, tiles = (t.end - t.begin + LANES - 1) / LANES;
  const int64_t lanes = std::max(c.key_dim, c.value_dim);
  static thread_local std::vector<float> buffer;
  buffer.resize(LANES * lanes + tiles * N * LANES + 16);
  float* held = (float*)(((uintptr_t)buffer.data() + 63) / 64 * 64);
  float* scores = held + LANES * lanes;
  Ints places = {};
  for (int i = 0; i < LANES; i++) places[i] = i;
  const float* q[N];
  int32_t position[N];
  for (int n = 0; n < N; n++) {
    const int64_t token = (t.row + n) / G, head = t.k * G + (t.row + n) % G;
    q[n] = c.q + ((c.starts[t.b] + token) * c.H + head) * c.key_dim;
    position[n] = c.kv_lens[t.b] - c.lens[t.b] + token;
  }
  auto row_of = [&](int64_t position) {
    const int64_t page = c.table[t.b * c.M + position / c.page];
    return (page * c.K + t.k) * c.page + position % c.page;
  };
  auto scale_of = [&](int64_t position, int half) {
    const int64_t page = c.table[t.b * c.M + position / c.page];
    return load<Floats>(c.scales + ((page * 2 + half) * c.K + t.k) * c.page + position % c.page);
  };
  const Floats never = Floats{} - INFINITY;
  Floats tops[N];
  for (int n = 0; n < N; n++) tops[n] = never;
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int64_t at = t.begin + tile * LANES;
    int64_t stride;
    const float* keys = rows(c, row_of(at), 0, c.key_dim, held, stride);
    for (int n = 0; n < N; n++) {
      Floats products[LANES] = {};
      for (int64_t lane = 0; lane < c.key_dim; lane += LANES) {
        const Floats query = load<Floats>(q[n] + lane);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) products[i] += load<Floats>(keys + i * stride + lane) * query;
      }
      Floats score = sums_of(products) * c.scale;
      if (c.scales) score *= scale_of(at, 0);
      if (c.softcap > 0) {  // tanh x = 1 - 2 / (e^2x + 1), of the absolute value
        const Floats x = score / c.softcap, size = x < 0 ? -x : x;
        const Floats small = exponential(size * -2);
        const Floats tanh = (1 - small) / (1 + small);
        score = (x < 0 ? -tanh : tanh) * c.softcap;
      }
      const Ints ahead = places + (int32_t)(at - position[n]);  // 0 is the query itself
      score = ahead > 0 ? never : score;
      if (c.window) score = ahead <= (int32_t)-c.window ? never : score;
      memcpy(scores + (tile * N + n) * LANES, &score, sizeof score);
      tops[n] = score > tops[n] ? score : tops[n];
    }
  }
  Floats totals[N] = {};
  float* top = t.sum + t.rows * c.value_dim;
  float* total = top + t.rows;
  for (int n = 0; n < N; n++) {
    top[n] = tops[n][0];
    for (int i = 1; i < LANES; i++) top[n] = std::max(top[n], tops[n][i]);
  }
  std::fill(t.sum, t.sum + N * c.value_dim, 0.0f);
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int64_t at = t.begin + tile * LANES, count = std::min<int64_t>(LANES, t.end - at);
    int64_t stride;
    const float* values = rows(c, row_of(at), c.value_start, c.value_dim, held, stride);
    for (int n = 0; n < N; n++) {
      if (top[n] == -INFINITY) continue;
      Floats weights = load<Floats>(scores + (tile * N + n) * LANES) - top[n];
      weights = weights > -87.0f ? exponential(weights) : Floats{};
      totals[n] += weights;
      if (c.scales) weights *= scale_of(at, 1);
      float* sum = t.sum + n * c.value_dim;
      int64_t lane = 0;
      for (; lane + 4 * LANES <= c.value_dim; lane += 4 * LANES)
        add<4>(sum + lane, values + lane, stride, (const float*)&weights, count);
      for (; lane < c.value_dim; lane += LANES)
        add<1>(sum + lane, values + lane, stride, (const float*)&weights, count);
    }
  }
  for (int n = 0; n < N; n++) {
    total[n] = 0;
    for (int i = 0; i < LANES; i++) total[n] += totals[n][i];
  }
}

// Writes one query's output: its parts, and its sink, by the weight of their tops.
static void merge(const Call& c, const Task* parts, int64_t count, int64_t row) {
  const int64_t G = c.H / c.K, v = c.value_dim;
  const Task& first = parts[0];
  const int64_t head = first.k * G + (first.row + row) % G;
  float* y = c.y + ((c.starts[first.b] + (first.row + row) / G) * c.H + head) * v;
  float top = c.sinks ? c.sinks[head] : -INFINITY;
  for (int64_t i = 0; i < count; i++) top = std::max(top, parts[i].sum[first.rows * v + row]);
  if (top == -INFINITY) return;
  float total = c.sinks ? std::exp(c.sinks[head] - top) : 0;
  for (int64_t i = 0; i < count; i++) {
    const float* tops = parts[i].sum + first.rows * v;
    const float weight = std::exp(tops[row] - top);
    total += weight * tops[first.rows + row];
    for (int64_t lane = 0; lane < v; lane++) y[lane] += weight * parts[i].sum[row * v + lane];
  }
  if (total > 0)
    for (int64_t lane = 0; lane < v; lane++) y[lane] /= total;
}

static ffi::Error run(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer data,
                      ffi::Buffer<ffi::F32> scales, ffi::Buffer<ffi::S32> table,
                      ffi::Buffer<ffi::S32> kv_lens, ffi::Buffer<ffi::S32> starts,
                      ffi::Buffer<ffi::S32> lens, ffi::Buffer<ffi::F32> sinks,
                      ffi::ResultBuffer<ffi::F32> y, int64_t value_start, int64_t window,
                      float scale, float softcap) {
  const auto shape = data.dimensions();
  const Call c{q.typed_data(), (const char*)data.untyped_data(),
               scales.element_count() ? scales.typed_data() : nullptr,
               sinks.element_count() ? sinks.typed_data() : nullptr,
               table.typed_data(), kv_lens.typed_data(), starts.typed_data(), lens.typed_data(),
               y->typed_data(), data.element_type(), q.dimensions()[1], shape[1], q.dimensions()[2],
               shape[2], shape[3], table.dimensions()[1], value_start, y->dimensions()[2], window,
               scale, softcap};
  if (c.type != ffi::F32 && c.type != ffi::BF16 && c.type != ffi::S8)
    return ffi::Error::InvalidArgument("pages have to be float32, bfloat16 or int8");
  if (c.page % LANES || c.key_dim % LANES || c.value_dim % LANES)
    return ffi::Error::InvalidArgument("pages and heads have to be multiples of vectors");
  std::fill(c.y, c.y + y->element_count(), 0.0f);
  const int64_t B = table.dimensions()[0], G = c.H / c.K;
  std::vector<Task> tasks;
  std::vector<int64_t> counts;  // parts of the same queries, one after another
  int64_t size = 0;
  for (int64_t b = 0; b < B; b++) {
    const int64_t queries = c.lens[b] * G, first = c.kv_lens[b] - c.lens[b];
    int64_t begin = window ? std::max<int64_t>(0, first - window + 1) / LANES * LANES : 0;
    const int64_t length = c.kv_lens[b] - begin;
    if (queries <= 0 || length <= 0) continue;
    const int64_t wanted = 2 * pool.num_threads() / (B * c.K) + 1;
    const int64_t parts = std::max<int64_t>(1, std::min(wanted, length / SHORTEST_PART));
    const int64_t part = ((length + parts - 1) / parts + LANES - 1) / LANES * LANES;
    for (int64_t k = 0; k < c.K; k++)
      for (int64_t row = 0; row < queries; row += MOST_ROWS) {
        const int64_t rows = std::min<int64_t>(MOST_ROWS, queries - row);
        counts.push_back(0);
        for (int64_t at = begin; at < c.kv_lens[b]; at += part, counts.back()++) {
          tasks.push_back({b, k, row, rows, at, std::min<int64_t>(at + part, c.kv_lens[b]), nullptr});
          size += rows * (c.value_dim + 2);
        }
      }
  }
  std::vector<float> results(size);
  float* next = results.data();
  for (Task& task : tasks) task.sum = next, next += task.rows * (c.value_dim + 2);
  const Task* all = tasks.data();
  parallel(pool, tasks.size(), [=](int64_t i) {
    const Task& task = all[i];
    if (task.rows == 4) return attend<4>(c, task);
    if (task.rows == 3) return attend<3>(c, task);
    if (task.rows == 2) return attend<2>(c, task);
    attend<1>(c, task);
  });
  for (int64_t count : counts) {
    for (int64_t row = 0; row < all->rows; row++) merge(c, all, count, row);
    all += count;
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(paged, run, ffi::Ffi::Bind()
                                              .Ctx<ffi::ThreadPool>()
                                              .Arg<ffi::Buffer<ffi::F32>>()
                                              .Arg<ffi::AnyBuffer>()
                                              .Arg<ffi::Buffer<ffi::F32>>()
                                              .Arg<ffi::Buffer<ffi::S32>>()
                                              .Arg<ffi::Buffer<ffi::S32>>()
                                              .Arg<ffi::Buffer<ffi::S32>>()
                                              .Arg<ffi::Buffer<ffi::S32>>()
                                              .Arg<ffi::Buffer<ffi::F32>>()
                                              .Ret<ffi::Buffer<ffi::F32>>()
                                              .Attr<int64_t>("value_start")
                                              .Attr<int64_t>("window")
                                              .Attr<float>("scale")
                                              .Attr<float>("softcap"));
