// Barriers, simdgroup and quadgroup functions. Each one is a collective: the runtime runs it once all lanes arrived.
#pragma once
#include "msl_math.h"

namespace metal {

// ---- synchronisation -----------------------------------------------------------------
enum class mem_flags : uint32_t { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags((uint32_t)a | (uint32_t)b);
}
enum memory_order { memory_order_relaxed };
inline void threadgroup_barrier(mem_flags f, int line = __builtin_LINE()) {
  msl_rt::msl_barrier(1, (uint32_t)f, line);
}
inline void simdgroup_barrier(mem_flags f, int line = __builtin_LINE()) {
  msl_rt::msl_barrier(0, (uint32_t)f, line);
}

// ---- SIMD-group and quad-group functions ---------------------------------------------
template <class T> struct msl_simd_ok : bool_constant<(sizeof(T) <= 4) && !is_same_v<T, bool> && msl_scalar<T>> {};
template <class T, int N> struct msl_simd_ok<vec<T, N>> : msl_simd_ok<T> {};
#define MSL_SIMD_T class T, class = enable_if_t<msl_simd_ok<T>::value>

template <class T, class Op> struct msl_red { // butterfly order: what shuffles would give
  struct A {
    T v, r;
  };
  static void run(void** l, int w) {
    T t[32], u[32];
    int n = 0, full = 1;
    for (int i = 0; i < w; i++) {
      if (l[i])
        t[n++] = ((A*)l[i])->v;
      else
        full = 0;
    }
    if (full)
      for (int s = w / 2; s; s >>= 1) {
        for (int i = 0; i < w; i++) u[i] = Op::f(t[i], t[i ^ s]);
        for (int i = 0; i < w; i++) t[i] = u[i];
      }
    else
      for (int i = 1; i < n; i++) t[0] = Op::f(t[0], t[i]);
    for (int i = 0; i < w; i++)
      if (l[i]) ((A*)l[i])->r = t[0];
  }
};
template <class T, class Op, bool Incl> struct msl_scan {
  struct A {
    T v, r;
  };
  static void run(void** l, int w) {
    T acc = Op::template id<T>();
    for (int i = 0; i < w; i++)
      if (l[i]) {
        A* a = (A*)l[i];
        T n = Op::f(acc, a->v);
        a->r = Incl ? n : acc;
        acc = n;
      }
  }
};
struct msl_add {
  template <class T> static T f(T a, T b) { return a + b; }
  template <class T> static T id() { return T(0); }
};
struct msl_mul {
  template <class T> static T f(T a, T b) { return a * b; }
  template <class T> static T id() { return T(1); }
};
struct msl_mn {
  template <class T> static T f(T a, T b) { return min(a, b); }
};
struct msl_mx {
  template <class T> static T f(T a, T b) { return max(a, b); }
};
struct msl_and {
  template <class T> static T f(T a, T b) { return a & b; }
};
struct msl_or {
  template <class T> static T f(T a, T b) { return a | b; }
};
struct msl_xor {
  template <class T> static T f(T a, T b) { return a ^ b; }
};

// Shuffles. Mode decides the source lane and what an out-of-range source means.
enum msl_shm { MSL_IDX, MSL_BCAST, MSL_XOR, MSL_UP, MSL_DOWN, MSL_ROTUP, MSL_ROTDOWN, MSL_FILLUP, MSL_FILLDOWN };
template <class T, int M> struct msl_shuf {
  struct A {
    T v, r, fill;
    int k, mod;
  };
  static void run(void** l, int w) {
    const A* first = nullptr;
    bool uni = true;
    for (int i = 0; i < w; i++)
      if (l[i]) {
        if (!first)
          first = (A*)l[i];
        else if (((A*)l[i])->k != first->k)
          uni = false;
      }
    if (M != MSL_IDX && !uni)
      msl_rt::msl_misuse("shuffle/broadcast: lane id, delta or mask differs between lanes of the group");
    bool inact = false, range = false;
    for (int i = 0; i < w; i++) {
      if (!l[i]) continue;
      A* a = (A*)l[i];
      int k = a->k, s = i;
      bool keep = false, fill = false;
      int mod = a->mod ? a->mod : w, seg = i / mod * mod;
      switch (M) {
      case MSL_IDX:
      case MSL_BCAST:
        s = k;
        break;
      case MSL_XOR:
        s = i ^ k;
        break;
      case MSL_UP:
        s = i - k;
        keep = s < 0;
        break;
      case MSL_DOWN:
        s = i + k;
        keep = s >= w;
        break;
      case MSL_ROTUP:
        s = (i - k + w) % w;
        break;
      case MSL_ROTDOWN:
        s = (i + k) % w;
        break;
      case MSL_FILLUP:
        s = i - k;
        if (s < seg) {
          fill = true;
          s += mod;
        }
        break;
      case MSL_FILLDOWN:
        s = i + k;
        if (s >= seg + mod) {
          fill = true;
          s -= mod;
        }
        break;
      }
      if (keep) {
        a->r = a->v;
        continue;
      }
      if (s < 0 || s >= w) {
        range = true;
        __builtin_memset((void*)&a->r, 0xFF, sizeof(T));
        continue;
      }
      if (!l[s]) {
        inact = true;
        __builtin_memset((void*)&a->r, 0xFF, sizeof(T));
        continue;
      }
      a->r = fill ? ((A*)l[s])->fill : ((A*)l[s])->v;
    }
    if (range) msl_rt::msl_misuse("shuffle/broadcast: source lane outside the group");
    if (inact) msl_rt::msl_misuse("shuffle/broadcast: source lane is not active");
  }
};
#define MSL_RED(pre, W, name, Op)                                                                                      \
  template <MSL_SIMD_T> inline T pre##name(T v, int line = __builtin_LINE()) {                                         \
    typedef msl_red<T, Op> R;                                                                                          \
    typename R::A a;                                                                                                   \
    a.v = v;                                                                                                           \
    msl_rt::msl_collective(W, R::run, &a, #pre #name, line);                                                           \
    return a.r;                                                                                                        \
  }
#define MSL_SCAN(pre, W, name, Op, I)                                                                                  \
  template <MSL_SIMD_T> inline T pre##name(T v, int line = __builtin_LINE()) {                                         \
    typedef msl_scan<T, Op, I> R;                                                                                      \
    typename R::A a;                                                                                                   \
    a.v = v;                                                                                                           \
    msl_rt::msl_collective(W, R::run, &a, #pre #name, line);                                                           \
    return a.r;                                                                                                        \
  }
#define MSL_SHUF(pre, W, name, M)                                                                                      \
  template <MSL_SIMD_T> inline T pre##name(T v, uint16_t k, int line = __builtin_LINE()) {                             \
    typedef msl_shuf<T, M> R;                                                                                          \
    typename R::A a;                                                                                                   \
    a.v = v;                                                                                                           \
    a.fill = v;                                                                                                        \
    a.k = k;                                                                                                           \
    a.mod = 0;                                                                                                         \
    msl_rt::msl_collective(W, R::run, &a, #pre #name, line);                                                           \
    return a.r;                                                                                                        \
  }
#define MSL_FILL(pre, W, name, M)                                                                                      \
  template <MSL_SIMD_T> inline T pre##name(T v, T fill, uint16_t k, uint16_t mod = W, int line = __builtin_LINE()) {   \
    typedef msl_shuf<T, M> R;                                                                                          \
    typename R::A a;                                                                                                   \
    a.v = v;                                                                                                           \
    a.fill = fill;                                                                                                     \
    a.k = k;                                                                                                           \
    a.mod = mod;                                                                                                       \
    msl_rt::msl_collective(W, R::run, &a, #pre #name, line);                                                           \
    return a.r;                                                                                                        \
  }
struct msl_vote_arg {
  bool p;
  uint32_t r;
};
inline void msl_vote_run(void** l, int w) {
  uint32_t m = 0;
  for (int i = 0; i < w; i++)
    if (l[i] && ((msl_vote_arg*)l[i])->p) m |= 1u << i;
  for (int i = 0; i < w; i++)
    if (l[i]) ((msl_vote_arg*)l[i])->r = m;
}
inline void msl_active_run(void** l, int w) {
  uint32_t m = 0;
  for (int i = 0; i < w; i++)
    if (l[i]) m |= 1u << i;
  for (int i = 0; i < w; i++)
    if (l[i]) ((msl_vote_arg*)l[i])->r = m;
}
class simd_vote {
  uint64_t m;

public:
  typedef uint64_t vote_t;
  explicit simd_vote(vote_t v = 0) : m(v) {}
  explicit operator vote_t() const { return m; }
  bool all() const { return m == msl_rt::msl_simd_mask(); }
  bool any() const { return m != 0; }
};
#define MSL_GROUP(pre, W)                                                                                              \
  MSL_RED(pre, W, sum, msl_add)                                                                                        \
  MSL_RED(pre, W, product, msl_mul)                                                                                    \
  MSL_RED(pre, W, min, msl_mn) MSL_RED(pre, W, max, msl_mx) MSL_RED(pre, W, and, msl_and) MSL_RED(pre, W, or, msl_or)  \
      MSL_RED(pre, W, xor, msl_xor) MSL_SCAN(pre, W, prefix_inclusive_sum, msl_add, true)                              \
          MSL_SCAN(pre, W, prefix_exclusive_sum, msl_add, false)                                                       \
              MSL_SCAN(pre, W, prefix_inclusive_product, msl_mul, true)                                                \
                  MSL_SCAN(pre, W, prefix_exclusive_product, msl_mul, false) MSL_SHUF(pre, W, shuffle, MSL_IDX)        \
                      MSL_SHUF(pre, W, broadcast, MSL_BCAST) MSL_SHUF(pre, W, shuffle_xor, MSL_XOR)                    \
                          MSL_SHUF(pre, W, shuffle_up, MSL_UP) MSL_SHUF(pre, W, shuffle_down, MSL_DOWN)                \
                              MSL_SHUF(pre, W, shuffle_rotate_up, MSL_ROTUP)                                           \
                                  MSL_SHUF(pre, W, shuffle_rotate_down, MSL_ROTDOWN)                                   \
                                      MSL_FILL(pre, W, shuffle_and_fill_up, MSL_FILLUP)                                \
                                          MSL_FILL(pre, W, shuffle_and_fill_down, MSL_FILLDOWN) inline uint32_t        \
                                          msl_##pre##mask(bool p, bool act, const char* what, int line) {              \
    msl_vote_arg a{p, 0};                                                                                              \
    msl_rt::msl_collective(W, act ? msl_active_run : msl_vote_run, &a, what, line);                                    \
    return a.r;                                                                                                        \
  }                                                                                                                    \
  inline bool pre##any(bool p, int line = __builtin_LINE()) {                                                          \
    return msl_##pre##mask(p, false, #pre "any", line) != 0;                                                           \
  }                                                                                                                    \
  inline bool pre##all(bool p, int line = __builtin_LINE()) {                                                          \
    return msl_##pre##mask(!p, false, #pre "all", line) == 0;                                                          \
  }                                                                                                                    \
  inline simd_vote pre##ballot(bool p, int line = __builtin_LINE()) {                                                  \
    return simd_vote(msl_##pre##mask(p, false, #pre "ballot", line));                                                  \
  }                                                                                                                    \
  inline simd_vote pre##active_threads_mask(int line = __builtin_LINE()) {                                             \
    return simd_vote(msl_##pre##mask(true, true, #pre "active_threads_mask", line));                                   \
  }                                                                                                                    \
  inline bool pre##is_first(int line = __builtin_LINE()) {                                                             \
    return __builtin_ctz(msl_##pre##mask(true, true, #pre "is_first", line)) == (int)(msl_rt::msl_lane() % W);         \
  }                                                                                                                    \
  template <MSL_SIMD_T> inline T pre##broadcast_first(T v, int line = __builtin_LINE()) {                              \
    uint32_t m = msl_##pre##mask(true, true, #pre "broadcast_first", line);                                            \
    return pre##broadcast(v, (uint16_t)__builtin_ctz(m), line);                                                        \
  }
MSL_GROUP(simd_, 32)
MSL_GROUP(quad_, 4)

} // namespace metal
