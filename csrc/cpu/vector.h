// Loops over blocks of a row that compilers vectorise, compiled for any CPU, for AVX2 and for AVX-512.
//
// Everything here is forced inline: it takes the instruction set of the function that it ends up in, which is
// vectorised()'s choice.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#define COMPACT_INLINED __attribute__((always_inline))
#define COMPACT_INLINE inline COMPACT_INLINED

#if defined(__x86_64__)
#define COMPACT_AVX2 __attribute__((target("avx2,fma")))
#if defined(__clang__)
#define COMPACT_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#else  // gcc would use half of a register
#define COMPACT_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#endif
#endif

namespace compact {

constexpr int64_t kBlock = 2048;  // floats of a row that are worked on at a time: 8 KiB, in the L1 cache
constexpr float kUnderflow = -87.0f;  // exp below it is taken as 0, so that no number is denormal

struct bfloat16 {
  uint16_t bits;
};

enum class Instructions { any, avx2, avx512 };

// What the CPU has and torch was not told to do without (its own ATEN_CPU_CAPABILITY).
inline Instructions instructions() {
#if defined(__x86_64__)
  static const Instructions found = [] {
    const char* set = std::getenv("ATEN_CPU_CAPABILITY");
    const auto asked = [set](const char* name) { return set != nullptr && std::strcmp(set, name) == 0; };
    if (asked("default") || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Instructions::any;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return wide && !asked("avx2") ? Instructions::avx512 : Instructions::avx2;
  }();
  return found;
#else
  return Instructions::any;
#endif
}

#if defined(COMPACT_AVX2)
template <class Work, class... Arguments>
COMPACT_AVX2 void with_avx2(const Work& work, const Arguments&... arguments) {
  work(arguments...);
}

template <class Work, class... Arguments>
COMPACT_AVX512 void with_avx512(const Work& work, const Arguments&... arguments) {
  work(arguments...);
}
#endif

// work(arguments…) with the CPU's instructions: a lambda that is forced inline (COMPACT_INLINED), as all that it calls.
template <class Work, class... Arguments>
void vectorised(const Work& work, const Arguments&... arguments) {
#if defined(COMPACT_AVX2)
  if (instructions() == Instructions::avx512) return with_avx512(work, arguments...);
  if (instructions() == Instructions::avx2) return with_avx2(work, arguments...);
#endif
  work(arguments...);
}

COMPACT_INLINE void load(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

COMPACT_INLINE void load(const bfloat16* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = __builtin_bit_cast(float, uint32_t{from[i].bits} << 16);
}

COMPACT_INLINE void store(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

COMPACT_INLINE uint16_t rounded(float value) {  // to the nearest bfloat16, ties to even; a NaN stays one
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : up);
}

COMPACT_INLINE void store(const float* from, int64_t count, bfloat16* to) {
  for (int64_t i = 0; i < count; ++i) to[i].bits = rounded(from[i]);
}

COMPACT_INLINE float value(float x) { return x; }
COMPACT_INLINE float value(bfloat16 x) { return __builtin_bit_cast(float, uint32_t{x.bits} << 16); }
COMPACT_INLINE void assign(float& to, float x) { to = x; }
COMPACT_INLINE void assign(bfloat16& to, float x) { to.bits = rounded(x); }

// exp(x) for |x| ≤ 88 within 1.5 ulp (a NaN stays one): x = k·ln 2 + r, a polynomial in r, and k into the exponent.
COMPACT_INLINE float exp(float x) {
  const float shifter = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504f + shifter, k = shifted - shifter;
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * __builtin_bit_cast(float, (__builtin_bit_cast(uint32_t, shifted) + 127u) << 23);  // its low bits are k
}

COMPACT_INLINE float exp_or_zero(float x) { return x < kUnderflow ? 0.0f : exp(x < kUnderflow ? kUnderflow : x); }

// log(x) for normal x > 0 within 1 ulp or so: x = m·2^e with m near 1, a polynomial in m − 1.
COMPACT_INLINE float log(float x) {
  const int32_t bits = __builtin_bit_cast(int32_t, x);
  const int32_t shifted = bits - 0x3f3504f3;  // √½: m lies in [√½, √2)
  const float e = static_cast<float>(shifted >> 23);
  const float r = __builtin_bit_cast(float, (shifted & 0x007fffff) + 0x3f3504f3) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const float square = r * r;
  return r + (p * r * square - 0.5f * square - e * 2.12194440e-4f) + e * 0.693359375f;
}

COMPACT_INLINE float tanh(float x) {
  const float size = x < 0 ? -x : x;
  const float square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float small = p * square * x + x;
  const float large = 1.0f - 2.0f / (exp(size > 20.0f ? 40.0f : 2.0f * size) + 1.0f);
  return size < 0.625f ? small : (x < 0 ? -large : large);
}

}  // namespace compact
