// Relaxed atomics. The scheduler is cooperative, so a plain access is atomic; the hook tells the checker.
#pragma once
#include "msl_simd.h"

namespace metal {

template <class T> struct atomic {
  T v;
};
typedef atomic<int32_t> atomic_int;
typedef atomic<uint32_t> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;
typedef atomic<uint64_t> atomic_ulong;
#define MSL_AT template <class T> MSL_NOSAN __attribute__((noinline))
MSL_AT T atomic_load_explicit(const volatile atomic<T>* o, memory_order) {
  msl_rt::msl_atomic(o, sizeof(T), false);
  return o->v;
}
template <class T, class U>
MSL_NOSAN __attribute__((noinline)) void atomic_store_explicit(volatile atomic<T>* o, U x, memory_order) {
  msl_rt::msl_atomic(o, sizeof(T), true);
  o->v = T(x);
}
#define MSL_ATF(name, expr)                                                                                            \
  template <class T, class U>                                                                                          \
  MSL_NOSAN __attribute__((noinline)) T atomic_##name##_explicit(volatile atomic<T>* o, U y, memory_order) {           \
    msl_rt::msl_atomic(o, sizeof(T), false);                                                                           \
    msl_rt::msl_atomic(o, sizeof(T), true);                                                                            \
    T a = o->v, b = T(y);                                                                                              \
    (void)b;                                                                                                           \
    o->v = expr;                                                                                                       \
    return a;                                                                                                          \
  }
MSL_ATF(exchange, b)
MSL_ATF(fetch_add, a + b)
MSL_ATF(fetch_sub, a - b) MSL_ATF(fetch_and, a& b) MSL_ATF(fetch_or, a | b) MSL_ATF(fetch_xor, a ^ b)
    MSL_ATF(fetch_min, b < a ? b : a) MSL_ATF(fetch_max, a < b ? b : a) template <class T, class U>
    MSL_NOSAN __attribute__((noinline)) bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* o, T* e, U y,
                                                                                   memory_order, memory_order) {
  msl_rt::msl_atomic(o, sizeof(T), false);
  msl_rt::msl_atomic(o, sizeof(T), true);
  T a = o->v;
  if (__builtin_memcmp(&a, e, sizeof a) == 0) {
    o->v = T(y);
    return true;
  }
  *e = a;
  return false;
}

} // namespace metal
