//! Checksums on a GPU against those of the CPU.

mod cuda;

use cuda::{Gpu, Random};
use weight_ops::checksum::{LEAF_BYTES, PartialChecksum, checksum};

#[test]
fn parts_of_any_length_at_any_address() {
    let Some(gpu) = Gpu::open() else { return };
    let lengths = [0, 1, 7, 8, 15, 16, 17, 511, 512, 513, 4095, 4096, 4097, LEAF_BYTES - 1, LEAF_BYTES];
    let more = [LEAF_BYTES + 1, 2 * LEAF_BYTES, 3 * LEAF_BYTES + 5000, 40 * LEAF_BYTES + 8];
    let mut random = Random(1);
    let mut parts = Vec::new();
    let mut expected = Vec::new();
    for (index, len) in lengths.into_iter().chain(more).enumerate() {
        for shift in [0, 16, 8, 2, 1, 15] {
            let bytes = random.bytes(len);
            let first_leaf = index as u64 * 1000;
            expected.push(PartialChecksum::of(first_leaf, &bytes));
            parts.push((first_leaf, gpu.upload(&bytes, shift)));
        }
    }
    let mut checksums = gpu.kernels.checksums(&gpu.stream, &parts).unwrap();
    for _ in 0..3 {
        let (again, ours) = checksums.enqueue(&gpu.stream).unwrap().wait().unwrap();
        for (index, (ours, expected)) in ours.iter().zip(&expected).enumerate() {
            assert_eq!(ours, expected, "part {index}");
        }
        assert_eq!(ours.len(), expected.len());
        checksums = again;
    }
}

#[test]
fn the_parts_of_ranks_sum_up_to_the_whole() {
    let Some(gpu) = Gpu::open() else { return };
    let parameter = Random(2).bytes(9 * LEAF_BYTES + 4321);
    let cut = 4 * LEAF_BYTES;
    let parts = [(4, gpu.upload(&parameter[cut..], 0)), (0, gpu.upload(&parameter[..cut], 0))];
    let checksums = gpu.kernels.checksums(&gpu.stream, &parts).unwrap();
    let (_, sums) = checksums.enqueue(&gpu.stream).unwrap().wait().unwrap();
    assert_eq!((sums[0] + sums[1]).finish(), checksum(&parameter));
}

#[test]
fn one_wrong_byte_is_found() {
    let Some(gpu) = Gpu::open() else { return };
    let mut parameter = Random(3).bytes(2 * LEAF_BYTES);
    let whole = checksum(&parameter);
    for at in [0, 1234, LEAF_BYTES - 1, LEAF_BYTES, 2 * LEAF_BYTES - 1] {
        parameter[at] ^= 1;
        let parts = [(0, gpu.upload(&parameter, 0))];
        let checksums = gpu.kernels.checksums(&gpu.stream, &parts).unwrap();
        let (_, sums) = checksums.enqueue(&gpu.stream).unwrap().wait().unwrap();
        assert_ne!(sums[0].finish(), whole, "byte {at}");
        parameter[at] ^= 1;
    }
}
