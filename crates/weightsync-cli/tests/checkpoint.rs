//! Checkpoints on disk: what opens, what is refused, and what is read.

mod common;

use std::fs;
use std::path::Path;

use common::{made_up, write_raw, write_tensors};
use proptest::prelude::*;
use safetensors::Dtype;
use weightsync_cli::checkpoint::{Checkpoint, HeadCounts, INDEX_FILE};
use xfer_plan::{DType, TensorBox};

fn refused(path: &Path) -> String {
    Checkpoint::open(path).unwrap_err().to_string()
}

#[test]
fn every_dtype_and_shape_reads_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let mut tensors: Vec<_> = [
        (Dtype::BOOL, DType::Bool),
        (Dtype::U8, DType::U8),
        (Dtype::I8, DType::I8),
        (Dtype::F8_E4M3, DType::F8E4M3),
        (Dtype::F8_E5M2, DType::F8E5M2),
        (Dtype::I16, DType::I16),
        (Dtype::U16, DType::U16),
        (Dtype::F16, DType::F16),
        (Dtype::BF16, DType::BF16),
        (Dtype::I32, DType::I32),
        (Dtype::U32, DType::U32),
        (Dtype::F32, DType::F32),
        (Dtype::I64, DType::I64),
        (Dtype::U64, DType::U64),
        (Dtype::F64, DType::F64),
    ]
    .into_iter()
    .map(|(theirs, ours)| (format!("t.{ours}"), theirs, vec![3, 5]))
    .collect();
    tensors.push(("scalar".into(), Dtype::F32, vec![]));
    tensors.push(("empty".into(), Dtype::F32, vec![4, 0]));
    write_tensors(&path, &tensors);

    for open in [&path, folder.path()] {
        let checkpoint = Checkpoint::open(open).unwrap();
        assert_eq!(checkpoint.tensors().len(), tensors.len());
        assert!(checkpoint.tensors().is_sorted_by(|a, b| a.name < b.name));
        let mut bytes = 0;
        for (name, dtype, shape) in &tensors {
            let expected = made_up(name, *dtype, shape);
            bytes += expected.len() as u64;
            assert_eq!(checkpoint.read_all(name).unwrap(), expected, "{name}");
            let tensor = checkpoint.get(name).unwrap();
            assert!(name.ends_with(tensor.dtype.name()) || !name.starts_with("t."), "{name}");
            assert_eq!(tensor.bytes(), expected.len() as u64);
        }
        assert_eq!(checkpoint.bytes(), bytes);
        assert_eq!(checkpoint.heads(), None);
    }
}

#[test]
fn an_index_joins_its_files() {
    let folder = tempfile::tempdir().unwrap();
    let tensor = |name: &str| (name.to_owned(), Dtype::F16, vec![4, 4]);
    write_tensors(&folder.path().join("a.safetensors"), &[tensor("x"), tensor("z")]);
    write_tensors(&folder.path().join("b.safetensors"), &[tensor("y")]);
    let index = folder.path().join(INDEX_FILE);
    let check = |weight_map: &str| {
        fs::write(&index, format!(r#"{{"metadata": {{"total_size": 96}}, "weight_map": {weight_map}}}"#))
            .unwrap();
        assert_eq!(refused_or_empty(folder.path()), refused_or_empty(&index));
        refused_or_empty(folder.path())
    };
    let good = r#"{"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}"#;
    assert_eq!(check(good), "");
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let names: Vec<_> = checkpoint.tensors().iter().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(names, ["x", "y", "z"]);
    for name in names {
        assert_eq!(checkpoint.read_all(name).unwrap(), made_up(name, Dtype::F16, &[4, 4]));
    }

    for (weight_map, expected) in [
        (
            r#"{"x": "a.safetensors", "y": "b.safetensors"}"#,
            "`a.safetensors` holds tensor `z`, which the index does not",
        ),
        (
            r#"{"x": "a.safetensors", "y": "a.safetensors", "z": "a.safetensors"}"#,
            "`y` should be in `a.safetensors` and",
        ),
        (
            r#"{"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}"#,
            "`z` should be in `b.safetensors` and is not",
        ),
        (
            r#"{"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors", "w": "c.safetensors"}"#,
            "tensor `w` should be in `c.safetensors`: No such file",
        ),
        (
            r#"{"x": "../a.safetensors"}"#,
            "tensor `x` is in `../a.safetensors`, which is not a plain file name",
        ),
        (r#"{"x": "/etc/passwd"}"#, "not a plain file name"),
        (r#"{"x": ".."}"#, "not a plain file name"),
        (r#"{"x": ""}"#, "not a plain file name"),
        (r#"{"x": 3}"#, "invalid type"),
        (r#"["x"]"#, "invalid type"),
    ] {
        let error = check(weight_map);
        assert!(error.contains(expected), "{weight_map}: {error}");
        assert!(error.contains(INDEX_FILE), "{error}");
    }

    write_tensors(&folder.path().join("b.safetensors"), &[tensor("y"), tensor("x")]);
    let error = check(good);
    assert!(error.contains("tensor `x` is in") && error.contains("and in `b.safetensors`"), "{error}");
}

fn refused_or_empty(path: &Path) -> String {
    Checkpoint::open(path).map_or_else(|error| error.to_string(), |_| String::new())
}

#[test]
fn a_folder_must_say_which_file() {
    let folder = tempfile::tempdir().unwrap();
    assert!(refused(folder.path()).contains("no model.safetensors, no model.safetensors.index.json"));
    write_raw(&folder.path().join("only.safetensors"), "{}", 0);
    assert_eq!(Checkpoint::open(folder.path()).unwrap().bytes(), 0);
    write_raw(&folder.path().join("second.safetensors"), "{}", 0);
    assert!(refused(folder.path()).contains("2 .safetensors files but no"));
    assert!(refused(&folder.path().join("none.safetensors")).contains("none.safetensors: No such file"));
}

#[test]
fn damaged_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let entry = |name: &str, dtype: &str, shape: &str, first: u64, last: u64| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{first},{last}]}}"#)
    };
    let a = entry("a", "F32", "[2,2]", 0, 16);
    let cases = [
        // (entries, bytes of data, what the error says)
        (format!("{a},{}", entry("b", "U8", "[4]", 16, 20)), 20, ""),
        (format!("{a},{}", entry("b", "U8", "[4]", 16, 20)), 19, "cut short: tensor `b` needs "),
        (format!("{a},{}", entry("b", "U8", "[4]", 16, 20)), 3, "cut short: tensor `a` needs "),
        (format!("{a},{}", entry("b", "U8", "[4]", 16, 20)), 25, "5 bytes after the last tensor"),
        (format!("{a},{}", entry("b", "U8", "[4]", 12, 16)), 16, "tensor `b` overlaps tensor `a`"),
        (format!("{a},{}", entry("b", "F32", "[2,2]", 0, 16)), 16, "overlaps tensor"),
        (
            format!("{a},{}", entry("b", "U8", "[4]", 18, 22)),
            22,
            "2 bytes before tensor `b` belong to no tensor",
        ),
        (entry("a", "U8", "[4]", 1, 5), 5, "1 bytes before tensor `a`"),
        (entry("a", "F32", "[2,2]", 0, 12), 12, "tensor `a`: bytes 0..12 do not hold F32 of shape [2, 2]"),
        (entry("a", "F32", "[2,2]", 16, 0), 16, "tensor `a`: bytes 16..0 do not hold"),
        (entry("a", "F32", "[4294967296,4294967296]", 0, 0), 0, "do not hold F32"),
        (entry("a", "U8", "[18446744073709551615]", 0, u64::MAX), 0, "cut short: tensor `a`"),
        (entry("a", "F7", "[2]", 0, 2), 2, "tensor `a`: unknown variant `F7`"),
        (entry("a", "C64", "[2]", 0, 16), 16, "tensor `a` has dtype C64, which cannot be transferred"),
        (entry("a", "U8", "[-1]", 0, 1), 1, "tensor `a`: invalid value: integer `-1`"),
        (entry("a", "U8", "[1.5]", 0, 1), 1, "tensor `a`: invalid type: floating point"),
        (format!("{a},{a}"), 16, "tensor `a` comes twice"),
        (r#""a":{"dtype":"U8","shape":[1]}"#.into(), 1, "tensor `a`: missing field `data_offsets`"),
        (r#""a":{"dtype":"U8","#.into(), 1, "tensor `a`: "),
        (r#""__metadata__":{"format":"pt"}"#.into(), 0, ""),
    ];
    for (entries, data_bytes, expected) in cases {
        write_raw(&path, &format!("{{{entries}}}"), data_bytes);
        let error = refused_or_empty(&path);
        assert!(error.contains(expected) && error.is_empty() == expected.is_empty(), "{entries}: {error}");
        assert!(error.is_empty() || error.contains("model.safetensors"), "{error}");
    }

    for (bytes, expected) in [
        (vec![], "0 bytes do not hold its header"),
        (vec![1, 0, 0], "3 bytes do not hold its header"),
        ([100u64.to_le_bytes().as_slice(), b"{}"].concat(), "10 bytes do not hold its header"),
        ([100_000_001u64.to_le_bytes().as_slice(), b"{}"].concat(), "announce a header of 100000001 bytes"),
        (vec![0xff; 64], "announce a header of 18446744073709551615 bytes"),
        ([2u64.to_le_bytes().as_slice(), b"[]"].concat(), "an object with an entry for each tensor"),
        ([2u64.to_le_bytes().as_slice(), b"\xff\xff"].concat(), "bad safetensors header"),
        (8u64.to_le_bytes().iter().copied().chain(*b"{}    \n}").collect(), "trailing characters"),
    ] {
        fs::write(&path, bytes).unwrap();
        let error = refused(&path);
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn a_file_cut_at_any_byte_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    write_tensors(&path, &[("a".into(), Dtype::F32, vec![3]), ("b".into(), Dtype::U8, vec![5])]);
    let whole = fs::read(&path).unwrap();
    assert_eq!(refused_or_empty(&path), "");
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        refused(&path);
    }
}

#[test]
fn head_counts_come_from_the_config() {
    let folder = tempfile::tempdir().unwrap();
    write_raw(&folder.path().join("model.safetensors"), "{}", 0);
    let heads = |config: &str| {
        fs::write(folder.path().join("config.json"), config).unwrap();
        Checkpoint::open(folder.path())
            .map(|checkpoint| checkpoint.heads())
            .map_err(|error| error.to_string())
    };
    let counts = |query, key_value| Ok(HeadCounts::new(query, key_value));
    assert_eq!(heads(r#"{"num_attention_heads": 16, "num_key_value_heads": 8}"#), counts(16, 8));
    assert_eq!(heads(r#"{"num_attention_heads": 12}"#), counts(12, 12));
    assert_eq!(heads(r#"{"model_type": "resnet"}"#), Ok(None));
    for bad in ["0", "3", "32", "-1", "\"x\""] {
        let config = format!(r#"{{"num_attention_heads": 16, "num_key_value_heads": {bad}}}"#);
        assert!(heads(&config).unwrap_err().contains("config.json"), "{bad}");
    }
    assert!(
        heads(r#"{"num_attention_heads": 0, "num_key_value_heads": 0}"#).unwrap_err().contains("config.json")
    );
    assert!(heads("{").unwrap_err().contains("config.json"));
    assert!(heads(&" ".repeat((1 << 20) + 1)).unwrap_err().contains("more than the 1048576 that are read"));
}

#[test]
fn parts_that_are_not_there_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    write_tensors(&path, &[("a".into(), Dtype::F32, vec![4, 3])]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let bounds = |start: &[u64], len: &[u64]| TensorBox::new(start, len).unwrap();
    let read = |name: &str, bounds: &TensorBox, bytes: usize| {
        checkpoint.read_box(name, bounds, &mut vec![0; bytes]).unwrap_err().to_string()
    };
    assert!(read("b", &bounds(&[0, 0], &[4, 3]), 48).contains("no tensor `b`"));
    assert!(read("a", &bounds(&[1, 0], &[4, 3]), 48).contains("[1..5, 0..3] of tensor `a` (shape [4, 3])"));
    assert!(read("a", &bounds(&[0], &[4]), 16).contains("cannot read [0..4]"));
    assert!(read("a", &bounds(&[0, 0], &[4, 3]), 47).contains("into 47 bytes"));
    assert!(
        checkpoint.read_range("a", 44, &mut [0; 5]).unwrap_err().to_string().contains("5 bytes from byte 44")
    );
    assert!(checkpoint.read_range("a", u64::MAX, &mut [0; 5]).is_err());
    checkpoint.read_range("a", 48, &mut []).unwrap();

    // The file shrinks while it is open: an error, and no half-read buffer taken for a whole one.
    let half = fs::metadata(&path).unwrap().len() - 24;
    fs::File::options().write(true).open(&path).unwrap().set_len(half).unwrap();
    assert!(checkpoint.read_all("a").unwrap_err().to_string().contains("model.safetensors"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Any box equals what plain counting picks from the whole tensor.
    #[test]
    fn boxes_read_what_they_hold(
        dims in prop::collection::vec((1u64..40, 0.0..1.0f64, 0.0..1.0f64), 0..4),
        dtype in prop::sample::select(vec![(Dtype::U8, 1u64), (Dtype::BF16, 2), (Dtype::F64, 8)]),
    ) {
        let shape: Vec<u64> = dims.iter().map(|dim| dim.0).collect();
        let start: Vec<u64> = dims.iter().map(|&(size, at, _)| (size as f64 * at) as u64).collect();
        let len: Vec<u64> =
            dims.iter().zip(&start).map(|(&(size, _, part), start)| ((size - start + 1) as f64 * part) as u64).collect();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        write_tensors(&path, &[("t".into(), dtype.0, shape.iter().map(|&size| size as usize).collect())]);
        let checkpoint = Checkpoint::open(&path).unwrap();
        let whole = checkpoint.read_all("t").unwrap();

        let mut expected = Vec::new();
        for (index, element) in whole.chunks_exact(dtype.1 as usize).enumerate() {
            let (mut rest, mut inside) = (index as u64, true);
            for dim in (0..shape.len()).rev() {
                inside &= (start[dim]..start[dim] + len[dim]).contains(&(rest % shape[dim]));
                rest /= shape[dim];
            }
            if inside {
                expected.extend_from_slice(element);
            }
        }
        let mut found = vec![0; expected.len()];
        checkpoint.read_box("t", &TensorBox::new(&start, &len).unwrap(), &mut found).unwrap();
        prop_assert_eq!(found, expected);
    }
}

/// Boxes that are longer than the window, narrow in wide rows, and wide: each way of reading.
#[test]
fn large_boxes_read_what_they_hold() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.safetensors");
    let (rows, columns) = (600usize, 20_000usize);
    write_tensors(&path, &[("t".into(), Dtype::U8, vec![rows, columns])]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let whole = checkpoint.read_all("t").unwrap();
    for (first, count) in [(0, 20_000), (5, 17_000), (19_000, 1000), (9000, 3000), (19_999, 1), (7, 0)] {
        let bounds = TensorBox::new(&[3, first as u64], &[590, count as u64]).unwrap();
        let mut found = vec![0; 590 * count];
        checkpoint.read_box("t", &bounds, &mut found).unwrap();
        let expected: Vec<u8> = (3..593)
            .flat_map(|row| &whole[row * columns + first..row * columns + first + count])
            .copied()
            .collect();
        assert!(found == expected, "columns {first}, {count}");
    }
}
