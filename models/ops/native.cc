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
#include <type_traits>
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

// What a product asks memory for ahead: as much from `from` on as `rows` rows of its b. In the order
// of addresses, which memory gives fastest.
struct Ahead {
  const float* from = nullptr;
  int64_t rows = 0;
};

// c[M, N*W] = a[M, depth] @ b[depth, N*W], added to what is there if `add`. All in registers. Dense:
// the rows of b follow each other, and ldb need not be known.
template <int W, int M, int N, bool Dense>
void tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
          int64_t depth, bool add, Ahead ahead) {
  using V = Vector<W>;
  if constexpr (Dense) ldb = N * W;
  typename V::Type sum[M][N];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) sum[i][j] = add ? V::load(c + i * ldc + j * W) : V::all(0.0f);
  auto step = [&](int64_t t) {
    typename V::Type row[N];
    for (int j = 0; j < N; j++) row[j] = V::load(b + t * ldb + j * W);
    for (int i = 0; i < M; i++) {
      typename V::Type value = V::all(a[i * lda + t]);
      for (int j = 0; j < N; j++) sum[i][j] += value * row[j];
    }
  };
  int64_t t = 0;
  for (; t < ahead.rows; t++) {
    for (int j = 0; j < N * W; j += 16) __builtin_prefetch(ahead.from + t * N * W + j);
    step(t);
  }
  for (; t < depth; t++) step(t);
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) V::store(c + i * ldc + j * W, sum[i][j]);
}

// In tiles of up to 6 rows, as even as can be: one of 1 or 2 takes almost as long as one of 4, since
// each sum waits for itself. next: what is wanted after this, dense and as large as b's columns, or
// null. Each tile asks for its share of it: memory is then busy all the time, and never in the way.
template <int W, int N, bool Dense>
void tile_rows(int64_t m, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
               int64_t ldc, int64_t depth, bool add, const float* next = nullptr) {
  int64_t tiles = (m + 5) / 6, share = tiles ? (depth + tiles - 1) / tiles : 0;
  for (int64_t asked = 0; tiles; tiles--) {
    int64_t rows = (m + tiles - 1) / tiles;
    Ahead ahead;
    if (next) ahead = {next + asked * N * W, std::min(share, depth - asked)};
    switch (rows) {
      case 6: tile<W, 6, N, Dense>(a, lda, b, ldb, c, ldc, depth, add, ahead); break;
      case 5: tile<W, 5, N, Dense>(a, lda, b, ldb, c, ldc, depth, add, ahead); break;
      case 4: tile<W, 4, N, Dense>(a, lda, b, ldb, c, ldc, depth, add, ahead); break;
      case 3: tile<W, 3, N, Dense>(a, lda, b, ldb, c, ldc, depth, add, ahead); break;
      case 2: tile<W, 2, N, Dense>(a, lda, b, ldb, c, ldc, depth, add, ahead); break;
      case 1: tile<W, 1, N, Dense>(a, lda, b, ldb, c, ldc, depth, add, ahead); break;
    }
    m -= rows, a += rows * lda, c += rows * ldc, asked += ahead.rows;
  }
}

// c[m, n] = a[m, depth] @ b[depth, n], or added to it. n is a multiple of W. next: see `tile_rows`.
template <int W>
void product(int64_t m, int64_t n, int64_t depth, const float* a, int64_t lda, const float* b,
             int64_t ldb, float* c, int64_t ldc, bool add, const float* next) {
  auto columns = [&](auto count, int64_t j) {
    const float* ahead = next ? next + j * depth : nullptr;
    tile_rows<W, count(), false>(m, a, lda, b + j, ldb, c + j, ldc, depth, add, ahead);
  };
  int64_t j = 0;
  for (; j + kColumns * W <= n; j += kColumns * W)
    columns(std::integral_constant<int, kColumns>(), j);
  for (; j < n; j += W) columns(std::integral_constant<int, 1>(), j);
}

// Columns of a packed weight that lie together. See `linear`.
constexpr int kPanel = kColumns * kWidth;
// Inputs that a product takes at once: of a panel, 8 KiB with AVX2 and 16 KiB with AVX-512, so that
// they, the next ones and six rows of x lie in the first cache.
constexpr int64_t kDepth = kWidth == 16 ? 64 : 2048 / kPanel;
// The rows of x that meet them lie in the second cache.
constexpr int64_t kBlockBytes = 256 * 1024;
// Tasks for each thread, so that all end at about the same time; rows that are enough for a task; and
// panels of one that read the rows of x together.
constexpr int64_t kTasks = 8, kRows = 24, kPanels = 3;

// How a product of m rows is cut into tasks: into blocks of `rows` of x, and so many panels at once,
// which take `depth` inputs at once.
struct Cut {
  int64_t depth, rows, blocks, panels;

  Cut(int64_t m, int64_t inputs, int64_t whole, int64_t threads) {
    int64_t parts = (inputs + kDepth - 1) / kDepth, wanted = kTasks * threads;
    depth = (inputs + parts - 1) / parts;
    int64_t most = std::max<int64_t>(kBlockBytes / (depth * sizeof(float)) / 6, 1) * 6;
    int64_t shared = std::min(m / kRows, wanted / std::max<int64_t>(whole, 1));
    blocks = std::max((m + most - 1) / most, std::max<int64_t>(shared, 1));
    rows = ((m + blocks - 1) / blocks + 5) / 6 * 6;
    panels = std::clamp<int64_t>(whole * blocks / wanted, 1, kPanels);
  }
};

// y[m, panels * kPanel] = x[m, inputs] @ w, whose columns, kPanel at a time, are panels
// [inputs, kPanel]; rows of y are n apart. What comes next is on its way while this is computed: after
// these panels, those of the next task.
void linear_panels(int64_t m, int64_t n, int64_t inputs, int64_t depth, const float* x,
                   const float* w, int64_t panels, float* y) {
  int64_t size = inputs * kPanel;
  for (int64_t t = 0; t < inputs; t += depth) {
    int64_t some = std::min(depth, inputs - t);
    for (int64_t j = 0; j < panels; j++) {
      const float* panel = w + j * size + t * kPanel;
      const float* next = panel + size;
      if (j + 1 == panels) next = t + some < inputs ? w + (t + some) * kPanel : w + panels * size;
      tile_rows<kWidth, kColumns, true>(m, x + t, inputs, panel, kPanel, y + j * kPanel, n, some, t > 0,
                                  next);
    }
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
  used = std::min(used, s.table);
  auto page_at = [&](int64_t index) {
    int64_t page = x.table[block.sequence * s.table + std::min(index, used - 1)];
    return (std::clamp<int64_t>(page, 0, s.pages - 1) * s.kv + kv) * s.head * s.page;
  };
  for (int64_t index = 0; index < used; index++) {
    int64_t base = index * s.page, at = page_at(index);
    // The queries before `first` see nothing of this page.
    int64_t first = std::max<int64_t>(0, base - start) * group, some = queries - first;
    const float *keys = x.keys + at, *values = x.values + at;
    product<W>(some, s.page, s.head, q + first * s.head, s.head, keys, s.page,
               scores + first * s.page, s.page, false, values);
    for (int64_t i = first; i < queries; i++) {
      int64_t visible = std::min<int64_t>(s.page, start + i / group + 1 - base);
      weigh<W>(s, visible, scores + i * s.page, sum + i * s.head, peak[i], total[i]);
    }
    product<W>(some, s.head, s.page, scores + first * s.page, s.page, values, s.head,
               sum + first * s.head, s.head, true, x.keys + page_at(index + 1));
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
  int64_t inputs = x.dimensions().back(), n = y->dimensions().back();
  int64_t rows = x.element_count() / inputs, whole = n / kPanel;
  int64_t m = std::clamp<int64_t>(wanted.typed_data()[0], 0, rows);
  if (w.dimensions().size() != 3 || w.dimensions()[1] != inputs || w.dimensions()[2] != kPanel ||
      w.dimensions()[0] != (n + kPanel - 1) / kPanel)
    return ffi::Error::InvalidArgument("the weight is not packed for this product");
  const float *from = x.typed_data(), *panels = w.typed_data();
  float* out = y->typed_data();
  std::fill_n(out + m * n, (rows - m) * n, 0.0f);
  if (!m) return ffi::Error::Success();
  Cut cut(m, inputs, whole, pool.num_threads());
  int64_t groups = (whole + cut.panels - 1) / cut.panels + (n % kPanel > 0);
  parallel(pool, groups * cut.blocks, [&](int64_t i) {
    int64_t first = i / groups * cut.rows, some = std::min(cut.rows, m - first);
    int64_t j = i % groups * cut.panels, count = std::min(cut.panels, whole - j);
    if (some <= 0) return;
    const float* block = from + first * inputs;
    float* to = out + first * n;
    if (count > 0)
      return linear_panels(some, n, inputs, cut.depth, block, panels + j * inputs * kPanel, count,
                           to + j * kPanel);
    // The last panel is filled up with zeros, and wider than what is left of a row.
    thread_local std::vector<float> last;
    last.resize(some * kPanel);
    linear_panels(some, kPanel, inputs, cut.depth, block, panels + whole * inputs * kPanel, 1,
                  last.data());
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
