r"""The mathematics of native code: C++ on vectors of chains, without any header.

A vector holds one number of W chains. Exponentials and logarithms are polynomials on vectors
(the argument is reduced by multiples of log 2, the logarithm is 2 artanh of (m - 1) / (m + 1)),
right to one or two units in the last place; what is rarer is asked of the C library chain by chain.
Infinities and NaN come out as torch has them. No header is included, so that compiling is quick.
"""

from __future__ import annotations

__all__ = ["prelude"]

_TYPES = """
typedef float vf __attribute__((vector_size(4 * W)));
typedef double vd __attribute__((vector_size(8 * W)));
typedef long long i64;
typedef i64 vl __attribute__((vector_size(8 * W)));
typedef int vb __attribute__((vector_size(4 * W)));
#define IN static inline __attribute__((always_inline))
#define INF __builtin_inff()
#define NOT_A_NUMBER __builtin_nanf("")
extern "C" float lgammaf_r(float, int *);
extern "C" double lgamma_r(double, int *);
"""

# Conversions between types, and from a number to a vector.
_CONVERSIONS = """
template <class T> struct kind;
template <> struct kind<float> { typedef vf v; };
template <> struct kind<double> { typedef vd v; };
template <> struct kind<i64> { typedef vl v; };
template <> struct kind<int> { typedef vb v; };
template <class T> IN typename kind<T>::v wide(T x) { typename kind<T>::v r = {}; return x - r; }
IN vb wide(int x) { vb r = {}; return r + x; }
IN vf wide(vf x) { return x; }
IN vd wide(vd x) { return x; }
IN vl wide(vl x) { return x; }
IN vb wide(vb x) { return x; }
IN vf to_f(vf x) { return x; }
IN vf to_f(vd x) { return __builtin_convertvector(x, vf); }
IN vf to_f(vl x) { return __builtin_convertvector(x, vf); }
IN vf to_f(vb x) { return __builtin_convertvector(-x, vf); }
IN vd to_d(vd x) { return x; }
IN vd to_d(vf x) { return __builtin_convertvector(x, vd); }
IN vd to_d(vl x) { return __builtin_convertvector(x, vd); }
IN vd to_d(vb x) { return __builtin_convertvector(-x, vd); }
IN vl to_l(vl x) { return x; }
IN vl to_l(vf x) { return __builtin_convertvector(x, vl); }
IN vl to_l(vd x) { return __builtin_convertvector(x, vl); }
IN vl to_l(vb x) { return __builtin_convertvector(-x, vl); }
IN vb to_b(vb x) { return x; }
IN vb to_b(vf x) { return x != 0; }
IN vb to_b(vd x) { return __builtin_convertvector(x != 0, vb); }
IN vb to_b(vl x) { return __builtin_convertvector(x != 0, vb); }
IN float to_f(float x) { return x; }
IN float to_f(double x) { return (float)x; }
IN float to_f(i64 x) { return (float)x; }
IN float to_f(int x) { return (float)-x; }
IN double to_d(float x) { return x; }
IN double to_d(double x) { return x; }
IN double to_d(i64 x) { return (double)x; }
IN double to_d(int x) { return -x; }
IN i64 to_l(float x) { return (i64)x; }
IN i64 to_l(double x) { return (i64)x; }
IN i64 to_l(i64 x) { return x; }
IN i64 to_l(int x) { return -x; }
IN int to_b(float x) { return -(x != 0); }
IN int to_b(double x) { return -(x != 0); }
IN int to_b(i64 x) { return -(x != 0); }
IN int to_b(int x) { return x; }
IN i64 row(i64 i, i64 n) { i = i < 0 ? i + n : i; return i < 0 ? 0 : i >= n ? n - 1 : i; }
#define COMPARE(name, op) \\
  IN vb name(vf a, vf b) { return a op b; } \\
  IN vb name(vd a, vd b) { return __builtin_convertvector(a op b, vb); } \\
  IN vb name(vl a, vl b) { return __builtin_convertvector(a op b, vb); } \\
  IN vb name(vb a, vb b) { return -a op -b; } \\
  IN int name(float a, float b) { return -(a op b); } \\
  IN int name(double a, double b) { return -(a op b); } \\
  IN int name(i64 a, i64 b) { return -(a op b); } \\
  IN int name(int a, int b) { return -(-a op -b); }
COMPARE(lt, <) COMPARE(le, <=) COMPARE(gt, >) COMPARE(ge, >=) COMPARE(eq, ==) COMPARE(ne, !=)
template <class T> IN T nil(T) { return T{}; }
IN vf sel(vb c, vf a, vf b) { return c ? a : b; }
IN vd sel(vb c, vd a, vd b) { return __builtin_convertvector(c, vl) ? a : b; }
IN vl sel(vb c, vl a, vl b) { return __builtin_convertvector(c, vl) ? a : b; }
IN vb sel(vb c, vb a, vb b) { return c ? a : b; }
template <class T> IN T sel(int c, T a, T b) { return c ? a : b; }
template <class V> IN vb is_nan(V x) { return ne(x, x); }
IN int is_nan(float x) { return -(x != x); }
IN int is_nan(double x) { return -(x != x); }
template <class V> IN V larger(V a, V b) { return sel(ge(a, b) | ne(a, a), a, b); }
template <class V> IN V smaller(V a, V b) { return sel(le(a, b) | ne(a, a), a, b); }
IN vf size_of(vf x) { return (vf)((vb)x & 0x7fffffff); }
IN vd size_of(vd x) { return (vd)((vl)x & 0x7fffffffffffffffLL); }
IN vl size_of(vl x) { return x < 0 ? -x : x; }
IN float size_of(float x) { return __builtin_fabsf(x); }
IN double size_of(double x) { return __builtin_fabs(x); }
IN i64 size_of(i64 x) { return x < 0 ? -x : x; }
"""

_ROUTINES = """
#define EACH(name, f, d) \\
  IN vf name(vf x) { vf r; for (int i = 0; i < W; i++) r[i] = f(x[i]); return r; } \\
  IN vd name(vd x) { vd r; for (int i = 0; i < W; i++) r[i] = d(x[i]); return r; } \\
  IN float name(float x) { return f(x); } \\
  IN double name(double x) { return d(x); }
#define EACH2(name, f, d) \\
  IN vf name(vf x, vf y) { vf r; for (int i = 0; i < W; i++) r[i] = f(x[i], y[i]); return r; } \\
  IN vd name(vd x, vd y) { vd r; for (int i = 0; i < W; i++) r[i] = d(x[i], y[i]); return r; } \\
  IN float name(float x, float y) { return f(x, y); } \\
  IN double name(double x, double y) { return d(x, y); }
#define C(name) EACH(v_##name, __builtin_##name##f, __builtin_##name)
C(sqrt) C(floor) C(ceil) C(trunc) C(nearbyint) C(erf) C(erfc) C(sin) C(cos) C(tan) C(asin)
C(acos) C(atan) C(sinh) C(cosh) C(asinh) C(acosh) C(atanh) C(log2) C(log10) C(exp2)
EACH2(v_pow, __builtin_powf, __builtin_pow)
EACH2(v_fmod, __builtin_fmodf, __builtin_fmod)
EACH2(v_atan2, __builtin_atan2f, __builtin_atan2)
IN float lgamma_one(float x) { int s; return lgammaf_r(x, &s); }
IN double lgamma_one(double x) { int s; return lgamma_r(x, &s); }
EACH(v_lgamma, lgamma_one, lgamma_one)
static double digamma_one(double x) {
  double shift = 0;
  if (x == 0) return __builtin_copysign(__builtin_inf(), -x);
  if (x < 0) {
    if (x == __builtin_trunc(x)) return __builtin_nan("");
    shift = -3.141592653589793 / __builtin_tan(3.141592653589793 * (x - __builtin_trunc(x)));
    x = 1 - x;
  }
  for (; x < 10; x += 1) shift -= 1 / x;
  double y = 1 / (x * x);
  double series = y * (1. / 12 - y * (1. / 120 - y * (1. / 252 - y * (1. / 240 - y * (1. / 132
      - y * (691. / 32760 - y / 12))))));
  return x > 1e17 ? __builtin_log(x) + shift : __builtin_log(x) - 0.5 / x - series + shift;
}
EACH(v_digamma, digamma_one, digamma_one)
"""

_EXPONENTIALS = """
IN vf v_exp(vf x) {
  x = x < -104.f ? -104.f + (vf){} : x;
  x = x > 89.5f ? 89.5f + (vf){} : x;
  vf t = x * 0x1.715476p+0f + 0x1.8p23f;
  vf n = t - 0x1.8p23f;
  vb k = (vb)t - (vb)(0x1.8p23f + (vf){});
  vf r = x - n * 0x1.62e4p-1f;
  r = r - n * 0x1.7f7d1cp-20f;
  vf p = 1.f + r * (1.f + r * (0.5f + r * (0x1.555556p-3f + r * (0x1.555556p-5f
      + r * (0x1.111112p-7f + r * (0x1.6c16c2p-10f + r * 0x1.a01a02p-13f))))));
  vb half = k >> 1;
  return p * (vf)((half + 127) << 23) * (vf)((k - half + 127) << 23);
}
IN vd v_exp(vd x) {
  x = x < -746. ? -746. + (vd){} : x;
  x = x > 710. ? 710. + (vd){} : x;
  vd t = x * 0x1.71547652b82fep+0 + 0x1.8p52;
  vd n = t - 0x1.8p52;
  vl k = (vl)t - (vl)(0x1.8p52 + (vd){});
  vd r = x - n * 0x1.62e42fefa38p-1;
  r = r - n * 0x1.ef35793c7673p-45;
  vd p = 1. / 479001600 + r * (1. / 6227020800);
  p = 1. / 39916800 + r * p;
  p = 1. / 3628800 + r * p;
  p = 1. / 362880 + r * p;
  p = 1. / 40320 + r * p;
  p = 1. / 5040 + r * p;
  p = 1. / 720 + r * p;
  p = 1. / 120 + r * p;
  p = 1. / 24 + r * p;
  p = 1. / 6 + r * p;
  p = 1. + r * (1. + r * (0.5 + r * p));
  vl half = k >> 1;
  return p * (vd)((half + 1023) << 52) * (vd)((k - half + 1023) << 52);
}
IN vf v_log(vf x) {
  vb tiny = x < 0x1p-126f;
  vf y = tiny ? x * 0x1p25f : x;
  vb bits = (vb)y - 0x3f3504f3;
  vb k = bits >> 23;
  vf f = (vf)((vb)y - (k << 23)) - 1.f;
  vf n = __builtin_convertvector(k + (tiny & -25), vf);
  vf s = f / (2.f + f), z = s * s, h = 0.5f * f * f;
  vf r = z * (2.f / 3 + z * (2.f / 5 + z * (2.f / 7 + z * (2.f / 9 + z * (2.f / 11)))));
  vf v = s * (h + r) + n * 0x1.7f7d1cp-20f - h + f + n * 0x1.62e4p-1f;
  v = x > 0x1.fffffep127f ? x : v;
  v = x == 0 ? -INF + (vf){} : v;
  return x >= 0 ? v : NOT_A_NUMBER + (vf){};
}
IN vd v_log(vd x) {
  vl tiny = x < 0x1p-1022;
  vd y = tiny ? x * 0x1p54 : x;
  vl bits = (vl)y - 0x3fe6a09e667f3bcdLL;
  vl k = bits >> 52;
  vd f = (vd)((vl)y - (k << 52)) - 1.;
  vd n = __builtin_convertvector(k + (tiny & -54LL), vd);
  vd s = f / (2. + f), z = s * s, h = 0.5 * f * f;
  vd r = 2. / 19 + z * (2. / 21);
  r = 2. / 11 + z * (2. / 13 + z * (2. / 15 + z * (2. / 17 + z * r)));
  r = z * (2. / 3 + z * (2. / 5 + z * (2. / 7 + z * (2. / 9 + z * r))));
  vd v = s * (h + r) + n * 0x1.ef35793c7673p-45 - h + f + n * 0x1.62e42fefa38p-1;
  v = x > 0x1.fffffffffffffp1023 ? x : v;
  v = x == 0 ? -__builtin_inf() + (vd){} : v;
  return x >= 0 ? v : __builtin_nan("") + (vd){};
}
IN float v_exp(float x) { return __builtin_expf(x); }
IN double v_exp(double x) { return __builtin_exp(x); }
IN float v_log(float x) { return __builtin_logf(x); }
IN double v_log(double x) { return __builtin_log(x); }
// u = 1 + x rounds; what it lost is put back, relative to u.
template <class V> IN V v_log1p(V x) {
  V one = V{} + 1, u = one + x, v = v_log(u) - ((u - one) - x) / u;
  return sel(gt(size_of(x), one * 1e30f) | lt(x, one * -0.9999999f), v_log(u), sel(eq(u, one), x, v));
}
// Kahan: (e^x - 1) x / log(e^x) has small errors that cancel.
template <class V> IN V v_expm1(V x) {
  V one = V{} + 1, u = v_exp(x), w = u - one, v = w * x / v_log(u);
  v = sel(eq(u, one), x, v);
  return sel(gt(x, one * 40), u - one, sel(lt(x, one * -40), -one, v));
}
IN vf v_tanh(vf x) {
  vf z = x * x, e = v_exp(-2.f * size_of(x)), t = (1.f - e) / (1.f + e);
  t = x < 0 ? -t : t;
  vf p = x + x * z * (-0x1.555556p-2f + z * (0x1.111112p-3f + z * (-0x1.ba1ba2p-5f
      + z * (0x1.664f4ap-6f + z * (-0x1.226e36p-7f + z * 0x1.d6d3d8p-9f)))));
  return z < 0.16f ? p : t;
}
IN vd v_tanh(vd x) {
  vd t = v_expm1(-2. * size_of(x));
  t = -t / (t + 2.);
  return x < 0 ? -t : t;
}
IN float v_tanh(float x) { return __builtin_tanhf(x); }
IN double v_tanh(double x) { return __builtin_tanh(x); }
template <class V> IN V v_sigmoid(V x) { V one = V{} + 1; return one / (one + v_exp(-x)); }
template <class V> IN V v_softplus(V x, V beta, V threshold) {
  return sel(gt(x * beta, threshold), x, v_log1p(v_exp(x * beta)) / beta);
}
template <class V> IN V v_softplus_back(V g, V x, V beta, V threshold) {
  V z = v_exp(x * beta);
  return sel(gt(x * beta, threshold), g, g * z / (z + 1));
}
template <class V> IN V v_logsigmoid(V x) {
  V zero = {};
  return smaller(x, zero) - v_log1p(v_exp(-size_of(x)));
}
template <class V> IN V v_logaddexp(V a, V b) {
  V v = larger(a, b) + v_log1p(v_exp(-size_of(a - b)));
  return sel(eq(a, b) & gt(size_of(a), V{} + 1e38f), a, v);
}
"""

_PRODUCTS = """
// One tile of a product of matrices: rows times columns of sums in registers.
template <int I, int J, class V, class A, class B, class O>
IN void tile(i64 i, i64 j, i64 n, A a, B b, O o) {
  V sum[I][J] = {};
  for (i64 k = 0; k < n; k++) {
#pragma GCC unroll 8
    for (int p = 0; p < I; p++)
#pragma GCC unroll 8
      for (int q = 0; q < J; q++) sum[p][q] += a(i + p, k) * b(k, j + q);
  }
#pragma GCC unroll 8
  for (int p = 0; p < I; p++)
#pragma GCC unroll 8
    for (int q = 0; q < J; q++) o(i + p, j + q, sum[p][q]);
}
template <int I, int J, class V, class A, class B, class O>
static void product(i64 m, i64 n, i64 l, A a, B b, O o) {
  i64 i = 0;
  for (; i + I <= m; i += I) {
    i64 j = 0;
    for (; j + J <= l; j += J) tile<I, J, V>(i, j, n, a, b, o);
    for (; j < l; j++) tile<I, 1, V>(i, j, n, a, b, o);
  }
  for (; i < m; i++) {
    i64 j = 0;
    for (; j + J <= l; j += J) tile<1, J, V>(i, j, n, a, b, o);
    for (; j < l; j++) tile<1, 1, V>(i, j, n, a, b, o);
  }
}
"""

_FACTORS = """
template <class V, class A, class O, class R>
static void cholesky(i64 n, A a, O o, R r) {
  for (i64 j = 0; j < n; j++)
    for (i64 i = j; i < n; i++) {
      V sum = a(i, j);
      for (i64 k = 0; k < j; k++) sum -= r(i, k) * r(j, k);
      o(i, j, i > j ? sum / r(j, j) : v_sqrt(sel(gt(sum, nil(sum)), sum, nil(sum) - 1)));
    }
}
template <class V, class A, class B, class O, class R>
static void solve(i64 n, i64 m, bool upper, bool unit, A a, B b, O o, R r) {
  for (i64 j = 0; j < m; j++)
    for (i64 p = 0; p < n; p++) {
      i64 i = upper ? n - 1 - p : p;
      V sum = b(i, j);
      for (i64 q = 0; q < p; q++) {
        i64 k = upper ? n - 1 - q : q;
        sum -= a(i, k) * r(k, j);
      }
      o(i, j, unit ? sum : sum / a(i, i));
    }
}
"""


def prelude(lanes: int) -> str:
    """Returns what native code begins with.

    Args:
        lanes: Chains W in a vector.

    Returns:
        C++ source.
    """
    parts = (_TYPES, _CONVERSIONS, _ROUTINES, _EXPONENTIALS, _PRODUCTS, _FACTORS)
    return f"#define W {lanes}\n" + "".join(parts)
