// The math and integer libraries. Overloads, not templates, so that an int argument is as ambiguous as on Metal.
#pragma once
#include "msl_vec.h"

namespace metal {

// ---- math ----------------------------------------------------------------------------
// Overloads, not templates, so that int arguments are as ambiguous as they are on Metal.
#define MSL_V1(f, T)                                                                                                   \
  template <int N> inline vec<T, N> f(vec<T, N> a) {                                                                   \
    vec<T, N> r;                                                                                                       \
    for (int i = 0; i < N; i++) r.e[i] = f(a.e[i]);                                                                    \
    return r;                                                                                                          \
  }
#define MSL_M1(f, expr)                                                                                                \
  inline float f(float x) {                                                                                            \
    return expr;                                                                                                       \
  }                                                                                                                    \
  inline half f(half h) {                                                                                              \
    float x = h;                                                                                                       \
    return (half)(expr);                                                                                               \
  }                                                                                                                    \
  inline bfloat f(bfloat b) {                                                                                          \
    float x = b;                                                                                                       \
    return bfloat(expr);                                                                                               \
  }                                                                                                                    \
  MSL_V1(f, float) MSL_V1(f, half)
#define MSL_M2(f, expr)                                                                                                \
  inline float f(float x, float y) {                                                                                   \
    return expr;                                                                                                       \
  }                                                                                                                    \
  inline half f(half a, half b) {                                                                                      \
    float x = a, y = b;                                                                                                \
    return (half)(expr);                                                                                               \
  }                                                                                                                    \
  inline bfloat f(bfloat a, bfloat b) {                                                                                \
    float x = a, y = b;                                                                                                \
    return bfloat(expr);                                                                                               \
  }                                                                                                                    \
  template <class T, int N> inline vec<T, N> f(vec<T, N> a, vec<T, N> b) {                                             \
    vec<T, N> r;                                                                                                       \
    for (int i = 0; i < N; i++) r.e[i] = f(a.e[i], b.e[i]);                                                            \
    return r;                                                                                                          \
  }
#define MSL_MATH                                                                                                       \
  MSL_M1(exp, ::expf(x))                                                                                               \
  MSL_M1(exp2, ::exp2f(x))                                                                                             \
  MSL_M1(exp10, ::powf(10.f, x)) MSL_M1(log, ::logf(x)) MSL_M1(log2, ::log2f(x)) MSL_M1(log10, ::log10f(x))            \
      MSL_M1(sqrt, ::sqrtf(x)) MSL_M1(rsqrt, 1.0f / ::sqrtf(x)) MSL_M1(sin, ::sinf(x)) MSL_M1(cos, ::cosf(x))          \
          MSL_M1(tan, ::tanf(x)) MSL_M1(asin, ::asinf(x)) MSL_M1(acos, ::acosf(x)) MSL_M1(atan, ::atanf(x))            \
              MSL_M1(sinh, ::sinhf(x)) MSL_M1(cosh, ::coshf(x)) MSL_M1(tanh, ::tanhf(x)) MSL_M1(asinh, ::asinhf(x))    \
                  MSL_M1(acosh, ::acoshf(x)) MSL_M1(atanh, ::atanhf(x)) MSL_M1(floor, ::floorf(x))                     \
                      MSL_M1(ceil, ::ceilf(x)) MSL_M1(round, ::roundf(x)) MSL_M1(rint, ::rintf(x))                     \
                          MSL_M1(trunc, ::truncf(x)) MSL_M1(fabs, ::fabsf(x)) MSL_M1(fract, x - ::floorf(x)) MSL_M1(   \
                              saturate, ::fminf(::fmaxf(x, 0.f), 1.f)) MSL_M1(sinpi, ::sinf(x * 3.14159265358979f))    \
                              MSL_M1(cospi, ::cosf(x * 3.14159265358979f)) MSL_M2(pow, ::powf(x, y))                   \
                                  MSL_M2(powr, ::powf(x, y)) MSL_M2(fmod, ::fmodf(x, y)) MSL_M2(atan2, ::atan2f(x, y)) \
                                      MSL_M2(fmin, ::fminf(x, y)) MSL_M2(fmax, ::fmaxf(x, y)) MSL_M2(divide, x / y)    \
                                          MSL_M2(step, y < x ? 0.f : 1.f) MSL_M2(copysign, ::copysignf(x, y))          \
                                              MSL_M2(fdim, ::fdimf(x, y))                                              \
                                                  MSL_M2(nextafter, ::nextafterf(x, y)) inline float                   \
                                                  ldexp(float x, int k) {                                              \
    return ::ldexpf(x, k);                                                                                             \
  }                                                                                                                    \
  inline float frexp(float x, int& e) {                                                                                \
    return ::frexpf(x, &e);                                                                                            \
  }                                                                                                                    \
  inline float modf(float x, float& i) {                                                                               \
    return ::modff(x, &i);                                                                                             \
  }                                                                                                                    \
  inline float sincos(float x, float& c) {                                                                             \
    c = ::cosf(x);                                                                                                     \
    return ::sinf(x);                                                                                                  \
  }
MSL_MATH
namespace precise {
MSL_MATH
}
namespace fast {
MSL_MATH
}
template <class T> inline T abs(T x) {
  return x < T(0) ? T(-x) : x;
}
inline float fma(float a, float b, float c) {
  return ::fmaf(a, b, c);
}
inline half fma(half a, half b, half c) {
  return (half)::fma((double)a, (double)b, (double)c);
}
inline bfloat fma(bfloat a, bfloat b, bfloat c) {
  return bfloat(::fmaf(a, b, c));
}
template <class T, int N> inline vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r.e[i] = fma(a.e[i], b.e[i], c.e[i]);
  return r;
}
// min/max: fmin/fmax semantics for floats (NaN loses), as in MSL.
template <class T> inline T min(T a, T b) {
  if constexpr (is_same_v<T, float>)
    return ::fminf(a, b);
  else if constexpr (is_floating_point_v<T>)
    return T(::fminf(a, b));
  else if constexpr (msl_is_vec<T>::value) {
    for (int i = 0; i < int(sizeof(a.e) / sizeof(a.e[0])); i++) a.e[i] = min(a.e[i], b.e[i]);
    return a;
  } else
    return b < a ? b : a;
}
template <class T> inline T max(T a, T b) {
  if constexpr (is_same_v<T, float>)
    return ::fmaxf(a, b);
  else if constexpr (is_floating_point_v<T>)
    return T(::fmaxf(a, b));
  else if constexpr (msl_is_vec<T>::value) {
    for (int i = 0; i < int(sizeof(a.e) / sizeof(a.e[0])); i++) a.e[i] = max(a.e[i], b.e[i]);
    return a;
  } else
    return a < b ? b : a;
}
template <class T> inline T min3(T a, T b, T c) {
  return min(a, min(b, c));
}
template <class T> inline T max3(T a, T b, T c) {
  return max(a, max(b, c));
}
template <class T> inline T clamp(T x, T lo, T hi) {
  return min(max(x, lo), hi);
}
template <class T> inline T mix(T a, T b, T t) {
  return a + (b - a) * t;
}
template <class T> inline T sign(T x) {
  return x > T(0) ? T(1) : x < T(0) ? T(-1) : T(0);
}
template <class T, class = enable_if_t<!msl_is_vec<T>::value>> inline T select(T a, T b, bool c) {
  return c ? b : a;
}
template <class T, int N> inline vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> c) {
  for (int i = 0; i < N; i++)
    if (c.e[i]) a.e[i] = b.e[i];
  return a;
}
template <class T> inline enable_if_t<is_floating_point_v<T>, bool> isnan(T x) {
  return __builtin_isnan((float)x);
}
template <class T> inline enable_if_t<is_floating_point_v<T>, bool> isinf(T x) {
  return __builtin_isinf((float)x);
}
template <class T> inline enable_if_t<is_floating_point_v<T>, bool> isfinite(T x) {
  return __builtin_isfinite((float)x);
}
template <class T> inline enable_if_t<is_floating_point_v<T>, bool> signbit(T x) {
  return __builtin_signbit((float)x);
}
template <class T, int N> inline T dot(vec<T, N> a, vec<T, N> b) {
  T s = a.e[0] * b.e[0];
  for (int i = 1; i < N; i++) s = s + a.e[i] * b.e[i];
  return s;
}
template <class T, int N> inline T length(vec<T, N> a) {
  return sqrt(dot(a, a));
}
// integer
template <class T> inline enable_if_t<is_integral_v<T>, T> popcount(T x) {
  return (T)__builtin_popcountll((uint64_t)(make_unsigned_t<T>)x);
}
template <class T> inline enable_if_t<is_integral_v<T>, T> clz(T x) {
  return x ? (T)(__builtin_clzll((uint64_t)(make_unsigned_t<T>)x) - (64 - 8 * (int)sizeof(T))) : (T)(8 * sizeof(T));
}
template <class T> inline enable_if_t<is_integral_v<T>, T> ctz(T x) {
  return x ? (T)__builtin_ctzll((uint64_t)(make_unsigned_t<T>)x) : (T)(8 * sizeof(T));
}
template <class T> inline T reverse_bits(T x) {
  make_unsigned_t<T> u = x, r = 0;
  for (size_t i = 0; i < 8 * sizeof(T); i++) {
    r = (r << 1) | (u & 1);
    u >>= 1;
  }
  return (T)r;
}
template <class T> inline T extract_bits(T x, uint32_t off, uint32_t n) {
  if (!n) return 0;
  typedef make_unsigned_t<T> U;
  U u = (U)x << (8 * sizeof(T) - off - n);
  return (T)u >> (8 * sizeof(T) - n);
}
template <class T> inline T insert_bits(T base, T ins, uint32_t off, uint32_t n) {
  typedef make_unsigned_t<T> U;
  U m = n >= 8 * sizeof(T) ? ~U(0) : ((U(1) << n) - 1) << off;
  return (T)(((U)base & ~m) | (((U)ins << off) & m));
}
template <class T> inline T rotate(T x, T n) {
  const int b = 8 * sizeof(T);
  n &= b - 1;
  return n ? (x << n) | (x >> (b - n)) : x;
}
template <class T> inline make_unsigned_t<T> absdiff(T a, T b) {
  return a > b ? a - b : b - a;
}
inline uint32_t mulhi(uint32_t a, uint32_t b) {
  return (uint64_t)a * b >> 32;
}
inline int32_t mulhi(int32_t a, int32_t b) {
  return (int64_t)a * b >> 32;
}
inline uint64_t mulhi(uint64_t a, uint64_t b) {
  return (unsigned __int128)a * b >> 64;
}
inline int32_t mad24(int32_t a, int32_t b, int32_t c) {
  return a * b + c;
}
inline int32_t mul24(int32_t a, int32_t b) {
  return a * b;
}
template <class T> inline T addsat(T a, T b) {
  T r;
  return __builtin_add_overflow(a, b, &r) ? (a < 0 ? numeric_limits<T>::lowest() : numeric_limits<T>::max()) : r;
}

} // namespace metal
