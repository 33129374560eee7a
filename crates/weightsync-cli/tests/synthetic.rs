//! Synthetic checkpoints: the same each time, whole or not there, and safe for two writers.

use std::fs;
use std::os::unix::fs::FileExt;
use std::thread;

use weightsync_cli::checkpoint::{CONFIG_FILE, Checkpoint, HeadCounts, MODEL_FILE};
use weightsync_cli::synthetic::{Shape, ensure};
use xfer_plan::DType;

/// Whether `ensure` wrote, as its progress tells.
fn wrote(folder: &std::path::Path, shape: &Shape, seed: u64) -> bool {
    let mut last = None;
    ensure(folder, shape, seed, &mut |done, total| {
        assert!(done <= total && last.is_none_or(|last| last <= done));
        last = Some(done);
    })
    .unwrap();
    assert!(last.is_none_or(|last| last == shape.bytes()));
    last.is_some()
}

/// With tensors that are written in more than one block, and do not end with one.
fn several_blocks() -> Shape {
    Shape { vocab: 4001, ..Shape::tiny() }
}

#[test]
fn the_preset_has_the_published_size() {
    let shape = Shape::qwen3_0_6b();
    let tensors = shape.tensors();
    assert_eq!(tensors.len(), 28 * 11 + 2);
    // 596 049 920 parameters, the output tied to the embedding.
    assert_eq!(shape.bytes(), 2 * 596_049_920);
    assert!(tensors.iter().all(|tensor| tensor.dtype == DType::BF16));
    let shape_of = |name: &str| tensors.iter().find(|tensor| tensor.name == name).unwrap().shape.clone();
    assert_eq!(shape_of("model.layers.27.self_attn.q_proj.weight"), [2048, 1024]);
    assert_eq!(shape_of("model.layers.27.self_attn.o_proj.weight"), [1024, 2048]);
    assert_eq!(shape_of("model.embed_tokens.weight"), [151_936, 1024]);
}

#[test]
fn it_is_written_once_and_reads_back() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("a").join("b");
    let shape = several_blocks();
    assert!(wrote(&folder, &shape, 1));
    assert!(!wrote(&folder, &shape, 1));

    let checkpoint = Checkpoint::open(&folder).unwrap();
    assert_eq!(checkpoint.tensors(), shape.tensors());
    assert_eq!(checkpoint.bytes(), shape.bytes());
    assert_eq!(checkpoint.heads(), HeadCounts::new(8, 4));
    let mut names: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, [CONFIG_FILE, "lock", MODEL_FILE]);
}

#[test]
fn weights_are_plausible_and_differ_by_seed_and_tensor() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let shape = Shape::tiny();
    wrote(one.path(), &shape, 1);
    wrote(two.path(), &shape, 2);
    let (one, two) = (Checkpoint::open(one.path()).unwrap(), Checkpoint::open(two.path()).unwrap());
    let values = |checkpoint: &Checkpoint, name: &str| -> Vec<f32> {
        let bytes = checkpoint.read_all(name).unwrap();
        bytes
            .chunks_exact(2)
            .map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16))
            .collect()
    };
    let embedding = values(&one, "model.embed_tokens.weight");
    assert!(embedding.iter().all(|value| value.abs() <= 0.0501));
    let mean = embedding.iter().sum::<f32>() / embedding.len() as f32;
    let variance = embedding.iter().map(|value| value * value).sum::<f32>() / embedding.len() as f32;
    assert!(mean.abs() < 1e-3, "{mean}");
    assert!((variance - 0.05 * 0.05 / 3.0).abs() < 1e-4, "{variance}");
    assert!(values(&one, "model.norm.weight").iter().all(|value| (value - 1.0).abs() < 0.06));
    assert_ne!(embedding, values(&two, "model.embed_tokens.weight"));
    assert_ne!(embedding, values(&one, "lm_head.weight"));
}

#[test]
fn the_file_is_the_same_on_every_machine() {
    let folder = tempfile::tempdir().unwrap();
    wrote(folder.path(), &several_blocks(), 7);
    let file = fs::read(folder.path().join(MODEL_FILE)).unwrap();
    let sum = file.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    // When this changes on purpose, raise the format's version: caches hold files of the old one.
    assert_eq!(format!("{sum:016x}"), "b0afee89c27d252f");
}

#[test]
fn what_is_wrong_is_written_again() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let (shape, model, config) = (Shape::tiny(), folder.join(MODEL_FILE), folder.join(CONFIG_FILE));
    wrote(folder, &shape, 1);
    let good = fs::read(&model).unwrap();

    let in_file = |offset: u64| {
        let byte = [!good[offset as usize]];
        fs::File::options().write(true).open(&model).unwrap().write_all_at(&byte, offset).unwrap();
    };
    let embedding = 2 * shape.vocab * shape.hidden; // the last byte of the first tensor in the file, lm_head.weight
    let first_end = good.len() as u64 - shape.bytes() + embedding - 1;
    let damages: [(&str, &dyn Fn()); 8] = [
        ("the start of a tensor", &|| in_file(first_end + 1 - embedding)),
        ("the end of a tensor", &|| in_file(first_end)),
        ("cut short", &|| fs::write(&model, &good[..good.len() - 1]).unwrap()),
        ("no file", &|| fs::remove_file(&model).unwrap()),
        ("no config", &|| fs::remove_file(&config).unwrap()),
        ("another config", &|| fs::write(&config, "{}").unwrap()),
        ("the last byte", &|| in_file(good.len() as u64 - 1)),
        ("zeros, as a crash may leave", &|| {
            let mut zeros = good.clone();
            zeros[good.len() / 2..].fill(0);
            fs::write(&model, zeros).unwrap();
        }),
    ];
    for (what, damage) in damages {
        damage();
        assert!(wrote(folder, &shape, 1), "{what}");
        assert!(fs::read(&model).unwrap() == good, "{what}");
    }
    // What a crash leaves under the other name is in nobody's way.
    fs::write(folder.join("model.partial"), "half").unwrap();
    assert!(!wrote(folder, &shape, 1));
    // Another seed or shape in the same folder is another checkpoint.
    assert!(wrote(folder, &shape, 2));
    let other = Shape { layers: 1, ..Shape::tiny() };
    assert!(wrote(folder, &other, 2));
    assert!(wrote(folder, &shape, 1));
    assert!(fs::read(&model).unwrap() == good);
}

#[test]
fn several_writers_make_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let shape = Shape::tiny();
    let writers = thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| wrote(folder.path(), &shape, 3))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).filter(|&wrote| wrote).count()
    });
    assert_eq!(writers, 1);
}

#[test]
fn a_folder_that_cannot_be_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let error = ensure(&file.join("sub"), &Shape::tiny(), 1, &mut |_, _| {}).unwrap_err().to_string();
    assert!(error.contains("file/sub") && error.contains("XDG_CACHE_HOME"), "{error}");
}
