// Elements on the GPU: how each becomes an f32 and how an f32 is rounded to each. Put before every source that needs it.
//
// The arithmetic is that of `element.rs`, which explains it. Conversions of the hardware are used only where they give the
// same bits: those to bf16 and f16 do not, they forget what a NaN carries.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define INLINE __device__ __forceinline__

constexpr u32 F32_SIGN = 0x80000000u;
constexpr u32 F32_INFINITY = 0x7f800000u;
constexpr u32 F32_QUIET = 0x00400000u;

// `round_magnitude` of element.rs.
template <int MANTISSA, int EXPONENT_MIN>
INLINE u32 round_magnitude(u32 magnitude) {
    constexpr u32 field_min = EXPONENT_MIN + 127;
    constexpr u32 narrower = 23 - MANTISSA;
    constexpr u32 offset = (0u - (field_min << MANTISSA)) & 0xffffu;
    const u32 binade = max(magnitude, field_min << 23) & F32_INFINITY;
    const u32 counter = binade + ((narrower << 23) | offset);
    const u32 steps = __float_as_uint(__fadd_rn(__uint_as_float(magnitude), __uint_as_float(counter)));
    return steps + (binade >> narrower);
}

// `widen_magnitude` of element.rs.
template <int MANTISSA, int EXPONENT_MIN>
INLINE u32 widen_magnitude(u32 magnitude) {
    constexpr u32 step = u32(EXPONENT_MIN - MANTISSA + 127) << 23;
    const u32 normal = (magnitude << (23 - MANTISSA)) + (u32(EXPONENT_MIN - 1 + 127) << 23);
    const float subnormal = __fmul_rn(float(int(magnitude)), __uint_as_float(step));
    return magnitude < (1u << MANTISSA) ? __float_as_uint(subnormal) : normal;
}

struct F32 {
    typedef u32 Bits;
    static INLINE float decode(u32 bits) { return __uint_as_float(bits); }
    static INLINE float value(u32 bits) { return decode(bits); }
    static INLINE u32 encode(float value) { return __float_as_uint(value); }
};

struct BF16 {
    typedef u16 Bits;
    static INLINE float decode(u16 bits) { return __uint_as_float(u32(bits) << 16); }
    static INLINE float value(u16 bits) { return decode(bits); }
    static INLINE u16 encode(float value) {
        const u32 bits = __float_as_uint(value);
        const u32 rounded = bits + 0x7fffu + (bits >> 16 & 1u);
        return u16(((bits & ~F32_SIGN) > F32_INFINITY ? bits | F32_QUIET : rounded) >> 16);
    }
};

struct F16 {
    typedef u16 Bits;
    static INLINE float decode(u16 bits) {
        constexpr u32 infinity = 0x7c00u;
        const u32 magnitude = bits & 0x7fffu;
        const u32 quiet = magnitude > infinity ? F32_QUIET : 0u;
        const u32 special = F32_INFINITY | (magnitude << 13 & ~F32_INFINITY) | quiet;
        const u32 value = magnitude < infinity ? widen_magnitude<10, -14>(magnitude) : special;
        return __uint_as_float(value | u32(bits & 0x8000u) << 16);
    }
    // As `decode`, but for which NaN a NaN becomes.
    static INLINE float value(u16 bits) {
#if defined(__CUDA_ARCH__)
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
        return value;
#else
        return decode(bits);
#endif
    }
    static INLINE u16 encode(float value) {
        constexpr u32 cap = 0x47800000u; // 65536
        const u32 bits = __float_as_uint(value);
        const u32 magnitude = bits & ~F32_SIGN;
        const u32 rounded = round_magnitude<10, -14>(min(magnitude, cap));
        const u32 nan = 0x7e00u | (magnitude >> 13 & 0x03ffu);
        return u16((magnitude > F32_INFINITY ? nan : rounded) | (bits >> 16 & 0x8000u));
    }
};

struct E4M3 {
    typedef u8 Bits;
    static INLINE float decode(u8 bits) {
        const u32 magnitude = bits & 0x7fu;
        const u32 value = magnitude == 0x7fu ? F32_INFINITY | F32_QUIET : widen_magnitude<3, -6>(magnitude);
        return __uint_as_float(value | u32(bits & 0x80u) << 24);
    }
    static INLINE u8 encode(float value) {
        constexpr u32 largest = 0x43e00000u; // 448
        const u32 bits = __float_as_uint(value);
        const u32 magnitude = bits & ~F32_SIGN;
        const u32 rounded = round_magnitude<3, -6>(min(magnitude, largest)) | (bits >> 24 & 0x80u);
        return u8(magnitude > F32_INFINITY ? 0x7fu : rounded);
    }
};

// Four e4m3 codes, the first in the lowest byte. A NaN must be the one without a sign that arithmetic gives: PTX does not say
// that conversion drops a sign.
INLINE u32 encode_e4m3(const float *values) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    u16 low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(values[1]), "f"(values[0]));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(values[3]), "f"(values[2]));
    return low | u32(high) << 16;
#else
    u32 codes = 0;
#pragma unroll
    for (u32 code = 0; code < 4; ++code) codes |= u32(E4M3::encode(values[code])) << code * 8;
    return codes;
#endif
}
