//! Bytes as a checkpoint of one file, and if it is one, what trainers and inference ranks make of it.

#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use weightsync_cli::checkpoint::Checkpoint;
use weightsync_cli::tensor_parallel::Layout;

static FILE: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = PathBuf::from(format!("/dev/shm/weightsync-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder.join("model.safetensors")
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    std::fs::write(&*FILE, bytes).unwrap();
    let Ok(checkpoint) = Checkpoint::open(&FILE) else { return };
    let read: usize =
        checkpoint.tensors().iter().map(|tensor| checkpoint.read_all(&tensor.name).unwrap().len()).sum();
    assert!(read < bytes.len(), "{read} bytes of tensors in a file of {}", bytes.len());
    for tp in [1, 3] {
        if let Ok(layout) = Layout::new(checkpoint.tensors(), checkpoint.heads(), tp) {
            let _ = layout.params(tp - 1);
        }
    }
});
