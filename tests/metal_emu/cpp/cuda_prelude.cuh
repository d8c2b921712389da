// Lets an MSL kernel body (written to the portable rules) compile as CUDA. Goes before the header
// given to mx.fast.cuda_kernel; warps stand for simdgroups.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define METAL_FUNC __device__ __forceinline__
// (address space words are removed textually: a macro named `device` would break __device__)
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __nv_bfloat16 bfloat;
typedef __nv_bfloat16 bfloat16_t;
typedef __half float16_t;
namespace metal {
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
enum memory_order { memory_order_relaxed };
METAL_FUNC void threadgroup_barrier(mem_flags) { __syncthreads(); }
METAL_FUNC void simdgroup_barrier(mem_flags) { __syncwarp(); }
template <class T> METAL_FUNC T min(T a, T b) { return b < a ? b : a; }
template <class T> METAL_FUNC T max(T a, T b) { return a < b ? b : a; }
template <class T> METAL_FUNC T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }
template <class T> METAL_FUNC T select(T a, T b, bool c) { return c ? b : a; }
template <class D, class S> METAL_FUNC D as_type(S s) {
  static_assert(sizeof(D) == sizeof(S), "");
  union {
    S a;
    D b;
  } u;
  u.a = s;
  return u.b;
}
using ::abs;
using ::ceil;
using ::exp;
using ::exp2;
using ::fabs;
using ::floor;
using ::fma;
using ::isinf;
using ::isnan;
using ::log;
using ::log2;
using ::pow;
using ::rsqrt;
using ::sqrt;
using ::tanh;
namespace fast {
METAL_FUNC float exp(float x) { return __expf(x); }
METAL_FUNC float log(float x) { return __logf(x); }
}
METAL_FUNC uint popcount(uint x) { return __popc(x); }
METAL_FUNC uint clz(uint x) { return __clz(x); }
METAL_FUNC uint ctz(uint x) { return x ? __ffs(x) - 1 : 32; }
#define MSL_FULL 0xffffffffu
template <class T> METAL_FUNC T simd_shuffle(T v, ushort l) { return __shfl_sync(MSL_FULL, v, l); }
template <class T> METAL_FUNC T simd_broadcast(T v, ushort l) { return __shfl_sync(MSL_FULL, v, l); }
template <class T> METAL_FUNC T simd_shuffle_xor(T v, ushort m) { return __shfl_xor_sync(MSL_FULL, v, m); }
template <class T> METAL_FUNC T simd_shuffle_up(T v, ushort d) { return __shfl_up_sync(MSL_FULL, v, d); }
template <class T> METAL_FUNC T simd_shuffle_down(T v, ushort d) { return __shfl_down_sync(MSL_FULL, v, d); }
#define MSL_R(name, expr)                                                                                              \
  template <class T> METAL_FUNC T simd_##name(T a) {                                                                   \
    for (int o = 16; o; o >>= 1) {                                                                                     \
      T b = __shfl_xor_sync(MSL_FULL, a, o);                                                                           \
      a = expr;                                                                                                        \
    }                                                                                                                  \
    return a;                                                                                                          \
  }
MSL_R(sum, a + b)
MSL_R(product, a* b) MSL_R(min, b < a ? b : a) MSL_R(max, a < b ? b : a) MSL_R(and, a& b) MSL_R(or, a | b)
    MSL_R(xor, a ^ b) template <class T>
    METAL_FUNC T simd_prefix_inclusive_sum(T v) {
  int l = (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) & 31;
  for (int o = 1; o < 32; o <<= 1) {
    T t = __shfl_up_sync(MSL_FULL, v, o);
    if (l >= o) v += t;
  }
  return v;
}
template <class T> METAL_FUNC T simd_prefix_exclusive_sum(T v) { return simd_prefix_inclusive_sum(v) - v; }
METAL_FUNC bool simd_any(bool p) { return __any_sync(MSL_FULL, p); }
METAL_FUNC bool simd_all(bool p) { return __all_sync(MSL_FULL, p); }
struct simd_vote {
  typedef unsigned long vote_t;
  uint m;
  __device__ explicit operator ulong() const { return m; }
};
METAL_FUNC simd_vote simd_ballot(bool p) { return {__ballot_sync(MSL_FULL, p)}; }
template <class T> struct atomic {
  T v;
};
typedef atomic<uint> atomic_uint;
typedef atomic<int> atomic_int;
typedef atomic<float> atomic_float;
template <class T, class U> METAL_FUNC T atomic_fetch_add_explicit(volatile atomic<T>* o, U x, memory_order) {
  return atomicAdd((T*)&o->v, T(x));
}
template <class T, class U> METAL_FUNC T atomic_fetch_max_explicit(volatile atomic<T>* o, U x, memory_order) {
  return atomicMax((T*)&o->v, T(x));
}
template <class T, class U> METAL_FUNC T atomic_fetch_min_explicit(volatile atomic<T>* o, U x, memory_order) {
  return atomicMin((T*)&o->v, T(x));
}
} // namespace metal
using namespace metal;
