// Runs the whole Runge-Kutta integration of the mapping MLP in one parallel region.
//
// The batch is divided among groups of threads. The threads of a group divide each layer's outputs and meet at a
// barrier after every layer. Large groups suit small batches, because together the threads of a group read each weight
// only once. Groups of one thread suit large batches, because they need no barrier.
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#include <cstdlib>
#include <type_traits>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu_kernels.h"
#include "simd.h"

namespace spigan::cpu::SPIGAN_ISA {
namespace {

constexpr std::int64_t kPad = 32;        // dimensions are zero-padded to a multiple of this, so loops have no tails
constexpr std::int64_t kRowBlock = 64;   // rows that a group integrates at a time: their state fits the L2 cache
constexpr std::int64_t kGroupRows = 16;  // a group with fewer rows would wait for weights from beyond the L2 cache
constexpr std::int64_t kThreadWork = 65536;  // multiply-adds of a layer that make another thread worth its barrier

std::int64_t round_up(std::int64_t x, std::int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

template <class V, class T>
inline V value_of(T x) {
  return static_cast<V>(to_float(x));
}

template <>
inline double value_of<double, double>(double x) {
  return x;
}

template <class T, class V>
inline T rounded(V x) {
  return from_float<T>(static_cast<float>(x));
}

template <>
inline double rounded<double, double>(double x) {
  return x;
}

struct Buffer {
  void* data;
  explicit Buffer(std::int64_t bytes) : data(std::aligned_alloc(64, static_cast<std::size_t>(round_up(bytes, 64)))) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

// Copies matrices [count, dim, dim] of T to [count, padded, padded] of W, padded with zeros.
template <class W, class T>
void pack(const T* from, std::int64_t count, std::int64_t dim, std::int64_t padded, W* to,
          [[maybe_unused]] int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (std::int64_t row = 0; row < count * padded; ++row) {
    const std::int64_t matrix = row / padded, r = row % padded;
    for (std::int64_t c = 0; c < padded; ++c) {
      to[row * padded + c] = r < dim && c < dim ? rounded<W>(value_of<typename Traits<W>::Value>(
                                                      from[(matrix * dim + r) * dim + c]))
                                                : W{};
    }
  }
}

// The data that all threads share. W is the type of the packed weights, T that of the tensors.
template <class W, class T>
struct Plan {
  using Value = typename Traits<W>::Value;
  using Input = typename Traits<W>::Input;
  const Rk4Mlp& args;
  const W* weight;       // [layers, dim, dim], padded
  const Value* bias;     // [layers, dim], padded
  const Value* time;     // [layers, dim], padded
  std::int64_t dim;      // padded
  std::int64_t groups, group_threads;

  std::int64_t first_row(std::int64_t group) const { return args.batch * group / groups; }
};

// The rows that one group is working on. All arrays are [rows, dim].
template <class W, class T>
struct State {
  typename Traits<W>::Value *h, *sum, *y;
  typename Traits<W>::Input *x, *next;
};

// A barrier for the threads of a group. OpenMP's barrier may put a thread to sleep at once, and waking it takes as long
// as a whole layer of a small batch. Threads spin here first. They sleep only if the wait is long, because the thread
// they wait for may itself be waiting for a processor.
struct alignas(64) Barrier {
  std::int32_t arrived, round, sleeping;

  void wait(std::int32_t members) {
    const std::int32_t current = __atomic_load_n(&round, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == members) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&round, current + 1, __ATOMIC_SEQ_CST);
#if defined(__linux__)
      if (__atomic_load_n(&sleeping, __ATOMIC_SEQ_CST) != 0) syscall(SYS_futex, &round, FUTEX_WAKE_PRIVATE, members);
#endif
      return;
    }
    for (int spins = 0; __atomic_load_n(&round, __ATOMIC_ACQUIRE) == current; ++spins) {
      if (spins < 400) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
#if defined(__linux__)
        // The operating system checks `round` again before the thread sleeps, so no wake-up is lost.
        __atomic_add_fetch(&sleeping, 1, __ATOMIC_SEQ_CST);
        syscall(SYS_futex, &round, FUTEX_WAIT_PRIVATE, current, nullptr);
        __atomic_sub_fetch(&sleeping, 1, __ATOMIC_SEQ_CST);
#else
        sched_yield();
#endif
      }
    }
  }
};

// The outputs [begin, end) that a thread computes, and the group it belongs to.
struct Share {
  std::int64_t begin, end;
  Barrier* barrier;
  std::int32_t members;
};

inline void meet(const Share& share) {
  if (share.members > 1) share.barrier->wait(share.members);
}

// Evaluates the field at s.x and stores the result k in s.y. Afterwards s.x may be overwritten.
template <Activation A, class W, class T>
void field(const Plan<W, T>& plan, State<W, T>& s, const Share& share, std::int64_t rows, double t) {
  using Value = typename Traits<W>::Value;
  const std::int64_t dim = plan.dim, layers = plan.args.layers;
  const Value time = static_cast<Value>(t);
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    multiply<W>(s.x, plan.weight + layer * dim * dim, rows, dim, share.begin, share.end, s.y);
    const Value* bias = plan.bias + layer * dim;
    const Value* time_weight = plan.time + layer * dim;
    const bool last = layer + 1 == layers;
    for (std::int64_t r = 0; r < rows; ++r) {
      Value* y = s.y + r * dim;
      typename Traits<W>::Input* next = s.next + r * dim;
      if (last) {
        for (std::int64_t o = share.begin; o < share.end; ++o) y[o] += multiply_add(time, time_weight[o], bias[o]);
      } else {
        for (std::int64_t o = share.begin; o < share.end; ++o) {
          const Value value = y[o] + multiply_add(time, time_weight[o], bias[o]);
          next[o] = rounded<typename Traits<W>::Input>(activate<A>(value));
        }
      }
    }
    if (!last) {
      typename Traits<W>::Input* swap = s.x;
      s.x = s.next;
      s.next = swap;
    }
    meet(share);
  }
}

// Advances the rows of a group from h(t) to h(t + dt).
template <Activation A, class W, class T>
void step(const Plan<W, T>& plan, State<W, T>& s, const Share& share, std::int64_t rows, double t, double dt) {
  using Value = typename Traits<W>::Value;
  const std::int64_t dim = plan.dim;
  for (int stage = 0; stage < kRk4Stages; ++stage) {
    field<A>(plan, s, share, rows, t + rk4_node(stage) * dt);
    const Value weight = static_cast<Value>(rk4_weight(stage) * dt);
    const bool last = stage + 1 == kRk4Stages;
    const Value node = last ? Value(0) : static_cast<Value>(rk4_node(stage + 1) * dt);
    for (std::int64_t r = 0; r < rows; ++r) {
      const Value* k = s.y + r * dim;
      Value *h = s.h + r * dim, *sum = s.sum + r * dim;
      typename Traits<W>::Input* x = s.x + r * dim;
      for (std::int64_t o = share.begin; o < share.end; ++o) {
        const Value total = multiply_add(weight, k[o], stage == 0 ? Value(0) : sum[o]);
        sum[o] = total;
        if (last) h[o] += total;
        x[o] = rounded<typename Traits<W>::Input>(last ? h[o] : multiply_add(node, k[o], h[o]));
      }
    }
    meet(share);
  }
}

template <class W, class T>
void write_state(const Plan<W, T>& plan, const State<W, T>& s, const Share& share, std::int64_t first,
                 std::int64_t rows, std::int64_t slot) {
  const std::int64_t dim = plan.args.dim, end = share.end < dim ? share.end : dim;
  for (std::int64_t r = 0; r < rows; ++r) {
    T* out = static_cast<T*>(plan.args.out) + (slot * plan.args.batch + first + r) * dim;
    for (std::int64_t o = share.begin; o < end; ++o) out[o] = rounded<T>(s.h[r * plan.dim + o]);
  }
}

template <Activation A, class W, class T>
void integrate(const Plan<W, T>& plan, State<W, T> s, const Share& share, std::int64_t first, std::int64_t rows) {
  using Value = typename Traits<W>::Value;
  const Rk4Mlp& a = plan.args;
  for (std::int64_t r = 0; r < rows; ++r) {
    const T* h0 = static_cast<const T*>(a.h0) + (first + r) * a.dim;
    for (std::int64_t o = share.begin; o < share.end; ++o) {
      const Value h = o < a.dim ? value_of<Value>(h0[o]) : Value(0);
      s.h[r * plan.dim + o] = h;
      s.x[r * plan.dim + o] = rounded<typename Traits<W>::Input>(h);
    }
  }
  meet(share);
  std::int64_t slot = 0;
  for (std::int64_t k = 0; k < a.interval_count; ++k) {
    const Interval interval = a.intervals[k];
    for (std::int64_t i = 0; i < interval.count; ++i) {
      step<A>(plan, s, share, rows, interval.start + static_cast<double>(i) * interval.length, interval.length);
      if (a.every_step || i + 1 == interval.count) write_state(plan, s, share, first, rows, slot++);
    }
  }
}

template <Activation A, class W, class T>
bool run(const Plan<W, T>& plan) {
  using Value = typename Traits<W>::Value;
  using Input = typename Traits<W>::Input;
  const std::int64_t most = (plan.args.batch + plan.groups - 1) / plan.groups;
  const std::int64_t dim = plan.dim, rows = most < kRowBlock ? most : kRowBlock;
  const std::int64_t value_bytes = rows * dim * static_cast<std::int64_t>(sizeof(Value));
  const std::int64_t input_bytes = rows * dim * static_cast<std::int64_t>(sizeof(Input));
  const std::int64_t barrier_bytes = static_cast<std::int64_t>(sizeof(Barrier));
  // A multiple of 64, because dim is a multiple of 32.
  const std::int64_t group_bytes = 3 * value_bytes + 2 * input_bytes + barrier_bytes;
  const Buffer buffer(plan.groups * group_bytes);
  if (buffer.data == nullptr) return false;
  for (std::int64_t group = 0; group < plan.groups; ++group) {
    *reinterpret_cast<Barrier*>(static_cast<char*>(buffer.data) + (group + 1) * group_bytes - barrier_bytes) = {};
  }

#pragma omp parallel num_threads(static_cast<int>(plan.groups * plan.group_threads))
  {
#if defined(_OPENMP)
    const std::int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
#else
    const std::int64_t thread = 0, threads = 1;
#endif
    // OpenMP may provide fewer threads than requested. Then every thread processes whole groups.
    const bool complete = threads == plan.groups * plan.group_threads;
    const std::int64_t members = complete ? plan.group_threads : 1;
    const std::int64_t units = dim / kPad, member = thread % members;
    Share share = {units * member / members * kPad, units * (member + 1) / members * kPad, nullptr,
                   static_cast<std::int32_t>(members)};
    for (std::int64_t group = thread / members; group < plan.groups; group += threads / members) {
      char* memory = static_cast<char*>(buffer.data) + group * group_bytes;
      State<W, T> s;
      s.h = reinterpret_cast<Value*>(memory);
      s.sum = reinterpret_cast<Value*>(memory + value_bytes);
      s.y = reinterpret_cast<Value*>(memory + 2 * value_bytes);
      s.x = reinterpret_cast<Input*>(memory + 3 * value_bytes);
      s.next = reinterpret_cast<Input*>(memory + 3 * value_bytes + input_bytes);
      share.barrier = reinterpret_cast<Barrier*>(memory + group_bytes - barrier_bytes);
      const std::int64_t end = plan.first_row(group + 1);
      for (std::int64_t first = plan.first_row(group); first < end; first += rows) {
        integrate<A>(plan, s, share, first, end - first < rows ? end - first : rows);
      }
    }
  }
  return true;
}

template <class W, class T>
bool prepare(const Rk4Mlp& a, int most_threads) {
  using Value = typename Traits<W>::Value;
  const std::int64_t dim = round_up(a.dim, kPad);
  const std::int64_t work = a.batch * dim * dim / kThreadWork, units = dim / kPad;
  const std::int64_t threads = work < 1 ? 1 : work < most_threads ? work : most_threads;
  std::int64_t groups = a.batch / kGroupRows;
  groups = groups < 1 ? 1 : groups < threads ? groups : threads;
  const std::int64_t share = threads / groups;

  // Weights that need neither padding nor conversion are used in place.
  const bool in_place = std::is_same_v<W, T> && dim == a.dim;
  const std::int64_t weights = in_place ? 0 : a.layers * dim * dim;
  const Buffer packed(weights * static_cast<std::int64_t>(sizeof(W)) + 64);
  const Buffer vectors(2 * a.layers * dim * static_cast<std::int64_t>(sizeof(Value)));
  if (packed.data == nullptr || vectors.data == nullptr) return false;
  const W* weight = static_cast<const W*>(a.weight);
  if (!in_place) {
    W* to = static_cast<W*>(packed.data);
    pack<W>(static_cast<const T*>(a.weight), a.layers, a.dim, dim, to, static_cast<int>(threads));
    weight = to;
  }
  Value* bias = static_cast<Value*>(vectors.data);
  Value* time = bias + a.layers * dim;
  for (std::int64_t layer = 0; layer < a.layers; ++layer) {
    for (std::int64_t o = 0; o < dim; ++o) {
      const std::int64_t from = layer * a.dim + o, to = layer * dim + o;
      bias[to] = o < a.dim ? value_of<Value>(static_cast<const T*>(a.bias)[from]) : Value(0);
      time[to] = o < a.dim ? value_of<Value>(static_cast<const T*>(a.time_weight)[from]) : Value(0);
    }
  }
  const Plan<W, T> plan = {a, weight, bias, time, dim, groups, share < units ? share : units};
  switch (a.activation) {
    case Activation::kLrelu: return run<Activation::kLrelu>(plan);
    case Activation::kTanh: return run<Activation::kTanh>(plan);
    case Activation::kSoftplus: return run<Activation::kSoftplus>(plan);
    default: return run<Activation::kSilu>(plan);
  }
}

}  // namespace

bool rk4_mlp(const Rk4Mlp& a, int threads) {
  if (a.batch == 0 || a.dim == 0) return true;
  switch (a.dtype) {
    case Dtype::kFloat64: return prepare<double, double>(a, threads);
#if defined(__AVX512BF16__)
    case Dtype::kBFloat16: return prepare<bfloat16, bfloat16>(a, threads);
#else
    case Dtype::kBFloat16: return prepare<float, bfloat16>(a, threads);
#endif
    case Dtype::kFloat16: return prepare<float, float16>(a, threads);
    default: return prepare<float, float>(a, threads);
  }
}

}  // namespace spigan::cpu::SPIGAN_ISA
