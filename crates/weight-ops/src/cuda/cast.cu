// Conversion of elements, one to one. Follows element.cu.
//
// Both arrays are aligned to their elements. Where they also reach a multiple of a vector's size at the same element, all but
// a few elements at the ends are moved in vectors.

constexpr u32 THREADS = 256;
// Elements of a vector: 16 bytes of a 16-bit type, two times that of f32, half of it of e4m3.
constexpr u32 VECTOR = 8;
// Vectors that a thread has in flight.
constexpr u32 DEPTH = 4;

template <class T>
struct alignas(sizeof(typename T::Bits) * VECTOR >= 16 ? 16 : 8) Vector {
    typename T::Bits elements[VECTOR];
};

template <class S, class D>
struct Convert {
    static INLINE typename D::Bits of(typename S::Bits bits) { return D::encode(S::decode(bits)); }
};

// Between equal types all bits are kept: through f32 a NaN would not come back as it was.
template <class T>
struct Convert<T, T> {
    static INLINE typename T::Bits of(typename T::Bits bits) { return bits; }
};

template <class S, class D>
INLINE void cast(const typename S::Bits *source, typename D::Bits *destination, u64 count) {
    const u64 block = u64(blockIdx.x) * THREADS * DEPTH;
    const u64 misaligned = u64(destination) % alignof(Vector<D>);
    const u64 head_full = misaligned == 0 ? 0 : (alignof(Vector<D>) - misaligned) / sizeof(typename D::Bits);
    const u64 head = head_full < count ? head_full : count;
    if (u64(source + head) % alignof(Vector<S>) != 0) {
        for (u32 step = 0; step < VECTOR * DEPTH; ++step) {
            const u64 index = block * VECTOR + step * THREADS + threadIdx.x;
            if (index < count) destination[index] = Convert<S, D>::of(source[index]);
        }
        return;
    }
    const u64 vectors = (count - head) / VECTOR;
    const Vector<S> *from = reinterpret_cast<const Vector<S> *>(source + head) + block + threadIdx.x;
    Vector<D> *to = reinterpret_cast<Vector<D> *>(destination + head) + block + threadIdx.x;
    Vector<S> loaded[DEPTH];
#pragma unroll
    for (u32 step = 0; step < DEPTH; ++step) {
        if (block + step * THREADS + threadIdx.x < vectors) loaded[step] = from[step * THREADS];
    }
#pragma unroll
    for (u32 step = 0; step < DEPTH; ++step) {
        if (block + step * THREADS + threadIdx.x < vectors) {
            Vector<D> converted;
#pragma unroll
            for (u32 element = 0; element < VECTOR; ++element) {
                converted.elements[element] = Convert<S, D>::of(loaded[step].elements[element]);
            }
            to[step * THREADS] = converted;
        }
    }
    if (blockIdx.x == 0) {
        // Fewer than 8 elements before the first vector and after the last.
        const u64 tail = head + vectors * VECTOR + threadIdx.x;
        if (threadIdx.x < head) destination[threadIdx.x] = Convert<S, D>::of(source[threadIdx.x]);
        if (tail < count) destination[tail] = Convert<S, D>::of(source[tail]);
    }
}

#define CAST(from, S, to, D)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS) cast_##from##_##to(                                          \
        const S::Bits *source, D::Bits *destination, u64 count) {                                                      \
        cast<S, D>(source, destination, count);                                                                        \
    }

#define CAST_FROM(from, S)                                                                                             \
    CAST(from, S, bf16, BF16)                                                                                          \
    CAST(from, S, f16, F16)                                                                                            \
    CAST(from, S, f32, F32)                                                                                            \
    CAST(from, S, e4m3, E4M3)

CAST_FROM(bf16, BF16)
CAST_FROM(f16, F16)
CAST_FROM(f32, F32)
CAST_FROM(e4m3, E4M3)
