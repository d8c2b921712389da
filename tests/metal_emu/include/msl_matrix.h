// simdgroup_matrix 8x8: two elements a lane, laid out as MLX's steel code assumes.
#pragma once
#include "msl_simd.h"

namespace metal {

template <class T, int R, int C> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "");
  vec<T, 2> t;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T d) {
    int l = msl_rt::msl_lane();
    for (int i = 0; i < 2; i++) t[i] = row(l) == col(l) + i ? d : T(0);
  }
  vec<T, 2>& thread_elements() { return t; }
  const vec<T, 2>& thread_elements() const { return t; }
  static int row(int l) {
    int q = l / 4;
    return (q & 4) + ((l / 2) % 4);
  }
  static int col(int l) {
    int q = l / 4;
    return (q & 2) * 2 + (l % 2) * 2;
  }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <class D, class A_, class B_, class C_> struct msl_mma {
  struct A {
    vec<A_, 2> a;
    vec<B_, 2> b;
    vec<C_, 2> c;
    vec<D, 2> d;
  };
  static void run(void** l, int w) {
    float a[8][8], b[8][8];
    typedef simdgroup_matrix<float, 8, 8> M;
    for (int i = 0; i < w; i++) {
      if (!l[i]) {
        msl_rt::msl_misuse("simdgroup_matrix op needs all 32 lanes");
        return;
      }
      for (int j = 0; j < 2; j++) {
        a[M::row(i)][M::col(i) + j] = (float)((A*)l[i])->a[j];
        b[M::row(i)][M::col(i) + j] = (float)((A*)l[i])->b[j];
      }
    }
    for (int i = 0; i < w; i++)
      for (int j = 0; j < 2; j++) {
        float s = (float)((A*)l[i])->c[j];
        for (int k = 0; k < 8; k++) s += a[M::row(i)][k] * b[k][M::col(i) + j];
        ((A*)l[i])->d[j] = D(s);
      }
  }
};
template <class D, class A_, class B_, class C_>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A_, 8, 8>& a,
                                          const simdgroup_matrix<B_, 8, 8>& b, const simdgroup_matrix<C_, 8, 8>& c,
                                          int line = __builtin_LINE()) {
  typedef msl_mma<D, A_, B_, C_> R;
  typename R::A x;
  x.a = a.t;
  x.b = b.t;
  x.c = c.t;
  msl_rt::msl_collective(32, R::run, &x, "simdgroup_multiply_accumulate", line);
  d.t = x.d;
}
template <class D, class A_, class B_>
inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A_, 8, 8>& a,
                               const simdgroup_matrix<B_, 8, 8>& b, int line = __builtin_LINE()) {
  simdgroup_matrix<D, 8, 8> z;
  z.t = vec<D, 2>(0);
  simdgroup_multiply_accumulate(d, a, b, z, line);
}
template <class T, class P>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& d, const P* p, uint64_t ld = 8,
                           vec<uint64_t, 2> org = vec<uint64_t, 2>(0), bool tr = false, int line = __builtin_LINE()) {
  msl_rt::msl_barrier(0, 0, line);
  int l = msl_rt::msl_lane();
  typedef simdgroup_matrix<T, 8, 8> M;
  for (int j = 0; j < 2; j++) {
    int r = M::row(l), c = M::col(l) + j;
    if (tr) {
      int t = r;
      r = c;
      c = t;
    }
    d.t[j] = p[(org[1] + r) * ld + org[0] + c];
  }
}
template <class T, class P>
inline void simdgroup_store(const simdgroup_matrix<T, 8, 8>& d, P* p, uint64_t ld = 8,
                            vec<uint64_t, 2> org = vec<uint64_t, 2>(0), bool tr = false, int line = __builtin_LINE()) {
  msl_rt::msl_barrier(0, 0, line);
  int l = msl_rt::msl_lane();
  typedef simdgroup_matrix<T, 8, 8> M;
  for (int j = 0; j < 2; j++) {
    int r = M::row(l), c = M::col(l) + j;
    if (tr) {
      int t = r;
      r = c;
      c = t;
    }
    p[(org[1] + r) * ld + org[0] + c] = d.t[j];
  }
}
template <class T> inline simdgroup_matrix<T, 8, 8> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, 8, 8> r;
  r.t = vec<T, 2>(v);
  return r;
}

} // namespace metal
