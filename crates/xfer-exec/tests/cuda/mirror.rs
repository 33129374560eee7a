//! Mirrors: what an upload changes, and who reaches one that was renewed.

use xfer_exec::cuda::{CudaError, Mirror};
use xfer_exec::local::Doorman;

use crate::SOON;
use crate::drivers::BYTES;
use crate::gpu::{Random, gpus};
use crate::staged::{BEFORE, attached, shared};

#[test]
fn a_mirror_uploads_the_ranges_that_it_is_told_and_nothing_else() {
    let Some(gpus) = gpus() else { return };
    let gpu = &gpus[0];
    let way = shared(gpu, 0);
    let source = Random(26).bytes(BYTES as usize);
    attached(way.doorman()).copy_in(0, &source).unwrap();
    let ranges = [0..1, 77..77, 1000..5001, BYTES - 3..BYTES];
    way.mirror.upload(&way.served, &ranges).unwrap().wait(SOON).unwrap();
    let mut expected = vec![BEFORE; BYTES as usize];
    for range in ranges {
        let range = range.start as usize..range.end as usize;
        expected[range.clone()].copy_from_slice(&source[range]);
    }
    assert!(gpu.download(&way.served) == expected);
    assert!(way.mirror.upload(&way.served, &[1..2, BYTES..BYTES + 1]).is_err(), "outside");
    let shorter = way.served.part(0..BYTES - 1).unwrap();
    assert!(way.mirror.upload_all(&shorter).is_err(), "where there is no room");
}

#[test]
fn a_mirror_that_is_renewed_is_reached_by_nobody_of_before_and_by_the_gpu() {
    let Some(gpus) = gpus() else { return };
    let gpu = &gpus[0];
    let mut way = shared(gpu, 0);
    let mut before = attached(way.doorman());
    before.copy_in(0, &[7; 100]).unwrap();
    let upload = way.mirror.upload_all(&way.served).unwrap();
    assert!(matches!(way.mirror.renew(), Err(CudaError::Uploading)), "the GPU may read the pages of before");
    upload.wait(SOON).unwrap();
    way.mirror.renew().unwrap();
    way.doorman = Some(Doorman::open(vec![way.mirror.file().unwrap().clone()]).unwrap().0);
    before.copy_in(50, &[8; 100]).unwrap();
    attached(way.doorman()).copy_in(10, &[9; 10]).unwrap();
    way.mirror.upload_all(&way.served).unwrap().wait(SOON).unwrap();
    let expected: Vec<u8> = (0..BYTES).map(|at| if (10..20).contains(&at) { 9 } else { 0 }).collect();
    assert!(gpu.download(&way.served) == expected);
    // One that is not shared has nobody else to be kept from.
    let mut private = Mirror::private(&gpu.device, BYTES).unwrap();
    assert!(private.file().is_none());
    private.renew().unwrap();
}
