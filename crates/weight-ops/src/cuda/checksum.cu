// What each leaf contributes to a checksum, as ../checksum.rs defines it. A warp takes a leaf at a time, each lane two words of
// a stripe.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;

#define INLINE __device__ __forceinline__

constexpr u32 THREADS = 256;
constexpr u32 STRIPE_BYTES = 512;
// Stripes in flight.
constexpr u32 DEPTH = 8;

constexpr u64 PRIME_1 = 0x9e3779b185ebca87ull;
constexpr u64 PRIME_2 = 0xc2b2ae3d27d4eb4full;
constexpr u64 PRIME_3 = 0x165667b19e3779f9ull;

INLINE u64 rotated(u64 value, u32 bits) { return value << bits | value >> (64 - bits); }

INLINE u64 mixed(u64 value) {
    value = (value ^ value >> 33) * PRIME_2;
    value = (value ^ value >> 29) * PRIME_3;
    return value ^ value >> 32;
}

INLINE void absorb(u64 &state, u32 low, u32 high) {
    const u64 word = u64(high) << 32 | low;
    state = rotated(state + word * PRIME_2, 31) * PRIME_1;
}

// `Leaf` of checksums.rs.
struct Leaf {
    u64 address, number, bytes;
};

// 16 bytes from any address, zeros from `end` on.
INLINE uint4 load_bytes(u64 address, u64 end) {
    u32 words[4] = {0, 0, 0, 0};
#pragma unroll
    for (u32 byte = 0; byte < 16; ++byte) {
        if (address + byte < end) {
            words[byte / 4] |= u32(*reinterpret_cast<const u8 *>(address + byte)) << byte % 4 * 8;
        }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

INLINE u64 sum_of_warp(u64 value) {
    for (u32 distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

extern "C" __global__ void __launch_bounds__(THREADS) checksum(const Leaf *leaves, u64 count, u64 *sums) {
    const u32 lane = threadIdx.x % 32;
    const u64 warps = u64(gridDim.x) * (THREADS / 32);
    for (u64 index = u64(threadIdx.x / 32) * gridDim.x + blockIdx.x; index < count; index += warps) {
        const Leaf leaf = leaves[index];
        const u64 seeds[2] = {(2 * lane + 1) * PRIME_3, (2 * lane + 2) * PRIME_3};
        u64 states[2] = {seeds[0], seeds[1]};
        const u32 whole = u32(leaf.bytes / STRIPE_BYTES);
        u32 stripe = 0;
        if (leaf.address % 16 == 0) {
            const uint4 *vectors = reinterpret_cast<const uint4 *>(leaf.address) + lane;
            for (; stripe + DEPTH <= whole; stripe += DEPTH) {
                uint4 loaded[DEPTH];
#pragma unroll
                for (u32 step = 0; step < DEPTH; ++step) loaded[step] = vectors[(stripe + step) * 32];
#pragma unroll
                for (u32 step = 0; step < DEPTH; ++step) {
                    absorb(states[0], loaded[step].x, loaded[step].y);
                    absorb(states[1], loaded[step].z, loaded[step].w);
                }
            }
        }
        // What is left: few stripes, or all where the address is odd.
        for (; stripe * STRIPE_BYTES < leaf.bytes; ++stripe) {
            const u64 address = leaf.address + stripe * STRIPE_BYTES + lane * 16;
            const uint4 vector = load_bytes(address, leaf.address + leaf.bytes);
            absorb(states[0], vector.x, vector.y);
            absorb(states[1], vector.z, vector.w);
        }
        const u64 lanes[2] = {mixed(states[0] + seeds[0]), mixed(states[1] + seeds[1])};
        const u64 first = sum_of_warp(lanes[0] + lanes[1]);
        const u64 second = sum_of_warp(mixed(lanes[0] + PRIME_1) + mixed(lanes[1] + PRIME_1));
        if (lane == 0) {
            const u64 key = mixed(leaf.number << 17 | leaf.bytes);
            sums[2 * index] = mixed(first + key);
            sums[2 * index + 1] = mixed(second + rotated(key, 32));
        }
    }
}
