// Block quantisation to e4m3: amax, scales, values. Follows element.cu.
//
// A block of threads works on one tile: at most 128 x 128 elements of one block of the grid. A tile whose rows are full and
// aligned is held in registers, so that its memory is read once; any other is read element by element, for the amax once more.

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 TILE = 128;

// `TileArgs` of quantize.rs: a rectangle of a grid's matrix. Addresses are in bytes, all else counts elements.
struct Args {
    u64 source;
    u64 source_stride;
    u64 destination;
    u64 destination_stride;
    u64 table;
    u64 table_columns;
    u64 origin[2];
    u64 shape[2];
    u64 block[2];
    // The block of the first element.
    u64 first_block[2];
    // Tiles of one block, and of the rectangle from left to right.
    u64 block_tiles[2];
    u64 tile_columns;
    u64 ue8m0;
};

struct Tile {
    // Of the first element, in the rectangle.
    u64 row, column;
    // 0 where a border of the rectangle leaves nothing of the tile.
    u32 rows, columns;
    // In the table.
    u64 entry;
};

// The part of one dimension that a tile has of a rectangle: returns its length, sets where it begins and its block.
//
// Divisions cost as much as some ten elements, and all threads do them: none of 64 bits, and no more than are needed.
INLINE u32 tile_part(const Args &args, u32 dim, u32 tile, u64 &start, u64 &block) {
    const u64 first = args.origin[dim];
    const u64 end = first + args.shape[dim];
    const u32 block_tiles = u32(args.block_tiles[dim]);
    const u32 blocks = block_tiles == 1 ? tile : tile / block_tiles;
    block = args.first_block[dim] + blocks;
    const u64 block_start = block * args.block[dim];
    const u64 tile_start = block_start + (tile - blocks * block_tiles) * TILE;
    const u64 tile_end = min(min(tile_start + TILE, block_start + args.block[dim]), end);
    const u64 from = max(tile_start, first);
    start = from - first;
    return tile_end > from ? u32(tile_end - from) : 0;
}

INLINE Tile tile_of(const Args &args) {
    Tile tile;
    u64 block_row, block_column;
    const u32 row = blockIdx.x / u32(args.tile_columns);
    tile.rows = tile_part(args, 0, row, tile.row, block_row);
    tile.columns = tile_part(args, 1, blockIdx.x - row * u32(args.tile_columns), tile.column, block_column);
    tile.entry = block_row * args.table_columns + block_column;
    return tile;
}

// The largest of the threads' values, none of which is negative, for all threads.
INLINE float largest_of_block(float value) {
    __shared__ u32 largest_of_warp[WARPS];
    u32 bits = __float_as_uint(value);
    for (u32 distance = 16; distance > 0; distance /= 2) {
        bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, distance));
    }
    __syncthreads(); // what an earlier call has left is read
    if (threadIdx.x % 32 == 0) largest_of_warp[threadIdx.x / 32] = bits;
    __syncthreads();
    for (u32 warp = 0; warp < WARPS; ++warp) bits = max(bits, largest_of_warp[warp]);
    return __uint_as_float(bits);
}

INLINE bool is_finite(float magnitude) { return __float_as_uint(magnitude) < F32_INFINITY; }

// `scale_of` of scale.rs.
INLINE float scale_of(float amax, bool ue8m0) {
    constexpr u32 mantissa = 0x007fffffu;
    const float largest = __uint_as_float(0x7f7fffffu);
    const float least_normal = __uint_as_float(0x00800000u);
    if (!(amax > 0.0f)) return 1.0f;
    const float scale = fmaxf(__fdiv_rn(fminf(amax, largest), 448.0f), least_normal);
    return ue8m0 ? __uint_as_float((__float_as_uint(scale) + mantissa) & ~mantissa) : scale;
}

// Divides by one scale, as correctly rounded as the division of f32 where the quotient decides about an e4m3 code.
//
// The reciprocal is rounded to nearest. One Newton step makes the quotient one of the two nearest to the exact one; the
// second then gives the nearest (P. Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor",
// 1990): its residual is exact. That holds while nothing overflows or gets subnormal: the scale must be moderate, see
// `is_moderate`. Quotients from 1024 on, which the steps might spoil, become 448 by any account, and the sign of those
// below 2^-40 is all that is left of them. Residuals are what is too much, and are multiplied with the negative reciprocal: the
// other way round a zero would lose its sign.
struct Divisor {
    float scale;
    float reciprocal;
    float negative;

    INLINE explicit Divisor(float scale) : scale(scale), reciprocal(__frcp_rn(scale)), negative(-reciprocal) {}

    // 2^-60 to 2^60: that of every block of weights that is not all but zero.
    INLINE bool is_moderate() const { return scale >= 0x1p-60f && scale <= 0x1p60f; }

    // `BOUNDED` is for values that are NaN or not above 448 scales, but for rounding.
    template <bool BOUNDED>
    INLINE float divide(float value) const {
        const float rough = __fmul_rn(value, reciprocal);
        const float faithful = __fmaf_rn(__fmaf_rn(rough, scale, -value), negative, rough);
        const float nearest = __fmaf_rn(__fmaf_rn(faithful, scale, -value), negative, faithful);
        return BOUNDED || fabsf(rough) < 1024.0f ? nearest : rough;
    }
};

// A tile in registers: each thread has `VECTOR` neighbours of every `ROWS`th row.
template <class T>
struct Fragment {
    static constexpr u32 VECTOR = 16 / sizeof(typename T::Bits);
    static constexpr u32 ROW_THREADS = TILE / VECTOR;
    static constexpr u32 ROWS = THREADS / ROW_THREADS;
    static constexpr u32 PASSES = TILE / ROWS;

    uint4 vectors[PASSES];

    static INLINE bool fits(const Args &args, const Tile &tile, u64 source, u64 destination) {
        return tile.columns == TILE && (source | args.source_stride * sizeof(typename T::Bits)) % 16 == 0 &&
               (destination | args.destination_stride) % VECTOR == 0;
    }

    static INLINE u32 row(u32 pass) { return pass * ROWS + threadIdx.x / ROW_THREADS; }
    static INLINE u32 column() { return threadIdx.x % ROW_THREADS * VECTOR; }

    INLINE Fragment(const Args &args, const Tile &tile, const typename T::Bits *source) {
#pragma unroll
        for (u32 pass = 0; pass < PASSES; ++pass) {
            vectors[pass] = make_uint4(0, 0, 0, 0);
            if (row(pass) < tile.rows) {
                vectors[pass] = *reinterpret_cast<const uint4 *>(source + row(pass) * args.source_stride + column());
            }
        }
    }

    // Makes the compiler forget what it has computed from the tile. It would keep the decoded elements for the next use, and
    // there are not registers enough for them.
    INLINE void forget() {
#pragma unroll
        for (u32 pass = 0; pass < PASSES; ++pass) {
            uint4 &vector = vectors[pass];
            asm volatile("" : "+r"(vector.x), "+r"(vector.y), "+r"(vector.z), "+r"(vector.w));
        }
    }

    INLINE void decode(u32 pass, float *values) const {
        const u32 words[4] = {vectors[pass].x, vectors[pass].y, vectors[pass].z, vectors[pass].w};
#pragma unroll
        for (u32 element = 0; element < VECTOR; ++element) {
            const u32 word = words[element * 4 / VECTOR];
            values[element] = T::value(typename T::Bits(VECTOR == 8 ? word >> element % 2 * 16 : word));
        }
    }

    // The largest magnitude; infinity if there is one.
    INLINE float amax() {
        float largest = 0.0f;
#pragma unroll
        for (u32 pass = 0; pass < PASSES; ++pass) {
            float values[VECTOR];
            decode(pass, values);
#pragma unroll
            for (u32 element = 0; element < VECTOR; ++element) largest = fmaxf(largest, fabsf(values[element])); // not NaN
        }
        const float amax = largest_of_block(largest);
        forget();
        return amax;
    }

    template <bool BOUNDED>
    INLINE void quantize(const Args &args, const Tile &tile, const Divisor &divisor, u8 *destination) const {
#pragma unroll
        for (u32 pass = 0; pass < PASSES; ++pass) {
            if (row(pass) >= tile.rows) continue;
            float values[VECTOR];
            decode(pass, values);
            u32 codes[VECTOR / 4];
#pragma unroll
            for (u32 word = 0; word < VECTOR / 4; ++word) {
                float quotients[4];
#pragma unroll
                for (u32 element = 0; element < 4; ++element) {
                    quotients[element] = divisor.template divide<BOUNDED>(values[word * 4 + element]);
                }
                codes[word] = encode_e4m3(quotients);
            }
            u8 *to = destination + row(pass) * args.destination_stride + column();
            if (VECTOR == 8) {
                *reinterpret_cast<uint2 *>(to) = make_uint2(codes[0], codes[VECTOR / 4 - 1]);
            } else {
                *reinterpret_cast<u32 *>(to) = codes[0];
            }
        }
    }
};

// Calls `work(row, column)` for each element of a tile, neighbours by neighbouring threads.
template <class Work>
INLINE void for_each_element(const Tile &tile, Work work) {
    for (u32 index = threadIdx.x; index < tile.rows * tile.columns; index += THREADS) {
        work(u64(index / tile.columns), u64(index % tile.columns));
    }
}

// The largest finite magnitude.
template <class T>
INLINE float amax_by_element(const Args &args, const Tile &tile, const typename T::Bits *source) {
    float largest = 0.0f;
    for_each_element(tile, [&](u64 row, u64 column) {
        const float magnitude = fabsf(T::value(source[row * args.source_stride + column]));
        if (is_finite(magnitude)) largest = fmaxf(largest, magnitude);
    });
    return largest_of_block(largest);
}

template <class T>
INLINE void quantize_by_element(const Args &args, const Tile &tile, float scale, const typename T::Bits *source,
                                u8 *destination) {
    for_each_element(tile, [&](u64 row, u64 column) {
        const float value = T::value(source[row * args.source_stride + column]);
        destination[row * args.destination_stride + column] = E4M3::encode(__fdiv_rn(value, scale));
    });
}

template <class T>
INLINE const typename T::Bits *source_of(const Args &args, const Tile &tile) {
    return reinterpret_cast<const typename T::Bits *>(args.source) + tile.row * args.source_stride + tile.column;
}

INLINE u8 *codes_of(const Args &args, const Tile &tile) {
    return reinterpret_cast<u8 *>(args.destination) + tile.row * args.destination_stride + tile.column;
}

// Raises the entries of a table of amaxes. They are not negative: as bits they are ordered as they are as floats.
template <class T>
INLINE void block_amax(const Args &args) {
    const Tile tile = tile_of(args);
    if (tile.rows == 0 || tile.columns == 0) return;
    const typename T::Bits *source = source_of<T>(args, tile);
    float amax = __uint_as_float(F32_INFINITY);
    if (Fragment<T>::fits(args, tile, u64(source), 0)) amax = Fragment<T>(args, tile, source).amax();
    if (!is_finite(amax)) amax = amax_by_element<T>(args, tile, source);
    if (threadIdx.x == 0) atomicMax(reinterpret_cast<u32 *>(args.table) + tile.entry, __float_as_uint(amax));
}

// Quantises with a table of scales; or, where tiles are blocks, makes the scales as well.
template <class T, bool SCALES>
INLINE void quantize(const Args &args) {
    const Tile tile = tile_of(args);
    if (tile.rows == 0 || tile.columns == 0) return;
    const typename T::Bits *source = source_of<T>(args, tile);
    u8 *destination = codes_of(args, tile);
    float *entry = reinterpret_cast<float *>(args.table) + tile.entry;
    if (Fragment<T>::fits(args, tile, u64(source), u64(destination))) {
        Fragment<T> fragment(args, tile, source);
        const float amax = SCALES ? fragment.amax() : 0.0f;
        const Divisor divisor(SCALES ? scale_of(amax, args.ue8m0) : *entry);
        // Infinities and blocks that are all but zero are rare: those go the other way.
        if (is_finite(amax) && divisor.is_moderate()) {
            if (SCALES && threadIdx.x == 0) *entry = divisor.scale;
            fragment.template quantize<SCALES>(args, tile, divisor, destination);
            return;
        }
    }
    const float scale = SCALES ? scale_of(amax_by_element<T>(args, tile, source), args.ue8m0) : *entry;
    if (SCALES && threadIdx.x == 0) *entry = scale;
    quantize_by_element<T>(args, tile, scale, source, destination);
}

template <class T>
INLINE void dequantize(const Args &args) {
    const Tile tile = tile_of(args);
    if (tile.rows == 0 || tile.columns == 0) return;
    const u8 *source = reinterpret_cast<const u8 *>(args.source) + tile.row * args.source_stride + tile.column;
    typename T::Bits *destination =
        reinterpret_cast<typename T::Bits *>(args.destination) + tile.row * args.destination_stride + tile.column;
    const float scale = reinterpret_cast<const float *>(args.table)[tile.entry];
    for_each_element(tile, [&](u64 row, u64 column) {
        const float product = __fmul_rn(E4M3::decode(source[row * args.source_stride + column]), scale);
        // `F32_NAN` of element.rs: the GPU's own has other bits.
        const float one_nan = product == product ? product : __uint_as_float(F32_INFINITY | F32_QUIET);
        destination[row * args.destination_stride + column] = T::encode(one_nan);
    });
}

// Registers hold the tile: 32 of a thread for 16-bit types, 64 for f32. So that many tiles are in flight on a multiprocessor.
#define QUANTIZE(name, T, BLOCKS)                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) block_amax_##name(const Args args) {                 \
        block_amax<T>(args);                                                                                           \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) quantize_##name(const Args args) {                   \
        quantize<T, true>(args);                                                                                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) quantize_rect_##name(const Args args) {              \
        quantize<T, false>(args);                                                                                      \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) dequantize_##name(const Args args) { dequantize<T>(args); }

QUANTIZE(bf16, BF16, 4)
QUANTIZE(f16, F16, 4)
QUANTIZE(f32, F32, 2)

// Amaxes to scales, which may take their place.
extern "C" __global__ void __launch_bounds__(THREADS) scales(const float *amaxes, float *scales, u64 count, u64 ue8m0) {
    const u64 index = u64(blockIdx.x) * THREADS + threadIdx.x;
    if (index < count) scales[index] = scale_of(amaxes[index], ue8m0);
}

// `ue8m0_byte` of scale.rs, for powers of two that are normal: all that `scale_of` gives.
extern "C" __global__ void __launch_bounds__(THREADS) scale_bytes(const float *scales, u8 *bytes, u64 count) {
    const u64 index = u64(blockIdx.x) * THREADS + threadIdx.x;
    if (index < count) bytes[index] = u8(__float_as_uint(scales[index]) >> 23);
}
