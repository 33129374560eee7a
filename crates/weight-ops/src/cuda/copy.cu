// Copies of many spans and of strided boxes, on this GPU or between this one and a peer.
//
// The work is cut into pieces beforehand. A warp takes a piece at a time, so pieces need no barrier and small spans keep as
// many bytes in flight as large ones do. Neighbouring pieces go to different multiprocessors.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define INLINE __device__ __forceinline__

// One block for each multiprocessor. With 8 vectors of 16 bytes by each thread it has 64 KiB in flight: at 25 GB/s, its part
// when 16 of them fill a link, that covers 2.6 us of latency.
constexpr u32 THREADS = 512;
constexpr u32 DEPTH = 8;

// `Piece` of copy.rs.
struct Piece {
    u64 source, destination, bytes; // at most 2^31 bytes
};

// The 16 bytes that begin `shift` bytes after those of `low`, 0 < `shift` < 16.
INLINE uint4 shifted(uint4 low, uint4 high, u32 shift) {
    u32 words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    if (shift & 8) {
#pragma unroll
        for (u32 word = 0; word < 6; ++word) words[word] = words[word + 2];
    }
    if (shift & 4) {
#pragma unroll
        for (u32 word = 0; word < 5; ++word) words[word] = words[word + 1];
    }
    const u32 bits = (shift & 3) * 8;
    return make_uint4(__funnelshift_r(words[0], words[1], bits), __funnelshift_r(words[1], words[2], bits),
                      __funnelshift_r(words[2], words[3], bits), __funnelshift_r(words[3], words[4], bits));
}

// `DEPTH` vectors by each lane of a warp, from aligned addresses. They are not read again soon: let caches drop them first.
INLINE void copy_vectors(const uint4 *source, uint4 *destination, u32 vectors, u32 lane) {
#pragma unroll 1
    for (u32 first = lane; first < vectors; first += 32 * DEPTH) {
        uint4 loaded[DEPTH];
#pragma unroll
        for (u32 step = 0; step < DEPTH; ++step) {
            if (first + 32 * step < vectors) loaded[step] = __ldcs(source + first + 32 * step);
        }
#pragma unroll
        for (u32 step = 0; step < DEPTH; ++step) {
            if (first + 32 * step < vectors) __stcs(destination + first + 32 * step, loaded[step]);
        }
    }
}

// The same where the source is `shift` bytes behind an aligned address, which is passed. Reads one vector more.
INLINE void copy_vectors_shifted(const uint4 *source, u32 shift, uint4 *destination, u32 vectors, u32 lane) {
#pragma unroll 1
    for (u32 first = lane; first < vectors; first += 32 * DEPTH / 2) {
        uint4 low[DEPTH / 2], high[DEPTH / 2];
#pragma unroll
        for (u32 step = 0; step < DEPTH / 2; ++step) {
            if (first + 32 * step < vectors) {
                low[step] = source[first + 32 * step];
                high[step] = source[first + 32 * step + 1];
            }
        }
#pragma unroll
        for (u32 step = 0; step < DEPTH / 2; ++step) {
            if (first + 32 * step < vectors) destination[first + 32 * step] = shifted(low[step], high[step], shift);
        }
    }
}

// Copies contiguous bytes, from any address to any other, by one warp.
INLINE void copy_run(u64 source, u64 destination, u32 bytes, u32 lane) {
    const u8 *from = reinterpret_cast<const u8 *>(source);
    u8 *to = reinterpret_cast<u8 *>(destination);
    // Bytes before the first vector that is written, and how far behind an aligned address its source is.
    u32 head = u32(0 - destination) & 15;
    const u32 shift = u32(source + head) & 15;
    // Only aligned vectors are read, and none that begins before the source or ends behind it.
    if (shift > head) head += 16;
    const u32 extra = shift == 0 ? 0 : 1;
    if (bytes < head + 16 * (1 + extra)) {
#pragma unroll 1
        for (u32 index = lane; index < bytes; index += 32) to[index] = from[index];
        return;
    }
    const u32 vectors = (bytes - head + shift) / 16 - extra;
    const uint4 *vectors_from = reinterpret_cast<const uint4 *>(source + head - shift);
    uint4 *vectors_to = reinterpret_cast<uint4 *>(destination + head);
    if (shift == 0) {
        copy_vectors(vectors_from, vectors_to, vectors, lane);
    } else {
        copy_vectors_shifted(vectors_from, shift, vectors_to, vectors, lane);
    }
    // At most 31 bytes before and behind the vectors.
    const u32 tail = head + 16 * vectors + lane;
    if (lane < head) to[lane] = from[lane];
    if (tail < bytes) to[tail] = from[tail];
}

// The first piece of this warp, and how many warps there are.
INLINE u64 first_piece() { return u64(threadIdx.x / 32) * gridDim.x + blockIdx.x; }
INLINE u64 warps() { return u64(blockDim.x / 32) * gridDim.x; }

extern "C" __global__ void __launch_bounds__(THREADS) copy_spans(const Piece *pieces, u64 count) {
    u64 index = first_piece();
    if (index >= count) return;
    Piece piece = pieces[index];
    while (true) {
        index += warps();
        // Read while this piece is copied.
        const Piece next = index < count ? pieces[index] : piece;
        copy_run(piece.source, piece.destination, u32(piece.bytes), threadIdx.x % 32);
        if (index >= count) return;
        piece = next;
    }
}

// `Box` of boxes.rs: rows of equal length. Strides are in bytes, the first for the outermost index.
struct Box {
    u64 source, destination;
    u64 source_strides[3];
    u64 destination_strides[3];
    // How many rows each step of the two inner indices counts.
    u32 counts[2];
    // The largest power of two, at most 16, that divides all addresses of rows and their length.
    u32 width;
    u32 padding;
};

// `BoxPiece` of boxes.rs: some bytes of some rows of a box.
struct BoxPiece {
    u64 offset;
    u32 box, first_row, rows, bytes;
};

// Below, rows are too short for a warp each: several are copied at once.
constexpr u32 RUN_BYTES_MIN = 512;

struct Row {
    u64 source, destination;
};

INLINE Row row_of(const Box &box, u32 row, u64 offset) {
    const u32 inner = row % box.counts[1];
    const u32 rest = row / box.counts[1];
    const u32 middle = rest % box.counts[0];
    const u32 outer = rest / box.counts[0];
    return {box.source + outer * box.source_strides[0] + middle * box.source_strides[1] +
                inner * box.source_strides[2] + offset,
            box.destination + outer * box.destination_strides[0] + middle * box.destination_strides[1] +
                inner * box.destination_strides[2] + offset};
}

// Copies short rows as units of type `W`, by one warp.
template <class W>
INLINE void copy_short_rows(const Box &box, const BoxPiece &piece, u32 lane) {
    constexpr u32 depth = 4;
    const u32 row_units = piece.bytes / sizeof(W);
    const u32 units = piece.rows * row_units;
#pragma unroll 1
    for (u32 first = lane; first < units; first += 32 * depth) {
        W loaded[depth];
        W *to[depth];
#pragma unroll
        for (u32 step = 0; step < depth; ++step) {
            // The last ones may be copied twice, which is as good and needs no branch.
            const u32 unit = min(first + 32 * step, units - 1);
            const Row row = row_of(box, piece.first_row + unit / row_units, piece.offset);
            loaded[step] = __ldcs(reinterpret_cast<const W *>(row.source) + unit % row_units);
            to[step] = reinterpret_cast<W *>(row.destination) + unit % row_units;
        }
#pragma unroll
        for (u32 step = 0; step < depth; ++step) __stcs(to[step], loaded[step]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    copy_boxes(const Box *boxes, const BoxPiece *pieces, u64 count) {
    const u32 lane = threadIdx.x % 32;
    for (u64 index = first_piece(); index < count; index += warps()) {
        const BoxPiece piece = pieces[index];
        const Box box = boxes[piece.box];
        if (piece.bytes >= RUN_BYTES_MIN) {
#pragma unroll 1
            for (u32 row = 0; row < piece.rows; ++row) {
                const Row at = row_of(box, piece.first_row + row, piece.offset);
                copy_run(at.source, at.destination, piece.bytes, lane);
            }
            continue;
        }
        switch (box.width) {
        case 16: copy_short_rows<uint4>(box, piece, lane); break;
        case 8: copy_short_rows<uint2>(box, piece, lane); break;
        case 4: copy_short_rows<u32>(box, piece, lane); break;
        case 2: copy_short_rows<u16>(box, piece, lane); break;
        default: copy_short_rows<u8>(box, piece, lane); break;
        }
    }
}
