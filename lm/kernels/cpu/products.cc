// y[B, R] = x[B, K] times a matrix of small integers in groups along K that have a scale each.
//
//   words     u32 [R/16, K * BITS/32, 16]: panels of 16 columns. A word has the next 32/BITS numbers
//             of one column, unsigned, the first in its lowest bits.
//   scales    f32 [R/16, groups, 16]
//   offsets   f32 [R/16, groups, 16] or [0]: minimums, or zero points
//
// A number q stands for scale * (q - zero), with a zero point of all or of each group, or for
// scale * q + minimum. Activations are not rounded, and no integer is converted: or-ed into the
// mantissa of 2^BITS, q is the float 2^BITS + q, from which 2^BITS and the zero point are taken in
// one subtraction. A group's minimum costs one product with the sum of its activations.
#include "lanes.h"

constexpr int64_t PREFETCH_BYTES = 4096;  // ahead: a panel is one stream, which crosses pages
constexpr int64_t PANELS_PER_TASK = 8;
constexpr int PANEL = 16;    // columns
constexpr int MOST_ROWS = LANES / 2;  // at once: their sums take a quarter of the registers

struct Matrix {
  const uint32_t* words;
  const float *scales, *offsets;
  int64_t K, groups;
  float zero;
  bool minimums;  // what the offsets are
};

// The i-th number of each word, of which BITS of FIELD bits are used, as 2^BITS + q.
template <int FIELD, int BITS>
static inline Floats number(Words words, int i) {
  constexpr int lowest = 23 - BITS;  // bit of the mantissa
  const int left = lowest - FIELD * i;
  const Words moved = left >= 0 ? words << left : words >> -left;
  return (Floats)((moved & (((1u << BITS) - 1) << lowest)) | ((127u + BITS) << 23));
}

// LANES columns from `column` on times N rows of x, SPAN numbers at a time, of which a group has one
// or several.
template <int N, int FIELD, int BITS, int SPAN>
static void multiply(const Matrix& m, int64_t column, const float* x, const float* sums, float* y,
                     int64_t R) {
  constexpr int PER_WORD = 32 / FIELD;
  constexpr int CHAINS = N <= 2 ? 2 : 1;  // additions that need not wait
  const int64_t per_group = m.K / SPAN / m.groups;
  const int64_t panel = column / PANEL, lane = column % PANEL;
  const uint32_t* words = m.words + panel * (m.K / PER_WORD) * PANEL + lane;
  const int64_t first = panel * m.groups * PANEL + lane;
  Floats total[N] = {};
  for (int64_t group = 0; group < m.groups; group++) {
    const Floats scale = load<Floats>(m.scales + first + group * PANEL);
    Floats center = Floats{} + ((1 << BITS) + m.zero), minimum = {};
    if (m.offsets) (m.minimums ? minimum : center) += load<Floats>(m.offsets + first + group * PANEL);
    Floats inner[N] = {};
    for (int64_t span = group * per_group; span < (group + 1) * per_group; span++) {
      Floats parts[N][CHAINS] = {};
#pragma GCC unroll 8
      for (int word = 0; word < SPAN / PER_WORD; word++, words += PANEL) {
        const Words packed = load<Words>(words);
        __builtin_prefetch((const char*)words + PREFETCH_BYTES);
#pragma GCC unroll 8
        for (int i = 0; i < PER_WORD; i++) {
          const Floats weights = number<FIELD, BITS>(packed, i) - center;
#pragma GCC unroll 8
          for (int n = 0; n < N; n++)
            parts[n][i % CHAINS] += weights * x[n * m.K + span * SPAN + word * PER_WORD + i];
        }
      }
      for (int n = 0; n < N; n++) {
        for (int chain = 1; chain < CHAINS; chain++) parts[n][0] += parts[n][chain];
        inner[n] += parts[n][0];
      }
    }
    for (int n = 0; n < N; n++) {
      total[n] += inner[n] * scale;
      if (m.minimums) total[n] += minimum * sums[n * m.groups + group];
    }
  }
  for (int n = 0; n < N; n++) memcpy(y + n * R + column, &total[n], sizeof total[n]);
}

template <int FIELD, int BITS, int SPAN>
static ffi::Error product(ffi::ThreadPool& pool, const Matrix& m, int64_t B, int64_t R,
                          const float* x, float* y) {
  const int64_t panels = R / PANEL, size = m.K / m.groups;
  std::unique_ptr<float[]> held(new float[m.minimums ? B * m.groups : 0]);
  for (int64_t i = 0; m.minimums && i < B * m.groups; i++) {
    float sum = 0;
    for (int64_t k = 0; k < size; k++) sum += x[i * size + k];
    held[i] = sum;
  }
  const float* sums = held.get();
  parallel(pool, (panels + PANELS_PER_TASK - 1) / PANELS_PER_TASK, [=](int64_t task) {
    const int64_t end = std::min(panels, (task + 1) * PANELS_PER_TASK);
    for (int64_t column = task * PANELS_PER_TASK * PANEL; column < end * PANEL; column += LANES) {
      int64_t b = 0;
      auto rows = [&](auto n) {
        for (; B - b >= n; b += n)
          multiply<n, FIELD, BITS, SPAN>(m, column, x + b * m.K, sums + b * m.groups, y + b * R, R);
      };
      rows(std::integral_constant<int, MOST_ROWS>{});
      rows(std::integral_constant<int, 4>{});
      rows(std::integral_constant<int, 2>{});
      rows(std::integral_constant<int, 1>{});
    }
  });
  return ffi::Error::Success();
}

static ffi::Error run(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U32> words,
                      ffi::Buffer<ffi::F32> scales, ffi::Buffer<ffi::F32> offsets,
                      ffi::ResultBuffer<ffi::F32> y, int64_t bits, float zero, bool minimums) {
  const int64_t B = x.dimensions()[0], K = x.dimensions()[1], R = y->dimensions()[1];
  const int64_t groups = scales.dimensions()[1];
  const Matrix m{words.typed_data(), scales.typed_data(),
                 offsets.element_count() ? offsets.typed_data() : nullptr, K, groups, zero, minimums};
  auto with = [&](auto field, auto bits, auto span) {
    return product<field, bits, span>(pool, m, B, R, x.typed_data(), y->typed_data());
  };
#define INT(n) std::integral_constant<int, n>{}
  const bool whole = K / groups % 32 == 0;
  if (bits <= 4) return whole ? with(INT(4), INT(4), INT(32)) : with(INT(4), INT(4), INT(16));
  if (bits <= 6) return whole ? with(INT(8), INT(6), INT(32)) : with(INT(8), INT(6), INT(16));
  return whole ? with(INT(8), INT(8), INT(32)) : with(INT(8), INT(8), INT(16));
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(products, run, ffi::Ffi::Bind()
                                                 .Ctx<ffi::ThreadPool>()
                                                 .Arg<ffi::Buffer<ffi::F32>>()
                                                 .Arg<ffi::Buffer<ffi::U32>>()
                                                 .Arg<ffi::Buffer<ffi::F32>>()
                                                 .Arg<ffi::Buffer<ffi::F32>>()
                                                 .Ret<ffi::Buffer<ffi::F32>>()
                                                 .Attr<int64_t>("bits")
                                                 .Attr<float>("zero")
                                                 .Attr<bool>("minimums"));
