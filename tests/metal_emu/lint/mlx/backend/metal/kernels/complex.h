#pragma once
// metal_emu: MLX's complex.h overloads members by address space, which a C++ compiler
// without address spaces sees as redeclarations. Same type, one overload each.
#include <metal_stdlib>
#include "mlx/backend/metal/kernels/bf16.h"
using namespace metal;
template <typename T> struct complex_t {
  typedef T value_type;
  T real, imag;
  constexpr complex_t(T r, T i) : real(r), imag(i) {}
  constexpr complex_t() : real(0), imag(0) {}
  template <typename U, typename = enable_if_t<is_convertible_v<U, T>>>
  constexpr complex_t(U x) : real(static_cast<T>(x)), imag(static_cast<T>(0)) {}
  template <typename U, typename = enable_if_t<is_convertible_v<T, U>>> explicit constexpr operator U() const {
    return static_cast<U>(real);
  }
};
using complex64_t = complex_t<float>;
template <typename T> inline constexpr bool is_complex_v = false;
template <typename T> inline constexpr bool is_complex_v<complex_t<T>> = true;
#define MSL_CX(op, re, im)                                                                                             \
  template <typename T> constexpr complex_t<T> operator op(complex_t<T> a, complex_t<T> b) {                           \
    return {re, im};                                                                                                   \
  }
MSL_CX(+, a.real + b.real, a.imag + b.imag)
MSL_CX(-, a.real - b.real, a.imag - b.imag)
MSL_CX(*, a.real* b.real - a.imag * b.imag, a.real* b.imag + a.imag * b.real)
#undef MSL_CX
template <typename T> constexpr bool operator==(complex_t<T> a, complex_t<T> b) {
  return a.real == b.real && a.imag == b.imag;
}
template <typename T> constexpr bool operator>(complex_t<T> a, complex_t<T> b) {
  return a.real > b.real || (a.real == b.real && a.imag > b.imag);
}
template <typename T> constexpr bool operator<(complex_t<T> a, complex_t<T> b) {
  return b > a;
}
