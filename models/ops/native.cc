// Paged attention, and products with weights, for CPU as XLA custom calls. See models/ops/native.py.
//
// Letters as in models/ops/attention.py: T tokens, S sequences, N q heads, K kv heads, H head dim,
// M pages of a sequence's table, P pages in the pool, G tokens a page. All arrays are dense, row-major.

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

// c[M, N*W] = a[M, depth] @ b[depth, N*W], added to what is there if `add`. All in registers. next:
// what is to be in the cache when this is done, as many rows as b and laid out like it; or null.
template <int W, int M, int N>
void tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
          int64_t depth, bool add, const float* next = nullptr) {
  using V = Vector<W>;
  typename V::Type sum[M][N];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) sum[i][j] = add ? V::load(c + i * ldc + j * W) : V::all(0.0f);
  for (int64_t t = 0; t < depth; t++) {
    if (next)
      for (int j = 0; j < N * W; j += 16) __builtin_prefetch(next + t * ldb + j);
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
// each sum waits for itself. next: as of `tile`.
template <int W, int N>
void tile_rows(int64_t m, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
               int64_t ldc, int64_t depth, bool add, const float* next = nullptr) {
  for (int64_t tiles = (m + 5) / 6; tiles; tiles--) {
    int64_t rows = (m + tiles - 1) / tiles;
    switch (rows) {
      case 6: tile<W, 6, N>(a, lda, b, ldb, c, ldc, depth, add, next); break;
      case 5: tile<W, 5, N>(a, lda, b, ldb, c, ldc, depth, add, next); break;
      case 4: tile<W, 4, N>(a, lda, b, ldb, c, ldc, depth, add, next); break;
      case 3: tile<W, 3, N>(a, lda, b, ldb, c, ldc, depth, add, next); break;
      case 2: tile<W, 2, N>(a, lda, b, ldb, c, ldc, depth, add, next); break;
      case 1: tile<W, 1, N>(a, lda, b, ldb, c, ldc, depth, add, next); break;
    }
    m -= rows, a += rows * lda, c += rows * ldc, next = nullptr;
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
// Rows that are enough for a task.
constexpr int64_t kRows = 24;

// y[m, n] = x[m, depth] @ w, whose columns, kPanel at a time, are panels [depth, kPanel], the last one
// filled up with zeros. So each thread reads memory from one end to the other; what comes next is on
// its way while it computes.
void linear_panel(int64_t m, int64_t n, int64_t depth, const float* x, const float* panel, float* y) {
  for (int64_t t = 0; t < depth; t += kDepth) {
    int64_t some = std::min(kDepth, depth - t);
    const float* next = panel + (t + some) * kPanel;  // past the last one lies the next panel
    tile_rows<kWidth, kColumns>(m, x + t, depth, panel + t * kPanel, kPanel, y, n, some, t > 0, next);
  }
}

struct Shape {
  int64_t tokens, sequences, heads, kv, head, pages, page, table;
};

struct Arrays {
  const float *q, *k, *v;
  float *keys, *values, *out;  // the pool's pages, written in place
  const int32_t *slots, *starts, *contexts, *table;
};

// Up to kBlock tokens in a row of one sequence. start: the position of the first.
struct Block {
  int64_t sequence, first, start, count;
};

// Queries that take a sequence's pages together. More read them less often, and see more of the
// last of them in vain.
constexpr int64_t kBlock = 32;

std::vector<Block> blocks_of(const Shape& s, const Arrays& x) {
  std::vector<Block> blocks;
  for (int64_t i = 0; i < s.sequences; i++) {
    int64_t first = x.starts[i], end = x.starts[i + 1], before = x.contexts[i] - (end - first);
    for (int64_t at = first; at < end; at += kBlock)
      blocks.push_back({i, at, before + at - first, std::min(kBlock, end - at)});
  }
  // Those that take longest come first, so that no thread is left with one at the end.
  auto cost = [](const Block& b) { return b.count * (b.start + b.count); };
  std::stable_sort(blocks.begin(), blocks.end(),
                   [&](const Block& a, const Block& b) { return cost(a) > cost(b); });
  return blocks;
}

// Writes the new keys and values of some tokens and one kv head into the pool.
void append(const Shape& s, const Arrays& x, int64_t first, int64_t count, int64_t kv) {
  for (int64_t token = first; token < first + count; token++) {
    int64_t page = x.slots[token] / s.page, slot = x.slots[token] % s.page;
    if (page < 0 || page >= s.pages) continue;
    const float* k = x.k + (token * s.kv + kv) * s.head;
    const float* v = x.v + (token * s.kv + kv) * s.head;
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

// Attention of a block's queries of the q heads that share one kv head.
template <int W>
void attend(const Shape& s, const Arrays& x, const Block& block, int64_t kv) {
  int64_t group = s.heads / s.kv, queries = block.count * group;
  float* out = x.out + (block.first * s.heads + kv * group) * s.head;
  thread_local std::vector<float> space;
  space.resize(queries * (2 * s.head + s.page + 2));
  float *q = space.data(), *sum = q + queries * s.head, *scores = sum + queries * s.head;
  float *peak = scores + queries * s.page, *total = peak + queries;
  float scale = 1.0f / std::sqrt(static_cast<float>(s.head));
  for (int64_t i = 0; i < queries; i++) {
    int64_t token = block.first + i / group;
    const float* from = x.q + (token * s.heads + kv * group + i % group) * s.head;
    for (int64_t h = 0; h < s.head; h++) q[i * s.head + h] = from[h] * scale;
  }
  std::fill_n(sum, queries * s.head, 0.0f);
  std::fill_n(peak, queries, -INFINITY);
  std::fill_n(total, queries, 0.0f);

  int64_t start = block.start, used = (start + block.count + s.page - 1) / s.page;
  for (int64_t index = 0; index < std::min(used, s.table); index++) {
    int64_t page = x.table[block.sequence * s.table + index];
    page = std::clamp<int64_t>(page, 0, s.pages - 1);
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
  std::vector<Block> blocks = blocks_of(s, x);
  int64_t tasks = blocks.size() * s.kv, real = x.starts[s.sequences];
  // The tokens of a prompt see each other's keys; a token that is alone sees no other of this step.
  bool alone = std::all_of(blocks.begin(), blocks.end(), [&](const Block& block) {
    return x.starts[block.sequence + 1] - x.starts[block.sequence] == 1;
  });
  if (!alone)
    parallel(pool, tasks, [&](int64_t i) {
      append(s, x, blocks[i / s.kv].first, blocks[i / s.kv].count, i % s.kv);
    });
  parallel(pool, tasks, [&](int64_t i) {
    const Block& block = blocks[i / s.kv];
    if (alone) append(s, x, block.first, block.count, i % s.kv);
    attend<W>(s, x, block, i % s.kv);
  });
  int64_t numbers = s.heads * s.head;
  std::fill_n(x.out + real * numbers, (s.tokens - real) * numbers, 0.0f);
}

ffi::Error paged_attention(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Floats keys,
                           Floats values, Ints slots, Ints starts, Ints contexts, Ints table,
                           ffi::Result<Floats> out, ffi::Result<Floats> new_keys,
                           ffi::Result<Floats> new_values) {
  auto dims = q.dimensions(), pool_dims = keys.dimensions(), table_dims = table.dimensions();
  Shape s{dims[0],      table_dims[0], dims[1],      pool_dims[1],
          pool_dims[2], pool_dims[0],  pool_dims[3], table_dims[1]};
  // XLA keeps to the aliases, or copies into them first; else the pool would not be in the results.
  if (keys.typed_data() != new_keys->typed_data() || values.typed_data() != new_values->typed_data())
    return ffi::Error::Internal("the page pool was not given in place");
  Arrays x{q.typed_data(),         k.typed_data(),           v.typed_data(),
           new_keys->typed_data(), new_values->typed_data(), out->typed_data(),
           slots.typed_data(),     starts.typed_data(),      contexts.typed_data(),
           table.typed_data()};
  if ((s.head | s.page) % kWidth == 0)
    run<kWidth>(pool, s, x);
  else if ((s.head | s.page) % 4 == 0)
    run<4>(pool, s, x);
  else
    return ffi::Error::InvalidArgument("page size and head dim must be multiples of 4");
  return ffi::Error::Success();
}

ffi::Error linear(ffi::ThreadPool pool, Floats x, Floats w, Ints wanted, ffi::Result<Floats> y) {
  int64_t depth = x.dimensions().back(), n = y->dimensions().back();
  int64_t rows = x.element_count() / depth, whole = n / kPanel;
  int64_t m = std::clamp<int64_t>(wanted.typed_data()[0], 0, rows);
  if (w.dimensions().size() != 3 || w.dimensions()[1] != depth || w.dimensions()[2] != kPanel ||
      w.dimensions()[0] != (n + kPanel - 1) / kPanel)
    return ffi::Error::InvalidArgument("the weight is not packed for this product");
  const float *from = x.typed_data(), *panels = w.typed_data();
  float* out = y->typed_data();
  std::fill_n(out + m * n, (rows - m) * n, 0.0f);
  if (!m) return ffi::Error::Success();
  // With many rows a panel is shared by several tasks, so that all threads end at the same time.
  int64_t parts = std::clamp<int64_t>(m / kRows, 1, 8), each = (m + parts - 1) / parts;
  parallel(pool, w.dimensions()[0] * parts, [&](int64_t i) {
    int64_t j = i / parts, first = i % parts * each, some = std::min(each, m - first);
    if (some <= 0) return;
    const float *panel = panels + j * depth * kPanel, *rows = from + first * depth;
    float* to = out + first * n;
    if (j < whole) return linear_panel(some, n, depth, rows, panel, to + j * kPanel);
    thread_local std::vector<float> last;
    last.resize(some * kPanel);
    linear_panel(some, kPanel, depth, rows, panel, last.data());
    for (int64_t r = 0; r < some; r++)
      std::copy_n(&last[r * kPanel], n % kPanel, to + r * n + whole * kPanel);
  });
  return ffi::Error::Success();
}

}  // namespace

extern "C" int PanelWidth() { return kPanel; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    Linear, linear,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Floats>()
        .Arg<Floats>()
        .Arg<Ints>()
        .Ret<Floats>());

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
                                  .Arg<Ints>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>());
