// The Metal Shading Language on a C++17 compiler: everything a compute kernel may name.
#pragma once
#include "msl_atomic.h"
#include "msl_matrix.h"

template <class To, class From> constexpr To as_type(const From& f) {
  return metal::as_type_impl<To>(f);
}

// `threadgroup T name[N];` is rewritten to this by the Python front end (pointers and
// references to threadgroup memory keep the plain, empty `threadgroup` macro).
#define MSL_TG_DECL(NAME, DIMS, ...)                                                                                   \
  typedef __VA_ARGS__ msl_t_##NAME DIMS;                                                                               \
  static char msl_k_##NAME;                                                                                            \
  msl_t_##NAME& NAME = *(msl_t_##NAME*)::msl_rt::msl_tg_alloc(&msl_k_##NAME, sizeof(msl_t_##NAME),                     \
                                                              alignof(msl_t_##NAME), #NAME, __LINE__)

// Address spaces and function qualifiers vanish. Last: they are ordinary words elsewhere.
#define device
#define threadgroup
#define constant
#define thread
#define kernel
#define double msl_has_no_double // unsuffixed literals are float (-fsingle-precision-constant)
