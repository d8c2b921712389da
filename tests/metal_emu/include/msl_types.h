// Scalar types and type traits of the Metal Shading Language, on a C++17 compiler.
// Refuses what MSL refuses: float to bfloat needs a cast, and there is no double.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include "msl_rt.h"
#pragma GCC diagnostic ignored "-Wliteral-suffix"

#define __METAL__ 1
#define __METAL_VERSION__ 310
#define METAL_FUNC inline __attribute__((always_inline))
#define MSL_NOSAN __attribute__((no_sanitize("thread")))

typedef unsigned char uchar;
typedef _Float16 half;
constexpr half operator""h(long double x) {
  return (half)x;
}
constexpr half operator""h(unsigned long long x) {
  return (half)x;
}

// bfloat: implicit only towards float, as in MSL 3.1.
struct bfloat {
  uint16_t bits;
  bfloat() = default;
  template <class T, class = std::enable_if_t<std::is_arithmetic<T>::value || std::is_same<T, half>::value>>
  explicit constexpr bfloat(T x) : bits(round_((float)x)) {}
  constexpr operator float() const { return __builtin_bit_cast(float, (uint32_t)bits << 16); }
  static constexpr uint16_t round_(float f) {
    uint32_t u = __builtin_bit_cast(uint32_t, f);
    return (u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  }
  constexpr bfloat operator-() const { return bfloat(-(float)*this); }
#define MSL_BF_OP(op)                                                                                                  \
  friend constexpr bfloat operator op(bfloat a, bfloat b) {                                                            \
    return bfloat((float)a op(float) b);                                                                               \
  }                                                                                                                    \
  template <class I, class = std::enable_if_t<std::is_integral<I>::value>>                                             \
  friend constexpr bfloat operator op(bfloat a, I b) {                                                                 \
    return bfloat((float)a op(float) bfloat(b));                                                                       \
  }                                                                                                                    \
  template <class I, class = std::enable_if_t<std::is_integral<I>::value>>                                             \
  friend constexpr bfloat operator op(I a, bfloat b) {                                                                 \
    return bfloat((float)bfloat(a) op(float) b);                                                                       \
  }                                                                                                                    \
  friend constexpr float operator op(bfloat a, float b) {                                                              \
    return (float)a op b;                                                                                              \
  }                                                                                                                    \
  friend constexpr float operator op(float a, bfloat b) {                                                              \
    return a op(float) b;                                                                                              \
  }                                                                                                                    \
  template <class U> constexpr bfloat& operator op## = (U b) {                                                         \
    return *this = bfloat((float)*this op(float) b);                                                                   \
  }
  MSL_BF_OP(+) MSL_BF_OP(-) MSL_BF_OP(*) MSL_BF_OP(/)
#undef MSL_BF_OP
};
static_assert(sizeof(bfloat) == 2 && std::is_trivial<bfloat>::value, "");
constexpr bfloat operator"" bf(long double x) {
  return bfloat((float)x);
}

namespace metal {

using std::add_const;
using std::bool_constant;
using std::conditional;
using std::conditional_t;
using std::decay;
using std::decay_t;
using std::declval;
using std::enable_if;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_const;
using std::is_convertible;
using std::is_convertible_v;
using std::is_enum;
using std::is_integral;
using std::is_integral_v;
using std::is_pointer;
using std::is_same;
using std::is_same_v;
using std::is_signed;
using std::is_signed_v;
using std::is_unsigned;
using std::is_unsigned_v;
using std::is_void;
using std::make_signed;
using std::make_signed_t;
using std::make_unsigned;
using std::make_unsigned_t;
using std::ptrdiff_t;
using std::remove_const;
using std::remove_cv;
using std::remove_cv_t;
using std::remove_pointer;
using std::remove_reference;
using std::remove_reference_t;
using std::size_t;
using std::true_type;
using std::void_t;
template <class T> struct remove_addrspace {
  typedef T type;
};
template <class T> using remove_addrspace_t = T;
template <class T> using remove_addrspace_from_pointer_t = T;
template <class... B> using _disjunction = std::disjunction<B...>;
template <class T>
struct is_floating_point : bool_constant<is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>> {};
template <class T> inline constexpr bool is_floating_point_v = is_floating_point<T>::value;
template <class T> struct is_arithmetic : bool_constant<std::is_arithmetic<T>::value || is_floating_point_v<T>> {};
template <class T> inline constexpr bool is_arithmetic_v = is_arithmetic<T>::value;
template <class T> struct is_scalar : is_arithmetic<T> {};

} // namespace metal
