// Paged attention, and products with weights, for CPU as XLA custom calls. See models/ops/native.py.
//
// Letters as in models/ops/attention.py: R rows, Q queries a row, N q heads, K kv heads, H head dim,
// M pages of a row's table, P pages in the pool, G tokens a page. All arrays are dense, row-major.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

// The widest vectors of the machine that this is compiled for, and how many of them, beside 6 rows,
// a product keeps in registers.
#if defined(__AVX512F__)
constexpr int kWidth = 16, kColumns = 4;
#elif defined(__AVX__)
constexpr int kWidth = 8, kColumns = 2;
#else
constexpr int kWidth = 4, kColumns = 2;
#endif

// W floats side by side.
template <int W>
struct Vector {
  typedef float Type __attribute__((vector_size(W * sizeof(float))));
  typedef int32_t Bits __attribute__((vector_size(W * sizeof(float))));

  static Type load(const float* from) {
    Type value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
  static void store(float* to, Type value) { std::memcpy(to, &value, sizeof(value)); }
  static Type all(float value) { return value - Type{}; }

  // e^x for x <= 0, to 2 ulp; what would be below 2^-126 is about that. x = n ln 2 + f.
  static Type exp(Type x) {
    x = x < -87.0f ? all(-87.0f) : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
    Type rounded = x * 1.44269504f + magic;
    Type n = rounded - magic;
    Type f = x - n * 0.693359375f + n * 2.12194440e-4f;
    Type p = all(1.3888889e-3f);
    for (float c : {8.3333333e-3f, 4.1666667e-2f, 1.6666667e-1f, 0.5f, 1.0f, 1.0f}) p = p * f + c;
    Bits bits;  // the lowest of `rounded` are n
    std::memcpy(&bits, &rounded, sizeof(bits));
    bits = (bits + 127) << 23;
    Type power;
    std::memcpy(&power, &bits, sizeof(power));
    return p * power;
  }
};

// c[M, N*W] = a[M, depth] @ b[depth, N*W], added to what is there if `add`. All in registers.
template <int W, int M, int N>
void tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
          int64_t depth, bool add) {
  using V = Vector<W>;
  typename V::Type sum[M][N];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) sum[i][j] = add ? V::load(c + i * ldc + j * W) : V::all(0.0f);
  for (int64_t t = 0; t < depth; t++) {
    typename V::Type row[N];
    for (int j = 0; j < N; j++) row[j] = V::load(b + t * ldb + j * W);
    for (int i = 0; i < M; i++) {
      typename V::Type value = V::all(a[i * lda + t]);
      for (int j = 0; j < N; j++) sum[i][j] += value * row[j];
    }
  }
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) V::store(c + i * ldc + j * W, sum[i][j]);
}

// In tiles of up to 6 rows, as even as can be: one of 1 or 2 takes almost as long as one of 4, since
// each sum waits for itself.
template <int W, int N>
void tile_rows(int64_t m, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
               int64_t ldc, int64_t depth, bool add) {
  for (int64_t tiles = (m + 5) / 6; tiles; tiles--) {
    int64_t rows = (m + tiles - 1) / tiles;
    switch (rows) {
      case 6: tile<W, 6, N>(a, lda, b, ldb, c, ldc, depth, add); break;
      case 5: tile<W, 5, N>(a, lda, b, ldb, c, ldc, depth, add); break;
      case 4: tile<W, 4, N>(a, lda, b, ldb, c, ldc, depth, add); break;
      case 3: tile<W, 3, N>(a, lda, b, ldb, c, ldc, depth, add); break;
      case 2: tile<W, 2, N>(a, lda, b, ldb, c, ldc, depth, add); break;
      case 1: tile<W, 1, N>(a, lda, b, ldb, c, ldc, depth, add); break;
    }
    m -= rows, a += rows * lda, c += rows * ldc;
  }
}

// c[m, n] = a[m, depth] @ b[depth, n], or added to it. n is a multiple of W.
template <int W>
void product(int64_t m, int64_t n, int64_t depth, const float* a, int64_t lda, const float* b,
             int64_t ldb, float* c, int64_t ldc, bool add) {
  int64_t j = 0;
  for (; j + kColumns * W <= n; j += kColumns * W)
    tile_rows<W, kColumns>(m, a, lda, b + j, ldb, c + j, ldc, depth, add);
  for (; j < n; j += W) tile_rows<W, 1>(m, a, lda, b + j, ldb, c + j, ldc, depth, add);
}

// Columns of a packed weight that lie together. See `linear`.
constexpr int kPanel = kColumns * kWidth;
// Of a panel, so many rows are in the first cache at once: 16 KiB.
constexpr int64_t kDepth = 4096 / kPanel;

// y[m, n] = x[m, depth] @ w, whose columns, kPanel at a time, are panels [depth, kPanel], the last one
// filled up with zeros. So each thread reads memory from one end to the other.
void linear_panel(int64_t m, int64_t n, int64_t depth, const float* x, const float* panel, float* y) {
  for (int64_t t = 0; t < depth; t += kDepth)
    tile_rows<kWidth, kColumns>(m, x + t, depth, panel + t * kPanel, kPanel, y, n,
                                std::min(kDepth, depth - t), t > 0);
}

struct Shape {
  int64_t rows, queries, heads, kv, head, pages, page, table;
};

struct Arrays {
  const float *q, *k, *v;
  float *keys, *values, *out;  // the pool's pages, written in place
  const int32_t *start, *count, *table;
};

// Writes the new keys and values of one row and kv head into the pool.
void append(const Shape& s, const Arrays& x, int64_t row, int64_t kv) {
  const int32_t* table = x.table + row * s.table;
  for (int64_t query = 0; query < x.count[row]; query++) {
    int64_t position = x.start[row] + query, slot = position % s.page;
    int64_t page = table[std::min(position / s.page, s.table - 1)];
    if (page < 0 || page >= s.pages) continue;
    const float* k = x.k + ((row * s.queries + query) * s.kv + kv) * s.head;
    const float* v = x.v + ((row * s.queries + query) * s.kv + kv) * s.head;
    float* block = x.keys + (page * s.kv + kv) * s.head * s.page + slot;
    for (int64_t h = 0; h < s.head; h++) block[h * s.page] = k[h];
    std::memcpy(x.values + ((page * s.kv + kv) * s.page + slot) * s.head, v,
                s.head * sizeof(float));
  }
}

// The running softmax of one query over one page: turns its scores, of which the first `visible`
// count, into weights, and scales what was summed up before.
template <int W>
void weigh(const Shape& s, int64_t visible, float* scores, float* out, float& peak, float& total) {
  using V = Vector<W>;
  std::fill(scores + visible, scores + s.page, -1e30f);
  typename V::Type most = V::load(scores);
  for (int64_t i = W; i < s.page; i += W) {
    typename V::Type next = V::load(scores + i);
    most = most > next ? most : next;
  }
  float highest = peak;
  for (int i = 0; i < W; i++) highest = std::max(highest, most[i]);
  if (highest > peak) {
    float decay = std::exp(peak - highest);  // 0 at the first page, where peak is -inf
    total *= decay;
    for (int64_t h = 0; h < s.head; h += W) V::store(out + h, V::load(out + h) * decay);
    peak = highest;
  }
  typename V::Type sum = V::all(0.0f);
  for (int64_t i = 0; i < s.page; i += W) {
    typename V::Type weight = V::exp(V::load(scores + i) - peak);
    V::store(scores + i, weight);
    sum += weight;
  }
  for (int i = 0; i < W; i++) total += sum[i];
}

// Attention of all queries of one row's q heads that share one kv head.
template <int W>
void attend(const Shape& s, const Arrays& x, int64_t row, int64_t kv) {
  int64_t count = x.count[row], group = s.heads / s.kv, queries = count * group;
  float* out = x.out + (row * s.queries * s.heads + kv * group) * s.head;
  for (int64_t query = count; query < s.queries; query++)
    std::fill_n(out + query * s.heads * s.head, group * s.head, 0.0f);
  if (!queries) return;
  thread_local std::vector<float> space;
  space.resize(queries * (2 * s.head + s.page + 2));
  float *q = space.data(), *sum = q + queries * s.head, *scores = sum + queries * s.head;
  float *peak = scores + queries * s.page, *total = peak + queries;
  float scale = 1.0f / std::sqrt(static_cast<float>(s.head));
  for (int64_t i = 0; i < queries; i++) {
    const float* from = x.q + ((row * s.queries + i / group) * s.heads + kv * group + i % group) * s.head;
    for (int64_t h = 0; h < s.head; h++) q[i * s.head + h] = from[h] * scale;
  }
  std::fill_n(sum, queries * s.head, 0.0f);
  std::fill_n(peak, queries, -INFINITY);
  std::fill_n(total, queries, 0.0f);

  int64_t start = x.start[row], used = (start + count + s.page - 1) / s.page;
  for (int64_t index = 0; index < std::min(used, s.table); index++) {
    int64_t page = std::clamp<int64_t>(x.table[row * s.table + index], 0, s.pages - 1);
    int64_t base = index * s.page;
    // The queries before `first` see nothing of this page.
    int64_t first = std::max<int64_t>(0, base - start) * group, some = queries - first;
    const float* keys = x.keys + (page * s.kv + kv) * s.head * s.page;
    const float* values = x.values + (page * s.kv + kv) * s.page * s.head;
    product<W>(some, s.page, s.head, q + first * s.head, s.head, keys, s.page,
               scores + first * s.page, s.page, false);
    for (int64_t i = first; i < queries; i++) {
      int64_t visible = std::min<int64_t>(s.page, start + i / group + 1 - base);
      weigh<W>(s, visible, scores + i * s.page, sum + i * s.head, peak[i], total[i]);
    }
    product<W>(some, s.head, s.page, scores + first * s.page, s.page, values, s.head,
               sum + first * s.head, s.head, true);
  }
  for (int64_t i = 0; i < queries; i++) {
    float* to = out + ((i / group) * s.heads + i % group) * s.head;
    for (int64_t h = 0; h < s.head; h++) to[h] = sum[i * s.head + h] / total[i];
  }
}

// Runs f(0) to f(count - 1), on the pool's threads as far as they are free, and on this one.
template <class F>
void parallel(ffi::ThreadPool& pool, int64_t count, const F& f) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  // A thread that comes late finds nothing left, and does not touch f, which may be gone.
  auto work = [progress, count, &f] {
    for (int64_t i; (i = progress->next.fetch_add(1)) < count;) {
      f(i);
      progress->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 1; i < std::min(pool.num_threads(), count); i++)
    pool.Schedule(std::function<void()>(work));
  work();
  while (progress->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

template <int W>
void run(ffi::ThreadPool& pool, const Shape& s, const Arrays& x) {
  int64_t tasks = s.rows * s.kv;
  // The rows of a prompt see each other's keys; those of a decode step are sequences of their own.
  if (s.queries > 1) parallel(pool, tasks, [&](int64_t i) { append(s, x, i / s.kv, i % s.kv); });
  parallel(pool, tasks, [&](int64_t i) {
    int64_t row = s.rows - 1 - i / s.kv, kv = i % s.kv;  // a prompt's last row takes longest
    if (s.queries == 1) append(s, x, row, kv);
    attend<W>(s, x, row, kv);
  });
}

ffi::Error paged_attention(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Floats keys,
                           Floats values, Ints start, Ints count, Ints table,
                           ffi::Result<Floats> out, ffi::Result<Floats> new_keys,
                           ffi::Result<Floats> new_values) {
  auto dims = q.dimensions(), pool_dims = keys.dimensions();
  Shape s{dims[0],      dims[1],      dims[2],      pool_dims[1],
          pool_dims[2], pool_dims[0], pool_dims[3], table.dimensions()[1]};
  // XLA keeps to the aliases, or copies into them first; else the pool would not be in the results.
  if (keys.typed_data() != new_keys->typed_data() || values.typed_data() != new_values->typed_data())
    return ffi::Error::Internal("the page pool was not given in place");
  Arrays x{q.typed_data(),          k.typed_data(),     v.typed_data(),
           new_keys->typed_data(),  new_values->typed_data(), out->typed_data(),
           start.typed_data(),      count.typed_data(), table.typed_data()};
  if ((s.head | s.page) % kWidth == 0)
    run<kWidth>(pool, s, x);
  else if ((s.head | s.page) % 4 == 0)
    run<4>(pool, s, x);
  else
    return ffi::Error::InvalidArgument("page size and head dim must be multiples of 4");
  return ffi::Error::Success();
}

ffi::Error linear(ffi::ThreadPool pool, Floats x, Floats w, ffi::Result<Floats> y) {
  int64_t depth = x.dimensions().back(), n = y->dimensions().back();
  int64_t m = x.element_count() / depth, whole = n / kPanel;
  if (w.dimensions().size() != 3 || w.dimensions()[1] != depth || w.dimensions()[2] != kPanel ||
      w.dimensions()[0] != (n + kPanel - 1) / kPanel)
    return ffi::Error::InvalidArgument("the weight is not packed for this product");
  const float *rows = x.typed_data(), *panels = w.typed_data();
  float* out = y->typed_data();
  parallel(pool, w.dimensions()[0], [&](int64_t j) {
    const float* panel = panels + j * depth * kPanel;
    if (j < whole) return linear_panel(m, n, depth, rows, panel, out + j * kPanel);
    thread_local std::vector<float> last;
    last.resize(m * kPanel);
    linear_panel(m, kPanel, depth, rows, panel, last.data());
    for (int64_t i = 0; i < m; i++)
      std::copy_n(&last[i * kPanel], n % kPanel, out + i * n + whole * kPanel);
  });
  return ffi::Error::Success();
}

}  // namespace

extern "C" int PanelWidth() { return kPanel; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    Linear, linear,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(PagedAttention, paged_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>());
