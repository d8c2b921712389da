// Vectors, swizzles, as_type and numeric_limits.
#pragma once
#include "msl_types.h"

namespace metal {

// ---- vectors -------------------------------------------------------------------------
template <class T, int N> struct vec;
template <class T> struct msl_is_vec : false_type {};
template <class T, int N> struct msl_is_vec<vec<T, N>> : true_type {};
template <class T>
inline constexpr bool msl_scalar = std::is_arithmetic<T>::value || is_same_v<T, half> || is_same_v<T, bfloat>;

// A swizzle member: reads as vec<T, sizeof...(I)>, writes through.
template <class T, int N, int... I> struct msl_swz {
  T e[N];
  constexpr operator vec<T, sizeof...(I)>() const { return vec<T, sizeof...(I)>(e[I]...); }
  typedef vec<T, sizeof...(I)> V;
  msl_swz& operator=(const V& v) {
    int k = 0;
    ((e[I] = v[k++]), ...);
    return *this;
  }
#define MSL_SWZ(op)                                                                                                    \
  template <class U> V operator op(const U& b) const {                                                                 \
    return V(*this) op V(b);                                                                                           \
  }                                                                                                                    \
  template <class S, class = enable_if_t<msl_scalar<S>>> friend V operator op(S a, const msl_swz& b) {                 \
    return V(a) op V(b);                                                                                               \
  }                                                                                                                    \
  friend V operator op(const V& a, const msl_swz& b) {                                                                 \
    return a op V(b);                                                                                                  \
  }                                                                                                                    \
  template <class U> msl_swz& operator op## = (const U& b) {                                                           \
    return *this = V(*this) op V(b);                                                                                   \
  }
  MSL_SWZ(+) MSL_SWZ(-) MSL_SWZ(*) MSL_SWZ(/)
#undef MSL_SWZ
};
#define MSL_VEC_COMMON(N)                                                                                              \
  typedef T value_type;                                                                                                \
  vec() = default;                                                                                                     \
  constexpr T& operator[](int i) {                                                                                     \
    return e[i];                                                                                                       \
  }                                                                                                                    \
  constexpr const T& operator[](int i) const {                                                                         \
    return e[i];                                                                                                       \
  }                                                                                                                    \
  template <class S, class = enable_if_t<msl_scalar<S>>> constexpr vec(S s) : e{} {                                    \
    for (int i = 0; i < N; i++) e[i] = T(s);                                                                           \
  }                                                                                                                    \
  template <class U, class = enable_if_t<!is_same_v<U, T>>> explicit constexpr vec(const vec<U, N>& o) : e{} {         \
    for (int i = 0; i < N; i++) e[i] = T(o[i]);                                                                        \
  }                                                                                                                    \
  template <class U> vec& operator+=(U b) {                                                                            \
    return *this = *this + vec(b);                                                                                     \
  }                                                                                                                    \
  template <class U> vec& operator-=(U b) {                                                                            \
    return *this = *this - vec(b);                                                                                     \
  }                                                                                                                    \
  template <class U> vec& operator*=(U b) {                                                                            \
    return *this = *this * vec(b);                                                                                     \
  }                                                                                                                    \
  template <class U> vec& operator/=(U b) {                                                                            \
    return *this = *this / vec(b);                                                                                     \
  }                                                                                                                    \
  template <class U> vec& operator|=(U b) {                                                                            \
    return *this = *this | vec(b);                                                                                     \
  }                                                                                                                    \
  template <class U> vec& operator&=(U b) {                                                                            \
    return *this = *this & vec(b);                                                                                     \
  }                                                                                                                    \
  template <class U> vec& operator>>=(U b) {                                                                           \
    return *this = *this >> vec(b);                                                                                    \
  }                                                                                                                    \
  template <class U> vec& operator<<=(U b) {                                                                           \
    return *this = *this << vec(b);                                                                                    \
  }                                                                                                                    \
  vec operator-() const {                                                                                              \
    vec r;                                                                                                             \
    for (int i = 0; i < N; i++) r.e[i] = -e[i];                                                                        \
    return r;                                                                                                          \
  }                                                                                                                    \
  vec operator~() const {                                                                                              \
    vec r;                                                                                                             \
    for (int i = 0; i < N; i++) r.e[i] = ~e[i];                                                                        \
    return r;                                                                                                          \
  }

template <class T> struct alignas(2 * sizeof(T)) vec<T, 2> {
  union {
    T e[2];
    struct {
      T x, y;
    };
    struct {
      T r, g;
    };
    msl_swz<T, 2, 0, 1> xy;
    msl_swz<T, 2, 1, 0> yx;
    msl_swz<T, 2, 0, 0> xx;
    msl_swz<T, 2, 1, 1> yy;
  };
  MSL_VEC_COMMON(2)
  constexpr vec(T a, T b) : e{a, b} {}
};
template <class T> struct alignas(4 * sizeof(T)) vec<T, 3> {
  union {
    T e[3];
    struct {
      T x, y, z;
    };
    struct {
      T r, g, b;
    };
    msl_swz<T, 3, 0, 1> xy;
    msl_swz<T, 3, 0, 2> xz;
    msl_swz<T, 3, 1, 2> yz;
    msl_swz<T, 3, 0, 1, 2> xyz;
    msl_swz<T, 3, 2, 1, 0> zyx;
  };
  MSL_VEC_COMMON(3)
  constexpr vec(T a, T b, T c) : e{a, b, c} {}
  constexpr vec(const vec<T, 2>& a, T b) : e{a.e[0], a.e[1], b} {}
};
template <class T> struct alignas(4 * sizeof(T)) vec<T, 4> {
  union {
    T e[4];
    struct {
      T x, y, z, w;
    };
    struct {
      T r, g, b, a;
    };
    msl_swz<T, 4, 0, 1> xy;
    msl_swz<T, 4, 2, 3> zw;
    msl_swz<T, 4, 1, 2> yz;
    msl_swz<T, 4, 0, 2> xz;
    msl_swz<T, 4, 1, 3> yw;
    msl_swz<T, 4, 0, 3> xw;
    msl_swz<T, 4, 0, 1, 2> xyz;
    msl_swz<T, 4, 1, 2, 3> yzw;
    msl_swz<T, 4, 0, 1, 2, 3> xyzw;
    msl_swz<T, 4, 3, 2, 1, 0> wzyx;
  };
  MSL_VEC_COMMON(4)
  constexpr vec(T a, T b, T c, T d) : e{a, b, c, d} {}
  constexpr vec(const vec<T, 2>& a, const vec<T, 2>& b) : e{a.e[0], a.e[1], b.e[0], b.e[1]} {}
  constexpr vec(const vec<T, 3>& a, T b) : e{a.e[0], a.e[1], a.e[2], b} {}
  constexpr vec(const vec<T, 2>& a, T b, T c) : e{a.e[0], a.e[1], b, c} {}
};
#define MSL_VOP(op)                                                                                                    \
  template <class T, int N> inline vec<T, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {                     \
    vec<T, N> r;                                                                                                       \
    for (int i = 0; i < N; i++) r.e[i] = T(a.e[i] op b.e[i]);                                                          \
    return r;                                                                                                          \
  }                                                                                                                    \
  template <class T, int N, class S, class = enable_if_t<msl_scalar<S>>>                                               \
  inline vec<T, N> operator op(const vec<T, N>& a, S b) {                                                              \
    return a op vec<T, N>(b);                                                                                          \
  }                                                                                                                    \
  template <class T, int N, class S, class = enable_if_t<msl_scalar<S>>>                                               \
  inline vec<T, N> operator op(S a, const vec<T, N>& b) {                                                              \
    return vec<T, N>(a) op b;                                                                                          \
  }
MSL_VOP(+)
MSL_VOP(-)
MSL_VOP(*) MSL_VOP(/) MSL_VOP(%) MSL_VOP(&) MSL_VOP(|) MSL_VOP(^) MSL_VOP(<<) MSL_VOP(>>)
#define MSL_VCMP(op)                                                                                                   \
  template <class T, int N> inline vec<bool, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {                  \
    vec<bool, N> r;                                                                                                    \
    for (int i = 0; i < N; i++) r.e[i] = a.e[i] op b.e[i];                                                             \
    return r;                                                                                                          \
  }                                                                                                                    \
  template <class T, int N, class S, class = enable_if_t<msl_scalar<S>>>                                               \
  inline vec<bool, N> operator op(const vec<T, N>& a, S b) {                                                           \
    return a op vec<T, N>(b);                                                                                          \
  }
    MSL_VCMP(==) MSL_VCMP(!=) MSL_VCMP(<) MSL_VCMP(<=) MSL_VCMP(>) MSL_VCMP(>=) template <int N>
    inline bool any(vec<bool, N> v) {
  for (int i = 0; i < N; i++)
    if (v.e[i]) return true;
  return false;
}
template <int N> inline bool all(vec<bool, N> v) {
  for (int i = 0; i < N; i++)
    if (!v.e[i]) return false;
  return true;
}
template <class T, int N> struct packed_vec {
  T e[N];
  operator vec<T, N>() const {
    vec<T, N> r;
    for (int i = 0; i < N; i++) r.e[i] = e[i];
    return r;
  }
  packed_vec& operator=(vec<T, N> v) {
    for (int i = 0; i < N; i++) e[i] = v.e[i];
    return *this;
  }
  T& operator[](int i) { return e[i]; }
  const T& operator[](int i) const { return e[i]; }
};
#define MSL_VT(T, n)                                                                                                   \
  typedef vec<T, 2> n##2;                                                                                              \
  typedef vec<T, 3> n##3;                                                                                              \
  typedef vec<T, 4> n##4;                                                                                              \
  typedef packed_vec<T, 2> packed_##n##2;                                                                              \
  typedef packed_vec<T, 3> packed_##n##3;                                                                              \
  typedef packed_vec<T, 4> packed_##n##4;
MSL_VT(float, float)
MSL_VT(half, half)
MSL_VT(bfloat, bfloat) MSL_VT(int8_t, char) MSL_VT(uint8_t, uchar) MSL_VT(int16_t, short) MSL_VT(uint16_t, ushort)
    MSL_VT(int32_t, int) MSL_VT(uint32_t, uint) MSL_VT(int64_t, long) MSL_VT(uint64_t, ulong)
        MSL_VT(bool, bool) template <class T, size_t N>
        struct array {
  T e[N];
  T& operator[](size_t i) { return e[i]; }
  const T& operator[](size_t i) const { return e[i]; }
  constexpr size_t size() const { return N; }
};

template <class To, class From> constexpr To as_type_impl(const From& f) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  To t{};
  __builtin_memcpy(&t, &f, sizeof t);
  return t;
}

// ---- numeric_limits ------------------------------------------------------------------
template <class T> struct numeric_limits : std::numeric_limits<T> {};
template <> struct numeric_limits<half> {
  static constexpr bool is_signed = true, is_integer = false;
  static constexpr int digits = 11;
  static constexpr half infinity() { return (half)__builtin_inff(); }
  static constexpr half max() { return (half)65504.f; }
  static constexpr half lowest() { return (half)-65504.f; }
  static constexpr half min() { return (half)6.103515625e-05f; }
  static constexpr half epsilon() { return (half)0.0009765625f; }
  static constexpr half quiet_NaN() { return (half)__builtin_nanf(""); }
};
template <> struct numeric_limits<bfloat> {
  static constexpr bool is_signed = true, is_integer = false;
  static constexpr int digits = 8;
  static constexpr bfloat mk(uint16_t b) {
    bfloat r(0);
    r.bits = b;
    return r;
  }
  static constexpr bfloat infinity() { return mk(0x7f80); }
  static constexpr bfloat max() { return mk(0x7f7f); }
  static constexpr bfloat lowest() { return mk(0xff7f); }
  static constexpr bfloat min() { return mk(0x0080); }
  static constexpr bfloat epsilon() { return mk(0x3c00); }
  static constexpr bfloat quiet_NaN() { return mk(0x7fc0); }
};

} // namespace metal
