// MSL for clang's "C++ for OpenCL" front end (-x cl -cl-std=clc++2021 -fsyntax-only): declarations
// only. Real address spaces, native half/bfloat/vectors: a second, stricter reading of the kernels.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma clang diagnostic ignored "-Wunused-value"
#define __METAL__ 1
#define METAL_FUNC inline __attribute__((always_inline))
#define device __global
#define threadgroup __local
#define constant __constant
#define thread __private
#define kernel
#define MSL_TG_DECL(NAME, DIMS, ...)                                                                                   \
  typedef __VA_ARGS__ msl_t_##NAME DIMS;                                                                               \
  __local msl_t_##NAME& NAME = *(__local msl_t_##NAME*)0
typedef __bf16 bfloat;
typedef char int8_t;
typedef uchar uint8_t;
typedef short int16_t;
typedef ushort uint16_t;
typedef int int32_t;
typedef uint uint32_t;
typedef long int64_t;
typedef ulong uint64_t;
typedef bfloat bfloat2 __attribute__((ext_vector_type(2)));
typedef bfloat bfloat4 __attribute__((ext_vector_type(4)));
template <class T, int N> using msl_v = T __attribute__((ext_vector_type(N)));
// MSL constructor syntax for the built-in vectors
template <class V, class S, int N> struct msl_mk;
#define MSL_MK2(v, s)                                                                                                  \
  inline v msl_##v(s a) {                                                                                              \
    return (v)(a);                                                                                                     \
  }                                                                                                                    \
  inline v msl_##v(s a, s b) {                                                                                         \
    return (v)(a, b);                                                                                                  \
  }                                                                                                                    \
  template <class U> inline v msl_##v(msl_v<U, 2> a) {                                                                 \
    return (v)((s)a.x, (s)a.y);                                                                                        \
  }
#define MSL_MK3(v, s)                                                                                                  \
  inline v msl_##v(s a) {                                                                                              \
    return (v)(a);                                                                                                     \
  }                                                                                                                    \
  inline v msl_##v(s a, s b, s c) {                                                                                    \
    return (v)(a, b, c);                                                                                               \
  }
#define MSL_MK4(v, s)                                                                                                  \
  inline v msl_##v(s a) {                                                                                              \
    return (v)(a);                                                                                                     \
  }                                                                                                                    \
  inline v msl_##v(s a, s b, s c, s d) {                                                                               \
    return (v)(a, b, c, d);                                                                                            \
  }                                                                                                                    \
  inline v msl_##v(msl_v<s, 2> a, msl_v<s, 2> b) {                                                                     \
    return (v)(a, b);                                                                                                  \
  }                                                                                                                    \
  inline v msl_##v(msl_v<s, 3> a, s b) {                                                                               \
    return (v)(a, b);                                                                                                  \
  }                                                                                                                    \
  template <class U> inline v msl_##v(msl_v<U, 4> a) {                                                                 \
    return (v)((s)a.x, (s)a.y, (s)a.z, (s)a.w);                                                                        \
  }
#define MSL_MK(t) MSL_MK2(t##2, t) MSL_MK3(t##3, t) MSL_MK4(t##4, t)
MSL_MK(float)
MSL_MK(half)
MSL_MK(int) MSL_MK(uint) MSL_MK(short) MSL_MK(ushort) MSL_MK(char) MSL_MK(uchar) MSL_MK(long) MSL_MK(ulong)
#define float2(...) msl_float2(__VA_ARGS__)
#define float3(...) msl_float3(__VA_ARGS__)
#define float4(...) msl_float4(__VA_ARGS__)
#define half2(...) msl_half2(__VA_ARGS__)
#define half4(...) msl_half4(__VA_ARGS__)
#define int2(...) msl_int2(__VA_ARGS__)
#define int4(...) msl_int4(__VA_ARGS__)
#define uint2(...) msl_uint2(__VA_ARGS__)
#define uint3(...) msl_uint3(__VA_ARGS__)
#define uint4(...) msl_uint4(__VA_ARGS__)
#define short2(...) msl_short2(__VA_ARGS__)
#define ushort2(...) msl_ushort2(__VA_ARGS__)
#define ushort4(...) msl_ushort4(__VA_ARGS__)
#define uchar4(...) msl_uchar4(__VA_ARGS__)
#ifndef INFINITY
#define INFINITY (__builtin_inff())
#endif
#ifndef NAN
#define NAN (__builtin_nanf(""))
#endif
    namespace metal {
  template <class T, int N> using vec = msl_v<T, N>;
  template <class T, T v> struct integral_constant {
    static constexpr __constant T value = v;
    typedef T value_type;
    typedef integral_constant type;
    constexpr operator T() const { return v; }
  };
  template <bool b> using bool_constant = integral_constant<bool, b>;
  typedef bool_constant<true> true_type;
  typedef bool_constant<false> false_type;
  template <class A, class B> struct is_same : false_type {};
  template <class A> struct is_same<A, A> : true_type {};
  template <class A, class B> inline constexpr __constant bool is_same_v = is_same<A, B>::value;
  template <bool c, class T = void> struct enable_if {};
  template <class T> struct enable_if<true, T> {
    typedef T type;
  };
  template <bool c, class T = void> using enable_if_t = typename enable_if<c, T>::type;
  template <bool c, class A, class B> struct conditional {
    typedef A type;
  };
  template <class A, class B> struct conditional<false, A, B> {
    typedef B type;
  };
  template <bool c, class A, class B> using conditional_t = typename conditional<c, A, B>::type;
  template <class A, class B> inline constexpr __constant bool is_convertible_v = __is_convertible(A, B);
  template <class T> struct remove_cv {
    typedef T type;
  };
  template <class T> struct remove_cv<const T> {
    typedef T type;
  };
  template <class T> using remove_cv_t = typename remove_cv<T>::type;
  template <class T>
  inline constexpr __constant bool is_floating_point_v =
      is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
  template <class T> struct numeric_limits {
    static constexpr T infinity() { return T(__builtin_inff()); }
    static constexpr T max() { return T(0); }
    static constexpr T min() { return T(0); }
    static constexpr T lowest() { return T(0); }
    static constexpr T epsilon() { return T(0); }
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }
  };
  enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
  constexpr mem_flags operator|(mem_flags a, mem_flags b) {
    return mem_flags(int(a) | int(b));
  }
  enum memory_order { memory_order_relaxed };
  void threadgroup_barrier(mem_flags);
  void simdgroup_barrier(mem_flags);
#define MSL_D1(f) template <class T> T f(T);
#define MSL_D2(f) template <class T> T f(T, T);
#define MSL_DECLS                                                                                                      \
  MSL_D1(exp)                                                                                                          \
  MSL_D1(exp2)                                                                                                         \
  MSL_D1(exp10) MSL_D1(log) MSL_D1(log2) MSL_D1(log10) MSL_D1(sqrt) MSL_D1(rsqrt) MSL_D1(sin) MSL_D1(cos) MSL_D1(tan)  \
      MSL_D1(tanh) MSL_D1(sinh) MSL_D1(cosh) MSL_D1(asin) MSL_D1(acos) MSL_D1(atan) MSL_D1(floor) MSL_D1(ceil)         \
          MSL_D1(round) MSL_D1(rint) MSL_D1(trunc) MSL_D1(fabs) MSL_D1(fract) MSL_D1(saturate) MSL_D2(pow)             \
              MSL_D2(powr) MSL_D2(fmod) MSL_D2(atan2) MSL_D2(fmin) MSL_D2(fmax) MSL_D2(divide) MSL_D2(step)            \
                  MSL_D2(copysign)
  MSL_DECLS MSL_D1(abs) MSL_D2(min) MSL_D2(max) MSL_D1(popcount) MSL_D1(clz) MSL_D1(ctz) MSL_D1(reverse_bits)
      MSL_D1(sign) MSL_D2(rotate) MSL_D2(mulhi) MSL_D2(absdiff) namespace fast {
    MSL_DECLS
  }
  namespace precise {
  MSL_DECLS
  }
  template <class T> T fma(T, T, T);
  template <class T> T clamp(T, T, T);
  template <class T> T mix(T, T, T);
  template <class T> T select(T, T, bool);
  template <class T> bool isnan(T);
  template <class T> bool isinf(T);
  template <class T> bool isfinite(T);
  template <class T, int N> T dot(msl_v<T, N>, msl_v<T, N>);
  template <class T> T extract_bits(T, uint, uint);
  template <class T> T insert_bits(T, T, uint, uint);
#define MSL_DG(p)                                                                                                      \
  MSL_D1(p##sum)                                                                                                       \
  MSL_D1(p##product)                                                                                                   \
  MSL_D1(p##min) MSL_D1(p##max) MSL_D1(p##and) MSL_D1(p## or) MSL_D1(p## xor) MSL_D1(p##prefix_inclusive_sum)          \
      MSL_D1(p##prefix_exclusive_sum) MSL_D1(p##prefix_inclusive_product) MSL_D1(p##prefix_exclusive_product)          \
          MSL_D1(p##broadcast_first) template <class T>                                                                \
          T p##shuffle(T, ushort);                                                                                     \
  template <class T> T p##broadcast(T, ushort);                                                                        \
  template <class T> T p##shuffle_xor(T, ushort);                                                                      \
  template <class T> T p##shuffle_up(T, ushort);                                                                       \
  template <class T> T p##shuffle_down(T, ushort);                                                                     \
  template <class T> T p##shuffle_rotate_up(T, ushort);                                                                \
  template <class T> T p##shuffle_rotate_down(T, ushort);                                                              \
  template <class T> T p##shuffle_and_fill_up(T, T, ushort);                                                           \
  template <class T> T p##shuffle_and_fill_down(T, T, ushort);                                                         \
  bool p##any(bool);                                                                                                   \
  bool p##all(bool);                                                                                                   \
  bool p##is_first();
  MSL_DG(simd_) MSL_DG(quad_) struct simd_vote {
    explicit operator ulong() const;
    bool all() const;
    bool any() const;
  };
  simd_vote simd_ballot(bool);
  simd_vote simd_active_threads_mask();
  template <class T> struct atomic {
    T v;
  };
  typedef atomic<int> atomic_int;
  typedef atomic<uint> atomic_uint;
  typedef atomic<float> atomic_float;
#define MSL_DA(AS)                                                                                                     \
  template <class T> T atomic_load_explicit(const volatile AS atomic<T>*, memory_order);                               \
  template <class T, class U> void atomic_store_explicit(volatile AS atomic<T>*, U, memory_order);                     \
  template <class T, class U> T atomic_exchange_explicit(volatile AS atomic<T>*, U, memory_order);                     \
  template <class T, class U> T atomic_fetch_add_explicit(volatile AS atomic<T>*, U, memory_order);                    \
  template <class T, class U> T atomic_fetch_sub_explicit(volatile AS atomic<T>*, U, memory_order);                    \
  template <class T, class U> T atomic_fetch_min_explicit(volatile AS atomic<T>*, U, memory_order);                    \
  template <class T, class U> T atomic_fetch_max_explicit(volatile AS atomic<T>*, U, memory_order);                    \
  template <class T, class U> T atomic_fetch_or_explicit(volatile AS atomic<T>*, U, memory_order);                     \
  template <class T, class U> T atomic_fetch_and_explicit(volatile AS atomic<T>*, U, memory_order);                    \
  template <class T, class U> T atomic_fetch_xor_explicit(volatile AS atomic<T>*, U, memory_order);                    \
  template <class T, class U>                                                                                          \
  bool atomic_compare_exchange_weak_explicit(volatile AS atomic<T>*, __private T*, U, memory_order, memory_order);
  MSL_DA(__global) MSL_DA(__local)
} // namespace metal
template <class To, class From> To as_type(From f) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  return __builtin_bit_cast(To, f);
}
